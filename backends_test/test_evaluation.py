"""The perplexity of one pass over a text, however it is cut."""

import math

import keras
import numpy as np
import oracles
import pytest
from tiny_runs import float32_products

from multilstm import LanguageModel, evaluate, evaluation, ops
from multilstm.dynamic_evaluation import DynamicEvaluator
from multilstm.errors import UserError
from multilstm.evaluation import Evaluation, Evaluator

V = 13
WAYS_TO_CUT = [
    {"batch_size": 1, "sequence_length": 300},
    {"batch_size": 4, "sequence_length": 7},
    {"batch_size": 5, "sequence_length": 1},
    {"batch_size": 100, "sequence_length": 16},
]


@pytest.fixture
def text(rng):
    return rng.integers(V, size=283).astype(np.int32)


def make_model(*, forget_bias=0.0, **arguments):
    """Weights large enough for the state to matter, and dropout to be off."""
    model = LanguageModel(
        V, units=6, initializer_scale=0.9, output_dropout=0.5, **arguments
    )
    model.build((2, 5))
    for lstm in model.lstms:
        kernel, recurrent, bias = lstm.get_weights()
        bias[6:12] += forget_bias
        lstm.set_weights([kernel, recurrent, bias])
    return model


def single_pass(model, text):
    """The mean nats of one row that holds the whole text, by NumPy."""
    logits = oracles.language_model(model.get_weights(), text[None, :-1])
    return math.log(oracles.perplexity(logits, text[1:]))


@pytest.mark.parametrize(
    "cut",
    WAYS_TO_CUT,
    ids=lambda cut: ",".join(f"{name}={size}" for name, size in cut.items()),
)
def test_perplexity_is_that_of_one_pass(cut, text):
    model = make_model()
    result = evaluate(model, text, **cut)
    assert result.num_tokens == len(text) - 1
    # float32 logits, and states that may be 1e-4 off at a row's start.
    np.testing.assert_allclose(
        result.cross_entropy, single_pass(model, text), rtol=1e-6
    )


def test_products_are_float32s_whatever_is_allowed_elsewhere(text, products):
    """Seen from within the model, of which all read the same setting."""

    class Spy:
        vocabulary_size = V

        def get_initial_state(self, batch_size):
            return [(np.zeros((batch_size, 1), np.float32),) * 2]

        def __call__(self, token_ids, initial_state, return_state, training):
            assert return_state
            assert not training  # which would leave its dropout on
            products.note()
            logits = keras.ops.one_hot(token_ids, V)
            return logits, initial_state

    with ops.tf32(True):
        allowed = float32_products()
        evaluate(Spy(), text)
        Evaluator(Spy()).read_apart([text[:5], text])
        assert float32_products() == allowed
    with ops.tf32(False):
        assert products.seen
        assert set(products.seen) == {float32_products()}


@pytest.mark.parametrize("batch_size", [2, 20], ids="batch_size={}".format)
def test_state_that_never_fades_is_carried_through(batch_size, text):
    """No warm-up finds it: the rows must be read again, down to the last."""
    model = make_model(forget_bias=20)
    result = evaluate(model, text, batch_size=batch_size, sequence_length=10)
    # float32 logits.
    np.testing.assert_allclose(
        result.cross_entropy, single_pass(model, text), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("dtype", "off", "passes"),
    [
        # Shares of 2: those of 1e-4, 2^-6 and 2^-9 or less are let pass.
        ("float32", 4e-4, 3),
        ("float32", 1e-4, 1),
        ("bfloat16", 2**-5, 1),
        ("bfloat16", 2**-4, 3),
        ("float16", 2**-8, 1),
        ("float16", 2**-7, 3),
    ],
)
def test_rows_are_read_again_unless_the_last_bits_are_off(
    dtype, off, passes, text, monkeypatch
):
    """A cell state that is 2 after every other chunk, a little more else."""

    class Jitters:
        vocabulary_size = V

        def get_initial_state(self, batch_size):
            return [(np.zeros((batch_size, 1)), np.full((batch_size, 1), 2.0))]

        def __call__(self, token_ids, initial_state, **_):
            ((h, c),) = initial_state
            logits = keras.ops.one_hot(token_ids, V)
            c = keras.ops.where(c > 2, 2.0, 2.0 + off)
            return logits, [tuple(keras.ops.cast(s, dtype) for s in (h, c))]

    readings = []
    read = Evaluator._read

    def note(evaluator, *arguments):
        readings.append(arguments)
        return read(evaluator, *arguments)

    monkeypatch.setattr(Evaluator, "_read", note)
    # Four rows of one chunk: each reading makes one more of them right.
    evaluate(Jitters(), text, batch_size=4, sequence_length=71)
    assert len(readings) == passes


