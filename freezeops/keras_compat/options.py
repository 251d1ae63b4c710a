"""Options of the inner optimizer, read from the optimizer around it and set on it."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from freezeops.keras_compat.stored_state import store_scalers_around
from freezeops.keras_compat.variables import Variable
from freezeops.keras_compat.wrapped import base_optimizers, is_multi_optimizer, wrapped_optimizers


class InnerOption:
    """An attribute of a wrapper that is the inner optimizer's: `clipnorm = InnerOption()`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        if wrapper is None:
            return self
        # The base class looks at its own defaults, and sets them, before there is an inner optimizer.
        return getattr(wrapper._option_owner(self._name), self._name) if wrapper._has_inner_optimizer() else None

    def __set__(self, wrapper: Any, value: Any) -> None:
        if wrapper._has_inner_optimizer():
            wrapper._set_option(wrapper._option_owner(self._name), self._name, value)


class InnerOptions:
    """Mix-in that gives a wrapper the options of the optimizer that it wraps.

    Those that every optimizer has, and by their names those that only the inner one has, such as
    `beta_1` or a loss scaler's `dynamic_growth_steps`. Functions that were traced before go on
    with the options that they were traced with, as with the inner optimizer itself.
    """

    weight_decay = InnerOption()
    clipnorm = InnerOption()
    global_clipnorm = InnerOption()
    clipvalue = InnerOption()
    use_ema = InnerOption()
    ema_momentum = InnerOption()
    ema_overwrite_frequency = InnerOption()
    update_step = InnerOption()

    def __getattr__(self, name: str) -> Any:
        # Called where the usual way found nothing.
        if hasattr(type(self), name):
            # A property raised: as it did, not as if there were none.
            return object.__getattribute__(self, name)
        if (owner := self._owner_of_its_own(name)) is not None:
            value = getattr(owner, name)
            if not callable(value):
                return value
            raise AttributeError(
                f"A MaskedOptimizer has no {name!r}, but its inner optimizer has: what that writes is not guarded. "
                f"Received: name={name!r}. Call it on `optimizer.inner_optimizer`"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in vars(self) or hasattr(type(self), name)
        if own or (owner := self._owner_of_its_own(name)) is None:
            super().__setattr__(name, value)
        else:
            self._set_option(owner, name, value)

    def _has_inner_optimizer(self) -> bool:
        return bool({"inner_optimizer", "_inner_optimizer"} & vars(self).keys())

    def _inside(self) -> Iterator[Any]:
        return wrapped_optimizers(self.inner_optimizer)

    def _option_owner(self, name: str) -> Any:
        """Returns the optimizer that an option belongs to.

        Raises:
            AttributeError: If there are several.
        """
        inside = list(self._inside())
        if any(map(is_multi_optimizer, inside)):
            raise AttributeError(
                f"`{name}` must be read from the parts of a MultiOptimizer, and set on them: "
                f"`optimizer.inner_optimizer.optimizers[0].{name}`, for example. Received: name={name!r} of a "
                "MaskedOptimizer around several optimizers"
            )
        return inside[-1]

    def _owner_of_its_own(self, name: str) -> Any:
        """Returns the wrapped optimizer with a public attribute that this one has not; `None` if none has it."""
        # `_registry` is the first attribute of this one's own that is private: before, it is not all there.
        if name.startswith("_") or "_registry" not in vars(self):
            return None
        for part in self._inside():
            if not is_multi_optimizer(part) and hasattr(part, name):
                several = any(map(is_multi_optimizer, self._inside()))
                return self._option_owner(name) if several else part
        return None

    @staticmethod
    def _set_option(optimizer: Any, name: str, value: Any) -> None:
        """Sets an option of an inner optimizer.

        Raises:
            ValueError: If that needs slots, and the optimizer was built without them.
        """
        built = getattr(optimizer, "built", False) or getattr(optimizer, "_built", False)
        slots = _SLOTS.get(name)
        if value and built and slots is not None and not hasattr(optimizer, slots):
            raise ValueError(
                f"`{name}` must be set before the optimizer is built, which makes slots for it. "
                f"Received: {name}={value!r} for {optimizer.name!r}, which is built without"
            )
        setattr(optimizer, name, value)


class KerasWrapper(InnerOptions):
    """Hands on to the inner optimizer all that Keras 3 asks of an optimizer around a step: a mix-in."""

    inner_optimizer: keras.optimizers.Optimizer

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_scale_factor":
            # Past Keras, which drops a value that is there already: the setter is to see every scaler put around.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @tf.autograph.experimental.do_not_convert
    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss, scaled as the inner optimizer wants it."""
        return self.inner_optimizer.scale_loss(loss)

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's; whatever wraps this one switches it off by setting `None`."""
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        # The base class sets its own default before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            # A `LossScaleOptimizer` sets it as it wraps this one.
            store_scalers_around(KerasWrapper)
            self.inner_optimizer.loss_scale_factor = factor

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of steps."""
        return self.inner_optimizer.iterations

    def exclude_from_weight_decay(
        self, var_list: Sequence[Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from the inner optimizer's weight decay; see Keras."""
        for optimizer in base_optimizers(self.inner_optimizer):
            optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)


_SLOTS = {
    "use_ema": "_model_variables_moving_average",
    "gradient_accumulation_steps": "_accumulated_gradients",
}
"""By option, the attribute that holds the slots it needs."""
