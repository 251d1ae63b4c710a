"""Runs Keras's own optimizer tests with every optimizer wrapped in a `MaskedOptimizer`.

Keras ships its tests inside the package. Each test module is loaded as a fresh copy
while the optimizer classes that it imports are replaced by stand-ins, which wrap what
they make; Keras itself keeps the real classes. Two arrangements:

- `leaves`: the optimizers that update variables are wrapped, so a `LossScaleOptimizer`
  or a `MultiOptimizer` of the tests has wrapped optimizers inside;
- `wrappers`: `LossScaleOptimizer` and `MultiOptimizer` themselves are wrapped.

As a script, `python keras_suite.py ARRANGEMENT MODULE` runs one module and prints the
outcomes as JSON: the distribution tests reset TensorFlow's context, which no other
test in the process would survive.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import pathlib
import subprocess
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import keras
import keras.src.testing
import pytest

import freezeops as fz

ARRANGEMENTS = ("leaves", "wrappers")
WRAPPERS = ("LossScaleOptimizer", "MultiOptimizer")
WRAPPER_MODULES = ("loss_scale_optimizer_test", "multi_optimizer_test")
OWN_PROCESS = ("optimizer_distribute_test",)
"""Test modules that reset TensorFlow's context."""

_KERAS = pathlib.Path(keras.src.__file__).parent
_FOLDERS = {
    "keras.src.optimizers": "*_test.py",
    "keras.src.backend.tensorflow": "optimizer_*_test.py",
}

