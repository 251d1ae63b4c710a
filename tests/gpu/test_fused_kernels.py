"""The CUDA kernels of fused updates against NumPy, bit for bit: on the host (always) and on a GPU (if there is one)."""

import ctypes
from typing import NamedTuple

import numpy as np
import numpy_twins as twins
import pytest
from arrays import zero_entries
from hypothesis import example, given
from hypothesis import strategies as st
from library import FusedVariable
from test_kernels import DENSITIES, FLOATS, INTEGERS, OFFSETS, SEEDS, SETTINGS, dtype_of, int64, make_bits, make_values

# Around words, groups of 128 entries, tiles of 512 and blocks of 2048.
LENGTHS = st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 2047, 2048, 2049, 4097, 9000])
ROWS = st.sampled_from([1, 2, 5, 64, 130])
LAYOUTS = st.one_of(
    LENGTHS.map(lambda n: (1, n, 1)),
    st.tuples(st.just(1), ROWS, st.sampled_from([2, 3, 16, 33, 100, 511])),
    st.tuples(st.just(1), st.sampled_from([1, 3, 9]), st.sampled_from([512, 513, 1000, 3000])),
    st.tuples(st.sampled_from([2, 3, 70]), st.sampled_from([1, 5, 31, 64, 130]), st.sampled_from([1, 4])),
    st.tuples(st.sampled_from([2, 3]), st.sampled_from([1, 5]), st.sampled_from([511, 512, 700])),
    st.sampled_from([(0, 5, 3), (4, 0, 3), (4, 5, 0), (300, 1, 1)]),
)
RULES = st.sampled_from(list(twins.RULES))
DTYPES = st.sampled_from(list(FLOATS))


def floats_of(rng, size, floats):
    return rng.normal(size=size).astype(floats)


class Step(NamedTuple):
    """What all variables of a step share."""

    rule: str
    dtype: str
    scalars: np.ndarray
    seed_slots: list[int]
    seed_powers: list[int]
    scales: np.ndarray

    @classmethod
    def make(cls, rng, rule, dtype, seeded):
        slots, own = twins.RULES[rule][1:]
        # None near zero or one, so that every operation rounds; epsilon and momentum among them.
        scalars = rng.uniform(0.1, 0.6, 3 + own).astype(dtype_of(dtype))
        seed_slots = list(range(slots))[::-1] if seeded else []
        powers = [2 if number % 2 == 0 else 1 for number in range(len(seed_slots))]
        return cls(rule, dtype, scalars, seed_slots, powers, rng.uniform(0.2, 2, len(seed_slots)))


