"""The examples and the demo do what they say.

They are imported and run in this process, so that TensorFlow starts once, but for two
that are run as a user does: the demo's command line, on the reference path, and the
loop with `GradientTape`.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# By way of freezing: whether frozen entries change.
WAYS = {
    "freeze_layers": {
        "freezeops": False,
        "plain Keras": False,
        "freezeops, conv_2 let go": False,
    },
    "freeze_kernel_not_bias": {"freezeops": False, "plain Keras": False},
    "freeze_by_name": {"freezeops": False, "plain Keras": False},
    "freeze_entries": {
        "freezeops, AdamW": False,
        "freezeops, AdamW, averaged": False,
        "gradient * mask, SGD": False,
        "gradient * mask, AdamW": True,
        "constraint, AdamW": False,
        "constraint, AdamW, averaged": True,
    },
}


@pytest.fixture
def load_example(monkeypatch):
    """Imports a module of the examples' folder by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user does, with the packages that this process sees."""
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["PYTHONIOENCODING"] = "utf-8"
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.mark.parametrize("name", WAYS)
def test_example(name, load_example, capsys):
    results = load_example(name).main()
    printed = capsys.readouterr().out
    assert {way: result["changed"] > 0 for way, result in results.items()} == WAYS[name]
    for way, result in results.items():
        assert result["frozen"] > 0, way
        assert result["trained"] > 10_000, way
        assert result["accuracy"] > 0.8, way
        assert f"{result['changed']} of {result['frozen']}" in printed, way


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*WAYS, "demo_digits", "_digits"}


def test_a_gradient_tape_loop_is_traced_without_complaint():
    # In a process of its own: AutoGraph says only once what it cannot convert.
    done = run_script("freeze_by_name.py")
    assert done.returncode == 0, done.stderr
    assert "AutoGraph" not in done.stderr


def test_layers_that_were_let_go_train_on(load_example):
    frozen, unfrozen = load_example("freeze_layers").with_freezeops()
    assert unfrozen.frozen < frozen.frozen
    assert unfrozen.trained > frozen.trained


def test_demo_in_short(load_example, tmp_path, capsys):
    output = tmp_path / "new folder" / "demo.png"
    demo = load_example("demo_digits")
    results = demo.run_demo(output, seed=3, epochs=2)
    ours, theirs = results["freezeops"], results["gradient * mask"]

    assert ours["frozen"] == theirs["frozen"] > 15_000
    assert ours["changed"] == ours["pruned_changed"] == ours["largest_move"] == 0
    assert ours["old_accuracy_after"] == ours["old_accuracy_before"] > 0.8
    assert ours["old_certainty_after"] == pytest.approx(ours["old_certainty_before"], abs=1e-6)
    assert ours["new_accuracy"] > 0.8
    assert theirs["changed"] > 15_000
    assert theirs["largest_move"] > 0
    assert demo.kept_promise(ours)

    assert output.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"0 of {ours['frozen']}" in printed
    assert f"{theirs['changed']} of {theirs['frozen']}" in printed


def test_demo_from_the_command_line_on_the_reference_path(tmp_path):
    output = tmp_path / "demo.png"
    done = run_script("demo_digits.py", "--epochs", "1", "--output", str(output), FREEZEOPS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "reference (FREEZEOPS_BACKEND=reference)" in done.stdout
    assert "native" not in done.stdout
    assert "0 of 15386" in done.stdout
    assert output.exists()


@pytest.mark.parametrize(
    "broken",
    [{"changed": 1}, {"pruned_changed": 1}, {"old_accuracy_after": 0.99}],
    ids=lambda broken: next(iter(broken)),
)
def test_demo_fails_when_the_promise_is_broken(broken, load_example, monkeypatch, capsys):
    demo = load_example("demo_digits")
    kept = {
        "changed": 0,
        "pruned_changed": 0,
        "old_accuracy_before": 1.0,
        "old_accuracy_after": 1.0,
    }
    monkeypatch.setattr(demo, "run_demo", lambda *_: {"freezeops": kept})
    assert demo.main([]) == 0
    monkeypatch.setattr(demo, "run_demo", lambda *_: {"freezeops": kept | broken})
    assert demo.main([]) == 1
    assert "promise is broken" in capsys.readouterr().err


def test_demo_refuses_no_epochs(load_example, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_example("demo_digits").main(["--epochs", "0"])
    assert stopped.value.code == 2
    assert "--epochs must be at least 1. Received: 0" in capsys.readouterr().err


def test_the_strongest_entries_are_kept(load_example):
    values = np.array([[0.1, -5.0, 0.0, 2.0, -0.2], [3.0, -1.0, 0.3, 0.4, -0.5]])
    kept = load_example("demo_digits").strongest(values)
    assert sorted(values[kept]) == [-5.0, -1.0, 2.0, 3.0]


def test_changes_are_counted_by_bits(load_example):
    count_changed = load_example("_digits").count_changed
    before = np.array([0.0, np.nan, 1.0, 2.0], np.float32)
    after = np.array([-0.0, np.nan, 1.0, 3.0], np.float32)
    assert count_changed(before, after) == 2
    assert count_changed(before, after, np.array([True, True, True, False])) == 1
