"""A few hundred calls of the fuzzer, on the library as it is; `make fuzz` makes more, under sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from freezeops.ops import native

FUZZER = Path(__file__).parents[1] / "fuzz" / "fuzz_ops.py"
CALLS = 330

pytestmark = pytest.mark.skipif(native.op_library() is None, reason="no native library for this TensorFlow")


def test_each_call_is_refused_or_gives_what_its_twin_gives(tmp_path):
    """In a process of its own, that a fault may end."""
    environment = {name: value for name, value in os.environ.items() if name != "FREEZEOPS_BACKEND"}
    done = subprocess.run(
        [sys.executable, FUZZER, "--calls", str(CALLS), "--seed", "1", "--log", tmp_path / "log"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert f"{CALLS} calls in" in done.stdout
