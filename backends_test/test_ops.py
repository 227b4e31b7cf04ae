"""The operations against the textbook's equations, on this backend."""

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import float32_products

from multilstm import ops
from multilstm.devices import processor_name
from multilstm.errors import UserError
from multilstm.ops import evidence, reference

sizes = st.integers(min_value=1, max_value=7)
BACKEND = keras.config.backend()

# float32 against float64: sums of a few dozen products of size 1.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}
# Eight bits of mantissa, some of them lost at each step.
BFLOAT16 = {"rtol": 5e-2, "atol": 5e-2}


def run(function, arrays, upstream=None, *, traced=False, dtype="float32"):
    """Outputs of `function` and gradients of floats among `arrays`, as NumPy.

    The gradients are those of the sum of outputs times `upstream`.
    """
    tensors = [
        keras.ops.convert_to_tensor(
            array, dtype if array.dtype.kind == "f" else None
        )
        for array in arrays
    ]
    places = [n for n, array in enumerate(arrays) if array.dtype.kind == "f"]
    outputs, gradients = {
        "jax": run_jax,
        "torch": run_torch,
        "tensorflow": run_tensorflow,
    }[BACKEND](function, tensors, places, upstream, traced)
    wide = "float64" if dtype == "float64" else "float32"
    return [
        [
            np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(t, wide)))
            for t in group
        ]
        for group in (outputs, gradients)
    ]


def run_jax(function, tensors, places, upstream, traced):
    import jax

    def of_floats(*floats):
        arguments = list(tensors)
        for place, tensor in zip(places, floats, strict=True):
            arguments[place] = tensor
        outputs = function(*arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def both(*floats):
        outputs, back = jax.vjp(of_floats, *floats)
        if upstream is None:
            return outputs, ()
        return outputs, back(
            tuple(
                jax.numpy.asarray(u, out.dtype)
                for u, out in zip(upstream, outputs, strict=True)
            )
        )

    both = jax.jit(both) if traced else both
    return both(*(tensors[place] for place in places))


def run_torch(function, tensors, places, upstream, traced):
    import torch

    floats = [tensors[p].detach().clone().requires_grad_() for p in places]
    arguments = list(tensors)
    for place, tensor in zip(places, floats, strict=True):
        arguments[place] = tensor
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        return [out.detach() for out in outputs], ()
    torch.autograd.backward(
        outputs,
        [
            torch.as_tensor(u).to(out.dtype)
            for u, out in zip(upstream, outputs, strict=True)
        ],
    )
    return [out.detach() for out in outputs], [t.grad for t in floats]


def run_tensorflow(function, tensors, places, upstream, traced):
    import tensorflow as tf

    def both(*tensors):
        floats = [tensors[place] for place in places]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs = function(*tensors)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if upstream is None:
            return outputs, ()
        weights = [
            tf.cast(u, out.dtype)
            for u, out in zip(upstream, outputs, strict=True)
        ]
        return outputs, tape.gradient(outputs, floats, weights)

    return (tf.function(both) if traced else both)(*tensors)


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


def draw_upstream(rng, batch, time, units):
    shapes = ((batch, time, units), (batch, units), (batch, units))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def check_lstm(function, arguments, upstream, mask=None, **options):
    """Outputs and all gradients are the oracle's, which steps in float64."""
    tolerance = options.pop("tolerance", FLOAT32)
    exact = [array.astype(float) for array in arguments]
    arrays = arguments if mask is None else [*arguments, mask]
    outputs, gradients = run(function, arrays, upstream, **options)
    expected = (
        oracles.lstm(*exact, mask),
        oracles.lstm_gradients(exact, upstream, mask),
    )
    for got, truth in zip((outputs, gradients), expected, strict=True):
        for array, true_array in zip(got, truth, strict=True):
            np.testing.assert_allclose(array, true_array, **tolerance)


def test_oracle_of_gradients_agrees_with_finite_steps(rng):
    arguments = [a.astype(float) for a in draw_arguments(rng, 2, 4, 3, 5)]
    upstream = draw_upstream(rng, 2, 4, 5)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0]], bool)
    gradients = oracles.lstm_gradients(arguments, upstream, mask)
    for number, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        values = []
        for step in (-1e-5, 1e-5):
            moved = list(arguments)
            moved[number] = moved[number] + step * direction
            outputs = oracles.lstm(*moved, mask)
            values.append(
                sum(
                    np.sum(u * out)
                    for u, out in zip(upstream, outputs, strict=True)
                )
            )
        slope = (values[1] - values[0]) / 2e-5
        # A finite step of 1e-5 is exact to its square.
        np.testing.assert_allclose(np.sum(gradient * direction), slope, 1e-7)


