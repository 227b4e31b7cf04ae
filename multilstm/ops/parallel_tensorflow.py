"""TensorFlow: the weights are mirrored on the devices of a process, or of many.

Many are started with TF_CONFIG, as TensorFlow has it, one for each device.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf

from multilstm.errors import UserError
from multilstm.launch import place_among_processes
from multilstm.ops import parallel


class _Mirrored(parallel.Devices):
    accumulates = False

    def __init__(self, kind: str, count: int) -> None:
        self.count = self.num_parts = count
        self.strategy = _strategy(kind, count)

    @contextmanager
    def building(self) -> Iterator[None]:
        with self.strategy.scope():
            yield

    def _on_each(self, variable: Any) -> Any:
        return self.strategy.experimental_local_results(variable.value)

    def all_rows(self, variable: Any) -> Any:
        return np.concatenate([v.numpy() for v in self._on_each(variable)])

    def assign_rows(self, variable: Any, value: Any) -> None:
        on_each = self._on_each(variable)
        for mine, part in zip(
            on_each, np.split(np.asarray(value), self.count), strict=True
        ):
            mine.assign(part)

    def spread_seed(self, variable: Any) -> None:
        for rank, mine in enumerate(self._on_each(variable)):
            state = parallel.far_seed(mine.numpy(), rank)
            mine.assign(state.astype(mine.dtype.as_numpy_dtype))


class _Workers(_Mirrored):
    """A process of several, each with one device."""

    def __init__(self, rank: int, started: int) -> None:
        self.strategy = _start_workers()
        self.rank = rank
        self.count = self.num_parts = self.num_processes = started

    def all_rows(self, variable: Any) -> Any:
        mine = super().all_rows(variable)
        return np.concatenate(self.of_all(mine)).astype(mine.dtype)

    def assign_rows(self, variable: Any, value: Any) -> None:
        [mine] = self._on_each(variable)
        mine.assign(np.split(np.asarray(value), self.count)[self.rank])

    def spread_seed(self, variable: Any) -> None:
        [mine] = self._on_each(variable)
        state = parallel.far_seed(mine.numpy(), self.rank)
        mine.assign(state.astype(mine.dtype.as_numpy_dtype))

    def of_all(self, value: Any) -> Any:
        value = np.asarray(value, np.float64)
        of_all = np.zeros((self.count, *value.shape), value.dtype)
        of_all[self.rank] = value
        return _sum_over_workers(tf.constant(of_all)).numpy()


@cache
def _strategy(kind: str, count: int) -> Any:
    """One for a process: a second one would number its messages alike."""
    devices = [f"{kind}:{number}" for number in range(count)]
    return tf.distribute.MirroredStrategy(devices)


@tf.function
def _sum_over_workers(value: Any) -> Any:
    def add(mine: Any) -> Any:
        replica = tf.distribute.get_replica_context()
        placed = tf.identity(mine)  # an argument is on no device
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, placed)

    return workers().run(add, args=(value,))


@cache
def _start_workers() -> Any:
    """Before anything is computed, or TensorFlow refuses."""
    global _workers
    # NCCL on GPUs, gRPC else.
    _workers = tf.distribute.MultiWorkerMirroredStrategy()
    return _workers


_workers: Any = None


def workers() -> Any:
    """The strategy of the processes of a run; None where there is but one."""
    return _workers


def use_devices(count: int | None) -> parallel.Devices:
    """As `parallel.use_devices`: GPUs, or as many parts of the CPU.

    Or a device of each process, where TF_CONFIG tells of several.
    """
    rank, started = place_among_processes("tensorflow")
    if started > 1:
        if count not in (None, started):
            raise UserError(
                f"--devices {count} must be the number of processes of "
                f"TF_CONFIG, each with one device; it has {started}. Leave "
                "it out."
            )
        if len(tf.config.get_visible_devices("GPU")) > 1:
            raise UserError(
                "Several processes on TensorFlow need one for each GPU; this "
                "one sees more. Give each its own by CUDA_VISIBLE_DEVICES."
            )
        return _Workers(rank, started)
    if count is None or count == 1:
        return parallel.Devices()
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        if len(gpus) < count:
            raise parallel.too_few("GPUs", count, len(gpus))
        return _Mirrored("GPU", count)
    [cpu] = tf.config.list_physical_devices("CPU")
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except (RuntimeError, ValueError) as error:
        found = len(tf.config.list_logical_devices("CPU"))
        if found < count:
            raise parallel.too_few("CPUs", count, found) from error
    return _Mirrored("CPU", count)


def add_gradients(optimizer: Any, gradients: list[Any]) -> list[Any]:
    """As `parallel.add_gradients`: the sum over replicas.

    Keras would add up what each had clipped for itself.
    """
    if not _has_replicas():
        return gradients
    if "_backend_apply_gradients" not in vars(optimizer):
        raise UserError(
            "Several devices on TensorFlow need an optimizer without "
            "accumulation of gradients; this one has it. Leave "
            "--gradient-accumulation-steps out, or use jax or torch."
        )
    replica = tf.distribute.get_replica_context()
    return list(replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients))


def scale_loss(loss: Any) -> Any:
    """As `parallel.scale_loss`: replicas have equally many rows."""
    return loss / _num_replicas() if _has_replicas() else loss


def logs_to_reduce(logs: Any) -> Any:
    """As `parallel.logs_to_reduce`.

    Keras 3.15.1 takes the mean of processes' logs along a first axis, which
    numbers do not have.
    """
    if workers() is None:
        return logs
    return {name: value[None] for name, value in logs.items()}


def starts_singly(model: Any) -> bool:
    """As `parallel.starts_singly`.

    TensorFlow 2.21 cannot run our loop on replicas within its own loop over
    steps: "You must feed a value for placeholder tensor".
    """
    return int(model.distribute_strategy.num_replicas_in_sync) > 1


def creating_variables(model: Any) -> AbstractContextManager[Any]:
    """As `parallel.creating_variables`."""
    scope: AbstractContextManager[Any] = model.distribute_strategy.scope()
    return scope


def rows_here(num_rows: int) -> int:
    """As `parallel.rows_here`: a replica sees its rows alone."""
    if workers() is not None or not _has_replicas():
        return num_rows
    return num_rows // _num_replicas()


def _num_replicas() -> int:
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def _has_replicas() -> bool:
    return not tf.distribute.in_cross_replica_context() and _num_replicas() > 1
