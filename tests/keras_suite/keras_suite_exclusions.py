"""Which of Keras's own optimizer tests can't pass on a wrapped optimizer, and why.

`test_keras_suite.py` runs these too: each must fail, and with the error given here, so
that neither an exclusion that is no longer needed nor another fault behind it is missed.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """Tests that must fail for one reason.

    Attributes:
        tests: Patterns (`fnmatch`) on `arrangement:module.TestCase.method`.
        error: Regular expression that the traceback must contain.
        reason: Why such a test says nothing about the wrapper.
    """

    tests: tuple[str, ...]
    error: str
    reason: str


MAIN_KERAS = "3.15"
"""The version that this list was made for; in others, names may be missing or fail otherwise."""

EXCLUSIONS = (
    # Private members of the wrapped class.
    Exclusion(
        (
            "leaves:adam_test.AdamTest.test_ema",
            "leaves:adam_test.AdamTest.test_ema_overwrite_frequency",
            "leaves:optimizer_test.OptimizerTest.test_ema",
            "leaves:optimizer_test.OptimizerTest.test_ema_with_model_fit",
            "leaves:multi_optimizer_test.MultiOptimizerTest.test_swap_ema_weights_with_multi_optimizer",
        ),
        "no attribute '_model_variables_moving_average'",
        "looks into the private list of moving averages, which the inner optimizer has",
    ),
    Exclusion(
        ("leaves:multi_optimizer_test.MultiOptimizerTest.test_multi_optimizer_wrapped_in_loss_scale_optimizer",),
        "must wrap a MaskedOptimizer directly",
        "puts a MultiOptimizer between a LossScaleOptimizer and the wrapper, which is refused: its gradients would be "
        "looked at unmasked",
    ),
    Exclusion(
        ("leaves:nadam_test.NadamTest.test_build_with_empty_var_list",),
        "no attribute '_u_product'",
        "looks at a private variable of Nadam",
    ),
    Exclusion(
        ("leaves:optimizer_test.OptimizerTest.test_overwrite_with_gradient_with_gradient_accumulation",),
        r"optimizer\._iterations",
        "looks at the private `_iterations` and `_accumulated_gradients` of the inner optimizer",
    ),
    Exclusion(
        (
            "leaves:muon_test.MuonTest.test_Newton_Schulz",
            "leaves:muon_test.MuonTest.test_lr_adjust_*",
            "leaves:muon_test.MuonTest.test_should_use_adamw",
        ),
        "has no '(zeropower_via_newtonschulz5|lr_adjust)'|no attribute '_should_use_adamw'",
        "calls helper functions of Muon",
    ),
    Exclusion(
        ("leaves:muon_test.MuonTest.test_adamw_weight_decay",),
        r"expected_variable",
        "calls the private `_apply_weight_decay`; the wrapper has no weight decay of its own",
    ),
    Exclusion(
        (
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_adadelta",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_adafactor",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_adagrad",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_adamax",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_ftrl",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_lion",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_loss_scale_optimizer_sgd",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_nadam",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_rmsprop",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_rmsprop_momentum",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_rmsprop_momentum_centered",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_scatter_update",
            "leaves:optimizer_sparse_test.OptimizerSparseTest.test_sparse_gradients_sgd",
        ),
        "Optimizer is calling `assign`|False != True",
        "replaces `assign` and `_apply_weight_decay` of the object that it was given, which are not those that run "
        "(in a fused update none does, and it passes); `test_sparse_gradients_stay_sparse` checks what it is about",
    ),
    # Members and arguments that only the wrapped class has.
    Exclusion(
        (
            "leaves:optimizer_test.OptimizerTest.test_gradient_accumulation",
            "leaves:optimizer_distribute_test.OptimizerDistributeTest.test_gradient_accumulation",
        ),
        "no attribute '_accumulated_gradients'",
        "looks at the private list of accumulated gradients, which the inner optimizer has",
    ),
    Exclusion(
        (
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_custom_callable_function",
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_default_fallback",
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_multi_optimizer_initialization",
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_multi_optimizer_with_model_fit",
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_serialization",
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_stateful_apply",
        ),
        "no attribute 'optimizers'",
        "looks at `optimizers`, a member of the wrapped MultiOptimizer",
    ),
    Exclusion(
        (
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_learning_rate_scheduler_with_multi_optimizer",
            "wrappers:multi_optimizer_test.MultiOptimizerTest.test_reduce_lr_on_plateau_with_multi_optimizer",
        ),
        '(must have a "learning_rate" attribute|Learning rate cannot be accessed on a MultiOptimizer)',
        "Keras's callbacks know a MultiOptimizer by its member `optimizers`; inside a "
        "LossScaleOptimizer they miss it in the same way",
    ),
    # The class, its name and its config.
    Exclusion(
        ("leaves:optimizer_test.OptimizerTest.test_get_method",),
        r"isinstance\(\) arg 2 must be a type|is not an instance of",
        "looks at the class of the optimizer",
    ),
    Exclusion(
        ("leaves:multi_optimizer_test.MultiOptimizerTest.test_serialization",),
        r"- MaskedOptimizer\s+\+ Adam",
        "looks at the name of the class",
    ),
    Exclusion(
        ("wrappers:multi_optimizer_test.MultiOptimizerTest.test_multi_optimizer_blocks_nested_optimizers",),
        "ValueError not raised",
        "MultiOptimizer refuses the wrappers of Keras by their class",
    ),
    Exclusion(
        ("leaves:optimizer_test.OptimizerTest.test_optimizer_auto_naming",),
        r"- masked_optimizer\s+\+ adam",
        "looks at the name that Keras makes from the name of the class",
    ),
    Exclusion(
        ("leaves:multi_optimizer_test.MultiOptimizerTest.test_tensorboard_logging_with_multi_optimizer",),
        "'learning_rate_SGD' not found",
        "looks for the name of the inner optimizer, the wrapper has its own",
    ),
    Exclusion(
        ("wrappers:loss_scale_optimizer_test.LossScaleOptimizerTest.test_serialization",),
        r"assertLen\(config, 4\)|5 != 4",
        "counts the entries of LossScaleOptimizer's config",
    ),
    # What TensorFlow does with one object in two replicas.
    Exclusion(
        ("leaves:optimizer_distribute_test.OptimizerDistributeTest.test_ema",),
        r"assertAllClose\(v, \[\[2.0, 3.0\], \[4.0, 5.0\]\]\)",
        "gives both replicas one and the same gradient object, which TensorFlow then takes for "
        "an already reduced one; masked gradients are a tensor per replica, and are summed as "
        "gradients that were computed in the replicas are (`test_single_step` does that)",
    ),
)

WRAPS_NOTHING = (
    "leaves:*_test.*.test_invalid_*",
    "leaves:adamw_test.AdamWTest.test_weight_decay_is_none",
    "*:loss_scale_optimizer_test.LossScaleOptimizerTest.test_deserialization_backwards_compatibility",
    "wrappers:loss_scale_optimizer_test.LossScaleOptimizerTest.test_init_*unsupported_arg*",
    "wrappers:multi_optimizer_test.MultiOptimizerTest.test_optimizer_map_matching",
    "leaves:optimizer_distribute_test.OptimizerDistributeTest.test_single_step1",
)
"""Tests that pass without an optimizer that could have been wrapped: they see errors, configs, or tf_keras's alone."""

SKIPPED = {
    "*:*_test.*.test_*stateless*": "stateless_apply is not supported",
    "leaves:optimizer_distribute_test.OptimizerDistributeTest.test_single_step1": "tf_keras",
}
"""Tests that skip themselves with the TensorFlow backend, with a part of what they say."""