@settings(max_examples=20, deadline=None)
@given(
    batch=sizes,
    time=sizes,
    features=sizes,
    units=sizes,
    from_zeros=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_lstm_and_its_gradients_follow_the_equations(
    batch, time, features, units, from_zeros, seed
):
    rng = np.random.default_rng(seed)
    arguments = draw_arguments(rng, batch, time, features, units)
    if from_zeros:
        arguments[1:3] = [np.zeros_like(state) for state in arguments[1:3]]
    check_lstm(ops.lstm, arguments, draw_upstream(rng, batch, time, units))


@pytest.mark.parametrize(
    "function", [ops.lstm, reference.lstm], ids=["ops", "reference"]
)
@pytest.mark.parametrize("sizes", [(3, 5, 4, 6), (1, 1, 1, 1)], ids=str)
def test_lstm_in_a_compiled_step_follows_the_equations(rng, function, sizes):
    batch, time, _, units = sizes
    check_lstm(
        function,
        draw_arguments(rng, *sizes),
        draw_upstream(rng, batch, time, units),
        traced=True,
    )


RIGHT_PADDED = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
WITH_HOLES = [[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(
    "mask", [RIGHT_PADDED, WITH_HOLES], ids=["right-padded", "holes"]
)
def test_masked_steps_leave_the_state_and_its_gradient(rng, mask, traced):
    check_lstm(
        ops.lstm,
        draw_arguments(rng, 4, 4, 3, 5),
        draw_upstream(rng, 4, 4, 5),
        np.array(mask, bool),
        traced=traced,
    )


def test_masked_steps_keep_the_state_whatever_the_gates_say(rng):
    """A bias by which each step that is read forgets all."""
    x = rng.standard_normal((2, 3, 2)).astype(np.float32)
    h0, c0 = rng.standard_normal((2, 2, 1)).astype(np.float32)
    kernel, recurrent = (np.zeros((n, 4), np.float32) for n in (2, 1))
    bias = np.array([30, -30, 1, 0], np.float32)
    arrays = (x, h0, c0, kernel, recurrent, bias)
    given = [keras.ops.convert_to_tensor(array) for array in arrays]
    mask = keras.ops.convert_to_tensor(np.zeros((2, 3), bool))
    y, h, c = map(keras.ops.convert_to_numpy, ops.lstm(*given, mask))
    np.testing.assert_array_equal(c, c0)
    np.testing.assert_array_equal(h, h0)
    np.testing.assert_array_equal(y, np.repeat(h0[:, None], 3, axis=1))


def test_masked_steps_leave_the_reference_too(rng):
    check_lstm(
        reference.lstm,
        draw_arguments(rng, 4, 4, 3, 5),
        draw_upstream(rng, 4, 4, 5),
        np.array(WITH_HOLES, bool),
    )


def test_lstm_in_bfloat16_is_near_the_equations(rng):
    arguments = draw_arguments(rng, 3, 5, 4, 6)
    upstream = draw_upstream(rng, 3, 5, 6)
    check_lstm(
        ops.lstm, arguments, upstream, dtype="bfloat16", tolerance=BFLOAT16
    )
    (y, h, c), _ = run(ops.lstm, arguments, dtype="bfloat16", traced=True)
    np.testing.assert_array_equal(y[:, -1], h)
    assert c.shape == (3, 6)


@contextmanager
def wide_jax():
    """JAX has float64 only where it is told to."""
    if BACKEND != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_lstm_in_float64_keeps_its_digits(rng, traced):
    arguments = draw_arguments(rng, 3, 5, 4, 6)
    upstream = [u.astype(float) for u in draw_upstream(rng, 3, 5, 6)]
    with wide_jax():
        check_lstm(
            ops.lstm,
            arguments,
            upstream,
            dtype="float64",
            traced=traced,
            tolerance={"rtol": 1e-11, "atol": 1e-13},
        )


def test_states_of_a_long_bfloat16_run_do_not_stall(rng):
    """A cell that gains 1/256 a step: in bfloat16 sums it would stop at 1."""
    arguments = [
        np.zeros(shape, np.float32)
        for shape in ((1, 600, 1), (1, 1), (1, 1), (1, 4), (1, 4), (4,))
    ]
    # Input gate and forget gate open, the candidate tanh(1/256).
    arguments[-1][:] = [20, 20, 1 / 256, 0]
    (_, _, c), _ = run(ops.lstm, arguments, dtype="bfloat16")
    np.testing.assert_allclose(c, 600 / 256, rtol=1e-2)


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
    outputs, _ = run(ops.lstm, [x, h0, c0, *weights])
    for output, truth in zip(outputs, expected, strict=True):
        truth = keras.ops.convert_to_numpy(truth)
        # float32 sums in another order.
        np.testing.assert_allclose(output, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="compares with torch.nn.LSTM, and PyTorch is not installed",
)
def test_layers_in_a_stack_are_what_torch_computes(rng):
    import torch

    x, h0, c0, *first = draw_arguments(rng, 2, 7, 3, 5)
    _, h1, c1, *second = draw_arguments(rng, 2, 7, 5, 5)
    module = torch.nn.LSTM(3, 5, num_layers=2, batch_first=True)
    with torch.no_grad():
        for layer, (kernel, recurrent, bias) in enumerate((first, second)):
            for name, value in (
                ("weight_ih", kernel.T),
                ("weight_hh", recurrent.T),
                ("bias_ih", bias),
                ("bias_hh", 0 * bias),
            ):
                getattr(module, f"{name}_l{layer}").copy_(
                    torch.as_tensor(value)
                )
    states = tuple(
        torch.as_tensor(np.stack(pair)) for pair in ((h0, h1), (c0, c1))
    )
    y, (h, c) = module(torch.as_tensor(x), states)
    got, final = ops.lstm_stack(
        *(
            keras.tree.map_structure(keras.ops.convert_to_tensor, part)
            for part in (x, [(h0, c0), (h1, c1)], [first, second])
        )
    )
    for output, truth in (
        (got, y),
        *((final[n][0], h[n]) for n in range(2)),
        *((final[n][1], c[n]) for n in range(2)),
    ):
        # float32 sums in another order.
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(output),
            truth.detach().numpy(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_kernel_that_ran_is_named_after_it_ran(rng, monkeypatch):
    monkeypatch.setattr(evidence, "_last_kernel", None)
    assert ops.last_kernel() is None
    arguments = draw_arguments(rng, 2, 3, 4, 5)
    run(ops.lstm, arguments, traced=True)
    fastest = {
        "jax": "jax: scan",
        "torch": "torch: onednn",
        "tensorflow": "tensorflow: loop",
    }[BACKEND]
    assert ops.last_kernel() == fastest
    for _ in range(2):  # at first compiled, where a backend does
        run(reference.lstm, arguments)
        assert ops.last_kernel() == "reference: scan"
        run(ops.lstm, arguments)
        assert ops.last_kernel() == fastest


@pytest.mark.parametrize("mask", [RIGHT_PADDED, WITH_HOLES])
def test_masks_keep_the_fast_kernel(rng, mask):
    arguments = draw_arguments(rng, 4, 4, 3, 5)
    run(ops.lstm, arguments)
    unmasked = ops.last_kernel()
    run(reference.lstm, arguments)
    run(ops.lstm, [*arguments, np.array(mask, bool)])
    assert ops.last_kernel() == unmasked


def test_what_masked_steps_hold_does_not_matter(rng):
    arguments = draw_arguments(rng, 4, 4, 3, 5)
    mask = np.array(WITH_HOLES, bool)
    expected, _ = run(ops.lstm, [*arguments, mask])
    arguments[0] = np.where(mask[..., None], arguments[0], np.nan)
    outputs, _ = run(ops.lstm, [*arguments, mask])
    for output, truth in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output, truth)


SOME_IDS = np.array([0, 3, 2, 1], np.int32)


@pytest.mark.skipif(BACKEND != "jax", reason="others compile no plain call")
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (ops.lstm, [(2, 3, 4), (2, 5), (2, 5), (4, 20), (5, 20), (20,)]),
        (
            lambda *floats: ops.linear_cross_entropy(
                *floats, SOME_IDS, max_logits_bytes=4 * 4 * 6
            ),
            [(4, 3), (3, 11), (11,)],
        ),
        (
            lambda *floats: ops.cross_entropy_of_some(
                *floats, SOME_IDS, SOME_IDS > 1
            ),
            [(4, 3), (3, 2), (2, 11)],
        ),
    ],
    ids=["lstm", "cross-entropy in chunks", "cross-entropy of some"],
)
def test_a_second_call_compiles_nothing_anew(
    function, shapes, with_gradients, rng, caplog
):
    import jax

    floats = [jax.numpy.asarray(rng.normal(size=shape)) for shape in shapes]

    def call():
        if not with_gradients:
            return function(*floats)
        outputs, back = jax.vjp(lambda *floats: function(*floats), *floats)
        return back(outputs)

    jax.clear_caches()  # of what other tests compiled
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        first = call()
        assert "Compiling" in caplog.text
        caplog.clear()
        second = call()
    assert "Compiling" not in caplog.text
    # The same program.
    jax.tree.map(np.testing.assert_array_equal, first, second)


# cuDNN, as far as it can be tested without a GPU ------------------------------


def test_weights_are_packed_as_cudnn_has_them(rng):
    """By the reading of JAX, which ships what takes them apart."""
    rnn = pytest.importorskip(
        "jax.experimental.rnn", reason="JAX has the layout"
    )
    _, _, _, *first = draw_arguments(rng, 1, 1, 3, 5)
    _, _, _, *second = draw_arguments(rng, 1, 1, 5, 5)
    packed = reference.pack_for_cudnn(
        [
            [keras.ops.convert_to_tensor(w) for w in weights]
            for weights in (first, second)
        ]
    )
    groups = rnn.unpack_lstm_weights(np.asarray(packed), 3, 5, 2, False)
    for layer, (kernel, recurrent, bias) in enumerate((first, second)):
        expected = (kernel.T, recurrent.T, bias, 0 * bias)
        for group, truth in zip(groups, expected, strict=True):
            # Rows are copied: exact.
            np.testing.assert_array_equal(group[layer], truth)


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's implementation")
@pytest.mark.parametrize(
    "mask",
    [None, RIGHT_PADDED, WITH_HOLES],
    ids=["unmasked", "right-padded", "holes"],
)
def test_jax_calls_cudnn_with_the_right_arguments(rng, mask, monkeypatch):
    """JAX's own model of the call, in plain JAX, stands for the GPU."""
    import jax
    from jax.experimental import rnn

    def model_of_cudnn(
        x,
        h0,
        c0,
        weights,
        lengths,
        *,
        input_size,
        hidden_size,
        num_layers,
        dropout,
        bidirectional,
    ):
        parts = rnn.unpack_lstm_weights(
            weights, input_size, hidden_size, num_layers, bidirectional
        )
        return rnn.lstm_ref(
            x,
            h0,
            c0,
            *parts,
            lengths,
            input_size,
            hidden_size,
            num_layers,
            dropout,
            bidirectional,
        )

    monkeypatch.setattr(rnn, "lstm", model_of_cudnn)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_lstm(
        ops.lstm,
        draw_arguments(rng, 4, 4, 3, 5),
        draw_upstream(rng, 4, 4, 5),
        None if mask is None else np.array(mask, bool),
    )
    assert ops.last_kernel() == "jax: cudnn"
    _, h0, c0, *first = draw_arguments(rng, 2, 7, 3, 5)
    x, h1, c1, *second = draw_arguments(rng, 2, 7, 5, 5)
    x = x[..., :3]
    y, final = ops.lstm_stack(x, [(h0, c0), (h1, c1)], [first, second])
    expected, *_ = oracles.lstm(
        oracles.lstm(x, h0, c0, *first)[0], h1, c1, *second
    )
    np.testing.assert_allclose(y, expected, **FLOAT32)
    assert len(final) == 2


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's implementation")
def test_arrays_and_gradients_of_cudnn_are_row_major_on_jax(rng, monkeypatch):
    """A hyperbolic sine stands for the call, whose orders nobody tells XLA."""
    import jax
    from jax.experimental import rnn

    def stand_in(x, h0, c0, *_, **sizes):
        return tuple(map(jax.numpy.sinh, (x, h0, c0)))

    monkeypatch.setattr(rnn, "lstm", stand_in)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arguments = draw_arguments(rng, 2, 3, 5, 5)

    def step(*arguments):
        return jax.vjp(ops.lstm, *arguments)[1](ops.lstm(*arguments))

    equations = jax.make_jaxpr(step)(*arguments).eqns
    made_by = {v: e for e in equations for v in e.outvars}
    calls = [e for e in equations if e.primitive.name in ("sinh", "cosh")]
    assert len(calls) >= 6
    for call in calls:
        assert made_by[call.invars[0]].primitive.name == "layout_constraint"
    outputs = {e.outvars[0] for e in calls if e.primitive.name == "sinh"}
    slopes = {e.outvars[0] for e in calls if e.primitive.name == "cosh"}
    for equation in equations:
        variables = [v for v in equation.invars if not hasattr(v, "val")]
        if outputs.intersection(variables):
            assert equation.primitive.name == "layout_constraint"
        if slopes.intersection(variables):  # times the outputs' gradients
            (gradient,) = set(variables) - slopes
            assert made_by[gradient].primitive.name == "layout_constraint"


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's implementation")
def test_jax_says_why_cudnn_is_not_used_or_not_in_bfloat16(
    rng, caplog, monkeypatch
):
    import jax
    from jax.experimental import rnn

    monkeypatch.setattr(evidence, "_explained", set())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arguments = draw_arguments(rng, 2, 3, 4, 5)
    with (
        jax.default_matmul_precision("bfloat16"),
        caplog.at_level(logging.WARNING, logger="multilstm.ops"),
    ):
        for _ in range(2):
            run(ops.lstm, arguments)
    assert ops.last_kernel() == "jax: scan"
    [message] = caplog.messages
    assert "jax_default_matmul_precision='bfloat16'" in message
    caplog.clear()
    dtypes = []

    def lstm(x, h0, c0, weights, lengths, **sizes):
        dtypes.extend(a.dtype.name for a in (x, h0, c0, weights, lengths))
        return x[..., :1] + jax.numpy.zeros(5), h0, c0

    monkeypatch.setattr(rnn, "lstm", lstm)
    run(ops.lstm, arguments, dtype="bfloat16")
    assert dtypes == ["float32"] * 4 + ["int32"]
    [message] = caplog.messages
    assert "float32 alone" in message


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="of TensorFlow's implementation"
)
@pytest.mark.parametrize(
    "mask", [None, RIGHT_PADDED], ids=["unmasked", "right-padded"]
)
def test_tensorflow_builds_a_step_with_cudnn_and_its_gradient(
    rng, mask, monkeypatch
):
    """No GPU to run it: the shapes and the gradient's operation are checked."""
    import tensorflow as tf

    from multilstm.ops import tensorflow

    monkeypatch.setattr(tensorflow, "has_gpu", lambda: True)
    assert not ops.has_xla()
    arguments = [
        tf.constant(array) for array in draw_arguments(rng, 4, 4, 3, 5)
    ]

    @tf.function
    def step(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y, h, c = ops.lstm(*arguments, mask)
            total = sum(map(tf.reduce_sum, (y, h, c)))
        return (y, h, c), tape.gradient(total, arguments)

    graph = step.get_concrete_function(*arguments)
    (y, h, c), gradients = graph.structured_outputs
    assert (y.shape, h.shape, c.shape) == ((4, 4, 5), (4, 5), (4, 5))
    assert [g.shape for g in gradients] == [a.shape for a in arguments]
    operations = {
        node.op
        for function in graph.graph.as_graph_def().library.function
        for node in function.node_def
    } | {operation.type for operation in graph.graph.get_operations()}
    assert {"CudnnRNNV3", "CudnnRNNBackpropV3"} <= operations
    assert ops.last_kernel() == "tensorflow: cudnn"


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow's devices")
@pytest.mark.parametrize(("softmax", "sampled"), [("exact", 0), ("sampled", 1)])
def test_a_step_on_tensorflow_waits_for_nothing_from_the_device(
    softmax, sampled
):
    """TensorFlow has ids and what keys are made of on the host."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "two_processors.py", softmax],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    masks = 5  # of words, of inputs, of outputs and of two layers' weights
    assert found == {
        "there": ["Cast"] * (masks + sampled) + ["StridedSlice"] * 2,
        "back": [],
    }


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow's gradient")
def test_gradient_of_packed_weights_is_that_of_their_places(rng):
    """By the gradient that TensorFlow makes of the reference."""
    from multilstm.ops import tensorflow

    weights = [
        draw_arguments(rng, 1, 1, *sizes)[3:] for sizes in ((3, 5), (5, 5))
    ]
    count = sum(array.size for layer in weights for array in layer) + 2 * 20
    upstream = [rng.normal(size=count)]
    found, expected = (
        run(
            lambda *flat, pack=pack: pack([flat[:3], flat[3:]]),
            [array for layer in weights for array in layer],
            upstream,
        )
        for pack in (tensorflow._pack, reference.pack_for_cudnn)
    )
    # Numbers are moved, none is changed.
    for group, truths in zip(found, expected, strict=True):
        for ours, truth in zip(group, truths, strict=True):
            np.testing.assert_array_equal(ours, truth)


@pytest.fixture(params=["loop, products by onednn", "onednn"])
def bfloat16_kernel(request, monkeypatch):
    """PyTorch's LSTM in bfloat16 on the CPU: each of its two ways, by name."""
    if BACKEND != "torch":
        pytest.skip("of PyTorch's implementation")
    import torch

    from multilstm.ops import bfloat16_torch

    if not bfloat16_torch.is_fast(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("the processor has no products of bfloat16")
    most = 10**9 if request.param == "onednn" else 0
    monkeypatch.setattr(bfloat16_torch, "_MOST_WEIGHTS", most)
    return f"torch: {request.param}"


def difference(array, truth):
    return np.linalg.norm(array - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("mask", [None, WITH_HOLES], ids=["", "masked"])
def test_bfloat16_on_a_cpu_only_rounds(rng, bfloat16_kernel, mask):
    mask = mask and np.array(mask, bool)
    arguments = draw_arguments(rng, 4, 4, 3, 5)
    upstream = draw_upstream(rng, 4, 4, 5)
    arrays = arguments if mask is None else [*arguments, mask]
    outputs, gradients = run(ops.lstm, arrays, upstream, dtype="bfloat16")
    assert ops.last_kernel() == bfloat16_kernel
    arguments = [a.astype(float) for a in arguments]
    truths = (
        *oracles.lstm(*arguments, mask),
        *oracles.lstm_gradients(arguments, upstream, mask),
    )
    # Numbers are rounded by up to 2^-8, 0.4 %, and so a few times over.
    for array, truth in zip([*outputs, *gradients], truths, strict=True):
        assert difference(array, truth) < 0.01


def test_states_may_be_parts_of_other_tensors(rng, bfloat16_kernel):
    import torch

    *_, kernel, recurrent, bias = (
        torch.tensor(a) for a in draw_arguments(rng, 3, 4, 5, 6)
    )
    x = torch.tensor(rng.standard_normal((3, 4, 5))).bfloat16()
    both = torch.tensor(rng.standard_normal((12, 3))).bfloat16().T
    parts = both.split(6, 1)
    copies = [part.contiguous() for part in parts]
    got = ops.lstm(x, *parts, kernel, recurrent, bias)
    expected = ops.lstm(x, *copies, kernel, recurrent, bias)
    for tensor, truth in zip(got, expected, strict=True):
        assert torch.equal(tensor, truth)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_may_be_empty(rng, dtype):
    arguments = draw_arguments(rng, 0, 4, 3, 5)
    (y, h, c), _ = run(ops.lstm, arguments, dtype=dtype)
    assert (y.shape, h.shape, c.shape) == ((0, 4, 5), (0, 5), (0, 5))


def test_weights_in_float32_get_gradients_in_float32(rng, bfloat16_kernel):
    import torch

    arguments = draw_arguments(rng, 4, 4, 3, 5)
    upstream = draw_upstream(rng, 4, 4, 5)
    tensors = [torch.tensor(a) for a in arguments]
    wide = [torch.nn.Parameter(tensor) for tensor in tensors[3:]]
    narrow = [tensor.bfloat16() for tensor in tensors[:3]]
    for _ in range(2):  # the layout of the weights changes the first time
        y, _, _ = ops.lstm(*narrow, *wide)
        gradients = torch.autograd.grad(
            y, wide, torch.tensor(upstream[0]).to(y)
        )
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    arguments = [a.astype(float) for a in arguments]
    upstream = [upstream[0], *(np.zeros_like(u) for u in upstream[1:])]
    truths = oracles.lstm_gradients(arguments, upstream)[3:]
    for gradient, truth in zip(gradients, truths, strict=True):
        assert difference(gradient.numpy(), truth) < 0.01  # as above


def check_second_derivatives_are_refused(function, *inputs):
    """And that the first, which would be differentiated, is as without."""
    import torch

    for place in range(len(inputs)):  # whichever alone is trained
        tensors = [tensor.detach() for tensor in inputs]
        wanted = tensors[place].requires_grad_()
        total = function(*tensors).float().sum()
        [plain] = torch.autograd.grad(total, wanted, retain_graph=True)
        [gradient] = torch.autograd.grad(total, wanted, create_graph=True)
        assert torch.equal(gradient, plain)
        penalty = gradient.float().square().sum()
        with pytest.raises(UserError, match="no second derivatives"):
            # The penalty is not all that these weights are trained for.
            torch.autograd.grad(total + penalty, wanted)


def test_second_derivative_in_bfloat16_on_a_cpu_is_refused(
    rng, bfloat16_kernel
):
    import torch

    tensors = [torch.tensor(a) for a in draw_arguments(rng, 4, 4, 3, 5)]
    narrow = [tensor.bfloat16() for tensor in tensors[:3]]
    for output in range(3):
        check_second_derivatives_are_refused(
            lambda *t, output=output: ops.lstm(*t)[output],
            *(*narrow, *tensors[3:]),
        )


def test_small_steps_add_up_on_a_cpu_in_bfloat16(bfloat16_kernel):
    """A cell that gains 1/256 a step: in bfloat16 sums it would stop at 1."""
    import torch

    shapes = ((1, 600, 1), (1, 1), (1, 1), (1, 4), (1, 4), (4,))
    *zeros, bias = (torch.zeros(s, dtype=torch.bfloat16) for s in shapes)
    bias += torch.tensor([20, 20, 1 / 256, 0])
    _, _, c = ops.lstm(*zeros, bias)
    np.testing.assert_allclose(c.float().numpy(), 600 / 256, rtol=1e-2)


@pytest.mark.skipif(BACKEND != "torch", reason="others look themselves")
@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (4, 6)], ids=str)
@pytest.mark.parametrize("which", [1, 2])
def test_states_of_another_shape_are_refused(which, shape, rng):
    """PyTorch's kernel would read what lies behind them."""
    arrays = draw_arguments(rng, 4, 4, 3, 5)
    arrays[which] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=r"must have the shape \(4, 5\)"):
        ops.lstm(*map(keras.ops.convert_to_tensor, arrays))