class Variable:
    """One variable, where the kernels see it, and what it must become.

    Args:
        layout: Of its mask; `None` instead of `density`: it has no mask.
        compact: Whether its slots have one entry for each trainable one and `room` beside.
        slices: `None` for a dense gradient, else how many slices of rows of `row_size`.
        gathered: Whether the gradient holds the trainable entries alone, with compact state.
    """

    def __init__(
        self, kernels, rng, step, layout, density, runs=1, compact=False, room=0, wide=False, decays=False, slices=None,
        row_size=1, offset=0, gathered=False,
    ):  # fmt: skip
        floats, size = dtype_of(step.dtype), int(np.prod(layout))
        self.step, self.wide_dtype = step, FLOATS[step.dtype][1]
        width = np.dtype(floats).itemsize
        packed = make_bits(rng, layout[1], 1.0 if density is None else density, runs)
        self.passing = twins.expand(packed, layout)
        ones = int(np.unpackbits(packed, count=layout[1], bitorder="little").sum())
        self.used = ones * layout[2] if compact else None
        slot_size = (ones + room) * layout[2] if compact else size
        slot_count = twins.RULES[step.rule][1]

        # Any bits where nothing may be written: NaNs, infinities, subnormals, zeros of both signs.
        self.value = floats_of(rng, size, floats)
        gradient = floats_of(rng, size, floats)
        frozen = np.flatnonzero(~self.passing)
        for array in (self.value, gradient):
            array[frozen] = make_values(rng, frozen.size, width).view(floats)
        self.value[frozen[::7]] = -0.0
        self.slots = [np.abs(floats_of(rng, slot_size, floats)) for _ in range(slot_count)]
        for slot in self.slots:
            slot[rng.random(slot_size) < 0.4] = 0
            rest = slice(self.used, None) if compact else frozen
            slot[rest] = make_values(rng, slot[rest].size, width).view(floats)
        self.waiting = make_bits(rng, slot_size, rng.choice([0, 0.01, 0.5, 1.0]), 1)

        def put(array):
            return kernels.put(array, offset * array.itemsize)

        self.arrays = [put(array) for array in (self.value, *self.slots)]
        self.unseeded = put(self.waiting) if step.seed_slots and slot_size else None
        held = {"bits": kernels.put(packed, offset % 4)} if density is not None else {}
        if compact:
            indices = twins.indices_of(packed, layout[1], room, np.int64 if wide else np.int32)
            held |= {"offsets": put(twins.rank_offsets(packed, layout[1])), "indices": put(indices)}
        with np.errstate(all="ignore"):
            self.gradient, self.square = gradient, gradient * gradient
        scaled = None
        if gathered:
            # Any bits where there is room.
            alone = make_values(rng, slot_size, width).view(floats)
            alone[: self.used] = gradient[self.passing]
            held |= {"gradient": put(alone)}
        elif slices is None:
            held |= {"gradient": put(gradient)}
        else:
            rows = size // row_size
            named = rng.integers(-1, rows + 1, slices)
            values = floats_of(rng, (slices, row_size), floats)
            scaled = step.scalars[0] if step.rule.startswith("sgd") else None
            self.gradient, self.square = twins.sum_slices(values, named, rows, scaled)
            junk = [make_values(rng, (slices, row_size), width).view(floats) for _ in range(2)]
            first_and_last = rng.integers(0, 2**62, 2 * rows).astype(np.uint64)
            held |= {"named": put(first_and_last), "sums": put(junk[0]), "squares": put(junk[1])}
            at = self.slices_at = [put(array) for array in (named, values)]
            scale = kernels.put(step.scalars)
            kernels.run(
                "fz_sum_slices", FLOATS[step.dtype][0], held["named"].pointer, held["sums"].pointer,
                held["squares"].pointer, int64(slices), int64(row_size), at[0].pointer, int64(rows), at[1].pointer,
                None if scaled is None else scale.pointer,
            )  # fmt: skip
        self.scaled, self.sparse, self.decays, self.held = scaled, slices is not None, decays, held
        pointers = {name: array.pointer.value for name, array in held.items()}
        addresses = [array.pointer.value for array in self.arrays]
        self.pointers = FusedVariable(
            variable=addresses[0], slots=tuple(addresses[1:]), layout=tuple(layout),
            capacity=ones + room if compact else 0, wide=wide, decays=decays, slices=slices or 0, row_size=row_size,
            gathered=gathered, unseeded=None if self.unseeded is None else self.unseeded.pointer.value, **pointers,
        )  # fmt: skip

    def expected(self):
        """The variable, its slots, and what waits, after the step."""
        step, passing = self.step, self.passing
        due = passing if self.used is None else np.arange(self.waiting.size * 8) < self.used
        if self.slots:
            due = due[: self.slots[0].size]
        compact = (lambda array: array) if self.used is None else (lambda array: array[passing])
        w, g, square = (compact(array) for array in (self.value, self.gradient, self.square))
        slots = [slot[: self.used] for slot in self.slots]
        waiting = None
        if self.unseeded is not None:
            waiting = np.unpackbits(self.waiting, count=self.slots[0].size, bitorder="little").astype(bool)
            wide = g.astype(self.wide_dtype)
            of_seed = wide * wide
            if self.sparse:
                of_seed = np.maximum(of_seed, square.astype(self.wide_dtype))
            waits = (waiting & due)[: self.used]
            seeded, still = twins.seed(
                    waits, [slots[i] for i in step.seed_slots], step.seed_powers, step.scales, wide, of_seed,
                    self.wide_dtype,
                )  # fmt: skip
            for number, slot in zip(step.seed_slots, seeded, strict=True):
                slots[number] = slot
            waiting[: waits.size] = (waiting[: waits.size] & ~waits) | still
        scalars = step.scalars.copy()
        if self.scaled is not None:
            scalars[0] = 1
        new, new_slots = twins.fused_update(step.rule, w, g, square, slots, scalars, self.decays)
        if self.used is not None:
            new = twins.scatter(self.value, passing, new)
            ends = zip(new_slots, self.slots, strict=True)
            return new, [np.concatenate([slot, old[self.used :]]) for slot, old in ends], waiting
        return (
            np.where(passing, new, self.value),
            [np.where(passing, slot, old) for slot, old in zip(new_slots, self.slots, strict=True)],
            waiting,
        )

    def check(self):
        with np.errstate(all="ignore"):
            value, slots, waiting = self.expected()
        own = [self.passing] + [
            self.passing if self.used is None else np.arange(slot.size) < self.used for slot in slots
        ]
        for number, (array, wanted, written) in enumerate(zip(self.arrays, [value, *slots], own, strict=True)):
            actual = array.get()
            wanted = wanted.astype(actual.dtype)
            # One NaN is as good as another where it was calculated, and nowhere else.
            with np.errstate(all="ignore"):
                both = np.isnan(actual) & np.isnan(wanted) & written
            actual[both] = wanted[both] = 0
            integers = INTEGERS[actual.itemsize]
            told = f"{self.step.rule} {self.step.dtype}: {'slot' if number else 'variable'} {number}"
            np.testing.assert_array_equal(actual.view(integers), wanted.view(integers), told)
        if waiting is not None:
            left = np.unpackbits(self.unseeded.get(), count=waiting.size, bitorder="little")
            np.testing.assert_array_equal(left.astype(bool), waiting)
        for array in self.held.values():
            array.get()  # for its guards


