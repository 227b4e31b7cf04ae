"""JAX: the arrays of a step lie on all devices, their rows in parts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from multilstm.errors import UserError
from multilstm.launch import place_among_processes
from multilstm.ops import parallel


class _RowsParallel(keras.distribution.DataParallel):
    """Keras's own, with carried states in parts as the rows they are of."""

    def get_variable_layout(self, variable: Any) -> Any:
        if "/carried/" in variable.path:
            return keras.distribution.TensorLayout(
                (self.batch_dim_name, None), self.device_mesh
            )
        return super().get_variable_layout(variable)


class _Mesh(parallel.Devices):
    def __init__(self, devices: list[Any]) -> None:
        self.count = len(devices)
        self.rank = jax.process_index()
        self.num_processes = jax.process_count()
        names = [f"{device.platform}:{device.id}" for device in devices]
        self.distribution = _RowsParallel(
            devices=names, auto_shard_dataset=False
        )

    @contextmanager
    def building(self) -> Iterator[None]:
        with self.distribution.scope():
            yield

    training = building

    @contextmanager
    def alone(self) -> Iterator[None]:
        before = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(before)

    def all_rows(self, variable: Any) -> Any:
        if self.num_processes == 1:
            return super().all_rows(variable)
        return multihost_utils.process_allgather(variable.value, tiled=True)

    def of_all(self, value: Any) -> Any:
        if self.num_processes == 1:
            return super().of_all(value)
        # As bits, since JAX would make them float32.
        array = np.asarray(value, np.float64)
        bits = array.reshape(-1).view(np.uint32)
        bits = np.asarray(multihost_utils.process_allgather(bits))
        return bits.view(np.float64).reshape(-1, *array.shape)


def use_devices(count: int | None) -> parallel.Devices:
    """As `parallel.use_devices`: GPUs, or as many parts of the CPU.

    Of all processes, where they were started with the environment that
    `keras.distribution.initialize` reads.
    """
    rank, started = place_among_processes("jax")
    if started > 1:
        if not jax.distributed.is_initialized():
            _join(rank, started)
        return _mesh_of(count or jax.device_count())
    if count is None or count == 1:
        return parallel.Devices()
    with suppress(RuntimeError):  # too late; there may be as many already
        # It matters only where there is no GPU.
        jax.config.update("jax_num_cpu_devices", count)
    return _mesh_of(count)


def _join(rank: int, started: int) -> None:
    """As `keras.distribution.initialize`.

    But a process that fails does not wait five minutes for the others.
    """
    name = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
    if not os.environ.get(name):
        raise UserError(
            f"{started} processes on JAX need {name}, host:port of the first; "
            "it is not set."
        )
    jax.distributed.initialize(
        os.environ[name].split(",")[0],
        started,
        rank,
        shutdown_timeout_seconds=10,
    )


def _mesh_of(count: int) -> _Mesh:
    found = jax.devices()
    if len(found) < count:
        kind = f"{jax.default_backend()} devices"
        raise parallel.too_few(kind, count, len(found))
    if jax.process_count() > 1 and len(found) > count:
        raise UserError(
            f"--devices {count} must be all devices of the "
            f"{jax.process_count()} processes; they have {len(found)}. Leave "
            "it out."
        )
    return _Mesh(found[:count])


def rows_here(num_rows: int) -> int:
    """As `parallel.rows_here`: a step sees the rows of all processes."""
    if keras.distribution.distribution() is None:
        return num_rows
    return num_rows * int(jax.process_count())
