"""TensorFlow: cuDNN on a GPU; elsewhere a loop with a gradient of our own.

The loop back leaves only the gates' gradients, and each weight's gradient is
one product after it. What is needed for a gradient alone waits for it, and a
weight's gradient comes after the last use of the weight: TensorFlow starts
what it can, and keeps what it made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from multilstm.devices import gpu_memory
from multilstm.ops import reference
from multilstm.ops.evidence import explain_once, note_kernel
from multilstm.ops.parallel_tensorflow import workers

# Where TensorFlow does not know the number of tokens when it traces a step,
# chunks of logits are made for this many.
_ASSUMED_TOKENS = 4096


def lstm(
    x: Any,
    h0: Any,
    c0: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    mask: Any = None,
) -> tuple[Any, Any, Any]:
    """As `reference.lstm`: cuDNN on a GPU, a loop of our own elsewhere."""
    x, h0, c0, kernel, recurrent_kernel, bias = (
        tf.convert_to_tensor(argument)
        for argument in (x, h0, c0, kernel, recurrent_kernel, bias)
    )
    arguments = (x, h0, c0, kernel, recurrent_kernel, bias)
    if mask is not None:
        return reference.run_masked(lstm, *arguments, mask)
    if not has_gpu():
        return _loop(*arguments)
    y, [(h, c)] = _cudnn(x, [(h0, c0)], [arguments[3:]])
    return y, h, c


def lstm_stack(
    x: Any,
    states: list[reference.State],
    weights: list[reference.Weights],
) -> tuple[Any, list[reference.State]]:
    """As `reference.lstm_stack`: one call for layers of one size on a GPU."""
    same_size = len({recurrent.shape[0] for _, recurrent, _ in weights}) == 1
    if has_gpu() and same_size:
        return _cudnn(x, states, weights)
    return reference.stack(lstm, x, states, weights)


def has_xla(*, for_some: bool = False) -> bool:
    """As `reference.has_xla`: neither calls of cuDNN nor sizes of the moment.

    XLA cannot compile a tensor whose size depends on numbers.
    """
    return not (for_some or has_gpu())


def has_gpu() -> bool:
    """As `reference.has_gpu`."""
    return bool(tf.config.get_visible_devices("GPU"))


def on_host() -> Any:
    """As `reference.on_host`.

    On a GPU TensorFlow has int32 on the host, except for a few operations: a
    lookup in a text copies the whole text to the GPU at each step and waits
    for what it found. The state of a seed is int64 and on the GPU, but the
    operation that makes a key of it wants it on the host, and waits, too.
    """
    return tf.device("CPU:0")


def dropout(inputs: Any, rate: float, noise_shape: Any, seed: Any) -> Any:
    """As `reference.dropout`, bit for bit, with the seed on the host."""
    if rate == 1:
        return tf.zeros_like(inputs)
    with on_host():
        key = tf.math.floormod(seed.next(), tf.int32.max - 1)
        key = tf.cast(key, tf.int32)
    if noise_shape is not None:
        shape = tf.shape(inputs)
        noise_shape = [
            shape[axis] if size is None else size
            for axis, size in enumerate(noise_shape)
        ]
    return tf.nn.experimental.stateless_dropout(
        inputs, rate=rate, noise_shape=noise_shape, seed=key
    )


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """As `reference.tf32`."""
    if not has_gpu():
        yield
        return
    config = tf.config.experimental
    before = config.tensor_float_32_execution_enabled()
    config.enable_tensor_float_32_execution(allowed)
    try:
        yield
    finally:
        config.enable_tensor_float_32_execution(before)


def _cudnn(
    x: Any,
    states: list[reference.State],
    weights: list[reference.Weights],
) -> tuple[Any, list[reference.State]]:
    """Layers of one size, in one call of cuDNN."""
    note_kernel("tensorflow: cudnn")
    if x.dtype != tf.float32:
        explain_once(
            f"tensorflow: of this model in {x.dtype.name} the LSTMs run in "
            "cuDNN's float32, with TF32 products where those are on."
        )
    h0, c0 = (
        tf.cast(tf.stack(state), tf.float32)
        for state in zip(*states, strict=True)
    )
    y, h, c, _, _ = tf.raw_ops.CudnnRNNV3(
        input=tf.cast(_time_first(x), tf.float32),
        input_h=h0,
        input_c=c0,
        params=tf.cast(_pack(weights), tf.float32),
        sequence_lengths=tf.fill(tf.shape(x)[:1], tf.shape(x)[1]),
        rnn_mode="lstm",
        time_major=True,
        is_training=True,  # keeps what the gradient needs
    )
    y, h = (tf.cast(output, x.dtype) for output in (_time_first(y), h))
    c = tf.cast(c, states[0][1].dtype)
    return y, [(h[layer], c[layer]) for layer in range(len(weights))]


def _pack(weights: list[reference.Weights]) -> Any:
    """As `reference.pack_for_cudnn`, taken apart again by one operation.

    TensorFlow's own gradient of it is a slice for each part.
    """

    @tf.custom_gradient
    def pack(*flat: Any) -> Any:
        layers = [flat[first : first + 3] for first in range(0, len(flat), 3)]
        matrices = [matrix for layer in layers for matrix in layer[:2]]
        biases = [bias for *_, bias in layers]
        # Each bias is followed by cuDNN's second one.
        sizes = [tensor.shape.num_elements() for tensor in matrices]
        sizes += [bias.shape[0] for bias in biases for _ in range(2)]

        def gradient(upstream: Any) -> list[Any]:
            parts = tf.split(upstream, sizes)
            d_matrices = [
                tf.transpose(tf.reshape(part, matrix.shape[::-1]))
                for part, matrix in zip(parts, matrices, strict=False)
            ]
            d_biases = parts[len(matrices) :: 2]
            return [
                gradient
                for layer, d_bias in enumerate(d_biases)
                for gradient in (*d_matrices[2 * layer :][:2], d_bias)
            ]

        return reference.pack_for_cudnn(layers), gradient

    return pack(*(tensor for layer in weights for tensor in layer))


def _loop(
    x: Any, h0: Any, c0: Any, kernel: Any, recurrent: Any, bias: Any
) -> tuple[Any, Any, Any]:
    note_kernel("tensorflow: loop")

    @tf.custom_gradient
    def run(
        x: Any, h0: Any, c0: Any, kernel: Any, recurrent: Any, bias: Any
    ) -> Any:
        inputs = _time_first(x)
        flat = tf.reshape(inputs, (-1, x.shape[-1]))  # (time * batch, features)
        projected = tf.reshape(
            tf.nn.bias_add(tf.matmul(flat, kernel), bias),
            tf.concat([tf.shape(inputs)[:2], [kernel.shape[1]]], 0),
        )
        hs, cs, gates = _forward(projected, h0, c0, recurrent)

        def gradient(dy: Any, dh: Any, dc: Any) -> tuple[Any, ...]:
            with tf.control_dependencies([dy]):  # else at the step's start
                h_before = tf.concat([h0[None], hs[:-1]], 0)
                c_before = tf.concat([tf.cast(c0[None], cs.dtype), cs[:-1]], 0)
                recurrent_transposed = tf.transpose(recurrent)
            d_gates, dh0, dc0 = _backward(
                _time_first(dy),
                dh,
                dc,
                gates,
                cs,
                c_before,
                recurrent_transposed,
            )
            d_flat = tf.reshape(d_gates, (-1, kernel.shape[1]))
            h_flat = tf.reshape(h_before, (-1, recurrent.shape[0]))
            dx = tf.matmul(d_flat, kernel, transpose_b=True)
            # Once a weight's gradient is there, nothing may read the weight:
            # an optimizer would copy it instead of writing in its place.
            with tf.control_dependencies([dx]):
                d_kernel = tf.matmul(flat, d_flat, transpose_a=True)
            return (
                _time_first(tf.reshape(dx, tf.shape(inputs))),
                dh0,
                dc0,
                d_kernel,
                tf.matmul(h_flat, d_flat, transpose_a=True),
                tf.reduce_sum(d_flat, 0),
            )

        return (_time_first(hs), hs[-1], tf.cast(cs[-1], c0.dtype)), gradient

    y, h, c = run(x, h0, c0, kernel, recurrent, bias)
    y.set_shape((*x.shape[:2], recurrent.shape[0]))
    return y, h, c


def _forward(
    projected: Any, h0: Any, c0: Any, recurrent: Any
) -> tuple[Any, ...]:
    """All hidden states, cell states and gates, `(time, batch, ...)`."""
    num_steps = tf.shape(projected)[0]
    wide = _wide(h0)

    def step(t: Any, h: Any, c: Any, *arrays: Any) -> tuple[Any, ...]:
        gates = tf.cast(projected[t] + tf.matmul(h, recurrent), wide)
        i, f, g, o = tf.split(gates, 4, -1)
        i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
        c = f * c + i * g
        h = tf.cast(o * tf.tanh(c), h.dtype)
        gates = tf.cast(tf.concat([i, f, g, o], -1), h.dtype)
        written = (
            array.write(t, value)
            for array, value in zip(arrays, (h, c, gates), strict=True)
        )
        return t + 1, h, c, *written

    c0 = tf.cast(c0, wide)
    rows, (units, width) = h0.shape[0], recurrent.shape
    # TensorFlow Lite guesses shapes that it is not told, in silence.
    arrays = (
        tf.TensorArray(dtype, num_steps, element_shape=(rows, size))
        for dtype, size in ((h0.dtype, units), (wide, units), (h0.dtype, width))
    )
    _, _, _, *arrays = tf.while_loop(
        lambda t, *_: t < num_steps, step, (0, h0, c0, *arrays)
    )
    return tuple(array.stack() for array in arrays)


def _wide(tensor: Any) -> Any:
    """What cell states are in: of fewer bits than float32 they lose steps."""
    return tf.float64 if tensor.dtype == tf.float64 else tf.float32


def _backward(
    dy: Any,
    dh: Any,
    dc: Any,
    gates: Any,
    cs: Any,
    c_before: Any,
    recurrent_transposed: Any,
) -> tuple[Any, Any, Any]:
    """The gates' gradients before their activations, and the states'."""
    num_steps = tf.shape(dy)[0]
    wide = _wide(dy)

    def step(t: Any, dh: Any, dc: Any, array: Any) -> tuple[Any, ...]:
        i, f, g, o = tf.split(tf.cast(gates[t], wide), 4, -1)
        dh = dh + tf.cast(dy[t], wide)
        tanh_c = tf.tanh(cs[t])
        d_cell = dc + dh * o * (1 - tanh_c * tanh_c)
        d_gates = tf.concat(
            [
                d_cell * g * i * (1 - i),
                d_cell * c_before[t] * f * (1 - f),
                d_cell * i * (1 - g * g),
                dh * tanh_c * o * (1 - o),
            ],
            -1,
        )
        d_gates = tf.cast(d_gates, gates.dtype)
        dh = tf.cast(tf.matmul(d_gates, recurrent_transposed), wide)
        return t - 1, dh, d_cell * f, array.write(t, d_gates)

    _, dh0, dc0, array = tf.while_loop(
        lambda t, *_: t >= 0,
        step,
        (
            num_steps - 1,
            tf.cast(dh, wide),
            tf.cast(dc, wide),
            tf.TensorArray(
                gates.dtype, num_steps, element_shape=gates.shape[1:]
            ),
        ),
    )
    return array.stack(), tf.cast(dh0, dh.dtype), tf.cast(dc0, dc.dtype)


def linear_cross_entropy(
    features: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    weights: Any = None,
    *,
    max_logits_bytes: int | None = None,
    most_tokens: int | None = None,
) -> Any:
    """As `reference.linear_cross_entropy`, in chunks of the vocabulary.

    Where the number of tokens is not known they are at most `most_tokens`.
    """
    kernel, bias = tf.convert_to_tensor(kernel), tf.convert_to_tensor(bias)
    shape = tf.shape(targets)
    num_tokens = targets.shape.num_elements() or most_tokens or _ASSUMED_TOKENS
    targets = tf.reshape(targets, (-1,))
    if weights is not None:
        weights = tf.reshape(tf.cast(weights, tf.float32), (-1,))
        targets = tf.where(weights == 0, 0, targets)
    features = tf.reshape(features, (-1, kernel.shape[0]))
    size = reference.chunk_size(
        num_tokens,
        kernel.shape[1],
        max_logits_bytes
        or reference.default_logits_bytes(gpu_memory() if has_gpu() else None),
    )
    nll = _cross_entropy(features, kernel, bias, targets, size)
    is_word = (targets >= 0) & (targets < kernel.shape[1])
    nll = tf.where(is_word, nll, float("nan"))
    if weights is not None:
        nll = nll * weights
    return tf.reshape(nll, shape)


def cross_entropy_of_some(
    features: Any,
    down: Any,
    kernel: Any,
    targets: Any,
    is_wanted: Any,
) -> Any:
    """As `reference.cross_entropy_of_some`, of as many as there are."""
    shape = tf.shape(targets)
    places = tf.where(tf.reshape(is_wanted, (-1,)))[:, 0]
    features = tf.reshape(features, (-1, features.shape[-1]))
    nll = linear_cross_entropy(
        tf.matmul(embedding_lookup(features, places), down),
        kernel,
        tf.zeros(kernel.shape[1:], kernel.dtype),
        tf.gather(tf.reshape(targets, (-1,)), places),
        most_tokens=targets.shape.num_elements(),
    )
    num_tokens = tf.size(targets, places.dtype)
    nll = tf.scatter_nd(places[:, None], nll, [num_tokens])
    return tf.reshape(nll, shape)


def _cross_entropy(
    features: Any, kernel: Any, bias: Any, targets: Any, size: int
) -> Any:
    vocabulary_size = kernel.shape[1]
    starts = range(0, vocabulary_size, size)

    @tf.custom_gradient
    def run(features: Any, kernel: Any, bias: Any) -> Any:
        total, log_total, chosen, exponentials = _read_chunks(
            features, kernel, bias, targets, starts
        )

        def gradient(upstream: Any) -> tuple[Any, ...]:
            if exponentials is None:
                return _gradients_of_chunks(
                    features, kernel, bias, targets, starts, log_total, upstream
                )
            scale = (upstream / total)[:, None]
            return _gradients(features, kernel, bias, exponentials, scale)

        return log_total - chosen, gradient

    return run(features, kernel, bias)


def _read_chunks(
    features: Any, kernel: Any, bias: Any, targets: Any, starts: range
) -> tuple[Any, ...]:
    if len(starts) == 1:
        return _read_at_once(features, kernel, bias, targets)
    total = tf.zeros_like(targets, tf.float32)
    # Not from -inf on: less itself it is no number.
    largest, chosen = total + tf.float32.min, total
    for first in starts:
        # One after another, so that one chunk of logits is there at a time.
        with tf.control_dependencies([total]):
            part = slice(first, first + starts.step)
            logits = _logits(features, kernel[:, part], bias[part])
            places, is_here = _places(targets, first, logits.shape[1])
            chosen += tf.where(is_here > 0, tf.gather_nd(logits, places), 0.0)
            new_largest = tf.maximum(largest, tf.reduce_max(logits, 1))
            # Last, so that it takes the place of the logits in memory.
            with tf.control_dependencies([chosen, new_largest]):
                exponentials = tf.exp(logits - new_largest[:, None])
            total = total * tf.exp(largest - new_largest)
            total += tf.reduce_sum(exponentials, 1)
            largest = new_largest
    return total, largest + tf.math.log(total), chosen, None


def _read_at_once(
    features: Any, kernel: Any, bias: Any, targets: Any
) -> tuple[Any, ...]:
    logits = _logits(features, kernel, bias)
    places = tf.stack([tf.range(tf.size(targets)), targets], 1)
    chosen = tf.gather_nd(logits, places)
    largest = tf.reduce_max(logits, 1, keepdims=True)
    # Last, so that it takes the place of the logits in memory.
    with tf.control_dependencies([chosen]):
        exponentials = tf.exp(logits - largest)
    total = tf.reduce_sum(exponentials, 1)
    log_total = largest[:, 0] + tf.math.log(total)
    # They reach the number of words: too much for float16.
    if features.dtype == tf.float16:
        return total, log_total, chosen, None
    with tf.control_dependencies([total]):
        exponentials = tf.tensor_scatter_nd_sub(exponentials, places, total)
    exponentials = tf.cast(exponentials, features.dtype)
    return total, log_total, chosen, exponentials


def _gradients(
    features: Any, kernel: Any, bias: Any, errors: Any, scale: Any
) -> tuple[Any, ...]:
    """Of features, kernel and bias from `errors * scale`, the logits'."""
    scale = tf.cast(scale, errors.dtype)
    d_features = tf.matmul(errors, kernel, transpose_b=True) * scale
    # Last, for the same reason as in the LSTM.
    with tf.control_dependencies([d_features]):
        d_kernel = tf.matmul(features * scale, errors, transpose_a=True)
    d_bias = tf.cast(tf.matmul(scale, errors, transpose_a=True)[0], bias.dtype)
    return d_features, d_kernel, d_bias


