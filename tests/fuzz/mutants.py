"""Shows that the fuzzer finds faults: eleven are planted one after the other into a copy of the sources.

    python tests/fuzz/mutants.py build/fuzz

`build/fuzz` holds the library as `make fuzz` built it. For each fault the files that have it are compiled again, with
the same commands, and linked with the others; nothing here writes to the sources or to that folder.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALLS = 20_000

# What is planted: a file, what stands there, what takes its place, and the files to compile.
FAULTS = {
    "seeding writes rows that do not exist": (
        "ops/seed_slots/cpu.cc",
        "row >= 0 && row < rows.count",
        "row >= 0",
        ["ops/seed_slots/cpu.cc"],
    ),
    "ranks of bits behind the mask": (
        "ops/trainable_entries/cpu.cc",
        "bit[i] >= 0 && bit[i] < kept_",
        "bit[i] >= 0",
        ["ops/trainable_entries/cpu.cc"],
    ),
    "slices of rows that do not exist": (
        "ops/mask_gradient/cpu.cc",
        "index_of[i] >= 0 && index_of[i] < rows_",
        "index_of[i] >= 0",
        ["ops/mask_gradient/cpu.cc"],
    ),
    "snapshots of any length": (
        "ops/frozen_entries/cpu.cc",
        "snapshot_shape.dims() == 1 && (length == frozen.total() || length == count)",
        "snapshot_shape.dims() == 1",
        ["ops/frozen_entries/cpu.cc"],
    ),
    "updates with rows that do not exist": (
        "ops/fused_update/cpu.cc",
        "row[k] < 0 || row[k] >= rows.count",
        "row[k] < 0",
        ["ops/fused_update/cpu.cc"],
    ),
    "updates with slots of another size": (
        "ops/fused_update/inputs.h",
        "value.dtype() == dtype && value.NumElements() == size",
        "value.dtype() == dtype && (value.NumElements() == size || name[0] == 's')",
        ["ops/fused_update/cpu.cc"],
    ),
    "gradients of another shape": (
        "ops/fused_update/inputs.h",
        "a.CheckGradient(ctx",
        "sparse_[i] < 0 ? absl::OkStatus() : a.CheckGradient(ctx",
        ["ops/fused_update/cpu.cc"],
    ),
    "gradients of another shape under XLA": (
        "ops/fused_update/xla.cc",
        "TF_RETURN_IF_ERROR(a.CheckGradient(",
        "if (sparse >= 0) TF_RETURN_IF_ERROR(a.CheckGradient(",
        ["ops/fused_update/xla.cc"],
    ),
    "scales that are too short under XLA": (
        "ops/seed_slots/xla.cc",
        "TF_RETURN_IF_ERROR(attributes_.CheckInputs(ctx));",
        "",
        ["ops/seed_slots/xla.cc"],
    ),
    "plans that name rows that do not exist": (
        "kernels/cpu/sampled_matmul.h",
        "row < 0 || row >= rows ||",
        "row < 0 ||",
        ["ops/sampled_matmul/cpu.cc"],
    ),
    "indices that are not the mask's": (
        "kernels/cpu/parallel_compact.h",
        "if (entry >= kept || (kScatter",
        "if ((kScatter",
        ["ops/trainable_entries/cpu.cc"],
    ),
}


def planted(source: Path, fault: str) -> None:
    """Puts the fault into the sources."""
    name, old, new, _ = FAULTS[fault]
    path = source / name
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{name} must have {old!r} once, for the fault {fault!r}. It is there {text.count(old)} times")
    path.write_text(text.replace(old, new), encoding="utf-8")


def commands(build: Path) -> tuple[dict[str, list[str]], list[str]]:
    """How each source is compiled, by its path below csrc, and how the library is linked."""
    answer = subprocess.run(["ninja", "-C", build, "-t", "compdb"], check=True, capture_output=True, text=True).stdout
    compiled, linked = {}, []
    for entry in json.loads(answer):
        words = shlex.split(entry["command"])
        if f"{ROOT}/csrc/" in entry["file"] and "-c" in words:
            compiled[entry["file"].split("/csrc/", 1)[1]] = words
        elif "libfreezeops_tf" in entry["output"] and "-shared" in words:
            linked = [word for word in words if word not in (":", "&&")]
    return compiled, linked


def library_with(fault: str, build: Path, folder: Path) -> Path:
    """Compiles and links it, in a folder of its own."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    planted(source, fault)
    compiled, linked = commands(build)
    library = folder / "library.so"
    replaced = {}
    for name in FAULTS[fault][3]:
        words = [word.replace(f"{ROOT}/csrc", str(source)) for word in compiled[name]]
        at = words.index("-o")
        replaced[words[at + 1]] = words[at + 1] = str(folder / (Path(name).name + ".o"))
        original = compiled[name][compiled[name].index("-o") + 1]
        replaced[original] = words[at + 1]
        for option in ("-MF", "-MT"):
            if option in words:
                words[words.index(option) + 1] = str(folder / "dependencies")
        subprocess.run(words, check=True, cwd=build)
    words = [replaced.get(word, word) for word in linked]
    words[words.index("-o") + 1] = str(library)
    subprocess.run(words, check=True, cwd=build)
    return library


def fuzzed(library: Path, calls: int, log: Path) -> list[str]:
    """What the fuzzer finds in a library."""
    fuzzer = [sys.executable, ROOT / "tests/fuzz/fuzz_ops.py", "--library", library, "--calls", str(calls)]
    done = subprocess.run([*fuzzer, "--log", log], capture_output=True, text=True, env=dict(os.environ), check=False)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("FOUND", "SUMMARY"))]


def main() -> int:
    build = Path(sys.argv[1]).resolve()
    wanted = [fault for fault in FAULTS if not sys.argv[2:] or any(word in fault for word in sys.argv[2:])]
    missed = 0
    library = next(build.glob("libfreezeops_tf*.so"))
    if problems := fuzzed(library, 300, build / "fuzz.log"):
        print("The library without a fault must pass, or nothing is shown. Received:", *problems, sep="\n    ")
        return 1
    for fault in wanted:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            library = library_with(fault, build, Path(name))
            found = fuzzed(library, CALLS, Path(name) / "log")
        missed += not found
        print(f"{'found ' if found else 'MISSED'} {fault} ({time.monotonic() - begin:.0f} s)", *found, sep="\n    ")
        sys.stdout.flush()
    print(f"{len(wanted) - missed} of {len(wanted)} planted faults found")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
