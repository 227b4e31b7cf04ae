"""The same numbers on every backend: those that NumPy draws."""

import keras
import numpy as np
import pytest

from multilstm.errors import UserError
from multilstm.initializers import NumPyInitializer

# By numpy.random.default_rng alone; the last by hand from it (Gram-Schmidt).
UNIFORM = [[0.02501909, 0.07944276], [0.05513714, -0.05495856]]
GLOROT = [[0.6617075, -0.9505802], [-0.7615519, -0.8329361]]
ORTHOGONAL = [[0.004487308, 0.9999899], [-0.9999899, 0.004487308]]


def draw(shape, kind, **arguments):
    initializer = NumPyInitializer(kind, **arguments)
    return keras.ops.convert_to_numpy(initializer(shape))


def test_one_seed_gives_these_numbers_on_every_backend():
    uniform = draw((2, 2), "uniform", scale=0.1, seed=7)
    glorot = draw((2, 2), "glorot_uniform", seed=[7, 1])
    orthogonal = draw((2, 2), "orthogonal", seed=7)
    # Written to 7 digits.
    np.testing.assert_allclose(uniform, UNIFORM, rtol=1e-6)
    np.testing.assert_allclose(glorot, GLOROT, rtol=1e-6)
    # The QR of another LAPACK may round otherwise.
    np.testing.assert_allclose(orthogonal, ORTHOGONAL, rtol=1e-5)


@pytest.mark.parametrize("scale", [-0.1, 1e308, float("nan")])
def test_scales_that_no_weight_can_have_are_refused(scale):
    with pytest.raises(UserError, match=r"from 0 to 1e\+30; received"):
        NumPyInitializer("uniform", scale=scale)


def test_other_seeds_give_other_numbers():
    first = draw((3,), "uniform", seed=[1, 2])
    assert not np.any(first == draw((3,), "uniform", seed=[1, 3]))
    assert not np.any(first == draw((3,), "uniform", seed=1))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("uniform", 0.3), ("glorot_uniform", np.sqrt(6 / (60 + 40)))],
)
def test_draws_fill_the_range_and_stay_inside(kind, limit):
    values = draw((60, 40), kind, scale=0.3)
    assert np.abs(values).max() <= np.float32(limit)
    assert values.max() > 0.99 * limit
    assert values.min() < -0.99 * limit
    assert abs(values.mean()) < 0.05 * limit  # 4 standard errors


@pytest.mark.parametrize(
    "shape", [(3, 8), (8, 3), (5, 5)], ids=lambda shape: f"{shape=}"
)
def test_shorter_side_of_an_orthogonal_draw_is_orthonormal(shape):
    q = draw(shape, "orthogonal", seed=3)
    assert q.shape == shape
    q = q.T if shape[0] < shape[1] else q
    # float32 rounding.
    np.testing.assert_allclose(q.T @ q, np.eye(min(shape)), atol=1e-6)


@pytest.mark.parametrize("seed", [5, [5, 1]], ids=lambda seed: f"{seed=}")
def test_config_brings_the_same_draw_back(seed):
    initializer = NumPyInitializer("uniform", scale=0.2, seed=seed)
    config = keras.saving.serialize_keras_object(initializer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == initializer.get_config()
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(again((4, 2))),
        draw((4, 2), "uniform", scale=0.2, seed=seed),
    )


def test_draws_at_other_places_are_others():
    initializer = NumPyInitializer("uniform", scale=0.2, seed=5)
    draws = [
        keras.ops.convert_to_numpy(draws((4, 2)))
        for draws in (initializer, initializer.at(1), initializer.at(1, 2))
    ]
    assert len(np.unique(draws)) == 24
    np.testing.assert_array_equal(
        draws[2], draw((4, 2), "uniform", scale=0.2, seed=[5, 1, 2])
    )


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match=r"glorot_uniform.*received 'he'"):
        NumPyInitializer("he")


def test_normal_draws_are_numpys():
    got = draw((3, 4), "normal", scale=0.5, seed=[5, 1])
    truth = np.random.default_rng([5, 1]).normal(0, 0.5, (3, 4))
    np.testing.assert_allclose(got, truth, rtol=1e-6)  # float32
