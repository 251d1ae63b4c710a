"""Hooks that an optimizer calls in a step: right before it updates a variable, or instead of updating it."""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import keras
import tensorflow as tf

from freezeops.keras_compat import contract
from freezeops.keras_compat.variables import Untracked, Variable


class StepHook:
    """A hook for `before_updates`: called before each update of a variable."""

    identity: Hashable
    """A key that the hooks of replicas share which wait for each other, and no other hooks."""

    def includes(self, variable: Variable) -> bool:
        """Returns `True` if the hook is for this variable."""
        raise NotImplementedError

    def before_update(self, gradient: Any, variable: tf.Variable) -> None:
        """Called before each variable's update."""
        raise NotImplementedError


def before_updates(optimizer: keras.optimizers.Optimizer, hook: StepHook) -> AbstractContextManager:
    """Returns a context manager in which an optimizer calls a hook right before it updates a variable, in this thread.

    With the gradient that it then uses, after everything that can change a gradient or skip a step: accumulation,
    clipping, loss scaling, the sum over replicas.

    Args:
        optimizer: One that wraps no other. It is changed.
        hook: The hook.
    """
    return _during_step(optimizer, "_freezeops_before_updates", {"update_step": _update_with_hook}, hook)


def _update_with_hook(self: Any, replaced: Callable[..., Any], gradient: Any, variable: Any, learning_rate: Any) -> Any:
    if hook := _hook_now(self, "_freezeops_before_updates", [variable]):
        hook.before_update(gradient, variable)
    return replaced(gradient, variable, learning_rate)


class UpdateHook:
    """A hook for `updating_together`: updates variables of a step all at once."""

    @property
    def identity(self) -> Hashable:
        """A key that the hooks of replicas share which wait for each other, and no other hooks."""
        raise NotImplementedError

    def includes(self, variable: Variable) -> bool:
        """Returns `True` if the hook updates this variable."""
        raise NotImplementedError

    def update(
        self,
        strategy: tf.distribute.Strategy,
        grads_and_vars: Sequence[tuple[Any, tf.Variable]],
        learning_rate: Any,
    ) -> None:
        """Updates variables that it includes, weight decay among it, instead of the optimizer's `update_step`.

        Called in the cross-replica context, where there are replicas.
        """
        raise NotImplementedError


def can_update_together() -> bool:
    """Returns `True` if `updating_together` knows how this version of Keras updates variables."""
    return contract.is_on(contract.FUSED)


def updating_together(optimizer: keras.optimizers.Optimizer, hook: UpdateHook) -> AbstractContextManager:
    """Returns a context manager in which a hook updates the variables that it includes, all of a step at once.

    In this thread alone.

    Args:
        optimizer: One that wraps no other. It is changed.
        hook: The hook.
    """
    return _during_step(optimizer, "_freezeops_updates", _UPDATES, hook)


@contextmanager
def _during_step(
    optimizer: Any, name: str, methods: Mapping[str, Callable[..., Any]], hook: StepHook | UpdateHook
) -> Iterator[None]:
    """Puts methods before those of an optimizer, for good, and lets them find a hook with `_hook_now`, for a while.

    What somebody has put on the instance is called as before.

    The hook only for a while, since another `MaskedOptimizer` may wrap the same optimizer, and people may call it
    themselves.
    """
    if not hasattr(optimizer, name):
        setattr(optimizer, name, Untracked({}))
    for method_name, method in methods.items():
        # Also where somebody replaced the method, or took it away, since the last step.
        now = vars(optimizer).get(method_name)
        if not (isinstance(now, _Hooked) and now.method is method):
            setattr(optimizer, method_name, _Hooked(optimizer, method_name, method, now))
    hooks, thread = getattr(optimizer, name).value, threading.get_ident()
    before = hooks.get(thread)
    hooks[thread] = hook
    try:
        yield
    finally:
        if before is None:
            del hooks[thread]
        else:
            hooks[thread] = before


class _Hooked:
    """A method of one optimizer, with another one before it that is given it to call.

    Args:
        optimizer: The optimizer.
        name: The method's name.
        method: What is called, with the optimizer and the method as its first arguments.
        on_instance: The method that somebody put on the instance; `None`: that of its class.
    """

    def __init__(self, optimizer: Any, name: str, method: Callable[..., Any], on_instance: Callable[..., Any] | None):
        self.method = method
        self._optimizer = optimizer
        self._name = name
        self.on_instance = on_instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replaced = self.on_instance
        if replaced is None:
            replaced = getattr(type(self._optimizer), self._name).__get__(self._optimizer)
        return self.method(self._optimizer, replaced, *args, **kwargs)


def _behind_hooks(method: Any) -> Any:
    """Returns the method that somebody put on an instance; the hook itself if nobody did."""
    while isinstance(method, _Hooked) and method.on_instance is not None:
        method = method.on_instance
    return method


def _hook_now(optimizer: Any, name: str, variables: Sequence[Variable]) -> Any:
    """Returns the hook of this thread's step, or of the step that this thread works for; `None` if there is none.

    Args:
        optimizer: What has the hook.
        name: Its attribute.
        variables: What is updated now.
    """
    hooks = getattr(optimizer, name).value
    if (own := hooks.get(threading.get_ident())) or not tf.distribute.has_strategy():
        return own
    # Replicas wait in threads of their own while one that has none updates for them. Others may wait in other steps.
    waiting = [hook for hook in list(hooks.values()) if any(map(hook.includes, variables))]
    if len({hook.identity for hook in waiting}) > 1:
        raise RuntimeError(
            "An optimizer must make one step of a variable at a time. "
            f"Received: {len(waiting)} steps at once of {optimizer.name!r}"
        )
    return waiting[0] if waiting else None


def _decay_others(self: Any, replaced: Callable[..., Any], variables: Any) -> None:
    variables = list(variables)
    hook = _hook_now(self, "_freezeops_updates", variables)
    others = [variable for variable in variables if hook is None or not hook.includes(variable)]
    if others:
        replaced(others)


def _update_others(
    self: Any, replaced: Callable[..., Any], distribution: Any, grads_and_vars: Any, learning_rate: Any
) -> None:
    grads_and_vars = list(grads_and_vars)
    hook = _hook_now(self, "_freezeops_updates", [variable for _, variable in grads_and_vars])
    if hook is not None:
        together = [pair for pair in grads_and_vars if hook.includes(pair[1])]
        grads_and_vars = [pair for pair in grads_and_vars if not hook.includes(pair[1])]
        if together:
            hook.update(distribution, together, learning_rate)
    replaced(distribution, grads_and_vars, learning_rate)


_UPDATES: dict[str, Callable[..., None]] = {
    "_apply_weight_decay": _decay_others,
    "_distributed_tf_update_step": _update_others,
}
"""By name, the methods that `updating_together` puts before those of an optimizer."""
