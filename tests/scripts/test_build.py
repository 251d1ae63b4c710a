"""The build: what the backend asks for, and that the portable kernels stay portable. Nothing is installed here."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "build_backend"
KERNELS = ROOT / "csrc" / "kernels" / "cpu"

pytestmark = pytest.mark.skipif(not BACKEND.is_dir(), reason="the build files are not here")


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(str(BACKEND))
    monkeypatch.delenv("FREEZEOPS_SKIP_NATIVE", raising=False)
    import freezeops_build

    return freezeops_build


@pytest.fixture
def fake_python(tmp_path):
    """Makes an interpreter whose TensorFlow is what it is told."""

    def make(answer):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
        path.chmod(0o755)
        return str(path)

    return make


CASES = {
    "none": ({}, ["tensorflow==2.21.*"], ["tensorflow==2.21.*"]),
    "tensorflow": ({"distribution": "tensorflow", "version": "2.20.0"}, [], ["tensorflow>=2.19"]),
    "tensorflow-cpu": ({"distribution": "tensorflow-cpu", "version": "2.20.0"}, [], []),
    "nightly": ({"distribution": "tf-nightly", "version": "2.22.0.dev1"}, [], []),
}


@pytest.mark.parametrize("case", CASES)
def test_tensorflow_is_required_only_where_there_is_none(backend, fake_python, monkeypatch, case):
    answer, build_requirement, dependency = CASES[case]
    python = fake_python(answer)
    found = backend.installed_tensorflow(python)
    assert found == answer
    monkeypatch.setattr(backend, "installed_tensorflow", lambda: found)
    assert backend._build_requirements(["ninja"]) == ["ninja", *build_requirement]
    assert backend.tensorflow_dependency() == dependency


def test_skipping_the_native_part_requires_nothing_to_build(backend, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_SKIP_NATIVE", "1")
    monkeypatch.setattr(backend, "installed_tensorflow", dict)
    assert backend._build_requirements([]) == []
    assert backend.tensorflow_dependency() == ["tensorflow>=2.19"]
    assert backend._setuptools_backend().__name__ == "setuptools.build_meta"


def test_the_probe_finds_this_tensorflow_without_importing_it(backend):
    import tensorflow as tf

    found = backend.installed_tensorflow()
    assert found["version"].split(".")[:2] == tf.__version__.split(".")[:2]
    assert Path(found["include"], "tensorflow").is_dir()
    assert sorted(found["compile_flags"]) == sorted(
        flag for flag in tf.sysconfig.get_compile_flags() if flag.startswith("-D")
    )


def compile_generic(compiler, tmp_path, *flags):
    for source in ("mask_generic.cc", "fused_generic.cc", "dispatch.cc"):
        subprocess.run(
            [
                *(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *flags),
                *("-I", str(ROOT / "csrc"), "-c", str(KERNELS / source), "-o", str(tmp_path / "kernel.o")),
            ],
            check=True,
        )


def test_portable_kernels_compile_without_x86(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    # __x86_64__ itself stays: the C library's headers need it.
    compile_generic(compiler, tmp_path, *(f"-U__{name}__" for name in ("BMI", "BMI2", "AVX2", "AVX512F", "SSE4_2")))
    headers = subprocess.run(
        [compiler, "-std=c++17", "-M", "-I", str(ROOT / "csrc"), str(KERNELS / "fused_generic.cc")],
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout
    assert "intrin.h" not in headers


def test_portable_kernels_compile_for_aarch64(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed")
    compile_generic(compiler, tmp_path)


def test_version_has_one_source():
    text = (ROOT / "freezeops" / "_version.py").read_text(encoding="utf-8")
    assert text.count("__version__ = ") == 1
    for name in ("pyproject.toml", "CMakeLists.txt", "setup.py"):
        assert "0.1.0" not in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.skipif(not shutil.which("readelf") or not shutil.which("nm"), reason="needs binutils")
@pytest.mark.parametrize("name", ["libfreezeops_tf*.so", "_host*.so"])
def test_what_was_built_is_hardened(name):
    """Full RELRO, no executable stack, no path that the loader searches, a stack protector."""
    built = sorted((ROOT / "freezeops").glob(name))
    if not built:
        pytest.skip("not built")
    path = built[-1]

    def read(*command):
        return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout

    dynamic, headers = read("readelf", "-dW"), read("readelf", "-lW")
    assert "BIND_NOW" in dynamic and "NOW" in dynamic.split("FLAGS_1", 1)[1].splitlines()[0]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "GNU_RELRO" in headers
    (stack,) = (line for line in headers.splitlines() if "GNU_STACK" in line)
    assert "RW " in stack and "E" not in stack.split("GNU_STACK")[1]
    symbols = read("nm", "-D")
    assert "__stack_chk_fail" in symbols
    assert name.startswith("_host") or "__memcpy_chk" in symbols  # _FORTIFY_SOURCE
