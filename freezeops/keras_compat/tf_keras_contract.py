"""The contract with tf_keras, which is Keras 2: everything private of it that freezeops uses, in one table.

As `contract.py`, which has the table for TensorFlow. Read in tf_keras 2.21.0.
"""

from freezeops.keras_compat import contract, versions
from freezeops.keras_compat.contract import Contract, Needs

_OPTIMIZER = "tf_keras.optimizers.Optimizer"
_TRACKABLE = "tf.__internal__.tracking.AutoTrackable"

TF_KERAS = Contract(
    "tf_keras",
    "tf_keras",
    versions.TF_KERAS,
    [
        Needs("tf_keras.optimizers.Adam", "_built", "whether an optimizer is built", on_instances=True),
        Needs(_OPTIMIZER, "_index_dict", "the place of a variable's slots", on_instances=True),
        Needs(_OPTIMIZER, "_var_key", "the place of a variable's slots", arguments=("variable",)),
        Needs(
            _OPTIMIZER,
            "_model_variables_moving_average",
            "averages of frozen entries are the entries themselves",
            on_instances=True,
        ),
        Needs(_OPTIMIZER, "_mesh", "refuses optimizers for DTensor", on_instances=True),
        Needs(_OPTIMIZER, "_run_with_dtensor", "refuses optimizers for DTensor", on_instances=True),
        Needs(
            _OPTIMIZER,
            "_create_iteration_variable",
            "has the inner optimizer alone count steps",
            arguments=(),
            replaced=True,
            called_by="tf_keras.src.optimizers.optimizer._BaseOptimizer.__init__",
        ),
        Needs(_OPTIMIZER, "_learning_rate", "shows a schedule to the TensorBoard callback", on_instances=True),
        Needs(_OPTIMIZER, "_trackable_children", "masks in checkpoints", arguments=("save_type",), replaced=True),
        Needs(_OPTIMIZER, "_iterations", "the count of steps in a SavedModel", on_instances=True),
        Needs(
            "tf_keras.src.mixed_precision.loss_scale_optimizer.LossScaleOptimizerV3",
            "_is_wrapped_by_loss_scale_optimizer",
            "has a second scaler refuse",
            on_instances=True,
        ),
        Needs("tf_keras.layers.Layer", "_flatten_layers", "layers in layers", contract.WRITES),
        Needs(
            "tf_keras.layers.Layer.non_trainable_weights",
            "_non_trainable_weights",
            "state that a forward pass changes",
            contract.WRITES,
            in_code=True,
        ),
        Needs(
            "tf.__internal__.distribute.interim",
            "maybe_merge_call",
            "counts a step in which every variable is frozen",
            arguments=("fn", "strategy", "args"),
        ),
    ],
)


def check_installed() -> None:
    """Raises unless freezeops can work with the installed tf_keras and TensorFlow; warns of features that are off.

    Raises:
        RuntimeError: If something is missing that freezeops cannot do without.
    """
    contract.TENSORFLOW.check()
    TF_KERAS.check()


def notes() -> list[str]:
    """Returns a sentence for each feature that is off with the installed tf_keras and TensorFlow."""
    return contract.TENSORFLOW.notes() + TF_KERAS.notes()
