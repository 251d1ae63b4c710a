"""`MaskedOptimizer` for `tf_keras`, which is Keras 2. Needs the package `tf_keras`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from freezeops.files.checkpoints import MaskStore, restore
from freezeops.files.keras_state import KerasState, Store, set_weights
from freezeops.keras_compat.known import replaced_methods
from freezeops.keras_compat.options import InnerOption, InnerOptions
from freezeops.keras_compat.tf_keras_contract import check_installed, notes
from freezeops.keras_compat.tf_keras_optimizers import (
    TfKerasScaler,
    TfKerasWrapper,
    average_of,
    base_optimizer,
    count_step,
    is_built,
    is_for_dtensor,
    knows,
    wrapped_tf_keras_optimizers,
)
from freezeops.keras_compat.variables import check_strategy, variable_key, variable_path
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.partitions.building import PartitionBuilder
from freezeops.partitions.guards import Guard, keeping_frozen
from freezeops.partitions.partition import Partition
from freezeops.registry.arguments import INNER_ARGUMENTS, check_arguments
from freezeops.registry.methods import MaskMethods
from freezeops.registry.registry import MaskRegistry, awaiting_message
from freezeops.registry.targets import VariableIndex
from freezeops.step.managed import ManagedVariable
from freezeops.step.traced_writes import guarded
from freezeops.storage.stored import Stored

try:
    import tf_keras
except ImportError as error:
    raise ImportError(
        "`freezeops.legacy` needs tf_keras of TensorFlow's version: pip install tf_keras=="
        f"{'.'.join(tf.__version__.split('.')[:2])}.* (or `pip install tf_keras`)"
    ) from error

_INNER_ARGUMENTS = (*INNER_ARGUMENTS, "lr", "jit_compile", "mesh")


@tf_keras.saving.register_keras_serializable(package="freezeops")
class MaskedOptimizer(MaskMethods, InnerOptions, TfKerasWrapper, tf_keras.optimizers.Optimizer):
    """Trains only the entries that a mask lets through; the others stay bit for bit.

    Wraps any optimizer of `tf_keras.optimizers`, as `freezeops.MaskedOptimizer` wraps
    those of Keras 3, with the same masks and the same promise. Masks can be changed
    before the optimizer is built, after it, and from a callback in the middle of `fit`,
    without retracing. The inner optimizer's slots of entries that become trainable go on
    with what they hold.

    Args:
        inner_optimizer: A `tf_keras.optimizers.Optimizer`, `LossScaleOptimizer` included.
        masks: Optional mapping of path patterns to masks, as by `register_mask`, or a list
            of `(target, mask)` pairs. A path is the variable's name without `:0`, such as
            `"dense/kernel"`.
        maskable: Optional mapping of path patterns to `"elements"` (one bit per
            entry), `"rows"`, `"columns"` or `"none"`: what is set aside for masks
            when the optimizer is built. By default one bit per entry, or per row or
            column where the rules given until then ask for no more.
        name: Optional name.

    Raises:
        ValueError: If an argument belongs to the inner optimizer, or is unknown.
        TypeError: If `inner_optimizer` is no optimizer of `tf_keras.optimizers`.
        NotImplementedError: In the scope of a strategy with parameter servers.
        RuntimeError: If the installed tf_keras or TensorFlow lacks what freezeops cannot do without.

    Example:

    ```python
    import tf_keras
    from freezeops.legacy import MaskedOptimizer

    optimizer = MaskedOptimizer(tf_keras.optimizers.AdamW(1e-3))
    optimizer.freeze("embedding/embeddings", np.s_[:50_000])
    model.compile(optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```
    """

    jit_compile = InnerOption()

    def __new__(cls, inner_optimizer: Any = None, *args: Any, **kwargs: Any) -> "MaskedOptimizer":
        """Makes a `MaskedLossScaleOptimizer` around a `LossScaleOptimizer`."""
        if cls is MaskedOptimizer and isinstance(inner_optimizer, tf_keras.mixed_precision.LossScaleOptimizer):
            cls = MaskedLossScaleOptimizer
        return super().__new__(cls)

    def __init__(
        self,
        inner_optimizer: tf_keras.optimizers.Optimizer,
        masks: Mapping[Any, Any] | Sequence[tuple[Any, Any]] | None = None,
        maskable: Mapping[str, str] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        check_installed()
        _check_inner(inner_optimizer)
        for argument in ("state", "capacity", "fused", "skip_frozen_gradients"):
            if argument in kwargs:
                raise ValueError(
                    f"`{argument}` must be used with `freezeops.MaskedOptimizer` around an optimizer of Keras 3. "
                    f"Received: {argument}={short(kwargs[argument])} for one of tf_keras"
                )
        check_arguments(masks, maskable, _INNER_ARGUMENTS, kwargs)
        check_strategy(tf.distribute.get_strategy())
        # Not `super()`: in `MaskedLossScaleOptimizer` there is another base.
        tf_keras.optimizers.Optimizer.__init__(self, name or "MaskedOptimizer", weight_decay=None, jit_compile=False)
        self._inner_optimizer = inner_optimizer
        self._registry = MaskRegistry(self, maskable, self._masks_changed)
        self._masks = MaskStore(self._checkpointed, self._restored)
        self._keras_state = KerasState(self._registry, _TfKerasState(inner_optimizer))
        self.register_masks(masks or {})

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer that was given."""
        return self._inner_optimizer

    def _contract_notes(self) -> list[str]:
        return notes()

    # Masks.

    def _masks_changed(self, changed: Sequence[ManagedVariable]) -> None:
        partitions = {id(managed.partition) for managed in changed}
        for partition, average in self._averages():
            if id(partition) in partitions:
                partition.fill_frozen(average)

    def _averages(self) -> Iterator[tuple[Partition, tf.Variable]]:
        base = base_optimizer(self.inner_optimizer)
        for partition in self._registry.partitions:
            if base.use_ema and partition.inner_variable is not None:
                yield partition, average_of(base, partition.variable)

    # Building.

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        """Creates the masks and builds the inner optimizer.

        Args:
            var_list: The trainable variables of the model.

        Raises:
            ValueError: If a rule matches nothing or does not fit, or the inner optimizer
                was built with other variables; nothing was created then.
        """
        registry = self._registry
        if registry.built:
            return
        check_strategy(tf.distribute.get_strategy())
        base = base_optimizer(self.inner_optimizer)
        inner_built = is_built(base)
        planned = registry.plan(VariableIndex(list(var_list)), inner_built)
        planned.changes.warn()
        if planned.awaiting and not tf.executing_eagerly():
            raise ValueError(awaiting_message([planned.index.paths[i] for i in planned.awaiting]))
        pairs = list(zip(planned.index.variables, planned.plans, strict=True))
        inner_variables = [variable for variable, plan in pairs if plan.mode != "permanent"]
        if inner_built:
            _check_knows(base, inner_variables)
        elif inner_variables:
            self.inner_optimizer.build(inner_variables)
        builder = PartitionBuilder(self.name, self._masks.add, tf.distribute.get_strategy())
        partitions = [builder.partition(variable, plan, i) for i, (variable, plan) in enumerate(pairs)]
        registry.managed = [ManagedVariable(partition) for partition in partitions]
        registry.index = planned.index
        registry.keep_planned(planned)
        registry.warn_of_problems()

    def _build_once(self, variables: Sequence[tf.Variable]) -> None:
        with tf.init_scope():  # as tf_keras: variables are not created in a function's graph
            self.build(variables)

    # Training.

    def compute_gradients(self, loss: Any, var_list: Any, tape: Any = None) -> list[tuple[Any, tf.Variable]]:
        """As the inner optimizer does; see tf_keras."""
        return self.inner_optimizer.compute_gradients(loss, var_list, tape)

    @tf.autograph.experimental.do_not_convert
    def aggregate_gradients(self, grads_and_vars: Any) -> Any:
        """Masks gradients and sums them over the replicas.

        A `LossScaleOptimizer` around this optimizer does this first, before it looks
        whether gradients are finite.
        """
        gradients, variables = _unzip(grads_and_vars)
        masked = self.mask_gradients(gradients, variables)
        return self.inner_optimizer.aggregate_gradients(list(zip(masked, variables, strict=True)))

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(
        self, grads_and_vars: Any, name: str | None = None, skip_gradients_aggregation: bool = False, **kwargs: Any
    ) -> Any:
        """Applies one step to the trainable entries.

        Args:
            grads_and_vars: Pairs of gradient and variable. The variables build the
                optimizer where it is not.
            name: As in tf_keras.
            skip_gradients_aggregation: As in tf_keras: the gradients are summed over
                the replicas already.
            **kwargs: As in tf_keras.

        Returns:
            What the inner optimizer returns.

        Raises:
            ValueError: If a variable is unknown.
        """
        gradients, variables = _unzip(grads_and_vars)
        if not gradients:
            return self.iterations  # as in tf_keras: nothing to do, and no step counted
        self._build_once(variables)
        self._registry.check_stated()
        self._registry.traced_writes.watch(self._registry.partitions)
        with guarded():
            return self._apply_masked(gradients, variables, name, skip_gradients_aggregation, **kwargs)

    def _apply_masked(
        self,
        gradients: Sequence[Any],
        variables: Sequence[tf.Variable],
        name: str | None,
        skip_gradients_aggregation: bool,
        **kwargs: Any,
    ) -> Any:
        """`apply_gradients`, once the optimizer is built."""
        masked = self.mask_gradients(gradients, variables)
        pairs = [
            (gradient, variable)
            for gradient, variable in zip(masked, variables, strict=True)
            if self._registry.record_of(variable).partition.inner_variable is not None
        ]
        if any(g is not None for g in gradients) and all(g is None for g, _ in pairs):
            # All with a gradient are frozen for good; the inner optimizer would not count the step.
            return count_step(self)
        written = self._written_in_step(pairs)
        of_these = set(map(id, written))
        averages = [(partition, average) for partition, average in self._averages() if id(partition) in of_these]
        with keeping_frozen(_guards(written), averages):
            return self.inner_optimizer.apply_gradients(
                pairs, name=name, skip_gradients_aggregation=skip_gradients_aggregation, **kwargs
            )

    def _written_in_step(self, pairs: Sequence[tuple[Any, tf.Variable]]) -> list[Partition]:
        """The partitions of variables that the inner optimizer may write in a step.

        No others are remembered and put back: another thread may be in the middle of a step of them.

        Args:
            pairs: The gradients and variables that it is given.
        """
        if not all(
            type(part).__module__.startswith("tf_keras.") and not replaced_methods(part)
            for part in wrapped_tf_keras_optimizers(self.inner_optimizer)
        ):
            return self._registry.partitions  # a user's own may write whatever it was built with
        record_of = self._registry.record_of
        given = {id(record_of(variable).partition) for gradient, variable in pairs if gradient is not None}
        return [partition for partition in self._registry.partitions if id(partition) in given]

    @tf.autograph.experimental.do_not_convert
    def finalize_variable_values(self, var_list: Sequence[tf.Variable]) -> None:
        """Lets the inner optimizer finalize (EMA), without a change to frozen entries."""
        partitions = self._registry.partitions
        permanent = {variable_key(each.variable) for each in partitions if each.inner_variable is None}
        inner = [variable for variable in var_list if variable_key(variable) not in permanent]
        with keeping_frozen(_guards(partitions), self._averages()):
            self.inner_optimizer.finalize_variable_values(inner)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of steps."""
        return self.inner_optimizer.iterations

    @iterations.setter
    def iterations(self, variable: Any) -> None:
        self.inner_optimizer.iterations = variable

    def exclude_from_weight_decay(
        self, var_list: Sequence[tf.Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from the inner optimizer's weight decay; see tf_keras."""
        base_optimizer(self.inner_optimizer).exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    # State.

    @property
    def variables(self) -> list[tf.Variable]:
        """The inner optimizer's variables; masks are state of their own."""
        return self.inner_optimizer.variables

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of `variables`, in their order; masks stay as they are.

        Raises:
            ValueError: If the optimizer is not built, or number or shapes differ.
        """
        set_weights(self._registry, self.variables, weights)

    def save_own_variables(self, store: Store) -> None:
        """As `freezeops.MaskedOptimizer.save_own_variables`."""
        self._keras_state.save(store)

    def load_own_variables(self, store: Store) -> None:
        """As `freezeops.MaskedOptimizer.load_own_variables`."""
        self._keras_state.load(store)

    def _checkpointed(self) -> bytes:
        return self._keras_state.stored().to_bytes()

    def _restored(self, stored: Stored) -> None:
        restore(self._registry, stored)

    def get_config(self) -> dict[str, Any]:
        """The configuration: the inner optimizer, each variable's way and layout, and the rules or masks.

        As `freezeops.MaskedOptimizer.get_config`.
        """
        inner = tf_keras.optimizers.serialize(self.inner_optimizer)
        config = {"name": self.name, "inner_optimizer": inner, "is_legacy_optimizer": False}
        return config | self._registry.get_config()

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "MaskedOptimizer":
        """An optimizer from `get_config`, with the same rules, masks, ways and layouts."""
        config = dict(config)
        config.pop("is_legacy_optimizer", None)
        inner = config.pop("inner_optimizer")
        if isinstance(inner, dict):
            inner = tf_keras.optimizers.deserialize(dict(inner), custom_objects=custom_objects)
        of_masks: dict[str, Any] = {name: config.pop(name) for name in ("partitions", "rules") if name in config}
        optimizer = cls(inner, **config)
        optimizer._registry.set_config(of_masks)
        return optimizer


class _TfKerasState:
    """The `InnerState` of an optimizer of tf_keras, which names and loads its slots itself."""

    def __init__(self, inner_optimizer: Any):
        self._inner_optimizer = inner_optimizer

    def slot_names(self) -> list[tuple[str, list[tuple[str | None, str]]]]:
        return []

    def begin(self, stored: Stored, skip: bool, masks: Mapping[int, Mask] | None = None) -> None:
        """Nothing is to be prepared."""

    def refuse(self) -> None:
        """Nothing is to be kept from loading."""

    def load_bare(self, arrays: list[np.ndarray], skip: bool) -> None:
        self._inner_optimizer.load_own_variables({str(i): array for i, array in enumerate(arrays)})

    def waits(self, stored: Stored) -> bool:
        return False


def _guards(partitions: Sequence[Partition]) -> list[Guard]:
    return [partition.guard() for partition in partitions]


@tf_keras.saving.register_keras_serializable(package="freezeops")
class MaskedLossScaleOptimizer(MaskedOptimizer, TfKerasScaler, tf_keras.mixed_precision.LossScaleOptimizer):
    """The class of `MaskedOptimizer(LossScaleOptimizer(...))`.

    By its type `compile` sees under `mixed_float16` that the loss is scaled, and does not
    wrap a `LossScaleOptimizer` around. All it does comes from `MaskedOptimizer` and the
    `LossScaleOptimizer` inside.
    """

    def get_scaled_loss(self, loss: Any) -> Any:
        """The loss, scaled."""
        return self.inner_optimizer.get_scaled_loss(loss)

    def get_unscaled_gradients(self, grads: Sequence[Any]) -> list[Any]:
        """Gradients of the scaled loss, unscaled."""
        return self.inner_optimizer.get_unscaled_gradients(grads)

    @property
    def dynamic(self) -> bool:
        """True if the scale changes by itself."""
        return self.inner_optimizer.dynamic

    @property
    def loss_scale(self) -> tf.Tensor:
        """The scale as it is now."""
        return self.inner_optimizer.loss_scale

    @property
    def dynamic_counter(self) -> Any:
        """The number of steps since the scale last changed."""
        return self.inner_optimizer.dynamic_counter

    @property
    def initial_scale(self) -> float:
        """The scale at first."""
        return self.inner_optimizer.initial_scale

    @property
    def dynamic_growth_steps(self) -> int | None:
        """After how many steps with finite gradients the scale grows."""
        return self.inner_optimizer.dynamic_growth_steps


def _unzip(grads_and_vars: Any) -> tuple[list[Any], list[tf.Variable]]:
    pairs = list(grads_and_vars)
    return [gradient for gradient, _ in pairs], [variable for _, variable in pairs]


def _check_inner(inner_optimizer: Any) -> None:
    received = f"Received: inner_optimizer={short(inner_optimizer)} of type {type(inner_optimizer).__name__}"
    if isinstance(inner_optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be a tf_keras.optimizers.Optimizer. For an optimizer of Keras 3 use "
            f"freezeops.MaskedOptimizer. {received}"
        )
    if isinstance(inner_optimizer, tf_keras.optimizers.legacy.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be a tf_keras.optimizers.Optimizer, not one of tf_keras.optimizers.legacy. "
            f"Use the class of the same name in tf_keras.optimizers. {received}"
        )
    if not isinstance(inner_optimizer, tf_keras.optimizers.Optimizer):
        raise TypeError(f"`inner_optimizer` must be a tf_keras.optimizers.Optimizer. {received}")
    outer = inner_optimizer
    while outer is not None:
        if isinstance(outer, MaskedOptimizer):
            raise ValueError(
                "`inner_optimizer` must not be a MaskedOptimizer itself, nor have one inside: register all masks on "
                f"one. {received}"
            )
        outer = getattr(outer, "inner_optimizer", None)
    base = base_optimizer(inner_optimizer)
    if is_for_dtensor(base):
        raise ValueError(f"`inner_optimizer` must not be one for DTensor (`mesh`). {received}")


def _check_knows(base: Any, variables: Sequence[tf.Variable]) -> None:
    unknown = [variable_path(variable) for variable in variables if not knows(base, variable)]
    if unknown:
        raise ValueError(
            "`inner_optimizer` must not be built yet, or be built with the variables that are trained. Received: an "
            f"optimizer built without {short(unknown)}"
        )
