"""Batches: against the tutorial's rule and a text that is folded by hand."""

import copy
import itertools
import multiprocessing
import pickle
import tracemalloc
from functools import partial

import keras
import numpy as np
import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from multilstm import ContinuousStreams, NextWordWindows, VariableStreams
from multilstm.dataset import RowStarts
from multilstm.errors import UserError

SIZES = {"sequence_length": 3, "batch_size": 2}
WINDOWS = partial(NextWordWindows, **SIZES)
STREAMS = partial(ContinuousStreams, **SIZES)
KINDS = {
    "windows": WINDOWS,
    "windows that wrap": partial(WINDOWS, skip_step=4),
    "one-hot": partial(WINDOWS, one_hot=50),
    "streams": STREAMS,
    "streams, whole batches": partial(STREAMS, drop_remainder=True),
}
a_size = st.integers(1, 8)


def text(num_tokens):
    """Ids that all differ, so that each tells its place."""
    return np.arange(num_tokens, dtype=np.int32) + 5


def assert_equal_batches(got, expected):
    assert len(got) == len(expected)
    for array, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, other)


# Both


@pytest.mark.parametrize("kind", KINDS)
def test_batch_is_a_function_of_its_index(kind, rng):
    dataset = KINDS[kind](text(43))
    kept = [dataset[k] for k in range(len(dataset))]
    assert len(kept) > 4
    expected = copy.deepcopy(kept)
    for k in rng.permutation(np.repeat(np.arange(len(kept)), 2)):
        assert_equal_batches(dataset[k], expected[k])
    for batch, other in zip(kept, expected, strict=True):
        assert_equal_batches(batch, other)


@pytest.mark.parametrize("kind", ["windows", "streams, whole batches"])
def test_batches_are_read_only_views_of_the_ids(kind):
    ids = text(43)
    for array in KINDS[kind](ids)[1]:
        assert np.shares_memory(array, ids)
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0
    ids[0] = 7  # the caller's own array stays as it was


def test_rows_that_wrap_around_are_read_only_too():
    for array in WINDOWS(text(8), skip_step=2)[1]:
        assert array[1, 0] < array[0, 0]
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0


def test_copy_for_another_process_gives_the_same_batches():
    for make in KINDS.values():
        dataset = make(text(43))
        other = pickle.loads(pickle.dumps(dataset))
        assert len(other) == len(dataset)
        for k in range(len(dataset)):
            assert_equal_batches(other[k], dataset[k])


