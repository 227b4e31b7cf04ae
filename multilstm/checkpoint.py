"""One file of everything that training goes on from, with its checksum.

Weights, optimizer, carried states, random states and the running loss, each
array under its place's name, and beside them how far the run has come. It is an
npz without pickles, in which a flipped bit is found and no header takes more
memory than the file has.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from multilstm.errors import UserError
from multilstm.files import read_or_explain
from multilstm.ops import Devices

CHECKPOINT_SCHEMA = "multilstm-checkpoint-2"

History = list[dict[str, float]]


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: One row for each epoch that is done.
        num_batches: Batches done of the epoch after those.
        seconds: What these batches took.
        kernel: Of the LSTM that trains.
        backend: Of the checkpoint that this was read from.
    """

    history: History = field(default_factory=list)
    num_batches: int = 0
    seconds: float = 0.0
    kernel: str | None = field(default=None, compare=False)
    backend: str | None = field(default=None, compare=False)


class DamagedError(UserError):
    """A checkpoint that cannot be read, or is not what was written."""


class _OtherSchemaError(ValueError):
    """A checkpoint of another version."""


# Of a model ------------------------------------------------------------------


def _state_of(model: Any) -> dict[str, Any]:
    """Every variable that training goes on from, under its place's name."""
    groups = {
        "model": model.variables,
        "optimizer": model.optimizer.variables,
        "metrics": model.metrics_variables,
    }
    return {
        f"{group}/{number}": variable
        for group, variables in groups.items()
        for number, variable in enumerate(variables)
    }


def _is_carried(variable: Any) -> bool:
    return getattr(variable, "is_carried_state", False)


def read_state(model: Any, devices: Devices) -> dict[str, Any]:
    """The arrays of all devices, as one would have them."""
    arrays: dict[str, Any] = {}
    for name, variable in _state_of(model).items():
        if _is_carried(variable):
            array = devices.all_rows(variable)
        elif name.startswith("metrics/"):
            array = devices.whole_sum(variable).astype(variable.dtype)
        else:
            array = keras.ops.convert_to_numpy(variable)
        arrays[name] = np.asarray(array)
    return arrays


def assign_state(
    model: Any, arrays: Mapping[str, Any], devices: Devices
) -> None:
    """Gives a model what `read_state` read of one like it."""
    for name, variable in _state_of(model).items():
        array = arrays[name]
        if _is_carried(variable):
            devices.assign_rows(variable, array)
        elif name.startswith("metrics/"):
            devices.assign_sum(variable, array)
        else:
            variable.assign(array)


def _kinds_of(
    model: Any, devices: Devices
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind of each array that `read_state` gives."""
    kinds = {}
    for name, variable in _state_of(model).items():
        shape, kind = _shape_and_kind(variable)
        if _is_carried(variable):  # the rows of all devices
            shape = (shape[0] * devices.num_parts, *shape[1:])
        kinds[name] = shape, kind
    return kinds


def _shape_and_kind(variable: Any) -> tuple[tuple[int, ...], str]:
    kind = np.dtype(variable.dtype).kind
    # Of integers backends agree upon no more: seeds are not all of one width.
    return tuple(variable.shape), "i" if kind in "iu" else kind


# In a file -------------------------------------------------------------------


def describe(reached: Progress) -> dict[str, Any]:
    """What stands beside the arrays, but for their checksum."""
    return {
        "schema": CHECKPOINT_SCHEMA,
        **asdict(reached),
        "backend": keras.config.backend(),  # of now
    }


def write(path: Path, about: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Writes a file and reads it back.

    Raises:
        UserError: If it is not what was written.
    """
    text = json.dumps(about | {"sha256": _sha256(about, arrays)})
    np.savez(path, about=text, **arrays)
    read_or_explain(path, lambda: _read_npz(path))


def read(
    path: Path, model: Any, devices: Devices
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what stands beside the arrays, and those: the state of a model.

    Raises:
        DamagedError: If they are not what was written.
        UserError: If they are the state of another model or version, or the
            system does not let them be read.
    """
    try:
        about, arrays = read_or_explain(path, lambda: _read_npz(path))
    except UserError as error:
        # Neither is a reason to go back to the one before.
        if isinstance(error.__cause__, OSError | _OtherSchemaError):
            raise
        raise DamagedError(str(error)) from error
    needed = _kinds_of(model, devices)
    found = {name: _shape_and_kind(array) for name, array in arrays.items()}
    if needed != found:
        differing = sorted(
            name
            for name in needed.keys() | found.keys()
            if needed.get(name) != found.get(name)
        )
        raise UserError(
            f"{path} must hold the state of this model; it differs in "
            f"{', '.join(differing[:3])}. Resume with the settings that "
            "the run was started with."
        )
    return about, arrays


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads arrays only after their headers were found possible.

    A header may claim any size, for which NumPy would take the memory.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _check_header(archive, member)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
        arrays = {name: npz[name] for name in npz.files}
    about = _check_about(json.loads(str(arrays.pop("about"))))
    sha256 = about.pop("sha256")
    if sha256 != _sha256(about, arrays):
        raise ValueError("its checksum is not that of its content")
    return about, arrays


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuses an array that is larger than the file has it."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename!r} is compressed")
    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{member.filename!r} is no array of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename!r} claims too large an array")


def _check_about(about: Any) -> dict[str, Any]:
    """What stands beside the arrays, each of the kind that it must be."""
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != CHECKPOINT_SCHEMA:
        raise _OtherSchemaError(
            f"its schema is {schema!r}, not {CHECKPOINT_SCHEMA!r}"
        )
    kinds = {
        "backend": str,
        "sha256": str,
        "history": list,
        "num_batches": int,
        "seconds": float,
    }
    for name, kind in kinds.items():
        if not isinstance(about.get(name), kind):
            raise ValueError(f"its {name!r} is no {kind.__name__}")
    # Those of before 2026-11-27 do not tell it.
    if not isinstance(about.get("kernel"), str | None):
        raise ValueError("its 'kernel' is no str")
    if about["num_batches"] < 0:
        raise ValueError("its 'num_batches' is below 0")
    for row in about["history"]:
        numbers = row.values() if isinstance(row, dict) else [None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("its history has a row that is not of numbers")
    return dict(about)


def _sha256(about: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
