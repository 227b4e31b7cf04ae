"""Every example in a docstring, on this backend."""

import doctest
import importlib
import pkgutil

import keras
import pytest

import multilstm

_OTHER_BACKENDS = {"jax", "torch", "tensorflow"} - {keras.config.backend()}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(multilstm.__path__, "multilstm.")
    # Such as `ops.jax` and `ops.parallel_jax`.
    if module.name.rpartition(".")[2].rpartition("_")[2] not in _OTHER_BACKENDS
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    if name == "multilstm.ops.triton_torch":
        pytest.importorskip("triton", reason="Triton is for Linux")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_examples_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("layers", "model", "presets", "dataset", "generation"):
        module = importlib.import_module(f"multilstm.{name}")
        assert any(test.examples for test in finder.find(module)), name