# Dropout ----------------------------------------------------------------------


def test_dropout_of_everything_leaves_zeros():
    ones = keras.ops.ones((4, 5))
    out = ops.dropout(ones, 1.0, None, keras.random.SeedGenerator(3))
    assert not keras.ops.convert_to_numpy(out).any()


@pytest.mark.parametrize("noise_shape", [None, (None, 1, None)])
def test_masks_follow_from_the_seed_and_have_their_share(noise_shape):
    ones = keras.ops.ones((40, 50, 60))
    first, second, again, other = (
        keras.ops.convert_to_numpy(
            ops.dropout(ones, 0.25, noise_shape, generator)
        )
        for one in [keras.random.SeedGenerator(3)]
        for generator in (
            one,
            one,
            keras.random.SeedGenerator(3),
            # Keras has none below zero on JAX.
            keras.random.SeedGenerator(4 if BACKEND == "jax" else -4),
        )
    )
    np.testing.assert_array_equal(first, again)
    assert {0.0, np.float32(1 / 0.75)} == set(np.unique(first))
    mask = first if noise_shape is None else first[:, :1]
    np.testing.assert_array_equal(np.broadcast_to(mask, first.shape), first)
    # Five standard deviations of the share of so many draws, and of that in
    # which two masks agree: 0.75^2 + 0.25^2.
    draws = 1 / mask.size**0.5
    assert abs((mask == 0).mean() - 0.25) < 5 * 0.434 * draws
    for unlike in (second, other):
        assert abs((first == unlike).mean() - 0.625) < 5 * 0.485 * draws


