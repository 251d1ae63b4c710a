"""Stores the state of wrapped optimizers once, finds it by path, and refuses what does not fit.

Keras itself stores what a `LossScaleOptimizer` wraps twice, finds slots by position, and skips with a warning what does
not fit, or what comes before the optimizer is built. Here a `MaskedOptimizer` that loads a file hands a `Load` to each
optimizer inside, which Keras visits after it.
"""

import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import numpy as np

from freezeops.keras_compat.loading import weights_being_loaded
from freezeops.keras_compat.variables import Untracked
from freezeops.keras_compat.wrapped import is_multi_optimizer, wrapped_optimizers
from freezeops.messages import short
from freezeops.notices import warn

SlotName = tuple[int | None, str]
"""Of an optimizer's variable: the position of the variable that it is a slot of (`None`: of none), and its name."""

Fit = Callable[[np.ndarray, keras.Variable, int | None], np.ndarray | None]
"""From what is stored for a slot, the slot and its variable's position to its values; `None`: it does not fit."""


@dataclass
class Load:
    """One load of a `MaskedOptimizer` and the optimizers inside.

    Attributes:
        skip: `True` to do without what does not fit.
        own: For each optimizer inside, by `id`: the names of its own variables.
        saved: For each, by `id`: the names in the file, with positions of variables that are here; -1: not here. None
            where the file has none, or was saved by an optimizer of another class.
        fit: Brings stored values into the shape of a slot.
        undo: Calls that take everything back, in reverse order.
        refused: `True` if the masks did not fit: then nothing else is loaded.
        done: `True` if the state of the optimizers inside has been loaded already.
        left: How many arrays of a bare optimizer's file nobody has taken yet.
        take_masks: Loads the masks of a file that was saved with a scaler outside, which is inside now.
        last: The `id` of the optimizer inside that comes last, behind which nothing can fail.
    """

    skip: bool
    own: Mapping[int, Sequence[SlotName]] = field(default_factory=dict)
    saved: Mapping[int, Sequence[SlotName]] = field(default_factory=dict)
    fit: Fit | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)
    refused: bool = False
    done: bool = False
    left: int = 0
    last: int = 0
    take_masks: Callable[[Mapping[str, np.ndarray]], None] | None = None

    def take_back(self) -> None:
        """Sets everything back to what it was before this load."""
        while self.undo:
            self.undo.pop()()


_OF_A_SCALER = 3
"""How many variables a `LossScaleOptimizer` has of its own, but for a learning rate: steps, steps, scale."""


class _Waiting(NamedTuple):
    """State that was loaded before the optimizer was built.

    Attributes:
        arrays: In the order of the file.
        skip: `True` to do without what does not fit.
    """

    arrays: list[np.ndarray]
    skip: bool


def store_once_and_check(optimizer: keras.optimizers.Optimizer) -> None:
    """Changes how one optimizer saves and loads its own variables in Keras's files.

    Wrapped optimizers are saved by Keras beside it. State that is loaded before the optimizer is built waits for
    `assign_waiting`.

    Args:
        optimizer: The optimizer. It is changed.
    """
    optimizer.save_own_variables = types.MethodType(_save_own_variables, optimizer)
    optimizer.load_own_variables = types.MethodType(_load_own_variables, optimizer)


def store_scalers_around(cls: type) -> None:
    """Changes the same of each `LossScaleOptimizer` that wraps an optimizer of a class.

    `compile` makes them by itself, and state may be loaded before they are built.
    Changes Keras's class, once; around other optimizers it does what it did.
    """
    scaler = keras.optimizers.LossScaleOptimizer
    save, load = scaler.save_own_variables, scaler.load_own_variables
    if hasattr(load, "_freezeops"):
        return

    def save_own_variables(self: Any, store: Any) -> None:
        (_save_own_variables if isinstance(self.inner_optimizer, cls) else save)(self, store)

    def load_own_variables(self: Any, store: Any) -> None:
        (_load_scaler if isinstance(self.inner_optimizer, cls) else load)(self, store)

    load_own_variables._freezeops = True  # type: ignore[attr-defined]
    scaler.save_own_variables, scaler.load_own_variables = save_own_variables, load_own_variables


def begin(load: Load, optimizer: keras.optimizers.Optimizer) -> None:
    """Hands a load to an optimizer and all that it wraps, of which Keras loads the state next."""
    vars(optimizer).pop("_freezeops_bare", None)  # of a load before
    for part in wrapped_optimizers(optimizer):
        vars(part)["_freezeops_load"] = Untracked(load)
        load.last = id(part)


