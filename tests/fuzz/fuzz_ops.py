"""Calls of every native op, most of them wrong in one place: each must give an error or what its twin gives.

    python tests/fuzz/fuzz_ops.py --calls 20000 --seed 0

A call is made valid first; then one or two of its tensors, variables or attributes may be changed: another length or
rank, numbers at the ends of their range, sizes whose product has more than 63 bits. It runs eagerly, in a graph or
compiled by XLA, with static shapes or without. Reads and writes out of bounds are found by AddressSanitizer, in a
library that was built for it (`make fuzz`). Found without it: results of valid calls that are not the twin's, frozen
entries that changed, calls that cannot be right and are not refused, crashes, and calls that take minutes.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import ml_dtypes
import numpy as np
import tensorflow as tf

from freezeops import backend
from freezeops.masks import packing, visits
from freezeops.masks.layout import Layout
from freezeops.ops import native, reference, reference_updates
from freezeops.ops.reference_updates import FusedOperand

DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)]
MODES = {"eager": 0.6, "graph": 0.25, "xla": 0.15}
SIZES = [0, 1, 3, 7, 8, 9, 16, 17, 63, 64, 65, 130]
EXTREMES = [-(2**63), -1, 0, 1, 2**31 - 1, 2**31, 2**61, 2**62, 2**63 - 1]
SECONDS_OF_A_CALL = 120
REFUSALS = (tf.errors.OpError, ValueError, TypeError, OverflowError)


@dataclass
class Value:
    """An input: a tensor, or what a variable holds.

    `exact`: whether any other shape must be refused. `counted`: whether any other number of entries must be. `rows`:
    below which number each of its entries must be, or `None`; a row that does not exist is an error outside of XLA.
    """

    array: np.ndarray
    variable: bool = False
    exact: bool = True
    rows: int | None = None
    counted: bool = False

    def must_be_refused(self, other: np.ndarray) -> bool:
        """Whether another array in its place must be."""
        return (self.exact and other.shape != self.array.shape) or (self.counted and other.size != self.array.size)


@dataclass
class Call:
    """A call of an op, by keyword; lists of values are lists of inputs."""

    op: str
    inputs: dict[str, Any]
    attributes: dict[str, Any]
    twin: Callable[[dict[str, Any]], Sequence[tf.Tensor] | None] | None = None
    frozen: Callable[[], list[tuple[str, int, np.ndarray]]] | None = None  # input, its number, which entries
    exact_result: bool = True
    refused: bool = False  # whether it must be, after what was changed
    changed: list[str] = field(default_factory=list)


def numbers(rng: np.random.Generator, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """Normal numbers, some of them zero."""
    values = rng.normal(size=shape) * (rng.random(shape) < 0.9)
    return np.asarray(values).astype(dtype)


def packed(rng: np.random.Generator, kept: int) -> np.ndarray:
    density = rng.choice([0.0, 0.01, 0.01, 0.5, 1.0])  # few are found by their indices
    return np.packbits(rng.random(kept) < density, bitorder="little")


def passing_of(mask: np.ndarray, layout: Layout) -> np.ndarray:
    bits = np.unpackbits(mask, count=layout.kept, bitorder="little").astype(bool)
    return np.broadcast_to(bits[None, :, None], layout).reshape(-1)


def any_layout(rng: np.random.Generator, compact: bool) -> Layout:
    if rng.random() < 0.2:
        return Layout(1, int(rng.choice([2048, 5000])), 1)
    outer = 1 if compact else int(rng.choice([1, 1, 2, 5]))
    return Layout(outer, int(rng.choice(SIZES)), int(rng.choice([1, 1, 2, 5, 64])))


def shape_of(layout: Layout) -> list[int]:
    """A shape of the layout's entries."""
    return [layout.outer * layout.kept] if layout.inner == 1 else [layout.outer * layout.kept, layout.inner]


def index_of(rng: np.random.Generator, layout: Layout, variable: bool) -> dict[str, Any]:
    mask = packed(rng, layout.kept)
    ones = packing.bit_indices(mask, layout.kept)
    room = layout.kept + np.arange(int(rng.choice([0, 0, 3])))
    indices = np.concatenate([ones, room]).astype(rng.choice([np.uint32, np.int64]))
    of_index = {"mask": mask, "offsets": packing.rank_offsets(mask, layout.kept), "indices": indices}
    return {name: Value(array, variable, exact=name != "indices") for name, array in of_index.items()}


