"""`describe()` and `summary()`: what they say of each variable, and that people can read it."""

import contextlib
import dataclasses
import io
import re

import keras
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

import freezeops as fz
from freezeops.registry.report import MOST_NOTES, VariableReport, shortened


def variables_of(*paths, shape=(64, 32)):
    variables = []
    for path in paths:
        variable = keras.Variable(np.zeros(shape, "float32"), name="v")
        variable._path = path
        variables.append(variable)
    return variables


def lines_of(optimizer, width=80, **options):
    text = io.StringIO()
    optimizer.summary(Console(file=text, width=width), **options)
    return text.getvalue().splitlines()


def test_describe_before_the_build():
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
    with pytest.raises(ValueError, match=r"must be built before `describe` is known: call `build\(variables\)`"):
        optimizer.describe()


def test_describe_says_all_of_each_mode():
    variables = variables_of("rows", "entries", "all", "gone", "open", "counter")
    variables[2].constraint = keras.constraints.NonNeg()
    variables[5] = keras.Variable(np.zeros(3, "int32"), name="counter")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), state="compact", maskable={"open": "none"})
    optimizer.freeze("rows", np.s_[:16])
    optimizer.freeze("entries", np.eye(64, 32, dtype=bool))
    optimizer.freeze("gone", permanent=True)
    optimizer.build(variables)
    reports = {report.path: report for report in optimizer.describe()}
    assert list(reports) == ["rows", "entries", "all", "gone", "open", "counter"]
    rows = reports["rows"]
    assert (rows.mode, rows.shape, tuple(rows.layout), rows.trainable) == ("compact", (64, 32), (1, 64, 32), 48 * 32)
    assert (rows.density, rows.capacity, rows.fused, rows.fused_reason) == (0.75, 48 * 32, True, "")
    assert rows.bytes == 48 * 32 * 4 + 8 + 16 + 48 * 4  # values, bits, offsets, indices
    assert (rows.gradient, rows.gradient_reason, rows.mode_reason) == ("whole", "skip_frozen_gradients=False", "")
    assert (reports["entries"].trainable, tuple(reports["entries"].layout)) == (64 * 32 - 32, (1, 64 * 32, 1))
    kept = reports["all"]
    assert (kept.mode, kept.bytes, kept.capacity, kept.fused) == ("full", 256, 64 * 32, False)
    assert "NonNeg" in kept.mode_reason and "constraint" in kept.fused_reason
    gone = reports["gone"]
    assert (gone.mode, gone.layout, gone.density, gone.bytes, gone.capacity) == ("permanent", None, 0.0, 0, 0)
    assert (gone.fused, gone.fused_reason) == (False, "never updated")
    assert (reports["open"].mode, reports["open"].mode_reason) == ("unmasked", "maskable='none'")
    assert (reports["counter"].mode, reports["counter"].mode_reason) == ("unmasked", "dtype int32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.mode = "full"
    assert all(isinstance(report, VariableReport) for report in reports.values())


def test_describe_follows_masks_options_and_repack():
    (variable,) = variables_of("v")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), state="compact", capacity=1.0)
    optimizer.freeze("v", np.s_[:32])
    optimizer.build([variable])
    before = optimizer.describe()[0]
    assert (before.density, before.capacity) == (0.5, 64 * 32)
    optimizer.unfreeze("v", np.s_[:16])
    assert optimizer.describe()[0].density == 0.75
    optimizer.fused = False
    assert (optimizer.describe()[0].fused, optimizer.describe()[0].fused_reason) == (False, "fused=False")
    optimizer.repack(capacity=0.75)
    assert optimizer.describe()[0].capacity == 48 * 32
    optimizer.fused = True
    optimizer.inner_optimizer.beta_1 = 0.5  # a number of the formula, not another formula
    assert optimizer.describe()[0].fused
    optimizer.inner_optimizer.update_step = optimizer.inner_optimizer.update_step.__get__
    assert "replaced" in optimizer.describe()[0].fused_reason


def test_a_model_with_200_variables_and_long_paths():
    paths = [
        f"bert_backbone/transformer_layer_{block}/self_attention_layer/{kind}/{name}"
        for block in range(25)
        for kind in ("query", "key", "value", "attention_output")
        for name in ("kernel", "bias")
    ]
    assert len(paths) == 200 and max(map(len, paths)) >= 60
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
    optimizer.freeze(".*/kernel", np.s_[:3])
    optimizer.build(variables_of(*paths, shape=(12, 10)))
    lines = lines_of(optimizer)
    assert len(lines) <= 220
    assert max(map(len, lines)) <= 80
    rows = lines[3:203]
    assert len({line.split()[0] for line in rows}) == 200
    for path, line in zip(paths, rows, strict=True):
        assert re.findall(r"\d+", line.split()[0]) == re.findall(r"\d+", path)
        assert line.split()[0].endswith(path.rpartition("/")[2])
    assert [line for line in lines_of(optimizer, width=200) if paths[0] in line]  # whole where there is room
    collapsed = lines_of(optimizer, collapse=True)
    assert len(collapsed) < 20 and sum("(25)" in line for line in collapsed) == 8


def test_reasons_stand_below_once_and_are_not_too_many():
    variables = variables_of(*(f"v{i}" for i in range(20)), shape=(2, 2))
    for i, variable in enumerate(variables):
        variable.constraint = type(f"Constraint{i}", (keras.constraints.Constraint,), {"__call__": lambda self, w: w})()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), state="compact")
    optimizer.build(variables)
    lines = lines_of(optimizer)
    assert sum(line.startswith("[") for line in lines) == MOST_NOTES
    assert sum("a constraint writes it after the update" in line for line in lines) == 1
    assert lines[-1] == f"and {21 - MOST_NOTES} more reasons: see `describe()`"


def test_bytes_are_for_people():
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.build([*variables_of("big", shape=(4096, 8192)), *variables_of("small", shape=(8,))])
    text = "\n".join(lines_of(optimizer))
    assert "4.19 MB" in text and " 1 B" in text


def test_summary_goes_to_the_output_of_the_moment_and_obeys_columns(monkeypatch):
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.build(variables_of("encoder/block_7/" + 9 * "long_name/" + "kernel"))
    for columns in (60, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        with contextlib.redirect_stdout(io.StringIO()) as text:
            optimizer.summary()
        lines = text.getvalue().splitlines()
        assert len(lines[2]) <= columns and max(map(len, lines)) <= columns
        assert "block_7" in lines[3] if columns == 120 else "7/" in lines[3]


parts = st.lists(
    st.sampled_from(["dense", "dense_1", "attention", "a", "layer_12_norm", "kernel"]), min_size=1, max_size=6
)


@given(st.lists(parts.map("/".join), min_size=1, max_size=12, unique=True), st.integers(1, 60))
@example(["attention/x", "attendance/x"], 5)  # which would read alike
def test_short_paths_keep_numbers_and_differ(paths, width):
    short = shortened(paths, width)
    assert len(set(short)) == len(paths)
    for path, form in zip(paths, short, strict=True):
        assert len(form) <= len(path)
        assert re.findall(r"\d+", form) == re.findall(r"\d+", path)
        if len(path) <= width:
            assert form == path