def load_bare(optimizer: keras.optimizers.Optimizer, arrays: list[np.ndarray]) -> None:
    """Loads a file of an optimizer that nobody wrapped, where a `MaskedOptimizer` is now; after `begin`.

    Args:
        optimizer: What is wrapped. Where it is not built, the arrays wait for that.
        arrays: All that the file has there, in order.

    Raises:
        ValueError: If it does not fit. Nothing was changed then, unless `skip`.
    """
    load: Load = vars(optimizer)["_freezeops_load"].value
    if not optimizer.built:
        load.done = True
        vars(optimizer)["_freezeops_bare"] = Untracked(_Waiting(arrays, load.skip))
        return
    _load_bare(load, optimizer, arrays)


def _load_bare(load: Load, optimizer: keras.optimizers.Optimizer, arrays: list[np.ndarray]) -> None:
    parts = list(_all_variables(optimizer))
    bases = [part for part in wrapped_optimizers(optimizer) if not _is_wrapper(part)]
    if len(bases) == 1 and len(arrays) != len(parts):
        parts = [(bases[0], number) for number in range(len(_own_variables(bases[0])))]
    if len(bases) == 1 and _is_untrained(bases[0], arrays):
        parts = [(bases[0], number) for number in range(len(arrays))]
    if len(arrays) != len(parts):
        load.left = len(arrays)  # of a wrapper that is not here: Keras comes with the rest
        return
    load.done = True
    by_part: dict[int, tuple[Any, list[np.ndarray]]] = {}
    for (part, _), array in zip(parts, arrays, strict=True):
        by_part.setdefault(id(part), (part, []))[1].append(array)
    _carry_out([_plan(part, of_part, load) for part, of_part in by_part.values()], load)


