"""`MaskedOptimizer`: freezes entries around any Keras optimizer."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from freezeops.files.checkpoints import MaskStore
from freezeops.keras_compat import stored_state
from freezeops.keras_compat.known import writes_only_given, writes_only_rows_with_gradients
from freezeops.keras_compat.loading import paths_of_model
from freezeops.keras_compat.options import InnerOption, InnerOptions
from freezeops.keras_compat.patches import guard_swaps, loss_scaler_that_builds, mask_before_loss_scaling
from freezeops.keras_compat.variables import (
    Variable,
    check_strategy,
    empty_variable,
    numpy_of,
    reshape_variable,
    shape_now,
    stand_in,
    state_variable,
    tf_variable,
    variable_path,
)
from freezeops.keras_compat.wrapped import (
    SlotRecord,
    accumulators,
    average_slots,
    base_optimizers,
    build_without_slots,
    hide_trained_variables,
    own_step_counter,
    recording_slots,
    replace_variable,
    step_count,
    step_counter,
    strategy_of,
    trained_variables,
    wrapped_optimizers,
)
from freezeops.masks import layout, packing
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.ops.gradients import Gradient
from freezeops.partitions import compact, partition
from freezeops.partitions.compact import Capacity, CompactPartition, TrainableIndex
from freezeops.partitions.partition import (
    FullPartition,
    MaskedPartition,
    Partition,
    PermanentPartition,
    UnmaskedPartition,
)
from freezeops.registry import masking, rules, rules_config
from freezeops.registry.masking import FrozenEntries
from freezeops.registry.rules import Loaded
from freezeops.slots import unfreezing
from freezeops.slots.catalogue import UpdateFormula, slots_of
from freezeops.slots.elementwise import check_elementwise
from freezeops.slots.moving import (
    CompactSlots,
    EntryState,
    entry_states,
    fitted_slot,
    packed_into,
    positions_of,
    unpacked,
)
from freezeops.slots.unfreezing import Seeding, VariableSlots
from freezeops.step import fused
from freezeops.step.formulas import formula_of
from freezeops.step.fused import FusedStep, FusedUpdates
from freezeops.step.traced_writes import guarded
from freezeops.storage import saved_names
from freezeops.storage.stored import Stored

_INNER_ARGUMENTS = (*masking.INNER_ARGUMENTS, "loss_scale_factor", "gradient_accumulation_steps")


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


class _State(masking.State):
    """The masks, and what is known of the inner optimizer's slots.

    Args:
        maskable: What the user set aside, by path pattern.
        capacity: What the user made room for in compact state.
    """

    def __init__(
        self,
        maskable: Mapping[str, str] | None = None,
        capacity: Capacity | Mapping[str, Capacity] | None = None,
    ):
        super().__init__(maskable)
        self.capacity = dict(capacity) if isinstance(capacity, Mapping) else capacity
        self.slots: dict[int, VariableSlots] = {}
        self.records: dict[int, list[SlotRecord]] = {}
        self.seedings: dict[int, Seeding] = {}
        # By position: what updates a variable in one pass, or why nothing does.
        self.updates: dict[int, FusedUpdates | str] = {}


@keras.saving.register_keras_serializable(package="freezeops")
class MaskedOptimizer(masking.Masking, InnerOptions, keras.optimizers.Optimizer):
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

    Raises:
        ValueError: If an argument belongs to the inner optimizer, or is unknown; with
            compact state, if the inner optimizer's update of an entry looks at others.
        TypeError: If `inner_optimizer` is no Keras optimizer.
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
        **kwargs: Any,
    ):
        _check_arguments(inner_optimizer, masks, state, maskable, unfreeze_policy, capacity, fused, kwargs)
        check_strategy(tf.distribute.get_strategy())
        # Not `super()`: in `MaskedLossScaleOptimizer` that would be the `LossScaleOptimizer`.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        for part in wrapped_optimizers(inner_optimizer):
            stored_state.store_once_and_check(part)
        stored_state.store_scalers_around(MaskedOptimizer)
        self.state = state
        self.unfreeze_policy = unfreeze_policy
        self._fused = fused
        self._state: _State = _State(maskable, capacity)
        self._masks = MaskStore(self._checkpointed, self._restored)
        self.register_masks(masks or {})

    # Masks.

    def _before_change(self, position: int, mask: Mask) -> None:
        part = self._state.partitions[position]
        if isinstance(part, MaskedPartition) and position in self._state.slots:
            self._state.slots[position].change(part.mask, mask, part.layout)

    def _after_change(self, positions: set[int]) -> None:
        # What was accumulated for an entry that is frozen now must neither be applied
        # nor count in a norm.
        for variable, accumulator in accumulators(self.inner_optimizer):
            if self._state.index.find_position(variable) in positions:
                self._partition(variable).clear_accumulator(accumulator)
        for part, average in self._averages():
            if self._state.index.position(part.variable) in positions:
                part.put_into_average(average)

    def _after_load(self) -> None:
        for slots in self._state.slots.values():
            slots.forget()

    def _averages(self) -> Iterator[tuple[Partition, Variable]]:
        """The slots of moving averages, each with the partition of its variable."""
        for variable, average in average_slots(self.inner_optimizer):
            # The inner optimizer may have been built with more variables.
            if (position := self._state.index.find_position(variable)) is not None:
                yield self._state.partitions[position], average

    def _waiting(self, position: int) -> Mask | None:
        slots, part = self._state.slots.get(position), self._state.partitions[position]
        if slots is None or slots.unseeded is None:
            return None
        flags = slots.waiting().reshape(-1)
        if isinstance(part, CompactPartition):
            flags = unpacked(flags, part.mask.indices(), np.zeros(part.size, bool))
        return Mask.from_array(flags.reshape(tuple(part.variable.shape))) if flags.any() else None

    def _set_waiting(self, position: int, waiting: Mask | None) -> None:
        slots, part = self._state.slots.get(position), self._state.partitions[position]
        if slots is None or slots.unseeded is None:
            return
        flags = np.zeros(part.size, bool) if waiting is None else (waiting & part.mask).to_numpy().reshape(-1)
        entries = part.mask.indices() if isinstance(part, CompactPartition) else None
        slots.unseeded.assign(packing.pack_bits(packed_into(flags, entries, tuple(slots.variable.shape))))

    def _slot_names(self) -> list[tuple[str, list[tuple[str | None, str]]]]:
        names = [name for name, _ in self._state.index.named]
        return [
            (type(part).__name__, [(None if i is None else names[i], name) for i, name in own])
            for part, own in self._own_names()
        ]

    def _own_names(self) -> Iterator[tuple[keras.optimizers.Optimizer, list[stored_state.SlotName]]]:
        """Each optimizer inside, with the names of its own variables."""
        positions = {
            id(record.slot): position for position, records in self._state.records.items() for record in records
        }
        for part in wrapped_optimizers(self.inner_optimizer):
            yield part, stored_state.names_of(part, self._state.index.paths, positions)

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
            mask_before_loss_scaling(scaler, self._mask_for_scaler)
        variables = list(variables)
        if not self.built and variables:  # a model from an .h5 file builds its optimizer with no variables first
            self._build(variables)
        if scaler is not None:
            with tf.init_scope():
                stored_state.assign_waiting(scaler)

    def _build(self, variables: list[Variable]) -> None:
        check_strategy(tf.distribute.get_strategy())
        index = rules.VariableIndex(variables)
        planned = self._plan(index, self.inner_optimizer.built)
        planned.changes.warn()
        plans = planned.plans
        if self.inner_optimizer.built and any(plan.way == "compact" for plan in plans):
            raise ValueError(
                "`inner_optimizer` must not be built before it is wrapped for state='compact': its slots have the "
                f"shapes of whole variables. Received: inner_optimizer={self.inner_optimizer!r}, which is built"
            )
        if not tf.executing_eagerly():
            pending = {variable: plan.pending for variable, plan in zip(index.paths, plans, strict=True)}
            awaiting = [path for i, path in enumerate(index.paths) if pending[path] or i in planned.awaiting]
            if awaiting:
                # Now, and not in `take`: a `tf.function` whose first trace fails after variables were created does
                # nothing when it is called again (seen in TensorFlow 2.21).
                raise ValueError(self._awaiting_message(awaiting))
        try:
            self._state.index = index
            # Compact variables are filled at once, and so is what was loaded, also where a function is traced.
            with tf.init_scope() if self.state == "compact" or self._is_waiting(planned) else nullcontext():
                self._make_partitions(variables, plans)
                self._find_slots()
                self._find_fused()
        except BaseException:
            # The next attempt begins anew.
            self._state.partitions, self._state.slots = [], {}
            self._state.records, self._state.seedings, self._state.updates = {}, {}, {}
            self._masks.clear()
            raise
        build_without_slots(self, variables)
        self._state.built = True
        self._keep_planned(planned)
        guard_swaps(_guard_of)
        if self._is_waiting(planned):
            with tf.init_scope():
                self._assign_waiting(planned)
        self._warn_of_problems()

    def _is_waiting(self, planned: masking.Planned) -> bool:
        """Whether something was loaded before the build."""
        parts = wrapped_optimizers(self.inner_optimizer)
        return bool(planned.loaded) or any(map(stored_state.is_waiting, parts))

    def _assign_waiting(self, planned: masking.Planned) -> None:
        """Sets what was loaded before the build: the optimizers' state, then what waits to be seeded.

        The optimizer is built by then and can go on: what does not fit is forgotten.

        Raises:
            ValueError: If something does not fit.
        """
        loads = [rule.stored for rule in self._state.rules if isinstance(rule, Loaded) and rule.stored.slots]
        load = self._new_load(loads[-1] if loads else Stored(), False)
        for part in wrapped_optimizers(self.inner_optimizer):
            stored_state.assign_waiting(part, load)
        for position, waiting in planned.changes.waiting.items():
            self._set_waiting(position, waiting)
        for position, loaded in planned.loaded.items():
            self._change_since_load(position, loaded)

    def _change_since_load(self, position: int, loaded: Mask) -> None:
        """Carries the policy out for entries that calls unfroze after a load, before the build."""
        slots, part = self._state.slots.get(position), self._state.partitions[position]
        newly = part.mask & ~loaded
        if slots is None or not newly.count():
            return
        if isinstance(part, CompactPartition):
            optimizer, _ = self._states_of(position)
            if optimizer is not None and step_count(optimizer):
                waiting = self._waiting(position)
                self._set_waiting(position, newly if waiting is None else waiting | newly)
        elif isinstance(part, FullPartition):
            slots.change(loaded & part.mask, part.mask, part.layout)

    def _make_partitions(self, variables: Sequence[Variable], plans: Sequence[partition.Plan]) -> None:
        """Creates the masks and builds the inner optimizer, unless it is built."""
        self._state.partitions = [
            self._make_partition(variable, plan, position)
            for position, (variable, plan) in enumerate(zip(variables, plans, strict=True))
        ]
        if self.inner_optimizer.built:
            return
        inner_variables = [part.inner_variable for part in self._state.partitions]
        with recording_slots(self.inner_optimizer) as records:
            # Not under Keras's `no_automatic_dependency_tracking`, as its own wrapper builds: Nadam's and
            # Adafactor's state would not be tracked and not be saved.
            self.inner_optimizer.build([variable for variable in inner_variables if variable is not None])
        self._keep_records(records)
        if self.state == "compact":
            hide_trained_variables(self.inner_optimizer)

    def _mask_for_scaler(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Variable] | None
    ) -> list[Gradient | None]:
        known = self._state.index.variables
        return self.mask_gradients(gradients, known if variables is None else variables)

    def _make_partition(self, variable: Variable, plan: partition.Plan, position: int) -> Partition:
        if plan.way == "permanent":
            return PermanentPartition(variable)
        if plan.way == "unmasked":
            return UnmaskedPartition(variable, plan.reason)
        assert plan.layout is not None and plan.mask is not None
        if plan.way == "compact":
            return self._make_compact(variable, plan, position)
        bits = self._make_state(variable, plan.mask.packed, "mask", str(position))
        return FullPartition(variable, plan.layout, bits, plan.reason)

    def _make_compact(self, variable: Variable, plan: partition.Plan, position: int) -> CompactPartition:
        assert plan.layout is not None and plan.mask is not None
        bits = self._make_state(variable, plan.mask.packed, "mask", str(position))
        packed = numpy_of(bits)  # where there are several workers: the chief's
        room = max(plan.capacity, packing.count_bits(packed, plan.layout.kept))
        offsets, indices = TrainableIndex.arrays(packed, plan.layout, room)
        if plan.pending:
            indices[:] = compact.pending_index(indices.dtype)
        index = TrainableIndex(
            plan.layout,
            bits,
            self._make_state(variable, offsets, "offsets", f"{position} offsets"),
            self._make_state(variable, indices, "indices", f"{position} indices"),
        )
        with self._beside(variable):
            inner = stand_in(variable, compact.inner_shape(variable, plan.layout, room))
        part = CompactPartition(variable, index, inner, plan.pending)
        if not plan.pending:
            part.remember()
        return part

    def _beside(self, variable: Variable) -> AbstractContextManager:
        return strategy_of(self).extended.colocate_vars_with(tf_variable(variable))

    def _make_state(self, variable: Variable, values: np.ndarray, what: str, key: str) -> keras.Variable:
        """A variable of integers beside one of the model's."""
        with keras.name_scope(self.name), self._beside(variable):
            path = variable_path(variable).replace("/", "_")
            state = state_variable(values, f"{path}_{what}")
        self._masks.add(key, state)
        return state

    def _choose(
        self,
        index: rules.VariableIndex,
        masks: Mapping[int, Mask],
        permanent: set[int],
        maskable: Mapping[int, str],
        saved: Sequence[dict[str, Any] | None],
    ) -> list[partition.Plan]:
        if self.state == "full":
            return super()._choose(index, masks, permanent, maskable, saved)
        named, everywhere = self._capacities(self._state.capacity, index)
        return [
            compact.choose(
                variable,
                masks.get(i),
                i in permanent,
                maskable.get(i),
                saved[i],
                named.get(i, everywhere),
                named=i in named,
            )
            for i, variable in enumerate(index.variables)
        ]

    def _capacities(
        self, capacity: Capacity | Mapping[str, Capacity] | None, index: rules.VariableIndex
    ) -> tuple[dict[int, Capacity], Capacity | None]:
        """Capacities that are given for single variables, by position, and that of all others."""
        if isinstance(capacity, Mapping):
            return self._by_position(capacity, index), None
        return {}, capacity

    def _keep_records(self, records: Sequence[SlotRecord]) -> None:
        """Keeps what is known of each variable's slots.

        Raises:
            ValueError: If a compact variable has slots of which nothing is known.
        """
        for record in records:
            position = self._state.index.position(record.variable)
            self._state.records.setdefault(position, []).append(record)
        recorded = {id(record.slot) for record in records}
        shapes = {tuple(p.inner_variable.shape) for p in self._state.partitions if isinstance(p, CompactPartition)}
        for base in base_optimizers(self.inner_optimizer):
            for variable in base.variables:
                if id(variable) not in recorded and tuple(variable.shape) in shapes:
                    raise ValueError(
                        "Slots must be made by `add_optimizer_variables` or `add_variable_from_reference` for "
                        f"state='compact'. Received: {variable.path!r} of {type(base).__name__}, made otherwise"
                    )

    def _find_slots(self, positions: set[int] | None = None) -> None:
        """Prepares for entries that are unfrozen later.

        Args:
            positions: Of the variables to look at; by default all.
        """
        for base in base_optimizers(self.inner_optimizer):
            seeding = self._state.seedings.setdefault(id(base), Seeding(base))
            for variable, slots in slots_of(base):
                position = self._state.index.find_position(variable)
                if position is None or (positions is not None and position not in positions):
                    continue
                part = self._state.partitions[position]
                if isinstance(part, CompactPartition):
                    states = entry_states(base, self._state.records.get(position, []), slots)
                    own: VariableSlots = CompactSlots(
                        variable, part.variable, base, slots, self.unfreeze_policy, states
                    )
                elif isinstance(part, FullPartition):
                    own = VariableSlots(variable, base, slots, self.unfreeze_policy)
                else:
                    continue
                self._state.slots[position] = own
                if own.seeded:
                    zeros = np.zeros(own.unseeded_bytes, np.uint8)
                    own.unseeded = self._make_state(variable, zeros, "unseeded", f"unseeded {position}")
                    seeding.add(variable, own)

    def _find_fused(self) -> None:
        """Finds out which variables can be updated in one pass."""
        self._state.updates = {}
        for base in base_optimizers(self.inner_optimizer):
            formula = formula_of(base, self.inner_optimizer)
            updates: FusedUpdates | None = None
            if isinstance(formula, UpdateFormula):
                seeding = self._state.seedings.setdefault(id(base), Seeding(base))
                updates = FusedUpdates(self.inner_optimizer, base, formula, seeding)
            for number, variable in enumerate(trained_variables(base)):
                position = self._state.index.find_position(variable)
                if position is None:
                    continue
                part = self._state.partitions[position]
                why = formula if isinstance(formula, str) else fused.reason_against(part)
                if why or updates is None:
                    self._state.updates[position] = why
                    continue
                self._state.updates[position] = updates
                updates.add(part, number, self._state.slots.get(position))

    @property
    def fused(self) -> bool:
        """Whether variables are updated in one native pass where that can be; may be set at any time.

        Functions that were traced before go on as they were traced.
        """
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        _check_fused(fused)
        self._fused = fused

    def _update_notes(self) -> list[str] | None:
        if not self._fused:
            return None
        notes = []
        for position, part in enumerate(self._state.partitions):
            if isinstance(part, PermanentPartition):
                notes.append("")  # it says enough
                continue
            updates = self._state.updates.get(position, fused.reason_against(part))
            if isinstance(updates, str):
                notes.append(f"not fused: {updates}")
            elif why := updates.reason_against or fused.reason_against(part):
                notes.append(f"not fused: {why}")
            else:
                notes.append("fused")
        return notes

    def _build_once(self, variables: Sequence[Variable]) -> None:
        if not self._state.built:
            with keras.name_scope(self.name):
                self.build(variables)

    # Compact state.

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
            RuntimeError: If called while a function is traced.
        """
        self._check_built("repack")
        if self.state != "compact":
            raise ValueError(f"`repack` must be called with state='compact'. Received: state={self.state!r}")
        if not tf.executing_eagerly():
            raise RuntimeError("`repack` must be called outside of `tf.function`. Received: a call while one is traced")
        pairs = masking.mask_pairs(masks)
        compact.check_capacity(capacity)
        index, parts = self._state.index, self._state.partitions
        new_masks = {i: part.mask for i, part in enumerate(parts)}
        given_masks: set[int] = set()
        for target, mask in pairs:
            rule = rules.Rule("register_mask", target, mask)
            for position in index.find(rule.target):
                given_masks.add(position)
                rules.check_maskable_dtype(index.variables[position])
                new_masks[position] = rule.apply_to(new_masks[position])
        maskable = self._by_position(self._state.maskable, index)
        given = self._state.capacity if capacity is None else capacity
        named, everywhere = self._capacities(given, index)
        plans: dict[int, partition.Plan] = {}
        for i, part in enumerate(parts):
            if not isinstance(part, MaskedPartition):
                part.fit(new_masks[i])
                continue
            if isinstance(part, CompactPartition) and i not in given_masks:
                part.check_not_pending()
            plans[i] = compact.choose(
                part.variable,
                new_masks[i],
                maskable=maskable.get(i),
                capacity=named.get(i, everywhere),
                named=i in named,
                at_least=capacity is None,
            )
        self._state.capacity = dict(given) if isinstance(given, Mapping) else given
        with strategy_of(self).scope():
            for position, plan in plans.items():
                self._rebuild(position, plan)
            self._after_change(set(plans))

    def _rebuild(self, position: int, plan: partition.Plan) -> None:
        """Gives one variable the way, layout, room and mask of a plan, and moves its slots."""
        old = self._state.partitions[position]
        assert isinstance(old, MaskedPartition) and plan.mask is not None
        before, new = old.mask, plan.mask
        same_room = not isinstance(old, CompactPartition) or old.capacity == plan.capacity
        if (old.way, old.layout) == (plan.way, plan.layout) and same_room:
            self._before_change(position, new)
            old.assign(new)
            return
        slots = self._state.slots.get(position)
        optimizer, states = self._states_of(position)
        elements = layout.elementwise(new.shape)
        waiting = np.zeros(old.size, bool)
        if isinstance(old, CompactPartition):
            if optimizer is not None and step_count(optimizer):
                waiting[positions_of(new & ~before, elements)] = True
            entries, everything = positions_of(before, elements), np.arange(old.size)
            if slots is not None and slots.unseeded is not None:
                waiting = unpacked(slots.waiting(), entries, waiting)
            values = [
                unpacked(state.numpy(), entries, state.initial(old.variable, (old.size,), everything))
                for state in states
            ]
            if isinstance(slots, CompactSlots) and (left := slots.left(before)):
                inner = np.arange(old.layout.inner)
                of_left = (left[0][:, None] * old.layout.inner + inner).reshape(-1)
                for all_of, some in zip([*values, waiting], left[1], strict=False):
                    all_of[of_left] = some.reshape(-1)
        else:
            self._before_change(position, new)
            if slots is not None and slots.unseeded is not None:
                waiting = slots.waiting().reshape(-1)
            values = [state.numpy().reshape(-1) for state in states]

        part = self._make_partition(old.variable, plan, position)
        self._state.partitions[position] = part
        assert part.inner_variable is not None and old.inner_variable is not None
        replace_variable(self.inner_optimizer, old.inner_variable, part.inner_variable)
        target = positions_of(new, elements) if isinstance(part, CompactPartition) else None
        shape = tuple(part.inner_variable.shape)
        for state, of_all in zip(states, values, strict=True):
            reshape_variable(state.slot, packed_into(of_all, target, shape), old.variable)
        self._find_slots({position})
        self._find_fused()
        slots = self._state.slots.get(position)
        if slots is not None and slots.unseeded is not None:
            slots.unseeded.assign(packing.pack_bits(packed_into(waiting, target, shape)))
        # What was traced before has the old mask: it must not go on with it.
        empty_variable(old.bits)

    def _states_of(self, position: int) -> tuple[keras.optimizers.Optimizer | None, list[EntryState]]:
        """The optimizer that trains a variable, and all that it keeps for its entries."""
        records = self._state.records.get(position, [])
        for base in base_optimizers(self.inner_optimizer):
            for variable, slots in slots_of(base):
                if self._state.index.find_position(variable) == position:
                    return base, entry_states(base, records, slots)
        return None, []

    def _slot_bytes(self) -> list[tuple[int, int]] | None:
        if self.state == "full":
            return None
        sizes = []
        for i, part in enumerate(self._state.partitions):
            slots = [record.slot for record in self._state.records.get(i, [])]
            widths = [tf.as_dtype(slot.dtype).size for slot in slots]
            own = sum(math.prod(slot.shape) * width for slot, width in zip(slots, widths, strict=True))
            sizes.append((own, part.size * sum(widths)))
        return sizes

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
            self._check_built("apply(grads) without variables")
            trainable_variables = self._state.index.variables
        variables = list(trainable_variables)
        masking.check_lengths(grads, variables)
        self._build_once(variables)
        self._check_stated()
        self._state.traced_writes.watch(self._state.partitions)
        with guarded(), keras.name_scope(self.name), tf.control_dependencies(self._masks_in_use()):
            pairs: list[tuple[Gradient | None, Variable]] = []
            remembered: dict[int, Any] = {}
            rows: dict[int, tf.Tensor] = {}
            steps = self._fused_steps(variables)
            general: set[int] = set()
            with_gradient = {
                id(self._partition(variable))
                for variable, gradient in zip(variables, grads, strict=True)
                if gradient is not None
            }
            for variable, gradient in zip(variables, grads, strict=True):
                part = self._partition(variable)
                step, inner, snapshot = steps.get(id(part)), part.inner_variable, None
                if gradient is not None and step is not None and step.takes(part, gradient):
                    gradient, inner, snapshot = step.take(part, gradient)
                elif gradient is not None:
                    gradient, snapshot = part.take_and_remember(gradient)
                    general.add(id(part))
                    if self._writes_only_rows(part, gradient):
                        rows[id(part)] = gradient.indices
                if snapshot is not None:
                    remembered[id(part)] = snapshot
                if inner is not None:
                    pairs.append((gradient, inner))
            if not pairs:
                # All are frozen for good; the inner optimizer would not count the step.
                step_counter(self.inner_optimizer).assign_add(1)
                return
            fused_alone = steps.keys() - general - remembered.keys()
            written = [part for part in self._written_in_step(with_gradient) if id(part) not in fused_alone]
            with ExitStack() as around:
                around.enter_context(FrozenEntries(written, self._averages(), rows, remembered))
                for seeding in self._state.seedings.values():
                    around.enter_context(seeding.step())
                for step in {id(step): step for step in steps.values()}.values():
                    around.enter_context(step.running())
                if (call := _applying_pairs.get()) is not None and call.optimizer is self:
                    call.result = self.inner_optimizer.apply_gradients(pairs)
                else:
                    self.inner_optimizer.apply([gradient for gradient, _ in pairs], [inner for _, inner in pairs])

    def _fused_steps(self, variables: Sequence[Variable]) -> dict[int, FusedStep]:
        """By a partition's `id`: the step that can update its variable in one pass.

        Args:
            variables: Those that there are gradients of.
        """
        if not self._fused:
            return {}
        # One that is named twice is updated twice, one after the other.
        counts = Counter(map(self._state.index.position, variables))
        twice = {position for position, count in counts.items() if count > 1}
        all_updates = {id(each): each for each in self._state.updates.values() if isinstance(each, FusedUpdates)}
        steps = {key: updates.step() for key, updates in all_updates.items() if not updates.reason_against}
        found = {
            position: steps[id(updates)]
            for position, updates in self._state.updates.items()
            if id(updates) in steps and position not in twice
        }
        parts = self._state.partitions
        # What is asked of a variable may be set late, too.
        return {id(parts[i]): step for i, step in found.items() if not fused.reason_against(parts[i])}

    def _masks_in_use(self) -> list[tf.Operation]:
        """Fails, as a traced step begins, where `repack` took away a mask that it was traced with."""
        if self.state == "full" or tf.executing_eagerly():
            return []
        message = "the masks must be in use still: a function that was traced before `repack` must be traced again"
        shapes = [shape_now(part.bits) for part in self._masked_partitions() if part.layout.packed_bytes]
        if not shapes:
            return []
        # Of all at once: a handful of operations for each variable adds up. And int32, whose minimum is taken where
        # TensorFlow keeps it, in the host's memory; `assert_equal` waits for a GPU.
        return [tf.debugging.Assert(tf.reduce_min(tf.concat(shapes, 0)) > 0, [message])]

    def _written_in_step(self, with_gradient: Collection[int]) -> list[Partition]:
        """The partitions of variables that the inner optimizer may write in a step, or read the inner variables of.

        No others are remembered and put back: another thread may be in the middle of a step of them.

        Args:
            with_gradient: The partitions, by `id`, whose variables it is given with a gradient.
        """
        writes_others = not writes_only_given(self.inner_optimizer)
        averages = any(base.use_ema for base in base_optimizers(self.inner_optimizer))
        return [
            part
            for part in self._state.partitions
            if id(part) in with_gradient
            or writes_others
            # Averages are made of inner variables, which are filled as they are remembered.
            or (averages and part.way == "compact")
        ]

    def _frozen_entries(self) -> FrozenEntries:
        return FrozenEntries(self._state.partitions, self._averages())

    def _writes_only_rows(self, part: Partition, gradient: Gradient) -> bool:
        """Whether a step that goes the general way can write no row but those that a gradient names."""
        return (
            isinstance(gradient, tf.IndexedSlices)
            # Replicas also write the rows of each other's gradients.
            and strategy_of(self).num_replicas_in_sync == 1
            and writes_only_rows_with_gradients(self.inner_optimizer)
            and part.way == "full"
            and getattr(part.variable, "constraint", None) is None
            # XLA scatters 16-bit floats by way of float32: NaNs change in rows it does not even name.
            and tf.as_dtype(part.variable.dtype).size >= 4
        )

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
        given = [self._partition(variable).inner_variable for variable in var_list]
        inner = [variable for variable in given if variable is not None]
        with self._frozen_entries():
            self.inner_optimizer.finalize_variable_values(inner)

    @tf.autograph.experimental.do_not_convert
    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss, scaled as the inner optimizer wants it."""
        return self.inner_optimizer.scale_loss(loss)

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's; whatever wraps this one switches it off by setting `None`."""
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        # The base class sets its own default before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.loss_scale_factor = factor

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

    def exclude_from_weight_decay(
        self, var_list: Sequence[Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from the inner optimizer's weight decay; see Keras."""
        for optimizer in base_optimizers(self.inner_optimizer):
            optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    # State.

    @property
    def variables(self) -> list[keras.Variable]:
        """The inner optimizer's variables; masks are state of their own."""
        return self.inner_optimizer.variables

    def _checkpointed(self) -> bytes:
        """What `tf.train.Checkpoint` saves beside variables."""
        return self._stored().to_bytes()

    def _restored(self, stored: Stored) -> None:
        """Takes masks from a checkpoint, before TensorFlow restores the slots.

        Raises:
            ValueError: If they do not fit. Nothing has changed then.
        """
        if self._state.built:
            found, _ = self._find(Loaded(stored), self._state.index, masking.Changes())
            for position, mask in found.items():
                part = self._state.partitions[position]
                here = part.get_config() if isinstance(part, CompactPartition) else {}
                if mask.mask is not None and mask.way and (mask.way == "compact" or here):
                    there: dict[str, Any] = {"way": mask.way, "layout": list(mask.mask.layout)}
                    if mask.way == "compact":
                        there["capacity"] = mask.capacity
                    if there != here:
                        raise ValueError(
                            "A checkpoint of compact state must be restored into an optimizer with the same layout "
                            f"and room for each variable. Received: {there} for {part.path!r}, which is "
                            f"{here or part.get_config()}. Restore it before the optimizer is built, which then takes "
                            "both from the checkpoint, or load a `.weights.h5` file, whose slots are converted"
                        )
        self._take_stored(stored)

    def _new_load(self, stored: Stored, skip: bool) -> stored_state.Load:
        """How the state of the optimizers inside is found in what a file holds; built."""
        found, _ = self._find(Loaded(stored), self._state.index, masking.Changes())
        # Shapes do not count: a slot that does not fit is told from one of no variable.
        own_paths = self._state.index.named
        others = sorted(paths_of_model(self) - set(self._state.index.paths))
        pairs = saved_names.pair(
            [(name, None) for name, _ in stored.variables], [*own_paths, *((path, None) for path in others)]
        )
        found_at = {name: pairs.found.get(i, -1) for i, (name, _) in enumerate(stored.variables)}
        positions = {name: i if i < len(own_paths) else -1 for name, i in found_at.items()}
        own, saved = {}, {}
        for number, (part, names) in enumerate(self._own_names()):
            own[id(part)] = names
            if number < len(stored.slots) and stored.slots[number][0] == type(part).__name__:
                saved[id(part)] = [
                    (None if name is None else positions.get(name, -1), slot) for name, slot in stored.slots[number][1]
                ]

        def fit(array: np.ndarray, slot: keras.Variable, position: int | None) -> np.ndarray | None:
            if position is None or not isinstance(part := self._state.partitions[position], MaskedPartition):
                return array if array.shape == tuple(slot.shape) else None
            return fitted_slot(array, slot, part, found.get(position))

        return stored_state.Load(skip, own, saved, fit)

    def _begin_load(self, stored: Stored, skip: bool, masks: Mapping[int, Mask] | None = None) -> None:
        load = stored_state.Load(skip)
        if self._state.built:
            load = self._new_load(stored, skip)
            load.undo = self._undo_of(stored, skip) if masks is None else [functools.partial(self._unload, masks)]
        load.take_masks = self._load
        stored_state.begin(load, self.inner_optimizer)

    def _refuse_load(self) -> None:
        stored_state.begin(stored_state.Load(False, refused=True), self.inner_optimizer)

    def _load_bare(self, arrays: list[np.ndarray], skip: bool) -> None:
        stored_state.load_bare(self.inner_optimizer, arrays)

    def _waits_to_load(self, stored: Stored) -> bool:
        # With compact state all variables would have full state while nothing says what is frozen.
        stated = any(mask.freezes for mask in stored.masks)
        return self.state == "compact" and not stated and not stored.rules and not self._state.rules

    def _unload(self, masks: Mapping[int, Mask]) -> None:
        """Gives variables the masks that they would have if the optimizer had been built without a load.

        Args:
            masks: By position; entries of other variables are trainable.
        """
        changes = masking.Changes()
        for position, part in enumerate(self._state.partitions):
            if not isinstance(part, MaskedPartition):
                continue
            mask = masks.get(position, Mask.trainable(tuple(part.variable.shape)))
            try:
                changes.masks[position] = part.fit(mask)
            except ValueError:
                # No room in compact state, which was made for the file's masks.
                raise ValueError(
                    f"The masks of a refused file could not be taken back: compile with a new optimizer. {part.path!r} "
                    "has no room in compact state for what was trainable before"
                ) from None
        self._state.stated = dict.fromkeys(masks, "call")
        self._set_masks(changes.masks)

    def _undo_of(self, stored: Stored, skip: bool) -> list[Callable[[], None]]:
        """What takes a load back: calls that set everything that it may change to what it is now."""
        undo: list[Callable[[], None]] = []
        changes = self._changes([Loaded(stored, skip), *rules_config.from_config(stored.rules)], bool(stored.rules))
        stated, awaiting = dict(self._state.stated), set(self._state.awaiting)

        def set_back(part: MaskedPartition, mask: Mask, values: list[tuple[Any, np.ndarray]]) -> None:
            part.assign(mask)
            for variable, value in values:
                variable.assign(value)

        def note_back() -> None:
            self._state.stated, self._state.awaiting = stated, awaiting
            self._after_load()

        for position in changes.masks:
            part = self._state.partitions[position]
            if isinstance(part, MaskedPartition) and not part.pending:
                slots = self._state.slots.get(position)
                kept = [record.slot for record in self._state.records.get(position, [])]
                if slots is not None:
                    kept += [state for _, state in slots.resettable if not any(state is each for each in kept)]
                    kept += [slots.unseeded] if slots.unseeded is not None else []
                values = [(variable, numpy_of(variable)) for variable in kept]
                undo.append(functools.partial(set_back, part, part.mask, values))
        return [note_back, *undo]

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
            "capacity": self._state.capacity,
            "fused": self.fused,
        }
        return config | self._mask_config()

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "MaskedOptimizer":
        """An optimizer from `get_config`, with the same rules, masks, ways and layouts.

        Masks that the config left out must be loaded or registered before it trains.
        """
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        of_masks: dict[str, Any] = {name: config.pop(name) for name in ("partitions", "rules") if name in config}
        optimizer = cls(inner, **config)
        optimizer._set_config(of_masks)
        return optimizer


@keras.saving.register_keras_serializable(package="freezeops")
class MaskedLossScaleOptimizer(MaskedOptimizer, keras.optimizers.LossScaleOptimizer):
    """What `MaskedOptimizer(LossScaleOptimizer(...))` gives.

    Only so that `compile` sees a `LossScaleOptimizer` under `mixed_float16` and does
    not wrap another one around; all it does comes from `MaskedOptimizer`.
    """


def _guard_of(optimizer: Any) -> AbstractContextManager | None:
    """What keeps frozen entries while something else writes the variables of an optimizer.

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
    masking.check_arguments(masks, maskable, _INNER_ARGUMENTS, kwargs)
    if state not in ("full", "compact"):
        raise ValueError(f"`state` must be 'full' or 'compact'. Received: state={short(state)}")
    _check_fused(fused)
    compact.check_capacity(capacity)
    if state == "compact":
        check_elementwise(inner_optimizer)
    elif capacity is not None:
        raise ValueError(f"`capacity` must be None with state='full'. Received: capacity={short(capacity)}")
    if unfreeze_policy not in unfreezing.POLICIES:
        raise ValueError(
            f"`unfreeze_policy` must be one of {unfreezing.POLICIES}. Received: "
            f"unfreeze_policy={short(unfreeze_policy)}"
        )


def _check_fused(fused: Any) -> None:
    if not isinstance(fused, bool):
        raise TypeError(f"`fused` must be a bool. Received: fused={short(fused)}")
