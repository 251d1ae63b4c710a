"""Reports of an optimizer's variables: as data, and as tables."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tensorflow as tf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from freezeops.backward.skipping import Outcome
from freezeops.keras_compat.variables import is_variable, variable_path
from freezeops.masks.layout import Layout, Shape
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.plan import Mode
from freezeops.registry.rules import Loaded, MaskRule
from freezeops.registry.targets import ExactPath
from freezeops.step import fused
from freezeops.step.fused import NotFused
from freezeops.step.managed import ManagedVariable

MOST_NOTES = 12
"""How many lines of reasons `summary()` prints."""


@dataclass(frozen=True)
class VariableReport:
    """The report of one variable.

    Attributes:
        path: The variable's path.
        shape: The variable's shape.
        mode: `"full"`, `"compact"`, `"permanent"` or `"unmasked"`.
        layout: `(outer, kept, inner)` of the mask; `None` where there is none.
        density: Trainable entries / all entries.
        trainable: Number of trainable entries.
        bytes: Bytes of the mask on the device, and of what compact state needs beside slots.
        capacity: How many entries can be trainable without `repack`.
        fused: Whether one native pass updates it.
        fused_reason: Why none does; else empty.
        gradient: How its gradient was computed in the step that was traced last: `"trainable part only"`, or
            `"whole"`, frozen entries too.
        gradient_reason: Why it was whole, or terms of it were; else empty.
        mode_reason: Why the mode is not the one that was asked for; else empty.
    """

    path: str
    shape: Shape
    mode: Mode
    layout: Layout | None
    density: float
    trainable: int
    bytes: int
    capacity: int
    fused: bool
    fused_reason: str
    gradient: str = "whole"
    gradient_reason: str = ""
    mode_reason: str = ""


@dataclass(frozen=True)
class Options:
    """Options of an optimizer that reports look at.

    Attributes:
        fused: Whether variables are updated in one pass where that can be; `None`: this Keras never does.
        skips: Whether gradients of frozen entries are left uncomputed where that can be.
    """

    fused: bool | None
    skips: bool = False


def describe(managed: Sequence[ManagedVariable], options: Options) -> list[VariableReport]:
    """Returns a report of each variable.

    Args:
        managed: The records of the variables.
        options: The optimizer's.
    """
    return [_report(each, options) for each in managed]


def _report(managed: ManagedVariable, options: Options) -> VariableReport:
    partition = managed.partition
    described = partition.describe()
    trainable = partition.mask.count()
    reason = _not_fused(managed, options.fused)
    gradient = _gradient(managed, options)
    return VariableReport(
        path=partition.path,
        shape=tuple(partition.variable.shape),
        mode=partition.mode,
        layout=described.layout,
        density=trainable / partition.size if partition.size else 1.0,
        trainable=trainable,
        bytes=sum(described.overhead_bytes.values()) or described.mask_bytes,
        capacity=described.capacity,
        fused=not reason,
        fused_reason=reason,
        gradient="trainable part only" if gradient.part else "whole",
        gradient_reason=gradient.reason,
        mode_reason=described.reason,
    )


def _gradient(managed: ManagedVariable, options: Options) -> Outcome:
    """Returns how the gradient of a variable is made."""
    partition = managed.partition
    if partition.mode == "permanent" or (isinstance(partition, CompactPartition) and not partition.capacity):
        return Outcome(True)  # nothing of it
    if options.fused is None:
        return Outcome(False, "tf_keras computes whole gradients")
    return managed.gradient if options.skips else Outcome(False, "skip_frozen_gradients=False")


def _not_fused(managed: ManagedVariable, fused_updates: bool | None) -> str:
    """Returns why a variable is not updated in one pass; an empty string where it is."""
    if fused_updates is None:
        return "tf_keras has no fused updates"
    if isinstance(managed.fused, NotFused):
        return managed.fused.reason or "the inner optimizer does not train it"
    if not fused_updates:
        return "fused=False"
    return managed.fused.reason_against or fused.reason_against(managed.partition)


def print_summary(
    name: str,
    managed: Sequence[ManagedVariable],
    options: Options,
    console: Console | None = None,
    collapse: bool = False,
) -> None:
    """Prints one line per variable, reasons and totals.

    Args:
        name: The optimizer's name.
        managed: The records of the variables.
        options: As for `describe`.
        console: Where to print; standard output by default.
        collapse: Whether variables whose paths differ in numbers alone share a line.
    """
    console = console or Console()
    reports = describe(managed, options)
    notes: dict[str, int] = {}
    groups = _collapsed(reports) if collapse else [[each] for each in reports]
    cells = [_cells(group, notes, options) for group in groups]
    titles = ("variable", "shape", "density", "bytes", "mode")
    numbers = [titles[1:], *(each[1:] for each in cells)]
    widths = [max(len(row[i]) for row in numbers) for i in range(4)]
    room = console.width - sum(widths) - 2 * len(widths)
    paths = shortened([each[0] for each in cells], max(room, len(titles[0])))
    first = max(map(len, (titles[0], *paths)))

    def line(path: str, rest: Sequence[str]) -> str:
        shape, density, size, mode = rest
        columns = (path.ljust(first), shape.rjust(widths[0]), density.rjust(widths[1]), size.rjust(widths[2]), mode)
        return "  ".join(columns).rstrip()

    lines = [f"MaskedOptimizer {name!r}", line(titles[0], titles[1:])]
    lines.append("─" * min(max(first + sum(widths) + 8, 20), max(console.width, 20)))
    lines += [line(path, each[1:]) for path, each in zip(paths, cells, strict=True)]
    lines += _totals(reports, managed)
    kept = list(notes)[:MOST_NOTES]
    lines += [f"[{notes[reason]}] {reason}" for reason in kept]
    if len(notes) > len(kept):
        lines.append(f"and {len(notes) - len(kept)} more reasons: see `describe()`")
    for each in lines:
        console.print(Text(each), soft_wrap=True)


def _cells(group: Sequence[VariableReport], notes: dict[str, int], options: Options) -> tuple[str, ...]:
    first = group[0]
    path = first.path if len(group) == 1 else f"{_numbers_joined([each.path for each in group])} ({len(group)})"
    size = sum(math.prod(each.shape) for each in group)
    trainable = sum(each.trainable for each in group)
    mode = f"{first.mode}, fused" if first.fused else str(first.mode)
    if first.mode == "compact" and len(group) == 1 and first.capacity != first.trainable:
        mode += f", room {first.capacity:,}"
    reasons = [first.mode_reason]
    if not first.fused and first.mode != "permanent" and options.fused:
        reasons.append(f"not fused: {first.fused_reason}")
    if options.skips and first.mode != "permanent":
        reasons.append(f"gradient: {', '.join(each for each in (first.gradient, first.gradient_reason) if each)}")
    marks = "".join(f" [{notes.setdefault(reason, len(notes) + 1)}]" for reason in reasons if reason)
    density = f"{trainable / size if size else 1.0:.4g}"
    shape = "x".join(map(str, first.shape)) or "scalar"
    return path, shape, density, _bytes(sum(each.bytes for each in group)), mode + marks


def _totals(reports: Sequence[VariableReport], managed: Sequence[ManagedVariable]) -> list[str]:
    """Returns the lines of totals."""
    size, trainable = sum(math.prod(each.shape) for each in reports), sum(each.trainable for each in reports)
    density = trainable / size if size else 1.0
    lines = [
        f"total: {size:,} entries, {size - trainable:,} frozen, density {density:.4g}, "
        f"{_bytes(sum(each.bytes for each in reports))}"
    ]
    purposes: dict[str, int] = {}
    for each in managed:
        for purpose, count in each.partition.describe().overhead_bytes.items():
            purposes[purpose] = purposes.get(purpose, 0) + count
    if purposes:
        slots, in_full_state = _slot_bytes(managed)
        lines.append(f"slots: {_bytes(slots)}, {_bytes(in_full_state - slots)} less than in full state")
        lines.append("compact state: " + ", ".join(f"{purpose} {_bytes(n)}" for purpose, n in purposes.items()))
    return lines


def _slot_bytes(managed: Iterable[ManagedVariable]) -> tuple[int, int]:
    """Returns the bytes of all slots, and of what they would be in full state."""
    now = whole = 0
    for each in managed:
        for record in each.slot_records:
            width = tf.as_dtype(record.slot.dtype).size
            now += math.prod(tuple(record.slot.shape)) * width
            whole += each.partition.size * width
    return now, whole


def _bytes(count: int) -> str:
    """Returns a number of bytes as `"12 B"`, `"3.4 kB"`, `"56 MB"`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"
    return f"{count} B"


