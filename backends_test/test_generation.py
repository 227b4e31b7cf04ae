"""Words that follow: the distribution by hand, the state by re-reading."""

import keras
import numpy as np
import oracles
import pytest

from multilstm import (
    LanguageModel,
    Vocabulary,
    generate,
    generation,
    predict_next_words,
)
from multilstm.errors import UserError
from multilstm.generation import next_word_probabilities

LETTERS = "a b c d e f g"
VOCABULARY = Vocabulary(f"<eos> {LETTERS}".split())
WITH_UNKNOWN = Vocabulary(f"<unk> {LETTERS}".split())
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture
def model():
    return LanguageModel(8, units=6, initializer_scale=2.0, seed=0)


# The distribution of the next word

HALF = np.log([0.125, 0.5, 0.125, 0.25])


HAND_WORKED = [
    ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"temperature": 0}, [0, 1, 0, 0]),
    # Squares 1/64, 16/64, 1/64, 4/64 of the probabilities.
    ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
    ({"temperature": 1e9}, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
    ({"temperature": 1e-9}, [0, 1, 0, 0]),
    ({"temperature": 1e-310}, [0, 1, 0, 0]),
    ({"top_k": 1}, [0, 1, 0, 0]),
    ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
    # Of the two that are equally likely, the one with the lower id.
    ({"top_k": 3}, [1 / 7, 4 / 7, 0, 2 / 7]),
    ({"top_k": 9}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_p": 0.01}, [0, 1, 0, 0]),
    ({"top_p": 0.5}, [0, 1, 0, 0]),
    ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_p": 0.75}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),
    ({"top_p": 1.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    # The two that top_k leaves have 2/3 and 1/3.
    ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
    # Squared, the first has 16/22 = 0.73 by itself.
    ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    HAND_WORKED,
    ids=[
        ",".join(f"{name}={value}" for name, value in arguments.items())
        or "defaults"
        for arguments, _ in HAND_WORKED
    ],
)
def test_probabilities_are_those_worked_by_hand(arguments, expected):
    got = next_word_probabilities(HALF, **arguments)
    # float64; at temperature 1e9 the probabilities differ by 1e-9.
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("arguments", [{"temperature": 0}, {"top_k": 1}])
def test_of_equally_likely_words_the_first_is_taken(arguments):
    got = next_word_probabilities(np.array([1.0, 3.0, 3.0]), **arguments)
    np.testing.assert_array_equal(got, [0, 1, 0])


def test_keras_global_policy_does_not_round_another_models_states():
    model = LanguageModel(8, units=6, initializer_scale=2.0, dtype="float32")
    model.build((None, None))
    ids = np.arange(12, dtype=np.int32) % 8
    expected = oracles.language_model(model.get_weights(), ids[None])[0, -1]
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        step = generation._Step(model)
        states = model.get_initial_state(1)
        for token_id in ids:
            logits, states = step.predict_on_batch(
                (np.array([[token_id]], np.int32), states)
            )
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(logits[0, -1], expected, rtol=1e-5)  # float32


def test_large_float32_logits_do_not_overflow():
    logits = np.array([-3e38, 0, 3e38], np.float32)
    np.testing.assert_array_equal(
        next_word_probabilities(logits, temperature=0.1), [0, 0, 1]
    )


# Texts


def continue_greedily(model, ids, num_words):
    """Reads the whole text again for each word, by NumPy."""
    ids = list(ids)
    for _ in range(num_words):
        logits = oracles.language_model(model.get_weights(), np.array([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[-num_words:]


@pytest.mark.parametrize(
    "carry_state", [False, True], ids="carry_state={}".format
)
def test_greedy_words_are_those_of_reading_it_all_again(carry_state):
    model = LanguageModel(
        8, units=6, initializer_scale=2.0, seed=0, carry_state=carry_state
    )
    model.build((4, 5))  # trained with another batch size
    prompt = ["c", "a", "g"]
    result = generate(model, VOCABULARY, prompt, **GREEDY)
    expected = continue_greedily(model, VOCABULARY.encode(prompt), 12)
    assert len(set(expected)) > 2
    assert result.words == VOCABULARY.decode(expected)
    assert result.prompt == prompt
    assert result.unknown_words == []


def test_long_prompt_is_read_in_pieces_to_the_same_end(model, monkeypatch):
    prompt = ["a", "b", "c"] * 4
    expected = generate(model, VOCABULARY, prompt, **GREEDY)
    monkeypatch.setattr(generation, "_WORDS_AT_ONCE", 5)
    assert [len(c) for c in generation._chunks(np.arange(12))] == [5, 5, 1, 1]
    assert generate(model, VOCABULARY, prompt, **GREEDY) == expected


def test_model_that_is_to_carry_a_state_is_not_built_by_reading():
    model = LanguageModel(len(VOCABULARY), units=4, carry_state=True)
    with pytest.raises(UserError, match="must be built before it reads"):
        generate(model, VOCABULARY, ["a"], **GREEDY)
    assert not model.built


def test_one_seed_gives_one_text(model):
    texts = [
        generate(model, VOCABULARY, ["a"], seed=seed, temperature=2).words
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 40


def test_sampling_from_one_word_is_greedy(model):
    words = [
        generate(model, VOCABULARY, ["a"], **{"max_new_tokens": 12} | how).words
        for how in (GREEDY, {"top_k": 1, "seed": 9}, {"top_p": 1e-9})
    ]
    assert words[0] == words[1] == words[2]


def test_words_are_drawn_as_often_as_the_model_says(model):
    """All weights but the last bias are 0, so that each word is like it."""
    model.build((1, 1))
    *weights, bias = model.get_weights()
    shares = np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 1e-9])
    model.set_weights([*(0 * w for w in weights), np.log(shares)])
    words = generate(model, VOCABULARY, ["a"], max_new_tokens=300).words
    counts = np.bincount(VOCABULARY.encode(words), minlength=len(bias))
    # 4 standard deviations of a draw of 300 words.
    assert np.all(np.abs(counts / 300 - shares) < 0.11)
    assert counts[7] == 0


@pytest.mark.parametrize(
    ("vocabulary", "read"),
    [(WITH_UNKNOWN, ["a", "<unk>", "b", "<unk>"]), (VOCABULARY, ["a", "b"])],
    ids=["with <unk>", "without <unk>"],
)
def test_unknown_words_of_the_prompt_are_reported(vocabulary, read, model):
    result = generate(model, vocabulary, ["a", "zebra", "b", "yak"], **GREEDY)
    assert result.prompt == read
    assert result.unknown_words == ["zebra", "yak"]
    assert result.words == generate(model, vocabulary, read, **GREEDY).words


def test_prompt_may_be_a_text(model):
    result = generate(model, VOCABULARY, " c  a\ng ", **GREEDY)
    assert result.prompt == ["c", "a", "g"]
    expected = generate(model, VOCABULARY, ["c", "a", "g"], **GREEDY)
    assert result == expected


def test_nothing_to_read_begins_a_sentence(model):
    after_end, *others = (
        generate(model, VOCABULARY, prompt, **GREEDY)
        for prompt in (["<eos>"], [], ["zebra"])
    )
    for result in others:
        assert result.words == after_end.words
        assert result.prompt == []


def test_text_stops_after_the_word_to_stop_at(model):
    words = generate(model, VOCABULARY, ["a"], **GREEDY).words
    last = words[-1]
    first = words.index(last)
    stopped = generate(model, VOCABULARY, ["a"], stop_at=last, **GREEDY)
    assert stopped.words == words[: first + 1]
    other = generate(model, VOCABULARY, ["a"], stop_at="no such", **GREEDY)
    assert other.words == words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("max_new_tokens", 2.5),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range_are_refused(name, value, model):
    with pytest.raises(UserError, match=f"`{name}` must be .* received"):
        generate(model, VOCABULARY, ["a"], **{name: value})


# The tutorial's test mode


@pytest.mark.parametrize("at_once", [256, 3], ids="at_once={}".format)
@pytest.mark.parametrize(
    ("start", "stop"), [(5, 9), (1, 20)], ids=["some", "all"]
)
def test_predicted_words_are_the_likeliest_after_the_true_ones(
    start, stop, at_once, model, rng, monkeypatch
):
    monkeypatch.setattr(generation, "_WORDS_AT_ONCE", at_once)
    ids = rng.integers(8, size=20).astype(np.int32)
    actual, predicted = predict_next_words(
        model, ids.tolist(), start=start, num_words=stop - start
    )
    logits = oracles.language_model(model.get_weights(), ids[np.newaxis])[0]
    np.testing.assert_array_equal(actual, ids[start:stop])
    np.testing.assert_array_equal(
        predicted, logits[start - 1 : stop - 1].argmax(axis=-1)
    )
    assert actual.dtype == predicted.dtype == np.int32


@pytest.mark.parametrize(
    ("start", "num_words"), [(0, 3), (5, 0), (18, 3), (70, 10)]
)
def test_words_outside_the_text_cannot_be_predicted(start, num_words, model):
    with pytest.raises(UserError, match=f"20; received start={start}"):
        predict_next_words(
            model,
            np.zeros(20, np.int32),
            start=start,
            num_words=num_words,
        )
