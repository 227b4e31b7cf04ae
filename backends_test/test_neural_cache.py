"""The cache against a loop over words, and what it may not know."""

import numpy as np
import oracles
import pytest

from multilstm import neural_cache
from multilstm.errors import UserError
from multilstm.neural_cache import cache_probabilities, mix

V = 5


@pytest.fixture
def text(rng):
    return rng.integers(V, size=61).astype(np.int32)


@pytest.fixture
def features(rng):
    return rng.normal(size=(60, 4)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 7, 512], ids="block={}".format)
@pytest.mark.parametrize("window", [1, 9, 1000], ids="window={}".format)
def test_probabilities_are_those_of_a_loop_over_words(
    block, window, text, features, monkeypatch
):
    monkeypatch.setattr(neural_cache, "_BLOCK", block)
    for theta in (0, 0.7):
        got = cache_probabilities(features, text, window=window, theta=theta)
        expected = oracles.neural_cache(
            features.astype(np.float64), text, window, theta
        )
        # float32 products of four features.
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_large_products_do_not_overflow(text, features):
    with np.errstate(all="raise", under="ignore"):
        got = cache_probabilities(30 * features, text, window=9, theta=1.0)
    assert np.isfinite(got[1:]).all()
    assert got[1:].min() >= 0
    assert got[1:].max() <= 1


def test_later_words_change_nothing_before_them(text, features):
    how = {"window": 20, "theta": 0.5}
    before = cache_probabilities(features, text, **how)
    text[41:] = (text[41:] + 1) % V
    features[41:] += 1
    after = cache_probabilities(features, text, **how)
    np.testing.assert_array_equal(after[:40], before[:40])
    assert (after[40:] != before[40:]).any()


def test_model_and_cache_share_one_probability_over_the_vocabulary(
    text, features
):
    """Each word in turn as the last one: together they have probability 1."""
    total = 0.0
    for word, p in enumerate([0.4, 0.3, 0.2, 0.05, 0.05]):
        text[-1] = word
        cached = cache_probabilities(features, text, window=9, theta=0.5)
        nats = np.full(len(cached), -np.log(p), np.float32)
        total += np.exp(-mix(nats, cached, 0.3)[-1])
    # float32 nats.
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_model_is_alone_where_the_cache_is_empty_or_has_no_share(
    text, features
):
    cached = cache_probabilities(features, text, window=9, theta=0.5)
    nats = np.linspace(0.1, 9, len(cached))
    np.testing.assert_allclose(mix(nats, cached, 0), nats, rtol=1e-15)
    assert mix(nats, cached, 0.5)[0] == nats[0]
    assert (mix(nats, cached, 0.5)[1:] != nats[1:]).all()


def test_text_of_two_words_has_an_empty_cache(text, features):
    got = cache_probabilities(features[:1], text[:2], window=9, theta=0.5)
    assert np.isnan(got).tolist() == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"window": 0},
            "`window` must be a whole .*1 or more.* 0",
        ),
        ({"theta": -1}, "`theta` must be 0 or more; received -1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change, message, text, features):
    with pytest.raises(UserError, match=message):
        cache_probabilities(
            features, text, **{"window": 9, "theta": 1} | change
        )


@pytest.mark.parametrize("share", [-0.1, 1])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="`share` must be 0 or more and below"):
        mix(np.ones(2), np.ones(2), share)