@pytest.mark.parametrize("kept", [0, 2, 50])
def test_rows_are_read_again_until_they_are_where_they_were(
    kept, text, monkeypatch
):
    monkeypatch.setattr(evaluation, "_WARM_UP", 0)
    model = make_model()
    states = model.get_initial_state(2)
    size = sum(4 * np.size(s) for layer in states for s in layer)
    monkeypatch.setattr(evaluation, "_KEPT_BYTES", kept * size)
    evaluator = Evaluator(model, 2, 4)
    chunks = []
    predict = evaluator._chunk.predict_on_batch

    def note(chunk):
        chunks.append(chunk)
        return predict(chunk)

    monkeypatch.setattr(evaluator._chunk, "predict_on_batch", note)
    cross_entropy = evaluator(text).cross_entropy
    np.testing.assert_allclose(  # float32 logits
        cross_entropy, single_pass(model, text), rtol=1e-6
    )
    # A row has 36 chunks. What it remembers fades in more than two of them
    # and in less than half.
    once = 36
    if kept == 50:
        assert once < len(chunks) < 1.5 * once
    else:
        assert len(chunks) == 2 * once


def test_keras_global_policy_does_not_round_another_models_states(text):
    model = make_model(dtype="float32")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        result = evaluate(model, text, batch_size=4, sequence_length=7)
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(  # float32 logits
        result.cross_entropy, single_pass(model, text), rtol=1e-6
    )


class Halved(LanguageModel):
    """A model with a `call` of its own."""

    def call(self, token_ids, return_state=False, **arguments):
        logits, states = super().call(token_ids, return_state=True, **arguments)
        return (logits / 2, states) if return_state else logits / 2


def test_subclass_is_evaluated_by_its_own_call(text):
    model = Halved(V, units=6, initializer_scale=0.9)
    model.build((None, None))
    logits = oracles.language_model(model.get_weights(), text[None, :-1]) / 2
    expected = math.log(oracles.perplexity(logits, text[1:]))
    got = evaluate(model, text)
    np.testing.assert_allclose(got.cross_entropy, expected, rtol=1e-6)
    [nats] = Evaluator(model).read_apart([text])
    np.testing.assert_allclose(nats.mean(), expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"without a `call` of.*Halved"):
        Evaluator(model, with_features=True)
    with pytest.raises(UserError, match=r"without a `call` of.*Halved"):
        DynamicEvaluator(model)


def test_no_texts_apart_are_no_figures():
    assert Evaluator(make_model()).read_apart([]) == []


