"""Features -> logits over the vocabulary, or only what a loss needs of them."""

from typing import Any

import keras
from keras import ops

from multilstm.layers import Embedding
from multilstm.ops import linear_cross_entropy


class Projection(keras.layers.Layer):
    """Features -> logits, by a kernel of its own or by the embeddings.

    Where the embeddings have another size than the features, a product
    without bias comes between.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        kernel_initializer: Any,
        bias_initializer: Any,
        tied_to: Embedding | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocabulary_size = vocabulary_size
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        self.tied_to = tied_to
        self.bottleneck: Any = None

    def build(self, features_shape: tuple[int | None, ...]) -> None:
        if self.tied_to is None:
            self.kernel = self.add_weight(
                shape=(features_shape[-1], self.vocabulary_size),
                initializer=self.kernel_initializer,
                name="kernel",
            )
        elif features_shape[-1] != self.tied_to.output_dim:
            self.bottleneck = self.add_weight(
                shape=(features_shape[-1], self.tied_to.output_dim),
                initializer=self.kernel_initializer,
                name="bottleneck",
            )
        self.bias = self.add_weight(
            shape=(self.vocabulary_size,),
            initializer=self.bias_initializer,
            name="bias",
        )

    def call(self, features: Any) -> Any:
        kernel, bias = self._read_weights()
        features = self._narrow(features)
        return ops.matmul(features, kernel) + bias

    def negative_log_likelihood(
        self,
        features: Any,
        targets: Any,
        weights: Any = None,
        *,
        temperature: Any = None,
    ) -> Any:
        """`ops.linear_cross_entropy` with the weights of this layer.

        Args:
            features: Tensor of shape `(..., units)`.
            targets: int32 tensor of shape `(...)`.
            weights: Of each target, shape `(...)`, or None.
            temperature: What the logits are divided by: a number or a tensor
                that broadcasts against the bias. Default: 1.
        """
        kernel, bias = self._read_weights()
        if temperature is not None:
            kernel, bias = kernel / temperature, bias / temperature
        return linear_cross_entropy(
            self._narrow(features), kernel, bias, targets, weights
        )

    def _narrow(self, features: Any) -> Any:
        """Features of the embeddings' size."""
        if self.bottleneck is None:
            return features
        kernel = ops.cast(self.bottleneck, self.compute_dtype)
        return ops.matmul(features, kernel)

    def _read_weights(self) -> tuple[Any, Any]:
        table = self.tied_to and self.tied_to.embeddings
        kernel, bias = (
            ops.cast(ops.convert_to_tensor(weight), self.compute_dtype)
            for weight in (self.kernel if table is None else table, self.bias)
        )
        return (kernel if table is None else ops.transpose(kernel)), bias
