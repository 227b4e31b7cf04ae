"""Several devices for one batch, as each framework has them; here one.

batch -> rows -> device 0: gradients --+
-> device 1: gradients --+--> their sum -> clipped -> a step
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import numpy as np

from multilstm.errors import UserError


class Devices:
    """What a run computes on; here one device, in this process alone.

    A batch has as many rows as the run was asked for, whatever the number of
    devices: each computes a part of them. Weights are the same on all.

    Attributes:
        count: How many devices there are.
        rank: Number of this process among those of the run. The first, 0,
            alone writes.
        num_processes: How many of those there are.
        num_parts: Into how many parts rows are cut before a model sees them.
        accumulates: Whether gradients of several batches can be one step.
    """

    count = 1
    rank = 0
    num_processes = 1
    num_parts = 1
    accumulates = True

    @contextmanager
    def building(self) -> Iterator[None]:
        """Where a model is built and compiled for all devices."""
        yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Where `fit` is called."""
        yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within `training`, where this process computes for itself."""
        yield

    def part(self, batches: Any) -> Any:
        """The rows of a dataset that this process is to feed."""
        if self.num_processes == 1:
            return batches
        from multilstm.dataset import PartOfRows

        return PartOfRows(batches, self.rank, self.num_processes)

    def all_rows(self, variable: Any) -> Any:
        """A carried state of all devices' rows, as NumPy has it."""
        return keras.ops.convert_to_numpy(variable)

    def assign_rows(self, variable: Any, value: Any) -> None:
        """Gives each device its rows of a carried state."""
        variable.assign(value)

    def whole_sum(self, variable: Any) -> Any:
        """A metric's sum over rows, over those of all devices, in float64."""
        return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)

    def assign_sum(self, variable: Any, value: Any) -> None:
        """Gives devices sums that make this one."""
        variable.assign(value)

    def spread_seed(self, variable: Any) -> None:
        """Lets devices draw a mask of their own for their rows.

        Before, the state of the seed generator is the same on all; on the
        first it stays as it is.
        """

    def of_all(self, value: Any) -> Any:
        """What each process has, in float64, one below the other."""
        return np.asarray(value, np.float64)[None]

    def total(self, value: Any) -> Any:
        """The sum over processes, in float64."""
        return self.of_all(value).sum(axis=0)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether a process has raised it."""
        return [bool(number) for number in self.total(flags)]

    def meet(self) -> None:
        """Waits until all processes have come here."""
        self.total(0)

    def from_first(self, number: float) -> float:
        """The number that the first process has."""
        return float(self.of_all(number)[0])


def use_devices(count: int | None) -> Devices:
    """The devices to train on.

    Args:
        count: How many; None for one, or for as many processes as a launcher
            of the framework has started.

    Raises:
        UserError: If there are not so many.
    """
    if count not in (None, 1):
        raise UserError(
            f"The backend must know of {count} devices; "
            f"{keras.config.backend()} does not. Use jax, torch or tensorflow."
        )
    return Devices()


def add_gradients(optimizer: Any, gradients: list[Any]) -> list[Any]:
    """The gradients of a batch, from those that devices have of their rows."""
    return gradients


def scale_loss(loss: Any) -> Any:
    """What of a mean over a device's rows is its part of that over all."""
    return loss


def logs_to_reduce(logs: Any) -> Any:
    """What a step logs, as Keras takes it to make one of all devices'."""
    return logs


def starts_singly(model: Any) -> bool:
    """Whether the devices of a model can start only one step at once."""
    return False


def creating_variables(model: Any) -> AbstractContextManager[Any]:
    """Within which a model's variables are made for all its devices."""
    return nullcontext()


def rows_here(num_rows: int) -> int:
    """How many of a batch's rows a step sees that is traced now."""
    return num_rows


def far_seed(state: Any, rank: int) -> Any:
    """The state of a seed generator, `(seed, count)`, on another device."""
    seed, count = (int(number) for number in state)
    return np.array([(seed + rank * 0x61C88647) % (1 << 31), count])


def too_few(kind: str, count: int, found: int) -> UserError:
    """The error for devices that are not there."""
    return UserError(
        f"--devices {count} needs as many {kind}; there are {found}. Ask for "
        "fewer, or begin in a new process, before anything is computed."
    )
