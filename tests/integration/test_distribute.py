"""Several replicas: `MirroredStrategy` over two logical CPU devices, in a process of its own."""

import os
from pathlib import Path

import pytest
from processes import run_script

SCRIPT = Path(__file__).with_name("distribute_script.py")
CASES = [
    "loop",
    "fit",
    "sparse",
    "change_masks",
    "ema",
    "loss_scale",
    "one_device",
    "two_threads",
    "unfreeze",
    "outside_of_scope",
    "compact",
    "compact_traffic",
    "compact_outside_of_scope",
    "compact_sparse",
    "frozen_entries",
    "traced_writes",
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_mirrored(case, backend, tmp_path):
    environment = os.environ | {"FREEZEOPS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    assert f"{case} passed" in run_script(SCRIPT, [case], environment, tmp_path / "log", seconds=900)
