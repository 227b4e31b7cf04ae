"""LSTM and Embedding against Keras's own, and the state that lasts."""

import keras
import numpy as np
import oracles
import pytest

from multilstm import LSTM, Embedding, ResetCarriedState
from multilstm.errors import UserError
from multilstm.layers import reset_carried_state

BATCH, TIME, FEATURES, UNITS = 2, 3, 4, 5
# float32, with sums in another order than Keras's or NumPy's.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def x(rng):
    return rng.standard_normal((BATCH, TIME, FEATURES)).astype(np.float32)


def numpy(outputs):
    return [keras.ops.convert_to_numpy(o) for o in keras.tree.flatten(outputs)]


def built(layer):
    layer.build((BATCH, TIME, FEATURES))
    return layer


def arguments_id(arguments):
    return ",".join(f"{k}={v}" for k, v in arguments.items()) or "defaults"


def test_lstm_takes_its_inputs_by_the_name_that_keras_has(x):
    ours, theirs = built(LSTM(UNITS)), built(keras.layers.LSTM(UNITS))
    theirs.set_weights(ours.get_weights())
    [out], [truth] = numpy(ours(sequences=x)), numpy(theirs(sequences=x))
    np.testing.assert_allclose(out, truth, **CLOSE)


def test_input_without_time_steps_is_refused_as_by_keras(x):
    layer = LSTM(UNITS)
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=2"):
        layer(x[0])
    layer(x)
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(x[..., :-1])


def test_what_keras_takes_and_changes_nothing_is_taken(x, caplog):
    layer = built(LSTM(UNITS, implementation=2, use_cudnn=False, unroll=False))
    assert "use_cudnn=False" in caplog.text
    assert tuple(layer(x).shape) == (BATCH, UNITS)


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="PyTorch's kernels read so"
)
def test_weights_are_stored_as_the_kernel_reads_them_and_keep_their_values(x):
    layer = built(LSTM(UNITS))
    before = layer.get_weights()
    layer(x)
    assert layer.kernel.value.T.is_contiguous()
    assert layer.recurrent_kernel.value.T.is_contiguous()
    for weight, truth in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, truth)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"return_sequences": True, "return_state": True},
        {"go_backwards": True, "return_sequences": True},
        {"use_bias": False},
        pytest.param(
            {"use_bias": False, "dtype": "float64"},
            marks=pytest.mark.skipif(
                keras.config.backend() == "jax",
                reason="JAX has float64 only where it is told to",
            ),
        ),
        {"unit_forget_bias": False, "bias_initializer": "ones"},
    ],
    ids=arguments_id,
)
def test_lstm_and_keras_lstm_take_each_others_weights(arguments, x):
    ours = built(LSTM(UNITS, **arguments))
    theirs = built(keras.layers.LSTM(UNITS, **arguments))
    if arguments.get("use_bias", True):  # the biases are no random draw
        np.testing.assert_array_equal(
            ours.get_weights()[2], theirs.get_weights()[2]
        )
    ours.set_weights(theirs.get_weights())
    for out, truth in zip(numpy(ours(x)), numpy(theirs(x)), strict=True):
        np.testing.assert_allclose(out, truth, **CLOSE)
    other = built(LSTM(UNITS, **arguments))
    theirs.set_weights(other.get_weights())
    for out, truth in zip(numpy(other(x)), numpy(theirs(x)), strict=True):
        np.testing.assert_allclose(out, truth, **CLOSE)


@pytest.mark.parametrize(
    "arguments",
    [
        {"return_sequences": True},
        {"return_sequences": True, "go_backwards": True},
        {"use_bias": False},
        {
            "kernel_regularizer": "l2",
            "recurrent_regularizer": "l2",
            "bias_regularizer": "l2",
            "kernel_constraint": "non_neg",
            "recurrent_constraint": "non_neg",
            "bias_constraint": "non_neg",
        },
    ],
    ids=["sequences", "go_backwards", "use_bias=False", "regularized"],
)
def test_one_training_step_is_keras_lstm_step(arguments, x, rng):
    models = [
        keras.Sequential(
            [keras.Input((TIME, FEATURES)), layer(UNITS, **arguments)]
        )
        for layer in (keras.layers.LSTM, LSTM)
    ]
    start = models[0].get_weights()
    y = rng.standard_normal(models[0].output_shape[1:])
    y = np.stack([y] * BATCH).astype(np.float32)
    for model in models:
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(1.0), loss="mse")
        model.train_on_batch(x, y)
    for before, truth, ours in zip(
        start, *(model.get_weights() for model in models), strict=True
    ):
        assert np.abs(truth - before).max() > 1e-3
        np.testing.assert_allclose(ours, truth, **CLOSE)


