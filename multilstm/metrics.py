"""Sums of nats over words -> perplexity, whatever the sizes of the batches."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="multilstm")
class Perplexity(keras.metrics.Metric):
    """exp(total nats / total tokens), whatever the sizes of the batches.

    Unlike Keras's averages it weighs tokens, not rows. The sums are float32;
    for a figure to report use `multilstm.evaluate`, which sums in float64.

    Args:
        name: What Keras's logs call it.
        **kwargs: Of `keras.metrics.Metric`: `dtype`.

    Call arguments of `update_state`:
        y_true: int tensor of ids, shape `(batch, time)`.
        y_pred: Logits, shape `(batch, time, vocabulary)`.
        sample_weight: Shape `(batch, time)`; 0 leaves a token out. What
            Keras's mask of the logits leaves out counts nothing either.
    """

    def __init__(self, name: str = "perplexity", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self._direction = "down"  # for Keras's callbacks: the less the better
        self._mask_of = _Mask(name="mask")
        self.nats = self.add_weight(initializer="zeros", name="nats")
        self.tokens = self.add_weight(initializer="zeros", name="tokens")

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        weights = token_weights(y_true, sample_weight)
        mask = ops.cast(self._mask_of(y_pred), weights.dtype)
        self.add(*nats_and_tokens(y_true, y_pred, weights * mask))

    def add(self, nats: Any, tokens: Any) -> None:
        """Adds a sum of negative log-likelihoods over so many tokens."""
        self.nats.assign_add(ops.cast(nats, self.dtype))
        self.tokens.assign_add(ops.cast(tokens, self.dtype))

    def result(self) -> Any:
        return ops.exp(mean_of(self.nats, self.tokens))


class _Mask(keras.layers.Layer):
    """Gives the mask of what it is called with, of which Keras tells layers."""

    supports_masking = True

    def call(self, values: Any, mask: Any = None) -> Any:
        return ops.ones(ops.shape(values)[:-1]) if mask is None else mask


def nats_and_tokens(
    targets: Any, logits: Any, sample_weight: Any
) -> tuple[Any, Any]:
    """The summed negative log-likelihood, and over how many tokens."""
    weights = token_weights(targets, sample_weight)
    # What does not count may be no word at all.
    targets = ops.where(weights == 0, 0, ops.cast(targets, "int32"))
    nll = ops.sparse_categorical_crossentropy(
        targets, ops.cast(logits, "float32"), from_logits=True
    )  # (batch, time)
    return ops.sum(nll * weights), ops.sum(weights)


def token_weights(targets: Any, sample_weight: Any) -> Any:
    """What each target counts, float32 of the targets' shape."""
    if sample_weight is None:
        return ops.ones(ops.shape(targets), "float32")
    weights = ops.cast(sample_weight, "float32")
    if len(weights.shape) < len(targets.shape):  # a weight for each row
        weights = ops.expand_dims(weights, -1)
    return ops.broadcast_to(weights, ops.shape(targets))


def mean_of(total: Any, number: Any) -> Any:
    """`total / number`, and 0 of nothing."""
    number = ops.convert_to_tensor(number)
    return total / ops.where(number > 0, number, 1.0)
