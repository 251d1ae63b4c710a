"""What the kernels are made of: nothing of TensorFlow, XLA or Abseil."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = sorted(path for path in (CSRC / "kernels").rglob("*") if path.is_file())
FOREIGN = re.compile(r'^\s*#\s*include\s*[<"]((?:tensorflow|tsl|xla|absl|Eigen|unsupported|google|ops)/.*)[>"]', re.M)


def test_there_are_kernels():
    assert {path.parent.name for path in KERNELS} == {"common", "cpu", "cuda"}


@pytest.mark.parametrize("path", [*KERNELS, CSRC / "mask_layout.h"], ids=lambda path: str(path.relative_to(CSRC)))
def test_kernels_include_nothing_of_tensorflow(path):
    assert not FOREIGN.findall(path.read_text(encoding="utf-8"))
