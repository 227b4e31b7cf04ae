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

import keras
import numpy as np


@pytest.fixture(autouse=True)
def fresh_keras() -> Iterator[None]:
    """Keras without what earlier tests left."""
    yield
    keras.utils.clear_session()


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
