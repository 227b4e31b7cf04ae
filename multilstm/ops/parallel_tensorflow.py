"""TensorFlow: one process, which mirrors the weights on its devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf

from multilstm.errors import UserError
from multilstm.ops import parallel


class _Mirrored(parallel.Devices):
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


@cache
def _strategy(kind: str, count: int) -> Any:
    """One for a process: a second one would number its messages alike."""
    devices = [f"{kind}:{number}" for number in range(count)]
    return tf.distribute.MirroredStrategy(devices)


def use_devices(count: int | None) -> parallel.Devices:
    """As `parallel.use_devices`: GPUs, or as many parts of the CPU."""
    if count is None or count == 1:
        return parallel.Devices()
    gpus = tf.config.list_physical_devices("GPU")
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


def starts_singly(model: Any) -> bool:
    """As `parallel.starts_singly`.

    TensorFlow 2.21 cannot run our loop on replicas within its own loop over
    steps: "You must feed a value for placeholder tensor".
    """
    return int(model.distribute_strategy.num_replicas_in_sync) > 1


def rows_here(num_rows: int) -> int:
    """As `parallel.rows_here`: a replica sees its rows alone."""
    return num_rows // _num_replicas() if _has_replicas() else num_rows


def _num_replicas() -> int:
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def _has_replicas() -> bool:
    return not tf.distribute.in_cross_replica_context() and _num_replicas() > 1
