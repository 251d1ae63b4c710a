"""Writes of variables outside of the optimizer: found in the graph of a training step, when it is traced.

An optimizer keeps frozen entries around what it does itself. A layer that rewrites its weights in the forward pass, or
a step that assigns them, moves them in spite of it: that is said once, before the first step runs.
"""

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from freezeops.keras_compat.layers import moving_state, rewritten_weights
from freezeops.keras_compat.tracing import (
    outermost_traced_function,
    read_variables,
    traced_function,
    when_traced,
    written_variables,
)
from freezeops.keras_compat.variables import Variable, is_variable, tf_variable, variable_key, variable_path
from freezeops.notices import warn
from freezeops.partitions.partition import Partition


class _Trace:
    """A function that is traced.

    Attributes:
        guarded: Ranges of its operations around which frozen entries are kept.
        watchers: Those that look at it in the end.
    """

    def __init__(self) -> None:
        self.guarded: list[slice] = []
        self.watchers: weakref.WeakSet[TracedWrites] = weakref.WeakSet()


# Not on the optimizers: those may be copied, and graphs not.
_traces: "weakref.WeakKeyDictionary[Any, _Trace]" = weakref.WeakKeyDictionary()


@contextmanager
def guarded() -> Iterator[None]:
    """Around what keeps frozen entries itself: what it writes is not looked at."""
    graph = traced_function()
    if graph is None:
        yield
        return
    first = len(graph.get_operations())
    try:
        yield
    finally:
        operations = slice(first, len(graph.get_operations()))
        _traces.setdefault(graph, _Trace()).guarded.append(operations)


def _guarded_operations(graph: Any) -> set[str]:
    """The names of a function's operations around which frozen entries are kept."""
    trace = _traces.get(graph)
    if trace is None:
        return set()
    operations = graph.get_operations()
    return {operation.name for part in trace.guarded for operation in operations[part]}


class TracedWrites:
    """The writes in the steps of one optimizer that are not its own.

    All of it is kept, also where nothing is frozen yet: a mask may change later without a new trace.
    """

    def __init__(self) -> None:
        self._variables: dict[str, str] = {}
        self._states: dict[str, str] = {}
        self._said: set[str] = set()

    def watch(self, partitions: Sequence[Partition]) -> None:
        """Looks at the function that is traced now, once it has been traced to its end.

        Args:
            partitions: Of the variables that the optimizer knows.
        """
        graph = outermost_traced_function()
        if graph is None:
            return
        watchers = _traces.setdefault(graph, _Trace()).watchers
        if self not in watchers:
            watchers.add(self)
            when_traced(graph, functools.partial(self._look, graph, partitions))

    def _look(self, graph: Any, partitions: Sequence[Partition]) -> None:
        known = {variable_key(part.variable): part for part in partitions}
        states = [variable for variable in read_variables(graph) if _is_state(variable)]
        variables = [part.variable for part in partitions]
        variables += [variable for variable in states if variable_key(variable) not in known]
        for variable in written_variables(graph, variables, _guarded_operations):
            key = variable_key(variable)
            if key in known:
                self._variables[key] = known[key].path
            else:
                self._states[key] = variable_path(variable)
        self.warn(partitions)

    def warn(self, partitions: Sequence[Partition]) -> None:
        """Warns of what was found and holds frozen entries now, or lies beside some; of each variable once.

        Args:
            partitions: Of the variables that the optimizer knows.
        """
        variables = {key: path for key, path in self._variables.items() if key not in self._said}
        states = {key: path for key, path in self._states.items() if key not in self._said}
        if not variables and not states:
            return
        with tf.init_scope():
            frozen = _FrozenVariables(partitions)
            variables = {key: path for key, path in variables.items() if frozen.any_of(key)}
            states = {key: path for key, path in states.items() if frozen.is_beside(path)}
        self._said |= variables.keys() | states.keys()
        messages = []
        if variables:
            messages.append(
                "The training step writes variables with frozen entries itself, outside of the optimizer, so these "
                f"entries move: {sorted(variables.values())}. A layer may rewrite its weights in the forward pass "
                "(keras.layers.SpectralNormalization, pruning wrappers): take it out, or freeze nothing there. Writes "
                "of your own can be put into `with optimizer.frozen_entries():`."
            )
        if states:
            messages.append(_moving_message(sorted(states.values())))
        if messages:
            warn(" ".join(messages))

    def warn_of_layers(self, targets: Sequence[Any]) -> None:
        """Warns of frozen layers that are known to write their weights, or other state, in the forward pass.

        At once, since steps that are not traced are not looked at. What was said here is not said again.

        Args:
            targets: What a call freezes: layers, variables, patterns.
        """
        targets = [part for part in targets if not is_variable(part)]
        rewritten = self._unsaid([each for part in targets for each in rewritten_weights(part)])
        states = self._unsaid([each for part in targets for each in moving_state(part)])
        messages = []
        if rewritten:
            paths = [variable_path(variable) for variable in rewritten]
            messages.append(
                f"These layers rewrite their weights in the forward pass, so frozen entries move: {paths}. Take the "
                "wrapper out (keras.layers.SpectralNormalization, pruning wrappers), or freeze nothing there."
            )
        if states:
            paths = [variable_path(variable) for variable in states]
            messages.append("Freezing a layer freezes its trainable variables. " + _moving_message(paths))
        if messages:
            self._said |= {variable_key(variable) for variable in rewritten + states}
            warn(" ".join(messages))

    def _unsaid(self, variables: Sequence[Variable]) -> list[Variable]:
        """Returns the variables without a warning so far, each once."""
        by_key = {variable_key(variable): variable for variable in variables}
        return [variable for key, variable in by_key.items() if key not in self._said]


