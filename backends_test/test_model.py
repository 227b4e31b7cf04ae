"""The language model: logits, loss and perplexity against NumPy."""

import contextlib
import math
import signal
import threading

import keras
import numpy as np
import oracles
import pytest

from multilstm import (
    ContinuousStreams,
    LanguageModel,
    NextWordWindows,
    Perplexity,
    evaluate,
    fitting,
    ops,
)
from multilstm import model as model_module
from multilstm.dataset import RowStarts, VariableStreams
from multilstm.errors import UserError
from multilstm.optimizers import SGD, Adam
from multilstm.projection import Projection

BACKEND = keras.config.backend()
TAKES_GROUPS = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras's fit takes one step at a time on PyTorch"
)

V = 11
# float32 against float64, through two layers.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def small_model(**arguments):
    """Weights large enough that words and states matter."""
    settings = {"units": 6, "initializer_scale": 0.8} | arguments
    return LanguageModel(V, **settings)


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.fixture
def ids(rng):
    return rng.integers(V, size=(3, 5)).astype(np.int32)


def text(rng, num_tokens):
    return rng.integers(V, size=num_tokens).astype(np.int32)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_layers": 1},
        {"num_layers": 3, "embedding_dim": 4},
        {"tied_embeddings": True},
        {"initializer_scale": None, "unit_forget_bias": False},
        {"units": [5, 6, 4], "embedding_dim": 4, "tied_embeddings": True},
    ],
    ids=lambda a: ",".join(f"{k}={v}" for k, v in a.items()) or "defaults",
)
def test_logits_are_numpys(arguments, ids):
    model = small_model(**arguments)
    logits = numpy(model(ids))
    assert logits.shape == (3, 5, V)
    truth = oracles.language_model(model.get_weights(), ids)
    np.testing.assert_allclose(logits, truth, **CLOSE)


def test_tied_logits_have_no_kernel_of_their_own():
    tied, untied = small_model(tied_embeddings=True), small_model()
    for model in (tied, untied):
        model.build((1, 1))
    assert untied.count_params() - tied.count_params() == 6 * V


def test_tied_embeddings_of_another_size_come_after_a_product(rng):
    model = small_model(embedding_dim=4, tied_embeddings=True)
    model.build((2, 3))
    ids = rng.integers(V, size=(2, 3)).astype(np.int32)
    logits, features = (
        numpy(model(ids)),
        numpy(model.read(ids)[0]),
    )
    table = numpy(model.embedding.embeddings)
    bottleneck = numpy(model.projection.bottleneck)
    bias = numpy(model.projection.bias)
    assert bottleneck.shape == (6, 4)
    expected = features.astype(np.float64) @ bottleneck @ table.T + bias
    np.testing.assert_allclose(logits, expected, **CLOSE)
    nll = model.projection.negative_log_likelihood(
        model.read(ids)[0], keras.ops.convert_to_tensor(ids)
    )
    truth = oracles.negative_log_likelihood(logits, ids)
    np.testing.assert_allclose(numpy(nll), truth, **CLOSE)


@pytest.mark.skipif(
    BACKEND == "jax", reason="JAX has float64 only where it is told to"
)
def test_product_with_tied_embeddings_keeps_float64(ids):
    model = small_model(embedding_dim=4, tied_embeddings=True, dtype="float64")
    logits = numpy(model(ids))
    table, bottleneck, bias = map(
        numpy,
        (
            model.embedding.embeddings,
            model.projection.bottleneck,
            model.projection.bias,
        ),
    )
    expected = numpy(model.read(ids)[0]) @ bottleneck @ table.T + bias
    np.testing.assert_allclose(logits, expected, rtol=1e-12)  # float64
    model.compile("sgd")
    truth = oracles.negative_log_likelihood(logits, ids).mean()
    got = model.train_on_batch(ids, ids, return_dict=True)["loss"]
    assert got == pytest.approx(truth, rel=1e-6)  # given in float32


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="a SavedModel needs TensorFlow"
)
def test_exported_model_takes_ids(ids, tmp_path):
    import tensorflow as tf

    model = small_model()
    truth = numpy(model(ids))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    for rows in (3, 1):
        got = numpy(loaded.serve(tf.constant(ids[:rows])))
        np.testing.assert_allclose(got, truth[:rows], **CLOSE)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="a SavedModel needs TensorFlow"
)
def test_exported_model_begins_with_a_state_of_zeros(ids, tmp_path):
    import tensorflow as tf

    model = small_model(carry_state=True)
    model.build(ids.shape)
    truth = numpy(model.copy(carry_state=False)(ids))
    model(ids)  # which leaves a state
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    got = numpy(loaded.serve(tf.constant(ids)))
    np.testing.assert_allclose(got, truth, **CLOSE)


def test_copy_is_of_the_same_class(ids):
    class Mine(LanguageModel):
        pass

    model = Mine(V, units=6)
    model(ids)
    copy = model.copy(dtype="bfloat16")
    assert type(copy) is Mine
    assert copy.dtype_policy.name == "bfloat16"


def test_copy_of_a_class_that_tells_no_arguments_is_refused():
    class Mine(LanguageModel):
        def __init__(self, size):
            super().__init__(V, units=size)

    with pytest.raises(UserError, match=r"Let get_config\(\) give its own"):
        Mine(6).copy()


class OwnLoss(LanguageModel):
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return keras.ops.mean(
            keras.ops.sparse_categorical_crossentropy(
                y, y_pred, from_logits=True
            )
        )


class BoundedLogits(LanguageModel):
    def call(self, token_ids, **arguments):
        return keras.ops.tanh(super().call(token_ids, **arguments))


class OwnMetrics(LanguageModel):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        assert y_pred.shape[-1] == V
        return super().compute_metrics(x, y, y_pred, sample_weight)


