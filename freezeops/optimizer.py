"""`MaskedOptimizer`: freezes entries around any Keras optimizer."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import quote, unquote

import keras
import numpy as np
import tensorflow as tf

from freezeops import inner_state, keras_internals, layout, naming, partition, report, rules, unfreezing
from freezeops.keras_internals import Variable
from freezeops.mask import Mask
from freezeops.partition import FullPartition, Partition, PermanentPartition, UnmaskedPartition
from freezeops.rules import Rule
from freezeops.slots import slots_of
from freezeops.transforms import Gradient
from freezeops.unfreezing import Seeding, VariableSlots

_INNER_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


class _State:
    """What the optimizer knows of its variables; plain, so that Keras tracks none of it twice."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.index = rules.VariableIndex([])
        self.partitions: list[Partition] = []
        self.saved: dict[str, dict[str, Any]] = {}
        self.loaded: dict[str, np.ndarray] = {}
        self.slots: dict[int, VariableSlots] = {}


@keras.saving.register_keras_serializable(package="freezeops")
class MaskedOptimizer(keras.optimizers.Optimizer):
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
        masks: Optional mapping of path patterns to masks, as by `register_mask`.
        state: `"full"`: the inner optimizer's slots have their variable's shape.
            (`"compact"` is not implemented yet.)
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
            are kept in any case.
        name: Optional name.

    Raises:
        ValueError: If an argument belongs to the inner optimizer, or is unknown.
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

    def __new__(cls, inner_optimizer: Any = None, *args: Any, **kwargs: Any) -> "MaskedOptimizer":
        """Makes a `MaskedLossScaleOptimizer` around a `LossScaleOptimizer`."""
        if cls is MaskedOptimizer and isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            cls = MaskedLossScaleOptimizer
        return super().__new__(cls)

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        masks: Mapping[Any, Any] | None = None,
        state: str = "full",
        maskable: Mapping[str, str] | None = None,
        unfreeze_policy: unfreezing.Policy = "seed",
        name: str | None = None,
        **kwargs: Any,
    ):
        _check_arguments(inner_optimizer, masks, state, maskable, unfreeze_policy, kwargs)
        keras_internals.check_strategy(tf.distribute.get_strategy())
        # Not `super()`: in `MaskedLossScaleOptimizer` that would be the `LossScaleOptimizer`.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        for part in keras_internals.wrapped_optimizers(inner_optimizer):
            inner_state.store_once_and_check(part)
        self.state = state
        self.unfreeze_policy = unfreeze_policy
        self._maskable = _Constant(dict(maskable or {}))
        self._state = _State()
        # What `tf.train.Checkpoint` saves: by position, as it saves the slots.
        self._masks = tf.Module()
        self.register_masks(masks or {})

    # Masks.

    def register_mask(self, target: Any, mask: Any) -> None:
        """Replaces the masks of variables.

        Args:
            target: A variable, a layer or model (its trainable variables), a path
                pattern (`re.fullmatch` on the variable's path or on its tail after
                a `/`), or a list of those.
            mask: `fz.Mask`, or array-like of booleans of the variable's rank, where
                axes of length 1 broadcast, or a scalar. True = trainable.

        Raises:
            TypeError: If `mask` is not boolean, or `target` of no known kind.
            ValueError: If the mask does not fit, or the target is unknown,
                ambiguous or not of a floating dtype. Nothing has changed then.
        """
        self._add(Rule("register_mask", target, mask))

    def freeze(self, target: Any, where: Any = None, permanent: bool = False) -> None:
        """Freezes entries.

        Args:
            target: As for `register_mask`. Freezing a layer with state that its
                forward pass changes (BatchNormalization) warns that this still moves.
            where: The entries to freeze: a boolean array (True = freeze), an index
                expression such as `np.s_[:10, 3]`, or integer indices along the
                first axis. Every entry by default.
            permanent: Leave the variable out of the inner optimizer altogether: no
                slots and no cost, and no way to unfreeze. Only before the optimizer
                is built, and only for whole variables.

        Raises:
            TypeError: If `where` is a `Mask`, or of no known kind.
            ValueError: As for `register_mask`.
            IndexError: If an index is outside of the variable.
        """
        if permanent and where is not None:
            raise ValueError(
                f"`where` must be None with `permanent=True`, which freezes whole variables. Received: where={where!r}"
            )
        rule = Rule("freeze", target, where, permanent)
        self._add(rule)
        rules.warn_of_moving_state(rule)

    def unfreeze(self, target: Any, where: Any = None) -> None:
        """Makes entries trainable; arguments and errors as for `freeze`."""
        self._add(Rule("unfreeze", target, where))

    def train_only(self, target: Any, where: Any) -> None:
        """Makes entries trainable and freezes every other entry of those variables.

        Arguments and errors as for `freeze`.
        """
        self._add(Rule("train_only", target, where))

    def mask_for(self, variable: Variable) -> Mask:
        """The mask of a variable as it is now.

        Args:
            variable: A variable that the optimizer knows; before it is built, any.

        Returns:
            An `fz.Mask`.

        Raises:
            ValueError: If the optimizer does not know the variable.
        """
        if not self.built:
            return rules.mask_before_build(variable, self._state.rules)
        return self._partition(variable).mask

    def masks_by_path(self) -> dict[str, Mask]:
        """The mask of every variable as it is now, by the variable's path.

        Raises:
            ValueError: If the optimizer is not built, or two variables have one path.
        """
        self._check_built("masks_by_path")
        paths = self._state.index.paths
        if len(set(paths)) < len(paths):
            twice = sorted({path for path in paths if paths.count(path) > 1})
            raise ValueError(f"Every variable must have a path of its own. Received: {twice} more than once")
        return {part.path: part.mask for part in self._state.partitions}

    def register_masks(self, masks: Mapping[Any, Any]) -> None:
        """`register_mask` for several targets at once: all of them or, on an error, none.

        Args:
            masks: Mapping of targets to masks.
        """
        self._add(*(Rule("register_mask", t, m) for t, m in masks.items()))

    @property
    def density(self) -> float:
        """Trainable entries / all entries, over the float variables of the built optimizer."""
        self._check_built("density")
        parts = [part for part in self._state.partitions if tf.as_dtype(part.variable.dtype).is_floating]
        size = sum(part.size for part in parts)
        return sum(part.mask.count() for part in parts) / size if size else 1.0

    def summary(self, console: Any = None) -> None:
        """Prints a table: variable, shape, frozen, density, mask bytes, way.

        Args:
            console: `rich.console.Console` to print to. Defaults to standard output.
        """
        if self.built:
            report.print_summary(self.name, self._state.partitions, console)
        else:
            report.print_rules(self.name, self._state.rules, console)

    @tf.autograph.experimental.do_not_convert
    def mask_gradients(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Variable]
    ) -> list[Gradient | None]:
        """Masks gradients with the live masks, for people who clip by themselves.

        `apply` masks by itself; masking twice changes nothing.

        Args:
            gradients: Gradients; `None` stays `None`.
            variables: Their variables. They build the optimizer where it is not.

        Returns:
            A list of gradients with +0.0 in the frozen entries.

        Raises:
            ValueError: If the lists differ in length or a variable is unknown.
        """
        gradients, variables = list(gradients), list(variables)
        _check_lengths(gradients, variables)
        self._build_once(variables)
        return [
            None if gradient is None else self._partition(variable).take(gradient)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    def _add(self, *new_rules: Rule) -> None:
        """Keeps rules for later, or carries them out: wholly or, on an error, not at all."""
        if not self.built:
            for rule in new_rules:
                rules.check_before_build(rule)
            self._state.rules += new_rules
            return
        if not tf.executing_eagerly():
            raise RuntimeError(
                "Masks must be changed outside of `tf.function`, for example from a callback. "
                f"Received: {new_rules[0].action}() while a function is traced"
            )
        changes: dict[int, Mask] = {}
        for rule in new_rules:
            for position in self._state.index.find(rule.target):
                part = self._state.partitions[position]
                if rule.permanent and part.way != "permanent":
                    raise ValueError(
                        "`permanent` must be used before the optimizer is built. Received: "
                        f"permanent=True for {part.path!r}, for which the inner optimizer has slots"
                    )
                mask = changes.get(position, part.mask)
                changes[position] = part.fit(rule.apply_to(mask))
        for position, mask in changes.items():
            part = self._state.partitions[position]
            if isinstance(part, FullPartition) and position in self._state.slots:
                self._state.slots[position].change(part.mask, mask, part.layout)
            part.assign(mask)
        # What was accumulated for an entry that is frozen now must neither be applied
        # nor count in a norm.
        for variable, accumulator in keras_internals.accumulators(self.inner_optimizer):
            if self._state.index.position(variable) in changes:
                self._partition(variable).clear_accumulator(accumulator)
        for variable, average in keras_internals.average_slots(self.inner_optimizer):
            if self._state.index.position(variable) in changes:
                self._partition(variable).put_into_average(average)

    # Building.

    def build(self, variables: Sequence[Variable]) -> None:
        """Creates the masks and builds the inner optimizer.

        Args:
            variables: The trainable variables of the model.

        Raises:
            ValueError: If a rule matches nothing or does not fit; nothing was
                created then.
        """
        if scaler := keras_internals.loss_scaler_that_builds(self):
            keras_internals.mask_before_loss_scaling(scaler, self._mask_for_scaler)
            inner_state.store_once_and_check(scaler)
        if self.built:
            return
        keras_internals.check_strategy(tf.distribute.get_strategy())
        variables = list(variables)
        index = rules.VariableIndex(variables)
        plans = self._plan(index)
        inner_variables = [variable for variable, plan in zip(variables, plans, strict=True) if plan.way != "permanent"]
        if not self.inner_optimizer.built:
            # Not under Keras's `no_automatic_dependency_tracking`, as its own wrapper builds: Nadam's and
            # Adafactor's state would not be tracked and not be saved.
            self.inner_optimizer.build(inner_variables)
        self._state.partitions = [
            self._make_partition(variable, plan, position)
            for position, (variable, plan) in enumerate(zip(variables, plans, strict=True))
        ]
        self._state.index = index
        self._find_slots()
        with tf.init_scope():
            for part in keras_internals.wrapped_optimizers(self.inner_optimizer):
                inner_state.assign_waiting(part)
            if self._state.loaded:
                self._assign_loaded()
        keras.optimizers.Optimizer.build(self, variables)
        keras_internals.guard_swaps(_guard_of)

    def _mask_for_scaler(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Variable] | None
    ) -> list[Gradient | None]:
        known = self._state.index.variables
        return self.mask_gradients(gradients, known if variables is None else variables)

    def _plan(self, index: rules.VariableIndex) -> list[partition.Plan]:
        """What becomes of each variable, with nothing changed yet."""
        maskable: dict[int, str] = {}
        for pattern, value in self._maskable.value.items():
            maskable.update(dict.fromkeys(index.find(pattern), value))
        masks: dict[int, Mask] = {}
        permanent: set[int] = set()
        for rule in self._state.rules:
            for position in index.find(rule.target):
                variable = index.variables[position]
                rules.check_maskable_dtype(variable)
                start = masks.get(position, Mask.trainable(tuple(variable.shape)))
                masks[position] = rule.apply_to(start)
                if rule.permanent:
                    permanent.add(position)
                if position in permanent and masks[position].count():
                    raise ValueError(
                        "A variable that was frozen with `permanent=True` must stay frozen. "
                        f"Received: {rule.action}() of {index.paths[position]!r}"
                    )
        if permanent and self.inner_optimizer.built:
            raise ValueError(
                "`permanent` must be used before the inner optimizer is built. Received: "
                f"permanent=True for {[index.paths[i] for i in sorted(permanent)]}"
            )
        saved = self._saved_partitions(index)
        return [
            partition.choose(variable, masks.get(i), i in permanent, maskable.get(i), saved[i])
            for i, variable in enumerate(index.variables)
        ]

    def _saved_partitions(self, index: rules.VariableIndex) -> list[dict[str, Any] | None]:
        """Way and layout of each variable from the config that this was made from, if any."""
        positions = naming.match(list(self._state.saved), naming.unique(index.paths))
        if positions is None:
            return [None] * len(index.paths)
        saved = list(self._state.saved.values())
        return [saved[position] for position in positions]

    def _make_partition(self, variable: Variable, plan: partition.Plan, position: int) -> Partition:
        if plan.way == "permanent":
            return PermanentPartition(variable)
        if plan.way == "unmasked":
            return UnmaskedPartition(variable, plan.reason)
        assert plan.layout is not None and plan.mask is not None
        bits = self._make_bits(variable, plan.mask.packed, "mask", str(position))
        return FullPartition(variable, plan.layout, bits)

    def _make_bits(self, variable: Variable, packed: np.ndarray, what: str, key: str) -> keras.Variable:
        """A `uint8` variable beside one of the model's."""
        with (
            keras.name_scope(self.name),
            self._distribution_strategy.extended.colocate_vars_with(keras_internals.tf_variable(variable)),
        ):
            path = keras_internals.variable_path(variable).replace("/", "_")
            bits = keras_internals.byte_variable(packed, f"{path}_{what}")
        self._masks._track_trackable(bits, key)
        return bits

    def _find_slots(self) -> None:
        """Prepares for entries that are unfrozen later."""
        for base in keras_internals.base_optimizers(self.inner_optimizer):
            seeding = Seeding()
            for variable, slots in slots_of(base):
                position = self._state.index.find_position(variable)
                if position is None or not isinstance(self._state.partitions[position], FullPartition):
                    continue
                own = VariableSlots(variable, base, slots, self.unfreeze_policy)
                self._state.slots[position] = own
                if own.seeded:
                    zeros = np.zeros(own.unseeded_bytes, np.uint8)
                    own.unseeded = self._make_bits(variable, zeros, "unseeded", f"unseeded {position}")
                    seeding.add(variable, own)
                    keras_internals.before_updates(base, seeding)

    def _build_once(self, variables: Sequence[Variable]) -> None:
        if not self.built:
            with keras.name_scope(self.name):
                self.build(variables)

    def _check_built(self, what: str) -> None:
        if not self.built:
            raise ValueError(
                f"The optimizer must be built before `{what}` is known: call `build(variables)` "
                f"or train a step first. Received: {self.name!r}, which is not built"
            )

    def _partition(self, variable: Variable) -> Partition:
        return self._state.partitions[self._state.index.position(variable)]

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
        _check_lengths(grads, variables)
        self._build_once(variables)
        with keras.name_scope(self.name):
            masked = self.mask_gradients(grads, variables)
            pairs = [
                (gradient, inner)
                for gradient, variable in zip(masked, variables, strict=True)
                if (inner := self._partition(variable).inner_variable) is not None
            ]
            if not pairs:
                # All are frozen for good; the inner optimizer would not count the step.
                keras_internals.step_counter(self.inner_optimizer).assign_add(1)
                return
            with _FrozenEntries(self, self._touched_rows(masked, variables)):
                self.inner_optimizer.apply([gradient for gradient, _ in pairs], [inner for _, inner in pairs])

    def _touched_rows(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Variable]
    ) -> dict[int, tf.Tensor]:
        """By position, the only rows that a step can write, where that is known."""
        if (
            # Replicas also write the rows of each other's gradients.
            self._distribution_strategy.num_replicas_in_sync > 1
            or not keras_internals.writes_only_rows_with_gradients(self.inner_optimizer)
        ):
            return {}
        return {
            self._state.index.position(variable): gradient.indices
            for gradient, variable in zip(gradients, variables, strict=True)
            if isinstance(gradient, tf.IndexedSlices)
            and getattr(variable, "constraint", None) is None
            # XLA scatters 16-bit floats by way of float32: NaNs change in rows it does not even name.
            and tf.as_dtype(variable.dtype).size >= 4
        }

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, grads_and_vars: Any) -> keras.Variable:
        """As `apply`, on `(gradient, variable)` pairs.

        Returns:
            The variable that counts the steps.
        """
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, variables)
        return keras_internals.step_counter(self.inner_optimizer)

    @tf.autograph.experimental.do_not_convert
    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Lets the inner optimizer finalize (EMA), without a change to frozen entries."""
        inner = [variable for variable in var_list if self._partition(variable).inner_variable is not None]
        with _FrozenEntries(self):
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
        for optimizer in keras_internals.base_optimizers(self.inner_optimizer):
            optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    # State.

    @property
    def variables(self) -> list[keras.Variable]:
        """The masks, which entries wait to be seeded, then the inner optimizer's variables."""
        bits = [part.bits for part in self._state.partitions if isinstance(part, FullPartition)]
        unseeded = [slots.unseeded for slots in self._state.slots.values() if slots.unseeded is not None]
        return bits + unseeded + self.inner_optimizer.variables

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of `variables`, in their order.

        Raises:
            ValueError: If the optimizer is not built, or number or shapes differ.
        """
        if not self.built:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that must be built first: call "
                f"`optimizer.build(trainable_variables)`. Received: {self.name!r}, which is not built"
            )
        variables = self.variables
        if len(weights) != len(variables):
            raise ValueError(
                f"`weights` must have one array per variable of the optimizer, {len(variables)}. "
                f"Received: {len(weights)} arrays"
            )
        for variable, weight in zip(variables, weights, strict=True):
            if tuple(variable.shape) != tuple(np.shape(weight)):
                raise ValueError(
                    f"`weights` must have the shapes of `variables`. Received: shape "
                    f"{np.shape(weight)} for {variable.path!r} of shape {tuple(variable.shape)}"
                )
            if variable.dtype == "uint8" and np.asarray(weight).dtype != np.uint8:
                raise ValueError(
                    "`weights` must have packed masks of dtype uint8 where `variables` has masks. Received: "
                    f"dtype={np.asarray(weight).dtype} for {variable.path!r}"
                )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)

    def save_own_variables(self, store: Any) -> None:
        """Saves the masks under their variables' paths; Keras saves the inner optimizer beside.

        Raises:
            ValueError: If rules wait for the optimizer to be built: they would be lost.
        """
        if not self.built and self._state.rules:
            raise ValueError(
                "The optimizer must be built before its masks can be saved: call "
                "`optimizer.build(model.trainable_variables)`. Received: rules for "
                f"{[rule.target for rule in self._state.rules]}, not carried out yet"
            )
        for position, (name, part, unseeded) in enumerate(self._named_partitions()):
            store[f"mask {position:06d} {quote(name, safe='')}"] = part.bits.numpy()
            if unseeded is not None and (waiting := unseeded.numpy()).any():
                store[f"unseeded {position:06d} {quote(name, safe='')}"] = waiting

    def load_own_variables(self, store: Any) -> None:
        """Loads the masks; before the optimizer is built, keeps them until it is.

        A file without any mask, of an optimizer that was saved before it was built,
        changes nothing.

        Raises:
            ValueError: If the file's masks are not those of this optimizer's
                variables; no mask was changed then. (Keras has loaded the model's
                weights before it comes here.)
        """
        keys = sorted(store.keys())
        if strange := [key for key in keys if not key.startswith(("mask ", "unseeded "))]:
            raise ValueError(
                f"The state in a file must be that of a MaskedOptimizer. Received: {strange}, which are no masks"
            )
        if not keys:
            return
        self._state.loaded = {key: np.array(store[key]) for key in keys}
        if self.built:
            self._assign_loaded()

    def _assign_loaded(self) -> None:
        """Sets the masks that were loaded: all of them or, on an error, none."""
        loaded, self._state.loaded = self._state.loaded, {}
        saved: dict[str, dict[str, np.ndarray]] = {"mask": {}, "unseeded": {}}
        for key, packed in loaded.items():
            kind, _, name = key.split(" ", 2)
            saved[kind][unquote(name)] = packed
        own = self._named_partitions()
        positions = naming.match(list(saved["mask"]), [name for name, _, _ in own])
        if positions is None:
            raise ValueError(
                "The masks in a file must be those of the optimizer's variables. Received: "
                f"{list(saved['mask'])}, for an optimizer with {[name for name, _, _ in own]}"
            )
        changes: list[tuple[keras.Variable, np.ndarray]] = []
        for (name, part, unseeded), position in zip(own, positions, strict=True):
            saved_name, packed = list(saved["mask"].items())[position]
            _check_packed(name, packed, part.layout)
            changes.append((part.bits, packed))
            if unseeded is not None:
                elements = layout.elementwise(tuple(part.variable.shape))
                waiting = saved["unseeded"].get(saved_name, np.zeros(elements.packed_bytes, np.uint8))
                _check_packed(name, waiting, elements)
                changes.append((unseeded, waiting))
        for bits, packed in changes:
            bits.assign(packed)

    def _named_partitions(self) -> list[tuple[str, FullPartition, keras.Variable | None]]:
        """What has masks: name, partition, and which entries wait to be seeded."""
        names = naming.unique(self._state.index.paths)
        named = []
        for position, (name, part) in enumerate(zip(names, self._state.partitions, strict=True)):
            if isinstance(part, FullPartition):
                slots = self._state.slots.get(position)
                named.append((name, part, slots.unseeded if slots else None))
        return named

    def get_config(self) -> dict[str, Any]:
        """The configuration: the inner optimizer, and each variable's way and layout.

        Holds no mask bits: those are state, and are saved and loaded as such.
        """
        config: dict[str, Any] = {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "state": self.state,
            "maskable": dict(self._maskable.value),
            "unfreeze_policy": self.unfreeze_policy,
            "partitions": dict(self._state.saved),
        }
        if self.built:
            names = naming.unique(self._state.index.paths)
            config["partitions"] = {
                name: part.get_config() for name, part in zip(names, self._state.partitions, strict=True)
            }
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "MaskedOptimizer":
        """An optimizer from `get_config`, with the same ways and layouts and no entry frozen yet."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        partitions = config.pop("partitions", {})
        optimizer = cls(inner, **config)
        optimizer._state.saved = dict(partitions)
        return optimizer


