"""The contract with Keras, TensorFlow and tf_keras: its tables are complete, and what is missing is noticed."""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from rich.console import Console

import freezeops as fz
import freezeops.__main__
from freezeops import legacy
from freezeops.keras_compat import contract, inspection, tf_keras_contract, tracking, versions
from freezeops.keras_compat.contract import Contract, Needs
from freezeops.keras_compat.wrapped import average_slots
from freezeops.slots import catalogue
from tests.common import assert_same_bits

ROOT = Path(fz.__file__).parent
COMPAT = ROOT / "keras_compat"
CONTRACTS = {
    "TENSORFLOW": contract.TENSORFLOW,
    "KERAS": contract.KERAS,
    "TF_KERAS": tf_keras_contract.TF_KERAS,
}
NAMES = {part for each in CONTRACTS.values() for need in each.needs for part in (need.name, need.value) if part}
NAMES |= {part for each in CONTRACTS.values() for need in each.needs for part in need.owner.split(".")}
FOREIGN = ("keras.", "tf_keras.", "tensorflow.")


# Nothing is broken, and nothing private stands outside of the tables.


@pytest.mark.parametrize("name", CONTRACTS)
def test_nothing_is_broken_here(name):
    assert CONTRACTS[name].broken() == []


def is_private(name):
    return bool(re.fullmatch(r"_[A-Za-z]\w*", name)) or name in ("__internal__", "raw_ops")