@pytest.mark.skipif(BACKEND != "torch", reason="others have no such device")
def test_shapes_are_told_without_numbers():
    """As Keras asks for them, on PyTorch's device for that."""
    import torch

    shapes = ((2, 5, 3), (2, 4), (2, 4), (3, 16), (4, 16), (16,))
    empty = [torch.empty(shape, device="meta") for shape in shapes]
    y, h, c = ops.lstm(*empty)
    assert (y.shape, h.shape, c.shape) == ((2, 5, 4), (2, 4), (2, 4))


@pytest.mark.skipif(BACKEND != "torch", reason="others have no autocast")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cell_state_adds_up_under_autocast(dtype):
    """A 256th in each of 400 steps, of which bfloat16 keeps none from 1 on."""
    import torch

    shapes = ((1, 400, 1), (1, 1), (1, 1), (1, 4), (1, 4))
    zeros = [torch.zeros(shape) for shape in shapes]
    bias = torch.tensor([20, 20, 1 / 256, 0])
    with torch.autocast("cpu", getattr(torch, dtype)):
        _, _, c = ops.lstm(*zeros, bias)
    assert c.dtype == torch.float32  # as of Keras's layer
    np.testing.assert_allclose(c.item(), 400 * np.tanh(1 / 256), rtol=1e-4)


