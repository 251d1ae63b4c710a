"""What every kind of `MaskedOptimizer` has: its masks, from the users' calls to the bits and into files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol
from urllib.parse import quote, unquote

import numpy as np
import tensorflow as tf

from freezeops import layout, naming, partition, report, rules
from freezeops.keras_internals import Variable, variable_path
from freezeops.mask import Mask
from freezeops.partition import MaskedPartition, Partition
from freezeops.rules import Rule
from freezeops.traced_writes import TracedWrites, guarded
from freezeops.transforms import Gradient

INNER_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)
"""Arguments that every optimizer takes and that are meant for the inner one."""


class State:
    """What an optimizer knows of its masks; plain, so that nothing in it is tracked twice.

    Args:
        maskable: What the user set aside, by path pattern.
    """

    def __init__(self, maskable: Mapping[str, str] | None = None):
        self.maskable = dict(maskable or {})
        self.built = False
        self.rules: list[Rule] = []
        self.index = rules.VariableIndex([])
        self.partitions: list[Partition] = []
        self.saved: dict[str, dict[str, Any]] = {}
        self.loaded: dict[str, np.ndarray] = {}
        self.traced_writes = TracedWrites()


class _Store(Protocol):
    """A group of a Keras file."""

    def keys(self) -> Iterable[str]: ...
    def __getitem__(self, key: str) -> Any: ...
    def __setitem__(self, key: str, value: Any) -> None: ...


class Masking:
    """The part of a `MaskedOptimizer` that no version of Keras has a say in: a mix-in.

    The class that takes it in sets `name` and `_state`.
    """

    name: str
    _state: State
    _undo_load: Sequence[tuple[Callable[[Any], None], Any]] = ()

    # What the class that takes this in says.

    def build(self, variables: Sequence[Variable]) -> None:
        """Creates the masks and builds the inner optimizer."""
        raise NotImplementedError

    def _build_once(self, variables: Sequence[Variable]) -> None:
        """Builds the optimizer if it is not."""
        if not self._state.built:
            self.build(variables)

    def _before_change(self, position: int, mask: Mask) -> None:
        """Called before a variable's mask is set, when nothing can go wrong any more."""

    def _after_change(self, positions: set[int]) -> None:
        """Called after masks were set."""

    def _after_load(self) -> None:
        """Called after masks were set from a file or from weights."""

    def _bytes_beside(self, position: int) -> dict[str, tuple[Variable, layout.Layout]]:
        """Packed bits of a variable that are saved beside its mask, by a word for them."""
        return {}

    def _update_notes(self) -> list[str] | None:
        """For each variable how it is updated; `None`: not to be shown."""
        return None

    def _slot_bytes(self) -> list[tuple[int, int]] | None:
        """For each variable the bytes of its slots, and what they would be in full state; `None`: not to be shown."""
        return None

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
        rule = Rule("register_mask", target, mask)
        self._add(rule)
        self._state.traced_writes.warn_of_layers(rule)

    def register_masks(self, masks: Mapping[Any, Any]) -> None:
        """`register_mask` for several targets at once: all of them or, on an error, none.

        Args:
            masks: Mapping of targets to masks.
        """
        self._add(*(Rule("register_mask", t, m) for t, m in masks.items()))

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
        self._state.traced_writes.warn_of_layers(rule)

    def unfreeze(self, target: Any, where: Any = None) -> None:
        """Makes entries trainable; arguments and errors as for `freeze`."""
        self._add(Rule("unfreeze", target, where))

    def train_only(self, target: Any, where: Any) -> None:
        """Makes entries trainable and freezes every other entry of those variables.

        Arguments and errors as for `freeze`.
        """
        rule = Rule("train_only", target, where)
        self._add(rule)
        self._state.traced_writes.warn_of_layers(rule)

    def mask_for(self, variable: Variable) -> Mask:
        """The mask of a variable as it is now.

        Args:
            variable: A variable that the optimizer knows; before it is built, any.

        Returns:
            An `fz.Mask`.

        Raises:
            ValueError: If the optimizer does not know the variable.
        """
        if not self._state.built:
            return rules.mask_before_build(variable, self._state.rules)
        return self._partition(variable).mask

    def masks_by_path(self) -> dict[str, Mask]:
        """The mask of every float variable as it is now, by the variable's path.

        Raises:
            ValueError: If the optimizer is not built, or two variables have one path.
        """
        self._check_built("masks_by_path")
        paths = self._state.index.paths
        if len(set(paths)) < len(paths):
            twice = sorted({path for path in paths if paths.count(path) > 1})
            raise ValueError(f"Every variable must have a path of its own. Received: {twice} more than once")
        return {part.path: part.mask for part in self._state.partitions if tf.as_dtype(part.variable.dtype).is_floating}

    @property
    def density(self) -> float:
        """Trainable entries / all entries, over the float variables of the built optimizer."""
        self._check_built("density")
        parts = [part for part in self._state.partitions if tf.as_dtype(part.variable.dtype).is_floating]
        size = sum(part.size for part in parts)
        return sum(part.mask.count() for part in parts) / size if size else 1.0

    def summary(self, console: Any = None) -> None:
        """Prints a table: variable, shape, frozen, density, mask bytes, way.

        With compact state also the bytes of the inner optimizer's slots, and those saved.

        Args:
            console: `rich.console.Console` to print to. Defaults to standard output.
        """
        if self._state.built:
            report.print_summary(self.name, self._state.partitions, console, self._slot_bytes(), self._update_notes())
        else:
            report.print_rules(self.name, self._state.rules, console)

    @tf.autograph.experimental.do_not_convert
    def mask_gradients(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Variable]
    ) -> list[Gradient | None]:
        """Masks gradients with the live masks, for people who clip by themselves.

        The optimizer masks by itself; masking twice changes nothing.

        Args:
            gradients: Gradients; `None` stays `None`.
            variables: Their variables. They build the optimizer where it is not.

        Returns:
            A list of gradients with +0.0 in the frozen entries.

        Raises:
            ValueError: If the lists differ in length or a variable is unknown.
        """
        gradients, variables = list(gradients), list(variables)
        check_lengths(gradients, variables)
        self._build_once(variables)
        return [
            None if gradient is None else self._partition(variable).masked(gradient)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    @tf.autograph.experimental.do_not_convert
    def frozen_entries(self) -> AbstractContextManager[None]:
        """Keeps frozen entries around writes of your own: they come out of the block as they went in, bit for bit.

        For a train step that writes weights itself, as sharpness-aware minimization
        does; trainable entries keep what the block made of them. In eager mode, in
        `tf.function`, under XLA, and in a replica of a strategy, where its own copies are
        kept. Frozen is what is frozen as the block begins; variables that were frozen
        with `permanent=True` are kept whole. In eager mode frozen entries are restored
        after an exception, too. (A traced function that fails half-way stops before they
        are; put the block around its call, then.) Blocks may be nested, and steps of the
        optimizer may lie inside.

        Returns:
            A context manager.

        Raises:
            ValueError: If the optimizer is not built: `build(variables)` does that.

        Example:

        ```python
        with optimizer.frozen_entries():
            for variable in model.trainable_variables:
                variable.assign(tf.clip_by_value(variable, -0.01, 0.01))
        ```
        """
        if not self._state.built:
            raise ValueError(
                "The optimizer must be built before `frozen_entries()` can keep any: call "
                f"`optimizer.build(model.trainable_variables)`. Received: {self.name!r}, which is not built"
            )
        return FrozenBlock(self._state.partitions, self._averages)

    def _averages(self) -> Iterable[tuple[Partition, Variable]]:
        """The slots of moving averages, each with the partition of its variable."""
        raise NotImplementedError

    def _add(self, *new_rules: Rule) -> None:
        """Keeps rules for later, or carries them out: wholly or, on an error, not at all."""
        if not self._state.built:
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
            self._before_change(position, mask)
            self._state.partitions[position].assign(mask)
        self._after_change(set(changes))
        self._state.traced_writes.warn(self._state.partitions)

    # Building.

    def _plan(self, index: rules.VariableIndex, inner_built: bool) -> list[partition.Plan]:
        """What becomes of each variable, with nothing changed yet."""
        maskable = self._by_position(self._state.maskable, index)
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
        if permanent and inner_built:
            raise ValueError(
                "`permanent` must be used before the inner optimizer is built. Received: "
                f"permanent=True for {[index.paths[i] for i in sorted(permanent)]}"
            )
        saved = self._saved_partitions(index)
        return self._choose(index, masks, permanent, maskable, saved)

    def _choose(
        self,
        index: rules.VariableIndex,
        masks: Mapping[int, Mask],
        permanent: set[int],
        maskable: Mapping[int, str],
        saved: Sequence[dict[str, Any] | None],
    ) -> list[partition.Plan]:
        """The plan of each variable, given by position what is asked for."""
        return [
            partition.choose(variable, masks.get(i), i in permanent, maskable.get(i), saved[i])
            for i, variable in enumerate(index.variables)
        ]

    def _by_position(self, by_pattern: Mapping[str, Any], index: rules.VariableIndex) -> dict[int, Any]:
        """Settings of variables, given by path pattern; the last that matches counts."""
        found: dict[int, Any] = {}
        for pattern, value in by_pattern.items():
            try:
                found.update(dict.fromkeys(index.find(pattern), value))
            except ValueError:
                # Loaded from a file: `Sequential` loses its name in paths, and the file says what to set aside.
                if not self._state.saved:
                    raise
        return found

    def _saved_partitions(self, index: rules.VariableIndex) -> list[dict[str, Any] | None]:
        """Way and layout of each variable from the config that this was made from, if any."""
        positions = naming.match(list(self._state.saved), naming.unique(index.paths))
        if positions is None:
            return [None] * len(index.paths)
        saved = list(self._state.saved.values())
        return [saved[position] for position in positions]

    def _check_built(self, what: str) -> None:
        if not self._state.built:
            raise ValueError(
                f"The optimizer must be built before `{what}` is known: call `build(variables)` "
                f"or train a step first. Received: {self.name!r}, which is not built"
            )

    def _partition(self, variable: Variable) -> Partition:
        return self._state.partitions[self._state.index.position(variable)]

    # State.

    def _mask_config(self) -> dict[str, Any]:
        """What a config holds of the masks: each variable's way and layout, no mask bits."""
        partitions = dict(self._state.saved)
        if self._state.built:
            names = naming.unique(self._state.index.paths)
            partitions = {name: part.get_config() for name, part in zip(names, self._state.partitions, strict=True)}
        return {"maskable": dict(self._state.maskable), "partitions": partitions}

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of `variables`, in their order.

        Raises:
            ValueError: If the optimizer is not built, or number or shapes differ.
        """
        if not self._state.built:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that must be built first: call "
                f"`optimizer.build(trainable_variables)`. Received: {self.name!r}, which is not built"
            )
        variables: list[Any] = self.variables  # type: ignore[attr-defined]
        if len(weights) != len(variables):
            raise ValueError(
                f"`weights` must have one array per variable of the optimizer, {len(variables)}. "
                f"Received: {len(weights)} arrays"
            )
        for variable, weight in zip(variables, weights, strict=True):
            if tuple(variable.shape) != tuple(np.shape(weight)):
                raise ValueError(
                    f"`weights` must have the shapes of `variables`. Received: shape "
                    f"{np.shape(weight)} for {variable_path(variable)!r} of shape {tuple(variable.shape)}"
                )
            if tf.as_dtype(variable.dtype) == tf.uint8 and np.asarray(weight).dtype != np.uint8:
                raise ValueError(
                    "`weights` must have packed masks of dtype uint8 where `variables` has masks. Received: "
                    f"dtype={np.asarray(weight).dtype} for {variable_path(variable)!r}"
                )
        masks = {id(part.bits): part for part in self._masked_partitions()}
        for variable, weight in zip(variables, weights, strict=True):
            if part := masks.get(id(variable)):
                part.fit(Mask(tuple(part.variable.shape), part.layout, np.asarray(weight)))
        for variable, weight in zip(variables, weights, strict=True):
            if part := masks.get(id(variable)):
                part.assign(Mask(tuple(part.variable.shape), part.layout, np.asarray(weight)))
            else:
                variable.assign(weight)
        self._after_load()

    def save_own_variables(self, store: _Store) -> None:
        """Saves the masks under their variables' paths; Keras saves the inner optimizer beside.

        Raises:
            ValueError: If rules wait for the optimizer to be built: they would be lost.
        """
        if not self._state.built and self._state.rules:
            raise ValueError(
                "The optimizer must be built before its masks can be saved: call "
                "`optimizer.build(model.trainable_variables)`. Received: rules for "
                f"{[rule.target for rule in self._state.rules]}, not carried out yet"
            )
        for key, packed in self._state.loaded.items():
            store[key] = packed  # loaded, and not built since
        for number, (name, kinds) in enumerate(self._named_bytes()):
            for kind, (bits, _) in kinds.items():
                packed = bits.numpy()
                if kind == "mask" or packed.any():
                    store[f"{kind} {number:06d} {quote(name, safe='')}"] = packed

    def load_own_variables(self, store: _Store) -> None:
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
        if self._state.built:
            self._assign_loaded()

    def _assign_loaded(self) -> None:
        """Sets the masks that were loaded: all of them or, on an error, none."""
        loaded = self._state.loaded
        if self._state.built:
            self._state.loaded = {}  # a file that is refused; before, it would wait for the next attempt to build
        saved: dict[str, dict[str, np.ndarray]] = {"mask": {}, "unseeded": {}}
        for key, packed in loaded.items():
            kind, _, name = key.split(" ", 2)
            saved[kind][unquote(name)] = packed
        own = self._named_bytes()
        positions = naming.match(list(saved["mask"]), [name for name, _ in own])
        if positions is None:
            raise ValueError(
                "The masks in a file must be those of the optimizer's variables. Received: "
                f"{list(saved['mask'])}, for an optimizer with {[name for name, _ in own]}"
            )
        changes: list[tuple[Callable[[Any], None], Any]] = []
        undo: list[tuple[Callable[[Any], None], Any]] = []
        for part, (name, kinds), position in zip(self._masked_partitions(), own, positions, strict=True):
            saved_name = list(saved["mask"])[position]
            for kind, (bits, bits_layout) in kinds.items():
                packed = saved[kind].get(saved_name, np.zeros(bits_layout.packed_bytes, np.uint8))
                _check_packed(name, packed, bits_layout)
                if kind == "mask":
                    mask = Mask(tuple(part.variable.shape), bits_layout, packed)
                    changes.append((part.assign, part.fit(mask)))
                else:
                    changes.append((bits.assign, packed))
                if self._state.built:
                    undo.append((part.assign, part.mask) if kind == "mask" else (bits.assign, bits.numpy()))
        self._undo_load = undo
        for assign, value in changes:
            assign(value)
        self._state.loaded = {}
        self._after_load()

    def _undo_loaded(self) -> None:
        """Takes the masks of a file back, of which another part was refused."""
        for assign, value in self._undo_load:
            assign(value)
        self._undo_load = []

    def _masked_partitions(self) -> list[MaskedPartition]:
        """The partitions of variables that have a mask of their own."""
        return [part for part in self._state.partitions if isinstance(part, MaskedPartition)]

    def _named_bytes(self) -> list[tuple[str, dict[str, tuple[Variable, layout.Layout]]]]:
        """The packed bits of each variable that has any, with the variable's name."""
        names = naming.unique(self._state.index.paths)
        return [
            (name, {"mask": (part.bits, part.layout)} | self._bytes_beside(position))
            for position, (name, part) in enumerate(zip(names, self._state.partitions, strict=True))
            if isinstance(part, MaskedPartition)
        ]


class FrozenEntries:
    """Around what the inner optimizer does: frozen entries come out as they went in.

    Args:
        partitions: Of all variables that it may write.
        averages: Slots of moving averages, each with the partition of its variable.
        rows: By the partition's `id`, the only rows that can be written, where that is known.
        remembered: What `take_and_remember` returned just before, by the partition's `id`.
    """

    def __init__(
        self,
        partitions: Sequence[Partition],
        averages: Iterable[tuple[Partition, Variable]] = (),
        rows: Mapping[int, tf.Tensor] | None = None,
        remembered: Mapping[int, Any] | None = None,
    ):
        self._partitions = partitions
        self._averages = averages
        self._rows = rows or {}
        self._remembered = remembered or {}

    def __enter__(self) -> None:
        self._snapshots = [
            self._remembered[id(part)] if id(part) in self._remembered else part.remember(self._rows.get(id(part)))
            for part in self._partitions
        ]

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None and not tf.executing_eagerly():
            return  # Tracing failed: there is no step to protect.
        for part, snapshot in zip(self._partitions, self._snapshots, strict=True):
            if error is None:
                part.put_back(snapshot)
            else:
                part.abandon(snapshot)
        if error is None:
            for part, average in self._averages:
                part.put_into_average(average)


class FrozenBlock(AbstractContextManager):
    """Around anything else that writes the model's variables; see `Masking.frozen_entries`.

    Args:
        partitions: Of all variables that may be written.
        averages: Gives the slots of moving averages, each with the partition of its variable.
    """

    def __init__(self, partitions: Sequence[Partition], averages: Callable[[], Iterable[tuple[Partition, Variable]]]):
        self._partitions = list(partitions)
        self._averages = averages
        self._blocks: list[tuple[AbstractContextManager, list[Any]]] = []  # a block may lie in another

    def __enter__(self) -> None:
        snapshots = [part.remember_frozen() for part in self._partitions]
        writes = guarded()
        writes.__enter__()
        self._blocks.append((writes, snapshots))

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        writes, snapshots = self._blocks.pop()
        if error is None or tf.executing_eagerly():
            for part, snapshot in zip(self._partitions, snapshots, strict=True):
                part.restore_frozen(snapshot)
            for part, average in self._averages():
                part.put_into_average(average)
        writes.__exit__(None, None, None)


def _check_packed(name: str, packed: np.ndarray, mask_layout: layout.Layout) -> None:
    if packed.dtype != np.uint8 or packed.shape != (mask_layout.packed_bytes,):
        raise ValueError(
            f"The mask of {name!r} must be {mask_layout.packed_bytes} bytes for layout {tuple(mask_layout)}. "
            f"Received: an array of dtype={packed.dtype}, shape={packed.shape}"
        )


def check_lengths(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Raises unless there is one gradient per variable."""
    if len(gradients) != len(variables):
        raise ValueError(
            "Gradients and variables must match one to one. "
            f"Received: {len(gradients)} gradients and {len(variables)} variables"
        )


def check_arguments(masks: Any, maskable: Any, inner_arguments: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Raises where arguments of a `MaskedOptimizer` are wrong.

    Args:
        masks: Must be a mapping or `None`.
        maskable: Likewise, with values of `layout.MASKABLE`.
        inner_arguments: Names of arguments that belong to the inner optimizer.
        arguments: Further keyword arguments that were given; there must be none.
    """
    for argument, value in arguments.items():
        if argument in inner_arguments:
            raise ValueError(
                f"MaskedOptimizer does not support `{argument}`: it must be set on the "
                f"`inner_optimizer`. Received: {argument}={value!r}"
            )
    if arguments:
        raise ValueError(f"Arguments must be known ones. Received: {dict(arguments)}")
    if masks is not None and not isinstance(masks, Mapping):
        raise TypeError(f"`masks` must map path patterns to masks. Received: masks={masks!r}")
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