MASKS = {
    "right-padded": [[1, 1, 1], [1, 0, 0]],
    "left-padded": [[0, 1, 1], [0, 0, 1]],
    "holes": [[1, 0, 1], [0, 1, 0]],
    "empty": [[0, 0, 0], [1, 1, 1]],
}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"return_sequences": True, "return_state": True},
        {"return_sequences": True, "go_backwards": True},
    ],
    ids=arguments_id,
)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masked_steps_are_those_of_keras_lstm(mask, arguments, x, rng):
    mask = np.array(mask, bool)
    ours = built(LSTM(UNITS, **arguments))
    # Its fast path would be asked for right-padded masks alone.
    theirs = built(keras.layers.LSTM(UNITS, use_cudnn=False, **arguments))
    theirs.set_weights(ours.get_weights())
    states = [None]
    if mask[:, 0].all() and not arguments.get("go_backwards"):
        # Otherwise Keras's own output depends on the backend.
        state = rng.standard_normal((2, BATCH, UNITS)).astype(np.float32)
        states.append(list(state))
    for initial_state in states:
        got = ours(x, initial_state=initial_state, mask=mask)
        truth = theirs(x, initial_state=initial_state, mask=mask)
        for out, expected in zip(numpy(got), numpy(truth), strict=True):
            np.testing.assert_allclose(out, expected, **CLOSE)


@pytest.mark.parametrize(
    "shapes",
    [
        [(BATCH + 1, UNITS)] * 2,
        [(BATCH, UNITS), (BATCH + 1, UNITS)],
        [(2 * BATCH, UNITS)] * 2,
        [(BATCH, UNITS - 1)] * 2,
        [(BATCH, 4 * UNITS)] * 2,
        [(UNITS,)] * 2,
        [(BATCH, UNITS)],
        [(BATCH, UNITS)] * 3,
    ],
    ids=str,
)
def test_states_of_another_shape_are_refused(shapes, x):
    """PyTorch's kernel would read what lies behind them."""
    states = [np.zeros(shape, np.float32) for shape in shapes]
    with pytest.raises(UserError, match="`initial_state` must be h and c"):
        LSTM(UNITS)(x, initial_state=states)


def test_a_state_or_a_mask_of_one_row_is_that_of_all(x, rng):
    layer = LSTM(UNITS)
    states = rng.standard_normal((2, 1, UNITS)).astype(np.float32)
    mask = rng.random((1, TIME)) < 0.5
    each = [np.repeat(state, BATCH, 0) for state in states]
    truth = numpy(layer(x, initial_state=each, mask=np.repeat(mask, BATCH, 0)))
    for out in (
        layer(x, initial_state=[*states], mask=mask),
        layer(x, initial_state=each, mask=np.repeat(mask, BATCH, 0)[..., None]),
    ):
        np.testing.assert_array_equal(numpy(out), truth)


def test_a_row_for_all_is_one_for_batches_of_any_size(rng):
    """TensorFlow does not know their size where the last one is smaller."""
    state, mask = np.ones((1, UNITS), np.float32), np.ones((1, TIME), bool)
    mask[0, 1] = False

    class FromOneState(keras.Model):
        def __init__(self):
            super().__init__()
            self.lstm = LSTM(UNITS)

        def call(self, x):
            return self.lstm(x, initial_state=[state, state], mask=mask)

    model = FromOneState()
    x = rng.standard_normal((5, TIME, FEATURES)).astype(np.float32)
    out = model.predict(x, batch_size=2, verbose=0)
    np.testing.assert_allclose(out, *numpy(model(x)), **CLOSE)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="others know all ranks"
)
def test_states_of_no_known_rank_are_taken(x, rng):
    import tensorflow as tf

    layer = built(LSTM(UNITS))
    state = rng.standard_normal((BATCH, UNITS)).astype(np.float32)

    @tf.function
    def run(x):
        h = tf.numpy_function(lambda: state, [], tf.float32)
        return layer(x, initial_state=[h, h])

    [truth] = numpy(layer(x, initial_state=[state, state]))
    np.testing.assert_allclose(run(x).numpy(), truth, **CLOSE)


@pytest.mark.parametrize(
    "shape", [(BATCH, TIME - 1), (BATCH + 1, TIME), (BATCH, TIME, 2)], ids=str
)
def test_masks_of_another_shape_are_refused(shape, x):
    with pytest.raises(UserError, match="`mask` must have the shape"):
        LSTM(UNITS)(x, mask=np.ones(shape, bool))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.export