def mask_gradient(rng: np.random.Generator, dtype: np.dtype) -> Call:
    layout = any_layout(rng, False)
    inputs = {
        "gradient": Value(numbers(rng, dtype, shape_of(layout)), exact=False),
        "mask": Value(packed(rng, layout.kept)),
    }
    return Call(
        "mask_gradient",
        inputs,
        {"layout": list(layout)},
        lambda i: [reference.mask_gradient(i["gradient"], i["mask"], layout)],
    )


def mask_slices(rng: np.random.Generator, dtype: np.dtype) -> Call:
    rows, width, count = int(rng.choice([1, 3, 40])), int(rng.choice([0, 1, 5, 64])), int(rng.choice([0, 1, 7]))
    layout = Layout(1, rows, width) if rng.random() < 0.5 else Layout(1, rows * width, 1)
    inputs = {
        "values": Value(numbers(rng, dtype, [count, width]), exact=False),
        "indices": Value(rng.integers(0, rows, count).astype(rng.choice([np.int32, np.int64])), rows=rows),
        "mask": Value(packed(rng, layout.kept)),
    }
    return Call(
        "mask_slices",
        inputs,
        {"layout": list(layout), "rows": rows},
        lambda i: [reference.mask_slices(i["values"], i["indices"], i["mask"], layout, rows)] if width else None,
    )


def remember_frozen(rng: np.random.Generator, dtype: np.dtype) -> Call:
    layout = any_layout(rng, False)
    inputs = {
        "variable": Value(numbers(rng, dtype, shape_of(layout)), True, exact=False),
        "mask": Value(packed(rng, layout.kept)),
    }
    return Call("remember_frozen", inputs, {"layout": list(layout), "T": dtype})


def restore_frozen(rng: np.random.Generator, dtype: np.dtype) -> Call:
    layout = any_layout(rng, False)
    mask = packed(rng, layout.kept)
    snapshot = numbers(rng, dtype, [layout.size])
    if rng.random() < 0.5:
        snapshot = snapshot[~passing_of(mask, layout)]
    inputs = {
        "variable": Value(numbers(rng, dtype, shape_of(layout)), True, exact=False),
        "mask": Value(mask),
        "snapshot": Value(snapshot, exact=False),
    }

    def twin(i: dict[str, Any]) -> list[tf.Tensor]:
        reference.restore_frozen(i["variable"], i["mask"], i["snapshot"], layout)
        return []

    # XLA takes the longer form alone.
    return Call("restore_frozen", inputs, {"layout": list(layout)}, twin)


def trainable_call(op: str) -> Callable[[np.random.Generator, np.dtype], Call]:
    def make(rng: np.random.Generator, dtype: np.dtype) -> Call:
        layout = any_layout(rng, True)
        index = index_of(rng, layout, False)
        source = numbers(rng, dtype, shape_of(layout))
        inputs: dict[str, Any] = {}
        attributes: dict[str, Any] = {"layout": list(layout)}
        if op == "gather_trainable":
            inputs["source"] = Value(source, exact=False)
        else:
            inputs["variable"] = Value(source, True, exact=op == "take_trainable")
        if op == "read_trainable":
            attributes["T"] = dtype
        if op == "take_trainable":
            inputs["gradient"] = Value(numbers(rng, dtype, shape_of(layout)))
        if op == "scatter_trainable":
            capacity = index["indices"].array.size
            inputs["compact"] = Value(numbers(rng, dtype, [capacity * layout.inner]), exact=False)

        def twin(i: dict[str, Any]) -> Sequence[tf.Tensor]:
            result = getattr(reference, op)(*i.values(), layout)
            return [] if result is None else [result] if tf.is_tensor(result) else list(result)

        def frozen() -> list[tuple[str, int, np.ndarray]]:
            return [("variable", 0, ~passing_of(index["mask"].array, layout))]

        writes = op == "scatter_trainable"
        return Call(op, inputs | index, attributes, twin, frozen if writes else None)

    return make