def private_names(tree):
    """Yields each private name in a module, with the node: attributes, imports, and names as strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            yield node.value, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((name.name, node) for name in node.names if is_private(name.name))


def is_own(node):
    """Whether this is `self._name` or `cls._name`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def defined_names(tree):
    """The names that a module defines: functions, classes, variables, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.id} if isinstance(node, ast.Name) else {node.attr} if is_own(node) else set()
        elif isinstance(node, ast.Tuple) and node.elts and all(isinstance(each, ast.Constant) for each in node.elts):
            found |= {each.value for each in node.elts if isinstance(each.value, str)}  # __slots__
    return found


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


def private_modules(tree):
    """The private modules of Keras and TensorFlow that a module imports or names."""
    found = []
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        found += [name for name in modules if re.match(r"(tf_)?keras\.src|tensorflow\.(python|core|compiler)", name)]
        if isinstance(node, ast.Attribute) and re.fullmatch(r"(tf_)?keras\.src|tf\.python", ast.unparse(node)):
            found.append(ast.unparse(node))
    return found


def outside(tree, ours, path="x.py"):
    """What a module outside of keras_compat may not name."""
    found = list(private_modules(tree))
    own = defined_names(tree)
    for name, node in private_names(tree):
        if isinstance(node, ast.Constant) and path == "catalogue.py":
            continue  # slots: declared data, see below
        if name not in (own if name in NAMES and is_own(node) else ours - NAMES):
            found.append(f"{name}, line {node.lineno}")
    found += [f"f_locals, line {node.lineno}" for node in ast.walk(tree) if getattr(node, "attr", "") == "f_locals"]
    return found


def test_nothing_private_is_used_outside_of_keras_compat():
    modules = trees()
    # Of keras_compat only what it has for others.
    ours = set().union(*(defined_names(tree) for path, tree in modules.items() if COMPAT not in path.parents))
    # Keys of files and of checkpoints that are ours.
    ours |= {"_mask"}
    for path, tree in modules.items():
        if COMPAT not in path.parents and path.parent.name not in ("masks", "storage"):  # NumPy only
            assert outside(tree, ours, path.name) == [], path.relative_to(ROOT)


@pytest.mark.parametrize(
    "line",
    [
        "optimizer._iterations",
        "optimizer._some_new_name",
        "getattr(optimizer, '_trainable_variables')",
        "hasattr(x, '_built')",
        "vars(x).get('_tf_apply')",
        "tf.__internal__.tracking.AutoTrackable",
        "tf.raw_ops.VariableShape(input=x)",
        "import keras.src.optimizers",
        "from keras.src import backend",
        "from tensorflow.python.ops import variables",
        "keras.src.optimizers",
        "self._distribution_strategy",
        "frame.f_locals",
    ],
)
def test_what_is_private_would_be_found_outside(line):
    assert outside(ast.parse(line), {"_mask", "_some_name_of_ours"})


def test_all_that_keras_compat_names_is_in_the_tables():
    modules = {path: tree for path, tree in trees().items() if COMPAT in path.parents}
    ours = set().union(*map(defined_names, modules.values()))
    # Attributes and keys that only freezeops sets, and what it calls of the classes that a mix-in is for.
    ours = {name for name in ours if name not in NAMES} | {"_freezeops", "_freezeops_guard", "_registry"}
    ours |= {"_freezeops_bare", "_freezeops_waiting", "_freezeops_load", "_freezeops_updates"}
    ours |= {"_freezeops_before_updates", "_inner_optimizer", "_apply", "_handle"}
    for path, tree in modules.items():
        unknown = [f"{name}, line {node.lineno}" for name, node in private_names(tree) if name not in NAMES | ours]
        assert unknown == [], path.name
        tables = path.name.endswith("contract.py")
        assert tables or all(name in NAMES for name in private_modules(tree)), path.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("f_locals.get"):
                assert ast.literal_eval(node.args[0]) in NAMES, (path.name, node.lineno)


def freezeops_classes():
    for module in pkgutil.walk_packages(fz.__path__, "freezeops."):
        if "__main__" not in module.name and module.name != "freezeops._host" and "libfreezeops" not in module.name:
            for cls in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(cls) and cls.__module__ == module.name:
                    yield cls


def test_methods_that_replace_private_ones_are_in_keras_compat_and_in_the_tables():
    seen = []
    for cls in freezeops_classes():
        foreign = [base for base in cls.__mro__ if base.__module__.startswith(FOREIGN)]
        for base in cls.__mro__ if foreign else ():
            if not base.__module__.startswith("freezeops."):
                continue
            for name in filter(is_private, vars(base)):
                if name == "_abc_impl" or name.startswith(("_tf_api", "_keras_api", "_self_")):
                    continue
                if any(name in vars(each) or inspection.sets(each, name) for each in foreign):
                    assert base.__module__.startswith("freezeops.keras_compat."), (base, name)
                    assert name in NAMES, (base, name)
                    seen.append(name)
    assert {"_trackable_children", "_lookup_dependency", "_create_iteration_variable"} <= set(seen)


def test_slots_of_the_catalogue_are_in_keras():
    tree = ast.parse((ROOT / "slots" / "catalogue.py").read_text(encoding="utf-8"))
    declared = {attribute for known in catalogue._KERAS.values() for attribute in known.slots or ()}
    named = {name for name, node in private_names(tree) if isinstance(node, ast.Constant)}
    assert named - {"_Class", "_momentum", "_centered"} <= declared
    for name, known in catalogue._KERAS.items():
        cls = getattr(keras.optimizers, name, None)
        missing = [each for each in known.slots or () if cls is not None and not inspection.sets(cls, each)]
        # Renamed in Keras 3.13.
        assert missing in ([], ["momentums"], ["adam_momentums"]) if name == "Muon" else missing == [], name


def test_no_line_stands_twice():
    for each in CONTRACTS.values():
        lines = [(need.owner, need.name) for need in each.needs]
        assert len(lines) == len(set(lines))


# What is missing is noticed.

KERNEL = np.linspace(-1, 1, 12).reshape(4, 3).astype("float32")
KERNEL[0] = [-0.0, np.inf, np.nan]
MASK = np.ones((4, 3), bool)
MASK[:2] = False


def lines(*names):
    return [
        pytest.param(name, number, id=f"{need.owner.split('.')[-1]}.{need.name}")
        for name in names
        for number, need in enumerate(CONTRACTS[name].needs)
    ]


def without(monkeypatch, name, number=None, feature=None):
    """Looks for another name in a line of a table, or in all lines of a feature."""
    now = CONTRACTS[name]
    needs = [
        replace(need, name=f"{need.name}_of_old", since="")
        if i == number or need.without is feature is not None
        else need
        for i, need in enumerate(now.needs)
    ]
    changed = Contract(now.package, now.module, now.tested, needs)
    monkeypatch.setattr(tf_keras_contract if name == "TF_KERAS" else contract, name, changed)
    return changed


def train(optimizer, variable, steps=3):
    gradients = np.random.default_rng(0).normal(size=(steps, 4, 3)).astype("float32")
    step = tf.function(lambda gradient: optimizer.apply([gradient], [variable]), autograph=False)
    for i, gradient in enumerate(gradients):
        (step if i else lambda g: optimizer.apply([g], [variable]))(tf.constant(gradient))


def summary_of(optimizer):
    text = io.StringIO()
    optimizer.summary(Console(file=text, width=300))
    return text.getvalue()


def diagnosis(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    freezeops.__main__.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name, number", lines("TENSORFLOW", "KERAS"))
def test_a_name_that_is_gone_is_noticed(monkeypatch, capsys, name, number):
    changed = without(monkeypatch, name, number)
    need = changed.needs[number]
    oldest, newest = changed.tested
    assert [line for line, _ in changed.broken()] == [need]
    if need.without is None:
        with pytest.raises(RuntimeError, match=re.escape(need.name)) as error:
            fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
        for word in (f"{changed.package} {oldest} to {newest}", changed.version(), "pip install"):
            assert word in str(error.value)
        said = diagnosis(capsys, monkeypatch)
        assert "cannot work" in said and need.name in said
        return
    with pytest.warns(UserWarning, match=re.escape(need.without.name)) as told:
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    assert len(told) == 1 and need.name in str(told[0].message) and changed.version() in str(told[0].message)
    assert told[0].filename == __file__
    variable = keras.Variable(KERNEL, name="kernel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.register_mask(variable, MASK)
        train(optimizer, variable)
        fz.MaskedOptimizer(keras.optimizers.Adam(0.1))  # once is enough
    assert_same_bits(variable.numpy()[~MASK], KERNEL[~MASK])
    assert (variable.numpy()[MASK] != KERNEL[MASK]).all()
    assert f"Off: {need.without.name}" in summary_of(optimizer)
    assert f"off: {need.without.name}" in diagnosis(capsys, monkeypatch)


@pytest.mark.parametrize("name, number", lines("TENSORFLOW", "TF_KERAS"))
def test_a_name_that_is_gone_is_noticed_by_legacy(monkeypatch, name, number):
    changed = without(monkeypatch, name, number)
    need = changed.needs[number]
    if need.without is None:
        with pytest.raises(RuntimeError, match=re.escape(need.name)):
            legacy.MaskedOptimizer(tf_keras.optimizers.Adam(0.1))
        return
    with pytest.warns(UserWarning, match=re.escape(need.without.name)) as told:
        optimizer = legacy.MaskedOptimizer(tf_keras.optimizers.Adam(0.1))
    assert len(told) == 1
    variable = tf.Variable(KERNEL, name="kernel")
    optimizer.register_mask(variable, MASK)
    for _ in range(3):
        optimizer.apply_gradients([(tf.ones([4, 3]), variable)])
    assert_same_bits(variable.numpy()[~MASK], KERNEL[~MASK])
    assert f"Off: {need.without.name}" in summary_of(optimizer)


def test_nothing_is_said_where_nothing_is_off():
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    optimizer.build([keras.Variable(KERNEL)])
    assert "Off" not in summary_of(optimizer)


# What a line looks for.


class Old:
    """An owner for the lines below."""

    def __init__(self):
        self._set = 1

    def _called(self, a, b=None):
        """Nothing."""

    def caller(self):
        return [self._called(each) for each in (1, 2)]

    def others(self):
        local = 1
        return local

    def wrapped(self, *args, **kwargs):
        return self.caller(*args, **kwargs)

    wrapped_by_another = staticmethod(lambda *args: args)
    wrapped_by_another.__func__.__module__ = "another_package"


OLD = f"{__name__}.Old"


@pytest.mark.parametrize(
    "need, problem",
    [
        (Needs(OLD, "_called", ""), ""),
        (Needs(OLD, "_gone", ""), "is missing"),
        (Needs(f"{__name__}.Gone", "_called", ""), "is missing"),
        (Needs("no_such_package_at_all", "_called", ""), "is missing"),
        (Needs(OLD, "_called", "", arguments=("a", "b")), ""),
        (Needs(OLD, "_called", "", arguments=("a",)), ""),
        (Needs(OLD, "_called", "", arguments=("a",), replaced=True), "takes (a, b), not (a)"),
        (Needs(OLD, "_called", "", arguments=("b", "a")), "takes (a, b), not (b, a)"),
        (Needs(OLD, "_called", "", arguments=()), "takes (a, b), not ()"),
        (Needs(OLD, "_called", "", called_by=f"{OLD}.caller"), ""),
        (Needs(OLD, "_called", "", called_by=f"{OLD}.others"), "does not call"),
        (Needs(OLD, "_called", "", called_by=f"{OLD}.gone"), "which calls"),
        (Needs(OLD, "wrapped", "", arguments=("a",), replaced=True), ""),
        (Needs(OLD, "_called", "", called_by="numpy.mean"), "does not call"),
        (Needs("numpy.linalg", "norm", "", called_by=f"{OLD}.others"), "does not call"),
        (Needs(OLD, "_called", "", called_by=f"{OLD}.wrapped_by_another"), ""),
        (Needs(OLD, "_set", "", on_instances=True), ""),
        (Needs(OLD, "_not_set", "", on_instances=True), "is missing"),
        (Needs(f"{OLD}.others", "local", "", in_code=True), ""),
        (Needs(f"{OLD}.others", "another", "", in_code=True), "is missing"),
        (Needs(__name__, "OLD", "", value=OLD), ""),
        (Needs(__name__, "OLD", "", value="other"), "not 'other'"),
    ],
)
def test_what_a_line_looks_for(need, problem):
    assert problem in need.problem() if problem else need.problem() == ""


def test_a_line_for_a_newer_version_is_not_looked_for():
    line = Needs("keras.optimizers", "NoSuchClass", "", since="99.0")
    assert Contract("Keras", "keras", ("3.12", "3.15"), [line]).broken() == []
    assert Contract("Keras", "keras", ("3.12", "3.15"), [replace(line, since="3.0")]).broken()


# Each feature that is off.


@pytest.fixture
def off(monkeypatch):
    def switch(*features):
        for name in ("TENSORFLOW", "KERAS"):
            for feature in features:
                now = without(monkeypatch, name, feature=feature)
                monkeypatch.setitem(CONTRACTS, name, now)
                now._told = True

    return switch


def masked(inner=None, **kwargs):
    variable = keras.Variable(KERNEL, name="kernel")
    optimizer = fz.MaskedOptimizer(inner or keras.optimizers.Adam(0.1), {"kernel": MASK}, **kwargs)
    return optimizer, variable


def test_without_fused_updates(off):
    off(contract.FUSED)
    optimizer, variable = masked()
    train(optimizer, variable)
    assert "not fused: this version of Keras" in summary_of(optimizer)


@pytest.mark.parametrize("is_off", [False, True])
def test_without_seeding(off, is_off):
    if is_off:
        off(contract.SEEDING)
    variable = keras.Variable(KERNEL, name="kernel")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    train(optimizer, variable)
    optimizer.register_mask(variable, MASK)
    train(optimizer, variable)
    optimizer.unfreeze(variable)
    kept = optimizer.inner_optimizer._velocities[0].numpy()[~MASK]
    assert (kept != 0).all() if is_off else not kept.any()
    train(optimizer, variable)


def test_compact_state_without_seeding(off):
    off(contract.SEEDING)
    optimizer, variable = masked(state="compact", capacity=1.0)
    train(optimizer, variable)
    assert_same_bits(variable.numpy()[~MASK], KERNEL[~MASK])
    optimizer.unfreeze(variable)
    train(optimizer, variable)
    assert (variable.numpy()[1] != KERNEL[1]).all()


def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0)


@pytest.mark.parametrize("is_off", [False, True])
def test_without_masks_before_loss_scaling(off, is_off):
    if is_off:
        off(contract.SCALER)
    optimizer, variable = masked()
    scaler = scaled(optimizer)
    gradient = np.ones((4, 3), "float32")
    gradient[0, 0] = np.nan  # frozen
    scaler.apply([tf.constant(gradient)], [variable])
    assert_same_bits(variable.numpy()[~MASK], KERNEL[~MASK])
    moved = (variable.numpy()[MASK] != KERNEL[MASK]).all()
    assert moved == (not is_off)  # the scaler skipped the step


def averaging(**kwargs):
    return keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5, **kwargs)


def model_of(optimizer):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, use_bias=False, name="d")])
    model.layers[0].set_weights([KERNEL])
    model.compile(optimizer, "mse", jit_compile=False)
    return model


X, Y = np.ones((4, 4), "float32"), np.ones((4, 3), "float32")
FINITE = np.where(np.isfinite(KERNEL), KERNEL, np.float32(-0.0))


def test_without_the_callback_of_averages(off, fresh_callback):
    off(contract.SWAP)
    model = model_of(fz.MaskedOptimizer(averaging(), {"d/kernel": MASK}))
    model.layers[0].set_weights([FINITE])
    with pytest.raises(RuntimeError, match="SwapEMAWeights must be left out"):
        model.fit(X, Y, verbose=0, validation_data=(X, Y), callbacks=[keras.callbacks.SwapEMAWeights()])
    assert_same_bits(model.get_weights()[0][~MASK], FINITE[~MASK])
    # Without a MaskedOptimizer it does what it did.
    model_of(averaging()).fit(X, Y, verbose=0, validation_data=(X, Y), callbacks=[keras.callbacks.SwapEMAWeights()])


@pytest.fixture
def fresh_callback(monkeypatch):
    """The callback's class as Keras has it, whatever other tests made of it."""
    cls = keras.callbacks.SwapEMAWeights
    fresh = {name: getattr(cls, name) for name in ("on_epoch_end", "on_test_begin", "on_predict_begin")}
    for name in ("_swap_variables", "_finalize_ema_values"):
        method = getattr(cls, name)
        cells = dict(zip(method.__code__.co_freevars, method.__closure__ or (), strict=True))
        fresh[name] = cells["all_of"].cell_contents if "all_of" in cells else method
    for name, method in fresh.items():
        monkeypatch.setattr(cls, name, method)
    return fresh


