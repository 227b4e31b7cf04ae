"""The only place that knows a framework: one function, a file per backend.

`reference.py` is written in `keras.ops` alone. It runs on every backend and
is the oracle for whatever replaces it on one of them.
"""

import logging

import keras

from multilstm.ops.reference import (
    check_rows,
    device_name,
    embedding_lookup,
    lstm,
    masked_lstm,
    sync_variables,
)

if keras.config.backend() == "jax":
    from multilstm.ops.jax import device_name, sync_variables
elif keras.config.backend() == "torch":
    from multilstm.ops.torch import device_name, lstm
elif keras.config.backend() == "tensorflow":
    from multilstm.ops.tensorflow import (
        check_rows,
        device_name,
        embedding_lookup,
    )
else:
    logging.getLogger(__name__).warning(
        "multilstm has nothing made for the backend %s: the reference in "
        "keras.ops runs, which may be slow and cannot train everywhere.",
        keras.config.backend(),
    )

LSTM_KERNEL = f"{lstm.__module__}.{lstm.__name__}"

__all__ = [
    "LSTM_KERNEL",
    "check_rows",
    "device_name",
    "embedding_lookup",
    "lstm",
    "masked_lstm",
    "sync_variables",
]