@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="of PyTorch's operators"
)
def test_masked_layer_exports_without_operators_that_onnx_lacks(x):
    import torch

    ours, theirs = built(LSTM(UNITS)), built(keras.layers.LSTM(UNITS))
    theirs.set_weights(ours.get_weights())
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool)
    inputs = (torch.from_numpy(x), None, mask)
    exported = torch.export.export(ours, inputs)
    names = {str(node.target) for node in exported.graph.nodes}
    assert "aten.lstm.input" in names
    for lacking in ("argsort", "take_along_dim"):
        assert not any(name.startswith(f"aten.{lacking}") for name in names)
    [out], [truth] = numpy(exported.module()(*inputs)), numpy(theirs(*inputs))
    np.testing.assert_allclose(out, truth, **CLOSE)


def test_mask_of_an_embedding_goes_through_to_the_loss(rng):
    ids = np.array([[1, 2, 0], [3, 0, 0]], np.int32)
    y = rng.standard_normal((2, 3, 2)).astype(np.float32)
    models = [
        keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Embedding(4, FEATURES, mask_zero=True),
                lstm(UNITS, return_sequences=True),
                keras.layers.Dense(2),
            ]
        )
        for lstm in (LSTM, keras.layers.LSTM)
    ]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.compile(loss="mse")
    ours, theirs = (model.evaluate(ids, y, verbose=0) for model in models)
    # float32.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    padded = y * np.array([[[1], [1], [0]], [[1], [0], [0]]])
    assert abs(models[0].evaluate(ids, padded, verbose=0) - ours) < 1e-6


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="its converter takes models on TensorFlow",
)
# It moves to a package of its own.
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize(
    ("rows", "time", "return_sequences"),
    [(1, TIME, False), (1, TIME, True), (BATCH, None, True)],
    ids=["row", "sequence", "batch of any length"],
)
def test_what_tensorflow_lite_makes_of_it_gives_keras_outputs(
    rows, time, return_sequences, x
):
    import tensorflow as tf

    def model_of(kind):
        return keras.Sequential(
            [
                keras.Input((time, FEATURES), batch_size=rows),
                kind(UNITS, return_sequences=return_sequences),
                keras.layers.Dense(1),
            ]
        )

    x = x[:rows]
    ours, theirs = model_of(LSTM), model_of(keras.layers.LSTM)
    ours.set_weights(theirs.get_weights())
    converted = tf.lite.TFLiteConverter.from_keras_model(ours).convert()
    interpreter = tf.lite.Interpreter(model_content=converted)
    [given] = interpreter.get_input_details()
    [output] = interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    got = interpreter.get_tensor(output["index"])
    np.testing.assert_allclose(got, numpy(theirs(x))[0], **CLOSE)


def test_bidirectional_wraps_it_as_keras_lstm(x, tmp_path):
    models = [
        keras.Sequential(
            [
                keras.Input((TIME, FEATURES)),
                keras.layers.Bidirectional(lstm(UNITS, return_sequences=True)),
            ]
        )
        for lstm in (LSTM, keras.layers.LSTM)
    ]
    models[1].set_weights(models[0].get_weights())
    ours, theirs = (numpy(model(x))[0] for model in models)
    assert ours.shape == (BATCH, TIME, 2 * UNITS)
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    models[0].save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(numpy(loaded(x))[0], ours, **CLOSE)


def test_dropout_has_one_mask_for_all_time_steps():
    ones = np.ones((32, 4, 1), np.float32)
    layer = LSTM(3, dropout=0.5, return_sequences=True, seed=1)
    plain = LSTM(3, return_sequences=True)
    dropped = numpy(layer(ones, training=True))[0]
    plain.build(ones.shape)
    plain.set_weights(layer.get_weights())
    # A row has lost its one feature at every step or has it doubled.
    lost, kept = numpy(plain(0 * ones))[0], numpy(plain(2 * ones))[0]
    is_kept = np.isclose(dropped, kept, atol=1e-6).all(axis=(1, 2))
    is_lost = np.isclose(dropped, lost, atol=1e-6).all(axis=(1, 2))
    assert np.all(is_kept ^ is_lost)
    assert 0 < is_kept.sum() < 32


@pytest.mark.parametrize(
    ("dropout", "training"), [(0.0, True), (0.5, False), (0.5, None)]
)
def test_dropout_zero_or_inference_changes_nothing(dropout, training, x):
    layer = built(LSTM(UNITS, dropout=dropout))
    plain = built(LSTM(UNITS))
    plain.set_weights(layer.get_weights())
    out = numpy(layer(x, training=training))[0]
    np.testing.assert_array_equal(out, numpy(plain(x))[0])


