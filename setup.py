"""What pyproject.toml cannot say: the dependency on TensorFlow, and whether there is compiled code at all."""

import re
import runpy
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import freezeops_build  # noqa: E402

# The versions that the tests pass with. What a newer Keras lacks is found out as an optimizer is made.
TESTED = runpy.run_path(str(ROOT / "freezeops" / "keras_compat" / "versions.py"))
DEPENDENCIES = [f"keras>={TESTED['KERAS'][0]},<4", "numpy", "rich"]


def version() -> str:
    text = (ROOT / "freezeops" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('freezeops/_version.py must have a line of the form __version__ = "X.Y.Z"')
    return match[1]


# Naming the CMake project switches scikit-build-core's plugin on; without it this is a pure-Python package.
native = {} if freezeops_build.skip_native() else {"cmake_source_dir": "."}

setup(
    version=version(),
    install_requires=DEPENDENCIES + freezeops_build.tensorflow_dependency(),
    **native,
)
