"""Model + sentences -> how likely each of their words was."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multilstm.errors import UserError
from multilstm.evaluation import Evaluation, Evaluator
from multilstm.vocabulary import END_OF_SENTENCE, UnknownWords, Vocabulary


@dataclass(frozen=True)
class SentenceScore:
    """How likely the words of one sentence were.

    Attributes:
        words: Those that were predicted, as the model read them: `<unk>` for
            unknown ones, `<eos>` at the end.
        nats: Negative log-likelihood of each, float32 of shape
            `(num_words,)`. (Over ln 2 it is the surprisal in bits.)
        unknown_words: Words of the sentence that the vocabulary lacks.
    """

    words: list[str]
    nats: NDArray[np.float32]
    unknown_words: list[str]

    @property
    def evaluation(self) -> Evaluation:
        """The sentence's total, nats per word and perplexity."""
        return Evaluation.of(self.nats)


def score(
    model: Any,
    vocabulary: Vocabulary,
    sentences: Iterable[str | Sequence[str]],
    *,
    running: bool = False,
    unknown: UnknownWords = "error",
    batch_size: int = 20,
    sequence_length: int = 32,
) -> list[SentenceScore]:
    """Tells how likely each sentence is, word by word.

    Args:
        model: As of `evaluate`.
        vocabulary: The one that it was trained with.
        sentences: Each its words, or a text that is split at white space.
            The model reads `<eos>`, then predicts the words and `<eos>`.
        running: Whether each sentence follows the one before, as in a text,
            so that the state is carried on. Otherwise each stands alone: the
            order does not matter, as where one of several is to be chosen.
        unknown: As of `Vocabulary.encode`, for a vocabulary without `<unk>`.
        batch_size: Rows read at once. It changes the time, not the result.
        sequence_length: Words a row read at once, likewise.

    Returns:
        A score for each sentence, in their order.

    Raises:
        UserError: If the vocabulary has no `<eos>` or lacks a word, with no
            `<unk>` for it.
    """
    if isinstance(sentences, str):
        raise UserError(
            "`sentences` must be several, not one text; received "
            f"{sentences[:40]!r}. Put it into a list: [sentence]"
        )
    if END_OF_SENTENCE not in vocabulary:
        raise UserError(
            f"Sentences are scored from {END_OF_SENTENCE!r} on, which the "
            "vocabulary lacks. Use `evaluate` for a text of another kind."
        )
    split = [
        sentence.split() if isinstance(sentence, str) else list(sentence)
        for sentence in sentences
    ]
    if not split:
        return []
    end = vocabulary.encode([END_OF_SENTENCE])
    encoded = [
        np.concatenate([vocabulary.encode(words, unknown), end])
        for words in split
    ]
    evaluator = Evaluator(model, batch_size, sequence_length)
    if running:
        nats = np.split(
            evaluator.read(np.concatenate([end, *encoded])).nats,
            np.cumsum([len(ids) for ids in encoded])[:-1],
        )
    else:
        nats = evaluator.read_apart(
            [np.concatenate([end, ids]) for ids in encoded]
        )
    return [
        SentenceScore(
            vocabulary.decode(ids),
            of_words,
            [word for word in words if word not in vocabulary],
        )
        for words, ids, of_words in zip(split, encoded, nats, strict=True)
    ]