def test_config_brings_the_same_layer_back():
    layer = LSTM(
        UNITS,
        use_bias=False,
        kernel_initializer="he_normal",
        recurrent_regularizer=keras.regularizers.L2(0.5),
        bias_constraint="non_neg",
        unit_forget_bias=False,
        dropout=0.25,
        return_sequences=True,
        return_state=True,
        go_backwards=True,
        carry_state=True,
        seed=4,
        name="mine",
    )
    again = LSTM.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.recurrent_regularizer.l2 == 0.5


def test_config_of_keras_lstm_builds_ours(x):
    theirs = built(
        keras.layers.LSTM(
            UNITS, return_sequences=True, kernel_regularizer="l2", name="it"
        )
    )
    ours = built(LSTM.from_config(theirs.get_config()))
    ours.set_weights(theirs.get_weights())
    np.testing.assert_allclose(numpy(ours(x))[0], numpy(theirs(x))[0], **CLOSE)
    assert ours.name == "it"
    assert isinstance(ours.kernel_regularizer, keras.regularizers.L2)


@pytest.mark.parametrize(
    "carry_state", [False, True], ids="carry_state={}".format
)
def test_saved_sequential_gives_the_same_output(carry_state, x, tmp_path):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(BATCH, TIME, FEATURES)),
            LSTM(UNITS, return_sequences=True, carry_state=carry_state),
            keras.layers.TimeDistributed(keras.layers.Dense(7)),
        ]
    )
    model.save(tmp_path / "model.keras")
    expected = numpy(model(x))[0]
    assert expected.shape == (BATCH, TIME, 7)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(numpy(loaded(x))[0], expected, **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": 0}, "`units` must be .* received 0"),
        ({"units": 2.5}, "`units` must be .* received 2.5"),
        ({"activation": "relu"}, "`activation` must be 'tanh'.*'relu'"),
        ({"activation": keras.activations.relu}, "received 'relu'"),
        ({"recurrent_activation": "tanh"}, "must be 'sigmoid'"),
        ({"stateful": True}, "`stateful`.*carry_state=True"),
        ({"recurrent_dropout": 0.1}, "`recurrent_dropout`.*received 0.1"),
        ({"unroll": True}, "`unroll` is not an argument"),
        ({"use_cudnn": True}, "`use_cudnn` is not an argument"),
    ],
)
def test_what_the_lstm_cannot_do_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        LSTM(**{"units": UNITS} | arguments)


def tanh(x):
    """LeCun's, which has the name of another one."""
    return 1.7159 * keras.ops.tanh(2 * x / 3)


def test_activation_of_the_same_name_is_not_the_same():
    with pytest.raises(UserError, match=r"'tanh' of .*test_layers"):
        LSTM(UNITS, activation=tanh)
    LSTM(UNITS, activation=keras.activations.tanh)
    LSTM(UNITS, activation=keras.ops.tanh)


def test_bias_is_asked_for_by_place_as_with_keras():
    layers = [
        built(kind(UNITS, "tanh", "sigmoid", False))
        for kind in (LSTM, keras.layers.LSTM)
    ]
    assert [len(layer.get_weights()) for layer in layers] == [2, 2]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_whole_numbers_are_read_as_keras_reads_them(dtype, rng):
    x = rng.integers(2, size=(BATCH, TIME, FEATURES)).astype(dtype)
    ours, theirs = built(LSTM(UNITS)), built(keras.layers.LSTM(UNITS))
    theirs.set_weights(ours.get_weights())
    [out], [truth] = numpy(ours(x)), numpy(theirs(x.astype(np.float32)))
    np.testing.assert_allclose(out, truth, **CLOSE)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_mask_of_ids_is_true_where_they_are_not_zero(dtype, x):
    mask = np.array([[3, 7, 0], [2, 0, 0]])
    layer = LSTM(UNITS, return_sequences=True)
    [truth] = numpy(layer(x, mask=mask != 0))
    [out] = numpy(layer(x, mask=mask.astype(dtype)))
    np.testing.assert_array_equal(out, truth)


def test_bidirectional_gives_the_states_that_keras_gives(x):
    ours, theirs = (
        keras.layers.Bidirectional(kind(UNITS, return_state=True))
        for kind in (LSTM, keras.layers.LSTM)
    )
    for layer in (ours, theirs):
        layer.build(x.shape)
    theirs.set_weights(ours.get_weights())
    outputs, truths = numpy(ours(x)), numpy(theirs(x))
    assert len(outputs) == 5
    for output, truth in zip(outputs, truths, strict=True):
        np.testing.assert_allclose(output, truth, **CLOSE)


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="inference mode is PyTorch's"
)
def test_layer_trains_after_a_first_call_for_inference(x):
    import torch

    model = keras.Sequential([keras.Input(x.shape[1:]), LSTM(UNITS)])
    model.compile("sgd", "mse")
    before = model.get_weights()
    with torch.inference_mode():
        model(torch.as_tensor(x))
    model.fit(x, np.ones((BATCH, UNITS)), verbose=0)
    pairs = zip(before, model.get_weights(), strict=True)
    assert all((old != new).any() for old, new in pairs)


