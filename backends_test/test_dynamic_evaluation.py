"""Dynamic evaluation against its steps made one by one, by other means."""

import keras
import numpy as np
import pytest
from tiny_runs import float32_products

from multilstm import ContinuousStreams, LanguageModel, ops
from multilstm import dynamic_evaluation as module
from multilstm.dynamic_evaluation import DynamicEvaluator, step_sizes
from multilstm.errors import UserError
from multilstm.evaluation import Evaluator

V = 7
SEGMENT = 4


@pytest.fixture
def text(rng):
    return rng.integers(V, size=23).astype(np.int32)  # 5 segments, 2 words


def make_model(**arguments):
    """Weights large enough for the state to matter."""
    model = LanguageModel(V, units=3, initializer_scale=0.9, **arguments)
    model.build((2, 5))
    return model


def gradients(model, inputs, targets):
    """Those of the mean nats, from a step of Keras's SGD with rate 1."""
    before = model.get_weights()
    model.train_on_batch(inputs, targets)
    after = model.get_weights()
    model.set_weights(before)
    return [old - new for old, new in zip(before, after, strict=True)]


def read_by_hand(model, text, rates, pulls):
    """The nats of each segment: predict, then change each weight in NumPy."""
    model.compile(keras.optimizers.SGD(1.0))
    origin, nats = model.get_weights(), []
    states = model.get_initial_state(1)
    for start in range(0, len(text) - 1, SEGMENT):
        words = text[None, start : start + SEGMENT + 1]
        inputs, targets = words[:, :-1], words[:, 1:]
        logits, ends = model(inputs, initial_state=states, return_state=True)
        logits = keras.ops.convert_to_numpy(logits).astype(np.float64)[0]
        chosen = logits[np.arange(len(logits)), targets[0]]
        nats.append((np.log(np.exp(logits).sum(-1)) - chosen).sum())
        changed = []
        for w, w0, g, rate, pull in zip(
            model.get_weights(),
            origin,
            segment_gradients(model, inputs, targets, states),
            rates,
            pulls,
            strict=True,
        ):
            changed.append(w - rate * g + pull * (w0 - w))
        model.set_weights(changed)
        states = [
            tuple(keras.ops.convert_to_numpy(s) for s in end) for end in ends
        ]
    return np.array(nats)


def segment_gradients(model, inputs, targets, states):
    """Through one segment, from the state in which the one before ended."""
    for lstm, state in zip(model.lstms, states, strict=True):
        for variable, value in zip(
            (lstm.carried.h, lstm.carried.c), state, strict=True
        ):
            variable.assign(value)
    return gradients(model, inputs, targets)


@pytest.mark.parametrize("form", ["sgd", "rms"])
def test_segments_are_those_of_steps_by_hand(form, text, rng):
    by_hand = LanguageModel(V, units=3, initializer_scale=0.9, carry_state=True)
    by_hand.build((1, SEGMENT))
    how = {"learning_rate": 0.8, "decay": 0.1}
    if form == "rms":
        how["mean_squares"] = [
            rng.random(weight.shape).astype(np.float32)
            for weight in by_hand.get_weights()
        ]
        how["epsilon"] = 0.2
    sizes = step_sizes(by_hand.get_weights(), **how)
    model = make_model(output_dropout=0.5)
    before = model.get_weights()
    got = DynamicEvaluator(model, SEGMENT).read(text, **how)
    # Five updates in float32, as large as the weights.
    np.testing.assert_allclose(
        got, read_by_hand(by_hand, text, *sizes), rtol=2e-5
    )
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_rms_with_all_gradients_alike_is_sgd(text):
    weights = make_model().get_weights()
    ones = [np.ones_like(weight) for weight in weights]
    rates, pulls = step_sizes(weights, 0.3, 0.02, 0.5, ones)
    for rate, pull in zip(rates, pulls, strict=True):
        np.testing.assert_allclose(rate, 0.3 / 1.5, rtol=1e-6)  # float32
        np.testing.assert_allclose(pull, 0.02, rtol=1e-6)  # float32


def test_without_steps_it_is_plain_evaluation(text):
    evaluator = DynamicEvaluator(make_model(), SEGMENT)
    plainly = Evaluator(make_model(), 1, 1)
    for num_tokens in (len(text), 3):  # with a rest, and nothing else
        part = text[:num_tokens]
        plain = plainly(part)
        for decay in (0, 1):
            got = evaluator.evaluate(part, learning_rate=0, decay=decay)
            assert got.num_tokens == plain.num_tokens
            # float32 logits.
            np.testing.assert_allclose(
                got.cross_entropy, plain.cross_entropy, rtol=1e-6
            )