@pytest.mark.parametrize("kind", [OwnLoss, BoundedLogits, OwnMetrics])
def test_methods_of_a_subclass_are_given_logits(kind, ids):
    targets = (ids + 1) % V
    model = kind(V, units=6, num_layers=1, initializer_scale=2.0)
    model.compile(keras.optimizers.SGD(0.5))
    model.build((3, None))
    kernel = numpy(model.projection.kernel)
    logits = model.predict(ids, verbose=0)
    expected = oracles.negative_log_likelihood(
        logits.reshape(-1, V), targets.reshape(-1)
    ).mean()
    loss = model.evaluate(ids, targets, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss = model.train_on_batch(ids, targets)
    loss = loss if np.ndim(loss) == 0 else loss[0]
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    # Of features alone the loss would leave it as it was.
    assert np.abs(numpy(model.projection.kernel) - kernel).max() > 1e-5


def test_windows_are_shuffled_unless_that_is_not_wanted():
    """Anew in each `fit`; a step of SGD depends on those before it."""
    windows = NextWordWindows(np.arange(180, dtype=np.int32) % V, 5, 3)

    def train(shuffle):
        model = LanguageModel(V, units=6, num_layers=1, seed=1)
        model.compile(keras.optimizers.SGD(2.0))
        model.fit(windows, shuffle=shuffle, verbose=0)
        return model.get_weights()[0]

    in_order, again, shuffled, anew = map(train, (False, False, True, True))
    np.testing.assert_array_equal(again, in_order)
    assert np.abs(shuffled - in_order).max() > 1e-4
    assert np.abs(anew - shuffled).max() > 1e-4


def test_method_that_was_set_is_given_logits(ids):
    shapes = []
    model = LanguageModel(V, units=6, num_layers=1)
    compute_metrics = model.compute_metrics

    def look(x, y, y_pred, sample_weight=None):
        shapes.append(y_pred.shape[-1])
        return compute_metrics(x, y, y_pred, sample_weight)

    model.compute_metrics = look
    model.compile("sgd")
    model.train_on_batch(ids, ids)
    assert {*shapes} == {V}


def test_train_step_of_a_subclass_is_given_inputs_and_targets():
    shapes = []

    class Mine(LanguageModel):
        def train_step(self, *arguments):
            *state, (inputs, targets) = arguments
            shapes.append((tuple(inputs.shape), tuple(targets.shape)))
            return super().train_step(*state, (inputs, targets))

    text = np.arange(44, dtype=np.int32) % V
    batches = ContinuousStreams(text, 5, 4, drop_remainder=True)
    model, usual = (
        kind(V, units=6, num_layers=1, seed=1) for kind in (Mine, LanguageModel)
    )
    for each in (model, usual):
        each.compile(keras.optimizers.SGD(0.5))
        each.fit(batches, shuffle=False, verbose=0)
    assert {each[1:] for pair in shapes for each in pair} == {(5,)}
    for got, expected in zip(
        model.get_weights(), usual.get_weights(), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    keras.config.backend() == "jax",
    reason="on JAX Keras takes a model's arrays away while a step runs",
)
def test_predictions_are_logits_while_another_thread_evaluates(ids):
    """As from a server that trains on. What TensorFlow traced stays."""
    model = LanguageModel(V, units=6, num_layers=1)
    model.compile("sgd")
    model.build((3, None))
    within, done = threading.Event(), threading.Event()
    loss = model.projection.negative_log_likelihood

    def wait(*arguments, **named):
        within.set()
        assert done.wait(60)
        return loss(*arguments, **named)

    model.projection.negative_log_likelihood = wait
    thread = threading.Thread(target=model.test_on_batch, args=(ids, ids))
    thread.start()
    try:
        assert within.wait(60)
        assert model.predict(ids, verbose=0).shape == (3, ids.shape[1], V)
    finally:
        done.set()
        thread.join()


# JAX makes float32 of float64, and says so.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
@pytest.mark.parametrize("softmax", ["exact", "adaptive", "sampled"])
@pytest.mark.parametrize(
    ("usual", "other"),
    [
        ("float32", "mixed_bfloat16"),
        ("float32", "float64"),
        ("mixed_bfloat16", "float32"),
    ],
)
def test_layers_may_have_dtypes_of_their_own(usual, other, softmax, ids):
    """As Keras asks for them: a policy for each path of layers."""
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=usual)
    policies[".*lstm_1.*"] = keras.dtype_policies.DTypePolicy(other)
    settings = {"units": 6, "seed": 2, "softmax": softmax}
    model = LanguageModel(V, **settings, dtype=policies, name="language_model")
    plain = LanguageModel(V, **settings, dtype="float32")
    for each in (model, plain):
        each.build((3, None))
        each.compile(keras.optimizers.SGD(0.1))
    assert model.lstms[0].compute_dtype != model.lstms[1].compute_dtype
    for name in ("test_on_batch", "train_on_batch"):
        got, expected = (
            getattr(each, name)(ids, ids)[0] for each in (model, plain)
        )
        if softmax == "sampled" and name == "train_on_batch":
            expected = got  # of other words on some backends
        # bfloat16 has eight bits.
        np.testing.assert_allclose(got, expected, rtol=1e-2)


@pytest.mark.parametrize("softmax", ["exact", "adaptive", "sampled"])
def test_batch_of_no_rows_costs_nothing(softmax):
    model = LanguageModel(V, units=6, num_layers=1, softmax=softmax)
    model.build((None, None))
    model.compile(keras.optimizers.SGD(0.1))
    nothing = np.zeros((0, 5), np.int32)
    before = model.get_weights()
    assert model.test_on_batch(nothing, nothing)[0] == 0
    assert model.train_on_batch(nothing, nothing)[0] == 0
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize(
    "carry_state", [False, True], ids="carry_state={}".format
)
def test_state_handed_on_joins_two_halves(carry_state, ids):
    model = small_model(carry_state=carry_state)
    whole, final = model(
        ids, initial_state=model.get_initial_state(3), return_state=True
    )
    first, middle = model(
        ids[:, :2], initial_state=model.get_initial_state(3), return_state=True
    )
    second, end = model(ids[:, 2:], initial_state=middle, return_state=True)
    halves = np.concatenate([numpy(first), numpy(second)], axis=1)
    np.testing.assert_allclose(halves, numpy(whole), **CLOSE)
    assert len(end) == 2
    for pair, truth in zip(end, final, strict=True):
        for state, expected in zip(pair, truth, strict=True):
            np.testing.assert_allclose(numpy(state), numpy(expected), **CLOSE)


def test_weights_are_the_draws_of_numpy():
    """Bit for bit, so that every backend begins from the same model."""
    model = LanguageModel(V, units=6, num_layers=1, seed=3)
    model.build((1, 1))
    embeddings, kernel, recurrent, bias, projection, last = model.get_weights()

    def draw(limit, place, shape):
        generator = np.random.default_rng([3, *place])
        return generator.uniform(-limit, limit, shape).astype(np.float32)

    np.testing.assert_array_equal(embeddings, draw(0.05, [0], (V, 6)))
    glorot = math.sqrt(6 / (6 + 24))
    np.testing.assert_array_equal(kernel, draw(glorot, [1, 0, 0], (6, 24)))
    # float32 rounding.
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(6), atol=1e-6)
    np.testing.assert_array_equal(bias, np.repeat([0, 1, 0, 0], 6))
    glorot = math.sqrt(6 / (6 + V))
    np.testing.assert_array_equal(projection, draw(glorot, [2, 0], (6, V)))
    np.testing.assert_array_equal(last, np.zeros(V))


def test_initializer_scale_draws_every_weight_and_bias():
    model = small_model(initializer_scale=0.1)
    model.build((1, 1))
    for weight in model.get_weights():
        assert 0.05 < np.abs(weight).max() <= np.float32(0.1)
        assert len(np.unique(weight)) == weight.size


@pytest.mark.parametrize("place", ["input", "hidden", "output"])
def test_dropout_acts_in_training_alone(place, ids):
    model = small_model(**{f"{place}_dropout": 0.5})
    plain = numpy(model(ids))
    expected = oracles.language_model(model.get_weights(), ids)
    np.testing.assert_allclose(plain, expected, **CLOSE)
    dropped = numpy(model(ids, training=True))
    assert np.abs(dropped - plain).max() > 0.01


# Training


@pytest.mark.parametrize(
    "carry_state", [False, True], ids="carry_state={}".format
)
def test_fit_reports_the_mean_nll_and_its_perplexity(carry_state, rng):
    """With a rate of 0; where the state is carried, rows are read through."""
    token_ids = text(rng, 2 * 24 + 1)
    streams = ContinuousStreams(token_ids, 3, 2, drop_remainder=True)
    model = small_model(carry_state=carry_state)
    model.compile(keras.optimizers.SGD(0.0))
    history = model.fit(
        streams, epochs=2, verbose=0, validation_data=streams
    ).history
    rows = (-1, 24) if carry_state else (-1, 3)
    expected = oracles.perplexity(
        oracles.language_model(
            model.get_weights(), token_ids[:-1].reshape(rows)
        ),
        token_ids[1:],
    )
    evaluated = model.evaluate(streams, verbose=0, return_dict=True)
    figures = [
        *np.exp(history["loss"]),
        *history["perplexity"],
        *np.exp(history["val_loss"]),
        *history["val_perplexity"],
        math.exp(evaluated["loss"]),
        evaluated["perplexity"],
    ]
    # float32 sums over batches.
    np.testing.assert_allclose(figures, [expected] * 10, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [25, 40, 42], ids="tokens={}".format)
def test_evaluate_counts_each_token_of_uneven_rows_once(num_tokens, rng):
    token_ids = text(rng, num_tokens)
    streams = ContinuousStreams(token_ids, 5, 3)
    model = small_model(carry_state=True)
    model.compile()
    got = model.evaluate(streams, verbose=0, return_dict=True)
    length = -(-(num_tokens - 1) // 3)
    logits = [
        oracles.language_model(
            model.get_weights(), token_ids[:-1][None, start : start + length]
        )[0]
        for start in range(0, num_tokens - 1, length)
    ]
    expected = oracles.perplexity(np.concatenate(logits), token_ids[1:])
    # float32 sums over batches.
    np.testing.assert_allclose(got["perplexity"], expected, rtol=1e-5)


def test_carrying_model_fits_arrays_in_order(rng):
    token_ids = text(rng, 2 * 12 + 1)
    streams = ContinuousStreams(token_ids, 3, 2, drop_remainder=True)
    inputs = np.concatenate([batch[0] for batch in streams])
    targets = np.concatenate([batch[1] for batch in streams])
    model = small_model(carry_state=True)
    model.compile(keras.optimizers.SGD(0.0))
    history = model.fit(inputs, targets, batch_size=2, verbose=0).history
    logits = oracles.language_model(
        model.get_weights(), token_ids[:-1].reshape(2, 12)
    )
    expected = oracles.perplexity(logits, token_ids[1:])
    # float32 sums over batches.
    np.testing.assert_allclose(history["perplexity"], [expected], rtol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 5)], ids=str)
