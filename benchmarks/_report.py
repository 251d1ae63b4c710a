"""What all benchmarks share, those that need no TensorFlow included: command line, facts on the machine, output."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def size_of(text: str) -> int:
    """`"16M"` is 16 * 2**20, `"64K"` is 64 * 2**10; plain numbers are themselves."""
    factor = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    size = int(text[:-1] if factor > 1 else text) * factor
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text!r}")
    return size


def parser(description: str, repeats: int, sizes: Sequence[str] = (), size: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has.

    Args:
        description: The benchmark's docstring.
        repeats: Default number of rounds.
        sizes: Default sizes, for a benchmark that takes several.
        size: Whether one that takes no several takes one.
    """
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sizes:
        default = list(map(size_of, sizes))
        help_text = f"entries of each table, such as {sizes[0]} (default: {' '.join(sizes)})"
        arguments.add_argument("--sizes", nargs="+", type=size_of, default=default, help=help_text)
    else:
        arguments.add_argument(
            "--size", type=size_of, default=size_of("16M"), help="entries, such as 16M (the default)"
        )
    arguments.add_argument("--repeats", type=int, default=repeats, help="rounds of timing")
    arguments.add_argument("--quick", action="store_true", help="an eighth of the rounds")
    arguments.add_argument("--json", type=Path, help="file for the results")
    return arguments


def repeats_of(options: argparse.Namespace) -> int:
    """The number of rounds that the options ask for."""
    return max(options.repeats // 8, 3) if options.quick else options.repeats


def machine_facts() -> dict[str, Any]:
    """Where and when this ran."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(title: str, columns: list[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    return result


def show(tables: list[Table], notes: list[str]) -> None:
    """Prints tables, and lines below them."""
    # Outside a terminal a table would be cut to 80 columns.
    console = Console() if Console().is_terminal else Console(width=140)
    for each in tables:
        console.print(each)
    for note in notes:
        console.print(note)


def write(path: Path | None, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes the JSON file, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps({"facts": facts, **results}, indent=2) + "\n")