def run(kernels, step, variables):
    scalars, scales = kernels.put(step.scalars), kernels.put(step.scales)
    seeds = len(step.seed_slots)
    table = (FusedVariable * len(variables))(*(variable.pointers for variable in variables))
    numbers = ctypes.c_int * max(seeds, 1)
    kernels.run(
        "fz_fused_update", FLOATS[step.dtype][0], step.rule.encode(), scalars.pointer, scales.pointer, seeds,
        numbers(*step.seed_slots), numbers(*step.seed_powers), table, int64(len(variables)),
    )  # fmt: skip
    for variable in variables:
        variable.check()


def test_the_structure_is_the_kernels(kernels):
    assert kernels.functions.fz_bytes_of_fused_variable() == ctypes.sizeof(FusedVariable)


RUNS = st.sampled_from([1, 1, 32, 128, 512])


@SETTINGS
@given(
    rule=RULES,
    dtype=DTYPES,
    layouts=st.lists(LAYOUTS, min_size=1, max_size=3),
    density=st.one_of(DENSITIES, st.none()),
    runs=RUNS,
    seeded=st.booleans(),
    offset=OFFSETS,
    seed=SEEDS,
)
def test_full_state(kernels, rule, dtype, layouts, density, runs, seeded, offset, seed):
    rng = np.random.default_rng(seed)
    step = Step.make(rng, rule, dtype, seeded)
    variables = [
        # Without a mask there is one bit for all.
        Variable(kernels, rng, step, layout if density is not None else (1, 1, int(np.prod(layout))), density, runs,
                 decays=number % 2 == 0, offset=offset)
        for number, layout in enumerate(layouts)
    ]  # fmt: skip
    run(kernels, step, variables)


