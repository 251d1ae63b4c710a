"""Looks at the code of Keras and TensorFlow: names that exist, attributes that methods set, calls that they make."""

import dis
import functools
import importlib
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

_ROOTS = {"tf": "tensorflow"}


def find(path: str) -> Any:
    """Returns the object of a dotted name, such as `"keras.optimizers.Optimizer.apply"`; modules are imported.

    Raises:
        AttributeError: If there is no such object.
    """
    root, *names = path.split(".")
    root = _ROOTS.get(root, root)
    try:
        found = importlib.import_module(root)
        for i, name in enumerate(names):
            if inspect.ismodule(found) and not hasattr(found, name):
                found = importlib.import_module(".".join([root, *names[: i + 1]]))
            else:
                found = getattr(found, name)
    except ImportError as error:
        raise AttributeError(f"no {path}: {error}") from None
    return found


def arguments_of(function: Any) -> list[inspect.Parameter]:
    """Returns the parameters of a function or of a class's method, without `self`."""
    parameters = list(inspect.signature(function).parameters.values())
    return parameters[1:] if parameters and parameters[0].name == "self" else parameters


def is_of_package(function: Any, path: str) -> bool:
    """Returns `True` if a function was defined in the package that a dotted name begins with."""
    root = path.partition(".")[0]
    return (getattr(function, "__module__", None) or "").partition(".")[0] == _ROOTS.get(root, root)


def mentions(function: Any, name: str) -> bool:
    """Returns `True` if a function's code mentions a name: an attribute, a variable, or a function that it calls."""
    return any(
        name in (*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars) for code in _codes(function)
    )


@functools.cache
def sets(cls: type, name: str) -> bool:
    """Returns `True` if a method of a class, or of a base class, sets an attribute of this name on some object."""
    return any(
        instruction.opname == "STORE_ATTR" and instruction.argval == name
        for base in cls.__mro__
        for member in vars(base).values()
        for code in _codes(member)
        if name in code.co_names
        for instruction in dis.get_instructions(code)
    )


def _codes(member: Any) -> Iterator[CodeType]:
    """Yields the code of a function, method or property and of all functions in it."""
    if isinstance(member, property):
        for accessor in (member.fget, member.fset):
            yield from _codes(accessor)
        return
    member = inspect.unwrap(getattr(member, "__func__", member))
    waiting = [code] if isinstance(code := getattr(member, "__code__", None), CodeType) else []
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