@pytest.mark.parametrize(
    "make, touched",
    [
        (lambda: keras.optimizers.Adam(0.1), False),
        (averaging, True),
        (lambda: scaled(averaging()), True),
        (lambda: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(averaging())), True),
    ],
    ids=["none", "average", "in a scaler", "in a MultiOptimizer"],
)
def test_the_callback_is_changed_only_for_averages(fresh_callback, make, touched):
    if "MultiOptimizer" in inspect.getsource(make) and not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("new in Keras 3.15")
    callback = keras.callbacks.SwapEMAWeights()  # also where it was there before
    optimizer, variable = masked(make())
    optimizer.build([variable])
    assert hasattr(callback._swap_variables, "_freezeops_guard") == touched
    assert (keras.callbacks.SwapEMAWeights._swap_variables is fresh_callback["_swap_variables"]) != touched


def test_an_average_that_is_asked_for_late_is_guarded(fresh_callback):
    optimizer, variable = masked()
    optimizer.use_ema = True  # before the build, as Keras allows it
    optimizer.build([variable])
    assert hasattr(keras.callbacks.SwapEMAWeights._swap_variables, "_freezeops_guard")


def average_of(optimizer, variable):
    return next(average for own, average in average_slots(optimizer.inner_optimizer) if own.path == variable.path)


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("keras_pairs_with", ["the optimizer's variables", "the model's"])
def test_averages_are_swapped_with_the_variables_that_they_are_of(monkeypatch, keras_pairs_with, state):
    def swap(self, optimizer):  # as before Keras 3.15
        for var, average in zip(self.model.trainable_variables, optimizer._model_variables_moving_average):  # noqa: B905
            value = var.numpy()
            var.assign(average)
            average.assign(value)

    optimizer = fz.MaskedOptimizer(averaging(), {"b/kernel": np.eye(3) == 1}, state=state)
    optimizer.freeze("a/kernel", permanent=True)
    layers = [keras.layers.Dense(3, name=name) for name in "ab"]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(optimizer, "mse", jit_compile=False)
    for _ in range(3):
        model.train_on_batch(X, Y)  # not `fit`, which ends with the averages
    bias, average = (variable.numpy() for variable in (layers[0].bias, average_of(optimizer, layers[0].bias)))
    before = [weight.copy() for weight in model.get_weights()]
    if keras_pairs_with == "the model's":
        monkeypatch.setattr(keras.callbacks.SwapEMAWeights, "_tf_swap_variables", swap)
    callback = keras.callbacks.SwapEMAWeights()
    callback.set_model(model)
    callback.on_test_begin()
    after = model.get_weights()
    assert_same_bits(after[0], before[0])
    assert (bias != average).all() and np.allclose(after[1], average)
    assert_same_bits(after[2][np.eye(3) != 1], before[2][np.eye(3) != 1])
    assert (after[2][np.eye(3) == 1] != before[2][np.eye(3) == 1]).all()


