"""Functions that are being traced, and the variables that they write."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from freezeops.keras_compat import contract
from freezeops.keras_compat.variables import Variable, _whole, tf_variable


def traced_function() -> Any:
    """Returns the function's graph that operations are added to now; `None` where they run at once.

    Also `None` where this version of TensorFlow says nothing of what a function writes.
    """
    if tf.executing_eagerly() or not contract.is_on(contract.WRITES):
        return None
    graph = tf.compat.v1.get_default_graph()
    return graph if graph.building_function else None


def outermost_traced_function() -> Any:
    """Returns as `traced_function`, of the outermost of the functions that are being traced."""
    graph = traced_function()
    while graph is not None and getattr(graph.outer_graph, "building_function", False):
        graph = graph.outer_graph
    return graph


def when_traced(graph: Any, call: Callable[[], None]) -> None:
    """Calls something once a function is traced, before it runs; never if TensorFlow has no way for it."""
    if getattr(graph, "_scope_exit_callbacks", None) is not None:
        graph._add_scope_exit_callback(call)


def read_variables(graph: Any) -> list[tf.Variable]:
    """Returns the variables that a function reads, functions that it calls included."""
    watched = map(_whole, getattr(graph, "_watched_variables", ()))
    return list({id(variable): variable for variable in watched}.values())


_WRITING = re.compile("Assign(Add|Sub)?VariableOp|Resource(Scatter|StridedSliceAssign|Apply|SparseApply).*")
"""Types of TensorFlow's operations that write a variable."""

_CALLING = {
    "PartitionedCall": (("f",), 0),
    "StatefulPartitionedCall": (("f",), 0),
    "If": (("then_branch", "else_branch"), 1),
    "StatelessIf": (("then_branch", "else_branch"), 1),
    "Case": (("branches",), 1),
    "StatelessCase": (("branches",), 1),
    "While": (("cond", "body"), 0),
    "StatelessWhile": (("cond", "body"), 0),
}
"""Types of operations that call functions: where these are named, and which input is a function's first."""


def written_variables(
    graph: Any, variables: Sequence[Variable], passed_over: Callable[[Any], set[str]]
) -> list[Variable]:
    """Returns those of some variables that a traced function writes, functions that it calls included.

    Only operations that take one of these variables are looked at.

    Args:
        graph: The function's.
        variables: Those to look for.
        passed_over: For the graph of a function, the names of operations that do not count.
    """
    search = _Search(passed_over)
    of_handle = {}
    for variable in variables:
        value = tf_variable(variable)
        for copy in value.values if isinstance(value, tf.distribute.DistributedValues) else [value]:
            of_handle[id(copy.handle)] = variable
    found: dict[int, Variable] = {}
    for outside, inside in graph.captures:
        variable = of_handle.get(id(outside))
        if variable is not None and id(variable) not in found and search.is_written(inside):
            found[id(variable)] = variable
    return list(found.values())


class _Search:
    """Looks for operations that write a variable."""

    def __init__(self, passed_over: Callable[[Any], set[str]]):
        self._passed_over = passed_over
        self._names: dict[int, set[str]] = {}
        self._answers: dict[int, bool] = {}
        # An `id` may be given again to something else once it is gone.
        self._kept: list[Any] = []

    def is_written(self, resource: tf.Tensor) -> bool:
        """Returns `True` if a function, or one that it calls, writes the variable that is its argument here."""
        if id(resource) not in self._answers:
            self._kept.append(resource)
            self._answers[id(resource)] = any(self._writes(each, resource) for each in resource.consumers())
        return self._answers[id(resource)]

    def _writes(self, operation: tf.Operation, resource: tf.Tensor) -> bool:
        graph = operation.graph
        if id(graph) not in self._names:
            self._kept.append(graph)
            self._names[id(graph)] = self._passed_over(graph)
        if operation.name in self._names[id(graph)]:
            return False
        if _WRITING.fullmatch(operation.type):
            return True
        if operation.type not in _CALLING or _is_initializing(operation):
            return False
        try:
            only_read = operation.get_attr("_read_only_resource_inputs")
        except ValueError:
            only_read = []
        attributes, first = _CALLING[operation.type]
        numbers = [i for i, each in enumerate(operation.inputs) if each is resource and i not in only_read]
        functions = []
        for attribute in attributes if numbers else ():
            named = operation.get_attr(attribute)
            functions += [graph._get_function(each.name) for each in (named if isinstance(named, list) else [named])]
        return any(
            # What is not known is as TensorFlow says: not only read.
            function is None or self.is_written(function.graph.inputs[number - first])
            for number in numbers
            for function in functions
        )


def _is_initializing(operation: tf.Operation) -> bool:
    """Returns `True` for the operation that gives its first value to a variable created while tracing."""
    if operation.type not in ("If", "StatelessIf"):
        return False
    condition = operation.inputs[0].op
    while condition.type in ("LogicalNot", "Identity"):
        condition = condition.inputs[0].op
    return condition.type == "VarIsInitializedOp"
