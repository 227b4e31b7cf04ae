"""The only place that knows a framework: a file for each backend.

`reference.py` is written in `keras.ops` alone. It runs on every backend and
is the oracle for whatever replaces it on one of them.
"""

import keras

from multilstm.ops.evidence import explain_once, last_kernel
from multilstm.ops.parallel import (
    Devices,
    add_gradients,
    creating_variables,
    logs_to_reduce,
    rows_here,
    scale_loss,
    starts_singly,
    use_devices,
)
from multilstm.ops.reference import (
    check_rows,
    cross_entropy_of_some,
    device_name,
    dropout,
    embedding_lookup,
    feed,
    fuse_optimizer,
    has_gpu,
    has_xla,
    jit_of_steps,
    keeping_variables,
    linear_cross_entropy,
    lstm,
    lstm_stack,
    lstm_weights,
    make_test_function,
    make_train_function,
    on_host,
    steps_per_dispatch,
    sync_variables,
    tf32,
)

if keras.config.backend() == "jax":
    from multilstm.ops.jax import (
        cross_entropy_of_some,
        device_name,
        has_gpu,
        keeping_variables,
        linear_cross_entropy,
        lstm,
        lstm_stack,
        make_train_function,
        steps_per_dispatch,
        sync_variables,
        tf32,
    )
    from multilstm.ops.parallel_jax import rows_here, use_devices
elif keras.config.backend() == "torch":
    from multilstm.ops.graphs_torch import (
        dropout,
        make_test_function,
        make_train_function,
        starts_singly,
        steps_per_dispatch,
    )
    from multilstm.ops.parallel_torch import add_gradients, use_devices
    from multilstm.ops.torch import (
        cross_entropy_of_some,
        device_name,
        fuse_optimizer,
        has_gpu,
        jit_of_steps,
        linear_cross_entropy,
        lstm,
        lstm_stack,
        lstm_weights,
        tf32,
    )
elif keras.config.backend() == "tensorflow":
    from multilstm.ops.parallel_tensorflow import (
        add_gradients,
        creating_variables,
        logs_to_reduce,
        rows_here,
        scale_loss,
        starts_singly,
        use_devices,
    )
    from multilstm.ops.tensorflow import (
        check_rows,
        cross_entropy_of_some,
        device_name,
        dropout,
        embedding_lookup,
        feed,
        fuse_optimizer,
        has_gpu,
        has_xla,
        linear_cross_entropy,
        lstm,
        lstm_stack,
        on_host,
        steps_per_dispatch,
        tf32,
    )
else:
    explain_once(
        "multilstm has nothing made for the backend "
        f"{keras.config.backend()}: the reference in keras.ops runs, which "
        "may be slow and cannot train everywhere."
    )

__all__ = [
    "Devices",
    "add_gradients",
    "check_rows",
    "creating_variables",
    "cross_entropy_of_some",
    "device_name",
    "dropout",
    "embedding_lookup",
    "explain_once",
    "feed",
    "fuse_optimizer",
    "has_gpu",
    "has_xla",
    "jit_of_steps",
    "keeping_variables",
    "last_kernel",
    "linear_cross_entropy",
    "logs_to_reduce",
    "lstm",
    "lstm_stack",
    "lstm_weights",
    "make_test_function",
    "make_train_function",
    "on_host",
    "rows_here",
    "scale_loss",
    "starts_singly",
    "steps_per_dispatch",
    "sync_variables",
    "tf32",
    "use_devices",
]