def _moving_message(paths: Sequence[str]) -> str:
    return (
        f"This state still moves in the forward pass: {list(paths)}. It is moving statistics or the like, which no "
        "optimizer writes or keeps. Set `layer.trainable = False` to stop it."
    )


def _is_state(variable: Variable) -> bool:
    """Returns whether a variable can be state of a layer: not a counter, a seed or a metric."""
    return (
        not variable.trainable
        and tf.as_dtype(variable.dtype).is_floating
        # Keras's metrics.
        and getattr(variable, "aggregation", None) != tf.VariableAggregation.SUM
    )


class _FrozenVariables:
    """The variables that have frozen entries now."""

    def __init__(self, partitions: Sequence[Partition]):
        self._parts = {variable_key(part.variable): part for part in partitions}
        self._inside: dict[str, list[str]] = {}
        self._names: dict[str, str] = {}
        for key, part in self._parts.items():
            # TensorFlow's names, since nothing else is known of the state's.
            name = self._names[key] = variable_path(tf_variable(part.variable))
            scope = _scope(name)
            while scope:
                self._inside.setdefault(scope, []).append(key)
                scope = _scope(scope)

    def any_of(self, key: str) -> bool:
        """Returns whether a variable has a frozen entry."""
        part = self._parts.get(key)
        return part is not None and part.frozen_count > 0

    def _all_of(self, key: str) -> bool:
        part = self._parts[key]
        return part.frozen_count == part.size > 0

    def is_beside(self, path: str) -> bool:
        """Returns whether state is that of a layer with frozen entries.

        That is, whether a variable of its own scope has some, or all variables in its scope are frozen as a whole; of
        a layer without any, in the scope around it.
        """
        scope, names = _scope(path), set(self._names.values())
        if path in names:
            return False  # of a copy of the model
        if any(self.any_of(key) for key in self._inside.get(scope, ()) if _scope(self._names[key]) == scope):
            return True
        while scope:
            if scope in names:
                return False  # what is kept for one variable, as an average of it
            if inside := self._inside.get(scope):
                return all(map(self._all_of, inside))
            scope = _scope(scope)
        return False


def _scope(path: str) -> str:
    return path.rpartition("/")[0]
