"""Tables for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from freezeops.keras_compat.variables import is_variable, variable_path
from freezeops.partitions.partition import Partition
from freezeops.registry.rules import ExactPath, Loaded, Rule


def print_summary(
    name: str,
    partitions: Sequence[Partition],
    console: Console | None,
    slot_bytes: Sequence[tuple[int, int]] | None = None,
    updates: Sequence[str] | None = None,
) -> None:
    """Prints one row per variable and a total.

    Args:
        name: The optimizer's name.
        partitions: Its partitions.
        console: Where to print; standard output by default.
        slot_bytes: For each variable the bytes of its slots, and what they would be in full
            state. Shown where given.
        updates: For each variable how it is updated. Shown where given.
    """
    table = Table(title=f"MaskedOptimizer {name!r}")
    table.add_column("variable", overflow="fold")
    for title in ("shape", "frozen", "density", "mask\nbytes"):
        table.add_column(title, justify="right")
    if slot_bytes is not None:
        table.add_column("slot\nbytes", justify="right")
        table.add_column("saved", justify="right")
    table.add_column("way")
    frozen = [part.size - part.mask.count() for part in partitions]
    for i, part in enumerate(partitions):
        way = f"{part.way} ({part.note})" if part.note else part.way
        if updates is not None and updates[i]:
            way = f"{way}, {updates[i]}"
        shape = " × ".join(str(size) for size in part.variable.shape) or "scalar"
        numbers = _numbers(part.size, frozen[i], part.mask_bytes, None if slot_bytes is None else slot_bytes[i])
        table.add_row(part.path, shape, *numbers, way)
    table.add_section()
    size, mask_bytes = sum(part.size for part in partitions), sum(part.mask_bytes for part in partitions)
    slots = None
    if slot_bytes is not None:
        slots = sum(own for own, _ in slot_bytes), sum(full for _, full in slot_bytes)
        table.caption = _beside_slots(partitions)
    table.add_row("total", f"{size:,}", *_numbers(size, sum(frozen), mask_bytes, slots), "")
    (console or Console()).print(table)


def _numbers(size: int, frozen: int, mask_bytes: int, slots: tuple[int, int] | None) -> list[str]:
    density = 1 - frozen / size if size else 1.0
    numbers = [f"{frozen:,}", f"{density:.4g}", f"{mask_bytes:,}"]
    return numbers if slots is None else [*numbers, f"{slots[0]:,}", f"{slots[1] - slots[0]:,}"]


def _beside_slots(partitions: Sequence[Partition]) -> str:
    """What compact state needs beside slots, in words."""
    total: dict[str, int] = {}
    for part in partitions:
        for what, size in part.bytes_beside_slots.items():
            total[what] = total.get(what, 0) + size
    return "Bytes beside slots: " + ", ".join(f"{what} {size:,}" for what, size in total.items()) if total else ""


def print_rules(name: str, rules: Sequence[Rule | Loaded], console: Console | None) -> None:
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
        if isinstance(rule, Loaded):
            table.add_row("load", ", ".join(repr(mask.name) for mask in rule.stored.masks), "masks")
            continue
        targets = ", ".join(_target_name(part) for part in rule.target)
        entries = "all" if rule.entries is None else type(rule.entries).__name__
        table.add_row(rule.action + (" permanent" if rule.permanent else ""), targets, entries)
    (console or Console()).print(table)


def print_notes(notes: Sequence[str], console: Console | None) -> None:
    """Prints what is off with the installed versions, a line for each.

    Args:
        notes: Sentences.
        console: Where to print; standard output by default.
    """
    for note in notes:
        (console or Console()).print(f"Off: {note}", markup=False, highlight=False)


def _target_name(target: object) -> str:
    if isinstance(target, str | ExactPath):
        return repr(target if isinstance(target, str) else target.path)
    return variable_path(target) if is_variable(target) else getattr(target, "name", repr(target))
