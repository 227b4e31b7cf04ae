"""What the classic Keras tutorial's configuration really reaches on PTB.

Its article reports about 40 % training and 20 % validation accuracy; those
who ran it got far less. The suspect is its generator, which yields one pair
of arrays again and again, while `fit_generator` kept ten batches waiting in a
queue. This script trains the same model from the same weights twice:

    whole    every batch is an array of its own
    reused   the tutorial's generator, in a thread behind a queue of ten

and writes, epoch by epoch, loss, perplexity and accuracy as the tutorial
counts them: on windows of 30 words, each from a state of zeros.

    KERAS_BACKEND=jax python benchmarks/tutorial_on_ptb.py whole --epochs 6
"""

import argparse
import json
import math
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np

from multilstm import LanguageModel, NextWordWindows, load_corpus
from multilstm.ops import device_name, last_kernel

STEPS, ROWS = 30, 20


def reuse_one_buffer(ids: np.ndarray, vocabulary_size: int) -> Iterator:
    """One pair of arrays, written again for every batch (the flaw)."""
    inputs = np.zeros((ROWS, STEPS))
    targets = np.zeros((ROWS, STEPS, vocabulary_size))
    one_hot = np.eye(vocabulary_size)
    start = 0
    while True:
        for row in range(ROWS):
            if start + STEPS >= len(ids):
                start = 0
            inputs[row] = ids[start : start + STEPS]
            targets[row] = one_hot[ids[start + 1 : start + STEPS + 1]]
            start += STEPS
        yield inputs, targets


class QueueOfTen:
    """A thread that fills a queue, as `fit_generator` had it.

    What is taken from the queue is copied at that moment, as a session's
    feed was. Rows whose targets are not their inputs moved by one are
    counted, all batches too.
    """

    def __init__(self, batches: Iterator) -> None:
        self.queue: queue.Queue = queue.Queue(maxsize=10)
        self.num_rows = self.num_wrong = 0
        threading.Thread(target=self.fill, args=(batches,), daemon=True).start()

    def fill(self, batches: Iterator) -> None:
        for batch in batches:
            self.queue.put(batch)

    def __iter__(self) -> Iterator:
        while True:
            inputs, targets = self.queue.get()
            inputs = inputs.astype(np.int32)
            targets = targets.argmax(-1).astype(np.int32)
            wrong = (inputs[:, 1:] != targets[:, :-1]).any(axis=1)
            self.num_rows += len(wrong)
            self.num_wrong += int(wrong.sum())
            yield inputs, targets


class Record(keras.callbacks.Callback):
    """Writes the figures after each epoch."""

    def __init__(self, path: Path, mode: str, source: object) -> None:
        super().__init__()
        self.path, self.source = path, source
        self.record = {
            "schema": "multilstm-tutorial-1",
            "mode": mode,
            "backend": keras.config.backend(),
            "device": device_name(),
            "kernel": None,
            "epochs": [],
        }

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = {
            "epoch": epoch + 1,
            "seconds": round(time.perf_counter() - self.began, 1),
            "train_perplexity": math.exp(logs["loss"]),
            "train_accuracy": logs["accuracy"],
            "valid_perplexity": math.exp(logs["val_loss"]),
            "valid_accuracy": logs["val_accuracy"],
        }
        if isinstance(self.source, QueueOfTen):
            row["rows_with_wrong_targets"] = (
                self.source.num_wrong / self.source.num_rows
            )
        self.record["kernel"] = last_kernel()
        self.record["epochs"].append(row)
        self.path.write_text(json.dumps(self.record, indent=2) + "\n")
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["whole", "reused"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    corpus = load_corpus("ptb")
    vocabulary_size = len(corpus.vocabulary)
    model = LanguageModel.from_preset(
        "tutorial", vocabulary_size=vocabulary_size
    )
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    windows = NextWordWindows(corpus.train, STEPS, ROWS)
    source: object = windows
    if options.mode == "reused":
        source = QueueOfTen(reuse_one_buffer(corpus.train, vocabulary_size))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"tutorial-ptb-{options.mode}.json"
    model.fit(
        iter(source) if options.mode == "reused" else windows,
        steps_per_epoch=len(windows),
        epochs=options.epochs,
        validation_data=NextWordWindows(corpus.valid, STEPS, ROWS),
        shuffle=False,
        verbose=0,
        callbacks=[Record(path, options.mode, source)],
    )


if __name__ == "__main__":
    main()
