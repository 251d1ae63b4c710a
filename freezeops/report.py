"""Tables for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from freezeops.keras_internals import is_variable, variable_path
from freezeops.partition import Partition
from freezeops.rules import ExactPath, Rule


def print_summary(name: str, partitions: Sequence[Partition], console: Console | None) -> None:
    """Prints one row per variable and a total.

    Args:
        name: The optimizer's name.
        partitions: Its partitions.
        console: Where to print; standard output by default.
    """
    table = Table(title=f"MaskedOptimizer {name!r}")
    table.add_column("variable", overflow="fold")
    for title in ("shape", "frozen", "density", "mask bytes"):
        table.add_column(title, justify="right")
    table.add_column("way")
    total_frozen = total_size = total_bytes = 0
    for part in partitions:
        trainable = part.mask.count()
        frozen = part.size - trainable
        density = trainable / part.size if part.size else 1.0
        way = f"{part.way} ({part.note})" if part.note else part.way
        shape = " × ".join(str(size) for size in part.variable.shape) or "scalar"
        table.add_row(part.path, shape, f"{frozen:,}", f"{density:.4g}", f"{part.mask_bytes:,}", way)
        total_frozen += frozen
        total_size += part.size
        total_bytes += part.mask_bytes
    table.add_section()
    density = 1 - total_frozen / total_size if total_size else 1.0
    table.add_row("total", f"{total_size:,}", f"{total_frozen:,}", f"{density:.4g}", f"{total_bytes:,}", "")
    (console or Console()).print(table)


def print_rules(name: str, rules: Sequence[Rule], console: Console | None) -> None:
    """Prints the rules that wait for the optimizer to be built.

    Args:
        name: The optimizer's name.
        rules: The rules, in order.
        console: Where to print; standard output by default.
    """
    table = Table(title=f"MaskedOptimizer {name!r}: not built, rules so far")
    table.add_column("call")
    table.add_column("target", overflow="fold")
    table.add_column("entries")
    for rule in rules:
        targets = ", ".join(_target_name(part) for part in rule.target)
        entries = "all" if rule.entries is None else type(rule.entries).__name__
        table.add_row(rule.action + (" permanent" if rule.permanent else ""), targets, entries)
    (console or Console()).print(table)


def _target_name(target: object) -> str:
    if isinstance(target, str | ExactPath):
        return repr(target if isinstance(target, str) else target.path)
    return variable_path(target) if is_variable(target) else getattr(target, "name", repr(target))
