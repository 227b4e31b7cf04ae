"""Failures of the machine, as each framework tells of them, explained."""

import keras
import numpy as np
import pytest

from multilstm.errors import UserError
from multilstm.failures import (
    DeviceLostError,
    OutOfMemoryError,
    explaining_failures,
)

BACKEND = keras.config.backend()


def no_memory():
    """What the framework itself raises where a GPU has no more memory."""
    if BACKEND == "torch":
        import torch

        return torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a "
            "total capacity of 79.11 GiB of which 5.88 GiB is free."
        )
    if BACKEND == "jax":
        import jax

        return jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate "
            "21474836480 bytes."
        )
    import tensorflow as tf

    return tf.errors.ResourceExhaustedError(
        None, None, "OOM when allocating tensor with shape[20,35,10000]"
    )


def device_lost():
    """What it raises where the driver tells of a GPU that failed."""
    if BACKEND == "torch":
        import torch

        return torch.AcceleratorError(
            "CUDA error: unspecified launch failure\nCUDA kernel errors might "
            "be asynchronously reported at some other API call"
        )
    if BACKEND == "jax":
        import jax

        return jax.errors.JaxRuntimeError(
            "INTERNAL: CUDA error: Failed to launch: CUDA_ERROR_ILLEGAL_ADDRESS"
        )
    import tensorflow as tf

    return tf.errors.InternalError(
        None, None, "Failed to sync: CUDA_ERROR_LAUNCH_FAILED: unspecified"
    )


def test_memory_that_is_refused_is_explained():
    message = "Lower --batch-size"
    with pytest.raises(OutOfMemoryError, match=message), explaining_failures():
        raise no_memory()


def test_memory_that_the_system_refuses_is_explained():
    """Really: more than any machine has, asked of framework and NumPy."""
    size = 1 << 55
    with pytest.raises(OutOfMemoryError) as raised, explaining_failures():
        keras.ops.zeros((size,))
    assert "\n" not in str(raised.value)
    with pytest.raises(OutOfMemoryError), explaining_failures():
        np.ones(size, np.int8)


def test_device_that_is_lost_is_explained():
    message = "checkpoint, if there was one, is kept.*--resume"
    raises = pytest.raises(DeviceLostError, match=message)
    with raises as raised, explaining_failures():
        raise device_lost()
    assert "\n" not in str(raised.value)


def test_build_for_other_gpus_is_not_called_a_lost_one():
    error = RuntimeError(
        "CUDA error: no kernel image is available for execution on the device"
    )
    raises = pytest.raises(UserError, match="must be built for this GPU")
    with raises as raised, explaining_failures():
        raise error
    assert not isinstance(raised.value, DeviceLostError)


@pytest.mark.parametrize(
    "error",
    [
        *(
            ZeroDivisionError("1 / 0"),
            ValueError("shape"),
            UserError("mend it"),
        ),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, explaining_failures():
        raise error
    assert raised.value is error