def test_weights_of_rows_or_tokens_weigh_the_mean(shape, ids, rng):
    weights = rng.uniform(0, 2, shape).astype(np.float32)
    targets = np.roll(ids, -1, axis=1)
    model = small_model()
    model.compile()
    got = model.evaluate(
        ids, targets, sample_weight=weights, verbose=0, return_dict=True
    )
    logits = oracles.language_model(model.get_weights(), ids)
    nll = -np.take_along_axis(
        oracles.log_softmax(logits), targets[..., None], axis=-1
    )[..., 0]
    by_token = np.broadcast_to(weights.reshape(3, -1), nll.shape)
    expected = np.average(nll, weights=by_token)
    # float32.
    np.testing.assert_allclose(
        [got["loss"], math.log(got["perplexity"])], expected, rtol=1e-5
    )


def test_carrying_model_predicts_from_zeros_each_time(rng):
    token_ids = text(rng, 2 * 12 + 1)
    streams = ContinuousStreams(token_ids, 3, 2, drop_remainder=True)
    model = small_model(carry_state=True)
    rows = token_ids[:-1].reshape(2, 12)
    model.build((2, 3))
    truth = oracles.language_model(model.get_weights(), rows)
    inputs = np.concatenate([batch[0] for batch in streams])
    for _ in range(2):
        logits = model.predict(inputs, batch_size=2, verbose=0)
        joined = np.concatenate(np.split(logits, 4), axis=1)
        np.testing.assert_allclose(joined, truth, **CLOSE)


def test_compile_takes_a_loss_in_its_second_place(ids):
    model = small_model()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    got = model.evaluate(ids, ids, verbose=0, return_dict=True)
    assert set(got) == {"loss"}


def test_own_loss_gives_the_gradients_of_keras_loss(ids):
    targets = np.roll(ids, -1, axis=1)
    own, stock = small_model(), small_model()
    own.compile(keras.optimizers.SGD(1.0))
    stock.compile(
        keras.optimizers.SGD(1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    own.build(ids.shape)
    start = own.get_weights()
    for model in (own, stock):
        model.train_on_batch(ids, targets)
    for before, ours, theirs in zip(
        start, own.get_weights(), stock.get_weights(), strict=True
    ):
        assert np.abs(ours - before).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_users_loss_and_metrics_are_used(ids):
    targets = np.roll(ids, -1, axis=1)
    model = small_model()
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["sparse_categorical_accuracy", Perplexity(name="mine")],
    )
    got = model.evaluate(ids, targets, verbose=0, return_dict=True)
    logits = oracles.language_model(model.get_weights(), ids)
    expected = oracles.perplexity(logits, targets)
    # float32.
    np.testing.assert_allclose(math.exp(got["loss"]), expected, rtol=1e-5)
    np.testing.assert_allclose(got["mine"], expected, rtol=1e-5)
    accuracy = np.mean(logits.argmax(axis=-1) == targets)
    np.testing.assert_allclose(
        got["sparse_categorical_accuracy"], accuracy, rtol=1e-5
    )
    assert "perplexity" not in got  # it is of the model's own loss


def test_perplexity_weighs_tokens():
    """Words of probability 1/2 and 1/8, by hand: exp(ln(2 * 8) / 2) = 4."""
    metric = Perplexity()
    half = np.log([[[0.5, 0.5], [0.25, 0.75]]]).astype(np.float32)
    eighth = np.log([[[0.125, 0.875]]]).astype(np.float32)
    metric.update_state(
        np.array([[0, 0]]), half, sample_weight=np.array([[1.0, 0.0]])
    )
    metric.update_state(np.array([[0]]), eighth)
    # float32.
    np.testing.assert_allclose(float(metric.result()), 4.0, rtol=1e-6)
    metric.reset_state()
    metric.update_state(np.array([[0, 0]]), half)
    np.testing.assert_allclose(float(metric.result()), math.sqrt(8), rtol=1e-6)


def test_regularizers_are_part_of_the_loss(ids):
    model = small_model()
    model.lstms[0].kernel_regularizer = keras.regularizers.L2(1.0)
    model.compile()
    got = model.evaluate(ids, ids, verbose=0, return_dict=True)
    penalty = np.sum(model.get_weights()[1].astype(float) ** 2)
    # float32.
    np.testing.assert_allclose(
        got["loss"], math.log(got["perplexity"]) + penalty, rtol=1e-5
    )


def test_compile_takes_the_optimizer_of_the_preset():
    model = LanguageModel.from_preset(
        "zaremba_small", vocabulary_size=V, units=6, embedding_dim=6
    )
    assert model.carry_state
    model.compile()
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert float(model.optimizer.learning_rate) == 20.0
    assert model.optimizer.global_clipnorm == 0.25


def test_unknown_preset_is_refused():
    with pytest.raises(UserError, match="received 'zaremba'"):
        LanguageModel.from_preset("zaremba", vocabulary_size=V)


def test_dtype_is_that_of_every_layer():
    model = small_model(dtype="mixed_bfloat16")
    model.build((1, 1))
    parts = [model.embedding, *model.lstms, *model.dropouts, model.projection]
    assert {layer.compute_dtype for layer in parts} == {"bfloat16"}


# Files


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"carry_state": True},
        {"tied_embeddings": True, "output_dropout": 0.5, "preset": "small"},
    ],
    ids=lambda a: ",".join(a) or "defaults",
)
def test_saved_model_gives_the_same_logits(arguments, ids, tmp_path):
    model = small_model(seed=9, **arguments)
    model.compile()
    model.train_on_batch(ids, ids)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    start = model.get_initial_state(3)
    np.testing.assert_allclose(
        numpy(loaded(ids, initial_state=start)),
        numpy(model(ids, initial_state=start)),
        **CLOSE,
    )
    got = loaded.evaluate(ids, ids, verbose=0, return_dict=True)
    assert set(got) == {"loss", "perplexity"}


def test_weights_of_a_carrying_model_fit_any_batch_size(ids, tmp_path):
    model, other = small_model(carry_state=True), small_model(seed=1)
    expected = numpy(model(ids))
    model.save_weights(tmp_path / "a.weights.h5")
    other.build((1, 1))
    other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_allclose(numpy(other(ids)), expected, **CLOSE)


# How a step is run


