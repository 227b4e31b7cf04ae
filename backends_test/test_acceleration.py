"""accelerate: the oracle is the model that it was given, made by Keras."""

import logging
import re
from pathlib import Path

import keras
import numpy as np
import pytest

from multilstm import LSTM, UserError, accelerate

# Few shapes, since JAX compiles each operation for each shape.
BATCH, TIME, FEATURES, UNITS = 4, 3, 4, 4
# float32, with sums in another order than Keras's.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KerasLSTM = keras.layers.LSTM


@pytest.fixture
def x(rng):
    return rng.standard_normal((BATCH, TIME, FEATURES)).astype(np.float32)


@pytest.fixture
def y(rng):
    return rng.standard_normal((BATCH, 2)).astype(np.float32)


@pytest.fixture
def ids():
    """Words of which 0 is masked: right-padded, left-padded, with a hole."""
    return np.array([[1, 2, 0], [0, 3, 1], [1, 0, 2], [2, 2, 2]])


def numpy(outputs):
    return [keras.ops.convert_to_numpy(o) for o in keras.tree.flatten(outputs)]


def assert_same_outputs(copy, model, data):
    for out, truth in zip(numpy(copy(data)), numpy(model(data)), strict=True):
        assert np.abs(truth).max() > 1e-3
        np.testing.assert_allclose(out, truth, **CLOSE)


