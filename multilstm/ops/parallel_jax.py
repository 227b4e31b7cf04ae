"""JAX: the arrays of a step lie on all devices, their rows in parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import keras

from multilstm.errors import UserError
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
    def __init__(self, count: int) -> None:
        self.count = count
        devices = [f"{d.platform}:{d.id}" for d in jax.devices()[:count]]
        self.distribution = _RowsParallel(devices=devices)

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


def use_devices(count: int | None) -> parallel.Devices:
    """As `parallel.use_devices`: GPUs, or as many parts of the CPU."""
    if count is None or count == 1:
        return parallel.Devices()
    try:  # what matters only where there is no GPU
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices()) < count:
            kind = f"{jax.default_backend()} devices"
            found = len(jax.devices())
            raise parallel.too_few(kind, count, found) from error
    found = len(jax.devices())
    if found < count:
        raise parallel.too_few(f"{jax.default_backend()} devices", count, found)
    if jax.process_count() > 1:
        raise UserError(
            "--devices is for one host on JAX; received "
            f"{jax.process_count()} processes. Start one process."
        )
    return _Mesh(count)