class Batches(keras.utils.PyDataset):
    """The batches of a dataset as arrays, which nothing is known of."""

    def __init__(self, dataset):
        super().__init__()
        self.batches = list(dataset)[: len(dataset)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def fit_on(data, valid=None, **arguments):
    compile_arguments = arguments.pop("compile", {})
    model = small_model(**{"output_dropout": 0.3} | arguments)
    model.build((2, 5))
    model.compile(keras.optimizers.Adam(0.01), **compile_arguments)
    history = model.fit(
        data, validation_data=valid, epochs=2, verbose=0, shuffle=False
    )
    return model, history.history


def datasets(rng):
    ids = text(rng, 78)  # seven batches
    return {
        "windows": NextWordWindows(ids, 5, 2),
        "streams": ContinuousStreams(ids, 5, 2, drop_remainder=True),
        "weighted": ContinuousStreams(ids, 5, 2),
    }


@pytest.mark.parametrize("name", ["windows", "streams", "weighted"])
@pytest.mark.parametrize("carry_state", [False, True])
def test_text_on_the_device_gives_what_arrays_give(name, carry_state, rng):
    """Also with several steps at once, where the backend chooses so."""
    data = datasets(rng)[name]
    model, history = fit_on(data, carry_state=carry_state)
    arrays, expected = fit_on(
        Batches(data),
        carry_state=carry_state,
        compile={"steps_per_execution": 1},
    )
    for values, truth in zip(history.values(), expected.values(), strict=True):
        # The same sums in another program.
        np.testing.assert_allclose(values, truth, rtol=1e-5)
    for weight, truth in zip(
        model.get_weights(), arrays.get_weights(), strict=True
    ):
        # Adam divides small numbers by small numbers.
        np.testing.assert_allclose(weight, truth, rtol=1e-3, atol=1e-5)


@TAKES_GROUPS
@pytest.mark.parametrize("name", ["windows", "weighted"])
def test_steps_in_groups_are_the_same_steps(name, rng):
    data = datasets(rng)[name]
    expected, one_by_one = fit_on(
        data, data, compile={"steps_per_execution": 1}
    )
    model, groups = fit_on(data, data, compile={"steps_per_execution": 3})
    assert set(groups) == {"loss", "perplexity", "val_loss", "val_perplexity"}
    for key, values in groups.items():
        # The same sums in another program.
        np.testing.assert_allclose(values, one_by_one[key], rtol=1e-5)
    for weight, truth in zip(
        model.get_weights(), expected.get_weights(), strict=True
    ):
        # Adam divides small numbers by small numbers.
        np.testing.assert_allclose(weight, truth, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="elsewhere Keras shuffles the dataset"
)
def test_default_order_of_batches_is_new_in_each_epoch(rng):
    """As Keras does with a PyDataset; each batch comes once."""
    data = RowStarts(NextWordWindows(text(rng, 402), 5, 2))  # forty batches
    in_order = [int(data[k][0][0]) for k in range(40)]
    model = small_model()
    model.compile()
    for shuffle in (True, False):
        with model._prepare_steps(data.batches, None, shuffle) as batches:
            epochs = [
                [int(starts[0]) for (starts,) in batches] for _ in range(2)
            ]
        assert [sorted(epoch) for epoch in epochs] == [in_order, in_order]
        assert (epochs[0] != epochs[1]) is shuffle
        assert (epochs[0] != in_order) is shuffle
    model.fit(data.batches, verbose=0)  # with no warning


class Counter(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)


class Chunky(Counter):
    takes_several_batches = True


class EpochsOnly(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.logs = logs


@pytest.mark.parametrize("by_name", [True, False], ids="by_name={}".format)
@pytest.mark.parametrize(
    ("callback", "num_calls"),
    [
        ([Counter()], 7),
        ([Chunky()], 7 if BACKEND == "torch" else 3),
        ([EpochsOnly(), Chunky()], 7 if BACKEND == "torch" else 3),
    ],
    ids=["each", "groups", "epochs"],
)
def test_callback_that_needs_every_batch_gets_it(
    callback, num_calls, by_name, rng, monkeypatch
):
    if BACKEND != "torch":
        monkeypatch.setattr(fitting, "steps_per_dispatch", lambda _: 3)
    model = small_model()
    model.compile()
    data = datasets(rng)["windows"]
    batches = callback[-1].batches
    batches.clear()
    if by_name:
        model.fit(data, verbose=0, callbacks=callback)
    else:
        model.fit(data, None, None, 1, 0, callback)
    assert len(batches) == num_calls
    assert batches == sorted(batches)


def test_carrying_model_takes_arguments_by_place(ids):
    model = small_model(carry_state=True)
    model.compile()
    counter = Counter()
    model.fit(ids, ids, 3, 1, 0, [counter])
    assert len(counter.batches) == 1


@pytest.mark.parametrize(
    "told",
    [None, pytest.param(2, marks=TAKES_GROUPS)],
    ids="told={}".format,
)
def test_loaded_model_takes_groups_of_steps_as_the_saved_one(
    told, rng, ids, tmp_path, monkeypatch
):
    monkeypatch.setattr(fitting, "steps_per_dispatch", lambda _: 3)
    model = small_model()
    model.compile(**({"steps_per_execution": told} if told else {}))
    model.train_on_batch(ids, ids)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.jit_compile == model.jit_compile
    taken = []
    for one in (model, loaded):
        with one._prepare_steps(datasets(rng)["windows"], None, True):
            taken.append(one.steps_per_execution)
    chosen = 1 if BACKEND == "torch" else 3
    assert taken == [told or chosen] * 2


def test_file_tells_no_backend_what_another_chose(ids, tmp_path):
    model = small_model()
    model(ids)
    model.compile()
    assert "jit_compile" not in model.get_compile_config()
    model.compile(jit_compile=False)
    assert model.get_compile_config()["jit_compile"] is False


def test_function_of_a_user_is_called_at_every_batch(rng, monkeypatch):
    if BACKEND != "torch":
        monkeypatch.setattr(fitting, "steps_per_dispatch", lambda _: 3)
    model = small_model()
    model.compile()
    batches = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batches.append(batch)
    )
    model.fit(datasets(rng)["windows"], verbose=0, callbacks=callback)
    assert sorted(batches) == list(range(7))  # Keras calls it in a thread


def test_bar_counts_the_batches_that_there_are(rng, monkeypatch):
    if BACKEND != "torch":
        monkeypatch.setattr(fitting, "steps_per_dispatch", lambda _: 3)
    counts = []
    monkeypatch.setattr(
        keras.utils.Progbar,
        "update",
        lambda self, current, *args, **kwargs: counts.append(current),
    )
    model = small_model()
    model.compile()
    model.fit(datasets(rng)["windows"], verbose=1)
    assert set(counts) == ({*range(1, 8)} if BACKEND == "torch" else {3, 6, 7})


@pytest.fixture
def python_has_ctrl_c():
    """As in a program; pytest-xdist's processes do not listen to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressesCtrlC:
    """A number for which one waits until Ctrl-C is pressed."""

    def __float__(self):
        signal.raise_signal(signal.SIGINT)
        return 0.0


def wait_as_keras(*_, **__):
    """It drops what is raised meanwhile."""
    logs = {"loss": PressesCtrlC()}
    keras.callbacks.CallbackList([]).on_epoch_begin(0, logs)


@pytest.mark.usefixtures("python_has_ctrl_c")
@pytest.mark.parametrize("place", ["train_batch", "test_batch", "epoch"])
def test_ctrl_c_that_keras_drops_ends_fit(rng, monkeypatch, place):
    """And the model is that of the steps before."""
    if BACKEND != "torch":
        monkeypatch.setattr(fitting, "steps_per_dispatch", lambda _: 3)
    windows = datasets(rng)["windows"]
    model = small_model()
    model.compile()
    before = signal.getsignal(signal.SIGINT)
    ended = []

    class Waits(keras.callbacks.Callback):
        takes_several_batches = True

        def on_train_end(self, logs=None):
            ended.append(logs)

    setattr(Waits, f"on_{place}_end", wait_as_keras)
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            windows,
            validation_data=windows,
            verbose=0,
            epochs=2,
            callbacks=[Waits()],
        )
    assert not ended
    assert signal.getsignal(signal.SIGINT) is before
    assert np.isfinite(model.evaluate(windows, verbose=0)).all()
    assert model.optimizer.iterations > 0


@pytest.mark.usefixtures("python_has_ctrl_c")
def test_ctrl_c_ends_the_fit_within_a_fit(rng):
    windows = datasets(rng)["windows"]
    models = [small_model() for _ in range(2)]
    for model in models:
        model.compile()
    waits = keras.callbacks.LambdaCallback(on_epoch_end=wait_as_keras)

    def fit_another(*_):
        models[1].fit(windows, verbose=0, epochs=5, callbacks=[waits])

    fits = keras.callbacks.LambdaCallback(on_epoch_end=fit_another)
    with pytest.raises(KeyboardInterrupt):
        models[0].fit(windows, verbose=0, epochs=2, callbacks=[fits])
    assert models[1].optimizer.iterations == len(windows)  # an epoch


@pytest.mark.usefixtures("python_has_ctrl_c")
def test_ctrl_c_that_a_callback_drops_stays_dropped(rng):
    model = small_model()
    model.compile()

    def drop(*_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    callback = keras.callbacks.LambdaCallback(on_epoch_end=drop)
    windows = datasets(rng)["windows"]
    model.fit(windows, verbose=0, epochs=2, callbacks=[callback])
    assert model.optimizer.iterations == 2 * len(windows)


def test_ctrl_c_is_left_to_who_has_it(rng):
    """As `train`, which stops after the step, and makes a checkpoint."""
    noted = []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append(1))
    try:
        model = small_model()
        model.compile()
        callback = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_: signal.raise_signal(signal.SIGINT)
        )
        model.fit(
            datasets(rng)["windows"], verbose=0, epochs=2, callbacks=[callback]
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert noted == [1, 1]


@pytest.mark.parametrize("save_freq", [2, "epoch"])
def test_checkpoints_of_keras_come_as_often_as_asked(
    rng, monkeypatch, tmp_path, save_freq
):
    if BACKEND != "torch":
        monkeypatch.setattr(fitting, "steps_per_dispatch", lambda _: 3)
    model = small_model()
    model.compile()
    of = "epoch" if save_freq == "epoch" else "batch"
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / f"{{{of}}}.weights.h5",
        save_freq=save_freq,
        save_weights_only=True,
    )
    model.fit(datasets(rng)["windows"], verbose=0, callbacks=checkpoint)
    made = sorted(path.name.partition(".")[0] for path in tmp_path.iterdir())
    assert made == (["1"] if save_freq == "epoch" else ["2", "4", "6"])


def test_fit_and_evaluate_never_make_logits(rng, monkeypatch):
    model = small_model()
    model.build((2, 5))

    def fail(*_):
        raise AssertionError("logits of the whole vocabulary")

    monkeypatch.setattr(Projection, "call", fail)
    model.compile()
    data = datasets(rng)["windows"]
    model.fit(data, validation_data=data, verbose=0)
    model.evaluate(data, verbose=0)
    with pytest.raises(AssertionError, match="whole vocabulary"):
        model(data[0][0])


def test_other_calls_between_fits_take_their_own_data(rng):
    first, second = (datasets(rng)["windows"] for _ in range(2))
    model, _ = fit_on(first)
    expected, _ = fit_on(Batches(first), compile={"steps_per_execution": 1})
    for other in (model, expected):
        other.evaluate(second, verbose=0)
        other.train_on_batch(*second[0])
    model.fit(second, verbose=0, shuffle=False)
    expected.fit(Batches(second), verbose=0, shuffle=False)
    for weight, truth in zip(
        model.get_weights(), expected.get_weights(), strict=True
    ):
        # Adam divides small numbers by small numbers.
        np.testing.assert_allclose(weight, truth, rtol=1e-3, atol=1e-5)


def test_layers_run_together_without_dropout_between_them(ids, monkeypatch):
    together = []
    run_stack = model_module.run_stack

    def count(layers, *arguments):
        together.append(len(layers))
        return run_stack(layers, *arguments)

    monkeypatch.setattr(model_module, "run_stack", count)
    model = small_model(hidden_dropout=0.5, num_layers=3)
    model(ids)
    model(ids, training=True)
    assert together == [3, 1, 1, 1]


def test_mixed_precision_trains_on_the_fast_kernel(rng):
    model = small_model(dtype="mixed_bfloat16", carry_state=True)
    model.compile(keras.optimizers.SGD(1.0))
    data = datasets(rng)["streams"]
    losses = model.fit(data, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert ops.last_kernel() in (
        "jax: scan",
        "torch: onednn",
        "tensorflow: loop",
    )


# What torch.compile does to see which tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is PyTorch's")
def test_torch_compile_gives_the_same_logits_and_gradients(ids):
    import torch

    model = small_model()
    eager = model(ids)
    eager.sum().backward()
    gradients = [v.value.grad.clone() for v in model.trainable_variables]
    model.zero_grad()
    # Without a C++ compiler: what torch.compile traces, run as it is.
    compiled = torch.compile(model, backend="eager")(torch.as_tensor(ids))
    compiled.sum().backward()
    np.testing.assert_allclose(numpy(compiled), numpy(eager), **CLOSE)
    for variable, truth in zip(
        model.trainable_variables, gradients, strict=True
    ):
        np.testing.assert_allclose(variable.value.grad, truth, **CLOSE)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is chosen there")
def test_whole_step_under_xla_gives_the_same_weights(rng):
    data = datasets(rng)["windows"]
    expected, model = (
        # Under XLA TensorFlow draws other numbers for a dropout.
        fit_on(data, output_dropout=0.0, compile={"jit_compile": jit})[0]
        for jit in (False, True)
    )
    for weight, truth in zip(
        model.get_weights(), expected.get_weights(), strict=True
    ):
        # Adam divides small numbers by small numbers.
        np.testing.assert_allclose(weight, truth, rtol=1e-3, atol=1e-5)


# Regularisers ---------------------------------------------------------------

REGULARIZERS = {
    "locked_dropout": True,
    "input_dropout": 0.3,
    "hidden_dropout": 0.3,
    "output_dropout": 0.3,
    "embedding_dropout": 0.2,
    "weight_dropout": 0.4,
    "activation_regularization": 2.0,
    "temporal_activation_regularization": 1.0,
}


@pytest.mark.parametrize("locked", [True, False])
def test_locked_dropout_has_one_mask_for_all_steps(locked):
    model = small_model(
        locked_dropout=locked,
        **dict.fromkeys(
            ("input_dropout", "hidden_dropout", "output_dropout"), 0.5
        ),
    )
    for dropout in model.dropouts:
        mask = numpy(dropout(np.ones((3, 7, 8), np.float32), training=True))
        is_locked = (mask == mask[:, :1]).all()
        assert is_locked == locked
        assert (mask[0] != mask[1]).any()  # another one for each row
        assert set(np.unique(mask)) == {0.0, 2.0}


def test_activation_regularization_is_that_of_its_paper(rng):
    alpha, beta = 0.7, 0.4
    model = small_model(
        activation_regularization=alpha,
        temporal_activation_regularization=beta,
    )
    model.build((2, 5))
    model.compile(keras.optimizers.SGD(0.0))
    ids = rng.integers(V, size=(2, 5)).astype(np.int32)
    outputs = numpy(model.read(ids)[0]).astype(np.float64)
    expected = alpha * np.mean(outputs**2)
    expected += beta * np.mean((outputs[:, 1:] - outputs[:, :-1]) ** 2)
    nats = oracles.negative_log_likelihood(numpy(model(ids)), ids).mean()
    got = model.train_on_batch(ids, ids, return_dict=True)
    assert got["loss"] == pytest.approx(nats + expected, rel=1e-5)  # float32
    # What is reported is the perplexity alone, and so is an evaluation.
    assert got["perplexity"] == pytest.approx(np.exp(nats), rel=1e-5)
    got = model.test_on_batch(ids, ids, return_dict=True)
    assert got["loss"] == pytest.approx(nats, rel=1e-5)


def test_activations_are_regularized_as_they_go_to_the_logits():
    """AR is of the outputs after dropout, TAR of those before."""
    model = small_model(
        output_dropout=0.5,
        locked_dropout=True,
        activation_regularization=1.0,
    )
    costs = []
    model.add_loss = costs.append
    outputs = keras.ops.ones((1, 3, 4))
    model._regularize(outputs, 2 * outputs)
    assert [float(cost) for cost in costs] == [4.0]
    model.settings["temporal_activation_regularization"] = 1.0
    steps = keras.ops.cumsum(outputs, axis=1)
    model._regularize(3 * steps, 2 * outputs)
    assert [float(cost) for cost in costs] == [4.0, 4.0, 9.0]


def test_regularizers_change_nothing_outside_of_training(rng):
    plain, model = small_model(), small_model(**REGULARIZERS)
    ids = rng.integers(V, size=(2, 5)).astype(np.int32)
    np.testing.assert_array_equal(numpy(plain(ids)), numpy(model(ids)))


def test_regularizers_keep_the_kernel(rng):
    kernels = []
    for settings in ({}, REGULARIZERS):
        model = small_model(carry_state=True, **settings)
        model.compile()
        model.fit(datasets(rng)["streams"], verbose=0)
        kernels.append(ops.last_kernel())
    assert kernels[0] == kernels[1]
    fast = {
        "jax": "jax: scan",
        "torch": "torch: onednn",
        "tensorflow": "tensorflow: loop",
    }
    assert kernels[0] == fast[BACKEND]


@pytest.mark.skipif(BACKEND == "torch", reason="see the views in test_layers")
def test_regularizers_keep_cudnn(rng, monkeypatch):
    """No GPU to run it: that cuDNN is what a training step calls."""
    ids = rng.integers(V, size=(2, 5)).astype(np.int32)
    if BACKEND == "jax":
        import jax
        from jax.experimental import rnn

        def lstm(x, h0, c0, *_, hidden_size, **__):
            return x[..., :1] + jax.numpy.zeros(hidden_size), h0, c0

        monkeypatch.setattr(rnn, "lstm", lstm)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        small_model(**REGULARIZERS)(ids, training=True)
        assert ops.last_kernel() == "jax: cudnn"
        return
    import tensorflow as tf

    from multilstm.ops import tensorflow

    monkeypatch.setattr(tensorflow, "has_gpu", lambda: True)
    model = small_model(**REGULARIZERS)
    model.build((2, 5))
    step = tf.function(lambda ids: model(ids, training=True))
    graph = step.get_concrete_function(tf.constant(ids)).graph
    kinds = {operation.type for operation in graph.get_operations()}
    assert "CudnnRNNV3" in kinds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_dropout": 1.0}, "`weight_dropout` must be from 0"),
        ({"embedding_dropout": -0.1}, "`embedding_dropout` must be from 0"),
        ({"activation_regularization": -1.0}, "must be 0 or more"),
        ({"embedding_dim": 0}, "`embedding_dim` must be a whole number, 1 or"),
        ({"units": 0}, "`units` must be a whole number, 1 or more; received 0"),
        ({"units": [3, -1]}, "`units` must be a whole number, 1 or more; rec"),
        ({"units": 5.5}, "`units` must be a whole number, 1 or more; received"),
        ({"units": []}, "`units` must have one layer or more"),
        ({"num_layers": "2"}, "`num_layers` must be a whole number, 1 or more"),
        ({"seed": -1}, "`seed` must be a whole number, 0 or more; received -1"),
        ({"seed": True}, "`seed` must be a whole number, 0 or more; received"),
        (
            {"seed": None},
            "`seed` must be a whole number, 0 or more; received",
        ),
        ({"initializer": "he"}, "uniform, torch, torch_normal; received 'he'"),
        (
            {"initializer": "torch", "initializer_scale": None},
            "needs `initializer_scale`",
        ),
    ],
)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        small_model(**settings)


def test_states_must_be_of_all_layers(ids):
    model = small_model()
    for number in (1, 3):
        states = model.get_initial_state(3)[:1] * number
        with pytest.raises(UserError, match=rf"2 layers; received {number}"):
            model(ids, initial_state=states)


def test_forget_biases_are_drawn_with_a_scale_of_0_too(ids):
    model = small_model(initializer_scale=0.0)
    model(ids)
    assert not any(weight.any() for weight in model.get_weights())


def test_sizes_may_be_numbers_of_numpy():
    model = small_model(units=np.int64(5), num_layers=1)
    assert model.settings["units"] == [5]


def test_torchs_initial_weights_have_torchs_spread():
    model = LanguageModel(
        500,
        units=400,
        num_layers=1,
        tied_embeddings=True,
        initializer="torch_normal",
        initializer_scale=1.0,
    )
    model.build((1, 1))
    table, kernel, recurrent, bias, logits_bias = model.get_weights()
    # Of so many draws the spread is known to a percent or two.
    assert table.std() == pytest.approx(1.0, rel=0.02)
    for weight in (kernel, recurrent):
        assert 0.049 < np.abs(weight).max() <= 0.05  # 1 / sqrt(400)
        assert weight.std() == pytest.approx(0.05 / np.sqrt(3), rel=0.02)
    # PyTorch's two biases together: twice the variance.
    assert bias.std() == pytest.approx(0.05 * np.sqrt(2 / 3), rel=0.1)
    assert (logits_bias == 0).all()


# Batches of varying length ----------------------------------------------------


def test_rate_is_in_proportion_to_the_length_of_a_batch(rng):
    """One step on 5 of 10 words: half of the step at the full rate."""
    ids = rng.integers(V, size=11).astype(np.int32)
    steps = []
    for data, rate in (
        (VariableStreams(ids[:6], 10, 1, std=0.0, bucket=5), 1.0),
        (ContinuousStreams(ids[:6], 5, 1, drop_remainder=True), 0.5),
    ):
        model = small_model()
        model.build((1, 5))
        before = model.get_weights()
        model.compile(SGD(rate))
        model.fit(data, verbose=0)
        assert len(data) == 1
        pairs = zip(before, model.get_weights(), strict=True)
        steps.append([new - old for old, new in pairs])
    for got, expected in zip(*steps, strict=True):
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_lengths_vary_within_a_fit_and_the_state_goes_on(rng):
    ids = rng.integers(V, size=201).astype(np.int32)
    model, other = (small_model(carry_state=True) for _ in range(2))
    streams = VariableStreams(ids, 20, 2, std=6.0, half_share=0.3)
    assert len(set(streams.lengths)) > 2
    for one in (model, other):
        one.build((2, 20))
        one.compile(SGD(0.5))
    model.fit(streams, verbose=0, shuffle=False)
    for length, (inputs, targets) in zip(streams.lengths, streams, strict=True):
        other.optimizer.learning_rate = 0.5 * length / 20
        other.train_on_batch(inputs, targets)
    assert float(model.optimizer.learning_rate) == 0.5
    for got, expected in zip(
        model.get_weights(), other.get_weights(), strict=True
    ):
        # float32, some steps long.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_optimizer_that_cannot_follow_the_lengths_is_refused(rng):
    model = small_model()
    model.compile(keras.optimizers.SGD(0.5))
    with pytest.raises(UserError, match=r"multilstm\.optimizers"):
        model.fit(VariableStreams(np.arange(11) % V, 5, 1), verbose=0)
    assert model._usual_length is None


def test_dropouts_draw_from_seeds_far_from_each_other():
    """Draws of a step have seed and step, or their sum, for a seed."""
    model = small_model(num_layers=3, seed=4, **REGULARIZERS)
    other = small_model(num_layers=3, seed=5, **REGULARIZERS)
    seeds = [
        layer.seed_generator._initial_seed
        for one in (model, other)
        for layer in (
            one.embedding.word_dropout,
            *one.dropouts,
            *(lstm.weight_drop for lstm in one.lstms),
        )
    ]
    assert len(seeds) == 16
    assert np.diff(sorted(seeds)).min() > 100_000  # steps


def test_one_step_has_no_difference_to_regularize(rng):
    model = small_model(temporal_activation_regularization=1.0)
    model.compile()
    ids = rng.integers(V, size=(2, 1)).astype(np.int32)
    assert np.isfinite(model.train_on_batch(ids, ids)).all()


def test_mixed_bfloat16_trains_as_float32_does(rng):
    """Not so exactly: bfloat16 has 8 bits, a share of 0.4 % each."""
    ids = rng.integers(V, size=(4, 30)).astype(np.int32)
    losses = []
    for dtype in ("float32", "mixed_bfloat16"):
        model = small_model(units=16, dtype=dtype)
        model.build((4, 29))
        model.compile(keras.optimizers.Adam(0.02))
        losses.append(
            [model.train_on_batch(ids[:, :-1], ids[:, 1:]) for _ in range(20)]
        )
        assert {v.dtype for v in model.trainable_variables} == {"float32"}
    losses = np.array(losses)[:, :, 0] if np.ndim(losses) == 3 else losses
    full, mixed = np.array(losses)
    assert full[-1] < full[0] - 0.3
    np.testing.assert_allclose(mixed, full, rtol=0.02)


@pytest.mark.parametrize("kind", [NextWordWindows, ContinuousStreams])
def test_text_that_was_changed_in_its_place_is_read_anew(kind, rng):
    ids = text(rng, 101)
    other = (ids + 1) % V

    def train(texts):
        model = small_model()
        model.compile("sgd")
        for tokens in texts:
            model.fit(kind(tokens, 5, 4), epochs=1, shuffle=False, verbose=0)
        return model.get_weights()

    expected = train([ids.copy(), other])
    model = small_model()
    model.compile("sgd")
    windows = kind(ids, 5, 4)
    model.fit(windows, epochs=1, shuffle=False, verbose=0)
    ids[:] = other
    model.fit(windows, epochs=1, shuffle=False, verbose=0)
    for weight, truth in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, truth)


def test_text_that_is_read_between_two_batches_leaves_the_state(rng):
    streams, other = (
        ContinuousStreams(text(rng, n), 5, 4, drop_remainder=True)
        for n in (201, 101)
    )

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                self.model.evaluate(other, verbose=0)
                self.model.predict(other, verbose=0)

    def train(*callbacks):
        model = small_model(carry_state=True)
        model.compile("sgd", steps_per_execution=1)
        model.fit(streams, epochs=1, verbose=0, callbacks=[*callbacks])
        return model.get_weights()

    expected = train()
    for weight, truth in zip(train(Look()), expected, strict=True):
        # float32, on JAX in two compilations of the same step.
        np.testing.assert_allclose(weight, truth, atol=1e-6)


def test_loss_scaling_goes_with_batches_of_varying_length(rng):
    """Keras puts an optimizer for mixed_float16 into another."""
    streams = VariableStreams(text(rng, 241), 5, 4, std=2.0, bucket=1)

    def train(dtype):
        model = LanguageModel(V, units=6, dtype=dtype)
        model.compile(SGD(0.5))
        model.fit(streams, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    half, full = train("mixed_float16"), train("float32")
    for weight, truth in zip(half, full, strict=True):
        # float16 has 11 bits; at one rate for all lengths it is 0.3.
        np.testing.assert_allclose(weight, truth, atol=5e-4)


def test_fit_goes_on_after_averages_have_become_the_weights(rng):
    """On JAX Keras leaves one array in two variables then."""
    windows = NextWordWindows(text(rng, 101), 5, 4)
    model = small_model()
    model.compile(keras.optimizers.Adam(0.01, use_ema=True))
    losses = [
        model.fit(windows, epochs=2, verbose=0).history["loss"][-1]
        for _ in range(3)
    ]
    assert losses[2] < losses[1] < losses[0]


def test_copy_of_a_model_with_more_weights_is_refused():
    model = small_model()
    model.build((2, 3))
    model.embedding.enable_lora(2)
    with pytest.raises(UserError, match="has 2 more, as LoRA adds them"):
        model.copy()


def test_large_text_stays_where_it_is(rng, monkeypatch):
    """Batches are then slices of it; the numbers are the same."""
    ids = rng.integers(11, size=400).astype(np.int32)
    streams = ContinuousStreams(ids, 5, 4, drop_remainder=True)

    def train(most):
        monkeypatch.setattr(fitting, "_MOST_TOKENS_ON_DEVICE", most)
        model = LanguageModel(11, units=6, carry_state=True, output_dropout=0.2)
        model.compile("sgd")
        history = model.fit(streams, epochs=2, verbose=0).history
        assert (model._text_of is None) == (most < 400)
        return history["perplexity"], model.get_weights()

    perplexities, weights = train(399)
    expected, expected_weights = train(400)
    # float32, in two compilations of the same step.
    np.testing.assert_allclose(perplexities, expected, rtol=1e-5)
    for weight, truth in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, truth, rtol=1e-4, atol=1e-6)


# What Keras's users do -------------------------------------------------------


def test_metrics_of_an_earlier_compile_are_gone(rng):
    """Keras keeps them; they would be of features, as no logits are made."""
    streams = ContinuousStreams(text(rng, 41), 5, 2, drop_remainder=True)
    model = small_model()
    model.compile("sgd", metrics=["accuracy"])
    assert "accuracy" in model.fit(streams, verbose=0).history
    model.compile("sgd")
    assert {*model.fit(streams, verbose=0).history} == {"loss", "perplexity"}


@pytest.mark.parametrize("name", ["metrics", "weighted_metrics"])
def test_an_empty_list_of_metrics_is_none(rng, name):
    streams = ContinuousStreams(text(rng, 41), 5, 2, drop_remainder=True)
    model = small_model()
    model.compile("sgd", **{name: []})
    assert {*model.fit(streams, verbose=0).history} == {"loss", "perplexity"}


def test_loss_of_an_earlier_compile_is_gone(rng):
    streams = ContinuousStreams(text(rng, 41), 5, 2, drop_remainder=True)
    model = small_model()
    model.compile("sgd", "mse")
    model.compile("sgd")
    assert {*model.fit(streams, verbose=0).history} == {"loss", "perplexity"}


def test_perplexity_is_measured_before_training():
    model = LanguageModel(V, units=6, initializer_scale=1e-6)
    ids = np.arange(50, dtype=np.int32) % V
    # All words are as likely.
    assert evaluate(model, ids).perplexity == pytest.approx(V, rel=1e-4)
    carrying = small_model(carry_state=True)
    with pytest.raises(UserError, match=r"must be built before it reads"):
        evaluate(carrying, ids)


def test_copy_of_a_carrying_model_carries_too(rng):
    model = small_model(carry_state=True)
    model.build((3, 4))
    ids = text(rng, 12).reshape(3, 4)
    copy, single = model.copy(), model.copy(batch_size=1)
    np.testing.assert_array_equal(numpy(copy(ids)), numpy(model(ids)))
    second = numpy(model(ids))  # from the state after the first
    np.testing.assert_array_equal(numpy(copy(ids)), second)
    single(ids[:1])
    np.testing.assert_allclose(numpy(single(ids[:1])), second[:1], **CLOSE)
    with pytest.raises(UserError, match=r"copy\(batch_size=1\)"):
        model(ids[:1])


def test_batches_of_a_subclass_are_its_own(rng):
    """Of which `fit` otherwise reads only where the rows begin."""

    class Silent(ContinuousStreams):
        def __getitem__(self, index):
            inputs, targets = super().__getitem__(index)
            return inputs, targets, np.zeros(targets.shape, np.float32)

    class Windows(NextWordWindows):
        num_epochs = 0

        def on_epoch_end(self):
            self.num_epochs += 1

    ids = text(rng, 41)
    streams = Silent(ids, 5, 2, drop_remainder=True)
    assert not streams.is_sliced
    model = small_model()
    model.compile(SGD(1.0))
    model.build((2, 5))
    before = model.get_weights()
    model.fit(streams, verbose=0)
    for weight, kept in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, kept)
    windows = Windows(ids, 5, 2)
    model.fit(windows, epochs=3, verbose=0)
    assert windows.num_epochs >= 3  # Keras calls it once more at the end
    assert ContinuousStreams(ids, 5, 2, drop_remainder=True).is_sliced


def test_sizes_may_be_numpys(ids):
    model = LanguageModel(ids.max() + 1, units=6, embedding_dim=np.int64(4))
    assert numpy(model(ids)).shape == (3, 5, ids.max() + 1)


def test_last_batch_of_one_step_has_no_difference_to_regularize(rng):
    """Its length is known only at run time."""
    streams = VariableStreams(text(rng, 20), 9, 1, std=0.0, bucket=1)
    assert streams.lengths.tolist() == [9, 9, 1]
    model = small_model(temporal_activation_regularization=1.0)
    model.compile(SGD(0.1))
    [loss] = model.fit(streams, verbose=0).history["loss"]
    assert np.isfinite(loss)


def test_what_does_not_count_may_be_no_word(ids):
    """In the perplexity that Keras keeps as a metric, of logits."""
    model = small_model()
    logits, weights = model(ids), np.ones(ids.shape, np.float32)
    weights[:, 3:] = 0
    metric = Perplexity()
    metric.update_state(np.where(weights == 0, -1, ids), logits, weights)
    expected = Perplexity()
    expected.update_state(ids[:, :3], logits[:, :3])
    assert float(metric.result()) == pytest.approx(float(expected.result()))


def test_what_keras_masks_counts_nothing(rng):
    """Beside Keras's own metric, with padding in inputs and targets."""
    ids = np.array([[3, 5, 2, 0, 0], [4, 1, 0, 0, 0]], np.int32)
    own = keras.metrics.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Sequential(
        [
            keras.Input((None,)),
            keras.layers.Embedding(V, 4, mask_zero=True),
            keras.layers.LSTM(5, return_sequences=True),
            # Sure of padding, which would flatter it.
            keras.layers.Dense(
                V, bias_initializer=lambda *_, **__: np.eye(V)[0] * 9
            ),
        ]
    )
    model.compile(
        "sgd", metrics=[Perplexity(), own], loss=own.__class__.__name__
    )
    found = model.evaluate(ids, ids, verbose=0, return_dict=True)
    assert found["perplexity"] == pytest.approx(
        math.exp(found["sparse_categorical_crossentropy"]), rel=1e-5
    )


def test_perplexity_takes_a_word_a_row_and_weights_of_rows(ids):
    logits = np.log(np.full((3, 5, V), 1 / V, np.float32))
    logits[0, :, 3] += 2  # row 0 is surer of one word
    metric = Perplexity()
    metric.update_state(ids[:, 0], keras.ops.convert_to_tensor(logits[:, 0]))
    # float32.
    truth = oracles.perplexity(logits[:, :1], ids[:, :1])
    assert float(metric.result()) == pytest.approx(truth, rel=1e-5)
    metric.reset_state()
    weights = keras.ops.convert_to_tensor(np.float32([0, 1, 1]))
    metric.update_state(ids, keras.ops.convert_to_tensor(logits), weights)
    assert float(metric.result()) == pytest.approx(V, rel=1e-5)


def test_targets_may_have_an_axis_of_one_as_with_keras(ids):
    losses = []
    for targets in (ids, ids[..., None]):
        model = small_model()
        model.compile(SGD(0.1))
        losses += model.fit(ids, targets, verbose=0).history["loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # float32


def test_callbacks_know_that_less_perplexity_is_better(rng):
    model = small_model()
    model.compile(SGD(0.0))
    data = datasets(rng)["streams"]
    stop = keras.callbacks.EarlyStopping("val_perplexity", patience=1)
    history = model.fit(
        data, validation_data=data, epochs=5, verbose=0, callbacks=[stop]
    )
    assert len(history.epoch) == 2  # no better than the first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps_per_epoch": 3}, 6),
        ({"steps_per_epoch": 4, "validation_steps": 2}, 8),
    ],
)
def test_as_many_steps_are_trained_as_are_asked_for(rng, arguments, expected):
    data = ContinuousStreams(text(rng, 400), 5, 4, drop_remainder=True)
    model = small_model()
    model.compile()
    found = model.fit(
        data, epochs=2, validation_data=data, verbose=0, **arguments
    )
    assert int(model.optimizer.iterations) == expected
    steps = arguments.get("validation_steps")
    truth = model.evaluate(data, steps=steps, verbose=0, return_dict=True)
    # float32 sums in groups of another size.
    assert found.history["val_loss"][-1] == pytest.approx(
        truth["loss"], rel=1e-5
    )