def assert_same_weights(copy, model):
    for weight, truth in zip(
        copy.get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(weight, truth)


def names(model):
    return [model.name, *(layer.name for layer in model.layers)]


def lstms(model):
    return [layer for layer in model.layers if type(layer) is LSTM]


def small_model(*layers, **lstm):
    """Keras's LSTM and a head of two outputs, after `layers`."""
    return keras.Sequential(
        [
            keras.Input((TIME, FEATURES)),
            *layers,
            KerasLSTM(UNITS, **lstm),
            keras.layers.Dense(2),
        ]
    )


# Models of every form


def test_sequential_is_the_same_model_with_our_lstm(x):
    model = keras.Sequential(
        [
            keras.Input((TIME, FEATURES), name="words"),
            KerasLSTM(UNITS, return_sequences=True, name="first"),
            KerasLSTM(UNITS, go_backwards=True, use_bias=False),
            keras.layers.Dense(2),
        ],
        name="mine",
    )
    copy = accelerate(model)
    assert type(copy) is keras.Sequential
    assert [type(layer) for layer in copy.layers][:2] == [LSTM, LSTM]
    assert names(copy) == names(model)
    assert copy.input_shape == model.input_shape
    assert copy.inputs[0].name == "words"
    assert not copy.compiled
    assert_same_weights(copy, model)
    assert_same_outputs(copy, model, x)


def test_functional_with_shared_layers_inputs_and_states(ids):
    """An encoder and a decoder that share their embedding and an LSTM."""
    source, target = (keras.Input((None,), name=n) for n in ("from", "to"))
    # As wide as what they are compared with is to be: the default is 0.05.
    embedding = keras.layers.Embedding(
        5, UNITS, embeddings_initializer="orthogonal", mask_zero=True
    )
    shared = KerasLSTM(UNITS, return_sequences=True)
    encoded, h, c = KerasLSTM(UNITS, return_state=True)(
        shared(embedding(source))
    )
    decoded = shared(embedding(target))
    decoded = KerasLSTM(UNITS, return_sequences=True)(
        decoded, initial_state=[h, c]
    )
    outputs = {
        "words": keras.layers.Dense(5, name="words")(decoded),
        "code": keras.layers.Dense(2, name="code")(encoded[:, 1:] * 2),
    }
    model = keras.Model({"from": source, "to": target}, outputs)
    copy = accelerate(model)
    assert type(copy) is type(model)
    assert names(copy) == names(model)
    assert copy.output_names == model.output_names
    assert len(lstms(copy)) == 3
    assert_same_weights(copy, model)
    # From the first step on, since with states Keras's output before the
    # first word that is not masked depends on the backend.
    data = {"from": ids, "to": np.maximum(ids, [1, 0, 0])}
    assert_same_outputs(copy, model, data)


def test_models_inside_models(x):
    inputs = keras.Input((TIME, FEATURES))
    lstm = KerasLSTM(UNITS, return_sequences=True)
    dense = keras.layers.Dense(FEATURES)
    inner = keras.Model(inputs, dense(lstm(inputs)), name="inner")
    stack = keras.Sequential(
        [inner, KerasLSTM(UNITS, return_sequences=True)], name="stack"
    )
    # The layers of `inner` also by themselves, and `stack` twice.
    outputs = stack(dense(lstm(inputs))) + keras.ops.mean(stack(inputs))
    model = keras.Model(inputs, outputs)
    copy = accelerate(model)
    assert names(copy) == names(model)
    assert names(copy.get_layer("stack")) == names(stack)
    (ours,) = lstms(copy)
    assert copy.get_layer("stack").layers[0].layers[1] is ours
    assert_same_weights(copy, model)
    assert_same_outputs(copy, model, x)


def test_sequential_not_built_stays_so(x):
    model = keras.Sequential([KerasLSTM(UNITS), keras.layers.Dense(2)])
    copy = accelerate(model)
    assert names(copy) == names(model)
    assert not copy.built
    model.build(x.shape)
    copy.build(x.shape)
    copy.set_weights(model.get_weights())
    assert_same_outputs(copy, model, x)


def test_layers_built_before_their_model_keep_their_weights(x):
    model = keras.Sequential([KerasLSTM(3), keras.layers.Dense(2)])
    model.layers[0].build((None, TIME, FEATURES))
    model.layers[1].build((None, 3))
    copy = accelerate(model)
    assert_same_weights(copy, model)
    assert_same_outputs(copy, model, x)


def test_inputs_stay_optional(x):
    class AddIfGiven(keras.layers.Layer):
        def call(self, first, second=None):
            return first if second is None else first + second

    inputs = [
        keras.Input((TIME, FEATURES)),
        keras.Input((UNITS,), optional=True),
    ]
    outputs = AddIfGiven()(KerasLSTM(UNITS)(inputs[0]), inputs[1])
    model = keras.Model(inputs, outputs)
    copy = accelerate(model)
    for second in (None, np.ones((BATCH, UNITS), np.float32)):
        assert_same_outputs(copy, model, [x, second])


def test_lambda_layers_are_copied(x):
    scale = 3.0
    double = keras.layers.Lambda(
        lambda it, by: by * scale * keras.ops.flip(it, axis=1),
        arguments={"by": 2.0},
        name="double",
    )
    model = small_model(double)
    copy = accelerate(model)
    assert copy.layers[0] is not double
    assert copy.layers[0].name == "double"
    assert_same_outputs(copy, model, x)


class WithOwnStep(keras.Model):
    def train_step(self, *arguments):
        raise NotImplementedError


def test_class_with_a_train_step_of_its_own_is_kept():
    inputs = keras.Input((TIME, FEATURES))
    model = WithOwnStep(inputs, KerasLSTM(UNITS)(inputs))
    copy = accelerate(model)
    assert type(copy) is WithOwnStep
    assert names(copy) == names(model)


def test_masked_words_stay_masked(ids):
    inputs = keras.Input((TIME,))
    hidden = keras.layers.Embedding(
        4, UNITS, embeddings_initializer="orthogonal", mask_zero=True
    )(inputs)
    hidden = KerasLSTM(UNITS, return_sequences=True)(hidden)
    # The mean counts the steps that the mask leaves.
    mean = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(inputs, [hidden, mean, KerasLSTM(UNITS)(hidden)])
    assert_same_outputs(accelerate(model), model, ids)


def test_masking_layer_stays(x):
    x[0, 1:] = x[1, 0] = 0.0
    model = small_model(keras.layers.Masking())
    assert_same_outputs(accelerate(model), model, x)


# What the layers hold


def test_frozen_layers_and_weights_stay_frozen():
    inner = keras.Sequential(
        [keras.Input((TIME, FEATURES)), KerasLSTM(UNITS), keras.layers.Dense(3)]
    )
    inputs = keras.Input((TIME, FEATURES))
    hidden = keras.layers.Bidirectional(
        KerasLSTM(FEATURES, return_sequences=True), merge_mode="sum"
    )(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(hidden)))
    model.trainable = False
    inner.trainable = True
    inner.layers[0].cell.bias.trainable = False
    inner.layers[1].trainable = False
    model.layers[1].trainable = True
    model.layers[1].backward_layer.trainable = False
    copy = accelerate(model)

    def flags(model):
        inner, bidirectional = model.layers[2], model.layers[1]
        return [
            it.trainable
            for it in (
                *(model, inner, *inner.layers, *model.layers, *model.weights),
                *(bidirectional.forward_layer, bidirectional.backward_layer),
            )
        ]

    assert len({*flags(model)}) == 2
    assert flags(copy) == flags(model)


