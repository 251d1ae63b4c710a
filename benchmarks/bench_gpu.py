"""Bytes per second of the CUDA kernels against a copy on the device, in the same run.

256M float32 by default, trainable at random or by rows of 1,024 entries. For each kernel the fewest bytes that the case
must move are counted from the mask itself: the mask's bits (or, for compact state, the indices where these are fewer)
and the 32-byte sectors that hold an entry which is read or written. Their rate is given as a fraction of the rate of a
device-to-device copy (bytes read plus bytes written). Masking in place is set beside PyTorch's

- where: `torch.where` with a boolean mask;
- mul: `mul_` by a mask that is kept as floats (which does not mask a NaN);
- fill: `masked_fill_` with a boolean mask.

A fused step of Adam, with full and with compact state, has nothing beside it: where an entry is trainable it reads
gradient, variable and two slots, and writes all but the gradient.

Before each call that is timed the L2 cache is overwritten. Needs a GPU, nvcc and PyTorch; neither TensorFlow nor
freezeops' Python package is imported.
"""

import ctypes
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import library
from numpy_twins import rank_offsets

SECTOR = 32
"""Bytes of memory that a GPU reads or writes together."""

WIDTH = 4
FLOAT32 = 2
"""Its number in `cuda::Float`."""
ROW = 1024
DENSITIES = (1.0, 0.99, 0.5, 0.1, 0.01)
KERNELS = ("mask", "gather", "scatter", "remember", "restore", "adam", "compact adam")
"""The last two are a fused step of Adam, with full and with compact state."""
TARGET = 0.90
"""Of the copy's rate, at least, counted in the fewest bytes."""


class Case(NamedTuple):
    """A mask: one bit for each entry (`inner` is 1) or for each row of `inner` entries."""

    packed: np.ndarray
    kept: int
    inner: int

    @property
    def entries(self) -> int:
        return self.kept * self.inner

    @property
    def ones(self) -> int:
        """How many bits are 1."""
        return int(rank_offsets(self.packed, self.kept)[-1])


