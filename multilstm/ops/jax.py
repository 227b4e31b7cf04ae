"""What only JAX can say."""

import jax

from multilstm.ops import reference


def device_name() -> str:
    """The name of the device that JAX computes on."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return reference.device_name()
    return str(device.device_kind)
