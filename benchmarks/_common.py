"""What the benchmarks of TensorFlow share: interleaved timing, facts on the machine; and what is in `_report.py`.

Competitors are timed in rounds, one call of each per round and in another order every
time, and compared within each round; what is reported is the median over the rounds.
On a busy machine that was the steadiest of what was tried: differences of minima varied
five times as much, because each competitor's luckiest call comes at another time.
"""

import dataclasses
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from _report import machine_facts, parser, repeats_of, show, size_of, table, write
from rich.table import Table

import freezeops as fz
from freezeops import ops

__all__ = ["parser", "repeats_of", "size_of", "table"]  # from _report, for the benchmarks

# Each configuration makes functions anew on purpose; TensorFlow would warn of that.
tf.get_logger().setLevel("ERROR")

MILLISECONDS = 1e3


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What was timed.

    Attributes:
        seconds: For each competitor its seconds, one per round.
        disturbed: Whether other processes were busy meanwhile.
    """

    seconds: dict[str, list[float]]
    disturbed: bool

    def added(self, name: str, base: str) -> float:
        """Median over the rounds of the difference to `base`, in milliseconds."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(a - b for a, b in pairs) * MILLISECONDS

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of the ratio to `base`."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def ratio_above(self, name: str, base: str, floor: str) -> float:
        """The same, with the time of `floor` taken off both."""
        triples = zip(*(self.seconds[each] for each in (name, base, floor)), strict=True)
        return statistics.median((a - c) / (b - c) for a, b, c in triples)

    def followed_by(self, later: "Rounds") -> "Rounds":
        """These and later rounds, of what took part in both; of the later ones alone if these are none."""
        names = [name for name in later.seconds if name in self.seconds or not self.seconds]
        seconds = {name: self.seconds.get(name, []) + later.seconds[name] for name in names}
        return Rounds(seconds, self.disturbed or later.disturbed)

    def times(self) -> dict[str, dict[str, float]]:
        """Minimum and median of each competitor in milliseconds."""
        return {
            name: {
                "min_ms": min(seconds) * MILLISECONDS,
                "median_ms": statistics.median(seconds) * MILLISECONDS,
            }
            for name, seconds in self.seconds.items()
        }


Competitor = Callable[[], Any]


def timed(function: Competitor) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    competitors: Mapping[str, Sequence[Competitor]],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[Competitor], float] = timed,
    helpers: Sequence[int] = (),
    patience: int = 4,
) -> Rounds:
    """Times calls in rounds.

    Rounds in which other processes were busy are not counted, unless the machine is
    never quiet: after `patience * repeats` rounds those count that there are.

    Args:
        competitors: For each one or more instances: functions that return when their
            work is done. The fastest instance counts in each round. Where an instance's
            buffers lie in memory is a matter of luck and stays for its life; with the
            same machine code it made some steps 1.5 times as slow as others.
        repeats: Number of rounds.
        warmup: Calls of each before the clock runs: tracing, compiling, first touch.
        clock: Calls an instance and says how many seconds count.
        helpers: Ids of processes in which instances work; they do not count as others.
        patience: How many times as many rounds there are at most.

    Returns:
        A `Rounds`.
    """
    for instances in competitors.values():
        for instance in instances:
            for _ in range(warmup):
                instance()
    order = list(competitors)
    shuffle = random.Random(0).shuffle

    def one_round() -> dict[str, float]:
        shuffle(order)
        seconds = {}
        for name in order:
            seconds[name] = min(map(clock, competitors[name]))
        return seconds

    quiet: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    while len(quiet) < repeats and len(quiet) + len(disturbed) < patience * repeats:
        others = _Others(helpers)
        batch = [one_round()]
        while others.elapsed() < LEAST_WATCHED and len(batch) < repeats:
            batch.append(one_round())
        (disturbed if others.share() > DISTURBED else quiet).extend(batch)
    enough = 2 * len(quiet) >= repeats
    rounds = quiet if enough else quiet + disturbed
    return Rounds({name: [each[name] for each in rounds] for name in competitors}, not enough)