def _gradients_of_chunks(
    features: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    starts: range,
    log_total: Any,
    upstream: Any,
) -> tuple[Any, ...]:
    d_features, d_kernel = tf.zeros_like(features), None
    d_bias = []
    for first in starts:
        part = slice(first, first + starts.step)
        done = [d_features] if d_kernel is None else [d_features, d_kernel]
        with tf.control_dependencies(done):
            logits = _logits(features, kernel[:, part], bias[part])
            places, is_here = _places(targets, first, logits.shape[1])
            errors = tf.exp(logits - log_total[:, None])
            errors = tf.tensor_scatter_nd_sub(errors, places, is_here)
            features_part, kernel_part, bias_part = _gradients(
                features,
                kernel[:, part],
                bias,
                tf.cast(errors, features.dtype),
                upstream[:, None],
            )
            d_features += features_part
            d_kernel = _put(d_kernel, kernel_part, first, kernel.shape)
            d_bias.append(bias_part)
    return d_features, d_kernel, tf.concat(d_bias, 0)


def _put(whole: Any, part: Any, first: int, shape: Any) -> Any:
    """Columns into a matrix, in place; None for one that is not there yet.

    Of the operations that update a part this one alone writes in place and
    is known to XLA. Zeros to start with would be kept as a constant.
    """
    if whole is None:
        return tf.pad(part, [(0, 0), (0, shape[1] - part.shape[1])])
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=whole,
        begin=(0, first),
        end=(shape[0], first + part.shape[1]),
        strides=(1, 1),
        value=part,
    )