def _collapsed(reports: Sequence[VariableReport]) -> list[list[VariableReport]]:
    """Returns variables in groups whose paths differ in numbers alone, and that are alike otherwise."""
    groups: dict[tuple, list[VariableReport]] = {}
    for each in reports:
        pattern = re.sub(r"\d+", "#", each.path)
        key = pattern, each.shape, each.mode, each.fused, each.fused_reason, each.mode_reason
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def _numbers_joined(paths: Sequence[str]) -> str:
    """Returns one path for several that differ in numbers alone, with the first and last number of each place."""
    places = list(zip(*(re.findall(r"\d+", path) for path in paths), strict=True))
    joined = iter(each[0] if len(set(each)) == 1 else f"{{{each[0]}..{each[-1]}}}" for each in places)
    return re.sub(r"\d+", lambda _: next(joined), paths[0])


def shortened(paths: Sequence[str], width: int) -> list[str]:
    """Returns paths of at most `width` characters, shortened from the middle on.

    Numbers stay, and no two paths come to read alike: where that leaves no shorter form, a path stays whole.
    """
    short = [_shortened(path, width) for path in paths]
    originals: dict[str, set[str]] = {}
    for path, form in zip(paths, short, strict=True):
        originals.setdefault(form, set()).add(path)
    return [path if len(originals[form]) > 1 else form for path, form in zip(paths, short, strict=True)]


