"""A test run is for the one backend that KERAS_BACKEND names."""

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

if not os.environ.get("KERAS_BACKEND"):
    raise pytest.UsageError(
        "The tests are for one backend; KERAS_BACKEND is not set. Set it to "
        "jax, torch or tensorflow, or run nox."
    )

if "PYTEST_XDIST_WORKER" not in os.environ and "--require-gpu" not in sys.argv:
    # The tests are of processors; what they start has this from here.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    # JAX writes what it compiled in place: others would read half of it.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"

import keras
import numpy as np
import tiny_runs
from hypothesis import settings

from multilstm import ops

# The same examples in every run and on every machine.
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None
)
settings.load_profile("same")

# TensorFlow warns when functions of several tests were traced in one process;
# which tests those are depends on the number of processes.
logging.getLogger("tensorflow").addFilter(
    lambda record: "triggered tf.function retracing" not in record.getMessage()
)

# What a launcher, a terminal or a proxy may have left in the environment.
_FROM_OUTSIDE = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "TF_CONFIG", "FORCE_COLOR"),
    *("TTY_COMPATIBLE", "NO_COLOR", "no_proxy"),
    *(name for name in os.environ if name.startswith("KERAS_DISTRIBUTION_")),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail where the backend sees no GPU, instead of testing the CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-gpu") and not ops.has_gpu():
        raise pytest.UsageError(
            f"--require-gpu needs a GPU that {keras.config.backend()} sees; it "
            f"would run on {ops.device_name()}. See: multilstm doctor"
        )


@pytest.fixture(autouse=True)
def fresh_keras() -> Iterator[None]:
    """Keras as a new process has it, seeded; on a GPU float32's products.

    Whatever a test draws without a seed of its own is so the same in every
    run: what passes once does not fail by chance on another machine.
    """
    keras.utils.set_random_seed(20140911)
    with ops.tf32(False):
        yield
    keras.utils.clear_session(free_memory=False)  # which takes long


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty cache folder, so that no test sees what another one cached.

    And an environment in which nothing but the tests has a say.
    """
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MULTILSTM_CACHE", str(folder))
    monkeypatch.setenv("COLUMNS", "80")
    for name in _FROM_OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How float32 is multiplied on a GPU that is pretended.

    `note` keeps it in `seen`; `stop` does so in the place of a function that
    is not to run.
    """
    backend = importlib.import_module(f"multilstm.ops.{keras.config.backend()}")
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    seen: list[object] = []

    def note(*_: object) -> None:
        seen.append(tiny_runs.float32_products())

    def stop(*_: object) -> None:
        note()
        raise KeyboardInterrupt

    return SimpleNamespace(seen=seen, note=note, stop=stop)


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
