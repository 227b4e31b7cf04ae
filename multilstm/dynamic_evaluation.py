"""Model + text -> perplexity of a model that goes on learning as it reads.

    words      | 1 2 3 4 5 | 6 7 8 9 10 | 11 ...
    weights    w0          w1           w2        state carried on

Each segment of a few words is predicted first, by the weights that the words
before it made; only then are the weights changed by its gradient. So nothing
that is predicted was ever learned from. Each weight is also pulled back to
where training left it:

    w <- w - rate * gradient + pull * (w0 - w)

In the form called SGD, rate and pull are two numbers for all weights. In the
form called RMS each weight has its own: those whose gradients were large in
training take smaller steps and are pulled back faster.

That is `fit` with one row, which takes a step's loss before its update.
"""

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from multilstm.dataset import ContinuousStreams
from multilstm.errors import UserError, check_whole
from multilstm.evaluation import Evaluation, check_features, check_text
from multilstm.layers import reset_carried_state
from multilstm.model import LanguageModel
from multilstm.ops import tf32

Weights = list[NDArray[np.float32]]

SEGMENT_LENGTH = 5  # of Krause et al., as are the rows
STATISTICS_ROWS = 100
STATISTICS_BATCHES = 200


class DynamicEvaluator:
    """Reads texts with a copy of a model that learns from what it has read.

    The copy has no dropout, and its loss no penalties: it is the mean nats of
    the words in a segment. Gradients are not clipped. Every text begins from
    the weights of the model and a state of zeros.

    Args:
        model: A `LanguageModel`; it is not changed.
        segment_length: Words from update to update.

    Reference:
        Krause, Kahembwe, Murray and Renals, 2018, "Dynamic evaluation of
        neural sequence models", arXiv:1709.07432, sections 4 and 5.
    """

    def __init__(
        self, model: Any, segment_length: int = SEGMENT_LENGTH
    ) -> None:
        check_whole("segment_length", segment_length, 1)
        check_features(model)
        self.segment_length = segment_length
        self._source = model
        self._learner: _Learner | None = None
        self._streams: ContinuousStreams | None = None

    @tf32(False)
    def mean_squares(
        self,
        token_ids: NDArray[np.int32],
        *,
        max_batches: int = STATISTICS_BATCHES,
    ) -> Weights:
        """How large the gradients of each weight are in a training text.

        Args:
            token_ids: int32 array of shape `(num_tokens,)`.
            max_batches: Batches to read, of 100 rows of a segment each (fewer
                rows where the text is short), from the text's begin.

        Returns:
            For each weight the mean of its squared gradients over batches.
        """
        rows = min(
            STATISTICS_ROWS,
            max(1, (len(token_ids) - 1) // self.segment_length),
        )
        num_batches = min(
            max_batches, (len(token_ids) - 1) // rows // self.segment_length
        )
        used = token_ids[: num_batches * rows * self.segment_length + 1]
        streams = ContinuousStreams(
            used, self.segment_length, rows, drop_remainder=True
        )
        learner = _Learner.of(self._source, rows, len(streams))
        optimizer = _SumOfSquares()
        learner.compile(optimizer, auto_scale_loss=False)
        learner.fit(streams, verbose=0)
        return [
            ops.convert_to_numpy(total) / len(streams)
            for total in optimizer.totals
        ]

    @tf32(False)
    def read(
        self,
        token_ids: NDArray[np.int32],
        *,
        learning_rate: float,
        decay: float,
        epsilon: float = 0.0,
        mean_squares: Weights | None = None,
    ) -> NDArray[np.float64]:
        """Reads a text from its first word to its last.

        Args:
            token_ids: int32 array of shape `(num_tokens,)`.
            learning_rate: For the mean nats of a segment.
            decay: Share of the way back to the first weights, 0 to 1.
            epsilon: Of the RMS form, added to the root of a mean square.
            mean_squares: Of the gradient of each weight. None: the SGD form.

        Returns:
            The nats of each segment, float64. The last may be shorter.
        """
        weights = self._source.get_weights()
        rates, pulls = step_sizes(
            weights, learning_rate, decay, epsilon, mean_squares
        )
        length = self.segment_length
        num_segments = (len(token_ids) - 1) // length
        learner = self._prepare(num_segments, mean_squares is not None)
        learner.set_weights(weights)
        reset_carried_state(learner)
        nats = np.zeros(0)
        if num_segments:
            learner.optimizer.set(weights, rates, pulls)
            learner.fit(self._cut(token_ids), verbose=0)
            nats = length * learner.losses_of_segments.read(num_segments)
        rest = token_ids[num_segments * length :]
        if len(rest) > 1:
            return np.append(nats, learner.nats_of(rest[None]))
        return nats

    def evaluate(self, token_ids: NDArray[np.int32], **how: Any) -> Evaluation:
        """The totals of `read`.

        Raises:
            UserError: If there are not two words, or one is not the model's.
        """
        check_text(token_ids, self._source.vocabulary_size)
        nats = self.read(token_ids, **how)
        return Evaluation(float(nats.sum()), len(token_ids) - 1)

    def _prepare(self, num_segments: int, each_weight: bool) -> "_Learner":
        """A learner with room for so many segments, made anew if need be."""
        learner = self._learner
        if (
            learner is None
            or learner.optimizer.each_weight != each_weight
            or learner.losses_of_segments.size < num_segments
        ):
            learner = _Learner.of(self._source, 1, max(1, num_segments))
            learner.compile(_PulledBack(each_weight), auto_scale_loss=False)
            learner.optimizer.build(learner.trainable_variables)
            self._learner = learner
        return learner

    def _cut(self, token_ids: NDArray[np.int32]) -> ContinuousStreams:
        """One for a text, by which `fit` knows that it is compiled for it."""
        kept = self._streams
        if kept is None or not np.array_equal(kept.token_ids, token_ids):
            kept = ContinuousStreams(
                token_ids, self.segment_length, 1, drop_remainder=True
            )
            self._streams = kept
        return kept


def step_sizes(
    weights: Weights,
    learning_rate: float,
    decay: float,
    epsilon: float = 0.0,
    mean_squares: Weights | None = None,
) -> tuple[list[Any], list[Any]]:
    """The rate and the pull of each weight.

    In the RMS form the rate is `learning_rate / (root + epsilon)`, where
    root is the root of the weight's mean square, and the pull `decay * root /
    (mean root of all weights)`, at most 1.

    Returns:
        Two lists with an entry for each array of weights: a number in the
        SGD form, an array of its shape in the RMS form.

    Raises:
        UserError: If a number is out of its range.

    Example:
    >>> one = [np.ones(2)]
    >>> rates, pulls = step_sizes(one, 0.3, 0.5, 0.5, [np.array([4.0, 0.0])])
    >>> rates[0].round(3).tolist(), pulls[0].tolist()
    ([0.12, 0.6], [1.0, 0.0])
    """
    for name, value, largest in (
        ("learning_rate", learning_rate, np.inf),
        ("decay", decay, 1.0),
        ("epsilon", epsilon, np.inf),
    ):
        if not 0 <= value <= largest:
            raise UserError(
                f"`{name}` must be in 0 to {largest:g}; received {value}."
            )
    if mean_squares is None:
        return [learning_rate] * len(weights), [decay] * len(weights)
    roots = [np.sqrt(square) for square in mean_squares]
    num_weights = sum(root.size for root in roots)
    mean = sum(root.sum(dtype=np.float64) for root in roots) / num_weights
    if not mean > 0 or (
        epsilon == 0 and any(root.min() == 0 for root in roots)
    ):
        raise UserError(
            "`epsilon` must be above 0 where a weight had no gradient; "
            f"received {epsilon}. Words that the text does not have are such "
            "weights."
        )
    return (
        [learning_rate / (root + epsilon) for root in roots],
        [np.minimum(decay * root / mean, 1.0) for root in roots],
    )


class _Learner(LanguageModel):
    """A copy of a model whose loss is the nats alone, kept by segment."""

    loss_is_fused = True  # its own, which takes features

    @classmethod
    def of(cls, model: Any, rows: int, num_segments: int) -> "_Learner":
        undropped = {
            name: 0.0 for name in model.settings if name.endswith("_dropout")
        }
        settings = model.settings | undropped | {"carry_state": True}
        # TensorFlow has no scopes with a name such as Keras would make.
        learner = cls(**settings, dtype=model.dtype_policy, name="learner")
        learner.losses_of_segments = _Losses(num_segments)
        learner.build((rows, None))
        learner.set_weights(model.get_weights())
        return learner

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        # Without a loss or metrics compiled, y_pred are the features.
        nats = self.projection.negative_log_likelihood(
            y_pred, ops.cast(y, "int32")
        )
        loss = ops.mean(nats)
        self.losses_of_segments.update_state(loss)
        return loss

    def nats_of(self, token_ids: NDArray[np.int32]) -> float:
        """The summed nats of words that follow on the carried state."""
        features, _ = self.read(token_ids[:, :-1], training=False)
        nats = self.projection.negative_log_likelihood(
            features, ops.convert_to_tensor(token_ids[:, 1:], "int32")
        )
        return float(ops.convert_to_numpy(nats).sum(dtype=np.float64))


class _Losses(keras.metrics.Metric):
    """Every loss of an epoch, so that they can be summed in float64.

    A running sum in float32 over a text loses the sixth digit.
    """

    def __init__(self, size: int) -> None:
        super().__init__(name="losses", dtype="float32")
        self.size = size
        self.losses = self.add_weight(
            shape=(size,), initializer="zeros", name="losses"
        )
        self.count = self.add_weight(
            shape=(), initializer="zeros", dtype="int32", name="count"
        )

    def update_state(self, loss: Any) -> None:
        place = ops.reshape(ops.convert_to_tensor(self.count), (1, 1))
        self.losses.assign(
            ops.scatter_update(
                self.losses, place, ops.reshape(ops.cast(loss, "float32"), (1,))
            )
        )
        self.count.assign_add(1)

    def result(self) -> Any:
        """The last loss, for Keras's logs."""
        return ops.take(self.losses, ops.maximum(self.count - 1, 0))

    def read(self, count: int) -> NDArray[np.float64]:
        """The first losses, of as many updates as there must have been."""
        seen = int(ops.convert_to_numpy(self.count))
        if seen != count:
            raise RuntimeError(f"{count} updates were due; {seen} were made.")
        losses = ops.convert_to_numpy(self.losses)[:count]
        return np.asarray(losses, np.float64)


class _PulledBack(keras.optimizers.Optimizer):
    """w <- w - rate * gradient + pull * (w0 - w).

    Args:
        each_weight: Whether each weight has its own rate and pull.
    """

    def __init__(self, each_weight: bool) -> None:
        super().__init__(learning_rate=1.0, name="pulled_back")
        self.each_weight = each_weight

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self.origins = self.add_optimizer_variables(variables, "origin")
        self.rates, self.pulls = (
            [
                self.add_variable(
                    variable.shape if self.each_weight else (),
                    dtype="float32",
                    name=f"{name}_{number}",
                )
                for number, variable in enumerate(variables)
            ]
            for name in ("rate", "pull")
        )

    def set(self, origins: Weights, rates: list[Any], pulls: list[Any]) -> None:
        """Sets where weights are pulled to, and how they move."""
        for variables, values in (
            (self.origins, origins),
            (self.rates, rates),
            (self.pulls, pulls),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(np.asarray(value, np.float32))

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        place = self._get_variable_index(variable)
        weight = ops.convert_to_tensor(variable)
        change = ops.convert_to_tensor(self.pulls[place]) * (
            ops.convert_to_tensor(self.origins[place]) - weight
        ) - ops.convert_to_tensor(self.rates[place]) * ops.cast(
            gradient, "float32"
        )
        self.assign_add(variable, change)


class _SumOfSquares(keras.optimizers.Optimizer):
    """Adds up squared gradients and leaves the weights as they are."""

    def __init__(self) -> None:
        super().__init__(learning_rate=1.0, name="sum_of_squares")

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self.totals = self.add_optimizer_variables(variables, "total")

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        total = self.totals[self._get_variable_index(variable)]
        self.assign_add(total, ops.square(ops.cast(gradient, "float32")))
