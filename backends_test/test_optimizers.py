"""Optimizers with L2 and averages, against the formulas in NumPy."""

import math
import re

import keras
import numpy as np
import pytest

from multilstm import LanguageModel, UserError, ops
from multilstm.optimizers import SGD, Adam

BACKEND = keras.config.backend()
# float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), np.float64)


def run(optimizer, gradients, start):
    """The weight after each step, whether fused or not."""
    variable = keras.Variable(start)
    optimizer.build([variable])
    reached = []
    for gradient in gradients:
        gradient = keras.ops.convert_to_tensor(gradient, "float32")
        optimizer.apply([gradient], [variable])
        reached.append(numpy(variable))
    return reached


@pytest.fixture
def start(rng):
    return rng.standard_normal((3, 2)).astype(np.float32)


@pytest.fixture
def gradients(rng):
    return rng.standard_normal((4, 3, 2))


# On JAX nothing is fused but by XLA.
WAYS = {"keras": False} if BACKEND == "jax" else {"keras": False, "fused": True}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def prepare(request):
    """Leaves an optimizer as it is, or gives it the backend's kernels."""

    def prepare(optimizer):
        if request.param:
            ops.fuse_optimizer(optimizer)
        return optimizer

    return prepare


def test_averaging_may_start_before_the_first_step(start, gradients):
    optimizer = SGD(0.5, averages=True)
    assert not optimizer.has_averages
    with optimizer.averaged_weights():  # none: the weights stay
        pass
    optimizer.start_averaging()
    reached = run(optimizer, gradients, start)
    np.testing.assert_allclose(
        numpy(optimizer.averages_of[0][0]), np.mean(reached, axis=0), **CLOSE
    )
    with pytest.raises(UserError, match="averages=True"):
        SGD(0.5).start_averaging()


def test_sgd_adds_l2_to_the_clipped_gradient(start, gradients, prepare):
    optimizer = prepare(SGD(0.5, global_clipnorm=0.4, l2=0.1))
    weight = start.astype(np.float64)
    for reached, gradient in zip(
        run(optimizer, gradients, start), gradients, strict=True
    ):
        gradient = gradient * min(1, 0.4 / np.linalg.norm(gradient))
        weight = weight - 0.5 * (gradient + 0.1 * weight)
        np.testing.assert_allclose(reached, weight, **CLOSE)


def test_adam_adds_l2_to_the_clipped_gradient(start, gradients, prepare):
    optimizer = prepare(Adam(0.1, global_clipnorm=0.4, l2=0.3, epsilon=1e-8))
    weight, m, v = start.astype(np.float64), 0, 0
    for step, (reached, gradient) in enumerate(
        zip(run(optimizer, gradients, start), gradients, strict=True), 1
    ):
        gradient = gradient * min(1, 0.4 / np.linalg.norm(gradient))
        gradient = gradient + 0.3 * weight
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        unbiased = m / (1 - 0.9**step), v / (1 - 0.999**step)
        weight = weight - 0.1 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        # Of the square root of squares in float32.
        np.testing.assert_allclose(reached, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    ops.has_xla() and keras.config.backend() == "jax",
    reason="XLA fuses it by itself",
)
@pytest.mark.parametrize("make", [SGD, Adam])
def test_optimizers_are_fused(make):
    optimizer = make(0.1, l2=0.1, averages=True)
    ops.fuse_optimizer(optimizer)
    assert "_backend_apply_gradients" in vars(optimizer)


# How much each of three steps counts, by hand: k (k + 1) ... (k + power - 1).
@pytest.mark.parametrize(
    ("power", "shares"), [(0, [1, 1, 1]), (1, [1, 2, 3]), (3, [6, 24, 60])]
)
@pytest.mark.parametrize("make", [SGD, Adam])
def test_average_is_the_mean_of_all_weights_since(
    make, power, shares, start, gradients, prepare
):
    optimizer = prepare(make(0.5, averages=True, averaging_power=power))
    variable = keras.Variable(start)
    optimizer.build([variable])
    reached = []
    for step, gradient in enumerate(gradients):
        if step == 1:
            assert not optimizer.has_averages
            optimizer.start_averaging()
        gradient = keras.ops.convert_to_tensor(gradient, "float32")
        optimizer.apply([gradient], [variable])
        reached.append(numpy(variable))
    assert optimizer.has_averages
    with optimizer.averaged_weights():
        np.testing.assert_allclose(
            numpy(variable),
            np.average(reached[1:], axis=0, weights=shares),
            **CLOSE,
        )
    np.testing.assert_array_equal(numpy(variable), reached[-1])