def _logits(features: Any, kernel: Any, bias: Any) -> Any:
    logits = tf.nn.bias_add(tf.matmul(features, kernel), bias)
    return tf.cast(logits, tf.float32)


def _places(targets: Any, first: int, width: int) -> tuple[Any, Any]:
    """`(row, place in the chunk)` of each target, and 1 where it is there."""
    places = targets - first
    is_here = tf.cast((places >= 0) & (places < width), tf.float32)
    places = tf.clip_by_value(places, 0, width - 1)
    rows = tf.range(tf.shape(targets)[0])
    return tf.stack([rows, places], 1), is_here


def _time_first(x: Any) -> Any:
    """`(batch, time, ...)` <-> `(time, batch, ...)`."""
    return tf.transpose(x, (1, 0, 2))


def embedding_lookup(table: Any, token_ids: Any) -> Any:
    """Looks up rows, with a dense gradient for the table.

    TensorFlow's own gradient of a lookup is a list of rows in which a word
    that occurs twice stands twice. `tf.linalg.global_norm`, and so Keras's
    clipping, takes the norm of that list instead of the gradient's: for the
    ids 1, 2, 2 and gradients of ones over 4 columns 3.46 instead of 4.47.
    """
    table = tf.convert_to_tensor(table)

    @tf.custom_gradient
    def lookup(table: Any) -> tuple[Any, Any]:
        def gradient(upstream: Any) -> Any:
            return tf.math.unsorted_segment_sum(
                tf.reshape(upstream, (-1, tf.shape(table)[1])),
                tf.reshape(token_ids, (-1,)),
                tf.shape(table)[0],
            )

        return tf.gather(table, token_ids), gradient

    return lookup(table)


