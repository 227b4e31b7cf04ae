"""Features + words -> how likely a text's own recent words make the next.

The cache remembers what the model's features were when each of the last words
came. Where they were like what they are now, that word is likely again:

    features   h0   h1   h2   h3 | h4          what word 5 is predicted from
    next word  w1   w2   w3   w4 | ?

    p(w5) = sum of exp(theta h4.hi) over those i with w(i+1) = w5
            / sum of exp(theta h4.hi) over all i in the window

Only words before the one to predict count. All of it is NumPy, so that it is
the same whichever backend gave the features.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multilstm.errors import UserError, check_whole

Floats = NDArray[np.float64]

_BLOCK = 512  # words whose products with their windows are held at once


def cache_probabilities(
    features: NDArray[np.float32],
    token_ids: NDArray[np.int32],
    *,
    window: int,
    theta: float,
) -> Floats:
    """The probability that the cache gives each word of a text.

    Args:
        features: float32 array of shape `(num_tokens - 1, units)`, as of
            `evaluation.Reading`.
        token_ids: int32 array of shape `(num_tokens,)`.
        window: How many words the cache holds, the same for each word to
            predict, fewer only where the text begins.
        theta: How much alike features must be, from 0 (not at all: the
            shares of the words in the window).

    Returns:
        float64 array of shape `(num_tokens - 1,)`, for each word but the
        first. NaN for the second word, before which the cache is empty.

    Raises:
        UserError: If the window is empty or theta below 0.

    Reference:
        Grave, Joulin and Usunier, 2017, "Improving neural language models
        with a continuous cache", arXiv:1612.04426, equation 3.

    Example:
    >>> features = np.zeros((4, 2), "float32")
    >>> ids = np.array([0, 1, 1, 2, 1])
    >>> cache_probabilities(features, ids, window=9, theta=1).round(2).tolist()
    [nan, 1.0, 0.0, 0.67]
    """
    check_whole("window", window, 1)
    if not 0 <= theta < math.inf:
        raise UserError(f"`theta` must be 0 or more; received {theta}.")
    targets = np.asarray(token_ids)[1:]
    probabilities = np.full(len(targets), np.nan)
    for first in range(0, len(targets), _BLOCK):
        queries = np.arange(first, min(first + _BLOCK, len(targets)))
        keys = np.arange(max(0, first - window), queries[-1])
        if not len(keys):  # a text of two words
            continue
        scaled = features[queries] * np.float32(theta)
        scores = scaled @ features[keys].T  # (queries, keys)
        age = queries[:, np.newaxis] - keys
        scores[(age < 1) | (age > window)] = -np.inf
        largest = scores.max(axis=1, keepdims=True)
        largest[queries == 0] = 0  # which has no key at all
        weights = np.exp(scores - largest)
        same = targets[queries, np.newaxis] == targets[keys]
        total = weights.sum(axis=1, dtype=np.float64)
        weights *= same
        filled = queries > 0
        probabilities[queries[filled]] = (
            weights.sum(axis=1, dtype=np.float64)[filled] / total[filled]
        )
    return probabilities


def mix(nats: NDArray[Any], cached: Floats, share: float) -> Floats:
    """The nats of words that model and cache predict together.

    Args:
        nats: Of the model alone, shape `(num_words,)`.
        cached: What `cache_probabilities` gives, of that shape. Where it is
            NaN the model is alone.
        share: Of the cache, from 0 to below 1 (the paper's lambda).

    Returns:
        float64 array of shape `(num_words,)`.

    Reference:
        Grave et al., 2017, equation 4.
    """
    if not 0 <= share < 1:
        raise UserError(
            f"`share` must be 0 or more and below 1; received {share}."
        )
    nats = np.asarray(nats, np.float64)
    # No share, words that the cache has not, and NaN, which is dealt with.
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = -np.logaddexp(
            np.log1p(-share) - nats, np.log(share) + np.log(cached)
        )
    return np.where(np.isnan(cached), nats, mixed)