# Optimizers -------------------------------------------------------------------


def make_optimizers():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    return {
        "Adam": lambda: keras.optimizers.Adam(1e-2),
        "Adam clipped": lambda: keras.optimizers.Adam(
            1e-2, global_clipnorm=0.5
        ),
        "Adam by a schedule": lambda: keras.optimizers.Adam(schedule),
        "SGD": lambda: keras.optimizers.SGD(0.3),
        "SGD clipped": lambda: keras.optimizers.SGD(0.3, global_clipnorm=0.5),
        "SGD not clipped yet": lambda: keras.optimizers.SGD(
            0.3, global_clipnorm=500.0
        ),
        "AdamW": lambda: keras.optimizers.AdamW(1e-2),
        "Adam with an average": lambda: keras.optimizers.Adam(use_ema=True),
        "SGD with momentum": lambda: keras.optimizers.SGD(0.3, momentum=0.9),
        "Adam clipped each": lambda: keras.optimizers.Adam(clipnorm=0.5),
        "Adam clipped by value": lambda: keras.optimizers.Adam(clipvalue=0.1),
        "Adam that decays": lambda: keras.optimizers.Adam(weight_decay=0.1),
        "AMSGrad": lambda: keras.optimizers.Adam(1e-2, amsgrad=True),
        "Adam of two batches": lambda: keras.optimizers.Adam(
            1e-2, gradient_accumulation_steps=2
        ),
    }


def run_optimizer(optimizer, *, transposed=False):
    rng = np.random.default_rng(3)
    shapes = ((3, 4), (5,))
    variables = [
        keras.Variable(rng.standard_normal(shape).astype(np.float32))
        for shape in shapes
    ]
    if transposed:
        matrix = variables[0].value
        matrix.data = matrix.data.T.contiguous().T
    for _ in range(5):
        gradients = [rng.standard_normal(shape) for shape in shapes]
        optimizer.apply(
            [keras.ops.convert_to_tensor(g, "float32") for g in gradients],
            variables,
        )
    return [
        keras.ops.convert_to_numpy(variable)
        for variable in (*variables, *optimizer.variables)
    ]


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_norm_that_is_no_number_makes_all_weights_none(kind, wrong):
    """As Keras's clipping: a step that does nothing would go unnoticed."""
    variables = [keras.Variable(np.ones(n, np.float32)) for n in (3, 2)]
    optimizer = getattr(keras.optimizers, kind)(0.1, global_clipnorm=0.5)
    optimizer.build(variables)
    ops.fuse_optimizer(optimizer)
    gradients = [np.ones(3, np.float32), np.ones(2, np.float32)]
    gradients[0][1] = wrong
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients])
    for variable in variables:
        assert np.isnan(keras.ops.convert_to_numpy(variable)).all()


