"""Feeds the readers of files what coverage leads to, until the time is up.

    nox -s fuzz                     ten minutes
    nox -s fuzz -- --seconds 60

A file of a stranger's may make a reader say `UserError`, in one line, and
nothing else. What breaks that is written to `crash-*` and becomes a test.
`atheris` mutates bytes and keeps what reaches new lines; it begins with files
as we write them.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

with atheris.instrument_imports(include=["multilstm"]):
    from multilstm import LanguageModel, Vocabulary, corpus
    from multilstm.checkpoint import Progress
    from multilstm.choices import CHOICE_SCHEMA, find_choice, shape_class
    from multilstm.errors import UserError
    from multilstm.report import read_results
    from multilstm.run_folder import RunFolder
    from multilstm.runs import load_run

ROOT = Path(tempfile.mkdtemp(prefix="fuzz-"))
os.environ["MULTILSTM_CACHE"] = str(ROOT / "cache")
HISTORY = [{"epoch": 1, "train_perplexity": 9.0, "valid_perplexity": 8.0}]
WORDS = tuple("abcdefghi")


def make_model() -> LanguageModel:
    model = LanguageModel(len(WORDS), units=2, num_layers=1, carry_state=True)
    model.build((2, 3))
    model.compile("sgd")
    model.optimizer.build(model.trainable_variables)
    return model


MODEL = make_model()
RUN = RunFolder(ROOT / "run")
RUN.create({"model": MODEL.settings, "preset_settings": {}}, Vocabulary(WORDS))
RUN.save_checkpoint(MODEL, Progress(HISTORY))
RUN.save_best_weights(MODEL, 1, 8.0)
CHOICE = ROOT / "cache" / "choices" / "choice.json"
CHOICE.parent.mkdir(parents=True)
SHAPE: dict[str, Any] = {
    "units": [2],
    "embedding_dim": 2,
    "batch_size": 2,
    "sequence_length": 2,
    "vocabulary_size": 2,
    "tied": False,
}
CHOICE.write_text(
    json.dumps(
        {
            "schema": CHOICE_SCHEMA,
            "device": "gpu",
            "driver": None,
            "dtype": "float32",
            "shape": SHAPE,
            "shape_class": shape_class(SHAPE),
            "shape_line": "a shape",
            "backend": "jax",
            "ranking": ["jax"],
            "equal_within_noise": [],
            "tokens_per_second": {"jax": 1.0},
            "made": "2026-01-01",
            "versions": {"jax": {"jax": "1.0"}},
        }
    )
)
TEXT = ROOT / "text.txt"
TEXT.write_bytes("a b\r\ncafé \x85 c\n".encode())
IDS = ROOT / "ids"
for split in corpus.SPLITS:
    IDS.mkdir(exist_ok=True)
    np.save(IDS / f"{split}.npy", np.arange(5, dtype=np.int32))
Vocabulary(WORDS).save(IDS / "vocabulary.json")
RESULT = Path(__file__).parent.parent / (
    "benchmarks/results/bench-tutorial-2core-cpu-1.json"
)
shutil.copy(RESULT, ROOT / "result.json")


def read_ids() -> None:
    """Reads past the checksums, which would refuse whatever was changed."""
    corpus._write_checksums(IDS)
    corpus._read_cache("x", IDS, {})


# What is overwritten, and what then reads it.
READERS = (
    (RUN.vocabulary, lambda: Vocabulary.load(RUN.vocabulary)),
    (RUN.config, lambda: load_run(RUN.path)),
    (RUN.checkpoint, lambda: RUN.load_checkpoint(MODEL)),
    (RUN.best_weights, lambda: load_run(RUN.path)),
    (CHOICE, lambda: find_choice("gpu", "float32", None)),
    (TEXT, lambda: list(corpus.read_words(TEXT))),
    (IDS / "train.npy", read_ids),
    (ROOT / "result.json", lambda: read_results([ROOT / "result.json"])),
)
GOOD = [path.read_bytes() for path, _ in READERS]
outcomes: Counter[str] = Counter()


def try_reader(data: bytes) -> None:
    """The first byte chooses the reader, the rest is its file."""
    if not data:
        return
    number = data[0] % len(READERS)
    path, read = READERS[number]
    path.write_bytes(data[1:])
    try:
        read()
        said = "read"
    except UserError as error:
        if "\n" in str(error):
            raise RuntimeError("It must be one line") from error
        said = "refused"
    finally:
        path.write_bytes(GOOD[number])
    outcomes[f"{path.name} {said}"] += 1


def main() -> None:
    """Runs the fuzzer; its exit status is 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    seeds = ROOT / "seeds"
    seeds.mkdir()
    for number, content in enumerate(GOOD):
        (seeds / str(number)).write_bytes(bytes([number]) + content)
    print(f"Keras {keras.__version__}, {len(READERS)} readers", flush=True)
    end = time.monotonic() + options.seconds

    def try_until_the_end(data: bytes) -> None:
        try_reader(data)
        if time.monotonic() > end:
            print(json.dumps(dict(sorted(outcomes.items())), indent=2))
            print(f"{outcomes.total():,} files, 0 crashes", flush=True)
            shutil.rmtree(ROOT)
            os._exit(0)  # libFuzzer has no end of its own that returns

    atheris.Setup(
        [sys.argv[0], str(seeds), "-max_len=20000", "-rss_limit_mb=4096"],
        try_until_the_end,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
