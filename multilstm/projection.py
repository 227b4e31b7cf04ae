"""Features -> logits over the vocabulary, or only what a loss needs of them.

exact     compares each target with every word
sampled   in training with a sample of the words, else with every word
adaptive  with the frequent words, and with rare ones if it is rare
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import keras
import numpy as np
from keras import ops

from multilstm.adaptive_softmax import (
    AdaptiveProjection,
    check_cutoffs,
    default_cutoffs,
)
from multilstm.config import Softmax
from multilstm.errors import UserError, check_whole
from multilstm.initializers import NumPyInitializer
from multilstm.layers import Embedding
from multilstm.ops import embedding_lookup, linear_cross_entropy, on_host

# A logit that no other one can be below.
_NEVER = -1e9


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

    @property
    def words_per_target(self) -> int:
        """How many words a target is compared with in training."""
        return self.vocabulary_size

    def build(self, features_shape: tuple[int | None, ...]) -> None:
        if self.tied_to is None:
            self.kernel = self._add_kernel(
                (features_shape[-1], self.vocabulary_size)
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
        return self._narrow(features) @ kernel + bias

    def negative_log_likelihood(
        self,
        features: Any,
        targets: Any,
        weights: Any = None,
        training: bool = False,
        *,
        temperature: Any = None,
    ) -> Any:
        """`ops.linear_cross_entropy` with the weights of this layer.

        Args:
            features: Tensor of shape `(..., units)`.
            targets: int32 tensor of shape `(...)`.
            weights: Of each target, shape `(...)`, or None.
            training: Not used here, see `SampledProjection`.
            temperature: What the logits are divided by: a number or a tensor
                that broadcasts against the bias. Default: 1.
        """
        kernel, bias = self._read_weights()
        features = self._narrow(ops.cast(features, self.compute_dtype))
        if temperature is not None:
            features, bias = (
                ops.cast(ops.cast(x, "float32") / temperature, x.dtype)
                for x in (features, bias)
            )
        return linear_cross_entropy(features, kernel, bias, targets, weights)

    def _narrow(self, features: Any) -> Any:
        """Features of the embeddings' size."""
        if self.bottleneck is None:
            return features
        # On PyTorch `ops.matmul` makes float32 of float64.
        return features @ self._read(self.bottleneck)

    def _add_kernel(self, shape: tuple[int | None, int]) -> Any:
        return self.add_weight(
            shape=shape, initializer=self.kernel_initializer, name="kernel"
        )

    def _read_weights(self) -> tuple[Any, Any]:
        """Kernel, `(features, vocabulary)`, and bias."""
        if self.tied_to is None:
            kernel = self._read(self.kernel)
        else:
            kernel = ops.transpose(self._read(self.tied_to.embeddings))
        return kernel, self._read(self.bias)

    def _read(self, weight: Any) -> Any:
        return ops.cast(ops.convert_to_tensor(weight), self.compute_dtype)