def make_case(size: int, density: float, rows: bool) -> Case:
    """A mask in which each bit is 1 with a probability."""
    rng = np.random.default_rng(0)
    inner = ROW if rows else 1
    kept = max(size // inner, 1)
    packed = np.zeros(-(-kept // 8), np.uint8)
    block = 2**24  # keeps the random numbers small beside what is measured
    for begin in range(0, kept, block):
        flags = rng.random(min(block, kept - begin), np.float32) < density
        packed[begin // 8 : begin // 8 + -(-flags.size // 8)] = np.packbits(flags, bitorder="little")
    return Case(packed, kept, inner)


def touched_sectors(case: Case, trainable: bool) -> int:
    """How many sectors of an aligned float32 tensor hold a trainable (or a frozen) entry."""
    in_sector = SECTOR // WIDTH
    if case.inner > 1:
        if case.inner % in_sector:
            raise ValueError(f"Rows must be whole sectors of {in_sector} entries. Received: rows of {case.inner}")
        selected = case.ones if trainable else case.kept - case.ones
        return selected * (case.inner // in_sector)
    # Eight entries are a sector and a byte of the mask.
    full = np.full(case.packed.shape, 0xFF, np.uint8)
    if case.kept % 8:
        full[-1] = (1 << case.kept % 8) - 1
    return int(np.count_nonzero(case.packed if trainable else case.packed != full))


def fewest_bytes(kernel: str, case: Case) -> int:
    """What a kernel must read and write at least."""
    mask = case.packed.size
    if kernel == "mask":
        return mask + SECTOR * touched_sectors(case, trainable=False)
    if kernel in ("remember", "restore"):
        return mask + 2 * SECTOR * touched_sectors(case, trainable=False)
    whole = SECTOR * touched_sectors(case, trainable=True)
    if kernel == "adam":
        # Gradient, variable and two slots are read, all but the gradient are written.
        return mask + 7 * whole
    compact = -(-case.ones * case.inner * WIDTH // SECTOR) * SECTOR
    which = min(mask, 4 * case.ones)
    return which + (3 * whole + 4 * compact if kernel == "compact adam" else whole + compact)


def result(kernel: str, case: Case, seconds: Mapping[str, float], copy_rate: float) -> dict[str, Any]:
    """What is reported of one kernel.

    Args:
        kernel: One of `KERNELS`.
        case: The mask.
        seconds: Of the kernel and, where it has some, of its competitors.
        copy_rate: Bytes read and written per second by a copy.
    """
    fewest = fewest_bytes(kernel, case)
    others = {name: each for name, each in seconds.items() if name != kernel}
    fraction = fewest / seconds[kernel] / copy_rate
    return {
        "kernel": kernel,
        "fewest_bytes": fewest,
        "seconds": dict(seconds),
        "fraction_of_copy": fraction,
        "target_reached": fraction >= TARGET,
        "slower_than": sorted(name for name, each in others.items() if each < seconds[kernel]),
    }


class Bench:
    """Kernels, tensors and timing on the GPU."""

    def __init__(self, torch: Any):
        self.torch = torch
        self.kernels = library.load(library.gpu_library())
        self.flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def put(self, array: np.ndarray) -> Any:
        """A copy on the GPU."""
        return self.torch.from_numpy(array).cuda()

    def call(self, name: str, *arguments: Any) -> None:
        """Starts a kernel."""
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        if error := getattr(self.kernels, name)(*arguments, stream):
            raise RuntimeError(self.kernels.fz_error_text(error).decode())

    def time(self, functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Median seconds of each, in rounds with another order every time."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        order = list(functions)
        shuffle = random.Random(0).shuffle
        for number in range(repeats + 3):
            shuffle(order)
            for name in order:
                begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.fill_(number % 251)
                begin.record()
                functions[name]()
                end.record()
                end.synchronize()
                if number >= 3:
                    times[name].append(begin.elapsed_time(end) / 1e3)
        return {name: statistics.median(each) for name, each in times.items()}

    def copy_rate(self, entries: int, repeats: int) -> float:
        """Bytes read and written per second by a copy of float32."""
        source = self.torch.ones(entries, device="cuda")
        target = self.torch.empty_like(source)
        seconds = self.time({"copy": lambda: target.copy_(source)}, repeats)["copy"]
        return 2 * WIDTH * entries / seconds

    def measure(self, case: Case, repeats: int) -> dict[str, dict[str, float]]:
        """Seconds of each kernel and of its competitors."""
        torch = self.torch
        flags = np.unpackbits(case.packed, count=case.kept, bitorder="little").astype(bool)
        ones = np.flatnonzero(flags).astype(np.int32)
        bits, offsets = self.put(case.packed), self.put(rank_offsets(case.packed, case.kept))
        indices = self.put(ones)
        layout = (ctypes.c_int64 * 3)(1, case.kept, case.inner)
        gradient, variable = (torch.ones(case.entries, device="cuda") for _ in range(2))
        mask = {"mask": lambda: self.call("fz_zero_frozen", WIDTH, at(gradient), at(bits), layout)}
        boolean = self.put(flags).repeat_interleave(case.inner)
        seconds = {"mask": self.time(mask | self.competitors(gradient, boolean), repeats)}
        # Less memory from here on.
        snapshot = torch.empty_like(gradient)
        compact = torch.empty(ones.size * case.inner, device="cuda")
        index = (at(bits), layout, at(offsets), at(indices), 0, ctypes.c_int64(ones.size))
        one = ctypes.c_void_p * 1
        gather = (WIDTH, 1, one(at(compact)), one(at(gradient)), *index)
        scatter = (WIDTH, at(variable), at(compact), *index)
        alone = {
            "gather": lambda: self.call("fz_gather_trainable", *gather),
            "scatter": lambda: self.call("fz_scatter_trainable", *scatter),
            "remember": lambda: self.call("fz_copy_frozen", WIDTH, at(snapshot), at(variable), at(bits), layout),
            "restore": lambda: self.call("fz_copy_frozen", WIDTH, at(variable), at(snapshot), at(bits), layout),
        }
        for name, function in alone.items():
            seconds[name] = self.time({name: function}, repeats)
        ranks = {"offsets": at(offsets), "indices": at(indices), "capacity": ones.size}
        for name, size, others in (("adam", case.entries, {}), ("compact adam", ones.size * case.inner, ranks)):
            slots = [torch.ones(size, device="cuda") for _ in range(2)]
            one_variable = library.FusedVariable(
                variable=at(variable), gradient=at(gradient), slots=tuple(slot.data_ptr() for slot in slots),
                bits=at(bits), layout=layout, **others,
            )  # fmt: skip
            seconds[name] = self.time({name: self.adam_step(one_variable)}, repeats)
        return seconds

    def adam_step(self, variable: library.FusedVariable) -> Callable[[], None]:
        """A fused step of Adam for one float32 variable, as in Keras."""
        # Rate, weight decay and its rate, then 1 - beta_1, 1 - beta_2, epsilon.
        scalars = self.put(np.array([1e-3, 0, 0, 0.1, 1e-3, 1e-7], np.float32))
        none, one = (ctypes.c_int * 1)(), ctypes.c_int64(1)
        return lambda: self.call(
            "fz_fused_update", FLOAT32, b"adam", at(scalars), None, 0, none, none, ctypes.byref(variable), one
        )

    def competitors(self, gradient: Any, boolean: Any) -> dict[str, Callable[[], Any]]:
        """PyTorch's ways to mask a gradient, over masks that are kept in the form they want."""
        zero, frozen, floats = self.torch.zeros((), device="cuda"), ~boolean, boolean.float()
        return {
            "where": lambda: self.torch.where(boolean, gradient, zero),
            "mul": lambda: gradient.mul_(floats),
            "fill": lambda: gradient.masked_fill_(frozen, 0.0),
        }


def at(tensor: Any) -> ctypes.c_void_p:
    """Where a tensor is."""
    return ctypes.c_void_p(tensor.data_ptr())


def gpu_facts(torch: Any) -> dict[str, Any]:
    """The device and what drives it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    nvcc = subprocess.run([str(library.find_nvcc()), "--version"], capture_output=True, text=True).stdout
    return _report.machine_facts() | {
        "device": torch.cuda.get_device_name(0),
        "driver": driver,
        "nvcc": nvcc.strip().splitlines()[-1] if nvcc else "unknown",
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
    }


def tables(results: list[dict[str, Any]]) -> list[Any]:
    """One table for the rates, one for masking beside its competitors."""
    rates = _report.table(
        f"Rate in the fewest bytes / rate of a copy (to reach: {TARGET:.2f})", ["trainable", *KERNELS]
    )
    beside = _report.table("Masking, milliseconds", ["trainable", "kernel", "where", "mul", "fill", "never slower"])
    for each in results:
        name = f"{each['density']:g}{' of rows' if each['rows'] else ''}"
        cells = {one["kernel"]: one for one in each["kernels"]}
        rates.add_row(name, *(_fraction(cells[kernel]) for kernel in KERNELS))
        mask = cells["mask"]
        times = [f"{mask['seconds'][key] * 1e3:.3f}" for key in ("mask", "where", "mul", "fill")]
        slower = mask["slower_than"]
        beside.add_row(name, *times, f"[red]slower than {', '.join(slower)}[/]" if slower else "[green]yes[/]")
    return [rates, beside]


def _fraction(one: dict[str, Any]) -> str:
    colour = "green" if one["target_reached"] else "red"
    return f"[{colour}]{one['fraction_of_copy']:.2f}[/]"


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit status."""
    parser = _report.parser(__doc__, repeats=40)
    parser.set_defaults(size=_report.size_of("256M"))
    options = parser.parse_args(arguments)
    repeats = _report.repeats_of(options)
    try:
        import torch
    except ImportError:
        print("bench_gpu.py needs PyTorch, for memory, timing and competitors. Nothing was measured.")
        return 2
    if not torch.cuda.is_available():
        print("bench_gpu.py needs a GPU, and PyTorch sees none. Nothing was measured.")
        return 2
    bench = Bench(torch)
    results = []
    for rows in (False, True):
        for density in DENSITIES:
            case = make_case(options.size, density, rows)
            rate = bench.copy_rate(case.entries, repeats)
            seconds = bench.measure(case, repeats)
            kernels = [result(kernel, case, seconds[kernel], rate) for kernel in KERNELS]
            results.append({"density": density, "rows": rows, "copy_bytes_per_second": rate, "kernels": kernels})
    facts = gpu_facts(torch)
    rate = statistics.median(each["copy_bytes_per_second"] for each in results)
    notes = [
        f"A copy moves {rate / 1e9:.0f} GB/s, read and written.",
        f"{facts['device']}, driver {facts['driver']}, {facts['nvcc']}, PyTorch {facts['torch']}; {facts['date']}",
        facts["command"],
    ]
    _report.show(tables(results), notes)
    _report.write(options.json, facts, {"size": options.size, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
