"""Model + prompt -> words, one step a word with the state carried on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from multilstm.errors import UserError, check_whole
from multilstm.evaluation import build_for_reading
from multilstm.vocabulary import END_OF_SENTENCE, Vocabulary

_WORDS_AT_ONCE = 256  # each has the logits of all words


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
        prompt: The words that were read, `<unk>` for unknown ones.
        words: The words that follow.
        unknown_words: Words of the prompt that the vocabulary lacks.
    """

    prompt: list[str]
    words: list[str]
    unknown_words: list[str]


def generate(
    model: Any,
    vocabulary: Vocabulary,
    prompt: str | list[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at: str | None = None,
) -> Generation:
    """Continues a text, word by word.

    The prompt is read once; then each word costs one step of the LSTM.

    Args:
        model: A `LanguageModel`.
        vocabulary: The one it was trained with.
        prompt: Words to begin with, or a text that is split at white space;
            without any, a new sentence begins. A word that the vocabulary
            lacks becomes `<unk>` or, where that is lacking too, is left out;
            both are reported.
        max_new_tokens: How many words to add, at least 1.
        temperature: Above 1 more surprising, below 1 less; 0 takes the most
            likely word each time.
        top_k: Sample among the `top_k` most likely words only.
        top_p: Sample among the fewest words that have at least this share
            of the probability, in 0..1 (Holtzman et al., 2020).
        seed: For the draws; one seed gives one text on one backend.
        stop_at: Ends the text after this word, for instance `<eos>`.

    Returns:
        The prompt as it was read, the new words, the unknown words.

    Raises:
        UserError: If a number is out of its range.
    """
    _check_range(max_new_tokens, temperature, top_k, top_p, seed)
    if isinstance(prompt, str):
        prompt = prompt.split()
    unknown_words = [word for word in prompt if word not in vocabulary]
    ids = vocabulary.encode(prompt, unknown="drop")
    read = ids if len(ids) else _start_of_sentence(vocabulary)
    step = _Step(model)
    states = model.get_initial_state(1)
    for chunk in _chunks(read):
        logits, states = step.predict_on_batch((chunk[np.newaxis], states))
    generator = np.random.default_rng(seed)
    words: list[str] = []
    while len(words) < max_new_tokens:
        probabilities = next_word_probabilities(
            logits[0, -1], temperature=temperature, top_k=top_k, top_p=top_p
        )
        token_id = generator.choice(len(probabilities), p=probabilities)
        words += vocabulary.decode([token_id])
        if words[-1] == stop_at or len(words) == max_new_tokens:
            break
        logits, states = step.predict_on_batch(
            (np.array([[token_id]], np.int32), states)
        )
    return Generation(vocabulary.decode(ids), words, unknown_words)


def next_word_probabilities(
    logits: NDArray[Any],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> NDArray[np.float64]:
    """The distribution that the next word is drawn from.

    Args:
        logits: Array of shape `(vocabulary_size,)`.
        temperature: Divides the logits; 0 takes the largest.
        top_k: Keep this many words, applied before `top_p`.
        top_p: Keep the fewest words with at least this probability.

    Returns:
        float64 array of shape `(vocabulary_size,)` that sums to 1.

    Example:
    >>> half_quarter = np.log([0.5, 0.25, 0.125, 0.125])
    >>> next_word_probabilities(half_quarter, top_k=2).round(3).tolist()
    [0.667, 0.333, 0.0, 0.0]
    >>> next_word_probabilities(half_quarter, top_p=0.5).tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    logits = np.asarray(logits, np.float64)
    ranked = np.argsort(-logits, kind="stable")
    if temperature == 0:
        certain: NDArray[np.float64] = np.zeros_like(logits)
        certain[ranked[0]] = 1
        return certain
    with np.errstate(over="ignore"):  # to minus infinity, of which exp is 0
        scaled = (logits[ranked] - logits[ranked[0]]) / temperature
    probabilities = np.exp(scaled)  # from the most likely word down
    if top_k is not None:
        probabilities[top_k:] = 0
    probabilities /= probabilities.sum()
    if top_p is not None:
        before = np.cumsum(probabilities) - probabilities
        # The first word whose predecessors reach top_p is the first to go.
        probabilities[before >= top_p * (1 - 1e-12)] = 0
        probabilities /= probabilities.sum()
    result: NDArray[np.float64] = np.empty_like(probabilities)
    result[ranked] = probabilities
    return result


def predict_next_words(
    model: Any,
    token_ids: NDArray[np.int32],
    *,
    start: int = 70,
    num_words: int = 10,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Predicts words of a text from the true words before each.

    As the tutorial's test mode, which prints ten actual and predicted words
    from the seventieth on (windows of 30 after 40 that are skipped).

    Args:
        model: A `LanguageModel`.
        token_ids: int32 array of shape `(num_tokens,)`.
        start: Position of the first word to predict, at least 1.
        num_words: How many words to predict.

    Returns:
        Actual and predicted ids, int32 arrays of shape `(num_words,)`.

    Raises:
        UserError: If the text is shorter than that.
    """
    token_ids = np.asarray(token_ids, np.int32)
    if start < 1 or num_words < 1 or start + num_words > len(token_ids):
        raise UserError(
            "The words to predict must lie between the second and the last "
            f"of the text's {len(token_ids)}; received start={start}, "
            f"num_words={num_words}. Ask for fewer or earlier words."
        )
    step, states = _Step(model), model.get_initial_state(1)
    actual = token_ids[start : start + num_words]
    inputs = token_ids[: start + num_words - 1]
    predicted = []
    for first in range(0, len(inputs), _WORDS_AT_ONCE):
        chunk = inputs[first : first + _WORDS_AT_ONCE]
        logits, states = step.predict_on_batch((chunk[np.newaxis], states))
        predicted.append(np.asarray(logits)[0].argmax(axis=-1))
    return actual, np.concatenate(predicted)[start - 1 :].astype(np.int32)


class _Step(keras.Model):
    """Logits and next states, compiled by Keras."""

    def __init__(self, language_model: Any) -> None:
        # States come and go in float32, whatever Keras's global policy is.
        super().__init__(name="step", dtype="float32")
        build_for_reading(language_model)
        self.language_model = language_model

    def call(self, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        token_ids, states = inputs
        logits, states = self.language_model(
            token_ids, initial_state=states, return_state=True, training=False
        )
        return ops.cast(logits, "float32"), states


def _chunks(token_ids: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    """As many at once as may be, then one by one: of two shapes alone."""
    whole = len(token_ids) - len(token_ids) % _WORDS_AT_ONCE
    yield from token_ids[:whole].reshape(-1, _WORDS_AT_ONCE)
    yield from token_ids[whole:, np.newaxis]


def _start_of_sentence(vocabulary: Vocabulary) -> NDArray[np.int32]:
    has_end = END_OF_SENTENCE in vocabulary
    return vocabulary.encode(
        [END_OF_SENTENCE if has_end else vocabulary.words[0]]
    )


def _check_range(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    check_whole("max_new_tokens", max_new_tokens, 1)
    check_whole("top_k", 1 if top_k is None else top_k, 1)
    check_whole("seed", seed, 0)
    if not 0 <= temperature < math.inf:
        raise UserError(
            f"`temperature` must be finite, 0 or more; received {temperature}."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"`top_p` must be in 0..1, not 0; received {top_p}.")
