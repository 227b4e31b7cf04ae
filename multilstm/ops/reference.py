"""The operations in `keras.ops`: any backend, and the oracle for the others."""

import platform
from pathlib import Path
from typing import Any

from keras import ops


def lstm(
    x: Any, h0: Any, c0: Any, kernel: Any, recurrent_kernel: Any, bias: Any
) -> tuple[Any, Any, Any]:
    """Runs one LSTM layer over a batch of sequences.

    The input projection of all time steps is one product before the loop;
    only the recurrence is inside it.

    Args:
        x: Tensor of shape `(batch, time, features)`.
        h0: Initial hidden state, shape `(batch, units)`.
        c0: Initial cell state, shape `(batch, units)`.
        kernel: Shape `(features, 4 * units)`, gates in Keras's order: input,
            forget, cell, output.
        recurrent_kernel: Shape `(units, 4 * units)`.
        bias: Shape `(4 * units,)`.

    Returns:
        `(y, h, c)`: hidden states of all steps, shape `(batch, time, units)`,
        and both states after the last, shape `(batch, units)`.

    Reference:
        Hochreiter and Schmidhuber, 1997; with the forget gate of Gers et
        al., 2000, equations 1 to 6.
    """
    projected = _project(x, kernel, bias)

    def step(carry: Any, projection: Any) -> tuple[Any, Any]:
        h, c = carry
        carry = _step(h, c, projection, recurrent_kernel)
        # TensorFlow's scan wants outputs of the same structure as the carry.
        return carry, carry

    (h, c), (y, _) = ops.scan(step, (h0, c0), projected)
    return ops.transpose(y, (1, 0, 2)), h, c


def masked_lstm(
    x: Any,
    h0: Any,
    c0: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    mask: Any,
) -> tuple[Any, Any, Any]:
    """As `lstm`, where some steps leave the state as it is.

    Args:
        x: As for `lstm`, and so on.
        h0: Likewise.
        c0: Likewise.
        kernel: Likewise.
        recurrent_kernel: Likewise.
        bias: Likewise.
        mask: Bool tensor of shape `(batch, time)`. A step that is False
            leaves the state, and h stands for its output.

    Returns:
        `(y, h, c)` as `lstm` does.
    """
    steps = (
        _project(x, kernel, bias),
        ops.transpose(ops.cast(mask, "bool"))[..., None],
    )

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        h, c = carry
        projection, is_read = inputs
        new_h, new_c = _step(h, c, projection, recurrent_kernel)
        carry = (ops.where(is_read, new_h, h), ops.where(is_read, new_c, c))
        return carry, carry

    (h, c), (y, _) = ops.scan(step, (h0, c0), steps)
    return ops.transpose(y, (1, 0, 2)), h, c


def _project(x: Any, kernel: Any, bias: Any) -> Any:
    """The input projection, time first: `(time, batch, 4 * units)`."""
    return ops.transpose(ops.matmul(x, kernel) + bias, (1, 0, 2))


def _step(
    h: Any, c: Any, projection: Any, recurrent_kernel: Any
) -> tuple[Any, Any]:
    gates = projection + ops.matmul(h, recurrent_kernel)
    i, f, g, o = ops.split(gates, 4, axis=-1)
    c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
    return ops.sigmoid(o) * ops.tanh(c), c


def embedding_lookup(table: Any, token_ids: Any) -> Any:
    """Looks up rows, with a dense gradient for the table.

    Args:
        table: Shape `(vocabulary_size, embedding_dim)`.
        token_ids: int32 tensor of any shape.

    Returns:
        Tensor of shape `(*token_ids.shape, embedding_dim)`.
    """
    return ops.take(table, token_ids, axis=0)


def check_rows(batch: Any, rows: int) -> None:
    """Fails when the step runs with another number of rows.

    Only TensorFlow compiles a step without knowing that number.
    """


def sync_variables(model: Any) -> None:
    """Brings a model's variables up to date within `fit`; here they are.

    JAX's compiled step keeps the values to itself until the epoch ends.
    """


def device_name() -> str:
    """The processor's name, where no framework knows of a better device."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