@pytest.mark.parametrize("is_turned", [False, True])
def test_norm_of_millions_of_numbers_loses_none(rng, is_turned):
    """Against float64: a few large numbers, as gradients of embeddings have."""
    shape = (1700, 1000)
    gradient = rng.standard_normal(shape) * np.exp(
        2 * rng.standard_normal(shape)
    )
    gradient = gradient.astype(np.float32)
    variable = keras.Variable(np.zeros_like(gradient))
    given = keras.ops.convert_to_tensor(gradient)
    if is_turned:
        flat = keras.ops.convert_to_tensor(gradient.T.copy())
        given = keras.ops.transpose(flat)
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=1.0)
    ops.fuse_optimizer(optimizer)
    optimizer.build([variable])
    optimizer.apply([given])
    step = keras.ops.convert_to_numpy(variable).astype(np.float64)
    # float32, whose sum over rows of rows is right to its last bits.
    np.testing.assert_allclose(np.linalg.norm(step), 1, rtol=1e-6)


@pytest.mark.skipif(BACKEND == "jax", reason="XLA fuses what Keras writes")
@pytest.mark.parametrize("name", list(make_optimizers()))
def test_fused_optimizer_does_what_keras_does(name):
    expected = run_optimizer(make_optimizers()[name]())
    optimizer = make_optimizers()[name]()
    ops.fuse_optimizer(optimizer)
    for got, truth in zip(run_optimizer(optimizer), expected, strict=True):
        # The same formulas, summed in another order.
        np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (keras.optimizers.Adam, {"clipnorm": 0.1}),
        (keras.optimizers.Adam, {"clipvalue": 0.1}),
        (keras.optimizers.Adam, {"weight_decay": 0.1}),
        (keras.optimizers.SGD, {"clipnorm": 0.1}),
        (keras.optimizers.SGD, {"momentum": 0.9}),
    ],
)
def test_what_is_set_after_compile_is_done(kind, extra):
    expected = run_optimizer(kind(0.1, **extra))
    optimizer = kind(0.1)
    ops.fuse_optimizer(optimizer)
    for name, value in extra.items():
        setattr(optimizer, name, value)
    for got, truth in zip(run_optimizer(optimizer), expected, strict=True):
        # float32, by the same formulas.
        np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="stored so on PyTorch alone")
@pytest.mark.parametrize("name", ["Adam clipped", "SGD clipped"])
def test_fused_optimizer_takes_weights_that_are_stored_transposed(name):
    expected = run_optimizer(make_optimizers()[name]())
    optimizer = make_optimizers()[name]()
    ops.fuse_optimizer(optimizer)
    got = run_optimizer(optimizer, transposed=True)
    for array, truth in zip(got, expected, strict=True):
        # The same formulas, summed in another order.
        np.testing.assert_allclose(array, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [
        ("Adam clipped", True),
        ("SGD", True),
        ("AdamW", False),
        ("SGD with momentum", False),
        ("Adam with an average", False),
    ],
)
@pytest.mark.skipif(BACKEND == "jax", reason="XLA fuses it by itself")
def test_optimizers_with_extras_are_left_to_keras(name, is_fused):
    optimizer = make_optimizers()[name]()
    ops.fuse_optimizer(optimizer)
    assert ("_backend_apply_gradients" in vars(optimizer)) == is_fused


def test_optimizer_of_the_users_own_with_the_name_of_keras_is_left():
    class Adam(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, gradient)

    optimizer, weight = Adam(), keras.Variable([3.0])
    ops.fuse_optimizer(optimizer)
    optimizer.apply([keras.ops.ones(1)], [weight])
    assert keras.ops.convert_to_numpy(weight) == [2.0]


@pytest.mark.skipif(BACKEND != "torch", reason="a fault of Keras on PyTorch")
def test_fused_optimizers_read_no_number_from_the_device():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    for name, is_fused in (("SGD", False), ("SGD", True), ("Adam", True)):
        optimizer = make_optimizers()[name]()
        if is_fused:
            ops.fuse_optimizer(optimizer)
        names = []
        variable = keras.Variable(np.ones(3, np.float32))
        optimizer.build([variable])
        gradient = keras.ops.ones(3)
        with Watch():
            optimizer.apply([gradient], [variable])
        assert ("_local_scalar_dense" in names) != is_fused


# Cross-entropy ---------------------------------------------------------------


def draw_projection(rng, num_tokens, features, vocabulary_size, scale=1.0):
    shapes = ((num_tokens, features), (features, vocabulary_size))
    arrays = [rng.normal(0, scale, shape) for shape in shapes]
    arrays.append(rng.normal(0, scale, vocabulary_size))
    targets = rng.integers(vocabulary_size, size=num_tokens)
    return [a.astype(np.float32) for a in arrays], targets.astype(np.int32)


OURS, REFERENCE = ops.linear_cross_entropy, reference.linear_cross_entropy


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(
    ("function", "words_a_chunk"),
    # The reference has no chunks.
    [*((OURS, words) for words in (11, 4, 5, 1)), (REFERENCE, 11)],
    ids=["11", "4", "5", "1", "reference"],
)
def test_cross_entropy_and_gradients_are_the_same_in_any_chunks(
    rng, words_a_chunk, function, traced
):
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)
    upstream = rng.standard_normal(6).astype(np.float32)
    arguments = [features, kernel, bias, targets]

    def nll(*arguments):
        return function(*arguments, max_logits_bytes=4 * 6 * words_a_chunk)

    [got], gradients = run(nll, arguments, [upstream], traced=traced)
    exact = [a.astype(float) for a in (features, kernel, bias)]
    np.testing.assert_allclose(
        got, oracles.linear_cross_entropy(*exact, targets), **FLOAT32
    )
    expected = oracles.linear_cross_entropy_gradients(*exact, targets, upstream)
    for gradient, truth in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, truth, **FLOAT32)


@pytest.mark.parametrize("words_a_chunk", [11, 4])
def test_large_logits_neither_overflow_nor_vanish(rng, words_a_chunk):
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11, 30.0)

    def nll(*arguments):
        return ops.linear_cross_entropy(
            *arguments, max_logits_bytes=4 * 6 * words_a_chunk
        )

    upstream = np.ones(6, np.float32)
    [got], gradients = run(nll, [features, kernel, bias, targets], [upstream])
    exact = [a.astype(float) for a in (features, kernel, bias)]
    # Logits of 2000 in float32 are exact to 1e-4.
    np.testing.assert_allclose(
        got, oracles.linear_cross_entropy(*exact, targets), 1e-5, 1e-3
    )
    expected = oracles.linear_cross_entropy_gradients(*exact, targets, upstream)
    for gradient, truth in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, truth, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("words_a_chunk", [11, 4])
def test_words_may_be_forbidden_by_their_bias(rng, words_a_chunk):
    """All of a chunk's, of which then no logit is a number to go on from."""
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)
    bias[:5] = -np.inf
    targets = (targets % 6 + 5).astype(np.int32)
    nll = ops.linear_cross_entropy(
        *map(keras.ops.convert_to_tensor, (features, kernel, bias, targets)),
        max_logits_bytes=4 * 6 * words_a_chunk,
    )
    expected = oracles.negative_log_likelihood(
        (features @ kernel + bias)[:, 5:], targets - 5
    )
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(nll), expected, **FLOAT32
    )


