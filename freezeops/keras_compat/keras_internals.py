"""All that freezeops has to know of Keras's insides, in one place.

Read in Keras 3.15.1: `optimizers/base_optimizer.py`, `backend/tensorflow/optimizer.py`,
`optimizers/loss_scale_optimizer.py` and `optimizers/multi_optimizer.py`.
"""

import inspect
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

_MULTI_OPTIMIZER = getattr(keras.optimizers, "MultiOptimizer", None)
"""New in Keras 3.15."""

Variable = Any
"""A `keras.Variable` or a `tf.Variable`."""


def tf_variable(variable: Variable) -> tf.Variable:
    """The TensorFlow variable behind a Keras variable, or the variable itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def check_strategy(strategy: tf.distribute.Strategy) -> None:
    """Raises where variables live on parameter servers.

    Their workers update them without waiting for each other: what one remembers another
    may write before it is put back.

    Raises:
        NotImplementedError: For such a strategy.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if names & {"ParameterServerStrategyV2", "ParameterServerStrategyV1", "CentralStorageStrategy"}:
        raise NotImplementedError(
            "The strategy must be one without parameter servers: tf.distribute.MirroredStrategy or "
            f"MultiWorkerMirroredStrategy, for example. Received: {type(strategy).__name__}"
        )


def components(variable: Variable) -> list[tf.Variable]:
    """The TensorFlow variables that hold a variable where this is called.

    Under a `tf.distribute.Strategy` with replicas: in a replica its own copy, outside
    of them all copies of this process. Otherwise the variable itself.
    """
    variable = tf_variable(variable)
    if not isinstance(variable, tf.distribute.DistributedValues):
        return [variable]
    context = tf.distribute.get_replica_context()
    if context is None or context.strategy is not variable.distribute_strategy:
        # Outside of the strategy's scope, in a callback of `fit` for example, TensorFlow gives the default strategy's.
        return list(variable.values)
    replica = replica_number()
    assert replica is not None
    return [variable.values[replica % len(variable.values)]]


def replica_number() -> int | None:
    """The number of the replica that this is called in, 0 where there is one; `None` outside of all."""
    context = tf.distribute.get_replica_context()
    return None if context is None else int(tf.get_static_value(context.replica_id_in_sync_group))


def component_beside(other: Variable, variable: Variable, component: tf.Variable) -> tf.Variable:
    """The copy of another variable that lies where `component` is the copy of `variable`."""
    other = tf_variable(other)
    if not isinstance(other, tf.distribute.DistributedValues):
        return other
    copies = tf_variable(variable).values
    return other.values[next(i for i, copy in enumerate(copies) if copy is component)]


def state_variable(values: np.ndarray, name: str) -> keras.Variable:
    """A non-trainable variable of integers, mirrored under a `tf.distribute.Strategy`.

    Where there are several workers, it begins with the chief's values in all of them, as
    other variables do. TensorFlow 2.21 cannot broadcast unsigned integers, so they travel as
    signed ones and the variable itself is created as if there were one worker.
    """
    extended = tf.distribute.get_strategy().extended
    workers = getattr(extended, "_num_workers", 1) if values.dtype.kind == "u" else 1
    if workers > 1:
        content = values.view(np.uint8)
        padded = np.pad(content, (0, -len(content) % 4)).view(np.int32)
        sent = tf.Variable(padded, trainable=False).values[0].numpy()
        values = sent.view(np.uint8)[: len(content)].view(values.dtype)
        extended._num_workers = 1
    try:
        return keras.Variable(
            lambda shape, dtype: tf.constant(values, dtype=dtype),
            shape=values.shape,
            dtype=values.dtype.name,
            trainable=False,
            aggregation="only_first_replica",
            name=name,
        )
    finally:
        if workers > 1:
            extended._num_workers = workers