@SETTINGS
@given(
    rule=RULES,
    dtype=DTYPES,
    layouts=st.lists(LAYOUTS, min_size=1, max_size=3),
    density=DENSITIES,
    runs=RUNS,
    room=st.sampled_from([0, 1, 40]),
    wide=st.booleans(),
    gathered=st.booleans(),
    seeded=st.booleans(),
    offset=OFFSETS,
    seed=SEEDS,
)
@example("adam", "float32", [(1, 40000, 1)], 0.01, 1, 3, False, False, True, 0, 0)  # by indices
@example("adam", "float32", [(1, 40000, 1)], 0.5, 1, 3, False, False, True, 0, 1)  # by bits
@example("adam", "float32", [(1, 40000, 1)], 0.01, 1, 3, False, True, True, 0, 0)
@example("adam", "float32", [(1, 40000, 1)], 0.5, 1, 3, False, True, True, 0, 1)
@example("adam", "float32", [(1, 40, 1000)], 0.5, 1, 3, False, True, True, 0, 1)
def test_compact_state(kernels, rule, dtype, layouts, density, runs, room, wide, gathered, seeded, offset, seed):
    rng = np.random.default_rng(seed)
    step = Step.make(rng, rule, dtype, seeded)
    variables = [
        Variable(kernels, rng, step, (1, *layout[1:]), density, runs, compact=True, room=room, wide=wide,
                 decays=number % 2 == 1, offset=offset, gathered=gathered)
        for number, layout in enumerate(layouts)
    ]  # fmt: skip
    run(kernels, step, variables)


