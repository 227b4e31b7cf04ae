"""A test run is for the one backend that KERAS_BACKEND names."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

if not os.environ.get("KERAS_BACKEND"):
    raise pytest.UsageError(
        "The tests are for one backend; KERAS_BACKEND is not set. Set it to "
        "jax, torch or tensorflow, or run nox."
    )

import keras
import numpy as np


@pytest.fixture(autouse=True)
def fresh_keras() -> Iterator[None]:
    """Keras without what earlier tests left."""
    yield
    keras.utils.clear_session(free_memory=False)  # which takes long


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty cache folder, so that no test sees what another one cached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MULTILSTM_CACHE", str(folder))
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20140911)


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """A corpus of sentences with a rule: letters go on in their order."""
    generator = np.random.default_rng(5)
    folder = tmp_path / "letters"
    folder.mkdir()
    for split, num_lines in (("train", 120), ("valid", 15), ("test", 10)):
        lines = [
            " ".join("abcdefgh"[(first + i) % 8] for i in range(length))
            for first, length in generator.integers(1, 8, (num_lines, 2))
        ]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a preset that trains in a second, with all that `small` has.

    Three names go with it: `tiny_windows` has no carried state and a step from
    two batches, `tiny_wild` a
    learning rate with which the loss is soon no number, `tiny_awd` all that
    `awd` has and a little more.
    """
    from multilstm import PRESETS

    small = PRESETS["small"]
    changes = {
        "units": 8,
        "embedding_dim": 8,
        "batch_size": 3,
        "sequence_length": 5,
        "learning_rate": 0.03,
        "epochs": 3,
    }
    for name, others in (
        ("tiny", {}),
        (
            "tiny_windows",
            {"carry_state": False, "gradient_accumulation_steps": 2},
        ),
        (
            "tiny_wild",
            {"optimizer": "sgd", "learning_rate": 1e30, "clip_norm": None},
        ),
        (
            "tiny_awd",
            {
                "units": (8, 6),
                "embedding_dim": 5,  # not the last layer's units
                "locked_dropout": True,
                "embedding_dropout": 0.2,
                "weight_dropout": 0.3,
                "activation_regularization": 0.2,
                "temporal_activation_regularization": 0.1,
                "initializer": "torch",
                "sequence_length": 10,
                "length_std": 2.0,
                "half_length_share": 0.2,
                "rotates_rows": True,
                "optimizer": "sgd",
                "learning_rate": 8.0,  # some epoch is worse than the first
                "plateau_factor": 0.5,
                "l2": 1e-5,
                "averaging": "triggered",
                "non_monotone": 0,
            },
        ),
    ):
        preset = replace(small, name=name, **changes | others)
        monkeypatch.setitem(PRESETS, name, preset)
    return "tiny"