def test_layer_in_bfloat16_does_not_have_a_text_read_again(caplog):
    """Its states have fewer bits than those of the layer before it."""
    caplog.set_level("INFO")
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policies[".*lstm_2.*"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    model = LanguageModel(V, units=6, dtype=policies, name="language_model")
    text = np.random.default_rng(0).integers(V, size=3000).astype(np.int32)
    evaluate(model, text)
    assert not any("reading again" in line for line in caplog.messages)


@pytest.mark.parametrize("num_tokens", [2, 17, 33])
def test_short_texts_are_read_whole(num_tokens, text):
    model = make_model()
    result = evaluate(model, text[:num_tokens], sequence_length=8)
    assert result.num_tokens == num_tokens - 1
    # float32 logits.
    np.testing.assert_allclose(
        result.cross_entropy, single_pass(model, text[:num_tokens]), rtol=2e-6
    )


def test_chunks_of_all_texts_have_one_shape(text, monkeypatch):
    """So that they are compiled once; text lies in three rows of four."""
    model = make_model()
    evaluator = Evaluator(model, 4, 8)
    shapes, predict = set(), evaluator._chunk.predict_on_batch

    def note(chunk):
        shapes.add(chunk[0].shape)
        return predict(chunk)

    monkeypatch.setattr(evaluator._chunk, "predict_on_batch", note)
    for size in (72, 100, 161, 200):
        got = evaluator(text[:size]).cross_entropy
        # float32 logits.
        expected = single_pass(model, text[:size])
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert shapes == {(4, 8)}


def test_one_evaluator_measures_texts_with_the_weights_of_the_moment(text):
    model = make_model()
    evaluator = Evaluator(model, 4, 16)
    evaluator(text)
    model.set_weights([2 * weight for weight in model.get_weights()])
    for part in (text, text[:100]):
        # float32 logits.
        np.testing.assert_allclose(
            evaluator(part).cross_entropy, single_pass(model, part), rtol=2e-6
        )


def test_reading_gives_what_each_word_was_predicted_from(text):
    model = make_model()
    reading = Evaluator(model, 4, 16, with_features=True).read(text)
    *_, kernel, bias = (w.astype(np.float64) for w in model.get_weights())
    log_p = oracles.log_softmax(reading.features @ kernel + bias)
    nats = -log_p[np.arange(len(text) - 1), text[1:]]
    np.testing.assert_allclose(reading.nats, nats, rtol=1e-5)  # float32
    # float32, over the whole text.
    np.testing.assert_allclose(nats.mean(), single_pass(model, text), rtol=1e-6)
    again = Evaluator(model, 4, 16).read(text, reading.starts)
    np.testing.assert_allclose(again.nats, reading.nats, rtol=1e-5)  # float32
    assert again.features is None


def test_carried_state_is_neither_used_nor_changed(text):
    model = make_model(carry_state=True)
    model(text[:10].reshape(2, 5))
    states = [v for lstm in model.lstms for v in lstm.carried.variables]
    before = [keras.ops.convert_to_numpy(state).copy() for state in states]
    assert all(np.abs(state).max() > 0.01 for state in before)
    result = evaluate(model, text, batch_size=3)
    # float32 logits.
    np.testing.assert_allclose(
        result.cross_entropy, single_pass(model, text), rtol=1e-6
    )
    for state, expected in zip(states, before, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(state), expected
        )


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "two words or more.*received 0"),
        ([3], "two words or more.*received 1"),
        ([3, V], f"knows {V} words; the text has the id {V}"),
        ([3, -1], "the text has the id -1"),
    ],
    ids=str,
)
def test_texts_without_a_perplexity_are_refused(token_ids, message):
    with pytest.raises(UserError, match=message):
        evaluate(make_model(), np.array(token_ids, np.int32))


@pytest.mark.parametrize("size", ["batch_size", "sequence_length"])
def test_sizes_below_one_are_refused(size, text):
    with pytest.raises(UserError, match=f"`{size}` must be a whole number"):
        evaluate(make_model(), text, **{size: 0})


def test_figures_follow_from_the_totals():
    result = Evaluation(total_nats=6 * math.log(2), num_tokens=3)
    assert math.isclose(result.cross_entropy, 2 * math.log(2))
    assert math.isclose(result.perplexity, 4)


@pytest.mark.parametrize("nats", [1e3, 1e300, math.inf])
def test_perplexity_beyond_floats_is_infinite(nats):
    assert Evaluation(nats, 1).perplexity == math.inf
