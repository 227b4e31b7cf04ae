"""Model + ids -> the perplexity of a whole text, the same however it is cut.

The figure is that of one pass from the first word to the last with the state
carried through, every word but the first predicted once. Such a pass cannot
use a batch, so the text is folded into rows, and each row begins with the
state in which the row before it ends. That state is found by reading the end
of the row before, from a guess:

    row 0  ..................####     #### is read beforehand, from zeros:
    row 1  ..................####     an LSTM forgets where it came from
    row 2  ...........

Afterwards the guess is checked against the states in which the rows really
ended, and the rows are read again from those until the two agree. The result
is that of the single pass to rounding, for every batch size.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from multilstm.dataset import ContinuousStreams
from multilstm.errors import UserError, check_whole
from multilstm.model import LanguageModel
from multilstm.ops import tf32

logger = logging.getLogger(__name__)

# What a figure is of, so that like is compared with like.
TOKENS = "every word of the text but the first, once, in order"
STATE = "zeros at the first word, carried to the last"

# States that differ by less than this where a row begins, or goes on from an
# earlier reading, are the same; those above 1 by less than this share. The
# difference fades as the row is read on, and the cross-entropy agrees to 5
# digits of a short text, to 7 of a long one. Of states with fewer bits the last
# ones are noise, in which no two readings need ever agree.
_STATE_TOLERANCE = 1e-4
_STATE_TOLERANCES = {"bfloat16": 2.0**-6, "float16": 2.0**-9}
_WARM_UP = 256  # words of the row before that are read for a state
_KEPT_BYTES = 2**26  # of states after a reading's first chunks, for the next

States = list[tuple[NDArray[np.float32], NDArray[np.float32]]]
Outputs = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        total_nats: Summed negative log-likelihood, float64.
        num_tokens: Number of words predicted.
    """

    total_nats: float
    num_tokens: int

    @classmethod
    def of(cls, nats: NDArray[Any]) -> "Evaluation":
        """That of a text, from the nats of its words, summed in float64."""
        return cls(float(np.sum(nats, dtype=np.float64)), len(nats))

    @property
    def cross_entropy(self) -> float:
        """Nats per word."""
        return self.total_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(total nats / total words)."""
        if self.cross_entropy > 700:
            return math.inf
        return math.exp(self.cross_entropy)


@dataclass(frozen=True)
class Reading:
    """What a model made of each word of a text but the first.

    Attributes:
        nats: Negative log-likelihood of each, float32 of shape
            `(num_tokens - 1,)`.
        features: What each was predicted from, float32 of shape
            `(num_tokens - 1, units)`. None where that was not asked for.
        starts: The states in which the rows began, to read them again from.
    """

    nats: NDArray[np.float32]
    features: NDArray[np.float32] | None
    starts: States


def check_text(token_ids: NDArray[np.int32], vocabulary_size: int) -> None:
    """That there is a word to predict, and that the model has each.

    Raises:
        UserError: If not.
    """
    if len(token_ids) < 2:
        raise UserError(
            "A perplexity needs two words or more, one to predict the other "
            f"from; received {len(token_ids)}."
        )
    for unknown in (token_ids.min(), token_ids.max()):
        if not 0 <= unknown < vocabulary_size:
            raise UserError(
                f"The model knows {vocabulary_size} words; the text has the "
                f"id {unknown}. Encode it with the vocabulary of the model's "
                "run."
            )


def evaluate(
    model: Any,
    token_ids: NDArray[np.int32],
    *,
    batch_size: int = 20,
    sequence_length: int = 64,
) -> Evaluation:
    """Measures the perplexity of a whole text.

    Args:
        model: A `LanguageModel`, or any model with its `vocabulary_size`,
            its `get_initial_state`, and its arguments `initial_state` and
            `return_state`.
        token_ids: int32 array of shape `(num_tokens,)`, two tokens or more.
        batch_size: Rows read at once. It changes the time, not the result
            (to 6 digits in float32; bfloat16 states have fewer themselves).
        sequence_length: Words a row read at once, likewise.

    Returns:
        The totals, summed in float64. The state starts from zeros and is
        carried to the end; each word but the first is predicted once.

    Raises:
        UserError: If the text has no word to predict or an unknown id.

    Reference:
        Mikolov et al., 2010: perplexity with the state carried on.
    """
    return Evaluator(model, batch_size, sequence_length)(token_ids)


def gives_features(model: Any) -> bool:
    """Whether a model is a `LanguageModel` that predicts as those do.

    A subclass with a `call` of its own may predict otherwise.
    """
    return isinstance(model, LanguageModel) and model.keeps_methods("call")


def check_features(model: Any) -> None:
    """Refuses what needs features from a model that may not predict by them.

    Raises:
        UserError: As it says.
    """
    if not gives_features(model):
        raise UserError(
            "This needs a LanguageModel without a `call` of its own; received "
            f"a {type(model).__name__}. Evaluate it as it is."
        )


def build_for_reading(model: Any) -> None:
    """Builds a `LanguageModel` that is not built, for any number of rows.

    Raises:
        UserError: If it carries its state, which is of so many rows.
    """
    if not hasattr(model, "read") or model.built:
        return
    if model.carry_state:
        raise UserError(
            "A model that carries its state must be built before it reads, "
            "for the rows that it is to train on; it is not. Call "
            "model.build((batch_size, sequence_length))."
        )
    model.build((None, None))


class Evaluator:
    """`evaluate` for one model and many texts: it is compiled only once.

    Products are float32's, in whichever precision a GPU multiplies otherwise.

    Args:
        model: As of `evaluate`.
        batch_size: As of `evaluate`.
        sequence_length: As of `evaluate`.
        with_features: Whether a `Reading` has features, which needs a
            `LanguageModel`.
        training: Whether dropout is applied, likewise. The rows must then be
            given their starts: none ends where the next one begins.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int = 20,
        sequence_length: int = 64,
        *,
        with_features: bool = False,
        training: bool = False,
    ) -> None:
        batch_size = check_whole("batch_size", batch_size, 1)
        sequence_length = check_whole("sequence_length", sequence_length, 1)
        if with_features or training:
            check_features(model)
        build_for_reading(model)
        self.model = model
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self._chunk = _Chunk(model, with_features, training)

    def __call__(self, token_ids: NDArray[np.int32]) -> Evaluation:
        return Evaluation.of(self.read(token_ids).nats)

    @tf32(False)
    def read(
        self, token_ids: NDArray[np.int32], starts: States | None = None
    ) -> Reading:
        """Reads a text, word by word.

        Args:
            token_ids: int32 array of shape `(num_tokens,)`.
            starts: The `starts` of another reading of this text, by an
                evaluator with the same sizes. Default: those with which the
                rows are one pass.
        """
        streams = self._fold(np.asarray(token_ids))
        if starts is not None:
            outputs = self._read(streams, starts, keeps=False).outputs
            return _unfold(outputs, streams, starts)
        starts = self._guess_starts(streams)
        done = self._read(streams, starts)
        for _ in range(streams.batch_size - 1):
            correct = _move_down(done.ends)
            if self._agree(starts, correct, streams):
                break
            logger.info("Rows did not begin where others end, reading again")
            starts = correct
            done = self._read(streams, starts, done)
        return _unfold(done.outputs, streams, starts)

    @tf32(False)
    def read_apart(
        self, texts: Sequence[NDArray[np.int32]]
    ) -> list[NDArray[np.float32]]:
        """Reads texts of which none goes on where another ends.

        Args:
            texts: int32 arrays of shape `(num_tokens,)`, of any lengths.

        Returns:
            For each text the nats of all its words but the first, float32 of
            shape `(num_tokens - 1,)`.
        """
        if not texts:
            return []
        for text in texts:
            check_text(text, self.model.vocabulary_size)
        nats: dict[int, NDArray[np.float32]] = {}
        # Those of like length together, so that few rows are read in vain.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        rows, length = min(self.batch_size, len(texts)), self.sequence_length
        for first in range(0, len(order), rows):
            places = order[first : first + rows]
            num_chunks = -(-(len(texts[places[-1]]) - 1) // length)
            token_ids = np.zeros((rows, num_chunks * length + 1), np.int32)
            for row, place in zip(token_ids, places, strict=False):
                row[: len(texts[place])] = texts[place]
            states = self.model.get_initial_state(rows)
            outputs: list[NDArray[np.float32]] = []
            for start in range(0, num_chunks * length, length):
                inputs = token_ids[:, start : start + length]
                targets = token_ids[:, start + 1 : start + length + 1]
                (output, *_), states = self._chunk.predict_on_batch(
                    (inputs, targets, states)
                )
                outputs.append(np.asarray(output, np.float32))
            for row, place in zip(
                np.concatenate(outputs, axis=1), places, strict=False
            ):
                nats[place] = row[: len(texts[place]) - 1].copy()
        return [nats[place] for place in range(len(texts))]

    def _fold(self, token_ids: NDArray[np.int32]) -> ContinuousStreams:
        """The text in rows, after it was checked."""
        check_text(token_ids, self.model.vocabulary_size)
        # Short texts in fewer rows, so that a row is not mostly warm-up.
        rows = max(1, min(self.batch_size, len(token_ids) // 16))
        streams = ContinuousStreams(token_ids, self.sequence_length, rows)
        # In whole chunks, of which all have one shape: the last rows may be
        # empty.
        streams.row_length += -streams.row_length % self.sequence_length
        return streams

    def _guess_starts(self, streams: ContinuousStreams) -> States:
        """Reads the last words of each row for the state of the next."""
        length = self.sequence_length
        num_chunks = min(-(-_WARM_UP // length), streams.row_length // length)
        first = streams.row_length - num_chunks * length
        row_start = np.arange(streams.batch_size)[:, None] * streams.row_length
        states = self.model.get_initial_state(streams.batch_size)
        for k in range(num_chunks):
            columns = first + k * length + np.arange(length)
            # The last rows may be short or empty; no full one follows them.
            position = np.minimum(
                row_start + columns, len(streams.token_ids) - 2
            )
            inputs = streams.token_ids[position]
            _, states = self._chunk.predict_on_batch((inputs, inputs, states))
        return _move_down(states)

    def _read(
        self,
        streams: ContinuousStreams,
        states: States,
        earlier: "_Pass | None" = None,
        *,
        keeps: bool = True,
    ) -> "_Pass":
        """Reads all rows, or until all are where an earlier reading was."""
        outputs: list[Outputs] = []
        passed: list[States] = []
        last = len(streams) - 1
        for k in range(len(streams)):
            inputs, targets, _ = streams[k]
            output, states = self._chunk.predict_on_batch(
                (inputs, targets, states)
            )
            outputs.append(output)
            size = sum(state.nbytes for layer in states for state in layer)
            if keeps and (k + 1) * size <= _KEPT_BYTES:
                passed.append(states)
            if (
                earlier
                and k < min(last, len(earlier.passed))
                and self._agree(states, earlier.passed[k], streams)
            ):
                # Rows end where they did, so that no reading follows.
                rest = earlier.outputs[k + 1 :]
                return _Pass(outputs + rest, [], earlier.ends)
        return _Pass(outputs, passed, states)

    def _agree(
        self, left: States, right: States, streams: ContinuousStreams
    ) -> bool:
        """Whether states are the same; of numbers that are none, they are."""
        tolerance = max(
            _STATE_TOLERANCES.get(dtype, _STATE_TOLERANCE)
            for dtype in self._chunk.state_dtypes
        )
        return not _largest_difference(left, right, streams) > tolerance


@dataclass(frozen=True)
class _Pass:
    """What each chunk gave, the states after the first ones and at the end."""

    outputs: list[Outputs]
    passed: list[States]
    ends: States


class _Chunk(keras.Model):
    """One chunk of every row, compiled by Keras: nats a word, and states."""

    def __init__(
        self, language_model: Any, with_features: bool, training: bool
    ) -> None:
        # States come and go in float32, whatever Keras's global policy is.
        super().__init__(name="chunk", dtype="float32")
        # Those of the model's own, once called.
        self.state_dtypes = ["float32"]
        self.language_model = language_model
        self.with_features = with_features
        self.with_dropout = training

    def call(self, chunk: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        token_ids, targets, states = chunk
        if gives_features(self.language_model):
            features, states = self.language_model.read(
                token_ids, states, training=self.with_dropout
            )
            outputs = [
                self.language_model.projection.negative_log_likelihood(
                    features, targets
                )
            ]
            if self.with_features:
                outputs.append(ops.cast(features, "float32"))
        else:
            logits, states = self.language_model(
                token_ids,
                initial_state=states,
                return_state=True,
                training=False,
            )
            outputs = [
                ops.sparse_categorical_crossentropy(
                    targets, ops.cast(logits, "float32"), from_logits=True
                )
            ]
        self.state_dtypes = [
            ops.dtype(state) for layer in states for state in layer
        ]
        return outputs, [
            tuple(ops.cast(state, "float32") for state in layer)
            for layer in states
        ]


def _unfold(
    chunks: list[Outputs], streams: ContinuousStreams, starts: States
) -> Reading:
    """The rows one after the other, without what fills up the last ones."""
    num_words = len(streams.token_ids) - 1
    nats, *features = (
        np.concatenate(
            [np.asarray(output, np.float32) for output in outputs], axis=1
        )  # (rows, row_length[, units])
        for outputs in zip(*chunks, strict=True)
    )
    return Reading(
        nats.reshape(-1)[:num_words],
        features[0].reshape(-1, features[0].shape[-1])[:num_words]
        if features
        else None,
        starts,
    )


def _move_down(ends: States) -> States:
    """The end of each row is the start of the next; row 0 starts from zero."""
    moved = []
    for layer in ends:
        h, c = (np.roll(np.asarray(state), 1, axis=0) for state in layer)
        h[0] = c[0] = 0.0
        moved.append((h, c))
    return moved


def _largest_difference(
    left: States, right: States, streams: ContinuousStreams
) -> float:
    """Of the rows that hold text; of numbers above 1 their share."""
    rows = -(-(len(streams.token_ids) - 1) // streams.row_length)
    differences = [
        np.abs(a - b) / np.maximum(1, np.minimum(np.abs(a), np.abs(b)))
        for pair in zip(left, right, strict=True)
        for a, b in zip(*pair, strict=True)
    ]
    return float(np.max([each[:rows].max() for each in differences]))
