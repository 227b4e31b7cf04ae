"""What a run has reached, kept on the disk while `fit` goes on.

After each epoch validation, history, best weights and a checkpoint; within one
a checkpoint from time to time, and when a person stops the run.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from multilstm.checkpoint import History, Progress
from multilstm.corpus import Corpus
from multilstm.dataset import VariableStreams
from multilstm.errors import UserError
from multilstm.evaluation import Evaluation, Evaluator
from multilstm.launch import was_orphaned
from multilstm.model import LanguageModel
from multilstm.ops import Devices, last_kernel, sync_variables
from multilstm.presets import Preset
from multilstm.run_folder import RunFolder
from multilstm.weights_file import check_weights, describe_weights

logger = logging.getLogger(__name__)

# Where a run has several processes, how often they agree whether to stop.
_BATCHES_BETWEEN_TALKS = 10

_SECONDS_OF_ONE_SIGNAL = 0.5

_SECONDS_BETWEEN_CURVES = 10.0

_WRITTEN_ANEW = (
    "The next epoch writes it anew, better or not; a run that has ended goes "
    "on with more --epochs."
)


class DivergedError(UserError):
    """The loss is no number any more, or no use.

    Attributes:
        learning_rate: The one that was too high, as settings have it.
        asked_to_stop: Whether a person had stopped the run.
        kept: Of the checkpoint that there is, if it is within an epoch, how
            many epochs and batches it is after.
    """

    def __init__(
        self,
        message: str,
        learning_rate: float,
        asked_to_stop: bool,
        kept: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.learning_rate = learning_rate
        self.asked_to_stop = asked_to_stop
        self.kept = kept


class Keeper(keras.callbacks.Callback):
    """Keeps on the disk what a run has reached.

    After each epoch validation, history, best weights and a checkpoint;
    within one a checkpoint from time to time.
    """

    takes_several_batches = True

    def __init__(
        self,
        folder: RunFolder,
        evaluator: Evaluator,
        data: Corpus,
        begun: Progress,
        *,
        plan: Preset,
        patience: int | None,
        until_perplexity: float | None,
        checkpoint_minutes: float,
        ends_at: float,
        refuses_useless: bool = False,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.devices = folder.devices
        self.evaluator = evaluator
        self.data = data
        self.history = begun.history
        self.num_batches = begun.num_batches
        self.seconds = begun.seconds
        self.kept = _describe(begun)  # what the checkpoint holds
        self.kept_batches = begun.num_batches
        self.plan = plan
        self.steps_per_epoch = 0  # of the epoch in hand, see `begin_epoch`
        self.tokens_per_step = 0.0
        self.patience = patience
        self.until_perplexity = until_perplexity
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.ends_at = ends_at  # as `time.monotonic` counts
        # Whether an epoch of no use is to be tried again, or is only told.
        self.refuses_useless, self._told_useless = refuses_useless, False
        self.out_of_time = False
        self._turned = time.monotonic()  # when the epoch in hand began
        self.num_drawn, self.drawn = 0, -math.inf  # epochs in curves, and when
        self.signalled = False  # this process, which may be one of several
        self.asked_to_stop = False  # any of them, as all know
        self._copy: LanguageModel | None = None  # what is saved, made once
        self.kernel = begun.kernel  # of the LSTM that trains
        self._told_kernel = False  # whether it is of this process
        self.best_perplexity = self.devices.from_first(self._read_best())

    def _read_best(self) -> float:
        """The validation perplexity of the best weights on the disk.

        It is infinite where they cannot be used: any epoch is better.
        """
        if self.devices.rank:  # the first process tells the others
            return math.inf
        path = self.folder.best_weights
        if not path.exists():
            if self.history:
                logger.warning("%s is gone. %s", path, _WRITTEN_ANEW)
            return math.inf
        try:
            check_weights(path)
            best = describe_weights(path)
        except UserError as error:
            if getattr(error.__cause__, "errno", None):
                raise  # the system refuses it now; it may be whole
            logger.warning("%s. %s", str(error).rstrip("."), _WRITTEN_ANEW)
            return math.inf
        if best["epoch"] > len(self.history):
            logger.warning(
                "%s is of epoch %d (validation perplexity %.2f), of which the "
                "checkpoint does not know; it is kept until an epoch is "
                "better.",
                path,
                best["epoch"],
                best["valid_perplexity"],
            )
        return best["valid_perplexity"]

    def begin_epoch(self, batches: Any) -> None:
        """Tells what the next epoch is of; all of it, also if it goes on.

        Raises:
            UserError: If it goes on after its end.
        """
        self.steps_per_epoch = len(batches)
        if self.num_batches and self.num_batches >= self.steps_per_epoch:
            raise UserError(
                f"{self.folder.checkpoint} is after {self.kept}, which must "
                f"have more batches; it has {self.steps_per_epoch}. Put back "
                f"what {self.folder.config.name} had of the text and its "
                "batches, `train_tokens` among others."
            )
        self.tokens_per_step = tokens_per_step(batches, self.plan)
        self.tokens_per_epoch = round(len(batches) * self.tokens_per_step)

    @property
    def valid_perplexities(self) -> list[float]:
        """Of the epochs that are done."""
        return [row["valid_perplexity"] for row in self.history]

    @property
    def has_ended(self) -> bool:
        """Whether epochs, patience or what was to be reached are at an end."""
        return len(self.history) >= self.plan.epochs or bool(self.early_end)

    @property
    def early_end(self) -> str:
        """What ends the run before its last epoch, and how to go on.

        Empty where nothing does.
        """
        if not self.history:
            return ""
        is_non_monotone = self.plan.is_non_monotone(self.valid_perplexities)
        if self.plan.stops_non_monotone and is_non_monotone:
            return (
                f"the rule of {self.plan.name}, which stops where validation "
                "is not monotone. Go on in another folder with --starts-from"
            )
        best = best_epoch(self.history)
        wanted = self.until_perplexity
        if wanted is not None and best["valid_perplexity"] <= wanted:
            return (
                f"--until-perplexity {wanted:g}, which was reached. Go on with "
                "a lower one"
            )
        since_best = len(self.history) - best["epoch"]
        if self.patience is not None and since_best >= self.patience:
            return f"--patience {self.patience}. Go on with a higher one"
        return ""

    @property
    def is_to_stop(self) -> bool:
        """Whether this process was told to stop, or has none to obey."""
        return self.signalled or was_orphaned()

    @property
    def interrupted(self) -> bool:
        """Whether a person stopped the run before its end."""
        return self.asked_to_stop and not self.has_ended

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.num_batches:
            # Keras and the reset of carried states began an epoch; this one
            # goes on in its middle.
            load_checkpoint(self.folder, self.model)
        self._first_batch = self._talked = self.num_batches
        self._saved = time.perf_counter()
        self._began = self._saved - self.seconds

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Where several batches are run at once, Keras tells the last one's
        # number, which in an epoch's last group may be too high.
        done = self._first_batch + batch + 1
        self.num_batches = min(done, self.steps_per_epoch)
        is_last = self.num_batches == self.steps_per_epoch
        since_talk = self.num_batches - self._talked
        if self.devices.num_processes > 1 and not (
            is_last or since_talk >= _BATCHES_BETWEEN_TALKS
        ):
            return
        self._talked = self.num_batches
        self.folder.wait_for_checkpoint(if_done=True)
        loss = (logs or {}).get("loss", 0.0)
        since = time.perf_counter() - self._saved
        is_bad, self.asked_to_stop, is_due = self.devices.any(
            not math.isfinite(loss),
            self.is_to_stop,
            since >= self.checkpoint_seconds,
        )
        if is_bad:
            self._stop_without_number(f"batch {self.num_batches}", loss)
        if self.asked_to_stop:
            self.model.stop_training = True
        elif is_due and not is_last:  # else that of the epoch is about to be
            sync_variables(self.model)
            self._save_checkpoint()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if not self._told_kernel:  # not that of validation
            self.kernel, self._told_kernel = last_kernel(), True
        if self.num_batches < self.steps_per_epoch:  # asked to stop
            self._save_checkpoint()
            if math.isinf(self.best_perplexity) and not self.history:
                self._save_best(0, math.inf)
            return
        seconds = time.perf_counter() - self._began
        num_tokens = self.num_batches * self.tokens_per_step
        optimizer = self.model.optimizer
        rate = _number(optimizer.learning_rate)
        powers = optimizer.averaging_powers
        of_each = []
        for place in range(len(powers) if optimizer.has_averages else 1):
            with optimizer.averaged_weights(place):
                of_each.append(self._evaluate())
            if not math.isfinite(of_each[-1]):
                self._stop_without_number("its validation", of_each[-1])
        valid = min(of_each)
        self._check_use(valid)
        place = of_each.index(valid)
        self.folder.wait_for_checkpoint()  # none is two epochs behind
        if valid < self.best_perplexity:
            with optimizer.averaged_weights(place):
                self._save_best(epoch + 1, valid)
        row = {
            "epoch": epoch + 1,
            "train_perplexity": self._train_perplexity(),
            "valid_perplexity": valid,
            "learning_rate": rate,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1),
        }
        if self.plan.averaging != "never":
            row["averaged_steps"] = _number(optimizer.num_averaged)
            if len(powers) > 1:
                row["averaging_power"] = powers[place]
        # For the progress bar; that of fit is of this process alone.
        logs.update(row, perplexity=row["train_perplexity"])
        self.history.append(row)
        self.num_batches, self.seconds = 0, 0.0
        if self.plan.averaging == "triggered" and self.plan.is_non_monotone(
            self.valid_perplexities
        ):
            optimizer.start_averaging()
        self.folder.write_history(self.history)
        self._save_checkpoint()
        self._draw_now_and_then()
        now = time.monotonic()
        # `seconds` has what was done of it before a run went on.
        took, self._turned = max(now - self._turned, seconds), now
        [self.out_of_time] = self.devices.any(
            self._turned + took > self.ends_at
        )
        if self.has_ended or self.out_of_time:
            self.model.stop_training = True

    def _draw_now_and_then(self) -> None:
        """On a GPU an epoch may be shorter than it takes to draw curves."""
        if time.monotonic() - self.drawn >= _SECONDS_BETWEEN_CURVES:
            self.draw()

    def draw(self) -> None:
        """Draws the curves, unless those that there are have all epochs."""
        if self.num_drawn < len(self.history):
            self.folder.write_curves(self.history)
        self.num_drawn, self.drawn = len(self.history), time.monotonic()

    def _train_perplexity(self) -> float:
        """Of the epoch, on all devices.

        Within a device the nats are summed in float32. Its count of tokens
        is not taken: from 2**24 on float32 does not hold every whole number.
        """
        nats = self.devices.whole_sum(self.model.perplexity.nats)
        return Evaluation(float(nats), self.tokens_per_epoch).perplexity

    def _save_checkpoint(self) -> None:
        """Saves a state that can be gone on from, or ends the run.

        The loss tells of numbers that are none only a step later.
        """
        self._saved = time.perf_counter()
        if self.num_batches:
            self.seconds = self._saved - self._began
        for variable in self.model.trainable_variables:
            if not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
                place = f"batch {self.num_batches}"
                self._stop_without_number(place, math.nan)
        reached = Progress(
            self.history, self.num_batches, self.seconds, self.kernel
        )
        self.folder.save_checkpoint(self.model, reached)
        self.kept = _describe(reached)
        self.kept_batches = reached.num_batches

    def _save_best(self, epoch: int, valid_perplexity: float) -> None:
        # Keras would save the optimizer of a model that is compiled too,
        # which is three times the weights for Adam.
        with self.devices.alone():
            if self._copy is None:
                reader = self.evaluator.model
                is_own = reader is self.model
                self._copy = figures_of(self.model) if is_own else reader
            self._copy.set_weights(self.model.get_weights())
            self.folder.save_best_weights(self._copy, epoch, valid_perplexity)
        self.best_perplexity = valid_perplexity

    def _evaluate(self) -> float:
        reader = self.evaluator.model
        if reader is not self.model:
            reader.set_weights(self.model.get_weights())
        with self.devices.alone():
            perplexity = self.evaluator(self.data.valid).perplexity
        return self.devices.from_first(perplexity)

    def keep_start(self, model: LanguageModel) -> None:
        """Keeps the weights of another run that this one begins with.

        They are its best until an epoch is better.
        """
        self.set_model(model)
        start = self._evaluate()
        if start < self.best_perplexity:  # of a first epoch, perhaps
            self._save_best(0, start)

    def _check_use(self, perplexity: float) -> None:
        """Clipped gradients let weights run away for long without a NaN.

        The limit is twice the nats of a guess: some recipes begin above one.
        """
        num_words = len(self.data.vocabulary)
        if perplexity <= num_words**2:
            return
        what = (
            f"Training must lead to less than a guess among {num_words:,} "
            f"words has; the validation perplexity became {perplexity:.3g} in "
            f"epoch {len(self.history) + 1}"
        )
        if self.refuses_useless:
            self._stop_diverged(what)
        if not self._told_useless:
            self._told_useless = True
            logger.warning(
                "%s. Lower the learning rate (--learning-rate, %g here), or "
                "let --retries do so.",
                what,
                self.plan.learning_rate,
            )

    def _stop_without_number(self, place: str, value: float) -> None:
        self._stop_diverged(
            f"The loss must stay a finite number; it became {value} in epoch "
            f"{len(self.history) + 1}, {place}"
        )

    def _stop_diverged(self, what: str) -> None:
        try:
            self.folder.wait_for_checkpoint()  # else it is not as told
        finally:
            self.devices.meet()  # the others, who need not, wait for it too
        kept = "no epoch was completed before"
        if self.kept:
            kept = (
                f"the checkpoint after {self.kept} is kept in "
                f"{self.folder.checkpoint}"
            )
        raise DivergedError(
            f"{what}; {kept}. Lower the learning rate (--learning-rate, "
            f"{self.plan.learning_rate:g} here), also for a run that goes on "
            "with --resume.",
            self.plan.learning_rate,
            self.asked_to_stop,
            (len(self.history), self.kept_batches)
            if self.kept_batches
            else None,
        )


def _number(variable: Any) -> float:
    return float(keras.ops.convert_to_numpy(variable))


def _describe(reached: Progress) -> str:
    """How far a checkpoint is; empty where nothing was done."""
    epochs = len(reached.history)
    if reached.num_batches:
        return f"batch {reached.num_batches} of epoch {epochs + 1}"
    return f"epoch {epochs}" if epochs else ""


def best_epoch(history: History) -> dict[str, float]:
    """The row with the lowest validation perplexity."""
    return min(history, key=lambda row: row["valid_perplexity"])


def load_checkpoint(folder: RunFolder, model: LanguageModel) -> Progress:
    """How far the last checkpoint is, its state put into the model.

    Raises:
        UserError: If processes of one run have read different ones.
    """
    reached = folder.load_checkpoint(model)
    place = len(reached.history), reached.num_batches
    differs = place != tuple(folder.devices.from_first(n) for n in place)
    if any(folder.devices.any(differs)):
        raise UserError(
            "All processes must go on from the same checkpoint; one of them "
            f"read another in {folder.path}. Look at the disk they share."
        )
    spread_seeds(model, folder.devices)
    return reached


def spread_seeds(model: LanguageModel, devices: Devices) -> None:
    """Masks of rows differ on devices; those of weights and words do not."""
    for dropout in model.dropouts:
        if dropout.rate:
            devices.spread_seed(dropout.seed_generator.state)


def figures_of(model: LanguageModel) -> LanguageModel:
    """A copy in float32, for figures and files."""
    return model.copy(dtype="float32", carry_state=False)


def tokens_per_step(batches: Any, plan: Preset) -> float:
    """The mean, where the lengths of batches differ."""
    if isinstance(batches, VariableStreams):
        return float(batches.lengths.mean()) * plan.batch_size
    return plan.tokens_per_step


@contextmanager
def stop_on_interrupt(keeper: Keeper) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends training after the batch in hand.

    A checkpoint is made then. A second one ends it at once, but for one that
    comes with the first: `timeout` and others send it to a process and again
    to its group.
    """
    before: dict[int, Any] = {}
    first = math.inf

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if keeper.signalled and now - first < _SECONDS_OF_ONE_SIGNAL:
            return
        if keeper.signalled:
            signal.signal(number, before[number])
            signal.raise_signal(number)
            return
        first = now
        again = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        logger.warning("Stopping after this batch; %s again: at once", again)
        keeper.signalled = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread, where alone it can be set
        yield
        return
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
