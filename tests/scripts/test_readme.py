"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"## ([^\n]*)\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_examples_are_found():
    assert [title for title, _ in BLOCKS] == ["With `fit`", "With `GradientTape`"]


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_example(title, code, capsys):
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 10
    exec(code, {})
    assert "body/kernel" in capsys.readouterr().out or "GradientTape" in title
