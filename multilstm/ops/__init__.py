"""The only place that knows a framework: one function, a file per backend.

`reference.py` is written in `keras.ops` alone. It runs on every backend and
is the oracle for whatever replaces it on one of them.
"""

import keras

from multilstm.ops.reference import (
    device_name,
    embedding_lookup,
    lstm,
    sync_variables,
)

if keras.config.backend() == "jax":
    from multilstm.ops.jax import device_name, sync_variables
elif keras.config.backend() == "torch":
    from multilstm.ops.torch import device_name
elif keras.config.backend() == "tensorflow":
    from multilstm.ops.tensorflow import device_name, embedding_lookup

LSTM_KERNEL = f"{lstm.__module__}.{lstm.__name__}"

__all__ = [
    "LSTM_KERNEL",
    "device_name",
    "embedding_lookup",
    "lstm",
    "sync_variables",
]