@pytest.mark.parametrize("target", [-100, 11])
@pytest.mark.parametrize("words_a_chunk", [11, 4])
def test_target_that_is_no_word_is_not_counted_as_one(
    rng, words_a_chunk, target
):
    arrays, targets = draw_projection(rng, 6, 3, 11)
    targets[1] = target
    arguments = [
        *map(keras.ops.convert_to_tensor, arrays),
        keras.ops.convert_to_tensor(targets, "int32"),
    ]

    def nll():
        return keras.ops.convert_to_numpy(
            ops.linear_cross_entropy(
                *arguments, max_logits_bytes=4 * 6 * words_a_chunk
            )
        )

    if BACKEND != "jax" and words_a_chunk == 11:  # at once, by the framework
        with pytest.raises(Exception, match=r"out of bounds|does not index"):
            nll()
        return
    got = nll()
    assert np.isnan(got[1])
    assert np.isfinite(np.delete(got, 1)).all()


@pytest.mark.parametrize("words_a_chunk", [11, 4])
def test_padding_counts_nothing_whatever_its_target(rng, words_a_chunk):
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)
    weights = np.array([1, 0, 1, 0.5, 0, 1], np.float32)
    padded = np.where(weights == 0, -100, targets).astype(np.int32)

    def nll(features, kernel, bias, targets):
        return ops.linear_cross_entropy(
            features,
            kernel,
            bias,
            targets,
            keras.ops.convert_to_tensor(weights),
            max_logits_bytes=4 * 6 * words_a_chunk,
        )

    upstream = rng.standard_normal(6).astype(np.float32)
    [got], gradients = run(nll, [features, kernel, bias, padded], [upstream])
    exact = [a.astype(float) for a in (features, kernel, bias)]
    truth = oracles.linear_cross_entropy(*exact, targets) * weights
    np.testing.assert_allclose(got, truth, **FLOAT32)
    expected = oracles.linear_cross_entropy_gradients(
        *exact, targets, upstream * weights
    )
    for gradient, truth in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, truth, **FLOAT32)


@pytest.mark.parametrize("words_a_chunk", [11, 4])
def test_cross_entropy_keeps_the_shape_of_its_targets(rng, words_a_chunk):
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)

    def nll(*arguments):
        return ops.linear_cross_entropy(
            *arguments, max_logits_bytes=4 * 6 * words_a_chunk
        )

    [flat], _ = run(nll, [features, kernel, bias, targets])
    [got], _ = run(
        nll,
        [features.reshape(2, 3, 3), kernel, bias, targets.reshape(2, 3)],
        traced=True,
    )
    # The same sums, compiled and not.
    np.testing.assert_allclose(got, flat.reshape(2, 3), **FLOAT32)


@pytest.mark.parametrize("words_a_chunk", [None, 3])
def test_cross_entropy_takes_float64(rng, words_a_chunk):
    shapes = ((4, 3), (3, 7), (7,))
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays.append(np.array([0, 5, 6, 2], np.int32))

    def function(*tensors):
        size = words_a_chunk and 4 * 4 * 4 * words_a_chunk  # see chunk_size
        return ops.linear_cross_entropy(*tensors, max_logits_bytes=size)

    upstream = [np.ones(4)]
    with wide_jax():
        [nll], gradients = run(function, arrays, upstream, dtype="float64")
    [truth], true_gradients = run(
        reference.linear_cross_entropy, arrays, upstream
    )
    for got, expected in zip(
        (nll, *gradients), (truth, *true_gradients), strict=True
    ):
        np.testing.assert_allclose(got, expected, **FLOAT32)


def test_gradient_of_many_words_fits_float16(rng):
    """Their sum of exponentials, 80,000 here, does not."""
    arrays = [
        rng.normal(0, 0.1, shape).astype(np.float32)
        for shape in ((4, 3), (3, 120_000), (120_000,))
    ]
    arrays.append(np.array([0, 5, 119_999, 7], np.int32))
    upstream = [np.ones(4, np.float32)]
    results = {
        dtype: run(ops.linear_cross_entropy, arrays, upstream, dtype=dtype)
        for dtype in ("float16", "float32")
    }
    for half, single in zip(
        *(gradients for _, gradients in results.values()), strict=True
    ):
        # Ten bits of mantissa; sums over words too small for float16.
        np.testing.assert_allclose(half, single, rtol=2e-2, atol=2e-3)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch has two libraries")
@pytest.mark.parametrize("words_a_chunk", [11, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_is_right_by_mkl_and_by_onednn(
    rng, monkeypatch, dtype, tied, words_a_chunk
):
    """Which of the two multiplies depends on who made the processor."""
    import torch

    from multilstm.ops import torch as torch_ops

    if ops.has_gpu() or not torch.backends.mkldnn.is_available():
        pytest.skip("neither or only one of them multiplies there")
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)
    upstream = rng.standard_normal(6).astype(np.float32)
    stored = kernel.T.copy() if tied else kernel

    def nll(features, stored, bias, targets):
        kernel = stored.T if tied else stored
        return ops.linear_cross_entropy(
            features,
            kernel,
            bias,
            targets,
            max_logits_bytes=4 * 6 * words_a_chunk,
        )

    exact = [a.astype(float) for a in (features, kernel, bias)]
    truth = oracles.linear_cross_entropy(*exact, targets)
    truths = oracles.linear_cross_entropy_gradients(*exact, targets, upstream)
    near = FLOAT32 if dtype == "float32" else BFLOAT16
    for mkl_is_faster in (True, False):
        monkeypatch.setattr(torch_ops, "_MKL_IS_FASTER", mkl_is_faster)
        with torch_ops._Watch() as watch:
            [got], (d_features, d_stored, d_bias) = run(
                nll, [features, stored, bias, targets], [upstream], dtype=dtype
            )
        # In bfloat16 only the gradient of what is tied is PyTorch's product,
        # or all where the processor has none of it.
        if mkl_is_faster and tied:
            assert "mm" in watch.names
        elif dtype == "float32":
            assert ("mm" in watch.names) == mkl_is_faster
        d_kernel = d_stored.T if tied else d_stored
        np.testing.assert_allclose(got, truth, **near)
        for gradient, expected in zip(
            (d_features, d_kernel, d_bias), truths, strict=True
        ):
            np.testing.assert_allclose(gradient, expected, **near)


@pytest.mark.parametrize("words_a_chunk", [11, 4])
def test_cross_entropy_in_bfloat16_is_near(rng, words_a_chunk):
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)

    def nll(*arguments):
        return ops.linear_cross_entropy(
            *arguments, max_logits_bytes=4 * 6 * words_a_chunk
        )

    upstream = np.ones(6, np.float32)
    [got], gradients = run(
        nll, [features, kernel, bias, targets], [upstream], dtype="bfloat16"
    )
    exact = [a.astype(float) for a in (features, kernel, bias)]
    np.testing.assert_allclose(
        got, oracles.linear_cross_entropy(*exact, targets), **BFLOAT16
    )
    expected = oracles.linear_cross_entropy_gradients(*exact, targets, upstream)
    for gradient, truth in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, truth, **BFLOAT16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cross_entropy_is_in_float32_whatever_it_is_of(rng, dtype):
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)
    targets = keras.ops.convert_to_tensor(targets)
    floats = (
        keras.ops.convert_to_tensor(array, dtype)
        for array in (features, kernel, bias)
    )
    nll = ops.linear_cross_entropy(*floats, targets)
    assert keras.backend.standardize_dtype(nll.dtype) == "float32"


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's implementation")
@pytest.mark.parametrize("words_a_chunk", [11, 4])
def test_second_derivative_of_the_cross_entropy_is_refused(rng, words_a_chunk):
    import torch

    projection, targets = draw_projection(rng, 6, 3, 11)
    check_second_derivatives_are_refused(
        lambda *tensors: ops.linear_cross_entropy(
            *tensors,
            torch.tensor(targets),
            max_logits_bytes=4 * 6 * words_a_chunk,
        ),
        *(torch.tensor(array) for array in projection),
    )