def sampled_matmul(rng: np.random.Generator, dtype: np.dtype) -> Call:
    dtype = DTYPES[2] if dtype == np.float64 else dtype
    tokens, rows, columns = (int(rng.choice([0, 1, 5, 17, 40, 130, 300])) for _ in range(3))
    layout = Layout(1, rows * columns, 1)
    index = index_of(rng, layout, False)
    plan = visits.visits(index["mask"].array, rows, columns, index["indices"].array.size)
    inputs = {
        "x": Value(numbers(rng, dtype, [tokens, rows])),
        "dy": Value(numbers(rng, dtype, [tokens, columns])),
        "visits": Value(plan, exact=False),
        "indices": index["indices"],
    }

    def twin(i: dict[str, Any]) -> list[tf.Tensor]:
        mask, offsets = (tf.constant(index[name].array) for name in ("mask", "offsets"))
        return [reference.sampled_matmul(i["x"], i["dy"], i["visits"], mask, offsets, i["indices"])]

    return Call("sampled_matmul", inputs, {}, twin, exact_result=False)


def rank_trainable(rng: np.random.Generator, dtype: np.dtype) -> Call:
    del dtype
    kept = int(rng.choice([*SIZES[1:], 5000]))
    bits = Value(rng.integers(0, kept, int(rng.choice([0, 1, 9]))), exact=False, rows=kept)
    return Call(
        "rank_trainable",
        {"bits": bits} | index_of(rng, Layout(1, kept, 1), False),
        {"kept": kept},
        lambda i: [reference.rank_trainable(*i.values(), kept)],
    )


def seed_slots(rng: np.random.Generator, dtype: np.dtype) -> Call:
    rows, width, count = int(rng.choice([1, 3, 40])), int(rng.choice([0, 1, 5, 64])), int(rng.choice([1, 2, 3]))
    sparse = bool(rng.random() < 0.5)
    size, named = rows * width, int(rng.choice([0, 1, 7]))
    slots = [numbers(rng, dtype, [rows, width]) * (rng.random([rows, width]) < 0.5) for _ in range(count)]
    powers = [int(power) for power in rng.choice([1, 2], count)]
    # Where nothing waits, slots are not looked at.
    unseeded = packed(rng, size)
    waits = bool(np.unpackbits(unseeded, count=size, bitorder="little").any())
    named_rows = rows if sparse and waits else None
    inputs = {
        "unseeded": Value(unseeded, True),
        "values": Value(numbers(rng, dtype, [named if sparse else rows, width]), exact=waits),
        "indices": Value(rng.integers(0, rows, named if sparse else 0), exact=False, rows=named_rows),
        "scales": Value(rng.random(count)),
        "slots": [Value(slot.astype(dtype), True, exact=waits) for slot in slots],
    }
    attributes = {"powers": powers, "size": size, "sparse": sparse, "materialized": bool(rng.random() < 0.5)}

    def twin(i: dict[str, Any]) -> list[tf.Tensor] | None:
        if sparse or not size:
            return None  # which bits are cleared is left open
        reference.seed_slots(i["unseeded"], i["values"], tf.unstack(i["scales"], num=count), i["slots"], powers)
        return []

    return Call("seed_slots", inputs, attributes, twin, exact_result=False)


RULES = {
    "sgd": (0, [0.01, 0.01, 0.1]),
    "sgd_nesterov": (1, [0.01, 0.01, 0.1, 0.9]),
    "adam_amsgrad": (3, [0.01, 0.01, 0.1, 0.1, 0.05, 1e-3]),
    "rmsprop_momentum": (2, [0.01, 0.01, 0.1, 0.9, 0.1, 1e-3, 0.9]),
    "adagrad": (1, [0.01, 0.01, 0.1, 1e-3]),
    "lion": (1, [0.01, 0.01, 0.1, 0.9, 0.1, 0.8, 0.2]),
}