def stand_in(variable: Variable, shape: Sequence[int]) -> keras.Variable:
    """A variable of another shape that an optimizer takes for the given one.

    It has its name, its path and its identity, by which optimizers find their slots and
    which variables are excluded from weight decay. It begins with zeros.

    Args:
        variable: One of the model's.
        shape: Shape of the new variable.
    """
    own = tf_variable(variable)
    scope, _, name = own.name.removesuffix(":0").rpartition("/")
    with tf.name_scope(f"{scope}/" if scope else ""):
        other = keras.Variable(
            lambda shape, dtype: tf.zeros(shape, dtype),
            shape=tuple(shape),
            dtype=dtype_name(variable),
            trainable=False,
            name=name,
        )
    other._path = variable_path(variable)
    value = other.value
    for copy in value.values if isinstance(value, tf.distribute.DistributedValues) else [value]:
        copy._unique_id = variable_key(variable)
    return other


def hide_trained_variables(optimizer: keras.optimizers.Optimizer) -> None:
    """Keeps what a built optimizer trains out of TensorFlow's checkpoints, and its list free to change."""
    for part in wrapped_optimizers(optimizer):
        variables = list(getattr(part, "_trainable_variables", []))
        if variables:
            del part._trainable_variables
            # Past Keras's and TensorFlow's tracking.
            object.__setattr__(part, "_trainable_variables", variables)


def build_without_slots(optimizer: keras.optimizers.Optimizer, variables: Sequence[Variable]) -> None:
    """What Keras's base class does as a wrapper is built, whose options are the inner optimizer's and need no slots."""
    for i, variable in enumerate(variables):
        optimizer._trainable_variables_indices[optimizer._var_key(variable)] = i
    # Past Keras's and TensorFlow's tracking.
    del optimizer._trainable_variables
    object.__setattr__(optimizer, "_trainable_variables", list(variables))
    optimizer.built = True


def replace_variable(optimizer: keras.optimizers.Optimizer, old: Variable, new: Variable) -> None:
    """Has a built optimizer train another variable of the same identity, with the slots as they are."""
    for part in wrapped_optimizers(optimizer):
        for i, variable in enumerate(getattr(part, "_trainable_variables", [])):
            if variable is old:
                part._trainable_variables[i] = new


def reshape_variable(variable: keras.Variable, values: np.ndarray, beside: Variable) -> None:
    """Gives a Keras variable values of another shape; functions that were traced before keep the old ones.

    Args:
        variable: One of an optimizer's, which keeps its place in all lists.
        values: The new values.
        beside: A variable on the same device.
    """
    with tf.distribute.get_strategy().extended.colocate_vars_with(tf_variable(beside)):
        variable._initialize(lambda: tf.constant(values, variable.dtype))
    variable._shape = tuple(values.shape)
    variable._ndim = values.ndim


def empty_variable(variable: Variable) -> None:
    """Takes all values out of a variable, so that every function that was traced with it fails."""
    value = tf_variable(variable)
    for copy in value.values if isinstance(value, tf.distribute.DistributedValues) else [value]:
        tf.raw_ops.AssignVariableOp(resource=copy.handle, value=tf.zeros([0], copy.dtype), validate_shape=False)


def shape_now(variable: Variable) -> tf.Tensor:
    """The shape of a variable as it is when a function runs, whatever it was when that was traced; int32."""
    return tf.raw_ops.VariableShape(input=components(variable)[0].handle)


class SlotRecord(NamedTuple):
    """A slot that an optimizer made for one of its variables.

    Attributes:
        variable: What it was made for.
        slot: The slot.
        initializer: What it began with, as Keras's initializers are given.
    """

    variable: Variable
    slot: keras.Variable
    initializer: Any


@contextmanager
def recording_slots(optimizer: keras.optimizers.Optimizer) -> Iterator[list[SlotRecord]]:
    """Notes the slots that an optimizer makes, by way of `add_variable_from_reference`, while this is entered."""
    records: list[SlotRecord] = []
    parts = list(base_optimizers(optimizer))
    name = "add_variable_from_reference"
    # Where one wrapper lies in another, both note.
    before = [vars(part).get(name) for part in parts]

    def noting(add: Callable[..., keras.Variable]) -> Callable[..., keras.Variable]:
        def add_variable_from_reference(
            reference_variable: Variable, name: str | None = None, initializer: Any = "zeros"
        ) -> keras.Variable:
            slot = add(reference_variable, name=name, initializer=initializer)
            records.append(SlotRecord(reference_variable, slot, initializer))
            return slot

        return add_variable_from_reference

    for part in parts:
        vars(part)[name] = noting(part.add_variable_from_reference)
    try:
        yield records
    finally:
        for part, noted in zip(parts, before, strict=True):
            vars(part).pop(name)
            if noted is not None:
                vars(part)[name] = noted