# What torch.compile does to see which tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="torch.compile is PyTorch's"
)
def test_gradients_go_through_torch_compile(x):
    import torch

    layer = LSTM(UNITS)
    eager = layer(x)
    eager.sum().backward()
    truth = [w.value.grad.clone() for w in layer.weights]
    layer.zero_grad()
    # Derived as for its compiler of C++, which may not be there, and run.
    compiled = torch.compile(layer, backend="aot_eager")(torch.as_tensor(x))
    compiled.sum().backward()
    np.testing.assert_allclose(numpy(compiled)[0], numpy(eager)[0], **CLOSE)
    for weight, gradient in zip(layer.weights, truth, strict=True):
        np.testing.assert_allclose(weight.value.grad, gradient, **CLOSE)


# The carried state


@pytest.mark.skipif(
    keras.config.backend() == "jax",
    reason="JAX has float64 only where it is told to",
)
def test_state_of_float64_is_carried_with_its_digits(rng):
    x = rng.standard_normal((BATCH, 2 * TIME, FEATURES))
    layer = LSTM(
        UNITS, carry_state=True, return_sequences=True, dtype="float64"
    )
    layer.build((BATCH, TIME, FEATURES))
    halves = [numpy(layer(half))[0] for half in np.split(x, 2, axis=1)]
    layer.reset_state()
    [whole] = numpy(layer(x))
    # float64; a state in float32 is 1e-8 apart.
    np.testing.assert_allclose(
        np.concatenate(halves, 1), whole, rtol=0, atol=1e-14
    )


def carrying_model(batch_size=BATCH, dtype=None):
    return keras.Sequential(
        [
            keras.Input(batch_shape=(batch_size, None, FEATURES)),
            LSTM(
                UNITS,
                carry_state=True,
                return_sequences=True,
                unit_forget_bias=False,
                bias_initializer=keras.initializers.Constant(3.0),
                dtype=dtype,
            ),
            keras.layers.Dense(2),
        ]
    )


@pytest.fixture
def two_batches(rng):
    """Four rows; the last two go on where the first two end."""
    x = rng.standard_normal((2 * BATCH, TIME, FEATURES)).astype(np.float32)
    y = rng.standard_normal((2 * BATCH, TIME, 2)).astype(np.float32)
    return x, y


def one_pass_loss(model, x, y, start=0.0):
    """The mean squared error of reading both batches as one, by NumPy."""
    x = np.concatenate([x[:BATCH], x[BATCH:]], axis=1)
    y = np.concatenate([y[:BATCH], y[BATCH:]], axis=1)
    *lstm, kernel, bias = model.get_weights()
    state = np.full((BATCH, UNITS), start)
    outputs, _, _ = oracles.lstm(x, state, state, *lstm)
    return np.mean((outputs @ kernel + bias - y) ** 2)


def test_carried_state_joins_batches_in_fit_and_evaluate(two_batches):
    x, y = two_batches
    model = carrying_model()
    expected = one_pass_loss(model, x, y)
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    settings = {
        "batch_size": BATCH,
        "verbose": 0,
        "callbacks": [ResetCarriedState()],
    }
    history = model.fit(
        x, y, epochs=2, shuffle=False, validation_data=(x, y), **settings
    ).history
    evaluated = [model.evaluate(x, y, **settings) for _ in range(2)]
    losses = [*history["loss"], *history["val_loss"], *evaluated]
    # float32 means over batches.
    np.testing.assert_allclose(losses, [expected] * 6, rtol=1e-5)


def test_state_is_carried_until_it_is_reset(x):
    layer = built(LSTM(UNITS, carry_state=True, return_state=True))
    first = numpy(layer(x))[0]
    second, h, c = numpy(layer(x))
    assert np.abs(second - first).max() > 1e-3
    weights = layer.get_weights()
    zeros = np.zeros((BATCH, UNITS))
    _, *middle = oracles.lstm(x, zeros, zeros, *weights)
    _, *truth = oracles.lstm(x, *middle, *weights)
    np.testing.assert_allclose([h, c], truth, **CLOSE)
    layer.reset_state()
    np.testing.assert_allclose(numpy(layer(x))[0], first, **CLOSE)


class Wrapped(keras.layers.Layer):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "wrap",
    [Wrapped, lambda layer: keras.Sequential([layer])],
    ids=["layer", "model"],
)
def test_reset_reaches_lstms_inside_other_layers(wrap, x):
    model = keras.Sequential([wrap(LSTM(UNITS, carry_state=True))])
    first = numpy(model(x))[0]
    reset_carried_state(model)
    np.testing.assert_allclose(numpy(model(x))[0], first, **CLOSE)