def _shortened(path: str, width: int) -> str:
    parts = path.split("/")
    # From the middle outwards; the first and the last part go last.
    middle = (len(parts) - 1) / 2
    inner = sorted(range(1, len(parts) - 1), key=lambda i: abs(i - middle))
    for i in [*inner, 0, len(parts) - 1]:
        if len("/".join(parts)) <= width:
            break
        parts[i] = _short_part(parts[i], len(parts[i]) - (len("/".join(parts)) - width))
    if len("/".join(parts)) <= width:
        return "/".join(parts)
    # Still too long: several parts without a number become one.
    kept = [part if re.search(r"\d", part) else "…" for part in parts[:-1]]
    joined = [part for i, part in enumerate(kept) if part != "…" or kept[i - 1 : i] != ["…"]]
    return "/".join([*joined, parts[-1]])


def _short_part(part: str, width: int) -> str:
    """Returns one part of a path in about `width` characters: its beginning and its numbers, without the rest."""
    numbers = "…".join(re.findall(r"\d+", part))
    letters = re.match(r"\D*", part)
    begin = letters[0] if letters else ""
    room = max(width - len(numbers) - 1, 1)
    short = f"{begin[:room]}…{numbers}"
    return short if len(short) < len(part) else part


def print_rules(name: str, rules: Sequence[MaskRule | Loaded], console: Console | None) -> None:
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
        targets = ", ".join(_target_name(target) for target in rule.target)
        entries = "all" if rule.entries is None else type(rule.entries).__name__.lower()
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