@pytest.mark.parametrize("loss", [None, "sparse_categorical_crossentropy"])
def test_weights_of_classes_are_refused(rng, loss):
    model = small_model()
    model.compile(loss=loss)
    with pytest.raises(UserError, match="not for words; received 2 weights"):
        model.fit(datasets(rng)["streams"], class_weight={0: 1.0, 1: 2.0})


def test_model_predicts_before_compile(ids):
    model = small_model()
    truth = numpy(model(ids))
    np.testing.assert_allclose(model.predict(ids, verbose=0), truth, **CLOSE)


def test_fit_before_compile_is_told(rng):
    for data in datasets(rng).values():
        with pytest.raises(UserError, match=r"Call model.compile\(\) first"):
            small_model().fit(data)


def test_targets_that_are_not_of_the_inputs_are_told(ids):
    for targets, told in (
        (ids[:, 1:], r"of shape \(.*, 5\); received \(.*, 4\)"),
        (None, "needs targets, the next word of each; received none"),
    ):
        for build in (lambda _: None, lambda model: model(ids)):
            model = small_model()
            build(model)
            model.compile()
            with pytest.raises(UserError, match=told):
                model.fit(ids, targets, verbose=0)
            model.fit(ids, ids, verbose=0)  # it is as good as new
            assert np.isfinite(model.evaluate(ids, ids, verbose=0)).all()


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("carry_state", [False, True])
def test_model_outlives_a_mistake_in_its_data(method, carry_state, ids):
    """On JAX Keras leaves it without its arrays."""
    model = small_model(carry_state=carry_state)
    model.build((3, 5))
    model.compile()
    model.fit(ids, ids, batch_size=3, verbose=0)
    before = model.evaluate(ids, ids, batch_size=3, verbose=0)
    wrong = (ids[0],) if method == "predict" else (ids, ids[:, 1:])
    # TensorFlow, which has seen other lengths before, tells in its own words.
    with pytest.raises(Exception, match=r"; received|Incompatible shapes"):
        getattr(model, method)(*wrong, batch_size=3, verbose=0)
    again = model.evaluate(ids, ids, batch_size=3, verbose=0)
    assert again == before
    model.fit(ids, ids, batch_size=3, verbose=0)


