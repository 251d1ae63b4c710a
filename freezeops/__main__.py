"""`python -m freezeops`: the versions, libraries and ops in use here, with reasons."""

import importlib.util
import os
import sys

# TensorFlow's notes about the machine would stand between the tables.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rich.console import Console
from rich.table import Table

from freezeops import ops
from freezeops.keras_compat import contract
from freezeops.keras_compat.tf_keras_contract import TF_KERAS
from freezeops.ops import gpu_check, native


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)
    return table


def _cuda_rows(diagnosis: native.Diagnosis) -> list[tuple[str, str]]:
    """Returns the rows on GPUs: kernels, driver, devices, and whether they go together."""
    kernels = diagnosis.cuda
    gpus = [f"{gpu.name} (compute capability {gpu.capability / 10})" for gpu in diagnosis.gpus]
    sees = ("GPUs that TensorFlow sees", ", ".join(gpus) or "none")
    if kernels is None:
        inside = diagnosis.backend == "reference" and any(report.build.get("cuda") for report in diagnosis.libraries)
        return [("CUDA kernels", "yes, not in use: FREEZEOPS_BACKEND=reference" if inside else "no"), sees]
    architectures = ", ".join(f"{each / 10}" for each in kernels.architectures)
    ptx = ", ".join(f"{each / 10}" for each in kernels.ptx)
    driver = f"supports CUDA {gpu_check.cuda_version(kernels.driver)}" if kernels.driver else "none found"
    if not gpus:
        verdict = "no GPU to run them on"
    else:
        verdict = gpu_check.gpu_problem(kernels, diagnosis.gpus) or "driver and GPU are new enough"
    return [
        ("CUDA kernels", f"yes, for compute capabilities {architectures} and, as PTX of {ptx}, newer ones"),
        ("compiled for", f"CUDA {gpu_check.cuda_version(kernels.runtime)} ({kernels.compiler})"),
        ("GPU driver", driver),
        sees,
        ("can they run", verdict),
    ]


def _contract_table() -> Table:
    """Returns what there is to say of Keras and TensorFlow: the versions, and what is off with them."""
    table = _table("What freezeops uses of their insides", "package", "installed", "known to work", "verdict")
    contracts = [contract.TENSORFLOW, contract.KERAS]
    if importlib.util.find_spec("tf_keras") is not None:
        contracts.append(TF_KERAS)
    for each in contracts:
        required = [f"freezeops cannot work: {problem}" for need, problem in each.broken() if need.without is None]
        verdict = "; ".join([*required, *(f"off: {note}" for note in each.notes())]) or "all is there"
        table.add_row(each.package, each.version(), " to ".join(each.tested), verdict)
    return table


def main() -> int:
    """Prints the diagnosis. Returns the exit status."""
    console = Console()
    diagnosis = native.diagnosis()

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
    for row in _cuda_rows(diagnosis):
        settings.add_row(*row)
    settings.add_row("host module", diagnosis.host)
    console.print(settings)

    console.print(_contract_table())

    paths = _table("Ops", "op", "path")
    for op, path in ops.paths().items():
        paths.add_row(op, path)
    console.print(paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
