"""The folder of one training run: what is in it, written whole.

    config.json           what was asked for          vocabulary.json
    history.csv           one row an epoch            curves.png
    checkpoint/last.npz   to go on from: weights, optimizer, carried state,
                          random state, position in the data, history
    checkpoint/previous.npz    that of the epoch's begin (in the first epoch the
                          first that was made), should the last be damaged
    best.weights.h5       the weights with the lowest validation perplexity
    result.json           the figures, when training has ended
    adapted.json          those of `multilstm evaluate --adapt`

No file is ever half-written: each is written under a temporary name and then
renamed. None is a pickle. One process at a time trains here.
"""

import csv
import io
import json
import logging
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import filelock
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from multilstm import checkpoint
from multilstm.checkpoint import History, Progress
from multilstm.config import CONFIG_SCHEMA, read_config
from multilstm.errors import UserError, WriteError
from multilstm.files import (
    flush,
    flush_folder,
    read_or_explain,
    reason_of,
    remove_leftovers,
    replacing,
    write_json,
    write_text,
)
from multilstm.ops import Devices
from multilstm.vocabulary import Vocabulary
from multilstm.weights_file import describe_weights, write_weights

logger = logging.getLogger(__name__)


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
        self._last_ends_epoch = True  # as far as is known

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
                f"system says: {reason_of(error)}. Choose another with "
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
        # First: between the two looks the folder may be moved, and it with it.
        has_config = self.config.exists()
        try:
            status = self.path.stat()
            found = (status.st_dev, status.st_ino)
        except OSError:
            found = None
        if found == self._identity and not has_config:
            raise WriteError(
                f"{self.config} must stay while its run goes on; it is gone. "
                "Nothing more is written. Put it back, and go on with --resume."
            )
        if found != self._identity:
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
            UserError: If the folder holds no run, or a setting is of another
                kind than it can be.
        """
        if not self.config.exists():
            raise UserError(
                f"{self.path} must be the folder of a run, with a "
                f"{self.config.name}; it is not. Give the folder that "
                "`multilstm train` wrote."
            )
        return read_config(self.config)

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
        epochs = int(describe_weights(self.best_weights).get("epoch", 0))
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
            # Names of files need not be UTF-8, and of a dollar Matplotlib would
            # make mathematics.
            name = os.fsencode(self.path.name).decode(errors="replace")
            name = name.replace("$", r"\$")
            draw_curves({name: history}).savefig(temporary, dpi=120)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to go on from."""
        return self.checkpoint.exists() or self.previous_checkpoint.exists()

    def save_checkpoint(self, model: Any, reached: Progress) -> None:
        """Writes everything that training goes on from, in one file.

        It is read back before it takes the place of the one before, which
        is kept beside it if it is of an epoch's end: from a state within an
        epoch training may have gone wrong already. Within `writing_behind`
        this goes on while the caller does.

        Raises:
            WriteError: If the system refuses, or the file is not what was
                written. Then the checkpoint before is still there. Within
                `writing_behind` it may be of the checkpoint before this one.
        """
        self.wait_for_checkpoint()
        arrays = checkpoint.read_state(model, self.devices)
        if self.devices.rank:
            return
        about = checkpoint.describe(reached)
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
        with self.replacing(self.checkpoint) as temporary:
            try:
                checkpoint.write(temporary, about, arrays)
            except UserError as error:
                raise WriteError(
                    f"{self.checkpoint} must read as it was written; it does "
                    f"not ({error}). The one before is kept. Look at the disk."
                ) from error
            keeps = (
                self._last_ends_epoch or not self.previous_checkpoint.exists()
            )
            if self.checkpoint.exists() and keeps:
                flush(temporary)
                self.checkpoint.replace(self.previous_checkpoint)
        self._last_ends_epoch = not about["num_batches"]

    def go_back_to_epoch(self, *, is_first: bool) -> None:
        """Sets the last checkpoint aside, which is within an epoch.

        Args:
            is_first: Whether no epoch was completed: then no other is left.
        """
        if not self.devices.rank:
            last = self.checkpoint
            aside = last.with_name("diverged.npz")
            if last.exists():
                last.replace(aside)
            if is_first:
                self.previous_checkpoint.unlink(missing_ok=True)
            flush_folder(last.parent)
            logger.warning(
                "%s has led to no number twice; it is now %s, and the epoch "
                "begins anew.",
                last,
                aside.name,
            )
        self.devices.meet()

    def load_checkpoint(self, model: Any) -> Progress:
        """Brings a compiled model back to where it was, and tells how far.

        Where the last checkpoint is damaged the one kept beside it is taken,
        and a warning says so.

        Raises:
            UserError: If there is none, both are damaged, or what there is
                is the state of another model.
        """
        last, previous = self.checkpoint, self.previous_checkpoint
        if not last.exists() and previous.exists():
            last = previous  # the process was ended between two renames
        try:
            about, arrays = checkpoint.read(last, model, self.devices)
        except checkpoint.DamagedError as error:
            if last == previous or not previous.exists():
                raise
            about, arrays = checkpoint.read(previous, model, self.devices)
            damaged = last.with_name("damaged.npz")
            if not self.devices.rank:
                last.replace(damaged)
                flush_folder(last.parent)
            logger.warning(
                "%s It is now %s; going on from the one kept beside it.",
                error,
                damaged,
            )
        checkpoint.assign_state(model, arrays, self.devices)
        self._last_ends_epoch = not about["num_batches"]
        return Progress(
            about["history"],
            about["num_batches"],
            about["seconds"],
            about.get("kernel"),
            about["backend"],
        )

    def save_best_weights(
        self, model: Any, epoch: int, valid_perplexity: float
    ) -> None:
        """Writes a model's weights and what they are.

        A run that is killed before its checkpoint has no such epoch in its
        history.
        """
        if self.devices.rank:
            return
        with self.replacing(self.best_weights) as temporary:
            write_weights(
                temporary,
                model,
                epoch=epoch,
                valid_perplexity=valid_perplexity,
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
                # Matplotlib cannot divide an axis that ends above 1e280.
                [min(row[f"{split}_perplexity"], 1e100) for row in history],
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