def fuse_optimizer(optimizer: Any) -> None:
    """As `reference.fuse_optimizer`, by TensorFlow's own training operations.

    Keras writes the same formulas as a dozen passes over the weights.
    """
    is_ours = type(optimizer).__module__.startswith("multilstm.")
    if tf.distribute.has_strategy() and not is_ours:
        return  # Keras then adds up the gradients of replicas, ours do before
    for kind, update in (("Adam", _update_adam), ("SGD", _update_sgd)):
        if reference.is_plain(optimizer, kind):
            # Keras's own place for what a backend does in another way.
            optimizer._backend_apply_gradients = partial(
                reference.update_plain, update, kind, optimizer
            )


def _update_adam(
    optimizer: Any, gradients: list[Any], variables: list[Any]
) -> None:
    if any(variable.dtype in ("bfloat16", "float16") for variable in variables):
        # In which 0.999 is 1, and the kernel then divides by epsilon.
        kind = type(optimizer)
        kind._backend_apply_gradients(optimizer, gradients, variables)
        return
    step = tf.cast(optimizer.iterations.value, tf.float32) + 1
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    scale = _clipping(optimizer, gradients)
    numbers = (
        tf.pow(optimizer.beta_1, step),
        tf.pow(optimizer.beta_2, step),
        _learning_rate(optimizer),
    )
    for gradient, variable in zip(gradients, variables, strict=True):
        place = optimizer._get_variable_index(variable)
        power_1, power_2, rate = (tf.cast(n, gradient.dtype) for n in numbers)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.value.handle,
            m=optimizer._momentums[place].value.handle,
            v=optimizer._velocities[place].value.handle,
            beta1_power=power_1,
            beta2_power=power_2,
            lr=rate,
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            epsilon=optimizer.epsilon,
            grad=_clipped(optimizer, gradient, variable, scale),
        )


