"""Fixtures that every test can use."""

import gc
import itertools
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
import tensorflow as tf

from freezeops.ops import native


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    """Runs a test on the compiled ops and on their pure-TensorFlow twins."""
    if request.param == "reference":
        monkeypatch.setenv("FREEZEOPS_BACKEND", "reference")
    else:
        monkeypatch.delenv("FREEZEOPS_BACKEND", raising=False)
        if native.op_library() is None:
            pytest.skip("no native library for this TensorFlow: nothing to compare with")
    return request.param


_tests = itertools.count()


def check_mappings():
    """Fails in words where the next function that XLA compiles could end the process: its code stays mapped."""
    maps, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if maps.exists() and limit.exists():
        count, most = maps.read_bytes().count(b"\n"), int(limit.read_text())
        assert count < 0.95 * most, f"{count} of {most} memory mappings are in use: make more runs (Makefile)"


@pytest.fixture(autouse=True)
def clean_keras():
    """Names counted from zero and the same random numbers in every test."""
    if next(_tests) % 50 == 0:
        gc.unfreeze()
        check_mappings()
    keras.utils.clear_session()
    # It has collected the garbage. What is left is mostly TensorFlow's and stays, ever more of it: without this, the
    # next collection would look through it all again, which came to more time than the tests.
    gc.freeze()
    keras.utils.set_random_seed(1)
    yield
    tf.config.run_functions_eagerly(False)


FIRST = ("test_workers", "test_distribute", "test_kill", "test_benchmarks", "test_examples")
"""Files of long tests: they begin first, so that no process is left with one when the others are done."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
