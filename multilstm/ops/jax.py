"""What only JAX can say."""

from typing import Any

import jax

from multilstm.ops import reference


def sync_variables(model: Any) -> None:
    """Brings a model's variables up to date within `fit`."""
    model.jax_state_sync()


def device_name() -> str:
    """The name of the device that JAX computes on."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return reference.device_name()
    return str(device.device_kind)
