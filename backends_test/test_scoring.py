"""How likely sentences are: each word by NumPy, alone and in a text."""

import keras
import numpy as np
import oracles
import pytest

from multilstm import LanguageModel, Vocabulary, evaluate, score
from multilstm.errors import UserError

WORDS = ["<eos>", "<unk>", "a", "b", "c", "d", "e", "f", "g"]
VOCABULARY = Vocabulary(WORDS)
SENTENCES = ["a b", "g", "", "c c d a f b g e", "b a", "e d c b a"]


@pytest.fixture
def model():
    return LanguageModel(9, units=6, initializer_scale=0.9, seed=1)


def nats_by_numpy(model, text):
    """Of each word of a text that follows `<eos>`, one row, from zeros."""
    ids = VOCABULARY.encode(["<eos>", *text.split()])
    logits = oracles.language_model(model.get_weights(), ids[None, :-1])
    return oracles.negative_log_likelihood(logits[0], ids[1:])


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"batch_size": 1, "sequence_length": 3},
        {"batch_size": 4, "sequence_length": 1},
        {"batch_size": 5, "sequence_length": 2},
    ],
    ids=str,
)
def test_sentences_alone_begin_from_nothing(cut, model):
    scores = score(model, VOCABULARY, SENTENCES, **cut)
    for sentence, got in zip(SENTENCES, scores, strict=True):
        text = f"{sentence} <eos>"
        assert got.words == text.split()
        assert got.unknown_words == []
        expected = nats_by_numpy(model, text)
        # float32 logits against float64.
        np.testing.assert_allclose(got.nats, expected, rtol=1e-5)
        assert got.evaluation.num_tokens == len(got.words)
        np.testing.assert_allclose(
            got.evaluation.total_nats, expected.sum(), rtol=1e-6
        )


def test_running_sentences_are_one_text(model):
    scores = score(model, VOCABULARY, SENTENCES, running=True)
    assert [of.words for of in scores] == [
        [*sentence.split(), "<eos>"] for sentence in SENTENCES
    ]
    expected = nats_by_numpy(model, " <eos> ".join([*SENTENCES, ""]))
    got = np.concatenate([of.nats for of in scores])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    alone = score(model, VOCABULARY, SENTENCES)
    # Read in other rows, so the same to rounding.
    np.testing.assert_allclose(scores[0].nats, alone[0].nats, rtol=1e-5)
    # What the first has left behind is not nothing.
    assert np.abs(scores[1].nats - alone[1].nats).max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"softmax": "adaptive", "cutoffs": [3, 6]},
        {"softmax": "sampled", "num_sampled": 2, "output_dropout": 0.5},
        {"embedding_dim": 5, "tied_embeddings": True, "num_layers": 2},
        {"carry_state": True},
    ],
    ids=str,
)
def test_a_sentence_is_worth_what_evaluation_says(settings):
    model = LanguageModel(9, **{"units": 6, "num_layers": 1} | settings)
    model.build((3, 4))
    ids = VOCABULARY.encode(["<eos>", "a", "c", "c", "<unk>", "g", "<eos>"])
    (got,) = score(model, VOCABULARY, ["a c c nobody g"])
    assert got.unknown_words == ["nobody"]
    # Sums of six numbers in another order, of the same float32.
    np.testing.assert_allclose(
        got.evaluation.total_nats, evaluate(model, ids).total_nats, rtol=1e-6
    )


def test_a_carried_state_stays_as_it_was():
    model = LanguageModel(9, units=6, num_layers=1, carry_state=True)
    model.build((2, 3))
    model(np.ones((2, 3), np.int32))
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    score(model, VOCABULARY, SENTENCES)
    for was, now in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(was, keras.ops.convert_to_numpy(now))


def test_words_may_be_given_split(model):
    (text,), (words,) = (
        score(model, VOCABULARY, [sentence])
        for sentence in ("a b zebra", ["a", "b", "zebra"])
    )
    assert words.words == text.words == ["a", "b", "<unk>", "<eos>"]
    assert words.unknown_words == text.unknown_words == ["zebra"]
    np.testing.assert_array_equal(words.nats, text.nats)


def test_without_unk_a_word_is_refused_or_left_out():
    vocabulary = Vocabulary(["<eos>", "a", "b"])
    model = LanguageModel(3, units=4, num_layers=1)
    with pytest.raises(UserError, match="'zebra'"):
        score(model, vocabulary, ["a zebra b"])
    left_out, without = score(
        model, vocabulary, ["a zebra b", "a b"], unknown="drop"
    )
    assert left_out.words == ["a", "b", "<eos>"]
    assert left_out.unknown_words == ["zebra"]
    np.testing.assert_array_equal(left_out.nats, without.nats)


def test_a_vocabulary_without_the_end_of_a_sentence_is_refused(model):
    vocabulary = Vocabulary("abcdefghi")
    with pytest.raises(UserError, match="'<eos>'"):
        score(model, vocabulary, ["a b"])


def test_one_text_is_not_taken_for_sentences_of_a_letter(model):
    with pytest.raises(UserError, match=r"Put it into a list"):
        score(model, VOCABULARY, "a b c")


def test_a_vocabulary_larger_than_the_models_is_refused(model):
    vocabulary = Vocabulary([*WORDS, "zebra"])
    with pytest.raises(UserError, match="knows 9 words"):
        score(model, vocabulary, ["a", "zebra"])


@pytest.mark.parametrize("running", [False, True])
def test_of_no_sentences_there_are_no_scores(model, running):
    assert score(model, VOCABULARY, [], running=running) == []
