"""The operations against the textbook's equations, on this backend."""

import importlib

import keras
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilstm import ops

sizes = st.integers(min_value=1, max_value=7)


def run_lstm(*arrays):
    tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
    return [keras.ops.convert_to_numpy(out) for out in ops.lstm(*tensors)]


def draw_arguments(rng, batch, time, features, units):
    shapes = (
        (batch, time, features),
        (batch, units),
        (batch, units),
        (features, 4 * units),
        (units, 4 * units),
        (4 * units,),
    )
    return [rng.normal(0, 0.5, shape).astype(np.float32) for shape in shapes]


@settings(max_examples=20, deadline=None)
@given(
    batch=sizes,
    time=sizes,
    features=sizes,
    units=sizes,
    from_zeros=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_lstm_follows_the_equations_step_by_step(
    batch, time, features, units, from_zeros, seed
):
    rng = np.random.default_rng(seed)
    arguments = draw_arguments(rng, batch, time, features, units)
    if from_zeros:
        arguments[1:3] = [np.zeros_like(state) for state in arguments[1:3]]
    expected = oracles.lstm(*(array.astype(float) for array in arguments))
    for output, truth in zip(run_lstm(*arguments), expected, strict=True):
        # float32 against float64.
        np.testing.assert_allclose(output, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "time", "units"),
    [(1, 1, 1), (2, 7, 33)],
    ids=["units=1", "units=33"],
)
def test_lstm_is_what_keras_computes(rng, batch, time, units):
    x, h0, c0, *weights = draw_arguments(rng, batch, time, 3, units)
    layer = keras.layers.LSTM(units, return_sequences=True, return_state=True)
    layer.build((batch, time, 3))
    layer.set_weights(weights)
    expected = layer(x, initial_state=[h0, c0])
    for output, truth in zip(
        run_lstm(x, h0, c0, *weights), expected, strict=True
    ):
        truth = keras.ops.convert_to_numpy(truth)
        # float32 sums in another order.
        np.testing.assert_allclose(output, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1,), (2, 3), (2, 1, 4)], ids=lambda shape: f"{shape=}"
)
def test_embedding_lookup_takes_rows_for_ids_of_any_shape(rng, shape):
    table = rng.standard_normal((5, 2)).astype(np.float32)
    ids = rng.integers(5, size=shape).astype(np.int32)
    rows = ops.embedding_lookup(
        keras.ops.convert_to_tensor(table), keras.ops.convert_to_tensor(ids)
    )
    # Rows are copied: exact.
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(rows), table[ids])


def test_device_and_kernel_in_use_have_names():
    assert ops.device_name().strip()
    module, _, function = ops.LSTM_KERNEL.rpartition(".")
    assert getattr(importlib.import_module(module), function) is ops.lstm
