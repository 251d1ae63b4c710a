"""Fixtures: the kernels on the host and, where there is one, on a GPU.

Neither TensorFlow nor freezeops is imported here: with `--confcutdir=tests/gpu` (`make test-gpu`) pytest looks at no
other conftest.py, and the tests need NumPy, pytest, hypothesis, nvcc, and CuPy or PyTorch.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from under_test import on_gpu, on_host


@pytest.fixture(scope="session", params=["host", "gpu"])
def kernels(request):
    return on_host() if request.param == "host" else on_gpu()


@pytest.fixture(scope="session")
def gpu_kernels():
    return on_gpu()


@pytest.fixture(autouse=True)
def clean_keras():
    """In the place of the other tests' fixture: there is nothing of Keras here."""
