"""Keras's SGD and Adam, with what the published recipes need besides.

    gradient -> clipped (Keras) -> + l2 * weight -> step -> average of weights

Keras's `weight_decay` is decoupled: it shrinks the weights themselves, by the
learning rate, before the step. The recipes of PyTorch's time add `l2 * weight`
to the gradient, after clipping. Its `use_ema` forgets exponentially, where
averaged SGD takes the mean of all weights since a certain step, or one in
which a weight counts the more the later it is, or several of those.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from multilstm.errors import UserError
from multilstm.ops import add_gradients
from multilstm.presets import Preset

# For each thread: TensorFlow traces the step of each device in one of its own.
_rate_factor: ContextVar[Any] = ContextVar("rate_factor", default=None)


class Extras(keras.optimizers.Optimizer):
    """What both optimizers add to Keras's, of which they are made too."""

    def __init__(
        self,
        *args: Any,
        l2: float = 0.0,
        averages: bool = False,
        averaging_power: float | Sequence[float] = 0.0,
        **kwargs: Any,
    ) -> None:
        powers = (
            averaging_power
            if isinstance(averaging_power, Sequence)
            else [averaging_power]
        )
        if not powers or not all(power >= 0 for power in powers):
            raise UserError(
                "`averaging_power` must be 0, for a plain mean, or more, or "
                "several such numbers, for as many averages; received "
                f"{averaging_power!r}."
            )
        super().__init__(*args, **kwargs)
        self.l2 = l2
        self.averages = averages
        self.averaging_powers = tuple(powers)
        self._starts_averaging = False

    def build(self, variables: list[Any]) -> None:
        """As Keras's, with a place for the averages."""
        if self.built:
            return
        super().build(variables)
        if not self.averages:
            return
        # How many steps are averaged, and whether the next one is.
        self.num_averaged, self.is_averaging = (
            self.add_variable((), initializer=initializer, name=name)
            for name, initializer in (
                ("num_averaged", "zeros"),
                ("is_averaging", "ones" if self._starts_averaging else "zeros"),
            )
        )
        self.averages_of = [
            [
                self.add_variable_from_reference(variable, name="average")
                for variable in variables
            ]
            for _ in self.averaging_powers
        ]

    def start_averaging(self) -> None:
        """Lets the weights after each step from now on be averaged.

        Raises:
            UserError: If the optimizer was made without room for averages.
        """
        if not self.averages:
            raise UserError(
                "Averages need an optimizer that has room for them; this one "
                "has none. Make it with averages=True."
            )
        self._starts_averaging = True
        if self.built:
            self.is_averaging.assign(1.0)

    @property
    def has_averages(self) -> bool:
        """Whether there are averages, of one step or more."""
        if not (self.averages and self.built):
            return False
        return bool(ops.convert_to_numpy(self.num_averaged) > 0)

    @contextmanager
    def averaged_weights(self, place: int = 0) -> Iterator[None]:
        """Puts averages into the weights, where there are any.

        Args:
            place: That of their power in `averaging_powers`.
        """
        if not self.has_averages:
            yield
            return
        kept = [
            ops.convert_to_numpy(variable).copy()
            for variable in self._trainable_variables
        ]
        averages = self.averages_of[place]
        for variable, average in zip(
            self._trainable_variables, averages, strict=True
        ):
            variable.assign(ops.convert_to_numpy(average).copy())
        try:
            yield
        finally:
            for variable, value in zip(
                self._trainable_variables, kept, strict=True
            ):
                variable.assign(value)

    @contextmanager
    def rate_times(self, factor: Any) -> Iterator[None]:
        """Takes the steps within at so many times the learning rate."""
        token = _rate_factor.set(factor)
        try:
            yield
        finally:
            _rate_factor.reset(token)

    def _get_current_learning_rate(self) -> Any:
        rate = super()._get_current_learning_rate()
        # Untouched, it is a variable, which a schedule assigns to.
        factor = _rate_factor.get()
        return rate if factor is None else rate * factor

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """As Keras's, with the weights' own gradient."""
        if self.l2:
            gradient = gradient + self.l2 * ops.cast(variable, gradient.dtype)
        super().update_step(gradient, variable, learning_rate)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """As Keras's, of all devices; then what was reached is averaged."""
        super().apply(add_gradients(self, list(grads)), trainable_variables)
        if not self.averages:
            return
        is_averaging = ops.convert_to_tensor(self.is_averaging)
        if self.gradient_accumulation_steps:
            steps = self.gradient_accumulation_steps
            # `iterations` counts the groups.
            has_moved = ops.equal(self._iterations % steps, 0)
            is_averaging = is_averaging * ops.cast(has_moved, "float32")
        self.num_averaged.assign(self.num_averaged + is_averaging)
        number = ops.maximum(self.num_averaged, 1.0)
        for power, averages in zip(
            self.averaging_powers, self.averages_of, strict=True
        ):
            share = is_averaging * (power + 1) / (power + number)
            for variable, average in zip(
                self._trainable_variables, averages, strict=True
            ):
                difference = ops.subtract(variable, average)
                average.assign_add(difference * ops.cast(share, average.dtype))

    def get_config(self) -> dict[str, Any]:
        """As Keras's."""
        return {
            **super().get_config(),
            "l2": self.l2,
            "averages": self.averages,
            "averaging_power": list(self.averaging_powers),
        }


@keras.saving.register_keras_serializable(package="multilstm")
class SGD(Extras, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with L2 in the gradient and averaged weights.

    Args:
        *args: Of `keras.optimizers.SGD`.
        l2: Times a weight it is added to its gradient, after clipping.
        averages: Whether there is room for averages; they begin with
            `start_averaging()`.
        averaging_power: The weights after step t, counted from there, count
            as t to this power does, about: 0 is the mean of all of them, with
            8 those of the last tenth count for more than half. Several
            numbers: as many averages, see `averaged_weights`.
        **kwargs: Of `keras.optimizers.SGD`.

    Raises:
        UserError: If an `averaging_power` is below 0, or there is none.

    Reference:
        Polyak and Juditsky, 1992; as Merity et al., 2018, arXiv:1708.02182,
        section 3, use it. With a power, polynomial-decay averaging: Shamir
        and Zhang, 2013, arXiv:1212.1824.
    """


@keras.saving.register_keras_serializable(package="multilstm")
class Adam(Extras, keras.optimizers.Adam):
    """`keras.optimizers.Adam` with L2 in the gradient and averaged weights.

    Args:
        *args: Of `keras.optimizers.Adam`.
        l2: As `SGD` has it.
        averages: As `SGD` has it.
        averaging_power: As `SGD` has it.
        **kwargs: Of `keras.optimizers.Adam`.
    """


def make_optimizer(preset: Preset) -> Any:
    """The optimizer of a preset, at the rate of its first epoch."""
    settings: dict[str, Any] = {
        "learning_rate": preset.learning_rate_of(0),
        "global_clipnorm": preset.clip_norm_of_mean(),
        "l2": preset.l2_of_mean(),
        "averages": preset.averaging != "never",
        "averaging_power": preset.averaging_power,
    }
    if preset.gradient_accumulation_steps > 1:
        steps = preset.gradient_accumulation_steps
        settings["gradient_accumulation_steps"] = steps
    if preset.optimizer == "sgd":
        return SGD(**settings)
    if preset.loss_scale > 1:
        # PyTorch's, which the presets with summed losses come from; Keras adds
        # it before the second moment is corrected, so that it is larger in the
        # first steps: 4e-5 of a perplexity in small runs.
        settings["epsilon"] = 1e-8 / preset.loss_scale
    return Adam(**settings)
