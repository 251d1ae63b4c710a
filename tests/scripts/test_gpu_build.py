"""The CUDA kernels inside the library: compiled, registered, for the stated architectures, without a CUDA library.

No GPU is needed; where the library was built without nvcc the tests are skipped. `tests/gpu` has the tests of what the
kernels do.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tensorflow.core.framework import types_pb2
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.kernels import get_registered_kernels_for_op

from freezeops import ops
from freezeops.ops import native

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "cmake" / "FindFreezeopsCuda.cmake"

DTYPES = {"DT_HALF", "DT_BFLOAT16", "DT_FLOAT", "DT_DOUBLE"}


@pytest.fixture(scope="module")
def kernels():
    kernels = native.cuda_kernels()
    if kernels is None:
        pytest.skip("the library in use has no CUDA kernels: it was built without nvcc")
    return kernels


@pytest.fixture(scope="module")
def library(kernels):
    return native._outcome().used.path


def camel(name):
    return "".join(part.capitalize() for part in name.split("_"))


def handles(op):
    arguments = op_def_registry.get(f"Freezeops>{camel(op)}").input_arg
    return {each.name for each in arguments if each.type == types_pb2.DT_RESOURCE}


@pytest.mark.parametrize("op", ops._OPS)
def test_kernels_are_registered_for_every_dtype(kernels, op):
    registered = [k for k in get_registered_kernels_for_op(f"Freezeops>{camel(op)}").kernel if k.device_type == "GPU"]
    if op in ops.CPU_ONLY:
        assert not registered
        return
    if op == "rank_trainable":  # moves no floats
        assert len(registered) == 1 and not registered[0].constraint
        return
    found = []
    for kernel in registered:
        (constraint,) = kernel.constraint
        assert constraint.name == "T"  # any kind of index
        found += [types_pb2.DataType.Name(value) for value in constraint.allowed_values.list.type]
        # Handles alone are on the host: whatever has values stays on the device.
        assert set(kernel.host_memory_arg) <= handles(op)
    assert sorted(found) == sorted(DTYPES)


def test_no_cuda_library_is_needed(library):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run([readelf, "-d", library], check=True, capture_output=True, text=True).stdout
    names = re.findall(r"\(NEEDED\).*\[(.*)\]", needed)
    assert names and not [name for name in names if "cuda" in name.lower() or "nv" in name.lower()]
    symbols = subprocess.run([readelf, "--dyn-syms", "-W", library], check=True, capture_output=True, text=True).stdout
    assert "freezeops_cuda_runtime_version" in symbols
    assert not re.search(r"\bcuda[A-Z]\w+", symbols), "CUDA's runtime is not inside, or can be seen"


def fat_binary_architectures(library):
    """What the headers of the device code in a library say: (kind, capability), kind 1 is PTX and 2 machine code.

    As in `fatbinary_section.h` of the toolkit and the format that its cuobjdump reads: a region is 16 bytes (magic
    number, version, size of its header, bytes that follow) and entries, each a kind, a version, the size of its header,
    the bytes of its content, and at byte 28 the capability.
    """
    content = library.read_bytes()
    found = set()
    start = content.find(MAGIC)
    while start >= 0:
        size = int.from_bytes(content[start + 8 : start + 16], "little")
        at = start + 16
        while at < start + 16 + size:
            kind = int.from_bytes(content[at : at + 2], "little")
            header = int.from_bytes(content[at + 4 : at + 8], "little")
            length = int.from_bytes(content[at + 8 : at + 16], "little")
            found.add((kind, int.from_bytes(content[at + 28 : at + 32], "little")))
            at += header + length
        start = content.find(MAGIC, max(at, start + 16))
    return found


MAGIC = bytes.fromhex("50ed55ba")


def test_device_code_is_for_the_stated_architectures(kernels, library):
    found = fat_binary_architectures(library)
    assert {capability for kind, capability in found if kind == 2} == set(kernels.architectures)
    assert {capability for kind, capability in found if kind == 1} == set(kernels.ptx)


def test_library_is_of_a_reasonable_size(library):
    assert library.stat().st_size < 8 * 2**20


# What CMake does with FREEZEOPS_CUDA, without TensorFlow and without compiling anything.


@pytest.fixture
def configure(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    if not CUDA.exists():
        pytest.skip("the build files are not here")

    def run(nvcc=None, compiles="true", **environment):
        """Runs the module alone, where `nvcc` prints what it is told."""
        if nvcc:
            tells = f"echo 'Cuda compilation tools, release {nvcc}'"
            (tmp_path / "nvcc").write_text(f'#!/bin/sh\n[ "$1" = --version ] || exec {compiles}\n{tells}\n')
            (tmp_path / "nvcc").chmod(0o755)
        script = tmp_path / "script.cmake"
        # enable_language is for projects only; what is tested comes before it.
        text = CUDA.read_text().replace("enable_language(CUDA)", "").replace("/usr/local/cuda", str(tmp_path / "none"))
        script.write_text(
            text
            + '\nmessage(STATUS "${FreezeopsCuda_FOUND} ${CMAKE_CUDA_ARCHITECTURES} ${CMAKE_CUDA_RUNTIME_LIBRARY}")\n'
        )
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "FREEZEOPS_CUDA"))}
        clean |= {"PATH": str(tools) + ":/bin", "CUDACXX": str(tmp_path / "nvcc") if nvcc else ""}
        return subprocess.run(
            [cmake, "-DCMAKE_SYSTEM_PREFIX_PATH=", "-P", str(script)],
            env=clean | environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_auto_without_a_compiler_says_so(configure):
    done = configure()
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: no (no nvcc in CUDACXX" in done.stdout


def test_on_without_a_compiler_is_an_error(configure):
    done = configure(FREEZEOPS_CUDA="ON")
    assert done.returncode != 0
    assert "FREEZEOPS_CUDA=ON needs CUDA's compiler" in done.stderr and "CUDA_HOME" in done.stderr


@pytest.mark.parametrize("setting", ["AUTO", "ON"])
def test_old_compiler_counts_as_none(configure, setting):
    done = configure("11.8, V11.8.89", FREEZEOPS_CUDA=setting)
    assert (done.returncode != 0) == (setting == "ON")
    assert "is of CUDA 11.8, older than 12.0" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("setting", ["AUTO", "ON"])
def test_compiler_that_does_not_work_counts_as_none(configure, setting):
    done = configure("13.0, V13.0.88", "false", FREEZEOPS_CUDA=setting)
    assert (done.returncode != 0) == (setting == "ON")
    assert "does not compile a small program" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("release, blackwell", [("12.0, V12.0.76", False), ("12.8, V12.8.61", True)])
def test_architectures_follow_the_compiler(configure, release, blackwell):
    done = configure(release)
    assert "CUDA kernels: yes" in done.stdout
    assert ("100-real;120-real" in done.stdout) == blackwell
    assert "75-real;80-real;86-real;89-real;90-real" in done.stdout and "90-virtual Static" in done.stdout


def test_architectures_can_be_chosen(configure):
    done = configure("13.0, V13.0.88", FREEZEOPS_CUDA_ARCHITECTURES="100,80")
    assert "TRUE 80-real;100-real;100-virtual" in done.stdout


def test_off(configure):
    done = configure("13.0, V13.0.88", FREEZEOPS_CUDA="OFF")
    assert "CUDA kernels: no (FREEZEOPS_CUDA=OFF)" in done.stdout


def test_anything_else_is_refused(configure):
    done = configure(FREEZEOPS_CUDA="maybe")
    assert done.returncode != 0
    assert "must be ON, OFF or AUTO. Received: FREEZEOPS_CUDA=maybe" in " ".join(done.stderr.split())
