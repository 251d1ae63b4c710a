"""That whole products are gone: in a step's optimized graph, and in what XLA compiles.

Masks of rows and columns that are a grid keep, in a branch of a condition, what is done under a mask that is none; for
convolutions' filters that is the whole gradient. That branch is not looked at here, all else is.
"""

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from agreement import PART, sgd, untrained
from network import Network, in_a_row, layers, optimized_nodes

import freezeops as fz

# Primes, so that nothing else has as many entries as a weight, or a multiple of it.
NETWORKS = {
    "Dense": lambda: Network(
        (6, 11),
        in_a_row(
            layers.Dense(13, "tanh", name="entries"),
            layers.Dense(17, "tanh", name="rows"),
            layers.Dense(19, "tanh", name="columns"),
            layers.EinsumDense("abc,cde->abde", (None, 5, 7), name="einsum"),
        ),
        {"entries": "entries", "rows": "rows", "columns": "columns", "einsum": "entries"},
    ),
    "MultiHeadAttention": lambda: Network((6, 11), lambda x: layers.MultiHeadAttention(3, 5)(x, x)),
    "Conv2D": lambda: Network((7, 7, 11), in_a_row(layers.Conv2D(13, 3, name="out"), layers.Conv2D(17, 3, name="in")),
                              {"out": "columns", "in": "inputs"}),
}  # fmt: skip

POLICIES = ("float32", "mixed_float16")

PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2DBackpropFilter", "_FusedMatMul")


class Observed(keras.Model):
    """Remembers which products its step's gradients are made of, by the variable's path."""

    def train_step(self, data):
        self.products = {}
        apply = self.optimizer.apply

        def observed(gradients, variables=None):
            variables = self.trainable_variables if variables is None else variables
            for gradient, variable in zip(gradients, variables, strict=True):
                self.products[_path(self, variable)] = _product(gradient.op)
            return apply(gradients, variables)

        self.optimizer.apply = observed
        try:
            return super().train_step(data)
        finally:
            del self.optimizer.apply


def _path(model, variable):
    return next(each.path for each in model.trainable_variables if each is variable or each.value is variable)


def _product(op):
    """The name of the product that a gradient is made of, beside casts and the like."""
    while op.type not in PRODUCTS:
        if not op.inputs:
            return None
        op = op.inputs[0].op
    return op.name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_optimized_graph(name, policy):
    """The products that gradients were traced from, by their names."""
    for skips in (True, False):
        of = untrained(NETWORKS[name], skips, policy=policy, model_class=Observed)
        nodes = optimized_nodes(lambda of=of: of.fit(1))
        assert not skips or of.outcomes() == dict.fromkeys(of.masks, PART)
        assert isinstance(of.model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
        there = {node.name for node in nodes if node.op in PRODUCTS}
        assert there
        for path in of.masks:
            product = of.model.products[path]
            found = [each for each in there if re.search(rf"(^|/){re.escape(product)}($|/)", each)]
            assert bool(found) != skips, (path, found)


def computations(hlo):
    """The lines of each computation, by its name, of HLO text."""
    found, name = {}, None
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def without_branches(hlo):
    """The lines of HLO text, without those that run only where a grid's mask is none: the condition is false."""
    of = computations(hlo)
    calls = {name: set(re.findall(r"%([\w.\-]+)", " ".join(lines))) & of.keys() for name, lines in of.items()}
    otherwise = set(re.findall(r"false_computation=%([\w.\-]+)", hlo))
    reached, left = set(), [name for name in of if re.search(rf"^ENTRY %?{re.escape(name)} ", hlo, re.M)]
    assert left
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += calls[name] - otherwise
    return [line for name in reached for line in of[name]]


def products(lines):
    """The numbers of entries of what products and convolutions make; also those that a library is called for."""
    sizes = []
    for line in lines:
        made = re.search(r" = (.*?) (dot|convolution|custom-call)\(", line)
        if made and 'custom_call_target="freezeops_' not in line:
            sizes += [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", made[1])]
    return sizes


def compiled(model, x, y):
    """The optimized HLO of a train step."""
    step = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
    return step.experimental_get_compiler_ir(tf.constant(x), tf.constant(y))(stage="optimized_hlo")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled(name, policy):
    """No product has as many entries as a weight, or a multiple of it, as one for each example has."""
    for skips in (True, False):
        of = untrained(NETWORKS[name], skips, policy=policy)
        of.optimizer.build(of.model.trainable_variables)
        made = products(without_branches(compiled(of.model, of.x, of.y)))
        assert made
        for path in of.masks:
            whole = math.prod(of.initial[path].shape)
            assert any(size % whole == 0 for size in made) != skips, path


@pytest.mark.parametrize("skips", [True, False])
def test_frozen_below_the_first_trainable_one(skips):
    """Of capacity 0: neither its own gradient nor that of its output is made."""

    def model_of(trains):
        keras.utils.clear_session()
        model = keras.Sequential([keras.Input((11,)), layers.Dense(13, "tanh", name="a"), layers.Dense(17, name="b")])
        masks = {"a/kernel": trains, "a/bias": trains, "b/kernel": np.arange(221).reshape(13, 17) % 5 == 0}
        optimizer = fz.MaskedOptimizer(sgd(), masks, state="compact", skip_frozen_gradients=skips)
        model.compile(optimizer, "mse", jit_compile=False)
        optimizer.build(model.trainable_variables)
        return model

    x, y = np.ones((8, 11), "float32"), np.ones((8, 17), "float32")
    for frozen in (True, False):
        model = model_of(not frozen)
        made = products(compiled(model, x, y).splitlines())
        assert (143 in made) != frozen
        # The output of `a` forwards, and its gradient.
        assert made.count(8 * 13) == (1 if frozen else 2)
        nodes = optimized_nodes(lambda model=model: model.fit(x, y, verbose=0))
        names = [node.name for node in nodes if node.op in PRODUCTS and "gradient_tape" in node.name]
        assert any("/a" in each for each in names) != frozen
        assert len([each for each in names if "/b" in each]) == (0 if skips else 1) + (0 if frozen else 1)
        reports = {report.path: report.gradient for report in model.optimizer.describe()}
        assert not frozen or reports[model.get_layer("a").kernel.path] == "trainable part only"