@pytest.mark.parametrize(
    "feature, make",
    [
        (contract.AVERAGES, lambda: masked(averaging())),
        (contract.ACCUMULATION, lambda: masked(keras.optimizers.Adam(0.1, gradient_accumulation_steps=2))),
        (contract.COMPACT, lambda: masked(state="compact")),
    ],
    ids=["averages", "accumulation", "compact"],
)
def test_what_is_off_is_refused(off, feature, make):
    off(feature)
    with pytest.raises(RuntimeError, match=re.escape(feature.name[1:])) as error:
        make()
    assert "Received" in str(error.value) and "pip install" in str(error.value)
    masked()


def test_what_is_off_is_refused_in_the_build(off):
    off(contract.AVERAGES)
    optimizer, variable = masked()
    optimizer.use_ema = True
    with pytest.raises(RuntimeError, match="use_ema=True"):
        optimizer.build([variable])


def test_without_repack(off, monkeypatch):
    off(contract.REPACK)
    monkeypatch.delattr(tf.raw_ops, "VariableShape")
    optimizer, variable = masked(state="compact")
    train(optimizer, variable)
    with pytest.raises(RuntimeError, match="Repack must be left out"):
        optimizer.repack()
    train(optimizer, variable)
    assert_same_bits(variable.numpy()[~MASK], KERNEL[~MASK])


