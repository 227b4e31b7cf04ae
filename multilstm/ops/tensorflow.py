"""What only TensorFlow can say, and what it needs done differently."""

from typing import Any

import tensorflow as tf

from multilstm.ops import reference


def embedding_lookup(table: Any, token_ids: Any) -> Any:
    """Looks up rows, with a dense gradient for the table.

    TensorFlow's own gradient of a lookup is a list of rows in which a word
    that occurs twice stands twice. `tf.linalg.global_norm`, and so Keras's
    clipping, takes the norm of that list instead of the gradient's: for the
    ids 1, 2, 2 and gradients of ones over 4 columns 3.46 instead of 4.47.
    """
    table = tf.convert_to_tensor(table)

    @tf.custom_gradient
    def lookup(table: Any) -> tuple[Any, Any]:
        def gradient(upstream: Any) -> Any:
            return tf.math.unsorted_segment_sum(
                tf.reshape(upstream, (-1, tf.shape(table)[1])),
                tf.reshape(token_ids, (-1,)),
                tf.shape(table)[0],
            )

        return tf.gather(table, token_ids), gradient

    return lookup(table)


def check_rows(batch: Any, rows: int) -> None:
    """Fails when the step runs with another number of rows."""
    tf.debugging.assert_equal(
        tf.shape(batch)[0],
        rows,
        f"The state is carried for {rows} rows. Use that batch size, or pass "
        "`initial_state`.",
    )


def device_name() -> str:
    """The name of the device that TensorFlow computes on."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return reference.device_name()
    details = tf.config.experimental.get_device_details(gpus[0])
    return str(details.get("device_name", gpus[0].name))
