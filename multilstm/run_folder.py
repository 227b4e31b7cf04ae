"""The folder of one training run: what is in it, written whole.

    config.json           what was asked for          vocabulary.json
    history.csv           one row an epoch            curves.png
    checkpoint/last.npz   to go on from: weights, optimizer, carried state,
                          random state, position in the data, history
    checkpoint/previous.npz    the one before, should the last be damaged
    best.weights.h5       the weights with the lowest validation perplexity
    result.json           the figures, when training has ended
    adapted.json          those of `multilstm evaluate --adapt`

No file is ever half-written: each is written under a temporary name and then
renamed. None is a pickle. One process at a time trains here.
"""

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import socket
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import filelock
import h5py
import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from multilstm.errors import UserError, WriteError
from multilstm.files import (
    flush,
    flush_folder,
    read_json,
    read_or_explain,
    remove_leftovers,
    replacing,
    write_json,
    write_text,
)
from multilstm.ops import Devices
from multilstm.presets import CONFIG_SCHEMA
from multilstm.vocabulary import Vocabulary

CHECKPOINT_SCHEMA = "multilstm-checkpoint-2"
RESULT_SCHEMA = "multilstm-result-1"

_CHECKSUM = "multilstm_sha256"  # an attribute of the file of weights
_ROOM_OF_H5 = 1 << 16  # bytes besides the weights; 2 KB for each was seen

logger = logging.getLogger(__name__)