def is_waiting(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns `True` if something was loaded before the optimizer was built."""
    return "_freezeops_bare" in vars(optimizer) or "_freezeops_waiting" in vars(optimizer)


def assign_waiting(optimizer: keras.optimizers.Optimizer, load: Load | None = None) -> None:
    """Sets what was loaded before the optimizer was built; it is forgotten then, whether it fits or not.

    Args:
        optimizer: The optimizer.
        load: How slots are found, if masks were loaded; `skip` is as it was when this was loaded.

    Raises:
        ValueError: If it does not fit; no variable of this optimizer was changed then.
    """
    bare = vars(optimizer).pop("_freezeops_bare", None)
    waiting = vars(optimizer).pop("_freezeops_waiting", None)
    for kept, of_bare in ((bare, True), (waiting, False)):
        if kept is None:
            continue
        arrays, skip = kept.value
        own = Load(skip) if load is None else Load(skip, load.own, load.saved, load.fit)
        try:
            if _is_around_masked(optimizer):
                _assign_scaler(optimizer, arrays, skip)
            elif of_bare:
                _load_bare(own, optimizer, arrays)
                if own.left:
                    # Of a bare scaler, which is not here: its own variables come first.
                    count = len(list(_all_variables(optimizer)))
                    if len(arrays) - count == _OF_A_SCALER + isinstance(
                        getattr(optimizer, "_learning_rate", None), keras.Variable
                    ):
                        own.left = 0
                        _load_bare(own, optimizer, arrays[-count:])
                if own.left:
                    raise _refusal(optimizer, [f"{own.left} arrays"])
            else:
                _carry_out([_plan(optimizer, arrays, own)], own)
        except ValueError as error:
            if not skip:
                raise
            warn(f"A load did without what does not fit: {error}")


def names_of(
    optimizer: keras.optimizers.Optimizer, paths: Sequence[str], positions: Mapping[int, int]
) -> list[SlotName]:
    """Returns the names of an optimizer's own variables.

    Args:
        optimizer: The optimizer, built.
        paths: Of the variables that it trains.
        positions: By a slot's `id`: the position of the variable that it was made for, where that is known.
    """
    # Keras names a slot by its variable: `dense_kernel_momentum`.
    begins = sorted(((path.replace("/", "_").replace(":", "_"), i) for i, path in enumerate(paths)), reverse=True)
    begins.sort(key=lambda each: len(each[0]), reverse=True)
    names: list[SlotName] = []
    for variable in _own_variables(optimizer):
        position = positions.get(id(variable))
        fitting = [(begin, i) for begin, i in begins if variable.name.startswith(f"{begin}_")]
        if position is None and fitting and sum(begin == fitting[0][0] for begin, _ in fitting) == 1:
            position = fitting[0][1]
        begin = next((begin for begin, i in fitting if i == position), None)
        if position is None or begin is None:
            # Keras counts names up: the order tells those apart.
            names.append((position, re.sub(r"_\d+$", "", variable.name)))
        else:
            rest = variable.name[len(begin) + 1 :]
            names.append((position, rest.removeprefix("0_")))  # a TensorFlow variable's name ends in :0
    return names


def _is_wrapper(optimizer: Any) -> bool:
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or is_multi_optimizer(optimizer)


def _is_around_masked(optimizer: Any) -> bool:
    """Returns `True` for a `LossScaleOptimizer` around a `MaskedOptimizer`."""
    return hasattr(getattr(optimizer, "inner_optimizer", None), "load_shifted") and _is_wrapper(optimizer)


def _own_variables(optimizer: Any) -> list[keras.Variable]:
    if _is_wrapper(optimizer):
        return list(optimizer._variables)
    return list(optimizer.variables)


def _is_untrained(optimizer: Any, arrays: list[np.ndarray]) -> bool:
    """Returns `True` if arrays were saved by an optimizer that was not built."""
    before_build = 1 + isinstance(getattr(optimizer, "_learning_rate", None), keras.Variable)
    return not arrays or (len(arrays) == before_build and not arrays[0].any())


def _all_variables(optimizer: Any) -> Iterator[tuple[Any, int]]:
    """Yields an optimizer's `variables`, each as its owner and its number there."""
    own = _own_variables(optimizer)
    yield from ((optimizer, number) for number in range(len(own)))
    if hasattr(optimizer, "inner_optimizer"):
        yield from _all_variables(optimizer.inner_optimizer)
    elif is_multi_optimizer(optimizer):
        for part in optimizer.optimizers:
            yield from _all_variables(part)


def _save_own_variables(self: Any, store: Any) -> None:
    waiting = vars(self).get("_freezeops_waiting")  # loaded, and not built since
    arrays = [v.numpy() for v in _own_variables(self)] if waiting is None else waiting.value.arrays
    for i, array in enumerate(arrays):
        store[str(i)] = array


def _load_own_variables(self: Any, store: Any) -> None:
    kept = vars(self).pop("_freezeops_load", None)
    load = Load(weights_being_loaded().skip_mismatch) if kept is None else kept.value
    if load.refused:
        return
    keys = [str(i) for i in range(len(store.keys()))]
    if any(not key.isdigit() for key in store.keys()) and load.take_masks and hasattr(self, "inner_optimizer"):  # noqa: SIM118
        load.take_masks({key: np.array(store[key]) for key in store.keys()})  # noqa: SIM118
        return
    if strange := sorted(set(store.keys()) - set(keys)):
        load.take_back()
        load.refused = True
        vars(self).pop("_freezeops_bare", None)
        raise ValueError(
            "The state of an optimizer in a file must be arrays that are counted from 0. Was it saved with another "
            "wrapper around? `fz.load_masks(optimizer, path)` reads its masks. "
            f"Received: {short(strange)} for {self.name!r}"
        )
    if load.done:
        return
    arrays = [np.array(store[key]) for key in keys]
    if not self.built:
        vars(self)["_freezeops_waiting"] = Untracked(_Waiting(arrays, load.skip))
        return
    try:
        if load.left and not arrays:
            raise _refusal(self, [f"{load.left} arrays, where it has {len(_own_variables(self))} variables"])
        load.left = 0
        _carry_out([_plan(self, arrays, load)], load)
    except ValueError:
        if not load.skip:
            load.take_back()
            load.refused = True
        raise


def _load_scaler(self: Any, store: Any) -> None:
    """Loads a file into a `LossScaleOptimizer` around a `MaskedOptimizer`, whatever was around when it was saved."""
    keys, masked = list(store.keys()), self.inner_optimizer
    if any(not key.isdigit() for key in keys):
        # Of a `MaskedOptimizer` without a scaler around: what comes next is what that one wraps.
        masked.load_shifted({key: np.array(store[key]) for key in keys})
        return
    file = weights_being_loaded()
    if keys and not self.built:
        masked.build_to_load(file.model)
    arrays = [np.array(store[str(i)]) for i in range(len(keys))]
    if self.built:
        _assign_scaler(self, arrays, file.skip_mismatch)
    else:
        vars(self)["_freezeops_waiting"] = Untracked(_Waiting(arrays, file.skip_mismatch))


def _assign_scaler(scaler: Any, arrays: list[np.ndarray], skip: bool) -> None:
    """Sets the state of a scaler around a `MaskedOptimizer`, or of a bare optimizer that had none around."""
    masked = scaler.inner_optimizer
    of_scaler = len(arrays) in (len(_own_variables(scaler)), len(scaler.variables))
    if not of_scaler and len(arrays) == len(masked.variables):
        masked.load_own_variables({str(i): array for i, array in enumerate(arrays)})
    else:
        load = Load(skip)
        _carry_out([_plan(scaler, arrays, load)], load)


class _Plan(NamedTuple):
    """Values to assign to an optimizer's variables.

    Attributes:
        optimizer: The optimizer.
        values: Pairs of variable and array.
        problems: What does not fit, in words.
    """

    optimizer: Any
    values: list[tuple[keras.Variable, np.ndarray]]
    problems: list[str]


def _plan(optimizer: Any, arrays: list[np.ndarray], load: Load) -> _Plan:
    """Returns the values to assign, with nothing changed yet."""
    variables = _own_variables(optimizer)
    saved, own = load.saved.get(id(optimizer)), load.own.get(id(optimizer))
    values: list[tuple[keras.Variable, np.ndarray]] = []
    problems: list[str] = []

    def add(variable: keras.Variable, array: np.ndarray, position: int | None) -> None:
        fit = load.fit or _same_shape
        fitted = fit(array, variable, position)
        if fitted is None:
            problems.append(f"an array of shape {array.shape} for {variable.path!r} of shape {tuple(variable.shape)}")
        else:
            values.append((variable, fitted))

    untrained = _is_untrained(optimizer, arrays)
    if saved is not None and own is not None and len(saved) == len(arrays) and not untrained:
        stored: dict[SlotName, list[np.ndarray]] = {}
        for name, array in zip(saved, arrays, strict=True):
            stored.setdefault(name, []).append(array)
        here = {position for position, _ in saved}
        for variable, name in zip(variables, own, strict=True):
            if stored.get(name):
                add(variable, stored[name].pop(0), name[0])
            elif name[0] is None or name[0] in here:
                problems.append(f"nothing for {variable.path!r}")
        left = [name for (position, name), of_name in stored.items() if of_name and position != -1]
        problems += [f"{name!r}, which it has not" for name in left]
        return _Plan(optimizer, values, problems)
    if untrained:
        variables = variables[: len(arrays)]  # saved before it was built
    elif len(arrays) == len(optimizer.variables):
        arrays = arrays[: len(variables)]  # as Keras saves it
    if len(arrays) != len(variables):
        problems.append(f"{len(arrays)} arrays for {optimizer.name!r}, which has {len(variables)} variables")
        return _Plan(optimizer, values, problems)
    for number, (variable, array) in enumerate(zip(variables, arrays, strict=True)):
        add(variable, array, own[number][0] if own is not None else None)
    return _Plan(optimizer, values, problems)


def _carry_out(plans: Sequence[_Plan], load: Load) -> None:
    problems = [problem for plan in plans for problem in plan.problems]
    if not problems or load.skip:
        for plan in plans:
            for variable, array in plan.values:
                if id(plan.optimizer) != load.last:
                    load.undo.append(_undo_of(variable))
                variable.assign(array)
    if problems:
        raise _refusal(plans[0].optimizer, problems)


def _undo_of(variable: keras.Variable) -> Callable[[], None]:
    before = variable.numpy()
    return lambda: variable.assign(before)


def _refusal(optimizer: Any, problems: Sequence[str]) -> ValueError:
    return ValueError(
        "The state of an optimizer in a file must fit the optimizer that loads it. Received: "
        f"{'; '.join(problems[:5])}{' and more' if len(problems) > 5 else ''}. Load with `skip_mismatch=True` to do "
        f"without the state of {optimizer.name!r} that does not fit"
    )


def _same_shape(array: np.ndarray, variable: keras.Variable, position: int | None) -> np.ndarray | None:
    del position
    return array if array.shape == tuple(variable.shape) else None