@pytest.mark.parametrize("make", [SGD, Adam])
def test_averages_of_several_powers_are_those_of_each(
    make, start, gradients, prepare
):
    def run(power):
        optimizer = prepare(make(0.5, averages=True, averaging_power=power))
        variable = keras.Variable(start)
        optimizer.build([variable])
        optimizer.start_averaging()
        for gradient in gradients:
            gradient = keras.ops.convert_to_tensor(gradient, "float32")
            optimizer.apply([gradient], [variable])
        for place in range(len(optimizer.averaging_powers)):
            with optimizer.averaged_weights(place):
                yield numpy(variable)

    both = list(run([1, 3]))
    np.testing.assert_array_equal(both, [*run(1), *run(3)])
    assert (both[0] != both[1]).all()


def test_weights_come_back_after_an_exception(start):
    optimizer = SGD(0.5, averages=True)
    run(optimizer, np.ones((1, 3, 2)), start)
    optimizer.start_averaging()
    [variable] = optimizer._trainable_variables
    optimizer.apply([keras.ops.ones((3, 2))], [variable])
    optimizer.apply([keras.ops.ones((3, 2))], [variable])
    before = numpy(variable)

    def fail():
        with optimizer.averaged_weights():
            assert (numpy(variable) != before).all()
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    np.testing.assert_array_equal(numpy(variable), before)


def test_before_it_averages_the_weights_are_what_is_evaluated(start):
    optimizer = SGD(0.5, averages=True)
    [reached] = run(optimizer, np.ones((1, 3, 2)), start)
    with optimizer.averaged_weights():
        [variable] = optimizer._trainable_variables
        np.testing.assert_array_equal(numpy(variable), reached)


def test_rate_is_another_one_for_a_step(start, prepare):
    optimizer = prepare(SGD(0.5))
    variable = keras.Variable(start)
    optimizer.build([variable])
    with optimizer.rate_times(0.25):
        optimizer.apply([keras.ops.ones((3, 2))], [variable])
    np.testing.assert_allclose(numpy(variable), start - 0.125, **CLOSE)
    assert float(optimizer.learning_rate) == 0.5


def test_accumulated_gradients_make_one_clipped_step(start, gradients):
    """Two batches of two rows give the step of the four rows at once."""
    optimizer = SGD(
        0.5, global_clipnorm=0.4, l2=0.1, gradient_accumulation_steps=2
    )
    reached = run(optimizer, gradients[:2], start)
    np.testing.assert_array_equal(reached[0], start)
    whole = SGD(0.5, global_clipnorm=0.4, l2=0.1)
    [expected] = run(whole, gradients[:2].mean(0, keepdims=True), start)
    np.testing.assert_allclose(reached[1], expected, **CLOSE)


def test_steps_that_only_accumulate_are_not_averaged(start, gradients):
    optimizer = SGD(0.5, averages=True, gradient_accumulation_steps=2)
    variable = keras.Variable(start)
    optimizer.build([variable])
    optimizer.start_averaging()
    reached = []
    for gradient in gradients:
        gradient = keras.ops.convert_to_tensor(gradient, "float32")
        optimizer.apply([gradient], [variable])
        reached.append(numpy(variable))
    assert float(optimizer.num_averaged) == 2
    expected = np.mean([reached[1], reached[3]], axis=0)
    [[average]] = optimizer.averages_of
    np.testing.assert_allclose(numpy(average), expected, **CLOSE)


def test_settings_survive_the_configuration():
    settings = {
        "l2": 0.1,
        "averages": True,
        "averaging_power": [2.0],
        "global_clipnorm": 0.5,
    }
    optimizer = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(SGD(0.25, **settings))
    )
    assert isinstance(optimizer, SGD)
    config = optimizer.get_config()
    assert {name: config[name] for name in settings} == settings


@pytest.mark.parametrize("power", [-1.0, math.nan, [2.0, -1.0]])
def test_power_of_an_average_is_no_less_than_that_of_a_mean(power):
    said = re.escape(f"received {power}")
    with pytest.raises(UserError, match=rf"0, .* or more, .*; {said}"):
        SGD(0.5, averages=True, averaging_power=power)
    with pytest.raises(UserError, match=r"received \[\]"):
        SGD(0.5, averages=True, averaging_power=[])


def test_averages_grow_in_the_step_that_fit_compiles(rng):
    model = LanguageModel(9, units=4)
    model.build((2, 3))
    model.compile(SGD(0.5, averages=True))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.start_averaging()
    reached = []
    for _ in range(3):
        ids = rng.integers(9, size=(2, 3)).astype(np.int32)
        model.train_on_batch(ids, ids)
        reached.append(model.get_weights())
    with model.optimizer.averaged_weights():
        for average, *weights in zip(
            model.get_weights(), *reached, strict=True
        ):
            np.testing.assert_allclose(
                average, np.mean(weights, axis=0), rtol=1e-5, atol=1e-6
            )