def _update_sgd(
    optimizer: Any, gradients: list[Any], variables: list[Any]
) -> None:
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    scale = _clipping(optimizer, gradients)
    rate = _learning_rate(optimizer)
    l2 = getattr(optimizer, "l2", 0.0)
    if scale is not None and not l2:  # a pass over the gradients is saved
        rate, scale = rate * tf.cast(scale, rate.dtype), None
    for gradient, variable in zip(gradients, variables, strict=True):
        tf.raw_ops.ResourceApplyGradientDescent(
            var=variable.value.handle,
            alpha=tf.cast(rate, gradient.dtype),
            delta=_clipped(optimizer, gradient, variable, scale),
        )


def _clipped(optimizer: Any, gradient: Any, variable: Any, scale: Any) -> Any:
    """The gradient that an optimizer uses, with that of L2 in it."""
    if scale is not None:
        gradient = gradient * scale
    l2 = getattr(optimizer, "l2", 0.0)
    return gradient + l2 * variable.value if l2 else gradient


def _learning_rate(optimizer: Any) -> Any:
    rate = optimizer.learning_rate
    return tf.cast(getattr(rate, "value", rate), tf.float32)


def _clipping(optimizer: Any, gradients: list[Any]) -> Any:
    """What gradients are multiplied by; None for nothing."""
    if not optimizer.global_clipnorm:
        return None
    norm = tf.linalg.global_norm(gradients)
    scale = optimizer.global_clipnorm / tf.maximum(
        norm, optimizer.global_clipnorm
    )
    return scale + (norm - norm)  # of an infinite norm NaN, as Keras's


