"""Memory and speed of a text by its length, which is never whole in memory.

    KERAS_BACKEND=torch python benchmarks/large_text.py --tokens 1e6 1e8

Words are drawn by Zipf's law from 50,000. Each length is encoded, then trained
on for some seconds, in a process of its own. Anonymous memory is what a
process holds for itself; the rest is pages of files, which the system takes
back when it needs them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from multilstm.files import write_json

VOCABULARY = 50_000


def write_corpus(folder: Path, num_tokens: int) -> None:
    """Lines of 24 words and their `<eos>`."""
    rng = np.random.default_rng(0)
    frequency = 1 / (np.arange(VOCABULARY) + 10)
    cumulated = np.cumsum(frequency / frequency.sum())
    words = np.array([f"w{number}" for number in range(VOCABULARY)])
    folder.mkdir()
    for split, size in (("train", num_tokens), ("valid", 5000), ("test", 5000)):
        with (folder / f"{split}.txt").open("w") as file:
            if split == "train":
                file.write(" ".join(words) + "\n")
            for first in range(0, size, 25 * 40_000):
                lines = min(40_000, -(-(size - first) // 25))
                drawn = np.searchsorted(cumulated, rng.random((lines, 24)))
                drawn = words[drawn.clip(0, VOCABULARY - 1)]
                file.writelines(" ".join(line) + "\n" for line in drawn)


def memory_mb() -> dict[str, float]:
    """Of this process: the peak, and what of it is now whose."""
    status = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile"):
            status[name] = round(int(value.split()[0]) / 1e3, 1)
    return status


def encode(folder: Path) -> dict[str, object]:
    """Reads a corpus for the first time."""
    from multilstm import load_corpus

    before = memory_mb()
    began = time.perf_counter()
    corpus = load_corpus(folder)
    seconds = time.perf_counter() - began
    return {
        "tokens": len(corpus.train),
        "words": len(corpus.vocabulary),
        "encode_seconds": round(seconds, 1),
        "encode_tokens_per_second": round(len(corpus.train) / seconds),
        "before": before,
        "after": memory_mb(),
    }


def train(folder: Path, seconds: float) -> dict[str, object]:
    """Trains for some seconds; the first ones, which compile, do not count."""
    import keras

    from multilstm import LanguageModel, load_corpus
    from multilstm.dataset import ContinuousStreams
    from multilstm.optimizers import SGD

    corpus = load_corpus(folder)
    streams = ContinuousStreams(corpus.train, 20, 20, drop_remainder=True)
    model = LanguageModel(
        len(corpus.vocabulary),
        units=200,
        carry_state=True,
        softmax="sampled",
    )
    model.build((20, 20))
    model.compile(SGD(1.0))
    done = []

    class Clock(keras.callbacks.Callback):
        takes_several_batches = True

        def on_train_batch_end(self, batch, logs=None):
            done.append((batch, time.perf_counter()))
            if done[-1][1] - done[0][1] > seconds:
                self.model.stop_training = True

        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    while not done or done[-1][1] - done[0][1] < seconds / 4:
        done.clear()
        model.fit(streams, epochs=1, verbose=0, callbacks=[Clock()])
    half = len(done) // 2
    (first, began), (last, ended) = done[half], done[-1]
    return {
        "tokens": len(corpus.train),
        "steps": last + 1,
        "train_tokens_per_second": round(
            (last - first) * 400 / (ended - began)
        ),
        "memory_mb": memory_mb(),
    }


def main() -> None:
    """Prints a line for each length and process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e6, 1e8])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, folder = options.part
        if part == "encode":
            print(json.dumps(encode(Path(folder))))
        else:
            print(json.dumps(train(Path(folder), options.seconds)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as root:
        environment = os.environ | {"MULTILSTM_CACHE": f"{root}/cache"}
        for tokens in options.tokens:
            folder = Path(root) / f"{tokens:.0f}"
            write_corpus(folder, int(tokens))
            for part in ("encode", "train"):
                command = [sys.executable, __file__, "--part", part, folder]
                command += ["--seconds", options.seconds]
                done = subprocess.run(
                    list(map(str, command)),
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                rows.append({"part": part, **json.loads(done.stdout)})
                print(json.dumps(rows[-1]), flush=True)
    if options.out:
        about = {"schema": "multilstm-large-text-1"}
        about["backend"] = os.environ.get("KERAS_BACKEND", "")
        write_json(options.out, about | {"rows": rows})


if __name__ == "__main__":
    main()