History = list[dict[str, float]]
_Kinds = dict[str, tuple[tuple[int, ...], str]]  # shape and kind by name


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: One row for each epoch that is done.
        num_batches: Batches done of the epoch after those.
        seconds: What these batches took.
    """

    history: History = field(default_factory=list)
    num_batches: int = 0
    seconds: float = 0.0


class RunFolder:
    """Paths, and reading and writing of what they hold."""

    def __init__(
        self, path: Path | str, devices: Devices | None = None
    ) -> None:
        self.path = Path(path)
        self.devices = devices or Devices()
        self.config = self.path / "config.json"
        self.vocabulary = self.path / "vocabulary.json"
        self.history = self.path / "history.csv"
        self.curves = self.path / "curves.png"
        self.checkpoint = self.path / "checkpoint" / "last.npz"
        self.previous_checkpoint = self.path / "checkpoint" / "previous.npz"
        self.best_weights = self.path / "best.weights.h5"
        self.result = self.path / "result.json"
        self.adapted = self.path / "adapted.json"
        self.lock = self.path / ".lock"
        self.holder = self.path / ".holder"
        self._identity: tuple[int, int] | None = None  # while it is held
        self._writer: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None  # the last checkpoint

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from training here until the block ends.

        The lock is the system's, which opens it when a process dies.

        Raises:
            UserError: If another process trains here, which is named, or
                the system does not let this one.
        """
        if self.devices.rank:  # the first process holds it for all
            yield
            return
        is_new = not self.path.exists()
        with self._locked():
            status = self.path.stat()
            self._identity = (status.st_dev, status.st_ino)
            # Not of `adapted`, which is written without being held.
            others = (self.path, self.adapted)
            for path in vars(self).values():
                if isinstance(path, Path) and path not in others:
                    remove_leftovers(path)
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            who = f"process {os.getpid()} on {socket.gethostname()}"
            write_text(self.holder, f"{who}, since {now}")
            try:
                yield
            finally:
                self._identity = None
                self.holder.unlink(missing_ok=True)
                if is_new and not self.config.exists():
                    self.lock.unlink(missing_ok=True)
                    with suppress(OSError):  # gone or not empty
                        self.path.rmdir()

    def _locked(self) -> AbstractContextManager[Any]:
        """Makes the folder and takes its lock, or says why that cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return filelock.FileLock(self.lock, timeout=0).acquire()
        except filelock.Timeout as error:
            who = "another process"
            with suppress(OSError):  # it may just have ended
                who = self.holder.read_text()
            raise UserError(
                f"{self.path} is being trained by {who}. Wait for its end, "
                "stop it, or choose another folder with --out."
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.path} must be a folder that can be written to; the "
                f"system says: {error.strerror or error}. Choose another with "
                "--out, or mend its permissions."
            ) from error

    @contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """As `files.replacing`, as long as the folder is the one held.

        One that was removed is not made anew with a part of a run.

        Raises:
            WriteError: If it is not, or the system refuses.
        """
        self._check_still_there()
        try:
            with replacing(path) as temporary:
                yield temporary
        except WriteError:
            self._check_still_there()  # which tells more
            raise

    def _check_still_there(self) -> None:
        if self._identity is None:
            return
        try:
            status = self.path.stat()
            found = (status.st_dev, status.st_ino)
        except OSError:
            found = None
        if found != self._identity or not self.config.exists():
            raise WriteError(
                f"{self.path} must stay while its run goes on; it was removed, "
                "moved or replaced. Nothing more is written to it. If it was "
                "moved, go on with --resume and --out, where it is now."
            )

    def create(self, config: dict[str, Any], vocabulary: Vocabulary) -> None:
        """Starts a run.

        Raises:
            UserError: If the folder has a run already, or what is left of
                one, which stays as it is.
        """
        if self.devices.rank:
            return
        if self.config.exists():
            raise UserError(
                f"{self.path} already holds a run. Continue it with --resume, "
                "or choose another folder with --out."
            )
        trained = (
            *(self.best_weights, self.checkpoint, self.previous_checkpoint),
            self.result,
        )
        for path in trained:
            if path.exists():
                raise UserError(
                    f"{path} is of a run whose {self.config.name} is gone; it "
                    "would be overwritten. Put that file back, or choose "
                    "another folder with --out."
                )
        vocabulary.save(self.vocabulary)
        write_json(self.config, {"schema": CONFIG_SCHEMA, **config})

    def update_config(self, config: dict[str, Any]) -> None:
        """Notes what a run that goes on was asked for, if that is new.

        Where the run came from stays as it was.
        """
        before = self.read_config()
        origin = ("model", "corpus_sha256", "initial_weights_sha256")
        kept = {name: before[name] for name in origin if name in before}
        after = before | config | kept
        after = json.loads(json.dumps(after))  # tuples are lists in a file
        if after != before and not self.devices.rank:
            write_json(self.config, after)

    def read_config(self) -> dict[str, Any]:
        """What the run was asked for.

        Raises:
            UserError: If the folder holds no run.
        """
        if not self.config.exists():
            raise UserError(
                f"{self.path} must be the folder of a run, with a "
                f"{self.config.name}; it is not. Give the folder that "
                "`multilstm train` wrote."
            )
        return read_json(self.config, schema=CONFIG_SCHEMA)

    def write_history(self, history: History) -> None:
        """Writes one CSV row an epoch."""
        if self.devices.rank:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
        self._check_still_there()
        write_text(self.history, text.getvalue())

    def num_epochs_told(self) -> int:
        """How many epochs the history and the best weights tell of."""
        epochs = int(self.describe_best_weights().get("epoch", 0))
        if self.history.exists():
            text = read_or_explain(self.history, self.history.read_text)
            epochs = max(epochs, len(text.splitlines()) - 1)
        return epochs

    def write_curves(self, history: History) -> None:
        """Draws the curves of a history."""
        if self.devices.rank:
            return
        with self.replacing(self.curves) as temporary, catch_warnings():
            # A letter that the font has not is drawn as a box.
            filterwarnings("ignore", "Glyph", UserWarning)
            # Of a dollar Matplotlib would make mathematics.
            name = self.path.name.replace("$", r"\$")
            draw_curves({name: history}).savefig(temporary, dpi=120)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to go on from."""
        return self.checkpoint.exists() or self.previous_checkpoint.exists()

    def save_checkpoint(self, model: Any, reached: Progress) -> None:
        """Writes everything that training goes on from, in one file.

        It is read back before it takes the place of the one before, which
        is kept beside it. Within `writing_behind` this goes on while the
        caller does.

        Raises:
            WriteError: If the system refuses, or the file is not what was
                written. Then the checkpoint before is still there. Within
                `writing_behind` it may be of the checkpoint before this one.
        """
        self.wait_for_checkpoint()
        arrays = self._read_state(model)
        if self.devices.rank:
            return
        about = {
            "schema": CHECKPOINT_SCHEMA,
            "backend": keras.config.backend(),
            **asdict(reached),
        }
        if self._writer is not None:
            # Training goes on, and may write to what a variable showed; what
            # owns its data is a copy already.
            arrays = {
                name: array if array.flags.owndata else array.copy()
                for name, array in arrays.items()
            }
            try:
                self._written = self._writer.submit(
                    self._write_checkpoint, about, arrays
                )
                return
            except RuntimeError as error:  # the interpreter ends, or no thread
                self._writer = None
                logger.warning("Training waits for checkpoints: %s", error)
        self._write_checkpoint(about, arrays)

    @contextmanager
    def writing_behind(self) -> Iterator[None]:
        """Lets checkpoints be written by a thread; its end waits for them."""
        with ThreadPoolExecutor(1, "checkpoint") as self._writer:
            try:
                yield
            except BaseException:
                try:
                    self.wait_for_checkpoint()
                except WriteError as failed:
                    logger.error("%s", failed)  # beside what ended the block
                raise
            finally:
                self._writer = None
            self.wait_for_checkpoint()

    def wait_for_checkpoint(self, *, if_done: bool = False) -> None:
        """Waits until the last one is written, or tells why it is not.

        Args:
            if_done: Not to wait: only to tell, where it is decided.
        """
        written = self._written
        if written is None or (if_done and not written.done()):
            return
        self._written = None
        written.result()

    def _write_checkpoint(
        self, about: dict[str, Any], arrays: dict[str, Any]
    ) -> None:
        text = json.dumps(about | {"sha256": _sha256(about, arrays)})
        with self.replacing(self.checkpoint) as temporary:
            np.savez(temporary, about=text, **arrays)
            try:
                read_or_explain(temporary, lambda: _read_npz(temporary))
            except UserError as error:
                raise WriteError(
                    f"{self.checkpoint} must read as it was written; it does "
                    f"not ({error}). The one before is kept. Look at the disk."
                ) from error
            if self.checkpoint.exists():
                flush(temporary)
                self.checkpoint.replace(self.previous_checkpoint)

    def _needed(self, state: Mapping[str, Any]) -> _Kinds:
        """What a checkpoint must hold: the rows of all devices."""
        needed = {name: _shape_and_kind(v) for name, v in state.items()}
        for name, variable in state.items():
            if getattr(variable, "is_carried_state", False):
                (rows, *rest), kind = needed[name]
                needed[name] = (rows * self.devices.num_parts, *rest), kind
        return needed

    def _read_state(self, model: Any) -> dict[str, Any]:
        """The state of all devices, as one would have it."""
        arrays: dict[str, Any] = {}
        for name, variable in _state_of(model).items():
            if getattr(variable, "is_carried_state", False):
                array = self.devices.all_rows(variable)
            elif name.startswith("metrics/"):
                array = self.devices.whole_sum(variable).astype(variable.dtype)
            else:
                array = keras.ops.convert_to_numpy(variable)
            arrays[name] = np.asarray(array)
        return arrays

    def _assign_state(
        self, state: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> None:
        for name, variable in state.items():
            array = arrays[name]
            if getattr(variable, "is_carried_state", False):
                self.devices.assign_rows(variable, array)
            elif name.startswith("metrics/"):
                self.devices.assign_sum(variable, array)
            else:
                variable.assign(array)

    def save_best_weights(
        self, model: Any, epoch: int, valid_perplexity: float
    ) -> None:
        """Writes a model's weights, as Keras does, with their checksum.

        And what they are, since a run that is killed before its checkpoint
        has no such epoch in its history.
        """
        if self.devices.rank:
            return
        with (
            self.replacing(self.best_weights) as temporary,
            _telling_errors_of_h5py(),
        ):
            _find_room(temporary, 4 * model.count_params() + _ROOM_OF_H5)
            model.save_weights(temporary, overwrite=True)
            with h5py.File(temporary, "r+") as file:
                file.attrs[_CHECKSUM] = _sha256_of_h5(file)
                file.attrs["epoch"] = epoch
                file.attrs["valid_perplexity"] = valid_perplexity

    def describe_best_weights(self) -> dict[str, float]:
        """Epoch and validation perplexity of what `save_best_weights` wrote.

        Empty where it has written nothing yet.

        Raises:
            UserError: If the file is broken.
        """
        if not self.best_weights.exists():
            return {}

        def read() -> dict[str, float]:
            with h5py.File(self.best_weights) as file:
                return {
                    "epoch": int(file.attrs["epoch"]),
                    "valid_perplexity": float(file.attrs["valid_perplexity"]),
                }

        about: dict[str, float] = read_or_explain(self.best_weights, read)
        return about

    def check_best_weights(self) -> None:
        """Reads all of what `save_best_weights` wrote.

        Raises:
            UserError: If the file is broken, or links to others.
        """
        path = self.best_weights

        def check() -> None:
            with h5py.File(path) as file:
                sha256 = file.attrs.get(_CHECKSUM)
                if sha256 is None:
                    raise ValueError("it has no checksum")
                if sha256 != _sha256_of_h5(file):
                    raise ValueError("its checksum is not that of its content")

        read_or_explain(path, check)

    def load_best_weights(self, model: Any) -> None:
        """Reads what `save_best_weights` wrote, into a model that is built.

        Raises:
            UserError: If the file is broken, links to others, or holds other
                weights than this model has.
        """
        path = self.best_weights
        self.check_best_weights()
        try:
            model.load_weights(path)
        except (OSError, ValueError, KeyError) as error:
            reason = next(iter(str(error).splitlines()), repr(error))
            raise UserError(
                f"{path} must hold the weights of this run's model; it holds "
                f"others: {reason} Both must come from one run."
            ) from error

    def load_checkpoint(self, model: Any) -> Progress:
        """Brings a compiled model back to where it was, and tells how far.

        Where the last checkpoint is damaged the one before is taken, and a
        warning says so.

        Raises:
            UserError: If there is none, both are damaged, or what there is
                is the state of another model.
        """
        last, previous = self.checkpoint, self.previous_checkpoint
        state = _state_of(model)
        if not last.exists() and previous.exists():
            last = previous  # the process was ended between two renames
        try:
            about, arrays = _read_checkpoint(last, self._needed(state))
        except _DamagedError as error:
            if last == previous or not previous.exists():
                raise
            about, arrays = _read_checkpoint(previous, self._needed(state))
            damaged = last.with_name("damaged.npz")
            if not self.devices.rank:
                last.replace(damaged)
                flush_folder(last.parent)
            logger.warning(
                "%s It is now %s; going on from the checkpoint before it.",
                error,
                damaged,
            )
        self._assign_state(state, arrays)
        backend = keras.config.backend()
        if about["backend"] != backend:
            logger.warning(
                "The run goes on with %s from a checkpoint of %s: the same to "
                "rounding but for masks of dropout, not bit for bit.",
                backend,
                about["backend"],
            )
        return Progress(
            about["history"], about["num_batches"], about["seconds"]
        )


def draw_curves(histories: dict[str, History]) -> Figure:
    """Draws the perplexity on train and valid by epoch, a colour a run."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, history) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in history]
        for split, style in (("train", "--"), ("valid", "-")):
            axes.plot(
                epochs,
                [row[f"{split}_perplexity"] for row in history],
                style,
                color=f"C{number}",
                marker=".",
                # Matplotlib hides a label that begins with an underscore.
                label=f"{split}, {name}",
            )
    axes.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    return figure


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


class _OtherSchemaError(ValueError):
    """A checkpoint of another version."""


class _DamagedError(UserError):
    """A checkpoint that cannot be read, or is not what was written."""


def _read_checkpoint(
    path: Path, needed: _Kinds
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what is the state of this model, or says why it is not."""
    try:
        about, arrays = read_or_explain(path, lambda: _read_npz(path))
    except UserError as error:
        # Neither is a reason to go back to the one before.
        if isinstance(error.__cause__, OSError | _OtherSchemaError):
            raise
        raise _DamagedError(str(error)) from error
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


def _kind(dtype: np.dtype[Any]) -> str:
    """What backends agree upon: their seeds are not all of one width."""
    return "i" if dtype.kind in "iu" else dtype.kind


def _shape_and_kind(variable: Any) -> tuple[tuple[int, ...], str]:
    return tuple(variable.shape), _kind(np.dtype(variable.dtype))


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


def _sha256_of_h5(file: h5py.File) -> str:
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