def is_variable(x: Any) -> bool:
    """Whether `x` is a Keras or TensorFlow variable."""
    return isinstance(x, keras.Variable | tf.Variable)


def variable_key(variable: Variable) -> str:
    """The same for a Keras variable, its TensorFlow variable and each of its replicas."""
    return _whole(variable)._unique_id


def _whole(variable: Variable) -> tf.Variable:
    """The TensorFlow variable; of a replica's own copy the one of all replicas."""
    variable = tf_variable(variable)
    if not isinstance(variable, tf.distribute.DistributedValues):
        # A copy knows its container; it is attached to the copy or to its handle.
        for part in (variable, getattr(variable, "handle", None)):
            container = getattr(part, "_distributed_container", None)
            if container is not None:
                return container()
    return variable


def variable_path(variable: Variable) -> str:
    """A Keras variable's `path`; a TensorFlow variable's name without `:0`."""
    if isinstance(variable, keras.Variable):
        return variable.path
    return variable.name.removesuffix(":0")


def numpy_of(variable: Variable) -> np.ndarray:
    """A variable's values, of the first copy that this process holds; also outside of a strategy's scope."""
    return components(variable)[0].numpy()


def device_of(variable: Variable) -> str:
    """The device of a variable, or of its first copy."""
    variable = tf_variable(variable)
    return variable.values[0].device if isinstance(variable, tf.distribute.DistributedValues) else variable.device


def dtype_name(variable: Variable) -> str:
    """The dtype as text, such as `"float32"`."""
    return tf.as_dtype(variable.dtype).name


