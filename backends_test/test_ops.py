"""The operations against the textbook's equations, on this backend."""

import importlib.util
import os
import subprocess
import sys

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


def test_lstm_and_its_gradients_are_those_of_the_reference(rng):
    """Each gradient of a weighted sum of all outputs, by finite steps."""
    arguments = draw_arguments(rng, 2, 4, 3, 5)
    weights = [
        rng.standard_normal(shape) for shape in ((2, 4, 5), (2, 5), (2, 5))
    ]
    for number, argument in enumerate(arguments):
        direction = rng.standard_normal(argument.shape)
        values = []
        for sign in (-1, 1):
            moved = [array.astype(float) for array in arguments]
            moved[number] = moved[number] + sign * 1e-4 * direction
            outputs = oracles.lstm(*moved)
            values.append(
                sum(
                    np.sum(w * out)
                    for w, out in zip(weights, outputs, strict=True)
                )
            )
        slope = (values[1] - values[0]) / 2e-4
        gradient = gradient_of_sum(arguments, number, weights)
        # float32 gradients; the finite step is exact to 1e-8.
        np.testing.assert_allclose(
            np.sum(gradient * direction), slope, rtol=1e-4, atol=1e-4
        )


def gradient_of_sum(arguments, number, weights):
    """d(sum of weighted outputs)/d(an argument), through a Keras step of 1."""

    class Sum(keras.layers.Layer):
        def build(self, _):
            self.argument = self.add_weight(
                shape=arguments[number].shape, initializer="zeros"
            )

        def call(self, x):
            tensors = [keras.ops.convert_to_tensor(a) for a in arguments]
            tensors[number] = keras.ops.convert_to_tensor(self.argument)
            total = sum(
                keras.ops.sum(keras.ops.cast(w, "float32") * out)
                for w, out in zip(weights, ops.lstm(*tensors), strict=True)
            )
            return keras.ops.reshape(total, (1, 1)) + 0 * x

    model = keras.Sequential([keras.Input((1,), batch_size=1), Sum()])
    model.compile(
        keras.optimizers.SGD(1.0), loss=lambda _, total: keras.ops.sum(total)
    )
    model.set_weights([arguments[number]])
    one = np.ones((1, 1), np.float32)
    model.train_on_batch(one, one)
    return arguments[number] - model.get_weights()[0]


@pytest.mark.skipif(
    importlib.util.find_spec("jax") is None,
    reason="Keras's numpy backend, the one without an implementation of ours, "
    "needs JAX",
)
def test_backend_without_an_implementation_is_told_once():
    code = (
        "import numpy as np; from multilstm import ops;"
        "y, h, c = ops.lstm(*(np.zeros(s, 'float32') for s in "
        "((1, 2, 3), (1, 4), (1, 4), (3, 16), (4, 16), (16,))));"
        "print(ops.LSTM_KERNEL, np.asarray(y).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "multilstm.ops.reference.lstm (1, 2, 4)"
    assert done.stderr.count("nothing made for the backend numpy") == 1
