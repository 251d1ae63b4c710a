"""`MaskedOptimizer`: freezes entries around any Keras optimizer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

from freezeops.assembly import Assembly
from freezeops.files.keras_state import Store, set_weights
from freezeops.keras_compat import contract, stored_state
from freezeops.keras_compat.options import InnerOption, KerasWrapper
from freezeops.keras_compat.patches import guard_swaps, loss_scaler_that_builds, mask_before_loss_scaling
from freezeops.keras_compat.variables import Variable, check_strategy
from freezeops.keras_compat.wrapped import (
    base_optimizers,
    own_step_counter,
    step_counter,
    strategy_of,
    wrapped_optimizers,
)
from freezeops.messages import short
from freezeops.ops.gradients import Gradient
from freezeops.partitions.capacity import Capacity, check_capacity
from freezeops.partitions.guards import keeping_frozen
from freezeops.partitions.partition import Partition
from freezeops.registry.arguments import INNER_ARGUMENTS, check_arguments
from freezeops.registry.methods import MaskMethods, check_lengths, mask_pairs
from freezeops.slots import unfreezing
from freezeops.slots.lookup import check_elementwise
from freezeops.step.options import StepOptions, check_fused, check_skips
from freezeops.step.scaler import gradients_for_scaler
from freezeops.step.step import Step, masks_in_use
from freezeops.step.traced_writes import guarded

_INNER_ARGUMENTS = (*INNER_ARGUMENTS, "loss_scale_factor", "gradient_accumulation_steps")


class _PairsCall:
    """A call of `MaskedOptimizer.apply_gradients` whose pairs go to the inner optimizer's own one.

    Args:
        optimizer: The `MaskedOptimizer`.

    Attributes:
        result: What the inner optimizer returned.
    """

    def __init__(self, optimizer: "MaskedOptimizer"):
        self.optimizer = optimizer
        self.result: Any = None


_applying_pairs: ContextVar[_PairsCall | None] = ContextVar("_applying_pairs", default=None)
"""The call of this thread, from `apply_gradients` to `apply`."""


@keras.saving.register_keras_serializable(package="freezeops")
class MaskedOptimizer(MaskMethods, StepOptions, KerasWrapper, keras.optimizers.Optimizer):
    """Trains only the entries that a mask lets through; the others stay bit for bit.

    Wraps any Keras optimizer. Gradients are masked by selection before anything
    looks at them, and after anything that writes a variable (weight decay, the
    update, EMA overwrite, constraints, `finalize_variable_values`) its frozen
    entries are what they were. Trainable entries get what the inner optimizer
    gives them when the frozen entries' gradients are zero.

    Masks can be changed before the optimizer is built, after it, and from a
    callback in the middle of `fit`, without retracing.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`.
        masks: Optional mapping of path patterns to masks, as by `register_mask`, or a list of
            `(target, mask)` pairs, since variables are no keys of a mapping.
        state: `"full"`: the inner optimizer's slots have their variable's shape.
            `"compact"`: it has slots for the trainable entries of masked variables alone, and
            memory, time and traffic between replicas go with their number. Only for inner
            optimizers that update each entry by itself (`fz.declare_elementwise`).
            Variables without a frozen entry when the optimizer is built, and those with a
            constraint, have full state; `summary()` says so.
        capacity: With compact state: how many trainable entries a variable has room for, so
            that its mask can change without a new trace: a number of entries (`int`), a
            share of them (`float`), or a mapping of path patterns to those. By default as
            many as are trainable when the optimizer is built; `repack` makes more room.
        maskable: Optional mapping of path patterns to `"elements"` (one bit per
            entry), `"rows"`, `"columns"` or `"none"`: what is set aside for masks
            when the optimizer is built. By default one bit per entry, or per row or
            column where the rules given until then ask for no more.
        unfreeze_policy: What the inner optimizer's slots hold for entries that become
            trainable after the first step. `"seed"`: their moments start from their own
            first gradient that is not zero, as if it had always been the same; the first
            step of Adam, AdamW, Nadam and RMSprop is then at most one learning rate.
            `"zero"`: they start as in a new optimizer (late in training Adam's first
            step is then 3.16 learning rates). `"keep"`: they go on with what the slots
            hold. Slots that stand for weights (Ftrl's, ScheduleFreeAdamW's momentum) and
            those of user-written optimizers that nobody declared (`fz.declare_slots`)
            are kept in any case. (With compact state an entry that was frozen in a step
            has no slots to keep: they start as in a new optimizer.)
        name: Optional name.
        fused: Whether variables are updated in one native pass over gradient, variable, slots and
            mask where the inner optimizer is exactly Keras's SGD, Adam, AdamW, Nadam, RMSprop,
            Adagrad or Lion, without a moving average. Results and state are those of the inner
            optimizer. Everything else goes the general way; `summary()` says which and why. May
            be set at any time; functions that were traced before go on as they were traced.
        skip_frozen_gradients: Whether gradients of frozen entries are left uncomputed, with compact state
            and in traced steps, where a layer's input and the gradient of its output say what they are
            made of. Trainable entries get theirs within rounding, in another order of sums. `summary()`
            says for which variables, and why not for others. May be set at any time, as `fused`.

    Raises:
        ValueError: If an argument belongs to the inner optimizer, or is unknown; with
            compact state, if the inner optimizer's update of an entry looks at others.
        TypeError: If `inner_optimizer` is no Keras optimizer.
        RuntimeError: If the installed Keras or TensorFlow lacks what freezeops cannot do without, or what an option
            needs.
        NotImplementedError: In the scope of a strategy with parameter servers.

    Example:

    ```python
    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(1e-3))
    optimizer.train_only(embedding.embeddings, new_token_ids)
    model.compile(optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```
    """

    gradient_accumulation_steps = InnerOption()

    def __new__(cls, inner_optimizer: Any = None, *args: Any, **kwargs: Any) -> "MaskedOptimizer":
        """Makes a `MaskedLossScaleOptimizer` around a `LossScaleOptimizer`."""
        if cls is MaskedOptimizer and isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            cls = MaskedLossScaleOptimizer
        return super().__new__(cls)

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        masks: Mapping[Any, Any] | Sequence[tuple[Any, Any]] | None = None,
        state: str = "full",
        maskable: Mapping[str, str] | None = None,
        unfreeze_policy: unfreezing.Policy = "seed",
        name: str | None = None,
        capacity: Capacity | Mapping[str, Capacity] | None = None,
        fused: bool = True,
        skip_frozen_gradients: bool = False,
        **kwargs: Any,
    ):
        contract.check_installed()
        _check_arguments(inner_optimizer, masks, state, maskable, unfreeze_policy, capacity, fused, kwargs)
        check_skips(skip_frozen_gradients, state)
        check_strategy(tf.distribute.get_strategy())
        # Not `super()`: in `MaskedLossScaleOptimizer` that would be the `LossScaleOptimizer`.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        for optimizer in wrapped_optimizers(inner_optimizer):
            stored_state.store_once_and_check(optimizer)
        self.state = state
        self.unfreeze_policy = unfreeze_policy
        self._fused = fused
        self._skips = skip_frozen_gradients
        self._assembly = Assembly(self, inner_optimizer, state == "compact", maskable, capacity, unfreeze_policy)
        self._masks = self._assembly.masks  # for TensorFlow's tracking
        self._registry = self._assembly.registry
        self.register_masks(masks or {})

    def _averages(self) -> Iterator[tuple[Partition, Variable]]:
        return self._assembly.binding.averages()

    # Building.

    def build(self, variables: Sequence[Variable]) -> None:
        """Creates the masks and builds the inner optimizer.

        Args:
            variables: The trainable variables of the model.

        Raises:
            ValueError: If a rule matches nothing or does not fit; nothing was
                created then.
        """
        if scaler := loss_scaler_that_builds(self):
            mask_before_loss_scaling(scaler, self._for_scaler)
            stored_state.store_scalers_around(KerasWrapper)
        variables = list(variables)
        if not self.built and variables:  # a model from an .h5 file builds its optimizer with no variables first
            self._assembly.build(variables)
            guard_swaps(self.inner_optimizer, _guard_of)
        if scaler is not None:
            with tf.init_scope():
                stored_state.assign_waiting(scaler)

    def _for_scaler(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Variable] | None
    ) -> AbstractContextManager[list[Gradient | None]]:
        known = list(self._registry.index.variables if variables is None else variables)
        check_lengths(gradients, known)
        self._build_once(known)
        managed = [self._registry.record_of(variable) for variable in known]
        return gradients_for_scaler(managed, gradients, self._skips)

    def _build_once(self, variables: Sequence[Variable]) -> None:
        if not self._registry.built:
            with keras.name_scope(self.name):
                self.build(variables)

    def repack(
        self,
        masks: Mapping[Any, Any] | Sequence[tuple[Any, Any]] | None = None,
        capacity: Capacity | Mapping[str, Capacity] | None = None,
    ) -> None:
        """Makes compact state anew for the masks as they are, or for others; trainable entries keep their slots.

        For masks that need more room than was set aside, and to give back room (and full
        state) that masks no longer need. Entries that become trainable follow the unfreeze
        policy.

        Functions that were traced before must be traced again: call
        `model.make_train_function(force=True)`, or make your own `tf.function` anew. Those
        that are not fail when they are called, before they change anything.

        Args:
            masks: Optional mapping of targets to masks, as for `register_masks`, or pairs of
                those, since variables are no keys of a mapping.
            capacity: Room to make from now on, as in the constructor; by default what was
                asked for there, and as much as the masks need.

        Raises:
            ValueError: If the optimizer is not built, has `state="full"`, or something does
                not fit. Nothing has changed then.
            RuntimeError: If called while a function is traced, or if the installed Keras or TensorFlow lacks what
                it needs.
        """
        contract.check(contract.REPACK, "a call of `repack`")
        self._registry.check_built("repack")
        if self.state != "compact":
            raise ValueError(f"`repack` must be called with state='compact'. Received: state={self.state!r}")
        if not tf.executing_eagerly():
            raise RuntimeError("`repack` must be called outside of `tf.function`. Received: a call while one is traced")
        pairs = mask_pairs(masks)
        check_capacity(capacity)
        self._assembly.repack(pairs, capacity)

    # Training.

    @tf.autograph.experimental.do_not_convert
    def apply(
        self,
        grads: Sequence[Gradient | None],
        trainable_variables: Sequence[Variable] | None = None,
    ) -> None:
        """Applies one step to the trainable entries.

        Args:
            grads: Gradients, one per variable; `None` where there is none.
            trainable_variables: Their variables. They build the optimizer where it
                is not; defaults to those that it was built with.

        Raises:
            ValueError: If lists do not match, or a variable is unknown.
        """
        grads = list(grads)
        if not grads:
            # As in Keras: nothing to do, and no step counted.
            return
        if trainable_variables is None:
            self._registry.check_built("apply(grads) without variables")
            trainable_variables = self._registry.index.variables
        variables = list(trainable_variables)
        check_lengths(grads, variables)
        self._build_once(variables)
        registry = self._registry
        registry.check_stated()
        registry.traced_writes.watch(registry.partitions)
        in_use = masks_in_use(registry.partitions) if self.state == "compact" else []
        with guarded(), keras.name_scope(self.name), tf.control_dependencies(in_use):
            given = [registry.record_of(variable) for variable in variables]
            replicas = strategy_of(self).num_replicas_in_sync
            step = Step(self.inner_optimizer, registry.managed, given, self.fused, replicas > 1, self._skips)
            for managed, gradient in zip(given, grads, strict=True):
                step.take(managed, gradient)
            if self._skips:
                registry.warn_of_nothing_skipped()
            if not step.variables:
                # All are frozen for good; the inner optimizer would not count the step.
                step_counter(self.inner_optimizer).assign_add(1)
                return
            step.run(lambda: self._update(step), self._assembly.binding.seedings, self._averages())

    def _update(self, step: Step) -> None:
        """Has the inner optimizer update what a step has taken."""
        if (call := _applying_pairs.get()) is not None and call.optimizer is self:
            pairs = zip(step.gradients, step.variables, strict=True)
            call.result = self.inner_optimizer.apply_gradients(list(pairs))
        else:
            self.inner_optimizer.apply(step.gradients, step.variables)

    def _frozen_entries(self) -> AbstractContextManager[None]:
        """Keeps frozen entries around what the inner optimizer may write outside of a step."""
        return keeping_frozen([each.guard() for each in self._registry.partitions], self._averages())

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """As `apply`, on `(gradient, variable)` pairs: the inner optimizer's own `apply_gradients` is called.

        Returns:
            The variable that counts the steps; or what an `apply_gradients` of the inner
            optimizer's own returns.
        """
        grads, variables = zip(*grads_and_vars, strict=True)
        call = _PairsCall(self)
        token = _applying_pairs.set(call)
        try:
            # By way of `apply`, which a subclass may have extended.
            self.apply(grads, variables)
        finally:
            _applying_pairs.reset(token)
        # Keras's own returns a counter that stands still where a `LossScaleOptimizer` is inside.
        is_counter = call.result is None or call.result is own_step_counter(self.inner_optimizer)
        return step_counter(self.inner_optimizer) if is_counter else call.result

    @tf.autograph.experimental.do_not_convert
    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Lets the inner optimizer finalize (EMA), without a change to frozen entries."""
        given = [self._registry.record_of(variable).partition.inner_variable for variable in var_list]
        inner = [variable for variable in given if variable is not None]
        with self._frozen_entries():
            self.inner_optimizer.finalize_variable_values(inner)

    # State.

    @property
    def variables(self) -> list[keras.Variable]:
        """The inner optimizer's variables; masks are state of their own."""
        return self.inner_optimizer.variables

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of `variables`, in their order; masks stay as they are.

        Raises:
            ValueError: If the optimizer is not built, or number or shapes differ.
        """
        set_weights(self._registry, self.variables, weights)

    def save_own_variables(self, store: Store) -> None:
        """Saves the masks, each with its variable's path, shape and layout; Keras saves the inner optimizer.

        Raises:
            ValueError: If rules wait for the optimizer to be built that name variables by the object.
        """
        self._assembly.keras_state.save(store)

    def load_own_variables(self, store: Store) -> None:
        """Loads the masks; before the optimizer is built, keeps them until it is.

        Loading counts as a call: where a mask was stored that somebody had stated, it replaces the one that is here.
        A file without any mask changes nothing.

        Raises:
            ValueError: If the file's masks are not those of this optimizer's variables; no mask was changed then.
                (Keras has loaded the model's weights before it comes here.)
        """
        self._assembly.keras_state.load(store)

    def load_shifted(self, entries: Mapping[str, Any]) -> None:
        """See `KerasState.load_shifted`; a `LossScaleOptimizer` around calls it."""
        self._assembly.keras_state.load_shifted(entries)

    def build_to_load(self, model: Any) -> None:
        """See `KerasState.build_to_load`; a `LossScaleOptimizer` around calls it."""
        self._assembly.keras_state.build_to_load(model)

    def get_config(self) -> dict[str, Any]:
        """The configuration: the inner optimizer, each variable's way and layout, and the masks.

        Before the optimizer is built it holds the rules, afterwards the masks that somebody stated, by path; of both as
        many as take 1 MB compressed. An optimizer that is made from a config without some of its masks trains only
        once these were loaded or registered.

        Raises:
            ValueError: Before the build, if a rule names a variable or a layer by the object: use its path.
        """
        config = {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "state": self.state,
            "unfreeze_policy": self.unfreeze_policy,
            "capacity": self._registry.capacity,
            "fused": self.fused,
            "skip_frozen_gradients": self.skip_frozen_gradients,
        }
        return config | self._registry.get_config()

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "MaskedOptimizer":
        """An optimizer from `get_config`, with the same rules, masks, ways and layouts.

        Masks that the config left out must be loaded or registered before it trains.
        """
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        of_masks: dict[str, Any] = {name: config.pop(name) for name in ("partitions", "rules") if name in config}
        optimizer = cls(inner, **config)
        optimizer._registry.set_config(of_masks)
        return optimizer


@keras.saving.register_keras_serializable(package="freezeops")
class MaskedLossScaleOptimizer(MaskedOptimizer, keras.optimizers.LossScaleOptimizer):
    """The class of `MaskedOptimizer(LossScaleOptimizer(...))`.

    Only so that `compile` sees a `LossScaleOptimizer` under `mixed_float16` and does
    not wrap another one around; all it does comes from `MaskedOptimizer`.
    """


def _guard_of(optimizer: Any) -> AbstractContextManager | None:
    """Returns a context that keeps frozen entries while something else writes the variables of an optimizer.

    `None` where nothing in it is a `MaskedOptimizer`.
    """
    masked = [part for part in wrapped_optimizers(optimizer) if isinstance(part, MaskedOptimizer)]
    return _all_frozen_entries(masked) if masked else None


@contextmanager
def _all_frozen_entries(optimizers: Sequence[MaskedOptimizer]) -> Iterator[None]:
    with ExitStack() as guards:
        for optimizer in optimizers:
            guards.enter_context(optimizer._frozen_entries())
        yield


def _check_arguments(
    inner_optimizer: Any,
    masks: Any,
    state: Any,
    maskable: Any,
    unfreeze_policy: Any,
    capacity: Any,
    fused: Any,
    kwargs: Mapping[str, Any],
) -> None:
    if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
        of_tf_keras = any(cls.__module__.startswith("tf_keras.") for cls in type(inner_optimizer).__mro__)
        hint = " For an optimizer of tf_keras use freezeops.legacy.MaskedOptimizer." if of_tf_keras else ""
        raise TypeError(
            f"`inner_optimizer` must be a keras.optimizers.Optimizer.{hint} Received: "
            f"inner_optimizer={short(inner_optimizer)} of type {type(inner_optimizer).__name__}"
        )
    if isinstance(inner_optimizer, MaskedOptimizer):
        raise ValueError(
            "`inner_optimizer` must not be a MaskedOptimizer itself: register all masks on one. "
            f"Received: inner_optimizer={inner_optimizer!r}"
        )
    check_arguments(masks, maskable, _INNER_ARGUMENTS, kwargs)
    if state not in ("full", "compact"):
        raise ValueError(f"`state` must be 'full' or 'compact'. Received: state={short(state)}")
    check_fused(fused)
    check_capacity(capacity)
    if state == "compact":
        check_elementwise(inner_optimizer)
    elif capacity is not None:
        raise ValueError(f"`capacity` must be None with state='full'. Received: capacity={short(capacity)}")
    if unfreeze_policy not in unfreezing.POLICIES:
        raise ValueError(
            f"`unfreeze_policy` must be one of {unfreezing.POLICIES}. Received: "
            f"unfreeze_policy={short(unfreeze_policy)}"
        )
    for base in base_optimizers(inner_optimizer):
        contract.check_options(base, state == "compact")