def fused_update(rng: np.random.Generator, dtype: np.dtype) -> Call:
    rule = str(rng.choice(list(RULES)))
    slot_count, scalars = RULES[rule]
    compact, count = bool(rng.random() < 0.5), int(rng.choice([1, 2, 3]))
    seeds = int(rng.integers(0, slot_count + 1)) if rng.random() < 0.7 else 0
    layouts: list[Layout] = []
    lists: dict[str, list[Value]] = {
        name: [] for name in ("variables", "gradients", "rows", "slots", "masks", "offsets", "indices", "unseeded")
    }
    sparse: list[int] = []
    gathered: list[int] = []
    masked: list[int] = []
    seeded: list[int] = []
    trainable: list[np.ndarray] = []
    for number in range(count):
        layout = any_layout(rng, compact)
        shape = shape_of(layout)
        index = index_of(rng, layout, True)
        slot_size = index["indices"].array.size * layout.inner if compact else layout.size
        if compact or rng.random() < 0.8:
            masked.append(number)
            lists["masks"].append(index["mask"])
            trainable.append(passing_of(index["mask"].array, layout))
        else:
            layout = Layout(1, 1, layout.size)
            trainable.append(np.ones(layout.size, bool))
        lists["variables"].append(Value(numbers(rng, dtype, shape), True))
        if rng.random() < 0.4:
            sparse.append(number)
            named = int(rng.choice([0, 1, 7])) if shape[0] else 0
            lists["gradients"].append(Value(numbers(rng, dtype, [named, *shape[1:]])))
            lists["rows"].append(Value(rng.integers(0, max(shape[0], 1), named), rows=shape[0]))
        elif compact and rng.random() < 0.5:
            gathered.append(number)
            lists["variables"][-1] = replace(lists["variables"][-1], exact=False, counted=True)
            rows = [slot_size] if rng.random() < 0.5 else [index["indices"].array.size, layout.inner]
            lists["gradients"].append(Value(numbers(rng, dtype, rows), exact=False, counted=True))
        else:
            lists["gradients"].append(Value(numbers(rng, dtype, shape)))
        for _ in range(slot_count):
            lists["slots"].append(Value(np.abs(numbers(rng, dtype, [slot_size])), True, exact=False))
        if compact:
            lists["offsets"].append(index["offsets"])
            lists["indices"].append(index["indices"])
        if seeds and rng.random() < 0.7:
            seeded.append(number)
            lists["unseeded"].append(Value(packed(rng, slot_size), True, exact=False))
        layouts.append(layout)
    order = [int(slot) for slot in rng.permutation(slot_count)[:seeds]]
    powers = [int(power) for power in rng.choice([1, 2], seeds)]
    decays = [bool(decay) for decay in rng.integers(0, 2, count)]
    inputs: dict[str, Any] = dict(lists)
    inputs["scalars"] = Value(np.array(scalars).astype(dtype))
    inputs["scales"] = Value(rng.random(seeds))
    attributes = {
        "rule": rule,
        "layouts": [size for layout in layouts for size in layout],
        "decays": decays,
        "sparse": sparse,
        "masked": masked,
        "seeded": seeded,
        "seed_slots": order,
        "seed_powers": powers,
        "compact": compact,
        "gathered": gathered,
    }

    def twin(i: dict[str, Any]) -> list[tf.Tensor]:
        variables = []
        for number, layout in enumerate(layouts):
            gradient = i["gradients"][number]
            if number in sparse:
                shape = tf.constant(i["variables"][number].shape.as_list(), tf.int64)
                gradient = tf.IndexedSlices(gradient, i["rows"][sparse.index(number)], shape)
            variables.append(
                FusedOperand(
                    i["variables"][number],
                    gradient,
                    i["slots"][number * slot_count : (number + 1) * slot_count],
                    layout,
                    i["masks"][masked.index(number)] if number in masked else None,
                    (i["offsets"][number], i["indices"][number]) if compact else None,
                    i["unseeded"][seeded.index(number)] if number in seeded else None,
                    decays[number],
                    number in gathered,
                )
            )
        scales = tf.unstack(i["scales"], num=seeds)
        reference_updates.fused_update(rule, variables, i["scalars"], order, powers, scales)
        return []

    def frozen() -> list[tuple[str, int, np.ndarray]]:
        return [("variables", number, ~each) for number, each in enumerate(trainable)]

    return Call("fused_update", inputs, attributes, twin, frozen, exact_result=False)