@keras.saving.register_keras_serializable(package="freezeops")
class MaskedLossScaleOptimizer(MaskedOptimizer, keras.optimizers.LossScaleOptimizer):
    """What `MaskedOptimizer(LossScaleOptimizer(...))` gives.

    Only so that `compile` sees a `LossScaleOptimizer` under `mixed_float16` and does
    not wrap another one around; all it does comes from `MaskedOptimizer`.
    """


class _FrozenEntries:
    """Around anything that writes variables: frozen entries come out as they went in."""

    def __init__(self, optimizer: MaskedOptimizer, rows: Mapping[int, tf.Tensor] | None = None):
        self._optimizer = optimizer
        self._rows = rows or {}

    def __enter__(self) -> None:
        parts = self._optimizer._state.partitions
        self._snapshots = [part.remember(self._rows.get(i)) for i, part in enumerate(parts)]

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None and not tf.executing_eagerly():
            return  # Tracing failed: there is no step to protect.
        optimizer = self._optimizer
        for part, snapshot in zip(optimizer._state.partitions, self._snapshots, strict=True):
            part.put_back(snapshot)
        if error is None:
            for variable, average in keras_internals.average_slots(optimizer.inner_optimizer):
                optimizer._partition(variable).put_into_average(average)


def _guard_of(optimizer: Any) -> AbstractContextManager:
    """What keeps frozen entries while something else writes the variables of an optimizer."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and not isinstance(optimizer, MaskedOptimizer):
        optimizer = optimizer.inner_optimizer
    return _FrozenEntries(optimizer) if isinstance(optimizer, MaskedOptimizer) else nullcontext()


class _Constant:
    """A value that neither Keras nor TensorFlow wraps for tracking."""

    def __init__(self, value: Any):
        self.value = value


def _check_packed(name: str, packed: np.ndarray, mask_layout: layout.Layout) -> None:
    if packed.dtype != np.uint8 or packed.shape != (mask_layout.packed_bytes,):
        raise ValueError(
            f"The mask of {name!r} must be {mask_layout.packed_bytes} bytes for layout {tuple(mask_layout)}. "
            f"Received: an array of dtype={packed.dtype}, shape={packed.shape}"
        )


def _check_lengths(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    if len(gradients) != len(variables):
        raise ValueError(
            "Gradients and variables must match one to one. "
            f"Received: {len(gradients)} gradients and {len(variables)} variables"
        )


def _check_arguments(
    inner_optimizer: Any, masks: Any, state: Any, maskable: Any, unfreeze_policy: Any, kwargs: Mapping[str, Any]
) -> None:
    if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be a keras.optimizers.Optimizer. Received: "
            f"inner_optimizer={inner_optimizer!r} of type {type(inner_optimizer).__name__}"
        )
    if isinstance(inner_optimizer, MaskedOptimizer):
        raise ValueError(
            "`inner_optimizer` must not be a MaskedOptimizer itself: register all masks on one. "
            f"Received: inner_optimizer={inner_optimizer!r}"
        )
    for argument, value in kwargs.items():
        if argument in _INNER_ARGUMENTS:
            raise ValueError(
                f"MaskedOptimizer does not support `{argument}`: it must be set on the "
                f"`inner_optimizer`. Received: {argument}={value!r}"
            )
    if kwargs:
        raise ValueError(f"Arguments must be known ones. Received: {dict(kwargs)}")
    if masks is not None and not isinstance(masks, Mapping):
        raise TypeError(f"`masks` must map path patterns to masks. Received: masks={masks!r}")
    if state == "compact":
        raise NotImplementedError("state='compact' is not implemented yet; use state='full'.")
    if state != "full":
        raise ValueError(f"`state` must be 'full' or 'compact'. Received: state={state!r}")
    if unfreeze_policy not in unfreezing.POLICIES:
        raise ValueError(
            f"`unfreeze_policy` must be one of {unfreezing.POLICIES}. Received: unfreeze_policy={unfreeze_policy!r}"
        )
    if maskable is not None and not isinstance(maskable, Mapping):
        raise TypeError(
            f"`maskable` must map path patterns to one of {layout.MASKABLE}. Received: maskable={maskable!r}"
        )
    for pattern, value in (maskable or {}).items():
        if value not in layout.MASKABLE:
            raise ValueError(
                f"`maskable` must map path patterns to one of {layout.MASKABLE}. "
                f"Received: maskable={{{pattern!r}: {value!r}}}"
            )
