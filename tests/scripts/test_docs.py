"""Every block of code in README.md and docs/ runs as it stands, with the names that it takes for granted."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import code_blocks
import keras
import numpy as np
import pytest
import test_readme
from code_blocks import ROOT, built_model, compiled_model, own_adam

FILES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = {file: code_blocks.blocks_of((ROOT / file).read_text(encoding="utf-8")) for file in FILES}
NOT_CODE = ("text", "mermaid")


class Example(NamedTuple):
    """What a block needs, what holds after it, and a warning that it speaks of."""

    set_up: Callable[[], dict]
    then: str = ""
    warns: str = ""


def verbs():
    return built_model() | {"target": "head/kernel", "where": 0, "mask": np.eye(32, 4, dtype=bool)}


def encoder_and_head():
    return compiled_model(body="encoder") | {"mask": np.eye(32, 4, dtype=bool)}


def with_saved_weights():
    names = built_model()
    names["optimizer"].freeze("body/kernel", 0)
    names["model"].save_weights("model.weights.h5")
    return names


def masks_of_body():
    masks = {"body/kernel": np.arange(6)[:, None] < 2}
    return compiled_model(masks=masks, state="compact") | {"mask": masks["body/kernel"], "masks": masks}


def inner_and_masks():
    names = masks_of_body()
    return names | {"inner": names["optimizer"].inner_optimizer}


def trained_compact_model():
    names = masks_of_body()
    names["model"].fit(names["x"], names["y"], verbose=0)
    return names | {"larger_mask": np.arange(6)[:, None] < 4}


EXAMPLES = {
    "docs/masks.md": {
        "optimizer.freeze(target, where)": Example(
            verbs, "assert optimizer.mask_for(model.get_layer('head').kernel).count() == 4"
        ),
        'optimizer.register_masks({"head/kernel": mask': Example(
            encoder_and_head,
            "assert optimizer.mask_for(model.get_layer('head').kernel).count() == 4",
        ),
        'optimizer.freeze("(dense|bn)/.*")': Example(partial(compiled_model, body="dense"), warns="bn/moving_mean"),
        "fz.MaskedOptimizer(inner, maskable=": Example(inner_and_masks),
        'model.save("model.keras")': Example(with_saved_weights, "assert optimizer.density < 1"),
        "task = keras_hub": Example(
            code_blocks.task_of_keras_hub,
            "assert task.optimizer.mask_for(task.get_layer('body').kernel).count() == 5 * 32",
        ),
        'model.save("model.h5")': Example(
            with_saved_weights,
            "assert model.optimizer.mask_for(model.get_layer('body').kernel).count() == 5 * 32",
        ),
    },
    "docs/compact.md": {
        "optimizer = fz.MaskedOptimizer(": Example(
            masks_of_body, "optimizer.build(model.trainable_variables); assert optimizer.state == 'compact'"
        ),
        "@fz.declare_elementwise": Example(dict, "fz.MaskedOptimizer(SignSGD(0.1), state='compact')"),
        "fz.MaskedOptimizer(inner, masks=masks, state=": Example(inner_and_masks),
        "optimizer.repack(masks=": Example(trained_compact_model, "model.fit(x, y, verbose=0)"),
    },
    "docs/gradients.md": {
        "optimizer = fz.MaskedOptimizer(": Example(
            masks_of_body,
            "assert optimizer.describe()[1].gradient == 'trainable part only'",
        ),
    },
    "docs/legacy.md": {
        "import numpy as np, tf_keras": Example(
            code_blocks.model_of_tf_keras, "model.fit(x, y, verbose=0); assert optimizer.density < 1"
        ),
    },
    "docs/optimizers.md": {
        "optimizer = fz.MaskedOptimizer(": Example(dict, "assert optimizer.inner_optimizer.clipnorm == 1.0"),
    },
    "docs/training.md": {
        "fz.declare_slots(": Example(own_adam, "fz.MaskedOptimizer(MyAdam())"),
        "def sam_step(": Example(
            lambda: built_model() | {"loss_fn": keras.losses.SparseCategoricalCrossentropy()},
            "assert sam_step(x, y) > 0",
        ),
    },
}
"""By file and by the beginning of a block: the blocks of Python."""

NOT_RUN = {
    "docs/architecture.md": {
        "step = Step(": "the package's insides, in the middle of a step: tests/step runs them",
    },
    "README.md": {
        "make demo": "set-up and the demo: tests/scripts/test_examples.py",
        "pip install .": "an installation: `make` does it, and CI with it",
    },
    "docs/gpu.md": {
        "pip install .": "an installation: tests/scripts/test_gpu_build.py looks at what is built",
        "make test-gpu": "needs a GPU and its compiler",
    },
}
"""By file and by the beginning of a block: why it does not run here."""


def named(table, file, block):
    """The entries of the table that a block begins with."""
    return [value for start, value in table.get(file, {}).items() if block.code.strip().startswith(start)]


PYTHON = [(file, block) for file in EXAMPLES for block in BLOCKS[file] if named(EXAMPLES, file, block)]


@pytest.mark.parametrize(("file", "block"), PYTHON, ids=[f"{file}:{block.first_line[:40]}" for file, block in PYTHON])
def test_example(file, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = named(EXAMPLES, file, block)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code_blocks.run(block.code, example.set_up, example.then)
    told = "\n".join(str(warning.message) for warning in caught)
    assert example.warns in told


def test_every_block_is_run_or_named():
    for file, blocks in BLOCKS.items():
        for block in blocks:
            if block.language == "python" and file == "README.md":
                assert block.code in [code for _, code in test_readme.BLOCKS]
            elif block.language not in NOT_CODE:
                found = [*named(EXAMPLES, file, block), *named(NOT_RUN, file, block)]
                assert len(found) == 1, f"{file}: {block.first_line!r} must be named once. Received: {found}"


@pytest.mark.parametrize("table", [EXAMPLES, NOT_RUN])
def test_every_name_has_its_block(table):
    for file, entries in table.items():
        for start in entries:
            assert any(block.code.strip().startswith(start) for block in BLOCKS[file]), f"{file}: {start}"


def anchors(text):
    """What GitHub calls the headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (ROOT / file).parent / path if path else ROOT / file
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"