def test_ids_are_rows_of_words(ids):
    with pytest.raises(UserError, match=r"\(batch, time\); received \(5,\)"):
        small_model()(ids[0])
    model = small_model()
    model(ids)
    with pytest.raises(UserError, match=r"\(batch, time\); received \(5,\)"):
        model(ids[0])


def test_one_hot_targets_need_a_loss_of_keras(rng):
    data = NextWordWindows(text(rng, 100), 5, 4, one_hot=V)
    model = small_model()
    model.compile()
    with pytest.raises(UserError, match=r"received shape .*11\).* one_hot out"):
        model.fit(data, verbose=0)
    model = small_model()
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    model.fit(data, verbose=0)


def test_copy_of_a_model_that_is_not_built_has_its_first_weights(ids):
    model = small_model(carry_state=True)
    copy = model.copy(batch_size=len(ids))
    np.testing.assert_array_equal(numpy(copy(ids)), numpy(model(ids)))


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is PyTorch's")
def test_jit_is_told_to_change_nothing_on_torch(rng, caplog):
    model = small_model()
    model.compile(jit_compile=True)
    assert "jit_compile=True changes nothing" in caplog.text
    model.fit(datasets(rng)["streams"], verbose=0)
    assert model.get_compile_config()["jit_compile"] is True  # for others


