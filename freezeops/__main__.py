"""`python -m freezeops`: which versions, libraries and paths are in use here, and why."""

import os
import sys

# The diagnosis is what is asked for, not TensorFlow's own notes about the machine.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rich.console import Console
from rich.table import Table

from freezeops import _native, ops


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    return table


def main() -> int:
    """Prints the diagnosis. Returns the exit status."""
    console = Console()
    diagnosis = _native.diagnosis()

    versions = _table("Versions", "package", "version")
    for name, version in diagnosis.versions.items():
        versions.add_row(name, version)
    console.print(versions)

    libraries = _table("Compiled libraries", "file", "in use", "why", "built with")
    for report in diagnosis.libraries:
        isa = ", ".join(report.build.get("isa", []))
        libraries.add_row(
            report.path.name,
            "yes" if report.loaded else "no",
            report.reason,
            "; ".join(part for part in (report.build.get("compiler", ""), isa) if part),
        )
    if not diagnosis.libraries:
        libraries.add_row("none found", "no", "not built, or built for another platform", "")
    console.print(libraries)

    settings = _table("In use", "what", "value")
    settings.add_row("FREEZEOPS_BACKEND", diagnosis.backend)
    settings.add_row("instruction set", diagnosis.isa or "none (no compiled ops in use)")
    settings.add_row("CUDA kernels", "yes" if diagnosis.cuda else "no")
    settings.add_row("host module", diagnosis.host)
    console.print(settings)

    paths = _table("Ops", "op", "path")
    for op, path in ops.paths().items():
        paths.add_row(op, path)
    console.print(paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
