"""The masks of an optimizer in Keras's files: saved, loaded, and taken back where a file is refused.

Keras visits a `MaskedOptimizer` first and the optimizers inside after it. So a load has two halves: here the masks,
then `InnerState` for the slots. Each half is refused wholly, and a refusal of the second takes the first back.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from freezeops.keras_compat.loading import weights_being_loaded
from freezeops.keras_compat.variables import variable_path
from freezeops.keras_compat.wrapped import wrapped_optimizers
from freezeops.masks.mask import Mask
from freezeops.registry.registry import MaskRegistry
from freezeops.storage.matching import refusal
from freezeops.storage.stored import Stored


class Store(Protocol):
    """A group of a Keras file."""

    def keys(self) -> Iterable[str]: ...  # noqa: D102
    def __getitem__(self, key: str) -> Any: ...
    def __setitem__(self, key: str, value: Any) -> None: ...


class InnerState(Protocol):
    """Names and loads the state of the optimizers inside a `MaskedOptimizer`."""

    def slot_names(self) -> list[tuple[str, list[tuple[str | None, str]]]]:
        """Returns the names of the variables of the optimizers inside, as `Stored.slots` has them."""

    def begin(self, stored: Stored, skip: bool, masks: Mapping[int, Mask] | None = None) -> None:
        """Called before masks of a file are set; Keras loads the state of the optimizers inside next.

        Args:
            stored: What the file holds.
            skip: Whether to do without what does not fit.
            masks: Where the optimizer was built with masks of the file: those that it would have without, by position.
        """

    def refuse(self) -> None:
        """Called where masks of a file do not fit: nothing else of it is loaded."""

    def load_bare(self, arrays: list[np.ndarray], skip: bool) -> None:
        """Loads the state of an optimizer that nobody wrapped."""

    def waits(self, stored: Stored) -> bool:
        """Returns whether a load waits until somebody builds the optimizer."""


class KerasState:
    """Saves and loads the masks of an optimizer in Keras's files.

    Args:
        registry: The masks.
        inner: The state of the optimizers inside.
    """

    def __init__(self, registry: MaskRegistry, inner: InnerState):
        self._registry = registry
        self._inner = inner
        self._refused: tuple[Any, BaseException] | None = None
        self._shifted = False

    def stored(self) -> Stored:
        """Returns what a file or a checkpoint holds of the optimizer itself."""
        return self._registry.stored(self._inner.slot_names() if self._registry.built else ())

    def save(self, store: Store) -> None:
        """Saves the masks, each with its variable's path, shape and layout."""
        for key, value in self.stored().to_entries():
            store[key] = value

    def load(self, store: Store) -> None:
        """Loads the masks; before the optimizer is built, keeps them until it is.

        Raises:
            ValueError: If the file's masks are not those of this optimizer's variables; no mask was changed then.
        """
        entries = {key: np.array(store[key]) for key in store.keys()}  # noqa: SIM118
        refused, shifted = self._refused, self._shifted
        self._shifted = False
        if shifted:
            # The masks came before, to a scaler around: this is what the optimizer wraps.
            if refused is None and entries:
                self._inner.load_bare(_arrays(entries), False)
        elif entries:
            self.take_entries(entries)
        elif refused is not None and refused[0] == weights_being_loaded().token:
            # Keras comes a second time to a part of a `MultiOptimizer` that refused, with nothing.
            raise refused[1]

    def load_shifted(self, entries: Mapping[str, np.ndarray]) -> None:
        """Loads what a file without a scaler around has where this optimizer's scaler looks.

        Keras comes next with the state of the inner optimizer, where this optimizer's own is expected.
        """
        self._shifted = True
        self.take_entries(entries)

    def build_to_load(self, model: Any) -> None:
        """Builds the optimizer, if a load of a file without masks does that."""
        if not self._registry.built and self._builds(Stored(), model):
            model.optimizer.build(model.trainable_variables)

    def take_entries(self, entries: Mapping[str, np.ndarray]) -> None:
        """Loads the entries of a `MaskedOptimizer` or of a bare optimizer."""
        registry, file = self._registry, weights_being_loaded()
        self._refused = None
        skip, bare = file.skip_mismatch, all(key.isdigit() for key in entries)
        try:
            stored = Stored() if bare else Stored.from_entries(entries)
            if not registry.built and self._builds(stored, file.model):
                problems, masks = self._build(stored, skip, file.model)
                self._inner.begin(stored, skip, masks)
            else:
                self._inner.begin(stored, skip)
                problems = registry.take_stored(stored, skip)
        except BaseException as error:
            self._inner.refuse()
            self._refused = file.token, error
            raise
        if bare:
            self._inner.load_bare(_arrays(entries), skip)
        if problems:
            self._refused = file.token, refusal(problems, registry.index.named)
            raise self._refused[1]

    def _builds(self, stored: Stored, model: Any) -> bool:
        """Returns whether a load builds the optimizer first, so that errors come at once."""
        if model is None or not getattr(model, "built", False) or self._inner.waits(stored):
            return False
        return any(part is self._registry.owner for part in wrapped_optimizers(model.optimizer))

    def _build(self, stored: Stored, skip: bool, model: Any) -> tuple[list[str], dict[int, Mask]]:
        """Builds the optimizer with masks that are loaded.

        Returns:
            Messages of what did not fit; and the masks without that load, by position.
        """
        registry = self._registry
        before = list(registry.rules)
        registry.take_stored(stored, skip)
        registry.warns_of_problems = False
        try:
            model.optimizer.build(model.trainable_variables)
        except BaseException:
            if not registry.built:
                registry.rules = before
            raise
        finally:
            registry.warns_of_problems = True
        problems, registry.problems = registry.problems, []
        loaded, registry.rules = registry.rules, before
        masks = registry.plan(registry.index, False).masks
        registry.rules = loaded
        return problems, masks


def _arrays(entries: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [entries[str(i)] for i in range(len(entries))]


def set_weights(registry: MaskRegistry, variables: Sequence[Any], weights: Sequence[Any]) -> None:
    """Sets the values of an optimizer's variables, in their order; masks stay as they are.

    Args:
        registry: The masks of the optimizer.
        variables: The variables.
        weights: An array for each.

    Raises:
        ValueError: If the optimizer is not built, or number or shapes differ.
    """
    if not registry.built:
        raise ValueError(
            "You are calling `set_weights()` on an optimizer that must be built first: call "
            f"`optimizer.build(trainable_variables)`. Received: {registry.owner.name!r}, which is not built"
        )
    if len(weights) != len(variables):
        raise ValueError(
            f"`weights` must have one array per variable of the inner optimizer, {len(variables)}; masks are not "
            "among them: store those with `fz.save_masks(optimizer, path)`. Received: "
            f"{len(weights)} arrays"
        )
    for variable, weight in zip(variables, weights, strict=True):
        if tuple(variable.shape) != tuple(np.shape(weight)):
            raise ValueError(
                f"`weights` must have the shapes of `variables`. Received: shape "
                f"{np.shape(weight)} for {variable_path(variable)!r} of shape {tuple(variable.shape)}"
            )
    for variable, weight in zip(variables, weights, strict=True):
        variable.assign(weight)
    registry.forget_changes()
