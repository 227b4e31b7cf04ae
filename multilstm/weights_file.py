"""A model's weights as Keras writes them, with what they are and a checksum."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from multilstm.errors import UserError
from multilstm.files import read_or_explain

_CHECKSUM = "multilstm_sha256"  # an attribute of the file
_ROOM_OF_H5 = 1 << 16  # bytes besides the weights; 2 KB for each was seen


def write_weights(
    path: Path, model: Any, *, epoch: int, valid_perplexity: float
) -> None:
    """Writes a model's weights to a file that exists, and what they are.

    Raises:
        OSError: If the system refuses.
    """
    with _telling_errors_of_h5py():
        _find_room(path, 4 * model.count_params() + _ROOM_OF_H5)
        model.save_weights(path, overwrite=True)
        with h5py.File(path, "r+") as file:
            file.attrs[_CHECKSUM] = _sha256_of(file)
            file.attrs["epoch"] = epoch
            file.attrs["valid_perplexity"] = valid_perplexity


def describe_weights(path: Path) -> dict[str, float]:
    """Epoch and validation perplexity of what `write_weights` wrote.

    Empty where it has written nothing yet.

    Raises:
        UserError: If the file is broken.
    """
    if not path.exists():
        return {}

    def read() -> dict[str, float]:
        with h5py.File(path) as file:
            return {
                "epoch": int(file.attrs["epoch"]),
                "valid_perplexity": float(file.attrs["valid_perplexity"]),
            }

    about: dict[str, float] = read_or_explain(path, read)
    return about


def check_weights(path: Path) -> None:
    """Reads all of what `write_weights` wrote.

    Raises:
        UserError: If the file is broken, or links to others.
    """

    def check() -> None:
        with h5py.File(path) as file:
            sha256 = file.attrs.get(_CHECKSUM)
            if sha256 is None:
                raise ValueError("it has no checksum")
            if sha256 != _sha256_of(file):
                raise ValueError("its checksum is not that of its content")

    read_or_explain(path, check)


def load_weights(path: Path, model: Any) -> None:
    """Reads what `write_weights` wrote, into a model that is built.

    Raises:
        UserError: If the file is broken, links to others, or holds other
            weights than this model has.
    """
    check_weights(path)
    try:
        model.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise UserError(
            f"{path} must hold the weights of this run's model; it holds "
            f"others: {reason} Both must come from one run."
        ) from error


def _find_room(path: Path, num_bytes: int) -> None:
    """Lets the system refuse what HDF5 would end the process for.

    Where it is the last bytes of a file that the disk has no room for, HDF5
    fails in its own clearing up, with a segmentation fault among others.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)


@contextmanager
def _telling_errors_of_h5py() -> Iterator[None]:
    """What the system refuses at the end of a file is no OSError there."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"errno = (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


def _sha256_of(file: h5py.File) -> str:
    """The checksum of all arrays of a file, with their names and shapes.

    Only what lies in the file itself is read: no link, no array that is kept
    elsewhere or made from others.
    """
    digest = hashlib.sha256()

    def add(group: h5py.Group) -> None:
        for name in sorted(group):
            link = group.get(name, getlink=True)
            item = group[name] if isinstance(link, h5py.HardLink) else None
            if isinstance(item, h5py.Group):
                add(item)
                continue
            if (
                not isinstance(item, h5py.Dataset)
                or item.external
                or item.is_virtual
                or item.chunks is not None
            ):
                raise ValueError(f"{name!r} in it is no plain array")
            if item.dtype.kind not in "fiub":
                raise ValueError(f"{name!r} in it is not of numbers")
            digest.update(f"{item.name} {item.dtype.str} {item.shape}".encode())
            digest.update(np.ascontiguousarray(item[()]).data)

    add(file)
    return digest.hexdigest()