def test_gradient_of_a_tied_kernel_is_that_of_its_table(rng):
    (features, kernel, bias), targets = draw_projection(rng, 6, 3, 11)

    def nll(table):
        tensors = [
            keras.ops.convert_to_tensor(a) for a in (features, bias, targets)
        ]
        return ops.linear_cross_entropy(
            tensors[0], keras.ops.transpose(table), *tensors[1:]
        )

    upstream = np.ones(6, np.float32)
    _, [gradient] = run(nll, [kernel.T.copy()], [upstream])
    exact = [a.astype(float) for a in (features, kernel, bias)]
    expected = oracles.linear_cross_entropy_gradients(*exact, targets, upstream)
    np.testing.assert_allclose(gradient, expected[1].T, **FLOAT32)


SOME = [ops.cross_entropy_of_some, reference.cross_entropy_of_some]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("function", SOME, ids=["ops", "reference"])
@pytest.mark.parametrize("num_wanted", [0, 1, 16, 17, 40])
def test_cross_entropy_of_some_is_0_for_the_others(
    rng, num_wanted, function, traced
):
    """Forty tokens, of which JAX takes 16 at a time; others have no target."""
    (_, kernel, _), targets = draw_projection(rng, 40, 3, 11)
    down = rng.standard_normal((5, 3)).astype(np.float32)
    features = rng.standard_normal((40, 5)).astype(np.float32)
    wanted = rng.permutation(40) < num_wanted
    targets = np.where(wanted, targets, -100).astype(np.int32)
    upstream = rng.standard_normal(40).astype(np.float32)

    def nll(features, down, kernel, targets, wanted):
        shape = (8, 5)
        features = keras.ops.reshape(features, (*shape, 5))
        targets, wanted = (
            keras.ops.reshape(array, shape) for array in (targets, wanted)
        )
        got = function(features, down, kernel, targets, wanted)
        return keras.ops.reshape(got, (-1,))

    arguments = [features, down, kernel, targets, wanted]
    [got], gradients = run(nll, arguments, [upstream], traced=traced)
    exact = [a.astype(float) for a in (features, down, kernel)]
    features, down, kernel = exact
    few = (features[wanted] @ down, kernel, np.zeros(11), targets[wanted])
    truth = np.zeros(40)
    truth[wanted] = oracles.linear_cross_entropy(*few)
    np.testing.assert_allclose(got, truth, **FLOAT32)
    d_few, d_kernel, _ = oracles.linear_cross_entropy_gradients(
        *few, upstream[wanted]
    )
    d_features = np.zeros_like(features)
    d_features[wanted] = d_few @ down.T
    expected = [d_features, features[wanted].T @ d_few, d_kernel]
    for gradient, truth in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, truth, **FLOAT32)


@pytest.mark.parametrize(
    ("num_tokens", "vocabulary_size", "max_bytes", "size"),
    [
        (6, 11, 10**6, 11),
        (6, 11, 4 * 6 * 11, 11),
        (6, 11, 4 * 6 * 11 - 1, 2),  # 48 bytes of 65
        (6, 11, 1, 1),
        (600, 250_000, 200 * 10**6, 19_231),  # 13: a 12th is a little too large
    ],
)
def test_chunks_are_one_that_fits_or_the_largest_of_which_four_fit(
    num_tokens, vocabulary_size, max_bytes, size
):
    assert reference.chunk_size(num_tokens, vocabulary_size, max_bytes) == size


# The rest --------------------------------------------------------------------


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


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_or_not_on_a_gpu_and_afterwards_as_before(
    allowed, monkeypatch
):
    implementation = importlib.import_module(f"multilstm.ops.{BACKEND}")
    expected = {
        "jax": "tensorfloat32" if allowed else "highest",
        "torch": ("high", True) if allowed else ("highest", False),
        "tensorflow": allowed,
    }
    before = float32_products()
    with ops.tf32(allowed):  # without a GPU it is not touched
        assert float32_products() == before
    monkeypatch.setattr(implementation, "has_gpu", lambda: True)
    with ops.tf32(allowed):
        assert float32_products() == expected[BACKEND]
        with ops.tf32(not allowed):
            assert float32_products() != expected[BACKEND]
        assert float32_products() == expected[BACKEND]
    assert float32_products() == before


def test_device_is_the_processor_where_no_gpu_is_used():
    assert ops.device_name() == processor_name()


@pytest.mark.skipif(
    BACKEND == "jax", reason="JAX has one list, of devices in use"
)
def test_gpu_that_is_hidden_or_left_alone_is_none(monkeypatch):
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    else:
        import tensorflow as tf

        gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [gpu])
    assert not ops.has_gpu()
    assert ops.device_name() == processor_name()


def test_memory_is_what_the_container_may_take(tmp_path, monkeypatch):
    limits = tmp_path / "max", tmp_path / "limit_in_bytes", tmp_path / "none"
    monkeypatch.setattr(reference, "_CONTAINER_LIMITS", limits)
    limits[0].write_text("max\n")  # as Linux says that there is none
    limits[1].write_text(f"{2**70}\n")
    whole = reference.default_logits_bytes()
    limits[1].write_text(f"{2**20}\n")
    assert reference.default_logits_bytes() == 2**20 // 128 < whole


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
        "print(ops.last_kernel(), np.asarray(y).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "reference: scan (1, 2, 4)"
    assert done.stderr.count("nothing made for the backend numpy") == 1