@pytest.mark.parametrize("scale", [1e-3, 1.0, 7.0])
def test_weights_of_words_count_by_their_shares(rng, scale):
    ids = rng.integers(V, size=(2, 5)).astype(np.int32)
    weights = rng.uniform(0.5, 1, size=(2, 4)).astype(np.float32)

    def loss(weights):
        model = small_model()
        model.compile(SGD(0.1))
        found = model.train_on_batch(
            ids[:, :-1], ids[:, 1:], sample_weight=weights
        )
        return float(np.ravel(found)[0]), float(model.perplexity.result())

    np.testing.assert_allclose(loss(scale * weights), loss(weights), rtol=1e-5)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            "float64",
            marks=pytest.mark.skipif(
                BACKEND == "jax",
                reason="JAX has float64 only where it is told to",
            ),
        ),
        "bfloat16",
    ],
)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_weights_of_another_dtype_train(rng, dtype, kind):
    ids = rng.integers(V, size=(4, 9)).astype(np.int32)
    losses = []
    for policy in ("float32", dtype):
        model = small_model(dtype=policy)
        model.compile(kind(0.1, global_clipnorm=0.5))
        found = [
            model.train_on_batch(ids[:, :-1], ids[:, 1:]) for _ in range(5)
        ]
        assert {v.dtype for v in model.trainable_variables} == {policy}
        losses.append(np.reshape(found, (5, -1))[:, 0])
    if (kind, dtype) == (Adam, "bfloat16"):
        # Where 0.999 is 1 Keras's own Adam stands still.
        allowed = -0.1 if BACKEND == "torch" else 0.02
        assert losses[1][-1] <= losses[1][0] + allowed
        return
    assert losses[1][-1] < losses[1][0]
    # bfloat16 has 8 bits, for weights too.
    tolerance = 1e-4 if dtype == "float64" else 0.03
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