def test_without_several_replicas(off):
    off(contract.REPLICAS)

    class Two(tf.distribute.OneDeviceStrategy):
        num_replicas_in_sync = 2

    with Two("/cpu:0").scope(), pytest.raises(RuntimeError, match="Several replicas must be left out"):
        masked()
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        masked()


def test_without_what_keras_is_loading(off, tmp_path):
    model = model_of(fz.MaskedOptimizer(keras.optimizers.Adam(0.1), {"d/kernel": MASK}))
    model.fit(X, Y, verbose=0)
    model.save_weights(tmp_path / "w.weights.h5")
    off(contract.FILES)
    other = model_of(fz.MaskedOptimizer(keras.optimizers.Adam(0.1)))
    other.load_weights(tmp_path / "w.weights.h5")
    assert not other.optimizer.built
    assert other.optimizer.mask_for(other.layers[0].kernel) == fz.Mask.from_array(MASK)
    before = other.get_weights()[0]
    other.fit(X, Y, verbose=0)
    assert_same_bits(other.get_weights()[0][~MASK], before[~MASK])


def test_without_warnings_of_other_writes(off):
    off(contract.WRITES)
    optimizer, variable = masked()
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @tf.function(autograph=False)
        def step(gradient):
            variable.assign_add(tf.ones_like(variable))
            optimizer.apply([gradient], [variable])

        optimizer.build([variable])
        step(tf.ones([4, 3]))


