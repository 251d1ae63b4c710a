"""The PEP 517 build backend: scikit-build-core's setuptools plugin, and TensorFlow where there is none.

The compiled ops must be built for the TensorFlow they will run in. pip builds in an isolated environment that does not
contain it, but the interpreter is still the user's: asked in isolated mode (`python -I`), it looks past the build
environment and finds the TensorFlow installed next to it. Only where there is none is a pinned one put into the build
environment (and into the metadata, so that the same one is installed).

`FREEZEOPS_SKIP_NATIVE=1` builds without CMake, a compiler or TensorFlow.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DEFAULT_TENSORFLOW = "tensorflow==2.21.*"

_PROBE = Path(__file__).resolve().parent.parent / "cmake" / "tensorflow_probe.py"

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def skip_native() -> bool:
    """Whether the environment asks for an install without compiled code."""
    return os.environ.get("FREEZEOPS_SKIP_NATIVE", "") not in ("", "0")


def installed_tensorflow(python: str = sys.executable) -> dict[str, Any]:
    """Returns the user's TensorFlow as `cmake/tensorflow_probe.py` describes it, without importing it.

    Args:
        python: The interpreter to ask.

    Returns:
        The distribution's name, version and folders; empty where there is no TensorFlow.
    """
    answer = subprocess.run([python, "-I", str(_PROBE), "--quick"], check=True, capture_output=True, encoding="utf-8")
    return json.loads(answer.stdout)


def tensorflow_dependency() -> list[str]:
    """Returns what the package's metadata has to say about TensorFlow.

    Nothing where another distribution (tensorflow-cpu, a nightly build) provides it: pip would put a second one over
    it. A range where it is installed, and the pinned version that the ops are built for where it is not.
    """
    found = installed_tensorflow()
    if not found:
        return ["tensorflow>=2.19"] if skip_native() else [DEFAULT_TENSORFLOW]
    return ["tensorflow>=2.19"] if found["distribution"] == "tensorflow" else []


def _setuptools_backend() -> Any:
    name = "setuptools.build_meta" if skip_native() else "scikit_build_core.setuptools.build_meta"
    return importlib.import_module(name)


def _build_requirements(from_backend: list[str]) -> list[str]:
    if skip_native() or installed_tensorflow():
        return from_backend
    return [*from_backend, DEFAULT_TENSORFLOW]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _build_requirements(_setuptools_backend().get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _build_requirements(_setuptools_backend().get_requires_for_build_editable(config_settings))


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return _setuptools_backend().get_requires_for_build_sdist(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    return _setuptools_backend().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    return _setuptools_backend().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    return _setuptools_backend().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    return _setuptools_backend().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    return _setuptools_backend().build_sdist(sdist_directory, config_settings)
