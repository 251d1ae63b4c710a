"""Parts of gradients in several replicas: `MirroredStrategy` over two logical CPU devices, in a process of its own.

Several workers are in `integration/test_workers.py`.
"""

import os
from pathlib import Path

import pytest
from processes import run_script

SCRIPT = Path(__file__).parents[1] / "integration" / "distribute_script.py"


@pytest.mark.parametrize("case", ["skips", "skips_fit", "skips_traffic"])
def test_mirrored(case, tmp_path):
    environment = os.environ | {"FREEZEOPS_BACKEND": "auto", "TF_CPP_MIN_LOG_LEVEL": "3"}
    assert f"{case} passed" in run_script(SCRIPT, [case], environment, tmp_path / "log", seconds=300)
