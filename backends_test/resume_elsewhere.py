"""A run that goes on on another backend for each epoch, and on its own.

    nox -s test-faults                  where two test environments are there
    python backends_test/resume_elsewhere.py jax=PYTHON torch=PYTHON

Without dropout, whose masks are each backend's own, the curve is to rounding
that of a run which stayed where it began.
"""

import csv
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny_runs

EPOCHS = 4
# Rounding of float32, grown over 120 steps at the rates of `zaremba_small`.
LARGEST_DIFFERENCE = 1e-3


def train(backend: str, python: str, out: Path, epochs: int) -> None:
    """Goes on until so many epochs are done."""
    command = [
        *(python, "-m", "multilstm", "train", "--preset", "zaremba_small"),
        *("--corpus", str(out.parent / "letters"), "--batch-size", "4"),
        *("--out", str(out), "--epochs", str(epochs), "--resume"),
    ]
    environment = os.environ | {"KERAS_BACKEND": backend}
    subprocess.run(
        command,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def valid_perplexities(out: Path) -> list[float]:
    """Of each epoch."""
    with (out / "history.csv").open() as file:
        return [float(row["valid_perplexity"]) for row in csv.DictReader(file)]


def main() -> None:
    """Prints the largest difference; exits with 1 where it is too large."""
    pythons = dict(argument.split("=", 1) for argument in sys.argv[1:])
    first, *_ = pythons
    with tempfile.TemporaryDirectory() as root:
        tiny_runs.write_corpus(Path(root) / "letters")
        stayed, moved = Path(root) / "stayed", Path(root) / "moved"
        train(first, pythons[first], stayed, EPOCHS)
        for epoch, backend in zip(
            range(EPOCHS), itertools.cycle(pythons), strict=False
        ):
            train(backend, pythons[backend], moved, epoch + 1)
        pairs = list(
            zip(
                valid_perplexities(moved),
                valid_perplexities(stayed),
                strict=True,
            )
        )
    largest = max(abs(new / old - 1) for new, old in pairs)
    print(f"{' -> '.join(pythons)} -> ...: largest difference {largest:.1e}")
    if not largest < LARGEST_DIFFERENCE:
        raise SystemExit(f"The curves must be the same; they are: {pairs}")


if __name__ == "__main__":
    main()