def test_training_carries_but_does_not_propagate_into_the_past(two_batches):
    """The second step is a first step of Keras's LSTM from that state."""
    x, y = two_batches
    ours = carrying_model()
    ours.compile(keras.optimizers.SGD(0.0), loss="mse")
    ours.train_on_batch(x[:BATCH], y[:BATCH])
    *lstm, _, _ = start = ours.get_weights()
    zeros = np.zeros((BATCH, UNITS))
    _, h, c = oracles.lstm(x[:BATCH], zeros, zeros, *lstm)
    inputs = keras.Input((TIME, FEATURES))
    states = [keras.Input((UNITS,)), keras.Input((UNITS,))]
    hidden = keras.layers.LSTM(UNITS, return_sequences=True)(
        inputs, initial_state=states
    )
    outputs = keras.layers.Dense(2)(hidden)
    theirs = keras.Model([inputs, *states], outputs)
    theirs.set_weights(start)
    theirs.compile(keras.optimizers.SGD(1.0), loss="mse")
    state_arrays = [h.astype(np.float32), c.astype(np.float32)]
    theirs.train_on_batch([x[BATCH:], *state_arrays], y[BATCH:])
    ours.optimizer.learning_rate = 1.0
    ours.train_on_batch(x[BATCH:], y[BATCH:])
    for mine, truth in zip(
        ours.get_weights(), theirs.get_weights(), strict=True
    ):
        np.testing.assert_allclose(mine, truth, **CLOSE)


def test_explicit_state_leaves_the_carried_one_alone(x):
    layer = built(LSTM(UNITS, carry_state=True))
    expected = numpy(layer(x))[0]
    layer.reset_state()
    ones = np.ones((BATCH, UNITS), np.float32)
    layer(x, initial_state=(ones, ones))
    np.testing.assert_allclose(numpy(layer(x))[0], expected, **CLOSE)


def test_batches_of_another_size_are_refused(x):
    layer = built(LSTM(UNITS, carry_state=True))
    with pytest.raises(UserError, match="for 2 rows; received a batch of 1"):
        layer(x[:1])
    assert layer(x[:1], initial_state=layer.get_initial_state(1)) is not None


def test_batches_of_another_size_are_refused_in_a_compiled_step(x):
    model = carrying_model()
    model.compile(loss="mse")
    y = np.zeros((BATCH, TIME, 2), np.float32)
    model.evaluate(x, y, batch_size=BATCH, verbose=0)
    with pytest.raises(Exception, match="state is carried for 2 rows"):
        model.evaluate(x[:1], y[:1], verbose=0)


def test_prediction_starts_from_zeros(x):
    model = carrying_model()
    settings = {
        "batch_size": BATCH,
        "verbose": 0,
        "callbacks": [ResetCarriedState()],
    }
    first = model.predict(x, **settings)
    np.testing.assert_allclose(model.predict(x, **settings), first, **CLOSE)
    settings["callbacks"] = []
    goes_on = model.predict(x, **settings)
    assert np.abs(goes_on - first).max() > 1e-3


def test_carrying_needs_a_known_batch_size():
    with pytest.raises(UserError, match="needs the batch size"):
        LSTM(UNITS, carry_state=True).build((None, TIME, FEATURES))


