"""The methods for masks that every `MaskedOptimizer` has, whatever its Keras."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from freezeops.keras_compat import contract
from freezeops.keras_compat.variables import Variable
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.ops.gradients import Gradient
from freezeops.partitions.partition import Partition
from freezeops.registry import report
from freezeops.registry.registry import MaskRegistry
from freezeops.registry.report import VariableReport
from freezeops.registry.rules import MaskRule
from freezeops.step.step import FrozenBlock


class MaskMethods:
    """Methods over the registry of an optimizer, which the class that inherits them makes as `_registry`."""

    name: str
    _registry: MaskRegistry
    _fused: bool | None = None  # None: this Keras has no fused updates
    _skips = False

    def _build_once(self, variables: Sequence[Variable]) -> None:
        """Builds the optimizer if it is not built."""
        raise NotImplementedError

    def _contract_notes(self) -> list[str]:
        """Returns a sentence for each feature that is off with the installed versions of Keras and TensorFlow."""
        return contract.notes()

    def _averages(self) -> Iterable[tuple[Partition, Variable]]:
        """Yields the slots of moving averages, each with the partition of its variable."""
        raise NotImplementedError

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
        self._registry.call(MaskRule("register_mask", target, mask))

    def register_masks(self, masks: Mapping[Any, Any] | Sequence[tuple[Any, Any]]) -> None:
        """`register_mask` for several targets at once: all of them or, on an error, none.

        Args:
            masks: Mapping of targets to masks, or a list of pairs of those, since variables
                are no keys of a mapping.

        Raises:
            TypeError: If it is neither; otherwise as for `register_mask`.
        """
        self._registry.add(*(MaskRule("register_mask", target, mask) for target, mask in mask_pairs(masks)))

    def freeze(self, target: Any, where: Any = None, permanent: bool = False) -> None:
        """Freezes entries.

        Args:
            target: As for `register_mask`. Freezing a layer with state that its
                forward pass changes (BatchNormalization) warns that this still moves.
            where: The entries to freeze: a boolean array (True = freeze), an index
                expression such as `np.s_[:10, 3]`, or a list of integer indices along
                the first axis. Every entry by default. As many zeros and ones as an
                axis is long could be booleans or indices, and are refused.
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
                "`where` must be None with `permanent=True`, which freezes whole variables. Received: "
                f"where={short(where)}"
            )
        self._registry.call(MaskRule("freeze", target, where, permanent))

    def unfreeze(self, target: Any, where: Any = None) -> None:
        """Makes entries trainable; arguments and errors as for `freeze`."""
        self._registry.add(MaskRule("unfreeze", target, where))

    def train_only(self, target: Any, where: Any) -> None:
        """Makes entries trainable and freezes every other entry of those variables.

        Arguments and errors as for `freeze`.
        """
        self._registry.call(MaskRule("train_only", target, where))

    def mask_for(self, variable: Variable) -> Mask:
        """Returns the mask of a variable as it is now.

        Args:
            variable: A variable that the optimizer knows; before it is built, any.

        Returns:
            An `fz.Mask`.

        Raises:
            ValueError: If the optimizer does not know the variable.
        """
        return self._registry.mask_for(variable)

    def masks_by_path(self) -> dict[str, Mask]:
        """Returns the mask of every float variable as it is now, by the variable's path.

        Raises:
            ValueError: If the optimizer is not built, or two variables have one path.
        """
        return self._registry.masks_by_path()

    @property
    def density(self) -> float:
        """Trainable entries / all entries, over the float variables of the built optimizer."""
        return self._registry.density

    @property
    def _options(self) -> report.Options:
        return report.Options(self._fused, self._skips)

    def describe(self) -> list[VariableReport]:
        """Returns a report of every variable, in the order in which the optimizer was built with them.

        Returns:
            A list of `VariableReport`.

        Raises:
            ValueError: If the optimizer is not built.
        """
        self._registry.check_built("describe")
        return report.describe(self._registry.managed, self._options)

    def summary(self, console: Any = None, collapse: bool = False) -> None:
        """Prints a line for each variable: path, shape, density, bytes and mode; below it reasons and totals.

        Bytes are those of masks and of what compact state needs beside the inner optimizer's slots.
        Fits into the width of the terminal (or `COLUMNS`): long paths are shortened in the middle. Below
        it what is off with the installed versions of Keras and TensorFlow, if anything is.

        Args:
            console: `rich.console.Console` to print to. Defaults to standard output.
            collapse: Whether repeated layers, whose paths differ in numbers alone, share a line.
        """
        if self._registry.built:
            report.print_summary(self.name, self._registry.managed, self._options, console, collapse)
        else:
            report.print_rules(self.name, self._registry.rules, console)
        report.print_notes(self._contract_notes(), console)

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
            None if gradient is None else self._registry.record_of(variable).partition.masked(gradient)
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
        if not self._registry.built:
            raise ValueError(
                "The optimizer must be built before `frozen_entries()` can keep any: call "
                f"`optimizer.build(model.trainable_variables)`. Received: {self.name!r}, which is not built"
            )
        return FrozenBlock(self._registry.partitions, self._averages)


def check_lengths(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Raises unless there is one gradient per variable."""
    if len(gradients) != len(variables):
        raise ValueError(
            "Gradients and variables must match one to one. "
            f"Received: {len(gradients)} gradients and {len(variables)} variables"
        )


def mask_pairs(masks: Any) -> list[tuple[Any, Any]]:
    """Targets and their masks, one after the other.

    Args:
        masks: A mapping, or a list of pairs, since variables are no keys of a mapping; `None`: none.

    Raises:
        TypeError: If it is anything else.
    """
    pairs = list(masks.items()) if isinstance(masks, Mapping) else [] if masks is None else masks
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            "`masks` must map targets to masks, or be a list of pairs of those: [(variable, mask), ...]. "
            f"Received: masks={short(masks)} of type {type(masks).__name__}"
        )
    return list(pairs)


def masked_optimizer(optimizer: Any) -> MaskMethods:
    """Returns the `MaskedOptimizer`, where there may be others around it.

    Under `mixed_float16` Keras's `compile` puts a `LossScaleOptimizer` around.

    Raises:
        TypeError: If there is none.
    """
    found = optimizer
    while found is not None and not isinstance(found, MaskMethods):
        found = getattr(found, "inner_optimizer", None)
    if found is None:
        hint = " Pass `model.optimizer`." if isinstance(getattr(optimizer, "optimizer", None), MaskMethods) else ""
        raise TypeError(
            "`optimizer` must be a MaskedOptimizer, or one that was put around it, such as a LossScaleOptimizer."
            f"{hint} Received: optimizer={short(optimizer)} of type {type(optimizer).__name__}"
        )
    return found