OPS: dict[str, Callable[[np.random.Generator, np.dtype], Call]] = {
    "mask_gradient": mask_gradient,
    "mask_slices": mask_slices,
    "remember_frozen": remember_frozen,
    "restore_frozen": restore_frozen,
    "gather_trainable": trainable_call("gather_trainable"),
    "read_trainable": trainable_call("read_trainable"),
    "take_trainable": trainable_call("take_trainable"),
    "scatter_trainable": trainable_call("scatter_trainable"),
    "sampled_matmul": sampled_matmul,
    "rank_trainable": rank_trainable,
    "seed_slots": seed_slots,
    "fused_update": fused_update,
}


def values_of(inputs: dict[str, Any]) -> list[tuple[str, int, Value]]:
    """Name, number and value of each input."""
    return [
        (name, number, value)
        for name, given in inputs.items()
        for number, value in enumerate(given if isinstance(given, list) else [given])
    ]


def changed_shape(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """The array with an entry more or less, an axis more or less, empty, or one entry alone."""
    flat = array.reshape(-1)
    choices = [
        lambda: flat[:-1],
        lambda: np.concatenate([flat, np.ones(1, array.dtype)]),
        lambda: array[None],
        lambda: flat,
        lambda: np.zeros([0], array.dtype),
        lambda: np.ones([], array.dtype),
        lambda: array.T,
        lambda: np.zeros([0, 2**29, 2**29], array.dtype),
        lambda: array[: len(array) // 2] if array.ndim else array,
    ]
    return np.array(choices[rng.integers(len(choices))](), order="C") if array.ndim else array.reshape(1)


def change(rng: np.random.Generator, call: Call, mode: str) -> None:
    """Makes one place of a call wrong, perhaps."""
    values = values_of(call.inputs)
    sizes = [name for name, value in call.attributes.items() if isinstance(value, int | list) and name != "T"]
    if rng.random() < 0.3 and sizes:
        name = str(rng.choice(sizes))
        given = call.attributes[name]
        number = int(rng.choice(EXTREMES))
        if isinstance(given, bool):
            call.attributes[name] = not given
        elif isinstance(given, int):
            call.attributes[name] = number if rng.random() < 0.7 else given + int(rng.choice([-1, 1, 8]))
        elif given and rng.random() < 0.8:
            at = int(rng.integers(len(given)))
            changed = not given[at] if isinstance(given[at], bool) else number
            call.attributes[name] = [*given[:at], changed, *given[at + 1 :]]
            if name in ("layout", "layouts") and number < 0:
                call.refused = True
        else:
            call.attributes[name] = given[:-1] if given and rng.random() < 0.5 else [*given, 1]
        call.changed.append(f"{name}={call.attributes[name]} was {given}")
        return
    gradients = [each for each in values if each[0] in ("gradient", "gradients", "values") and each[2].array.ndim]
    if gradients and rng.random() < 0.2:
        # As many entries in another shape, which sizes alone do not tell.
        name, number, value = gradients[rng.integers(len(gradients))]
        before = value.array
        changed = np.array(before[None] if before.ndim == 1 or rng.random() < 0.5 else before.reshape(-1))
        call.refused = value.must_be_refused(changed)
        value.array = changed
        call.changed.append(f"{name}[{number}] {list(before.shape)} to {list(value.array.shape)}")
        return
    rows = [each for each in values if each[2].rows is not None]
    if rows and rng.random() < 0.3:
        values = rows
    else:
        name = str(rng.choice(list(dict.fromkeys(name for name, _, _ in values))))
        values = [each for each in values if each[0] == name]
    name, number, value = values[rng.integers(len(values))]
    before = value.array
    integers = before.dtype.kind in "iu" and before.dtype != np.uint8
    if integers and before.size and rng.random() < 0.6:
        limits = np.iinfo(before.dtype)
        extreme = int(np.clip(int(rng.choice(EXTREMES)), limits.min, limits.max))
        value.array = before.copy()
        value.array.reshape(-1)[rng.integers(before.size)] = extreme
        if value.rows is not None and not 0 <= extreme < value.rows and mode != "xla":
            call.refused = True
    elif value.variable and rng.random() < 0.1:
        value.array = before.astype(rng.choice([np.uint8, np.float32, np.float64, np.int64]))
    else:
        changed = changed_shape(rng, before)
        call.refused = call.refused or value.must_be_refused(changed)
        value.array = changed
    call.changed.append(f"{name}[{number}] {before.dtype}{list(before.shape)} to {describe(value.array)}")


def describe(array: np.ndarray) -> str:
    few = np.array2string(array, threshold=12, edgeitems=4).replace("\n", "") if array.size < 1000 else "..."
    return f"{array.dtype}{list(array.shape)} {few}"


def given(inputs: dict[str, Any], hidden: bool) -> dict[str, Any]:
    """Tensors and variables of the inputs; `hidden`: variables whose shape is not static."""

    def one(value: Value) -> Any:
        if not value.variable:
            return tf.constant(value.array)
        return tf.Variable(value.array, shape=tf.TensorShape(None) if hidden else None)

    return {
        name: [one(each) for each in value] if isinstance(value, list) else one(value) for name, value in inputs.items()
    }


def run(call: Call, mode: str, hidden: bool) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Runs it. Returns the op's results and what was given to it."""
    library = native.op_library()
    inputs = given(call.inputs, hidden)
    tensors = [
        (name, number)
        for name, number, value in values_of(call.inputs)
        if not value.variable
    ]  # fmt: skip

    def pick(name: str, number: int) -> tf.Tensor:
        return inputs[name][number] if isinstance(inputs[name], list) else inputs[name]

    def call_op(*arguments: tf.Tensor) -> Any:
        passed = {
            name: [each.handle if isinstance(each, tf.Variable) else each for each in value]
            if isinstance(value, list)
            else (value.handle if isinstance(value, tf.Variable) else value)
            for name, value in inputs.items()
        }
        for (name, number), tensor in zip(tensors, arguments, strict=True):
            if isinstance(passed[name], list):
                passed[name][number] = tensor
            else:
                passed[name] = tensor
        results = getattr(library, f"freezeops_{call.op}")(**passed, **call.attributes)
        return None if isinstance(results, tf.Operation) else results

    arguments = [pick(*place) for place in tensors]
    function = call_op
    if mode != "eager":
        signature = [tf.TensorSpec(None if hidden else each.shape, each.dtype) for each in arguments]
        function = tf.function(call_op, input_signature=signature, jit_compile=mode == "xla", autograph=False)
    results = function(*arguments)
    if results is None:
        return [], inputs
    return [each.numpy() for each in ([results] if tf.is_tensor(results) else results)], inputs


def same(actual: np.ndarray, expected: np.ndarray, exact: bool) -> bool:
    """By bits, or so that one NaN is as good as another and rounding may differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if exact or actual.dtype.kind in "iub":
        return actual.tobytes() == expected.tobytes()
    tolerance = {2: 0.1, 4: 1e-3, 8: 1e-6}[actual.dtype.itemsize]
    wide = [each.astype(np.float64) for each in (actual, expected)]
    return bool(np.allclose(*wide, rtol=tolerance, atol=tolerance, equal_nan=True))


def check(call: Call, mode: str, hidden: bool) -> str:
    """Runs a call. Returns how it ended, or raises `AssertionError` if that is wrong."""
    before = {(name, number): value.array.copy() for name, number, value in values_of(call.inputs)}
    try:
        results, inputs = run(call, mode, hidden)
    except REFUSALS as error:
        if not call.changed and not (mode == "xla" and call.op == "restore_frozen"):
            raise AssertionError(f"a valid call was refused: {error}") from error
        return "refused"
    assert not call.refused, "a wrong call was not refused"
    if call.changed:
        return "ran"
    if call.frozen is not None:
        for name, number, entries in call.frozen():
            written = inputs[name][number] if isinstance(inputs[name], list) else inputs[name]
            old, new = before[name, number].reshape(-1)[entries], written.numpy().reshape(-1)[entries]
            assert old.tobytes() == new.tobytes(), f"frozen entries of {name}[{number}] changed"
    if call.twin is None or (mode == "xla" and not call.exact_result):
        return "valid"
    twins = given(call.inputs, False)
    expected = call.twin(twins)
    if expected is None:
        return "valid"
    for number, (actual, twin) in enumerate(zip(results, expected, strict=True)):
        assert same(actual, twin.numpy(), call.exact_result), f"result {number} is not the twin's"
    for name, number, value in values_of(call.inputs):
        if value.variable:
            pair = [each[name][number] if isinstance(each[name], list) else each[name] for each in (inputs, twins)]
            if name == "slots" and call.attributes.get("compact"):
                continue  # what room holds is left open
            assert same(pair[0].numpy(), pair[1].numpy(), call.exact_result), f"{name}[{number}] is not the twin's"
    return "compared"


def make(seed: int, number: int) -> tuple[Call, str, bool]:
    """Call number `number`, its mode, and whether shapes are hidden from the shape functions."""
    rng = np.random.default_rng([seed, number])
    mode = str(rng.choice(list(MODES), p=list(MODES.values())))
    op = list(OPS)[number % len(OPS)]
    call = copy.deepcopy(OPS[op](rng, DTYPES[number // len(OPS) % len(DTYPES)]))
    if rng.random() < 0.7:
        changes = int(rng.choice([1, 1, 2]))
        for _ in range(changes):
            change(rng, call, mode)
        call.refused = call.refused and changes == 1  # two may make it right again
    os.environ.pop("FREEZEOPS_FUSED_HLO", None)
    if mode == "xla" and rng.random() < 0.5:
        os.environ["FREEZEOPS_FUSED_HLO"] = "1"
    return call, mode, bool(rng.random() < 0.5)


def fuzz(calls: int, seed: int, first: int = 0, log: Path | None = None) -> collections.Counter[tuple[str, str, str]]:
    """Makes calls.

    Args:
        calls: How many.
        seed: Where they come from, with their numbers.
        first: The number of the first.
        log: A file that always tells the call which runs, for those that end the process.

    Returns:
        How often each op, mode and end were met.

    Raises:
        AssertionError: With the call, if one went wrong.
    """
    ends: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for number in range(first, first + calls):
        call, mode, hidden = make(seed, number)
        about = f"call {number} of seed {seed}: {call.op}, {mode}, shapes {'hidden' if hidden else 'static'}, "
        about += "; ".join(call.changed) or "valid"
        if log is not None:
            log.write_text(about, encoding="utf-8")
        faulthandler.dump_traceback_later(SECONDS_OF_A_CALL, exit=True)
        try:
            ends[call.op, mode, check(call, mode, hidden)] += 1
        except Exception as error:
            inputs = "\n".join(f"  {name}[{i}]: {describe(value.array)}" for name, i, value in values_of(call.inputs))
            raise AssertionError(f"{about}\n{call.attributes}\n{inputs}\n{type(error).__name__}: {error}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        if number % 500 == 499:
            tf.keras.backend.clear_session()
    return ends


def supervise(arguments: list[str], log: Path) -> int:
    """Runs this in a process of its own, so that the call can be told that ends it."""
    environment = dict(os.environ)
    if any(argument.startswith("--library") for argument in arguments):
        # The package's own library must not register its ops first.
        environment["FREEZEOPS_BACKEND"] = "reference"
    done = os.spawnve(os.P_WAIT, sys.executable, [sys.executable, __file__, *arguments, "--alone"], environment)
    if done:
        ended = f"signal {signal.Signals(-done).name}" if done < 0 else f"status {done}"
        print(f"FOUND ({ended}) {log.read_text(encoding='utf-8') if log.exists() else ''}", flush=True)
    return 1 if done else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--log", type=Path, default=Path("fuzz.log"), help="a file for the call that runs")
    parser.add_argument("--library", type=Path, help="the library of ops to load instead of the package's")
    parser.add_argument("--alone", action="store_true", help="in this process")
    options = parser.parse_args()
    if not options.alone:
        return supervise(sys.argv[1:], options.log)
    if options.library is not None:
        os.environ.pop("FREEZEOPS_BACKEND", None)
        library = tf.load_op_library(str(options.library))
        native.op_library = lambda: library
    assert backend.name() == "auto" and native.op_library() is not None, "no native library for this TensorFlow"
    begin = time.monotonic()
    ends = fuzz(options.calls, options.seed, options.first, options.log)
    for op in OPS:
        print(op, {f"{mode} {end}": n for (name, mode, end), n in sorted(ends.items()) if name == op})
    print(f"{sum(ends.values())} calls in {time.monotonic() - begin:.0f} s, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
