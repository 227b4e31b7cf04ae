"""What a person watches while a model trains, and the times behind it."""

import time
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from multilstm.clock import clock

_SECONDS_BETWEEN_UPDATES = 0.25
_EPOCH_SUMMARY = {
    "perplexity": "perplexity train {:.2f}",
    "valid_perplexity": "valid {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class StepTimes(keras.callbacks.Callback):
    """Times training steps, or groups of them that are started at once.

    Keras hands a callback like this one the loss as a number, for which it
    waits: the time from one call to the next is that of the steps between
    them, all of the device's work included.
    """

    takes_several_batches = True

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []  # of each step, a group's mean
        self.first_seconds: list[float] = []  # of those that compile
        self.first_steps = 0
        self._lengths: Any = None
        self._seen: set[int] = set()

    def begin_epoch(self, lengths: Any) -> None:
        """Takes the length of each batch to come; None for one length.

        The first step of each length may be compiled first.
        """
        self._lengths = lengths

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._last = time.perf_counter()
        self._done = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        done = _batches_done(self, batch)
        num_steps = done - self._done
        length = 0 if self._lengths is None else int(self._lengths[done - 1])
        if length not in self._seen:
            self._seen.add(length)
            self.first_seconds.append(now - self._last)
            self.first_steps += num_steps
        else:
            self.seconds += [(now - self._last) / num_steps] * num_steps
        self._last, self._done = now, done

    def summary(self, tokens_per_step: float) -> dict[str, Any]:
        """`tokens_per_second`, `step_time_ms`, `compile_time_seconds`.

        Each is None where too few steps were made to tell it.
        """
        if not self.seconds:
            names = ("tokens_per_second", "step_time_ms")
            return dict.fromkeys((*names, "compile_time_seconds"))
        seconds = np.array(self.seconds)
        median = float(np.median(seconds))
        return {
            "tokens_per_second": round(tokens_per_step / seconds.mean(), 1),
            "step_time_ms": {
                "median": _ms(np.median(seconds)),
                "p20": _ms(np.percentile(seconds, 20)),
                "p80": _ms(np.percentile(seconds, 80)),
                "min": _ms(seconds.min()),
            },
            "compile_time_seconds": round(
                max(0.0, sum(self.first_seconds) - self.first_steps * median), 3
            ),
        }


class ProgressBar(keras.callbacks.Callback):
    """A bar with perplexity, tokens/s and the time left, on stderr.

    Args:
        tokens_per_step: Tokens in a batch.
        epochs: Epochs of the whole run, of which one `fit` may do a part.
    """

    takes_several_batches = True

    def __init__(self, tokens_per_step: int, epochs: int) -> None:
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.epochs = epochs
        self.whole_epoch = 0  # its steps, where it is told
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=30),
            TextColumn("perplexity {task.fields[perplexity]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=Console(stderr=True),
            transient=True,
        )

    def on_train_begin(self, logs: Any = None) -> None:
        self._began = self._shown = time.perf_counter()
        self._steps = 0
        self._progress.start()

    def on_train_end(self, logs: Any = None) -> None:
        self.close()

    def close(self) -> None:
        """Removes the bar, also after an exception ended the training."""
        # Progress.stop() prints an empty line where there is no terminal.
        self._progress.live.stop()
        self._remove_task()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._remove_task()
        self._epoch = epoch
        self._done = 0
        self._task = self._progress.add_task(
            "",
            total=self.params["steps"],
            epoch=f"{epoch + 1}/{self.epochs}",
            perplexity="-",
            speed="-",
            left="-",
        )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        done = _batches_done(self, batch)
        self._steps += done - self._done
        self._done = done
        now = time.perf_counter()
        if now - self._shown < _SECONDS_BETWEEN_UPDATES:
            return
        self._shown = now
        step_seconds = (now - self._began) / self._steps
        # Of those after this one, which may have begun in its middle.
        epochs_left = self.epochs - self._epoch - 1
        steps = self.params["steps"]
        steps_left = steps - done + epochs_left * (self.whole_epoch or steps)
        assert self._task is not None
        self._progress.update(
            self._task,
            completed=done,
            perplexity=f"{(logs or {}).get('perplexity', np.nan):.1f}",
            speed=f"{self.tokens_per_step / step_seconds:,.0f}",
            left=clock(steps_left * step_seconds),
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # An epoch that was stopped in its middle has only the first of these.
        known = [
            text.format(logs[name])
            for name, text in _EPOCH_SUMMARY.items()
            if logs and name in logs
        ]
        self._progress.console.print(
            f"epoch {epoch + 1}/{self.epochs}: {', '.join(known)}",
            highlight=False,
            soft_wrap=True,
        )

    def _remove_task(self) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)


def _batches_done(callback: keras.callbacks.Callback, batch: int) -> int:
    """Batches of an epoch that are done when Keras tells of number `batch`.

    Where several are run at once that is the last one's, which in the last
    group of an epoch may be too high.
    """
    num_batches = (callback.params or {}).get("steps")
    return min(batch + 1, num_batches or batch + 1)


def _ms(seconds: NDArray[Any] | float) -> float:
    return round(float(seconds) * 1000, 3)
