"""Ids -> batches, in the two ways in which a text is cut for an LSTM.

`NextWordWindows` cuts windows that know nothing of each other, as the classic
Keras tutorial does. With 13 ids, windows of 3, a step of 3, two rows a batch:

    ids      0 1 2 3 4 5 6 7 8 9 10 11 12
    batch 0  0 1 2 -> 1 2 3      batch 1  6 7  8 -> 7  8  9
             3 4 5 -> 4 5 6               9 10 11 -> 10 11 12

`ContinuousStreams` folds the text into rows, each a stream that goes on from
batch to batch, so that the LSTM's state can be carried (truncated
back-propagation through time):

    row 0    0 1 2 | 3 4 5 |        batch 0: first column of blocks
    row 1    6 7 8 | 9 10 11 |      batch 1: second column

`VariableStreams` cuts the same rows into blocks of varying length.

All are `keras.utils.PyDataset`: batch k is a function of k alone, and arrays
that were handed out are never written again. The tutorial's generator yields
one buffer again and again; with a queue in front of it, it trains on batches
that are overwritten while they wait.

They take Keras's `workers` and `use_multiprocessing`, though a batch of ids
takes microseconds. Processes need `multiprocessing.set_start_method("spawn")`:
frameworks have threads that do not survive a fork. And Keras 3.15 reads ahead
to build a model in `fit` and hands out later what it had read: with workers,
build the model and its loss before (`train_on_batch`), for the text's order.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from multilstm.errors import UserError, check_whole

TokenIds = NDArray[np.int32]


class NextWordWindows(keras.utils.PyDataset):
    """Windows of a text, each with the same window moved by one as target.

    Gives, batch for batch, what the tutorial's `KerasBatchGenerator(data,
    num_steps, batch_size, vocabulary, skip_step)` was meant to give. Row r of
    the endless sequence of rows (row r of batch k is `k * batch_size + r`)
    starts at `(r mod W) * skip_step`, where W is the number of starts with
    `start + sequence_length < len(token_ids)`: the text wraps around.

    Arrays are read-only views of `token_ids` where no row wraps around.

    Args:
        token_ids: int32 array of shape `(num_tokens,)`.
        sequence_length: Length of a window (the tutorial's `num_steps`).
        batch_size: Rows a batch.
        skip_step: From the start of a window to that of the next. Default:
            `sequence_length`, windows side by side.
        one_hot: Size of the vocabulary, for one-hot float32 targets of shape
            `(batch_size, sequence_length, one_hot)`. Default: ids, which
            take 1/10,000 of the memory at a vocabulary of 10,000.
        **kwargs: `workers`, `use_multiprocessing` and `max_queue_size` of
            `keras.utils.PyDataset`.

    Returns (an item):
        `(inputs, targets)`: int32 arrays of shape `(batch_size,
        sequence_length)`. Any index from 0 on has its batch; `len()` is the
        tutorial's steps an epoch, `len(token_ids) // (batch_size *
        skip_step)`, at least 1.

    Raises:
        UserError: If ids or a size are not as above, the text is too short
            for one window and its target, or `one_hot` is not above each id.

    Example:
    >>> windows = NextWordWindows(np.arange(13), 3, 2)
    >>> len(windows)
    2
    >>> inputs, targets = windows[1]
    >>> inputs.tolist(), targets.tolist()
    ([[6, 7, 8], [9, 10, 11]], [[7, 8, 9], [10, 11, 12]])
    """

    def __init__(
        self,
        token_ids: TokenIds,
        sequence_length: int,
        batch_size: int,
        skip_step: int | None = None,
        *,
        one_hot: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.token_ids = _read_only(token_ids)
        sequence_length = check_whole("sequence_length", sequence_length, 1)
        batch_size = check_whole("batch_size", batch_size, 1)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        if skip_step is None:
            skip_step = sequence_length
        self.skip_step = check_whole("skip_step", skip_step, 1)
        if len(self.token_ids) <= sequence_length:
            raise UserError(
                "A window and its next word need more than "
                f"sequence_length={sequence_length} tokens; received "
                f"{len(self.token_ids)}. Use shorter windows or more text."
            )
        self.one_hot = one_hot
        if one_hot is not None:
            _check_one_hot(self.token_ids, one_hot)

    def __len__(self) -> int:
        rows = len(self.token_ids) // self.skip_step
        return max(1, rows // self.batch_size)

    @property
    def is_sliced(self) -> bool:
        """Whether `row_starts` says all: inputs and targets are slices."""
        return self.one_hot is None and _is_read_as(NextWordWindows, self)

    def row_starts(self, index: int) -> TokenIds:
        """Where in the text the rows of a batch begin, shape `(batch_size,)`.

        Of a row from `start` on, the inputs are `sequence_length` ids and the
        targets those one further.
        """
        last_start = len(self.token_ids) - self.sequence_length - 1
        num_starts = last_start // self.skip_step + 1
        rows = _index(index) * self.batch_size + np.arange(self.batch_size)
        return (rows % num_starts * self.skip_step).astype(np.int32)

    def __getitem__(self, index: int) -> tuple[TokenIds, NDArray[Any]]:
        windows = sliding_window_view(self.token_ids, self.sequence_length + 1)[
            :: self.skip_step
        ]  # (windows, sequence_length + 1)
        first = _index(index) * self.batch_size % len(windows)
        last = first + self.batch_size
        if last <= len(windows):
            rows = windows[first:last]
        else:
            rows = windows[np.arange(first, last) % len(windows)]
            rows.flags.writeable = False
        inputs, targets = rows[:, :-1], rows[:, 1:]
        if self.one_hot is None:
            return inputs, targets
        one_hot = np.zeros((*targets.shape, self.one_hot), np.float32)
        np.put_along_axis(one_hot, targets[..., np.newaxis], 1, axis=-1)
        return inputs, one_hot


class ContinuousStreams(keras.utils.PyDataset):
    """Rows of text that go on from batch to batch, for a carried state.

    Row r of batch k+1 begins where row r of batch k ended. Feed them in
    order: `fit(..., shuffle=False)`, which `LanguageModel` sees to itself.

    Args:
        token_ids: int32 array of shape `(num_tokens,)`.
        sequence_length: Steps through which errors are propagated back
            (`num_steps`, the BPTT length).
        batch_size: Number of rows.
        drop_remainder: Whether to leave out the few tokens at the end that
            do not fill a whole batch, as is usual in training; items are
            then `(inputs, targets)`. By default every token but the first
            is a target exactly once: items are `(inputs, targets,
            sample_weight)`, with weight 0 where a row has no more text.
        **kwargs: `workers`, `use_multiprocessing` and `max_queue_size` of
            `keras.utils.PyDataset`.

    Returns (an item):
        `inputs` and `targets`: int32 arrays of shape `(batch_size,
        sequence_length)`; `sample_weight`: float32 of the same shape.

    Raises:
        UserError: If ids or a size are not as above, or the text is too
            short for one batch.

    Example:
    >>> streams = ContinuousStreams(np.arange(13), 3, 2, drop_remainder=True)
    >>> [inputs.tolist() for inputs, targets in streams]
    [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
    >>> streams[1][1].tolist()
    [[4, 5, 6], [10, 11, 12]]
    """

    def __init__(
        self,
        token_ids: TokenIds,
        sequence_length: int,
        batch_size: int,
        *,
        drop_remainder: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.token_ids = _read_only(token_ids)
        sequence_length = check_whole("sequence_length", sequence_length, 1)
        batch_size = check_whole("batch_size", batch_size, 1)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.drop_remainder = drop_remainder
        num_targets = len(self.token_ids) - 1
        needed = sequence_length * batch_size if drop_remainder else 1
        if num_targets < needed:
            raise UserError(
                f"batch_size={batch_size} rows of sequence_length="
                f"{sequence_length} need at least {needed + 1} tokens; "
                f"received {len(self.token_ids)}. Use fewer or shorter rows, "
                "or more text."
            )
        if drop_remainder:
            self.row_length = num_targets // batch_size
        else:
            self.row_length = -(-num_targets // batch_size)

    def __len__(self) -> int:
        if self.drop_remainder:
            return self.row_length // self.sequence_length
        return -(-self.row_length // self.sequence_length)

    @property
    def is_sliced(self) -> bool:
        """Whether `row_starts` says all: inputs and targets are slices."""
        return self.drop_remainder and _is_read_as(ContinuousStreams, self)

    def row_starts(self, index: int) -> TokenIds:
        """Where in the text the rows of a batch begin, shape `(batch_size,)`.

        Of a row from `start` on, the inputs are `sequence_length` ids and the
        targets those one further.
        """
        first = _index(index) * self.sequence_length
        rows = np.arange(self.batch_size) * self.row_length
        return (rows + first).astype(np.int32)

    def __getitem__(self, index: int) -> tuple[NDArray[Any], ...]:
        if _index(index) >= len(self):
            raise IndexError(
                f"There are {len(self)} batches; asked for number {index}."
            )
        offset = index * self.sequence_length
        shape = (self.batch_size, self.row_length)
        if self.drop_remainder:
            size = shape[0] * shape[1]
            columns = slice(offset, offset + self.sequence_length)
            return (
                self.token_ids[:size].reshape(shape)[:, columns],
                self.token_ids[1 : size + 1].reshape(shape)[:, columns],
            )
        column = offset + np.arange(self.sequence_length)
        row_start = self.row_length * np.arange(self.batch_size)[:, np.newaxis]
        position = row_start + column  # (batch_size, sequence_length)
        last = len(self.token_ids) - 2  # the last token with a next one
        exists = (column < self.row_length) & (position <= last)
        position = np.minimum(position, last)
        return (
            self.token_ids[position],
            self.token_ids[position + 1],
            exists.astype(np.float32),
        )


class VariableStreams(keras.utils.PyDataset):
    """`ContinuousStreams` for training, its batches of varying length.

    So that words do not stand at the same place of a batch in every epoch.
    Each length is drawn: normal around `sequence_length`, or around half of
    it, then rounded to a multiple of `bucket`. So there are only a dozen
    lengths, and a backend that compiles does so only a dozen times.
    `LanguageModel.fit` makes the learning rate of each batch proportional to
    its length, as the loss is a mean over it.

    Args:
        token_ids: int32 array of shape `(num_tokens,)`.
        sequence_length: Usual steps of back-propagation (`bptt`).
        batch_size: Number of rows.
        std: Standard deviation of the lengths, in steps.
        half_share: Of the batches, those around half the length, in 0..1.
        bucket: Lengths are multiples of it, or of `sequence_length` where
            that is less; tokens at the end of the rows that do not fill one
            are left out.
        rotates_rows: Whether each row begins at a place of its own, drawn
            too, and comes to its own beginning after its end (Press, 2019,
            arXiv:1903.04167). So other words are together in a batch in each
            epoch. Every target is the word that follows in the text.
        seed: For lengths and places, one number or several: take another
            one for every epoch.
        **kwargs: `workers`, `use_multiprocessing` and `max_queue_size` of
            `keras.utils.PyDataset`.

    Returns (an item):
        `(inputs, targets)`: int32 arrays of shape `(batch_size, lengths[k])`.

    Raises:
        UserError: If ids or a size are not as above, or the text is too
            short for one batch.

    Reference:
        Merity et al., 2018, arXiv:1708.02182, section 4.1.

    Example:
    >>> streams = VariableStreams(np.arange(101), 20, 2, std=5.0)
    >>> streams.lengths.tolist()
    [20, 10, 10, 5, 5]
    >>> [inputs[:, 0].tolist() for inputs, targets in streams]
    [[0, 50], [20, 70], [30, 80], [40, 90], [45, 95]]
    """

    is_sliced = False
    varies = True

    def __init__(
        self,
        token_ids: TokenIds,
        sequence_length: int,
        batch_size: int,
        *,
        std: float = 5.0,
        half_share: float = 0.05,
        bucket: int = 5,
        rotates_rows: bool = False,
        seed: int | Sequence[int] = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.token_ids = _read_only(token_ids)
        sequence_length = check_whole("sequence_length", sequence_length, 1)
        batch_size = check_whole("batch_size", batch_size, 1)
        self.sequence_length, self.batch_size = sequence_length, batch_size
        bucket = min(check_whole("bucket", bucket, 1), sequence_length)
        if not (0 <= std < math.inf and 0 <= half_share <= 1):
            raise UserError(
                "`std` must be 0 or more and `half_share` from 0 to 1; "
                f"received {std} and {half_share}."
            )
        self.row_length = (len(self.token_ids) - 1) // batch_size
        if self.row_length < bucket:
            raise UserError(
                f"batch_size={batch_size} rows of {bucket} steps need at least "
                f"{batch_size * bucket + 1} tokens; received "
                f"{len(self.token_ids)}. Use fewer rows or more text."
            )
        generator = np.random.default_rng(seed)
        self.lengths = _draw_lengths(
            generator,
            self.row_length // bucket * bucket,
            sequence_length,
            std=std,
            half_share=half_share,
            bucket=bucket,
        )
        self._firsts = np.cumsum(self.lengths) - self.lengths
        self._beginnings = np.zeros((batch_size, 1), np.int64)
        if rotates_rows:
            size = self._beginnings.shape
            self._beginnings = generator.integers(self.row_length, size=size)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[TokenIds, TokenIds]:
        if _index(index) >= len(self):
            raise IndexError(
                f"There are {len(self)} batches; asked for number {index}."
            )
        columns = self._beginnings + self._firsts[index]
        columns = columns + np.arange(self.lengths[index])
        row_start = np.arange(self.batch_size)[:, np.newaxis] * self.row_length
        position = row_start + columns % self.row_length
        return self.token_ids[position], self.token_ids[position + 1]


def _draw_lengths(
    generator: np.random.Generator,
    total: int,
    usual: int,
    *,
    std: float,
    half_share: float,
    bucket: int,
) -> NDArray[np.int64]:
    """Multiples of `bucket` that sum to `total`, which is one too."""
    most = total // bucket + 1  # draws, should each be the shortest
    half = generator.random(most) < half_share
    drawn = generator.normal(np.where(half, usual / 2, usual), std)
    buckets = np.rint(drawn / bucket).clip(1, total // bucket)
    lengths = bucket * buckets.astype(np.int64)
    ends = np.cumsum(lengths)
    num_batches = int(np.searchsorted(ends, total)) + 1
    lengths = lengths[:num_batches]
    lengths[-1] -= ends[num_batches - 1] - total
    return lengths


def _is_read_as(kind: type, batches: Any) -> bool:
    """Whether a subclass of a user's leaves the batches what they are."""
    names = ("__getitem__", "num_batches", "on_epoch_begin", "on_epoch_end")
    return all(
        getattr(type(batches), name) is getattr(kind, name) for name in names
    )


class RowStarts(keras.utils.PyDataset):
    """Only where rows begin, for a model that has the text on its device.

    Args:
        batches: A dataset that `is_sliced`.

    Returns (an item):
        `(row_starts,)`: int32 array of shape `(batch_size,)`.
    """

    is_small = True  # all batches may be held at once

    def __init__(self, batches: Any) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[TokenIds]:
        return (self.batches.row_starts(index),)


class _PartOf(keras.utils.PyDataset):
    """Some of what a dataset of this module has."""

    def __init__(self, batches: Any) -> None:
        super().__init__()
        self.batches = batches
        self.batch_size = batches.batch_size
        self.sequence_length = batches.sequence_length
        self.token_ids = batches.token_ids
        self.is_sliced = batches.is_sliced
        self.varies = getattr(batches, "varies", False)


class LaterBatches(_PartOf):
    """The batches from a certain one on, for an epoch that was begun.

    Args:
        batches: A dataset of this module.
        first: Number of the first batch, counted from 0.
    """

    def __init__(self, batches: Any, first: int) -> None:
        super().__init__(batches)
        self.first = first

    def __len__(self) -> int:
        return len(self.batches) - self.first

    def row_starts(self, index: int) -> TokenIds:
        """As that of the dataset."""
        starts: TokenIds = self.batches.row_starts(self.first + index)
        return starts

    def __getitem__(self, index: int) -> Any:
        return self.batches[self.first + index]


class PartOfRows(_PartOf):
    """Some of the rows of every batch, for one of several devices.

    Args:
        batches: A dataset of this module.
        part: Which part of the rows, counted from 0.
        num_parts: Into how many, of which each has equally many rows.

    Raises:
        UserError: If the rows cannot be divided so.
    """

    def __init__(self, batches: Any, part: int, num_parts: int) -> None:
        super().__init__(batches)
        self.batch_size = part_of_rows(batches.batch_size, num_parts)
        self.rows = slice(part * self.batch_size, (part + 1) * self.batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def row_starts(self, index: int) -> TokenIds:
        """As that of the dataset."""
        starts: TokenIds = self.batches.row_starts(index)[self.rows]
        return starts

    def __getitem__(self, index: int) -> tuple[NDArray[Any], ...]:
        return tuple(array[self.rows] for array in self.batches[index])


def part_of_rows(batch_size: int, num_parts: int) -> int:
    """How many of a batch's rows each device has.

    Raises:
        UserError: If they cannot be divided equally.
    """
    if batch_size % num_parts:
        raise UserError(
            f"The rows of a batch must be equally many on {num_parts} devices; "
            f"there are {batch_size}. Give --devices a number that divides "
            f"{batch_size}, or a new run a --batch-size that {num_parts} "
            "divides."
        )
    return batch_size // num_parts


def _read_only(token_ids: TokenIds) -> TokenIds:
    """Checks ids and returns a view that cannot be written through."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            "`token_ids` must be a one-dimensional array of integers; "
            f"received shape {ids.shape} of {ids.dtype}. "
            "Encode words with Vocabulary.encode."
        )
    in_int32 = ids.astype(np.int32, copy=False).view()
    if in_int32.dtype != ids.dtype and not np.array_equal(in_int32, ids):
        raise UserError(
            "`token_ids` must fit int32; received ids from "
            f"{ids.min()} to {ids.max()}. Encode words with Vocabulary.encode."
        )
    in_int32.flags.writeable = False
    return in_int32


def _check_one_hot(token_ids: TokenIds, size: int) -> None:
    check_whole("one_hot", size, 1)
    for token_id in (token_ids.min(), token_ids.max()):
        if not 0 <= token_id < size:
            raise UserError(
                "`one_hot` must be the vocabulary's size, above every id; "
                f"received {size} and a text with the id {token_id}. "
                "Use len(vocabulary)."
            )


def _index(index: int) -> int:
    if index < 0:
        raise IndexError(f"Batches are numbered from 0; asked for {index}.")
    return index
