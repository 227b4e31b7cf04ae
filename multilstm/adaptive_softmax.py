"""Features -> log-probabilities, with few numbers for rare words.

    head    the most frequent words, and one entry for each cluster of others
    tail 1  the words of cluster 1, from a quarter of the features
    tail 2  the words of cluster 2, from a sixteenth

A word of the head costs the head alone, and most words of a text are there.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import keras
from keras import ops

from multilstm.errors import UserError
from multilstm.initializers import NumPyInitializer
from multilstm.ops import cross_entropy_of_some, has_xla, linear_cross_entropy

# Each cluster's words have so many times fewer features than those before.
_FEWER = 4


class AdaptiveProjection(keras.layers.Layer):
    """Features -> log-probabilities of words that are sorted by frequency.

    The probabilities are those of a head times those within a tail and sum to
    1. The loss is the exact one of this distribution, in training too.

    Args:
        vocabulary_size: Number of words, the most frequent first.
        cutoffs: The first word of each tail.
        kernel_initializer: For all matrices, at places of their own.
        bias_initializer: For the biases of the head; tails have none.
        **kwargs: Of `keras.layers.Layer`.

    Reference:
        Grave et al., 2017, arXiv:1609.04309, section 4; the weights are
        those of `torch.nn.AdaptiveLogSoftmaxWithLoss`, transposed.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        cutoffs: Sequence[int],
        kernel_initializer: NumPyInitializer,
        bias_initializer: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_jit = has_xla(for_some=True)
        self.cutoffs = list(cutoffs)
        ends = [*cutoffs[1:], vocabulary_size]
        self.tail_sizes = [
            end - start for start, end in zip(cutoffs, ends, strict=True)
        ]
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer

    @property
    def words_per_target(self) -> int:
        """How many words a target is compared with, if it is in the head."""
        return self.cutoffs[0] + len(self.cutoffs)

    def build(self, features_shape: tuple[int | None, ...]) -> None:
        features = features_shape[-1] or 0
        self.head_kernel = self.add_weight(
            shape=(features, self.words_per_target),
            initializer=self.kernel_initializer,
            name="head_kernel",
        )
        self.head_bias = self.add_weight(
            shape=(self.words_per_target,),
            initializer=self.bias_initializer,
            name="head_bias",
        )
        self.tails = []
        for k, size in enumerate(self.tail_sizes, start=1):
            fewer = max(features // _FEWER**k, 1)
            shapes = {"down": (features, fewer), "kernel": (fewer, size)}
            self.tails += [
                self.add_weight(
                    shape=shape,
                    initializer=self.kernel_initializer.at(k, place),
                    name=f"tail_{k}_{name}",
                )
                for place, (name, shape) in enumerate(shapes.items())
            ]

    def call(self, features: Any) -> Any:
        head = ops.matmul(features, self._read(self.head_kernel))
        head = _log_softmax(head + self._read(self.head_bias))
        first = self.cutoffs[0]
        parts = [head[..., :first]]
        for k, (_, _, down, kernel) in enumerate(self._tails()):
            within = ops.matmul(ops.matmul(features, down), kernel)
            entry = head[..., first + k : first + k + 1]
            parts.append(entry + _log_softmax(within))
        return ops.concatenate(parts, axis=-1)

    def negative_log_likelihood(
        self,
        features: Any,
        targets: Any,
        weights: Any = None,
        training: bool = False,
    ) -> Any:
        """As of `Projection`; each tail for the targets that are in it."""
        if weights is not None:
            targets = ops.where(weights == 0, 0, targets)
        features = ops.cast(features, self.compute_dtype)
        first = self.cutoffs[0]
        cluster = sum(
            ops.cast(targets >= cutoff, "int32") for cutoff in self.cutoffs
        )
        nll = linear_cross_entropy(
            features,
            self._read(self.head_kernel),
            self._read(self.head_bias),
            ops.where(cluster == 0, targets, first - 1 + cluster),
        )
        for start, end, down, kernel in self._tails():
            nll = nll + cross_entropy_of_some(
                features,
                down,
                kernel,
                targets - start,
                ops.logical_and(targets >= start, targets < end),
            )
        return nll if weights is None else nll * ops.cast(weights, "float32")

    def _tails(self) -> list[tuple[int, int, Any, Any]]:
        """Of each tail its first word, its end, and its two matrices."""
        return [
            (start, start + size, *map(self._read, self.tails[2 * k :][:2]))
            for k, (start, size) in enumerate(
                zip(self.cutoffs, self.tail_sizes, strict=True)
            )
        ]

    def _read(self, weight: Any) -> Any:
        return ops.cast(ops.convert_to_tensor(weight), self.compute_dtype)


def _log_softmax(logits: Any) -> Any:
    return ops.log_softmax(ops.cast(logits, "float32"), axis=-1)


def check_cutoffs(cutoffs: Sequence[int], vocabulary_size: int) -> list[int]:
    """Cutoffs as a list, or what is wrong with them."""
    edges = [0, *cutoffs, vocabulary_size]
    is_whole = all(isinstance(edge, Integral) for edge in edges)
    if len(edges) < 3 or not is_whole or sorted({*edges}) != edges:
        raise UserError(
            "`cutoffs` must be whole numbers that increase, from 1 to below "
            f"the {vocabulary_size:,} words of the vocabulary; received "
            f"{list(cutoffs)}. Give the first word of each tail, for instance "
            f"{default_cutoffs(max(vocabulary_size, 3))}."
        )
    return [int(edge) for edge in edges[1:-1]]


def default_cutoffs(vocabulary_size: int) -> list[int]:
    """A twentieth of the vocabulary in the head, a quarter before the rest.

    >>> default_cutoffs(250_000)
    [12500, 62500]
    """
    if vocabulary_size < 3:
        raise UserError(
            "An adaptive softmax needs three words or more, for a head and "
            f"two tails; received {vocabulary_size}. Use softmax='exact'."
        )
    first = max(vocabulary_size // 20, 1)
    return [first, max(vocabulary_size // 4, first + 1)]