def test_carried_state_is_no_weight(x, tmp_path):
    carrying = carrying_model(batch_size=20)
    assert [w.shape for w in carrying.get_weights()] == [
        (FEATURES, 4 * UNITS),
        (UNITS, 4 * UNITS),
        (4 * UNITS,),
        (UNITS, 2),
        (2,),
    ]
    carrying(np.ones((20, TIME, FEATURES), np.float32))
    carrying.save_weights(tmp_path / "x.weights.h5")
    single = carrying_model(batch_size=1)
    single.load_weights(tmp_path / "x.weights.h5")
    for loaded, saved in zip(
        single.get_weights(), carrying.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(loaded, saved)
    # It starts from zeros, not from a state out of the file.
    carrying.layers[0].reset_state()
    rows = np.repeat(x[:1], 20, axis=0)
    expected = numpy(carrying(rows))[0][:1]
    np.testing.assert_allclose(numpy(single(x[:1]))[0], expected, **CLOSE)


def test_carried_state_stays_float32_in_mixed_precision(x):
    model = carrying_model(dtype="mixed_bfloat16")
    layer = model.layers[0]
    output = model(x)
    carried = layer.carried.variables
    assert {variable.dtype for variable in carried} == {"float32"}
    assert [variable.shape for variable in carried] == [(BATCH, UNITS)] * 2
    truth = carrying_model()
    truth.set_weights(model.get_weights())
    # bfloat16 keeps 8 bits.
    np.testing.assert_allclose(
        numpy(output)[0], numpy(truth(x))[0], rtol=0.05, atol=0.05
    )


def test_little_by_little_adds_up_in_a_carried_cell():
    """A 256th of it in each batch, of which bfloat16 keeps none from 1 on."""
    layer = LSTM(1, carry_state=True, dtype="mixed_bfloat16")
    layer.build((1, 1, 1))
    zeros = np.zeros((1, 4), np.float32)
    layer.set_weights([zeros, zeros, np.array([20, 20, 1 / 256, 0])])
    for _ in range(400):
        layer(np.zeros((1, 1, 1), np.float32))
    # The candidate is tanh(1 / 256), rounded to bfloat16.
    got = keras.ops.convert_to_numpy(layer.carried.c)
    np.testing.assert_allclose(got, 400 / 256, rtol=1e-2)


def test_one_seed_gives_two_masks():
    layer = LSTM(8, dropout=0.5, weight_dropout=0.5, seed=3)
    ones = np.ones((8, 1, 8), np.float32)
    of_inputs, of_weights = (
        keras.ops.convert_to_numpy(drop(values, training=True)).reshape(8, 8)
        for drop, values in (
            (layer.input_dropout, ones),
            (layer.weight_drop, ones[:, 0]),
        )
    )
    assert 0.2 < np.mean(of_inputs == of_weights) < 0.8


# Embedding


def test_embedding_is_keras_embedding(rng):
    ids = rng.integers(9, size=(2, 3))
    ours, theirs = Embedding(9, 4), keras.layers.Embedding(9, 4)
    out = ours(ids)
    theirs.build(ids.shape)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_array_equal(numpy(out)[0], numpy(theirs(ids))[0])
    again = Embedding.from_config(ours.get_config())
    assert (again.input_dim, again.output_dim) == (9, 4)


@pytest.mark.parametrize("clip", ["global_clipnorm", "clipnorm"])
def test_repeated_words_are_clipped_by_the_true_norm(clip):
    """Ids 1, 2, 2 and a gradient of ones over 4 columns, by hand.

    Word 1 has the gradient 1, word 2 has 2, in 4 columns each; the norm is
    sqrt(4 * 1 + 4 * 4) = 4.47, to be cut down to 1.
    """
    model = keras.Sequential(
        [keras.Input((3,)), Embedding(4, 4, embeddings_initializer="zeros")]
    )
    model.compile(
        keras.optimizers.SGD(1.0, **{clip: 1.0}),
        loss=lambda y_true, y_pred: keras.ops.sum(y_pred),
    )
    ids = np.array([[1, 2, 2]])
    model.train_on_batch(ids, np.zeros((1, 3, 4), np.float32))
    expected = np.outer([0, -1, -2, 0], np.ones(4)) / np.sqrt(20)
    # float32.
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-6)


# What is dropped ------------------------------------------------------------


def dropped_kernel(layer):
    """The recurrent kernel of the next batch, as the kernels get it."""
    return numpy(layer.read_weights(True))[1]


def test_weight_dropout_drops_recurrent_weights_and_scales_the_rest(x):
    layer = built(LSTM(16, weight_dropout=0.25, seed=3))
    kernel, recurrent, bias = layer.get_weights()
    got_kernel, dropped, got_bias = numpy(layer.read_weights(True))
    np.testing.assert_array_equal(got_kernel, kernel)
    np.testing.assert_array_equal(got_bias, bias)
    is_kept = dropped != 0
    # Of 1,024 weights, 5 standard deviations of a binomial draw.
    assert abs(is_kept.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 1024)
    # float32.
    np.testing.assert_allclose(
        dropped[is_kept], recurrent[is_kept] / 0.75, rtol=1e-6
    )
    assert (dropped_kernel(layer) != dropped).any()  # a mask for each batch
    np.testing.assert_array_equal(
        numpy(layer.read_weights(False))[1], recurrent
    )


def test_one_mask_of_weights_serves_all_steps_and_rows(x):
    arguments = {"weight_dropout": 0.5, "return_sequences": True, "seed": 3}
    layer, same = (
        built(LSTM(UNITS, **arguments)),
        built(LSTM(UNITS, **arguments)),
    )
    same.set_weights(layer.get_weights())
    kernel, _, bias = same.get_weights()
    zeros = np.zeros((BATCH, UNITS))
    expected, *_ = oracles.lstm(
        x, zeros, zeros, kernel, dropped_kernel(same), bias
    )
    [out] = numpy(layer(x, training=True))
    np.testing.assert_allclose(out, expected, **CLOSE)