class SampledProjection(Projection):
    """As `Projection`, but trained on a sample of the words.

    In training the sum over all words is estimated from the target, which
    counts as it is, and from words drawn for the whole batch, each divided by
    how often it was to be expected among them. That estimate is right on
    average for any number of draws, and its logarithm the exact loss for
    many; for few it is too low.

    Args:
        vocabulary_size: Number of words, the most frequent first.
        num_sampled: How many words to draw for a batch.
        seed: For the draws.
        **kwargs: Of `Projection`.

    Reference:
        Jean et al., 2015, arXiv:1412.2007, section 3; the target's weight of
        one as in Blanc and Rendle, 2018, arXiv:1712.00527.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        num_sampled: int,
        seed: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(vocabulary_size, **kwargs)
        self.num_sampled = num_sampled
        with on_host():
            self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def words_per_target(self) -> int:
        return self.num_sampled + 1

    def negative_log_likelihood(
        self,
        features: Any,
        targets: Any,
        weights: Any = None,
        training: bool = False,
        *,
        temperature: Any = None,
    ) -> Any:
        """As of `Projection`; in training an estimate of it."""
        if not training:
            return super().negative_log_likelihood(
                features, targets, weights, temperature=temperature
            )
        if weights is not None:
            targets = ops.where(weights == 0, 0, targets)
        with on_host():
            sampled = draw_words(
                self.num_sampled, self.vocabulary_size, self.seed_generator
            )
        features = self._narrow(ops.cast(features, self.compute_dtype))
        nll = self._estimate(features, targets, sampled)
        return nll if weights is None else nll * ops.cast(weights, "float32")

    def _estimate(self, features: Any, targets: Any, sampled: Any) -> Any:
        """The negative log-likelihood among the words that were drawn."""
        flat = ops.reshape(targets, (-1,))
        words = ops.concatenate([flat, sampled])
        # Looked up in float32: a frequent word is there hundreds of times,
        # and so many gradients do not add up in bfloat16.
        rows, biases = (
            embedding_lookup(ops.convert_to_tensor(table), words)
            for table in (self._table, self.bias[:, None])
        )
        rows = ops.cast(rows, self.compute_dtype)
        biases = ops.cast(biases[:, 0], "float32")
        num_tokens = ops.shape(flat)[0]
        features = ops.reshape(features, (-1, rows.shape[-1]))

        chosen = ops.sum(features * rows[:num_tokens], axis=-1)
        chosen = ops.cast(chosen, "float32") + biases[:num_tokens]
        others = ops.matmul(features, ops.transpose(rows[num_tokens:]))
        others = ops.cast(others, "float32") + biases[num_tokens:]
        others -= log_expected_count(
            sampled, self.num_sampled, self.vocabulary_size
        )
        is_target = flat[:, None] == sampled  # (tokens, sampled)
        others = ops.where(is_target, _NEVER, others)
        logits = ops.concatenate([chosen[:, None], others], axis=-1)
        nll = ops.logsumexp(logits, axis=-1) - chosen
        return ops.reshape(nll, ops.shape(targets))

    @property
    def _table(self) -> Any:
        """A row for each word, so that those of a sample are near."""
        return self.kernel if self.tied_to is None else self.tied_to.embeddings

    def _add_kernel(self, shape: tuple[int | None, int]) -> Any:
        def initialize(shape: Sequence[int], dtype: Any = None) -> Any:
            # The numbers with which `Projection` begins; flat in between,
            # as PyTorch transposes by a view and leaves rows far apart.
            kernel = self.kernel_initializer(shape[::-1], dtype=dtype)
            flat = ops.reshape(ops.transpose(kernel), (-1,))
            return ops.reshape(flat, shape)

        return self.add_weight(
            shape=shape[::-1], initializer=initialize, name="kernel"
        )

    def _read_weights(self) -> tuple[Any, Any]:
        return ops.transpose(self._read(self._table)), self._read(self.bias)


def draw_words(num_sampled: int, vocabulary_size: int, seed: Any) -> Any:
    """Draws words by Zipf's law, the frequent ones more often.

    Word k, counted from 0, has the probability
    `log((k + 2) / (k + 1)) / log(vocabulary_size + 1)`. That is cut into as
    many equal parts as there are draws, and one word comes from each: how
    often a word is to be expected is the same, how often it comes varies
    less. A number in 0..1 in float32 would not tell 250,000 words apart
    either; a place within a part does.

    Returns:
        int32 tensor of shape `(num_sampled,)`, in ascending order.
    """
    width = math.log(vocabulary_size + 1) / num_sampled
    starts = ops.convert_to_tensor(
        np.exp(np.arange(num_sampled) * width), "float32"
    )
    place = keras.random.uniform((num_sampled,), dtype="float32", seed=seed)
    words = ops.floor(starts * ops.exp(place * width)) - 1
    return ops.cast(ops.clip(words, 0, vocabulary_size - 1), "int32")


def log_expected_count(
    words: Any, num_sampled: int, vocabulary_size: int
) -> Any:
    """The logarithm of how often `draw_words` gives each word, on average."""
    rank = ops.cast(words, "float32") + 1
    scale = num_sampled / math.log(vocabulary_size + 1)
    return ops.log(ops.log1p(1 / rank)) + math.log(scale)


def choose_softmax(
    softmax: str,
    vocabulary_size: int,
    *,
    cutoffs: Sequence[int] | None = None,
    num_sampled: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """The settings of a softmax, complete with those that were not given.

    Raises:
        UserError: If they do not go together.
    """
    kinds = get_args(Softmax)
    if softmax not in kinds:
        raise UserError(
            f"`softmax` must be one of {', '.join(kinds)}; received "
            f"{softmax!r}."
        )
    for name, value, of in (
        ("cutoffs", cutoffs, "adaptive"),
        ("num_sampled", num_sampled, "sampled"),
    ):
        if value is not None and softmax != of:
            raise UserError(
                f"`{name}` needs softmax={of!r}; received {value!r} with "
                f"softmax={softmax!r}. Leave it out or change the softmax."
            )
    if softmax == "adaptive":
        if tied:
            raise UserError(
                "An adaptive softmax needs weights of its own; received "
                "tied_embeddings=True. Untie them, or use softmax='sampled'."
            )
        if cutoffs is None:
            cutoffs = default_cutoffs(vocabulary_size)
        cutoffs = check_cutoffs(cutoffs, vocabulary_size)
    elif softmax == "sampled":
        if num_sampled is None:
            num_sampled = min(max(vocabulary_size // 8, 1), 8192)
        num_sampled = check_whole("num_sampled", num_sampled, 1)
    return {
        "softmax": softmax,
        "cutoffs": cutoffs,
        "num_sampled": num_sampled,
    }


def make_projection(
    settings: dict[str, Any],
    vocabulary_size: int,
    *,
    kernel_initializer: NumPyInitializer,
    bias_initializer: Any,
    tied_to: Embedding | None,
    seed: int,
    **kwargs: Any,
) -> Projection | AdaptiveProjection:
    """The layer for settings that `choose_softmax` gave."""
    initializers = {
        "kernel_initializer": kernel_initializer,
        "bias_initializer": bias_initializer,
    }
    if settings["softmax"] == "adaptive":
        return AdaptiveProjection(
            vocabulary_size,
            cutoffs=settings["cutoffs"],
            **initializers,
            **kwargs,
        )
    arguments = initializers | {"tied_to": tied_to} | kwargs
    if settings["softmax"] == "sampled":
        arguments |= {"num_sampled": settings["num_sampled"], "seed": seed}
        return SampledProjection(vocabulary_size, **arguments)
    return Projection(vocabulary_size, **arguments)
