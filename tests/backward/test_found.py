"""That the trainable part alone is made for each kind of layer, and that training goes as with whole gradients."""

import keras
import pytest
from agreement import PART, assert_agree, trained
from network import NETWORKS


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", NETWORKS)
def test_found(name, jit):
    part = trained(name, jit, skips=True)
    assert part.outcomes() == dict.fromkeys(part.masks, PART)
    assert_agree(part, trained(name, jit, skips=False))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_found_in_mixed_precision(name, policy):
    """`compile` puts a LossScaleOptimizer around under `mixed_float16`."""
    part = trained(name, False, True, policy)
    assert {layer.dtype_policy.name for layer in part.model.layers} == {policy}
    assert isinstance(part.model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    assert part.outcomes() == dict.fromkeys(part.masks, PART)
    # A weight's update is off by a rounding of the 16-bit gradient.
    assert_agree(part, trained(name, False, False, policy), rtol=2e-2, atol=2e-3)
