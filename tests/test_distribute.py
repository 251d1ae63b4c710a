"""Several replicas: `MirroredStrategy` over two logical CPU devices, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("distribute_script.py")
CASES = [
    "loop",
    "fit",
    "sparse",
    "change_masks",
    "ema",
    "loss_scale",
    "one_device",
    "unfreeze",
    "outside_of_scope",
    "compact",
    "compact_traffic",
    "compact_outside_of_scope",
    "compact_sparse",
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_mirrored(case, backend):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"FREEZEOPS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{case} passed" in done.stdout