def test_without_old_checkpoints(off):
    checkpoint_position = object()
    assert tracking.checkpoint_being_restored() is checkpoint_position  # a local variable on the call stack
    off(contract.OLD_CHECKPOINTS)
    optimizer, _ = masked()
    with pytest.raises(ValueError, match="older version of freezeops"):
        optimizer._masks.child_to_restore("0")
    with pytest.raises(RuntimeError, match="Old checkpoints must be left out"):
        tracking.object_graph_nodes(None)


# A Keras whose names are really others.

RENAMED = [
    "_tf_apply",
    "_swap_variables",
    "_distributed_tf_update_step",
    "_u_product",
    "_non_trainable_variables",
    "_ndim",
]

SCRIPT = """
import warnings, sys
import keras, numpy as np, tensorflow as tf
import freezeops as fz
assert keras.__file__.startswith(sys.argv[1]), keras.__file__
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="d"), keras.layers.BatchNormalization()])
    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(0.1, use_ema=True), {"d/kernel": np.eye(4, 3) == 1})
    model.compile(optimizer, "mse", jit_compile=False)
    before = model.layers[0].kernel.numpy()
    model.fit(np.ones((8, 4)), np.ones((8, 3)), epochs=2, batch_size=2, verbose=0)
told = [str(each.message) for each in told if "is known to work" in str(each.message)]
print(len(told), told)
after = model.layers[0].kernel.numpy()
frozen = np.eye(4, 3) != 1
print("kept", (after[frozen].view("u4") == before[frozen].view("u4")).all(), "moved", (after != before)[~frozen].all())
optimizer.summary()
"""