DISTURBED = 0.05
"""Share of the cores that others may have used in a round that counts."""

LEAST_WATCHED = 0.4
"""Seconds over which that is watched: the kernel counts in hundredths of a second."""


class _Others:
    """Share of the cores that other processes use from now on; 0 where Linux does not tell."""

    def __init__(self, helpers: Sequence[int] = ()) -> None:
        self._helpers = helpers
        self._since = time.perf_counter()
        self._start = self._read()

    def elapsed(self) -> float:
        return time.perf_counter() - self._since

    def share(self) -> float:
        busy, own, total = (now - before for now, before in zip(self._read(), self._start, strict=True))
        return max(busy - own, 0.0) / total if total else 0.0

    def _read(self) -> tuple[float, float, float]:
        own = time.process_time() * os.sysconf("SC_CLK_TCK") + sum(map(_ticks_of, self._helpers))
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0, own, 0.0
        ticks = [float(field) for field in fields]
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, own, sum(ticks)


def _ticks_of(process: int) -> float:
    """Time that another process has used, in the kernel's ticks; 0 where Linux does not tell."""
    try:
        # The name, in brackets, may hold spaces.
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return float(fields[11]) + float(fields[12])


def two_thread_passes(entries: int) -> tuple[dict[str, Competitor], ThreadPoolExecutor]:
    """What memory can do: passes over existing float32 buffers, one half per thread.

    Returns:
        "copy" to another buffer, "rewrite" (times 1, in place), and the pool of threads. Both read
        and write each byte once, but on many machines they are not equally fast: a line that was
        read is written back at little cost, and a write elsewhere costs as much as a read or more.
    """
    source, target = np.ones(entries, np.float32), np.zeros(entries, np.float32)
    pool = ThreadPoolExecutor(2)
    halves = slice(None, entries // 2), slice(entries // 2, None)

    def in_halves(function: Callable[[slice], Any]) -> Competitor:
        def run() -> None:
            other = pool.submit(function, halves[0])
            function(halves[1])
            other.result()

        return run

    def copy(half: slice) -> None:
        np.copyto(target[half], source[half])

    def rewrite(half: slice) -> None:
        np.multiply(target[half], np.float32(1), out=target[half])

    return {"copy": in_halves(copy), "rewrite": in_halves(rewrite)}, pool


def peak_memory() -> float:
    """Largest resident set of this process so far, or since `forget_peak_memory`, in bytes.

    Not `ru_maxrss`, which begins with what the process that started this one had.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
    return float(kilobytes) * 1024


def forget_peak_memory() -> None:
    """Has `peak_memory` begin again with what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(script: str, *arguments: str) -> str:
    """The last line that a benchmark prints, run in a process of its own."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def facts() -> dict[str, Any]:
    """Where, when and with what this ran."""
    return {
        **machine_facts(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "freezeops": fz.__version__,
        "paths": ops.paths(),
    }


def mark(text: str, disturbed: bool) -> str:
    """A result for a table, with a sign where it was measured on a busy machine."""
    return f"~{text}" if disturbed else text


MARK_NOTE = "~ other processes were busy meanwhile."


def verdict(value: float, target: float | None) -> str:
    """The target, and whether it was reached, as text for a table."""
    if target is None:
        return ""
    # Two decimals, or as many as it has.
    text = f"{target:.2f}" if round(target, 2) == target else f"{target:g}"
    return f"[green]{text} reached[/]" if value <= target else f"[red]{text} missed[/]"


def report(tables: list[Table], notes: list[str], results: dict[str, Any], path: Path | None) -> None:
    """Prints tables and notes, and writes the JSON file.

    Args:
        tables: What to print.
        notes: Lines below the tables.
        results: What to write, beside the facts on the machine.
        path: The file; `None` for none.
    """
    where = facts()
    machine = (
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f}; "
        f"TensorFlow {where['tensorflow']}, Keras {where['keras']}, freezeops {where['freezeops']} "
        f"({where['paths']['mask_gradient']}); {where['date']}"
    )
    show(tables, [*notes, machine])
    write(path, where, results)