def test_dtype_policies_are_kept(x):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model(return_sequences=True)
    finally:
        keras.config.set_dtype_policy("float32")
    model.add(KerasLSTM(UNITS, dtype="float32"))
    copy = accelerate(model)

    def policies(model):
        return [it.dtype_policy.name for it in (model, *model.layers)]

    assert policies(model) == ["mixed_bfloat16"] * 3 + ["float32"]
    assert policies(copy) == policies(model)
    assert [w.dtype for w in copy.weights] == [w.dtype for w in model.weights]
    assert_same_weights(copy, model)


def test_statistics_of_batches_are_carried(x):
    normalization = keras.layers.Normalization()
    normalization.adapt(3 * x + 1)
    batch = keras.layers.TimeDistributed(keras.layers.BatchNormalization())
    model = small_model(normalization, batch)
    model(2 * x, training=True)
    assert np.abs(batch.layer.get_weights()[2]).max() > 1e-3
    assert_same_outputs(accelerate(model), model, x)


def test_state_that_keras_carries_is_carried_on(x):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=x.shape),
            KerasLSTM(UNITS, stateful=True, return_sequences=True),
            KerasLSTM(UNITS),
        ]
    )
    model(x)
    start = numpy(model.layers[0].states)
    assert np.abs(start).max() > 1e-3
    copy = accelerate(model)
    for state, truth in zip(numpy(copy.layers[0].states), start, strict=True):
        np.testing.assert_array_equal(state, truth)


def seeds(layer):
    return [
        keras.ops.convert_to_numpy(variable)
        for variable in layer.variables
        if not any(variable is weight for weight in layer.weights)
    ]


def test_dropout_goes_on_from_the_same_seeds(x):
    model = small_model(
        keras.layers.Dropout(0.5, seed=1),
        keras.layers.GaussianNoise(0.5, seed=2),
        dropout=0.25,
        seed=3,
    )
    model(x, training=True)
    copy = accelerate(model)
    for ours, theirs in zip(copy.layers[:3], model.layers[:3], strict=True):
        np.testing.assert_array_equal(seeds(ours), seeds(theirs))
        assert seeds(ours)[0][1] > 0
    np.testing.assert_allclose(
        numpy(copy(x, training=True))[0],
        numpy(model(x, training=True))[0],
        **CLOSE,
    )


class Words(keras.layers.Layer):
    """What a TextVectorization is to Keras: its words are no weights."""

    words = ()

    def call(self, x):
        return x * len(self.words)

    def save_assets(self, folder):
        Path(folder, "words.txt").write_text(" ".join(self.words))

    def load_assets(self, folder):
        self.words = tuple(Path(folder, "words.txt").read_text().split())


def test_vocabularies_are_carried(x):
    model = small_model(Words())
    model.layers[0].words = ("two", "words")
    assert_same_outputs(accelerate(model), model, x)


class Tied(keras.layers.Layer):
    """A layer whose configuration does not know that it shares a weight."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.other = other

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.other.kernel))

    def get_config(self):
        other = keras.saving.serialize_keras_object(self.other)
        return {**super().get_config(), "other": other}

    @classmethod
    def from_config(cls, config):
        other = keras.saving.deserialize_keras_object(config.pop("other"))
        return cls(other, **config)


def test_weights_that_come_apart_are_named(x, caplog):
    dense = keras.layers.Dense(UNITS)
    model = keras.Sequential(
        [
            *(keras.Input((TIME, FEATURES)), dense),
            *(KerasLSTM(UNITS, return_sequences=True), Tied(dense)),
        ]
    )
    copy = accelerate(model)
    assert_same_outputs(copy, model, x)
    (record,) = caplog.records
    assert "not carried: that layers share a weight" in record.message


# What is left as it is


class Derived(KerasLSTM):
    pass


def tanh(x):
    """LeCun's, which has the name of another one."""
    return 1.7159 * keras.ops.tanh(2 * x / 3)