made: list[fz.MaskedOptimizer] = []
"""What the stand-ins made since the list was last cleared."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One test of Keras, in one arrangement."""

    arrangement: str
    module: str
    group: str
    method: str

    def __str__(self) -> str:
        """The name by which exclusions call it."""
        return f"{self.arrangement}:{self.module}.{self.group}.{self.method}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a test.

    Attributes:
        status: `"passed"`, `"failed"` or `"skipped"`.
        text: The traceback, or why it was skipped.
        wrapped: How many optimizers were wrapped while it ran.
    """

    status: str
    text: str
    wrapped: int


def wrap(optimizer: keras.optimizers.Optimizer) -> fz.MaskedOptimizer:
    """The optimizer, wrapped with nothing frozen."""
    if not isinstance(optimizer, fz.MaskedOptimizer):
        optimizer = fz.MaskedOptimizer(optimizer)
    made.append(optimizer)
    return optimizer


class StandIn:
    """Called like an optimizer class, it gives a wrapped optimizer of that class."""

    def __init__(self, optimizer_class: type):
        self._class = optimizer_class

    def __call__(self, *args: Any, **kwargs: Any) -> fz.MaskedOptimizer:
        return wrap(self._class(*args, **kwargs))

    def from_config(self, config: dict[str, Any]) -> fz.MaskedOptimizer:
        return wrap(self._class.from_config(config))


class _WrapsInstances(type(keras.optimizers.Optimizer)):
    def __call__(cls, *args: Any, **kwargs: Any) -> fz.MaskedOptimizer:
        return wrap(super().__call__(*args, **kwargs))


class BaseStandIn(keras.optimizers.Optimizer, metaclass=_WrapsInstances):
    """Stands for the base class: instances of its subclasses come wrapped."""


def stand_ins(arrangement: str) -> dict[type, Any]:
    """What replaces which optimizer class."""
    classes = {
        value
        for value in vars(keras.optimizers).values()
        if inspect.isclass(value) and issubclass(value, keras.optimizers.Optimizer)
    }
    wrappers = {value for value in classes if value.__name__ in WRAPPERS}
    base = keras.optimizers.Optimizer
    if arrangement == "wrappers":
        return {value: StandIn(value) for value in wrappers}
    leaves = classes - wrappers - {base}
    return {value: StandIn(value) for value in leaves} | {base: BaseStandIn}


def _wraps_leaves(make: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.optimizers.get` or `deserialize`, with the leaves that it gives wrapped."""

    def make_wrapped(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        is_leaf = optimizer is not None and type(optimizer).__name__ not in WRAPPERS
        return wrap(optimizer) if is_leaf else optimizer

    return make_wrapped


class _NoMarks:
    """Stands for `pytest.mark`: Keras's marks tell backends apart, and are not registered here."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def mark(*args: Any, **kwargs: Any) -> Any:
            decorates = len(args) == 1 and callable(args[0]) and not kwargs
            return args[0] if decorates else lambda decorated: decorated

        return mark


@contextlib.contextmanager
def _replaced(arrangement: str) -> Iterator[None]:
    """While this is open, `import` statements find stand-ins in place of optimizers."""
    replacements = stand_ins(arrangement)
    package = sys.modules["keras.src.optimizers"]
    names = {
        name: replacements.get(value, value) if inspect.isclass(value) else value
        for name, value in vars(package).items()
        if not name.startswith("__")
    }
    if arrangement == "leaves":
        names["get"] = _wraps_leaves(names["get"])
        names["deserialize"] = _wraps_leaves(names["deserialize"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(keras.src, "optimizers", types.SimpleNamespace(**names)))
        for real, replacement in replacements.items():
            home = sys.modules[real.__module__]
            stack.enter_context(mock.patch.object(home, real.__name__, replacement))
        yield


@functools.cache
def load(arrangement: str, name: str) -> types.ModuleType:
    """A fresh copy of a Keras test module in which the optimizers are stand-ins."""
    package = next(folder for folder, pattern in _FOLDERS.items() if name in _names(folder, pattern))
    spec = importlib.util.find_spec(f"{package}.{name}")
    module = importlib.util.module_from_spec(spec)
    with _replaced(arrangement), mock.patch.object(pytest, "mark", _NoMarks()):
        spec.loader.exec_module(module)
    return module


def _names(folder: str, pattern: str) -> list[str]:
    path = _KERAS.joinpath(*folder.split(".")[2:])
    return sorted(file.stem for file in path.glob(pattern))


def modules() -> Iterator[tuple[str, str]]:
    """All (arrangement, test module) there are."""
    for folder, pattern in _FOLDERS.items():
        for name in _names(folder, pattern):
            yield "leaves", name
            if name in WRAPPER_MODULES:
                yield "wrappers", name


def collect() -> list[Case]:
    """Every test of every module."""
    return [case for arrangement, name in modules() for case in _collect_module(arrangement, name)]


def _collect_module(arrangement: str, name: str) -> list[Case]:
    cases = []
    for group, value in vars(load(arrangement, name)).items():
        if inspect.isclass(value) and issubclass(value, unittest.TestCase):
            methods = unittest.defaultTestLoader.getTestCaseNames(value)
            cases += [Case(arrangement, name, group, method) for method in methods]
        elif inspect.isfunction(value) and group.startswith("test"):
            cases.append(Case(arrangement, name, "", group))
    return cases


def _test(case: Case) -> Callable[[unittest.TestResult], Any]:
    module = load(case.arrangement, case.module)
    if case.group:
        return getattr(module, case.group)(case.method).run
    return unittest.FunctionTestCase(getattr(module, case.method)).run


def run(case: Case) -> Outcome:
    """Runs a test, in a process of its own if its module needs that."""
    if case.module in OWN_PROCESS:
        return _run_elsewhere(case.arrangement, case.module)[str(case)]
    return _run_here(case)


def _run_here(case: Case) -> Outcome:
    made.clear()
    result = unittest.TestResult()
    _test(case)(result)
    wrapped = len(made)
    made.clear()
    bad = [text for _, text in result.errors + result.failures]
    bad += ["unexpected success"] * len(result.unexpectedSuccesses)
    if bad:
        return Outcome("failed", "\n".join(bad), wrapped)
    if result.skipped:
        return Outcome("skipped", "; ".join(why for _, why in result.skipped), wrapped)
    assert result.testsRun == 1
    return Outcome("passed", "", wrapped)


@functools.cache
def _run_elsewhere(arrangement: str, name: str) -> dict[str, Outcome]:
    command = [sys.executable, __file__, arrangement, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return {key: Outcome(**outcome) for key, outcome in outcomes.items()}


if __name__ == "__main__":
    cases = _collect_module(*sys.argv[1:])
    print(json.dumps({str(case): dataclasses.asdict(_run_here(case)) for case in cases}))