def test_one_evaluator_reads_in_both_forms(text):
    """RMS with gradients all alike has the steps of SGD."""
    model = make_model()
    ones = [np.ones_like(weight) for weight in model.get_weights()]
    evaluator = DynamicEvaluator(model, SEGMENT)
    forms = [
        {"learning_rate": 0.2, "decay": 0.1},
        {"learning_rate": 0.3, "decay": 0.1}
        | {"epsilon": 0.5, "mean_squares": ones},
    ]
    first, second, third = (
        evaluator.read(text, **form) for form in (*forms, forms[0])
    )
    np.testing.assert_allclose(second, first, rtol=1e-5)  # float32
    np.testing.assert_allclose(third, first, rtol=1e-6)


def test_every_text_begins_from_the_weights_of_the_model(text):
    evaluator = DynamicEvaluator(make_model(), SEGMENT)
    how = {"learning_rate": 0.5, "decay": 0.01}
    first = evaluator.read(text, **how)
    np.testing.assert_array_equal(evaluator.read(text, **how), first)
    changed = text.copy()
    changed[14:] = (changed[14:] + 1) % V
    other = evaluator.read(changed, **how)
    # Compiled anew: what comes before the change is the same to rounding.
    np.testing.assert_allclose(other[:3], first[:3], rtol=1e-6)
    assert (np.abs(other[3:] - first[3:]) > 1e-3).all()


def test_mean_squares_are_those_of_the_batches_gradients(rng, monkeypatch):
    monkeypatch.setattr(module, "STATISTICS_ROWS", 3)
    text = rng.integers(V, size=70).astype(np.int32)
    got = DynamicEvaluator(make_model(hidden_dropout=0.5), SEGMENT)
    got = got.mean_squares(text, max_batches=2)
    model = LanguageModel(V, units=3, initializer_scale=0.9, carry_state=True)
    model.build((3, SEGMENT))
    model.compile(keras.optimizers.SGD(1.0))
    used = ContinuousStreams(
        text[: 2 * 3 * SEGMENT + 1], SEGMENT, 3, drop_remainder=True
    )
    assert len(used) == 2
    squares = [[g**2 for g in gradients(model, *batch)] for batch in used]
    for square, first, second in zip(got, *squares, strict=True):
        # Roots, as precise as differences of float32 weights of size 1.
        np.testing.assert_allclose(
            np.sqrt(square), np.sqrt((first + second) / 2), atol=3e-7
        )
        assert np.sqrt(square).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1}, "`learning_rate` must be in 0 to inf; .* -1"),
        ({"decay": 1.5}, "`decay` must be in 0 to 1; received 1.5"),
        ({"mean_squares": [np.zeros(2)]}, "`epsilon` must be above 0"),
        ({"mean_squares": [np.array([4.0, 0])]}, "`epsilon` must be above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_refused(change, message):
    how = {"learning_rate": 0.1, "decay": 0.1}
    with pytest.raises(UserError, match=message):
        step_sizes([np.ones(2)], **how | change)


def test_rms_needs_no_epsilon_where_each_weight_had_a_gradient():
    rates, pulls = step_sizes(
        [np.ones(2)], 0.4, 0.1, mean_squares=[np.array([4.0, 16.0])]
    )
    np.testing.assert_allclose(rates, [[0.2, 0.1]])
    np.testing.assert_allclose(pulls, [[0.1 * 2 / 3, 0.1 * 4 / 3]])


def test_segment_of_no_word_is_refused():
    with pytest.raises(UserError, match="`segment_length` must be a whole"):
        DynamicEvaluator(make_model(), 0)


def test_products_are_float32s_whatever_is_allowed_elsewhere(
    text, products, monkeypatch
):
    monkeypatch.setattr(module._Learner, "of", products.stop)
    evaluator = DynamicEvaluator(make_model(), SEGMENT)
    with ops.tf32(True):
        with pytest.raises(KeyboardInterrupt):
            evaluator.mean_squares(text)
        with pytest.raises(KeyboardInterrupt):
            evaluator.read(text, learning_rate=0.1, decay=0.0)
    with ops.tf32(False):
        assert products.seen == [float32_products()] * 2