class Block(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.held = [KerasLSTM(units, return_sequences=True)]

    def build(self, shape):
        self.held[0].build(shape)

    def call(self, x):
        return self.held[0](x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def each_row(units):
    """An LSTM over the features, at each time step."""
    stack = [keras.layers.Reshape((FEATURES, 1)), KerasLSTM(units)]
    return keras.layers.TimeDistributed(keras.Sequential(stack))


LEFT = {
    "bidirectional": (
        lambda **kw: keras.layers.Bidirectional(
            KerasLSTM(UNITS, **kw), name="it"
        ),
        "inside a Bidirectional",
    ),
    "time_distributed": (
        lambda **_: each_row(UNITS),
        "inside a TimeDistributed",
    ),
    "other layer": (lambda **_: Block(UNITS), "inside a Block"),
    "cell": (
        lambda **kw: keras.layers.RNN(keras.layers.LSTMCell(UNITS), **kw),
        "keras.layers.RNN of LSTMCell",
    ),
    "derived": (
        lambda **kw: Derived(UNITS, **kw),
        "its class is Derived, not keras.layers.LSTM",
    ),
    "other tanh": (
        lambda **kw: KerasLSTM(UNITS, activation=tanh, **kw),
        "`activation` must be 'tanh', .* of .*test_acceleration",
    ),
    **{
        argument: (
            lambda it={argument: value}, **kw: KerasLSTM(UNITS, **it, **kw),
            f"`{argument}` {reason}",
        )
        for argument, value, reason in (
            (
                "stateful",
                True,
                "is not an argument of this LSTM; received True",
            ),
            ("recurrent_dropout", 0.5, "is not an argument .* received 0.5"),
            ("unroll", True, "is not an argument .* received True"),
            ("zero_output_for_mask", True, "is not an argument"),
            ("activation", "relu", "must be 'tanh', .* received 'relu'"),
            ("recurrent_activation", "tanh", "must be 'sigmoid'"),
        )
    },
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT.keys())
def test_what_is_left_is_named_with_the_reason(make, reason, x, caplog):
    layer = make(return_sequences=True)
    model = keras.Sequential(
        [
            keras.Input(batch_shape=x.shape),
            keras.Sequential([layer], name="in"),
            KerasLSTM(UNITS),
        ]
    )
    copy = accelerate(model)
    assert type(copy.layers[0].layers[0]) is type(layer)
    assert type(copy.layers[1]) is LSTM
    assert_same_weights(copy, model)
    (record,) = caplog.records
    assert (record.name, record.levelno) == (
        "multilstm.acceleration",
        logging.WARNING,
    )
    assert "\n" not in record.message
    message = rf"{model.name}\): left as they are: in/{layer.name} \({reason}"
    assert re.search(message, record.message)


def test_one_warning_names_all_that_is_left(x, caplog):
    model = small_model(
        KerasLSTM(UNITS, activation="relu", return_sequences=True, name="a"),
        keras.layers.Bidirectional(
            KerasLSTM(UNITS, return_sequences=True), name="b"
        ),
    )
    assert_same_outputs(accelerate(model), model, x)
    (record,) = caplog.records
    assert re.search(r": a \(.*\), b \(inside", record.message)


def test_nothing_is_said_where_nothing_is_left(caplog):
    model = small_model(keras.layers.GRU(3, return_sequences=True))
    model.compile("adam", "mse")
    accelerate(model)
    assert not caplog.records


def test_what_is_left_keeps_its_kernel():
    kept = KerasLSTM(UNITS, unroll=True, use_cudnn=False, return_sequences=True)
    kept.supports_jit = False
    copy = accelerate(small_model(kept))
    assert copy.layers[0].use_cudnn is False
    assert copy.layers[0].supports_jit is False


# Training goes on


def assert_trains_on_alike(copy, model, x, y):
    """The same losses and metrics, and the same weights after two steps."""
    start = model.get_weights()
    trained = [
        [np.array(it.train_on_batch(x, y)) for _ in range(2)]
        for it in (copy, model)  # the copy's steps leave the model alone
    ]
    # float32, two steps.
    np.testing.assert_allclose(*trained, rtol=1e-4)
    for ours, truth, before in zip(
        copy.get_weights(), model.get_weights(), start, strict=True
    ):
        assert np.abs(truth - before).max() > 1e-4
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)


def pretend_to_have_trained(model):
    """Gives the optimizer a state, as some steps would."""
    model.optimizer.build(model.trainable_variables)
    for number, variable in enumerate(model.optimizer.variables):
        variable.assign(variable + number)


def assert_same_optimizers(copy, model):
    ours, theirs = copy.optimizer, model.optimizer
    assert type(ours) is type(theirs)
    assert ours.get_config() == theirs.get_config()
    for state, truth in zip(
        numpy(ours.variables), numpy(theirs.variables), strict=True
    ):
        np.testing.assert_array_equal(state, truth)


def test_training_goes_on_as_it_would_have(x, y):
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    model = small_model(keras.layers.Dense(FEATURES), kernel_regularizer="l2")
    model.compile(
        keras.optimizers.Adam(decay, global_clipnorm=1.0, use_ema=True),
        loss=keras.losses.Huber(0.5),
        metrics=["mae", keras.metrics.RootMeanSquaredError()],
    )
    for _ in range(3):
        model.train_on_batch(x, y)
    copy = accelerate(model)
    assert copy.optimizer.iterations == 3
    assert_same_optimizers(copy, model)
    assert copy.get_compile_config() == model.get_compile_config()
    assert_trains_on_alike(copy, model, x, y)


def own_loss(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 2, axis=-1)


def test_losses_of_the_users_own_are_carried(x, y, caplog):
    inputs = keras.Input((TIME, FEATURES))
    hidden = KerasLSTM(UNITS)(inputs)
    outputs = {n: keras.layers.Dense(2, name=n)(hidden) for n in "abc"}
    model = keras.Model(inputs, outputs)
    model.compile(
        "sgd",
        {"a": own_loss, "b": lambda t, p: 2.0 * own_loss(t, p), "c": "mse"},
        loss_weights={"a": 1.0, "b": 0.5, "c": 2.0},
        metrics={"b": ["mae"]},
    )
    model.optimizer.learning_rate = 0.1
    targets = {"a": y, "b": 2 * y, "c": y}
    assert_trains_on_alike(accelerate(model), model, x, targets)
    assert not caplog.records


def test_scaled_loss_of_float16_is_carried():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = small_model()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("sgd", "mse", run_eagerly=True)
    pretend_to_have_trained(model)
    copy = accelerate(model)
    assert isinstance(copy.optimizer, keras.optimizers.LossScaleOptimizer)
    assert_same_optimizers(copy, model)
    assert copy.run_eagerly


def test_loss_is_not_scaled_where_it_was_not():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = small_model()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("sgd", "mse", auto_scale_loss=False)
    scaled = keras.optimizers.LossScaleOptimizer
    assert not isinstance(accelerate(model).optimizer, scaled)


def test_compiled_model_inside_stays_compiled():
    inner = small_model()
    inner.compile("adam", "mse")
    pretend_to_have_trained(inner)
    model = keras.Sequential([inner, keras.layers.Dense(2)])
    copy = accelerate(model)
    assert not copy.compiled
    assert_same_optimizers(copy.layers[0], inner)


def test_metrics_that_cannot_be_carried_are_named(caplog):
    model = small_model()
    model.compile("sgd", "mse", metrics=[own_loss], weighted_metrics=["mae"])
    settings = accelerate(model).get_compile_config()
    assert (settings["metrics"], settings["weighted_metrics"]) == (
        None,
        ["mae"],
    )
    (record,) = caplog.records
    assert re.search("not carried: metrics of .*'own_loss'", record.message)


def test_state_for_other_weights_is_not_carried_and_named(caplog):
    model = small_model()
    model.compile("adam", "mse")
    pretend_to_have_trained(model)
    model.layers[0].trainable = False
    copy = accelerate(model)
    assert copy.optimizer.iterations == 0
    (record,) = caplog.records
    assert "the state of the optimizer" in record.message


class OwnCompile(keras.Sequential):
    def compile(self, **arguments):
        super().compile("sgd", "mse")


def test_what_only_a_class_can_compile_is_named(caplog):
    model = OwnCompile(small_model().layers)
    model.compile()
    copy = accelerate(model)
    assert type(copy) is OwnCompile
    assert not copy.compiled
    (record,) = caplog.records
    assert "has a `compile` of its own" in record.message


def test_optimizer_that_cannot_be_carried_is_named(caplog):
    model = small_model()
    model.compile(keras.optimizers.SGD(lambda: 0.1), "mse")
    assert not accelerate(model).compiled
    (record,) = caplog.records
    assert f"not carried: what {model.name} is compiled" in record.message


def test_jit_is_decided_anew_where_keras_lstm_forbade_it():
    fresh = small_model()
    fresh.compile()
    model = small_model()
    model.layers[0].supports_jit = False  # as TensorFlow's is on a GPU
    model.compile()
    assert model.jit_compile is False
    assert accelerate(model).jit_compile is fresh.jit_compile
    fresh.compile(jit_compile=False)
    assert accelerate(fresh).jit_compile is False


# The model itself


def test_model_is_left_as_it_was(x, y):
    inner = small_model(keras.layers.BatchNormalization())
    inputs = keras.Input((TIME, FEATURES))
    first = KerasLSTM(FEATURES, return_sequences=True)
    model = keras.Model(inputs, inner(first(inputs)))
    model.compile("adam", "mse")
    pretend_to_have_trained(model)
    model.trainable = False
    inner.layers[0].trainable = True

    def state(model):
        variables = [*model.variables, *model.optimizer.variables]
        return [*map(np.array, numpy(variables))]

    def settings(model):
        layers = [*model.layers, *inner.layers]
        flags = [(it.trainable, it.name, type(it)) for it in layers]
        return flags, model.get_config(), model.get_compile_config()

    before = state(model), settings(model)
    outputs = [layer.output for layer in model.layers]
    copy = accelerate(model)
    copy.trainable = True
    copy.compile("adam", "mse")
    copy.train_on_batch(x, y)
    assert settings(model) == before[1]
    for now, then in zip(state(model), before[0], strict=True):
        np.testing.assert_array_equal(now, then)
    # A layer that was called once more would have two outputs.
    for layer, output in zip(model.layers, outputs, strict=True):
        assert layer.output is output


def test_loaded_model_is_accelerated_and_saved_again(x, tmp_path):
    model = small_model()
    model.compile("adam", "mse")
    pretend_to_have_trained(model)
    model.save(tmp_path / "keras.keras")
    loaded = keras.models.load_model(tmp_path / "keras.keras")
    copy = accelerate(loaded)
    assert_same_optimizers(copy, model)
    assert_same_outputs(copy, model, x)
    copy.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    assert type(again.layers[0]) is LSTM
    assert_same_optimizers(again, model)
    assert_same_weights(again, model)
    assert_same_outputs(again, copy, x)


# What is refused


class OwnCode(keras.Model):
    def __init__(self):
        super().__init__()
        self.lstm = KerasLSTM(UNITS)

    def call(self, x):
        return self.lstm(x)


class OwnConstructor(keras.Model):
    def __init__(self, units):
        inputs = keras.Input((TIME, FEATURES))
        super().__init__(inputs, KerasLSTM(units)(inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OwnCode, "must be a keras.Sequential .*class OwnCode.* Build it with"),
        (lambda: OwnConstructor(2), "class OwnConstructor.* Build it with"),
        (lambda: KerasLSTM(UNITS), "must be a Keras model.*class LSTM. Pass a"),
        (lambda: "model.keras", "must be a Keras model.*class str. Pass a"),
    ],
    ids=["code", "constructor", "layer", "str"],
)
def test_what_is_no_graph_of_layers_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        accelerate(make())


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (lambda: keras.layers.GRU(2), r"no LSTM \(its layers: Dense, GRU\)"),
        (
            lambda: KerasLSTM(UNITS, unroll=True, name="it"),
            r"it \(`unroll` is not .*\) \(its layers: Dense, LSTM\)",
        ),
        (
            lambda: keras.layers.Bidirectional(KerasLSTM(UNITS), name="it"),
            r"it \(inside a Bidirectional\)",
        ),
        (lambda: LSTM(2), r"multilstm.layers.LSTM already \("),
    ],
    ids=["none", "unroll", "bidirectional", "ours"],
)
def test_model_with_nothing_to_replace_is_refused(layer, found, caplog):
    model = keras.Sequential([layer(), keras.layers.Dense(2)], name="mine")
    message = f"must have a keras.layers.LSTM .* 'mine', which has {found}"
    with pytest.raises(UserError, match=message):
        accelerate(model)
    assert not caplog.records


class NoConfig(keras.layers.Layer):
    def __init__(self, function):
        super().__init__(name="it")
        self.function = function


class Forgetful(keras.layers.Layer):
    """Has a weight more than its configuration tells."""

    def __init__(self, size=0, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def build(self, shape):
        if self.size:
            self.add_weight(shape=(self.size,))

    def get_config(self):
        return super().get_config()

    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: NoConfig(len), "'it' of the class NoConfig, which does not"),
        (
            lambda: keras.layers.Dense(FEATURES, activation=own_loss),
            "Dense, which does not: Could not .*'own_loss'. Give it those",
        ),
        (lambda: Forgetful(2), "Forgetful.*the copy holds other .*weights"),
    ],
    ids=["no config", "activation", "weights"],
)
def test_layer_that_cannot_be_copied_is_named(layer, message):
    model = keras.Sequential([layer(), KerasLSTM(UNITS)])
    if isinstance(model.layers[0], Forgetful):
        model.build((None, TIME, FEATURES))
    with pytest.raises(UserError, match=message) as refused:
        accelerate(model)
    assert "\n" not in str(refused.value)
