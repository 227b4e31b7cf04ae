"""A test run is for the one backend that KERAS_BACKEND names."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if not os.environ.get("KERAS_BACKEND"):
    raise pytest.UsageError(
        "The tests are for one backend; KERAS_BACKEND is not set. Set it to "
        "jax, torch or tensorflow, or run nox."
    )

if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    # JAX writes what it compiled in place: others would read half of it.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"

import keras
import numpy as np
import tiny_runs


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
    return tiny_runs.write_corpus(tmp_path / "letters")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a preset that trains in a second; `tiny_runs` has others."""
    from multilstm import PRESETS

    for name, preset in tiny_runs.presets().items():
        monkeypatch.setitem(PRESETS, name, preset)
    return "tiny"