def run_with_renamed(tmp_path, names):
    """Runs the script with a copy of Keras in which names are others."""
    copy = tmp_path / "keras"
    shutil.copytree(Path(keras.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "*_test.py"))
    for path in copy.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        new = re.sub(rf"(?<!\w)({'|'.join(names)})(?!\w)", r"\1_of_old", text)
        if new != text:
            path.write_text(new, encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT.parent}", "COLUMNS": "300", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, tmp_path / "script.py", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_keras_with_other_names(tmp_path):
    result = run_with_renamed(tmp_path, RENAMED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 ["), result.stdout
    assert "kept True moved True" in result.stdout
    for feature in (contract.SCALER, contract.SWAP, contract.FUSED, contract.WRITES, contract.REPACK):
        assert f"Off: {feature.name}" in result.stdout
    assert "not fused: this version of Keras" in result.stdout


def test_a_keras_without_a_required_name(tmp_path):
    result = run_with_renamed(tmp_path, ["_trainable_variables_indices"])
    assert result.returncode != 0
    assert "RuntimeError: freezeops is known to work with Keras" in result.stderr


def test_setup_takes_the_versions_from_here():
    setup = (ROOT.parent / "setup.py").read_text(encoding="utf-8")
    assert '"versions.py"' in setup and "keras>={TESTED['KERAS'][0]}" in setup
    file = runpy.run_path(str(COMPAT / "versions.py"))
    assert file["KERAS"] == versions.KERAS == contract.KERAS.tested


def test_a_plain_optimizer_leaves_keras_as_it_is():
    script = """
import keras, numpy as np, freezeops as fz
classes = keras.optimizers.LossScaleOptimizer, keras.callbacks.SwapEMAWeights, keras.optimizers.Optimizer
before = [dict(vars(cls)) for cls in classes]
optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
optimizer.apply([np.ones(3, "float32")], [keras.Variable(np.ones(3, "float32"))])
assert [dict(vars(cls)) for cls in classes] == before
keras.optimizers.LossScaleOptimizer(fz.MaskedOptimizer(keras.optimizers.Adam()))
changed = {name for name, value in vars(classes[0]).items() if before[0].get(name) is not value}
assert changed == {"save_own_variables", "load_own_variables"}, changed
assert dict(vars(classes[1])) == before[1]
"""
    environment = {"PYTHONPATH": str(ROOT.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