def base_optimizers(optimizer: keras.optimizers.Optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """The optimizers that update variables, behind any wrappers."""
    return (part for part in wrapped_optimizers(optimizer) if not _wraps(part))


def _wraps(optimizer: keras.optimizers.Optimizer) -> bool:
    return hasattr(optimizer, "inner_optimizer") or is_multi_optimizer(optimizer)


def wrapped_optimizers(optimizer: keras.optimizers.Optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """An optimizer and all that it wraps, outermost first."""
    yield optimizer
    if hasattr(optimizer, "inner_optimizer"):
        yield from wrapped_optimizers(optimizer.inner_optimizer)
    elif is_multi_optimizer(optimizer):
        for inner in optimizer.optimizers:
            yield from wrapped_optimizers(inner)


def is_multi_optimizer(optimizer: Any) -> bool:
    """Whether this is a `keras.optimizers.MultiOptimizer`."""
    return _MULTI_OPTIMIZER is not None and isinstance(optimizer, _MULTI_OPTIMIZER)


def step_counter(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """The variable that counts calls of `apply`, of the first optimizer that has a live one."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer._iterations


def step_count(optimizer: keras.optimizers.Optimizer) -> int:
    """How many updates an optimizer has made; accumulated gradients count once."""
    return int(np.asarray(optimizer.iterations))


class StepHook:
    """What `before_updates` calls."""

    identity: Hashable
    """The same for the hooks of replicas that wait for each other, and for no others."""

    def includes(self, variable: Variable) -> bool:
        """Whether the hook has anything to do for this variable."""
        raise NotImplementedError

    def before_update(self, gradient: Any, variable: tf.Variable) -> None:
        """Called before each variable's update."""
        raise NotImplementedError


def before_updates(optimizer: keras.optimizers.Optimizer, hook: StepHook) -> AbstractContextManager:
    """While this lasts, and in this thread, a hook is called right before an optimizer updates a variable.

    With the gradient that it then uses, after everything that can change a gradient or skip a step: accumulation,
    clipping, loss scaling, the sum over replicas.

    Args:
        optimizer: One that wraps no other. It is changed.
        hook: What to call.
    """
    return _during_step(optimizer, "_freezeops_before_updates", {"update_step": _update_with_hook}, hook)


def _update_with_hook(self: Any, replaced: Callable[..., Any], gradient: Any, variable: Any, learning_rate: Any) -> Any:
    if hook := _hook_now(self, "_freezeops_before_updates", [variable]):
        hook.before_update(gradient, variable)
    return replaced(gradient, variable, learning_rate)


class UpdateHook:
    """What updates variables all at once in a step, see `updating_together`."""

    @property
    def identity(self) -> Hashable:
        """The same for the hooks of replicas that wait for each other, and for no others."""
        raise NotImplementedError

    def includes(self, variable: Variable) -> bool:
        """Whether the hook updates this variable."""
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


def can_update_together(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `updating_together` knows how this version of Keras updates variables."""
    return all(callable(getattr(type(optimizer), name, None)) for name in _UPDATES)


def replaced_methods(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Methods of an optimizer of Keras's that somebody replaced: on the instance or, of a step, on the class."""
    cls = type(optimizer)
    on_instance = [
        name
        for name, value in vars(optimizer).items()
        if callable(value) and callable(getattr(cls, name, None)) and not _is_from("freezeops.", _behind_hooks(value))
    ]
    in_a_step = [getattr(cls, name, None) for name in ("apply_gradients", "apply", "update_step", *_UPDATES)]
    return on_instance + [
        method.__name__ for method in in_a_step if callable(method) and not _is_from(("keras.", "tf_keras."), method)
    ]


def _is_from(package: str | tuple[str, ...], function: Any) -> bool:
    """Whether a function was defined in a package (one of several), and does not stand before one that was."""
    own = (getattr(function, "__module__", None) or "").startswith(package)
    return own and not hasattr(function, "__wrapped__")


def unknown_wrappers(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """What wraps an optimizer, of a class that may do more than Keras's own wrappers: write variables, for example."""
    known = keras.optimizers.LossScaleOptimizer, _MULTI_OPTIMIZER
    return [part for part in wrapped_optimizers(optimizer) if _wraps(part) and type(part) not in known]


def updating_together(optimizer: keras.optimizers.Optimizer, hook: UpdateHook) -> AbstractContextManager:
    """While this lasts, and in this thread, a hook updates the variables that it includes, all of a step at once.

    Args:
        optimizer: One that wraps no other. It is changed.
        hook: What to call.
    """
    return _during_step(optimizer, "_freezeops_updates", _UPDATES, hook)


@contextmanager
def _during_step(
    optimizer: Any, name: str, methods: Mapping[str, Callable[..., Any]], hook: StepHook | UpdateHook
) -> Iterator[None]:
    """Puts methods before those of an optimizer, for good; and for a while a hook that they find by `_hook_now`.

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
    """What somebody put on an instance, or the hook where nobody did."""
    while isinstance(method, _Hooked) and method.on_instance is not None:
        method = method.on_instance
    return method


def _hook_now(optimizer: Any, name: str, variables: Sequence[Variable]) -> Any:
    """The hook of this thread's step, or of the step that this thread works for; `None` where there is none.

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
"""By name: what `updating_together` puts before methods of an optimizer."""


class Untracked:
    """Hides a value from the tracking of Keras and TensorFlow."""

    def __init__(self, value: Any):
        self.value = value


def average_slots(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[tuple[Variable, keras.Variable]]:
    """Each variable with the slot of its moving average, for optimizers with `use_ema=True`."""
    for base in base_optimizers(optimizer):
        if not base.use_ema or not base.built:
            continue
        slots = base._model_variables_moving_average
        for variable, average in zip(base._trainable_variables, slots, strict=True):
            if average is not None:
                yield variable, average


def accumulators(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[tuple[Variable, keras.Variable]]:
    """Each variable with its accumulated gradient, for optimizers that accumulate."""
    for base in base_optimizers(optimizer):
        if base.gradient_accumulation_steps and base.built:
            yield from zip(base._trainable_variables, base._accumulated_gradients, strict=True)


def writes_only_given(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether a step writes no variables but those that it is given with a gradient.

    So it is for Keras's own optimizers, unless they put averages into all variables now and then. Any other may write
    whatever it was built with.
    """
    return (
        not unknown_wrappers(optimizer)
        and not any(map(replaced_methods, wrapped_optimizers(optimizer)))
        and all(
            type(base) is getattr(keras.optimizers, type(base).__name__, None)
            and not (base.use_ema and base.ema_overwrite_frequency)
            for base in base_optimizers(optimizer)
        )
    )


def writes_only_rows_with_gradients(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether a step writes no row of a variable but those that its `IndexedSlices` name.

    Of Keras's optimizers that is plain SGD alone: every other one has slots that it
    updates densely, and moves the variable by them.
    """
    return all(
        type(base) is keras.optimizers.SGD
        and not base.momentum
        and base.weight_decay is None  # with 0.0 Keras still writes every row
        and not base.use_ema
        and not base.gradient_accumulation_steps
        and not base.global_clipnorm  # by which the gradient becomes dense
        for base in base_optimizers(optimizer)
    )


def loss_scaler_that_builds(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.LossScaleOptimizer | None:
    """The `LossScaleOptimizer` that wraps an optimizer, if it is now building it.

    `compile` makes the wrapper by itself under `mixed_float16`, and nothing points
    from the inner optimizer to it; but it is on the call stack when it builds.

    Raises:
        ValueError: If there is another optimizer between the two.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.optimizers.LossScaleOptimizer) and caller is not optimizer:
            if caller.inner_optimizer is optimizer:
                return caller
            if any(part is optimizer for part in wrapped_optimizers(caller)):
                raise ValueError(
                    "A LossScaleOptimizer must wrap a MaskedOptimizer directly, or be wrapped by it: what lies "
                    "between would be given gradients that were looked at unmasked. Received: a "
                    f"{type(caller.inner_optimizer).__name__} between the two: wrap that one in MaskedOptimizer"
                )
        frame = frame.f_back
    return None


class WeightsFile(NamedTuple):
    """What Keras loads at the moment.

    Attributes:
        model: The model; `None` where nothing is loaded, or that cannot be told.
        skip_mismatch: Whether what does not fit is to be skipped.
        token: The same during one load; `None` where nothing is loaded.
    """

    model: Any = None
    skip_mismatch: bool = False
    token: Any = None


def weights_being_loaded() -> WeightsFile:
    """What `load_weights` was called with, or `load_model` loads, if this is called by it.

    Keras hands it to nobody; but it is on the call stack while optimizers load their state.
    """
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        loads = frame.f_code.co_name in ("load_weights_only", "_load_model_from_fileobj")
        if loads and module.endswith(".saving.saving_lib"):
            skip = bool(frame.f_locals.get("skip_mismatch", False))
            return WeightsFile(frame.f_locals.get("model"), skip, id(frame))
        frame = frame.f_back
    return WeightsFile()


def paths_of_model(optimizer: Any) -> set[str]:
    """The paths of all variables, trained or not, of the model that an optimizer is for, where it is at hand.

    That is, where the model builds the optimizer or loads a file, or a checkpoint is restored: it is on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        for name in ("self", "model"):
            candidate: Any = frame.f_locals.get(name)
            inner = getattr(candidate, "optimizer", None) if hasattr(candidate, "trainable_variables") else None
            if inner is not None and any(part is optimizer for part in wrapped_optimizers(inner)):
                return {variable_path(variable) for variable in candidate.variables if is_variable(variable)}
        if (found := getattr(frame.f_locals.get("self"), "all_python_objects", None)) is not None:
            layers = [each for each in found if isinstance(each, keras.Layer | tf.Module)]
            return {variable_path(each) for layer in layers for each in layer.variables if is_variable(each)}
        frame = frame.f_back
    return set()


def mask_before_loss_scaling(
    scaler: keras.optimizers.LossScaleOptimizer,
    mask: Callable[[Sequence[Any], Sequence[Variable] | None], list[Any]],
) -> None:
    """Has a `LossScaleOptimizer` mask gradients before it looks whether they are finite.

    Args:
        scaler: The wrapper. It is changed, once.
        mask: Masks gradients, given the variables or `None` for all.
    """
    if "_tf_apply" in vars(scaler):
        return
    apply = scaler._tf_apply

    def masked_apply(grads: Sequence[Any], trainable_variables: Sequence[Variable] | None = None) -> None:
        apply(mask(grads, trainable_variables), trainable_variables)

    scaler._tf_apply = masked_apply


def guard_swaps(around: Callable[[Any], AbstractContextManager | None]) -> None:
    """Has Keras's `SwapEMAWeights` do its work inside of a guard, and on the optimizers that have averages.

    It swaps a variable with its average by adding and subtracting, which turns -0.0
    into 0.0 and an infinity into NaN, and gives nobody a say. And it looks behind one
    wrapper only. Changes the callback's class, once; for optimizers that `around` does not
    know it does what it did.

    Args:
        around: Gives a context manager for a model's optimizer; `None` for those that it does not know.
    """
    callback = keras.callbacks.SwapEMAWeights

    def guarded(all_of: Callable[[Any], None], of_one: str) -> Callable[[Any], None]:
        def call(self: Any) -> None:
            optimizer = self.model.optimizer
            if (guard := around(optimizer)) is None:
                all_of(self)
                return
            averaging = [base for base in base_optimizers(optimizer) if base.use_ema]
            if not averaging or not all(hasattr(base, "_model_variables_moving_average") for base in averaging):
                raise ValueError(
                    "SwapEMAWeights must be used with an optimizer that has `use_ema=True` and is built. Received: "
                    f"use_ema={[base.use_ema for base in base_optimizers(optimizer)]}"
                )
            with guard:
                for base in averaging:
                    getattr(self, of_one)(base)

        call._freezeops_guard = True  # type: ignore[attr-defined]
        return call

    for name, of_one in (
        ("_swap_variables", "_tf_swap_variables"),
        ("_finalize_ema_values", "_tf_finalize_ema_values"),
    ):
        method = getattr(callback, name)
        if not hasattr(method, "_freezeops_guard"):
            setattr(callback, name, guarded(method, of_one))


def moving_state(target: Any) -> list[Variable]:
    """Float state that a layer updates by itself while it is trainable; of anything else, none.

    Args:
        target: A layer of Keras or of tf_keras, or something else.
    """
    found = []
    for part in _layers_of(target):
        if part.trainable:
            state = part._non_trainable_variables if isinstance(part, keras.Layer) else part._non_trainable_weights
            found += [variable for variable in state if tf.as_dtype(variable.dtype).is_floating]
    return found


def rewritten_weights(target: Any) -> list[Variable]:
    """Weights that layers of known classes assign in their forward pass, trainable or not; of anything else, none.

    Args:
        target: A layer of Keras or of tf_keras, or something else.
    """
    found = []
    for part in _layers_of(target):
        names = {cls.__name__ for cls in type(part).__mro__}
        if "SpectralNormalization" in names:
            found += [getattr(part.layer, name, None) for name in ("kernel", "embeddings")]
        elif "PruneLowMagnitude" in names:  # of TensorFlow Model Optimization
            found += [variable for variable, *_ in getattr(part, "pruning_vars", [])]
    return [variable for variable in found if is_variable(variable)]


def _layers_of(target: Any) -> Iterator[Any]:
    return iter(target._flatten_layers() if hasattr(target, "_flatten_layers") else ())


def traced_function() -> Any:
    """The function's graph that operations are added to now; `None` where they run at once."""
    if tf.executing_eagerly():
        return None
    graph = tf.compat.v1.get_default_graph()
    return graph if graph.building_function else None


def outermost_traced_function() -> Any:
    """As `traced_function`, of the outermost of the functions that are being traced."""
    graph = traced_function()
    while graph is not None and getattr(graph.outer_graph, "building_function", False):
        graph = graph.outer_graph
    return graph


def when_traced(graph: Any, call: Callable[[], None]) -> None:
    """Calls something when a function has been traced, before it runs; never, where TensorFlow has no way for it."""
    if getattr(graph, "_scope_exit_callbacks", None) is not None:
        graph._add_scope_exit_callback(call)


def read_variables(graph: Any) -> list[tf.Variable]:
    """The variables that a function reads, and those that are read in functions that it calls."""
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
    """Which variables a traced function writes, functions that it calls included.

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
        """Whether a function, or one that it calls, writes the variable that is its argument here."""
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
    """Whether this gives a variable that was created as the function was traced its first value."""
    if operation.type not in ("If", "StatelessIf"):
        return False
    condition = operation.inputs[0].op
    while condition.type in ("LogicalNot", "Identity"):
        condition = condition.inputs[0].op
    return condition.type == "VarIsInitializedOp"
