"""Words <-> ids: sorted by hand, by a naive oracle, and there and back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilstm import Vocabulary
from multilstm.errors import UserError
from multilstm.vocabulary import SCHEMA, name_a_few

ABC = Vocabulary(["a", "b", "c"])
WITH_UNKNOWN = Vocabulary(["a", "<unk>", "b"])
COUNTS = {"a": 5, "b": 3, "c": 2, "d": 1, "e": 1}
TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # what UTF-8 can hold
some_examples = settings(max_examples=50, deadline=None)


@pytest.fixture(autouse=True)
def fresh_keras():
    """Nothing here uses Keras, and clearing it takes 0.1 s a test."""


# Ids


def test_text_in_one_piece_is_not_taken_for_words():
    with pytest.raises(UserError, match=r"received 'a b'. Split it"):
        ABC.encode("a b")


@some_examples
@given(st.lists(st.sampled_from("abcde") | TEXT, min_size=1))
def test_words_are_sorted_by_count_then_by_the_word(words):
    vocabulary = Vocabulary.from_words(words)
    expected = sorted(set(words), key=lambda word: (-words.count(word), word))
    assert list(vocabulary.words) == expected
    assert len(vocabulary) == len(expected)
    ids = vocabulary.encode(words)
    assert ids.dtype == np.int32
    assert ids.tolist() == [expected.index(word) for word in words]
    assert vocabulary.decode(ids) == words


def test_words_may_come_from_an_iterator():
    assert ABC.encode(word for word in "cab").tolist() == [2, 0, 1]


def test_no_words_have_no_ids():
    assert ABC.encode([]).tolist() == ABC.decode([]) == []


def test_a_vocabulary_knows_its_words_alone():
    assert "b" in ABC
    assert "z" not in ABC
    assert "z" not in WITH_UNKNOWN


def test_vocabularies_are_equal_when_their_words_are():
    same = Vocabulary("abc")
    assert same == ABC
    assert {same, ABC, Vocabulary("acb")} == {ABC, Vocabulary("acb")}
    assert Vocabulary("acb") != ABC
    assert ABC != ("a", "b", "c")


# Rare words


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "a b c d e"),
        ({"min_count": 1, "max_size": 5}, "a b c d e"),
        ({"max_size": 9}, "a b c d e"),
        # d and e are <unk>, twice as c is.
        ({"min_count": 2}, "a b <unk> c"),
        ({"min_count": 2, "max_size": 4}, "a b <unk> c"),
        # c, d and e are <unk>, four times.
        ({"max_size": 3}, "a <unk> b"),
        ({"min_count": 2, "max_size": 3}, "a <unk> b"),
        ({"min_count": 6}, "<unk>"),
        ({"max_size": 1}, "<unk>"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_words_left_out_are_counted_as_unk(arguments, expected):
    vocabulary = Vocabulary.from_counts(COUNTS, **arguments)
    assert vocabulary.words == tuple(expected.split())


@pytest.mark.parametrize(
    ("counts", "arguments", "expected"),
    [
        # 2 of the text and 2 of b.
        ({"a": 3, "<unk>": 2, "b": 2}, {"min_count": 3}, "<unk> a"),
        ({"<unk>": 9, "a": 8, "b": 1}, {"min_count": 2}, "<unk> a"),
        ({"<unk>": 9, "a": 8, "b": 1}, {"max_size": 2}, "<unk> a"),
        ({"a": 5, "<unk>": 1}, {"min_count": 2}, "a <unk>"),
        ({"a": 5, "b": 4, "<unk>": 1}, {"max_size": 2}, "<unk> a"),
        ({"a": 5, "b": 4, "<unk>": 1}, {"max_size": 3}, "a b <unk>"),
    ],
)
def test_unk_of_the_text_and_words_left_out_are_one(
    counts, arguments, expected
):
    vocabulary = Vocabulary.from_counts(counts, **arguments)
    assert vocabulary.words == tuple(expected.split())


@pytest.mark.parametrize("name", ["min_count", "max_size"])
@pytest.mark.parametrize("number", [0, -1, 5.5])
def test_counts_and_sizes_below_one_are_refused(name, number):
    message = f"`{name}` must be a whole number, 1 or more; received {number}"
    with pytest.raises(UserError, match=message):
        Vocabulary.from_counts(COUNTS, **{name: number})


# Unknown words


@pytest.mark.parametrize("unknown", ["error", "drop"])
def test_unknown_words_become_unk_where_the_vocabulary_has_it(unknown):
    ids = WITH_UNKNOWN.encode(["z", "b", "y", "<unk>"], unknown)
    assert ids.tolist() == [1, 2, 1, 1]
    assert WITH_UNKNOWN.unknown_id == 1


def test_unknown_words_are_counted_and_the_first_few_named():
    assert ABC.unknown_id is None
    with pytest.raises(UserError) as raised:
        ABC.encode(list("azyzcxwvu"))
    message = str(raised.value)
    assert message.startswith("7 words (6 distinct) are not in the vocabulary")
    assert "'z', 'y', 'x', 'w', 'v', ..." in message
    assert "unknown='drop'" in message


def test_unknown_words_are_left_out_on_request():
    assert ABC.encode(list("zazyc"), "drop").tolist() == [0, 2]
    assert ABC.encode(["z"], "drop").tolist() == []


def test_a_few_words_are_named_whole():
    assert name_a_few("abcde") == "'a', 'b', 'c', 'd', 'e'"
    assert name_a_few("abcdef") == "'a', 'b', 'c', 'd', 'e', ..."


# Errors


def test_a_vocabulary_needs_a_word():
    with pytest.raises(UserError, match="at least one word; received none"):
        Vocabulary([])


def test_repeated_words_are_counted_and_named():
    with pytest.raises(UserError, match=r"2 stand there .*: 'b', 'a'\."):
        Vocabulary("bacabb")


@pytest.mark.parametrize("number", [-1, 3, 2**40])
def test_ids_outside_the_vocabulary_are_refused(number):
    with pytest.raises(UserError, match=rf"in 0\.\.2,.* received '{number}'"):
        ABC.decode([0, number, 2])


# Files


@some_examples
@given(st.lists(TEXT, min_size=1, unique=True))
def test_a_vocabulary_is_loaded_as_it_was_saved(tmp_path_factory, words):
    path = tmp_path_factory.getbasetemp() / "vocabulary.json"
    Vocabulary(words).save(path)
    assert list(Vocabulary.load(path).words) == words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": "other-1", "words": ["a"]}, f"have the schema '{SCHEMA}'"),
        ({"schema": SCHEMA}, "a list of words under 'words'; .* NoneType"),
        ({"schema": SCHEMA, "words": "abc"}, "a list of words .* holds str"),
        ({"schema": SCHEMA, "words": ["a", 1]}, "a list of words"),
        ({"schema": SCHEMA, "words": []}, "at least one word"),
        ({"schema": SCHEMA, "words": ["a", "a"]}, "distinct; 1 stand there"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_named(content, message, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as raised:
        Vocabulary.load(path)
    assert str(path) in str(raised.value)


def test_a_broken_or_missing_file_is_named(tmp_path):
    path = tmp_path / "vocabulary.json"
    with pytest.raises(UserError, match=r"vocabulary\.json is needed"):
        Vocabulary.load(path)
    ABC.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"vocabulary\.json cannot be read"):
        Vocabulary.load(path)