def steps_per_dispatch(flops: float) -> int:
    """As `reference.steps_per_dispatch`."""
    return reference.steps_in_a_dispatch(flops, on_cpu=not has_gpu())


def feed(dataset: Any, *, shuffle: bool) -> Any:
    """As `reference.feed`: a `tf.data.Dataset` without Python behind it.

    The one that Keras makes costs about two milliseconds a batch, and tunes
    itself in a thread that sleeps 10, 20, 40 ... ms. At an epoch's end
    TensorFlow waits until it wakes: of an epoch of 900 ms 1,280 were seen.
    """
    if getattr(dataset, "is_small", False):
        arrays = np.stack([dataset[k][0] for k in range(len(dataset))])
        batches = tf.data.Dataset.from_tensor_slices((arrays,))
        if shuffle:
            batches = batches.shuffle(len(arrays))
    else:
        # Keras would take the lengths of the first two for those of all.
        varies = getattr(dataset, "varies", False)
        length = None if varies else dataset.sequence_length
        ids = tf.TensorSpec((dataset.batch_size, length), tf.int32)
        batches = tf.data.Dataset.from_generator(
            lambda: (dataset[k] for k in range(len(dataset))),
            output_signature=(ids, ids),
        ).apply(tf.data.experimental.assert_cardinality(len(dataset)))
    options = tf.data.Options()
    options.autotune.enabled = False
    batches = batches.with_options(options)
    return batches if workers() is None else _dealt(batches)


def _dealt(batches: Any) -> Any:
    """The dataset as one that a strategy has dealt out.

    It has the rows of this process already. Keras would have its strategy
    deal them out once more, whole batches to each.
    """
    kind: Any = type(batches)

    class Dealt(kind, tf.distribute.DistributedDataset):
        pass

    batches.__class__ = Dealt
    return batches


def check_rows(batch: Any, rows: int) -> None:
    """Fails when the step runs with another number of rows."""
    tf.debugging.assert_equal(
        tf.shape(batch)[0],
        rows,
        f"The state is carried for {rows} rows. Use that batch size, or pass "
        "`initial_state`.",
    )


def device_name() -> str:
    """The name of the device that TensorFlow computes on."""
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        return reference.device_name()
    details = tf.config.experimental.get_device_details(gpus[0])
    return str(details.get("device_name", gpus[0].name))
