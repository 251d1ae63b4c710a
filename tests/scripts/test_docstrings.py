"""The examples in docstrings run as they stand, and print what they say."""

import doctest

import code_blocks
import numpy as np
import pytest
from code_blocks import built_model, compiled_model, own_adam

DOCSTRINGS = {name: (text, line) for name, text, line in code_blocks.docstrings()}
PROMPTS = [name for name, (text, _) in DOCSTRINGS.items() if ">>> " in text]
FENCES = [(name, block) for name, (text, _) in DOCSTRINGS.items() for block in code_blocks.blocks_of(text)]

SET_UPS = {
    "freezeops/optimizer.py:MaskedOptimizer": lambda: compiled_model() | {"new_token_ids": np.arange(50_000, 60_000)},
    "freezeops/legacy.py:MaskedOptimizer": code_blocks.model_of_tf_keras,
    "declare_elementwise": dict,
    "declare_slots": own_adam,
    "load_masks": code_blocks.task_of_keras_hub,
    "frozen_entries": built_model,
}
"""By the end of a docstring's name: the names that its example takes for granted."""


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name):
    text, line = DOCSTRINGS[name]
    test = doctest.DocTestParser().get_doctest(text, code_blocks.usual_names(), name, name.split(":")[0], line)
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert test.examples and not any("Failed example" in line for line in report), "".join(report)


@pytest.mark.parametrize(("name", "block"), FENCES, ids=[name for name, _ in FENCES])
def test_fences(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (set_up,) = [set_up for end, set_up in SET_UPS.items() if name.endswith(end)]
    code_blocks.run(block.code, set_up)


def test_public_examples_are_found():
    assert "freezeops/transforms.py:mask_gradient" in PROMPTS
    assert "freezeops/optimizer.py:MaskedOptimizer" in dict(FENCES)
