"""The promise: a frozen entry is bit for bit the same, whatever the inner optimizer does: see `check_promise`."""

import pytest
from common import (
    MODES,
    NOT_IN_TABLE,
    OPTIONS,
    SETUPS,
    WAYS,
    assert_same_bits,
    optimizer_classes,
)
from training import PROMISE_SHAPES, Training, check_promise

import freezeops as fz


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("setup", "fused"), WAYS)
def test_frozen_entries_keep_their_bits(setup, fused, option, mode):
    check_promise(setup, OPTIONS[option], mode, fused=fused)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("setup", "fused"),
    [
        way
        for way in WAYS
        if way[0] in ("SGD momentum", "Adam", "AdamW", "Nadam", "RMSprop", "Adagrad", "Lion", "ScheduleFreeAdamW")
    ],
)
def test_other_dtypes(setup, fused, dtype, mode):
    # EMA with float64 variables fails in Keras itself: it multiplies by a float32 momentum.
    options = {} if setup in ("Adam", "RMSprop") else OPTIONS["weight_decay"]
    if setup in ("Adam", "AdamW"):
        options = options | {"clipvalue": 0.3}
    if dtype == "bfloat16" and setup in ("Adam", "AdamW", "Nadam", "ScheduleFreeAdamW"):
        # Keras computes in the variable's dtype, where the default 0.999 is 1.
        options = options | {"beta_2": 0.9}
    check_promise(setup, options, mode, dtype, fused=fused)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("setup", "fused"), [way for way in WAYS if way[0] in ("SGD momentum", "AdamW", "RMSprop", "Ftrl")]
)
@pytest.mark.parametrize("option", ["plain", "ema_overwrite"])
def test_on_the_reference_twins(setup, fused, option, mode, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", "reference")
    check_promise(setup, OPTIONS[option], mode, fused=fused)


def test_no_optimizer_class_is_forgotten():
    covered = {name.split()[0] for name in SETUPS}
    assert set(optimizer_classes()) == covered | set(NOT_IN_TABLE)
    assert not covered & set(NOT_IN_TABLE)


def test_plain_masking_would_fail_here():
    """The cases are hard enough: masked gradients alone do not keep the promise."""
    training = Training(PROMISE_SHAPES)
    before = training.values()["start"]
    gradients = zip(PROMISE_SHAPES, training.gradients(), strict=True)
    gradients = [fz.mask_gradient(gradient, training.masks[name]) for name, gradient in gradients]
    SETUPS["AdamW"](**OPTIONS["weight_decay"]).apply(gradients, list(training.variables.values()))
    frozen = ~training.masks["start"]
    with pytest.raises(AssertionError, match="entries differ"):
        assert_same_bits(training.values()["start"][frozen], before[frozen])
