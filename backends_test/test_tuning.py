"""Where the search looks, and what it tells."""

import math

import pytest

from multilstm.tuning import Search, show_settings


def bowl(**lowest):
    """A cross-entropy that is lowest where each setting has its value."""

    def score(**settings):
        return 1 + sum(
            math.log(value / lowest[name]) ** 2
            for name, value in settings.items()
        )

    return score


def find(score, grids):
    search = Search(score, lambda line: None)
    search(grids)
    return search


@pytest.mark.parametrize("lowest", [0.03, 0.1, 0.2, 0.9, 9.0])
def test_best_is_near_wherever_it_is(lowest):
    """Grid steps of 3.2, of which a half is left, each side a half of it."""
    found = find(bowl(rate=lowest), {"rate": (0.1, 0.316, 1.0)}).best()
    assert abs(math.log(found["rate"] / lowest)) <= math.log(3.2) / 4


def test_search_beyond_a_grid_has_an_end():
    search = find(lambda rate: 1 / rate, {"rate": (1.0, 2.0)})
    assert search.best() == {"rate": 16.0}


def test_grid_of_one_value_is_kept_to():
    search = find(bowl(a=5, b=3), {"a": (2,), "b": (1.0, 3.0, 9.0)})
    assert search.best() == {"a": 2, "b": 3.0}
    assert {tried["a"] for tried in search.describe(1)["tried"]} == {2}


def test_settings_are_tuned_one_after_the_other():
    score = bowl(a=1.0, b=9.0)
    tried = find(score, {"a": (1.0, 2.0, 4.0), "b": (3.0, 9.0, 27.0)})
    assert tried.best() == {"a": 1.0, "b": 9.0}
    told = tried.describe(70)
    assert (told["text"], told["num_words"]) == ("valid", 70)
    for a, b in ((1.0, 27.0), (4.0, 9.0)):  # those after it in the middle
        assert {"a": a, "b": b, "cross_entropy": score(a=a, b=b)} in (
            told["tried"]
        )
    assert {"a": 4.0, "b": 3.0, "cross_entropy": score(a=4, b=3)} not in (
        told["tried"]
    )


def test_what_diverged_is_not_the_best():
    values = {1.0: math.nan, 2.0: 5.0, 4.0: math.inf}
    search = find(lambda rate: values.get(rate, 9.0), {"rate": (1.0, 2.0, 4.0)})
    assert search.best() == {"rate": 2.0}


def test_nothing_is_tried_twice_and_each_is_told():
    calls, lines = [], []

    def score(**settings):
        calls.append(tuple(settings.values()))
        return bowl(rate=3)(**settings)

    search = Search(score, lines.append)
    search({"rate": (1.0, 3.0, 9.0)})
    search({"rate": (1.0, 3.0, 9.0)})
    assert len({*calls}) == len(calls) == len(lines)
    assert lines[1] == "rate 3: perplexity 2.72"


def test_settings_are_shown_in_words():
    shown = show_settings({"learning_rate": 0.3, "window": 2000})
    assert shown == "learning rate 0.3, window 2000"