@pytest.fixture
def spawned_processes():
    """Processes without the threads of the framework, which a fork breaks."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def assert_keras_sees_the_batches_in_order(dataset):
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Identity(dtype="int32"),
        ]
    )
    expected = [dataset[k][0] for k in range(len(dataset))]
    np.testing.assert_array_equal(
        model.predict(dataset, verbose=0), np.concatenate(expected)
    )


@pytest.mark.parametrize("kind", ["windows that wrap", "streams"])
def test_threads_give_the_same_batches_in_order(kind):
    dataset = KINDS[kind](text(150), workers=3, max_queue_size=5)
    assert len(dataset) > 15
    assert_keras_sees_the_batches_in_order(dataset)


@pytest.mark.usefixtures("spawned_processes")
def test_processes_give_the_same_batches_in_order():
    assert_keras_sees_the_batches_in_order(
        WINDOWS(text(60), workers=2, use_multiprocessing=True)
    )


def test_negative_numbers_have_no_batch():
    for make in KINDS.values():
        with pytest.raises(IndexError, match="from 0; asked for -1"):
            make(text(43))[-1]


def test_other_things_than_ids_are_refused():
    for ids, received in (
        (np.arange(24.0), r"shape \(24,\) of float64"),
        (np.ones(24, bool), "of bool"),
        (["the", "cat"], "of <U3"),
        (np.ones((4, 6), int), r"shape \(4, 6\)"),
        (np.int32(7), r"shape \(\)"),
        ([], r"shape \(0,\)"),
        ([2**31, *range(20)], "from 0 to 2147483648"),
        ([-(2**31) - 1, *range(20)], "from -2147483649 to 19"),
    ):
        message = rf"`token_ids` must .*; received .*{received}.*Encode"
        for make in (WINDOWS, STREAMS):
            with pytest.raises(UserError, match=message):
                make(ids)


def test_ids_of_other_whole_numbers_become_int32():
    for make in (WINDOWS, STREAMS):
        expected = make(np.arange(24, dtype=np.int32))[1]
        for ids in (np.arange(24), np.arange(24, dtype=">u2"), [*range(24)]):
            batch = make(ids)[1]
            assert_equal_batches(batch, expected)
            assert batch[0].dtype == batch[1].dtype == np.int32


@pytest.mark.parametrize("kind", [NextWordWindows, ContinuousStreams])
def test_sizes_are_whole_numbers_from_1_on(kind):
    names = [*SIZES]
    if kind is NextWordWindows:
        names += ["skip_step", "one_hot"]
    for name in names:
        for size in (0, -1, 2.0, 1.5, True, "3", float("nan")):
            message = f"`{name}` must be a whole number, .* received {size!r}"
            with pytest.raises(UserError, match=message):
                kind(text(43), **SIZES | {name: size})


def test_sizes_may_be_of_numpy():
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    assert_equal_batches(
        NextWordWindows(text(43), **sizes)[1], WINDOWS(text(43))[1]
    )


# NextWordWindows


@settings(max_examples=50, deadline=None)
@given(a_size, a_size, st.none() | st.integers(1, 12), st.integers(1, 40))
@example(3, 2, 2, 10)
@example(3, 2, 3, 10)
@example(3, 2, 7, 10)
@example(3, 5, None, 1)
def test_windows_are_those_the_tutorial_was_meant_to_give(
    sequence_length, batch_size, skip_step, more
):
    ids = text(sequence_length + more)
    windows = NextWordWindows(ids, sequence_length, batch_size, skip_step)
    expected = oracles.tutorial_batches(
        ids.tolist(), sequence_length, batch_size, skip_step or sequence_length
    )
    num_batches = 3 * (len(windows) + len(ids) // batch_size)
    for k, (inputs, targets) in enumerate(
        itertools.islice(expected, num_batches)
    ):
        assert windows[k][0].tolist() == inputs
        assert windows[k][1].tolist() == targets
        assert windows[k][0].dtype == windows[k][1].dtype == np.int32


def test_length_is_the_tutorials_steps_an_epoch():
    for num_tokens, *sizes, expected in (
        # Penn Treebank's train and valid, 929589 // (20 * 30) and so on.
        (929_589, 30, 20, None, 1549),
        (73_760, 30, 20, None, 122),
        (13, 3, 2, None, 2),
        (13, 3, 2, 1, 6),
        (13, 3, 2, 5, 1),
        (13, 3, 2, 12, 1),  # less than a batch
        (4, 3, 20, None, 1),
    ):
        windows = NextWordWindows(text(num_tokens), *sizes)
        assert isinstance(windows, keras.utils.PyDataset)
        assert len(windows) == expected, sizes


def test_one_hot_targets_are_the_ids_marked():
    ids = np.array([4, 0, 3, 3, 1, 4, 2, 0, 1, 2], np.int32)
    windows = WINDOWS(ids, skip_step=2, one_hot=5)
    for k in range(4):
        inputs, targets = WINDOWS(ids, skip_step=2)[k]
        assert_equal_batches(windows[k], (inputs, np.eye(5)[targets]))
        assert windows[k][1].dtype == np.float32


def test_one_hot_targets_take_the_memory_of_a_batch():
    windows = WINDOWS(text(43), one_hot=2000)
    tracemalloc.start()
    try:
        _, targets = windows[0]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * targets.nbytes  # the vocabulary's square is 333 times it


def test_one_hot_must_be_above_every_id():
    for last in (5, -1):
        with pytest.raises(UserError, match=rf"5 .* id {last}\. Use len"):
            WINDOWS([0, 1, 2, 3, last], one_hot=5)


def test_text_must_hold_a_window_and_its_next_word():
    assert WINDOWS(text(4))[0][1].tolist() == [[6, 7, 8], [6, 7, 8]]
    with pytest.raises(UserError, match=r"sequence_length=3 .* received 3\."):
        WINDOWS(text(3))


# ContinuousStreams


def fold(ids, sequence_length, batch_size, drop_remainder):
    """The pairs of neighbours dealt out into rows, and those into blocks."""
    pairs = list(itertools.pairwise(ids))
    length, remainder = divmod(len(pairs), batch_size)
    if remainder and not drop_remainder:
        length += 1
    rows = [pairs[r * length :][:length] for r in range(batch_size)]
    while rows[0]:
        block = [row[:sequence_length] for row in rows]
        if not drop_remainder or len(block[0]) == sequence_length:
            yield block
        rows = [row[sequence_length:] for row in rows]


@settings(max_examples=50, deadline=None)
@given(a_size, a_size, st.integers(2, 90))
@example(3, 2, 13)
@example(3, 2, 14)
@example(2, 8, 4)
def test_text_is_folded_into_rows(sequence_length, batch_size, num_tokens):
    ids = text(num_tokens)
    streams = ContinuousStreams(ids, sequence_length, batch_size)
    blocks = list(fold(ids.tolist(), sequence_length, batch_size, False))
    assert len(streams) == len(blocks)
    for (inputs, targets, weights), block in zip(streams, blocks, strict=True):
        assert weights.dtype == np.float32
        assert inputs.dtype == targets.dtype == np.int32
        assert np.isin(inputs, ids).all()
        assert np.isin(targets, ids).all()
        for r, row in enumerate(block):
            ones = [1.0] * len(row)
            padded = ones + [0.0] * (sequence_length - len(row))
            assert weights[r].tolist() == padded
            inputs_and_targets = zip(inputs[r], targets[r], strict=True)
            assert list(inputs_and_targets)[: len(row)] == row


@settings(max_examples=50, deadline=None)
@given(a_size, a_size, st.integers(1, 70))
@example(3, 2, 7)
def test_whole_batches_leave_the_rest_out(sequence_length, batch_size, more):
    ids = text(sequence_length * batch_size + more)
    streams = ContinuousStreams(
        ids, sequence_length, batch_size, drop_remainder=True
    )
    blocks = list(fold(ids.tolist(), sequence_length, batch_size, True))
    assert len(streams) == len(blocks) > 0
    for (inputs, targets), block in zip(streams, blocks, strict=True):
        np.testing.assert_array_equal(np.stack([inputs, targets], -1), block)
        assert inputs.dtype == targets.dtype == np.int32


@pytest.mark.parametrize(
    "drop_remainder", [False, True], ids="drop_remainder={}".format
)
def test_row_of_next_batch_continues_this_row(drop_remainder):
    streams = STREAMS(text(49), drop_remainder=drop_remainder)
    assert len(streams) == 8
    for now, then in itertools.pairwise(streams):
        np.testing.assert_array_equal(then[0][:, 0], now[1][:, -1])


@settings(max_examples=50, deadline=None)
@given(a_size, a_size, st.integers(2, 90))
def test_every_token_but_the_first_is_a_target_once(
    sequence_length, batch_size, num_tokens
):
    ids = text(num_tokens)
    streams = ContinuousStreams(ids, sequence_length, batch_size)
    targets, weights = (
        np.concatenate([batch[i] for batch in streams], axis=1) for i in (1, 2)
    )  # (batch_size, time), each row from its beginning to its end
    np.testing.assert_array_equal(targets[weights > 0], ids[1:])
    assert weights.sum() == num_tokens - 1


@pytest.mark.parametrize("kind", ["streams", "streams, whole batches"])
def test_streams_end(kind):
    streams = KINDS[kind](text(43))
    assert len(list(streams)) == len(streams) == 7
    for index in (7, 1000):
        with pytest.raises(IndexError, match=f"7 batches; .* {index}"):
            streams[index]


def test_text_must_fill_a_batch():
    whole = STREAMS(text(7), drop_remainder=True)
    assert [inputs.tolist() for inputs, _ in whole] == [[[5, 6, 7], [8, 9, 10]]]
    with pytest.raises(UserError, match=r"at least 7 tokens; received 6\."):
        STREAMS(text(6), drop_remainder=True)
    assert STREAMS(text(2))[0][2].sum() == 1
    with pytest.raises(UserError, match=r"at least 2 tokens; received 1\."):
        STREAMS(text(1))


# Batches by their rows


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(12, 80),
    sequence_length=st.integers(1, 7),
    batch_size=st.integers(1, 4),
    skip_step=st.integers(1, 9),
)
def test_rows_that_begin_where_row_starts_says_are_the_batch(
    num_tokens, sequence_length, batch_size, skip_step
):
    ids = np.arange(num_tokens)
    size = (sequence_length, batch_size)
    found = [NextWordWindows(ids, *size, skip_step)]
    if num_tokens > sequence_length * batch_size:
        found.append(ContinuousStreams(ids, *size, drop_remainder=True))
    for dataset in found:
        assert dataset.is_sliced
        for k in range(len(dataset)):
            starts = dataset.row_starts(k)
            assert starts.dtype == np.int32
            places = starts[:, np.newaxis] + np.arange(sequence_length)
            inputs, targets = dataset[k]
            np.testing.assert_array_equal(ids[places], inputs)
            np.testing.assert_array_equal(ids[places + 1], targets)
            np.testing.assert_array_equal(RowStarts(dataset)[k][0], starts)
        assert len(RowStarts(dataset)) == len(dataset)


def test_batches_that_are_more_than_slices_say_so():
    ids = np.arange(30)
    assert not NextWordWindows(ids, 3, 2, one_hot=30).is_sliced
    assert not ContinuousStreams(ids, 3, 2).is_sliced


# Streams of varying length ---------------------------------------------------


def test_varying_batches_hold_the_rows_of_the_text_in_order():
    ids = text(203)
    streams = VariableStreams(ids, 20, 2, std=6.0, half_share=0.3, seed=[1, 2])
    row_length = 202 // 2  # what fills no bucket of 5 is left out
    for moved, place in ((0, 0), (1, 1)):
        rows = np.concatenate([batch[place] for batch in streams], axis=1)
        for row in range(2):
            first = row * row_length + moved
            np.testing.assert_array_equal(rows[row], ids[first:][:100])
    lengths = [inputs.shape[1] for inputs, _ in streams]
    assert lengths == streams.lengths.tolist()
    assert {length % 5 for length in lengths} == {0}


def test_lengths_have_the_distribution_that_was_asked_for():
    streams = VariableStreams(np.arange(1_000_001), 70, 1)
    lengths = streams.lengths[:-1]
    num = len(lengths)
    is_half = lengths < 52
    # Five standard deviations of the draws; a bucket of 5 adds 25/12.
    assert abs(is_half.mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / num)
    for part, mean in ((~is_half, 70), (is_half, 35)):
        few = part.sum()
        assert abs(lengths[part].mean() - mean) < 5 * 5.2 / np.sqrt(few)
        assert abs(lengths[part].std() - np.sqrt(25 + 25 / 12)) < 5 * 5.2 / (
            np.sqrt(2 * few)
        )
    assert len(set(lengths)) < 20  # that a backend compiles for


def test_lengths_are_those_of_their_seed():
    one, same, other = (
        VariableStreams(np.arange(2001), 20, 2, seed=seed).lengths
        for seed in ([0, 1], [0, 1], [0, 2])
    )
    np.testing.assert_array_equal(one, same)
    assert one.tolist() != other.tolist()


def test_lengths_without_spread_are_one_length():
    streams = VariableStreams(np.arange(86), 20, 1, std=0.0, half_share=0.0)
    assert streams.lengths.tolist() == [20, 20, 20, 20, 5]


def test_rotated_rows_begin_elsewhere_and_end_where_they_began():
    ids = text(203)
    plain = VariableStreams(ids, 20, 2, seed=[1, 2])
    streams = VariableStreams(ids, 20, 2, rotates_rows=True, seed=[1, 2])
    np.testing.assert_array_equal(streams.lengths, plain.lengths)
    inputs, targets = (
        np.concatenate([batch[place] for batch in streams], axis=1)
        for place in range(2)
    )
    np.testing.assert_array_equal(targets, inputs + 1)  # as in the text
    beginnings = inputs[:, 0] - ids[[0, 101]]
    assert beginnings.min() >= 0
    assert beginnings.max() < 101
    assert beginnings[0] != beginnings[1]
    for row in range(2):
        turned = np.roll(ids[row * 101 :][:101], -beginnings[row])
        np.testing.assert_array_equal(inputs[row], turned[:100])
    other = VariableStreams(ids, 20, 2, rotates_rows=True, seed=[1, 3])
    assert (other[0][0][:, 0] != inputs[:, 0]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": -1.0}, "`std` must be 0 or more"),
        ({"std": np.inf}, "`std` must be 0 or more"),
        ({"half_share": 1.5}, "`half_share` from 0 to 1"),
        ({"bucket": 0}, "`bucket` must be a whole number"),
        (
            {"sequence_length": 60, "bucket": 60},
            "need at least 121 tokens; received 101",
        ),
    ],
)
def test_bad_settings_of_varying_lengths_are_told(settings, message):
    sizes = {"sequence_length": 20, "batch_size": 2}
    with pytest.raises(UserError, match=message):
        VariableStreams(np.arange(101), **sizes | settings)


def test_lengths_of_any_spread_are_those_of_some_cut():
    lengths = VariableStreams(np.arange(101), 20, 2, std=1e300).lengths
    assert lengths.sum() == 50
    assert lengths.min() >= 5


def test_there_is_no_batch_after_the_last():
    streams = VariableStreams(np.arange(101), 20, 2)
    with pytest.raises(IndexError, match="There are 5 batches"):
        streams[5]


def test_short_streams_have_the_length_that_they_were_asked_for():
    """And not that of the bucket, with a rate in proportion to it."""
    lengths = VariableStreams(np.arange(101), 3, 2, std=0.0).lengths
    assert set(lengths[:-1]) <= {3}
    lengths = VariableStreams(np.arange(101), 1, 2, std=0.0).lengths
    assert set(lengths) == {1}


@pytest.mark.parametrize("kind", [ContinuousStreams, NextWordWindows])
def test_small_numpy_integers_do_not_overflow(kind):
    text = np.arange(60_000, dtype=np.int32)
    how = {"drop_remainder": True} if kind is ContinuousStreams else {}
    batches = kind(text, np.int16(300), np.int16(150), **how)
    expected = kind(text, 300, 150, **how)
    assert len(batches) == len(expected) >= 1
    for got, wanted in zip(batches[0], expected[0], strict=True):
        np.testing.assert_array_equal(got, wanted)