def test_weight_dropout_is_for_training_alone(x):
    layer, plain = built(LSTM(UNITS, weight_dropout=0.5)), built(LSTM(UNITS))
    plain.set_weights(layer.get_weights())
    for training in (None, False):
        [out], [truth] = numpy(layer(x, training=training)), numpy(plain(x))
        np.testing.assert_array_equal(out, truth)


def test_dropped_weights_get_no_gradient(x):
    layer = built(LSTM(UNITS, weight_dropout=0.5, seed=3))
    same = built(LSTM(UNITS, weight_dropout=0.5, seed=3))
    is_kept = dropped_kernel(same) != 0
    model = keras.Sequential([layer])
    before = layer.get_weights()[1]
    # A rate at which no step is too small to move a weight.
    model.compile(keras.optimizers.SGD(100.0), "mse")
    model.train_on_batch(x, np.ones((BATCH, UNITS)))
    np.testing.assert_array_equal(layer.get_weights()[1] != before, is_kept)


def test_weight_dropout_survives_the_configuration():
    layer = LSTM.from_config(LSTM(UNITS, weight_dropout=0.5).get_config())
    assert layer.weight_dropout == 0.5
    layer = Embedding.from_config(Embedding(9, 4, dropout=0.5).get_config())
    assert layer.dropout == 0.5


def test_embedding_drops_whole_words_alike_wherever_they_stand():
    layer = Embedding(40, 3, dropout=0.25, seed=3)
    ids = np.stack([np.arange(40), np.arange(40)[::-1]])
    table = numpy(layer(ids))[0][0]
    first, second = numpy(layer(ids, training=True))[0]
    np.testing.assert_array_equal(first, second[::-1])
    is_kept = (first != 0).any(-1)
    assert 0 < is_kept.sum() < 40
    np.testing.assert_allclose(
        first,
        table * is_kept[:, None] / 0.75,
        rtol=1e-6,  # float32
    )
    again = numpy(layer(ids, training=True))[0][0]
    assert ((again != 0).any(-1) != is_kept).any()


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="of PyTorch's implementation"
)
def test_blocks_for_cudnn_last_until_other_layers_run_together(
    rng, monkeypatch
):
    """Its block is made by a stand-in, which lays out as PyTorch's does."""
    import torch

    from multilstm.ops import torch as ops_torch

    def flatten(tensors, *sizes):
        made.append(sizes[-3])  # layers
        block = torch.cat([tensor.flatten() for tensor in tensors])
        parts = block.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.data = part.view(tensor.shape)

    made = []
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    monkeypatch.setattr(ops_torch, "_is_for_cudnn", lambda tensor: True)
    shapes = [((4, 20), (5, 20), (20,)), ((5, 20), (5, 20), (20,))]
    layers = [
        tuple(torch.nn.Parameter(torch.tensor(rng.normal(size=s))) for s in of)
        for of in shapes
    ]
    values = [[t.detach().numpy().copy() for t in layer] for layer in layers]

    def run(*places):
        order = ops_torch._in_torchs_order([layers[k] for k in places])
        for k, tensor in enumerate(order):
            of_layer = [*values[places[k // 4]], np.zeros(20)]
            np.testing.assert_array_equal(
                tensor.detach().numpy(), of_layer[k % 4].T
            )

    run(0, 1)
    run(0, 1)
    assert made == [2]
    for k in (0, 1, 0, 1):  # as with dropout between them
        run(k)
    assert made == [2, 1, 1]
    assert all(ops_torch._fill_a_block([layer]) for layer in layers)


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="of PyTorch's implementation"
)
def test_weights_for_cudnn_are_views_of_one_block(rng):
    """No GPU to run it: what it would be given is checked on the CPU."""
    import torch

    from multilstm.ops import torch as ops_torch

    shapes = [((4, 20), (5, 20), (20,)), ((5, 20), (5, 20), (20,))]
    weights = [
        tuple(
            torch.tensor(rng.normal(size=s), requires_grad=True) for s in layer
        )
        for layer in shapes
    ]
    packed = ops_torch._pack_for_cudnn(weights)
    expected = ops_torch._in_torchs_order(weights)
    for got, truth in zip(packed, expected, strict=True):
        assert torch.equal(got, truth)
    # cuDNN's order is that of the addresses: matrices first, then biases.
    places = [tensor.storage_offset() for tensor in packed]
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed}) == 1
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    assert [places[k] for k in order] == sorted(places)
    sum(tensor.sum() * k for k, tensor in enumerate(packed)).backward()
    for k, tensor in enumerate(t for layer in weights for t in layer):
        place = 4 * (k // 3) + k % 3
        assert torch.equal(tensor.grad, torch.full_like(tensor, place))