@SETTINGS
@given(
    rule=RULES,
    dtype=DTYPES,
    rows=st.sampled_from([1, 5, 64, 300]),
    row_size=st.sampled_from([1, 3, 16, 100, 5000]),
    slices=st.sampled_from([0, 1, 7, 31, 32, 33, 100]),
    by_rows=st.booleans(),
    compact=st.booleans(),
    density=DENSITIES,
    seeded=st.booleans(),
    seed=SEEDS,
)
def test_slices(kernels, rule, dtype, rows, row_size, slices, by_rows, compact, density, seeded, seed):
    rng = np.random.default_rng(seed)
    rows = min(rows, 20000 // row_size)
    step = Step.make(rng, rule, dtype, seeded)
    layout = (1, rows, row_size) if by_rows else (1, rows * row_size, 1)
    sparse = Variable(kernels, rng, step, layout, density, compact=compact, room=2, slices=slices, row_size=row_size)
    dense = Variable(kernels, rng, step, layout, density, compact=compact)
    run(kernels, step, [dense, sparse])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("count", [23, 24, 25, 49])
def test_many_variables(kernels, count, compact):
    """More than the arguments of one kernel have room for; empty ones among them."""
    rng = np.random.default_rng(count)
    step = Step.make(rng, "adam_amsgrad", "float32", True)
    sizes = rng.choice([0, 1, 40, 513, 3000], count)
    variables = [Variable(kernels, rng, step, (1, int(size), 1), 0.5, compact=compact) for size in sizes]
    run(kernels, step, variables)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", twins.RULES)
def test_every_rule(kernels, rule, dtype):
    rng = np.random.default_rng(0)
    step = Step.make(rng, rule, dtype, True)
    full = [Variable(kernels, rng, step, (1, 1500, 1), 0.5, decays=decays) for decays in (False, True)]
    run(kernels, step, full)
    run(kernels, step, [Variable(kernels, rng, step, (1, 1500, 1), 0.5, compact=True, decays=True)])
    run(kernels, step, [Variable(kernels, rng, step, (1, 1500, 1), 0.5, compact=True, decays=True, gathered=True)])


@SETTINGS
@given(
    kept=st.sampled_from([40, 5000]),
    inner=st.sampled_from([1, 4, 600]),
    density=st.sampled_from([0.01, 0.3]),  # found by indices, and by bits
    wrong=st.sampled_from(["offsets up", "offsets down", "capacity", "indices"]),
    gathered=st.booleans(),
    seed=SEEDS,
)
def test_what_does_not_belong_to_the_mask(kernels, kept, inner, density, wrong, gathered, seed):
    """Nothing is read or written out of bounds (around each array are guards), and no frozen entry is written."""
    rng = np.random.default_rng(seed)
    inner = inner if kept < 1000 else 1
    step = Step.make(rng, "adam", "float32", True)
    one = Variable(kernels, rng, step, (1, kept, inner), density, compact=True, room=2, gathered=gathered)
    offsets, indices = (one.held[name].get().copy() for name in ("offsets", "indices"))
    if wrong.startswith("offsets"):
        one.held["offsets"] = kernels.put(offsets + (50 if wrong.endswith("up") else -5))
        one.pointers.offsets = one.held["offsets"].pointer.value
    elif wrong == "capacity":
        capacity = indices.size // 2
        one.pointers.capacity = capacity
        arrays = [kernels.put(slot[: capacity * inner].copy()) for slot in one.slots]
        one.arrays[1:] = arrays
        one.pointers.slots = (ctypes.c_void_p * 3)(*(array.pointer.value for array in arrays))
        if gathered:
            one.held["gradient"] = kernels.put(one.held["gradient"].get()[: capacity * inner].copy())
            one.pointers.gradient = one.held["gradient"].pointer.value
        one.unseeded = kernels.put(one.waiting[: -(-capacity * inner // 8)].copy())
        one.pointers.unseeded = one.unseeded.pointer.value
    else:
        frozen = np.flatnonzero(~one.passing[::inner])
        indices[: indices.size // 2] = rng.choice(frozen, indices.size // 2)
        indices[-2:] = [2**31 - 1, -1]
        one.held["indices"] = kernels.put(indices)
        one.pointers.indices = one.held["indices"].pointer.value
    one.check = lambda: None
    run(kernels, step, [one])
    value = one.arrays[0].get()
    frozen = ~one.passing
    np.testing.assert_array_equal(value.view(np.uint32)[frozen], one.value.view(np.uint32)[frozen])
    for array in (*one.arrays, one.unseeded, *one.held.values()):
        array.get()


@pytest.mark.parametrize("layout", [(1, 2**31 + 65, 1), (1, 2**17 + 1, 2**14 + 1), (2**16 + 1, 2**15 + 3, 1)])
def test_more_entries_than_31_bits_count(gpu_kernels, layout):
    """A few trainable entries beyond the largest int32, looked at on the GPU without copying all to the host."""
    arrays, count = gpu_kernels.arrays, int(np.prod(layout))
    if arrays.free_bytes() < 6 * count + 2**30:
        pytest.skip(f"{6 * count / 2**30:.0f} GiB of GPU memory are not free")
    values, pointer = arrays.empty(2 * count)
    values[0::2], values[1::2] = 0x00, 0x3C  # ones
    outer, kept, inner = layout
    bits = np.unique(np.concatenate([np.random.default_rng(0).integers(0, kept, 20), [0, kept - 1]]))
    flags = np.zeros(kept, bool)
    flags[bits] = True
    packed = gpu_kernels.put(np.packbits(flags, bitorder="little"))
    gradient, gradient_pointer = arrays.empty(2 * count)
    gradient[:] = values
    variable = FusedVariable(
        variable=pointer, gradient=gradient_pointer, bits=packed.pointer.value, layout=layout, capacity=0
    )
    scalars, none = gpu_kernels.put(np.array([1, 0, 0], np.float16)), (ctypes.c_int * 1)()
    gpu_kernels.run(
        "fz_fused_update", 0, b"sgd", scalars.pointer, None, 0, none, none, ctypes.byref(variable), int64(1)
    )
    entries = zero_entries(arrays, values, count)
    assert entries.size == bits.size * outer * inner
    np.testing.assert_array_equal(np.unique(entries // inner % kept), bits)


def test_entries_without_a_trainable_bit_are_not_read(kernels):
    """Gradient, slots and variable of a frozen tensor may be nowhere."""
    rng = np.random.default_rng(0)
    step = Step.make(rng, "adam", "float32", False)
    for layout in ((1, 5000, 1), (1, 5, 1000), (3, 70, 7)):
        one = Variable(kernels, rng, step, layout, 0.0)
        for name in ("variable", "gradient"):
            setattr(one.pointers, name, 16)
        one.pointers.slots = (ctypes.c_void_p * 3)(16, 16)
        run(kernels, step, [one])
