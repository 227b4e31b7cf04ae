"""The operations in `keras.ops`: any backend, and the oracle for the others."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import keras
from keras import ops

from multilstm.devices import processor_name
from multilstm.ops.evidence import note_kernel

Weights = tuple[Any, Any, Any]
State = tuple[Any, Any]

# Of the device's memory, what the logits of one chunk may take: so much that
# a usual vocabulary fits at once, so little that it is never what runs out.
_LOGITS_SHARE = 128

# Where Linux tells a container of its own, by control groups of either kind.
_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def lstm(
    x: Any,
    h0: Any,
    c0: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    mask: Any = None,
) -> tuple[Any, Any, Any]:
    """Runs one LSTM layer over a batch of sequences.

    The input projection of all time steps is one product before the loop;
    only the recurrence is inside it.

    Args:
        x: Tensor of shape `(batch, time, features)`.
        h0: Initial hidden state, shape `(batch, units)`.
        c0: Initial cell state, shape `(batch, units)`.
        kernel: Shape `(features, 4 * units)`, gates in Keras's order: input,
            forget, cell, output.
        recurrent_kernel: Shape `(units, 4 * units)`.
        bias: Shape `(4 * units,)`.
        mask: Bool tensor of shape `(batch, time)`, or None. A step that is
            False leaves the state, and h stands for its output.

    Returns:
        `(y, h, c)`: hidden states of all steps, shape `(batch, time, units)`,
        and both states after the last, shape `(batch, units)`.

    Reference:
        Hochreiter and Schmidhuber, 1997; with the forget gate of Gers et
        al., 2000, equations 1 to 6.
    """
    note_kernel("reference: scan")
    projected = ops.matmul(x, kernel) + bias
    steps = [ops.transpose(projected, (1, 0, 2))]  # (time, batch, 4 * units)
    if mask is not None:
        steps.append(ops.transpose(ops.cast(mask, "bool"))[..., None])

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        h, c = carry
        projection, *is_read = inputs
        gates = projection + ops.matmul(h, recurrent_kernel)
        i, f, g, o = ops.split(gates, 4, axis=-1)
        new_c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        new_h = ops.sigmoid(o) * ops.tanh(new_c)
        if is_read:
            new_h = ops.where(is_read[0], new_h, h)
            new_c = ops.where(is_read[0], new_c, c)
        # TensorFlow's scan wants outputs of the same structure as the carry.
        return (new_h, new_c), (new_h, new_c)

    (h, c), (y, _) = ops.scan(step, (h0, c0), steps)
    return ops.transpose(y, (1, 0, 2)), h, c


def run_masked(
    unmasked: Any,
    x: Any,
    h0: Any,
    c0: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    mask: Any,
    *,
    argsort: Any = ops.argsort,
    take_along_axis: Any = ops.take_along_axis,
) -> tuple[Any, Any, Any]:
    """Runs an LSTM that knows no mask so that any mask is kept.

    Steps that are to be read move to the front of their row. Those left over
    at its end get a feature of their own, by which the input gate is shut and
    the forget gate open: the cell state stays what it was to the last bit.
    Outputs are then taken from where each row had come.

    Args:
        unmasked: `lstm` with all arguments but the mask.
        x: As for `lstm`, and so on.
        h0: Likewise.
        c0: Likewise.
        kernel: Likewise.
        recurrent_kernel: Likewise.
        bias: Likewise.
        mask: Likewise, and not None.
        argsort: As that of `keras.ops`.
        take_along_axis: Likewise.

    Returns:
        As `lstm`.
    """
    is_read = ops.cast(ops.cast(mask, "bool"), "int32")
    num_steps = ops.shape(x)[1]
    steps = ops.arange(num_steps, dtype="int32")
    order = argsort((1 - is_read) * num_steps + steps, axis=1)
    num_read = ops.cumsum(is_read, axis=1)  # (batch, time)
    is_left = (steps >= num_read[:, -1:])[..., None]
    x = take_along_axis(x, order[..., None], axis=1)
    x = ops.concatenate(
        [ops.where(is_left, ops.zeros_like(x), x), ops.cast(is_left, x.dtype)],
        axis=-1,
    )
    zeros = ops.zeros_like(bias)[: recurrent_kernel.shape[0]]
    # 80 saturates a sigmoid in float32, and exp(80) is still a number.
    hold = ops.concatenate([zeros - 80, zeros + 80, zeros, zeros])
    kernel = ops.concatenate([kernel, hold[None]])
    y, _, c = unmasked(x, h0, c0, kernel, recurrent_kernel, bias)
    place = ops.maximum(num_read - 1, 0)[..., None]
    y = ops.where(
        num_read[..., None] > 0, take_along_axis(y, place, axis=1), h0[:, None]
    )
    return y, y[:, -1], c


def has_xla(*, for_some: bool = False) -> bool:
    """Whether XLA can compile a step that has this backend's `lstm` in it.

    Args:
        for_some: Also with `cross_entropy_of_some` in it.
    """
    return True


def lstm_weights(weights: Any, dtype: str) -> Any:
    """A layer's weights as `lstm` takes them for inputs of a dtype.

    Args:
        weights: Tensors, in the dtype of the variables.
        dtype: Of the inputs.

    Returns:
        As many tensors of the same shapes.
    """
    return tuple(ops.cast(weight, dtype) for weight in weights)


def lstm_stack(
    x: Any, states: list[State], weights: list[Weights]
) -> tuple[Any, list[State]]:
    """Runs LSTM layers one on top of the other, without dropout between.

    Args:
        x: Tensor of shape `(batch, time, features)`.
        states: For each layer `(h0, c0)`, of shape `(batch, units)`.
        weights: For each layer `(kernel, recurrent_kernel, bias)`.

    Returns:
        The outputs of the last layer, `(batch, time, units)`, and for each
        layer its state after the last step.
    """
    return stack(lstm, x, states, weights)


def stack(
    layer: Any, x: Any, states: list[State], weights: list[Weights]
) -> tuple[Any, list[State]]:
    """`lstm_stack` by an `lstm` for one layer at a time."""
    final_states = []
    for (h0, c0), layer_weights in zip(states, weights, strict=True):
        x, h, c = layer(x, h0, c0, *layer_weights)
        final_states.append((h, c))
    return x, final_states


def pack_for_cudnn(weights: list[Weights]) -> Any:
    """All weights in the one array that cuDNN wants.

    First the matrices of every layer, transposed, then for every layer its
    bias and zeros for the second bias that cuDNN has.
    """
    matrices = [
        ops.reshape(ops.transpose(matrix), (-1,))
        for kernel, recurrent, _ in weights
        for matrix in (kernel, recurrent)
    ]
    biases = [
        part for _, _, bias in weights for part in (bias, ops.zeros_like(bias))
    ]
    return ops.concatenate(matrices + biases)


def linear_cross_entropy(
    features: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    weights: Any = None,
    *,
    max_logits_bytes: int | None = None,
) -> Any:
    """The cross-entropy of a softmax over `features @ kernel + bias`.

    Neither logits nor probabilities are returned, so that no implementation
    needs to hold more than a chunk of them: a part of the vocabulary at a
    time, in one chunk where that fits.

    Where an implementation has one chunk it keeps, for the way back, the
    exponentials less their sum at the targets: times `upstream / sum` they are
    the gradient of the logits, so that no softmax is made again. More chunks
    are computed again.

    Args:
        features: Tensor of shape `(..., features)`.
        kernel: Shape `(features, vocabulary)`.
        bias: Shape `(vocabulary,)`.
        targets: int32 tensor of shape `(...)`.
        weights: Of each target, shape `(...)`, or None. A target with weight
            0 counts nothing and may be any number; another that is no word
            costs NaN, or is refused.
        max_logits_bytes: Size of a chunk of logits in float32. Default: a
            128th of the device's memory. The reference does not chunk.

    Returns:
        Negative log-likelihoods in nats, float32 of shape `(...)`, times the
        weights.
    """
    if weights is not None:
        targets = ops.where(weights == 0, 0, targets)
    logits = ops.cast(ops.matmul(features, kernel) + bias, "float32")
    chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)
    nll = ops.logsumexp(logits, axis=-1) - chosen[..., 0]
    return nll if weights is None else nll * ops.cast(weights, "float32")


def cross_entropy_of_some(
    features: Any,
    down: Any,
    kernel: Any,
    targets: Any,
    is_wanted: Any,
) -> Any:
    """The cross-entropy of a softmax for those tokens that need it.

    An implementation computes nothing for the other tokens, but for a part of
    a block of them where it has blocks. The reference computes all.

    Args:
        features: Tensor of shape `(..., features)`.
        down: Shape `(features, fewer)`: comes first, to make features fewer.
        kernel: Shape `(fewer, words)`.
        targets: int32 tensor of shape `(...)`; any number where not wanted.
        is_wanted: Bool tensor of shape `(...)`.

    Returns:
        `-log softmax(features @ down @ kernel)` at the targets in nats,
        float32 of shape `(...)`; 0 where not wanted.
    """
    nll = linear_cross_entropy(
        ops.matmul(features, down),
        kernel,
        ops.zeros(kernel.shape[1:], kernel.dtype),
        ops.where(is_wanted, targets, 0),
    )
    return ops.where(is_wanted, nll, 0.0)


def chunk_size(
    num_tokens: int, vocabulary_size: int, max_logits_bytes: int
) -> int:
    """The whole vocabulary where its logits fit the bytes, else equal parts.

    Beside the logits of a part there are, not much smaller, its weights,
    their gradient and a copy on the way: together they fit the bytes.
    """
    bytes_of_a_word = 4 * num_tokens
    if vocabulary_size * bytes_of_a_word <= max_logits_bytes:
        return vocabulary_size
    largest = max(max_logits_bytes // 4 // bytes_of_a_word, 1)
    num_chunks = -(-vocabulary_size // largest)
    return -(-vocabulary_size // num_chunks)


def default_logits_bytes(device_memory: int | None = None) -> int:
    """What a chunk of logits may take on a device with so much memory."""
    return (device_memory or _host_memory()) // _LOGITS_SHARE


def _host_memory() -> int:
    """Bytes of this machine's memory, or what its container may take."""
    if not hasattr(os, "sysconf"):
        import psutil  # on Windows

        return int(psutil.virtual_memory().total)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _CONTAINER_LIMITS:
        if limit.exists() and limit.read_text().strip().isdecimal():
            memory = min(memory, int(limit.read_text()))
    return memory


def embedding_lookup(table: Any, token_ids: Any) -> Any:
    """Looks up rows, with a dense gradient for the table.

    Args:
        table: Shape `(vocabulary_size, embedding_dim)`.
        token_ids: int32 tensor of any shape.

    Returns:
        Tensor of shape `(*token_ids.shape, embedding_dim)`.
    """
    return ops.take(table, token_ids, axis=0)


def fuse_optimizer(optimizer: Any) -> None:
    """Makes an optimizer update the weights in one pass, where it can.

    That is Adam and SGD without momentum, Keras's and this package's, with or
    without `global_clipnorm` and L2. XLA does it for JAX by itself.

    Args:
        optimizer: A Keras optimizer. Its settings, its state and, to
            rounding, its results stay what they were.
    """


def is_plain(optimizer: Any, kind: str) -> bool:
    """Whether an optimizer is of that name, without extras of Keras's."""
    extras = (
        "weight_decay",
        "clipnorm",
        "clipvalue",
        "use_ema",
        "gradient_accumulation_steps",
        "loss_scale_factor",
        "amsgrad",
        "momentum",
    )
    return (
        type(optimizer).__name__ == kind
        and type(optimizer).__module__.partition(".")[0]
        in ("keras", "multilstm")
        and not any(getattr(optimizer, extra, None) for extra in extras)
    )


def update_plain(
    update: Callable[..., None],
    kind: str,
    optimizer: Any,
    gradients: list[Any],
    variables: list[Any],
) -> None:
    """An update in one pass, or Keras's if extras were set since."""
    if not is_plain(optimizer, kind):
        update = type(optimizer)._backend_apply_gradients
    update(optimizer, gradients, variables)


def dropout(inputs: Any, rate: float, noise_shape: Any, seed: Any) -> Any:
    """Zeros a share of the inputs and scales the others up.

    Args:
        inputs: Tensor of any shape.
        rate: The share, in 0..1.
        noise_shape: That of the mask, which is broadcast; None in it is the
            size of the inputs, None for it their shape.
        seed: A `keras.random.SeedGenerator`.

    Returns:
        Tensor of the inputs' shape and dtype.
    """
    return keras.random.dropout(
        inputs, rate, noise_shape=noise_shape, seed=seed
    )


def jit_of_steps(asked: Any) -> Any:
    """What Keras is to be told of `jit_compile` for a `LanguageModel`."""
    return asked


def steps_per_dispatch(flops: float) -> int:
    """How many training steps to start at once; here there is nothing to win.

    Args:
        flops: Floating-point operations of a step.

    Returns:
        Their number, 1 or more.
    """
    return 1


def steps_in_a_dispatch(flops: float, *, on_cpu: bool) -> int:
    """As many steps as take about a second on a CPU, a tenth on a GPU.

    More would only keep progress, and a person who stops it, waiting.
    """
    flops_of_all, most = (1.5e11, 16) if on_cpu else (1e13, 64)
    return max(1, min(most, round(flops_of_all / flops)))


def make_train_function(model: Any) -> Any:
    """What `fit` calls for `model.steps_per_execution` batches at a time.

    Args:
        model: A compiled `LanguageModel`.

    Returns:
        Keras's `train_function` for this backend, or None where Keras's own
        does as well.
    """


def make_test_function(model: Any) -> Any:
    """What `evaluate` calls; as `make_train_function`."""


def feed(dataset: Any, *, shuffle: bool) -> Any:
    """What `fit` takes for a dataset of small arrays; here itself.

    Args:
        dataset: A `keras.utils.PyDataset`: `RowStarts`, or one of ids, which
            is never shuffled.
        shuffle: Whether the order of the batches is new in every epoch, where
            Keras does not see to that.
    """
    return dataset


def check_rows(batch: Any, rows: int) -> None:
    """Fails when the step runs with another number of rows.

    Only TensorFlow compiles a step without knowing that number.
    """


def keeping_variables(model: Any) -> AbstractContextManager[None]:
    """Leaves a model its variables where what is in the block fails."""
    return nullcontext()


def sync_variables(model: Any) -> None:
    """Brings a model's variables up to date within `fit`; here they are.

    JAX's compiled step keeps the values to itself until the epoch ends.
    """


def has_gpu() -> bool:
    """Whether there is a GPU that the backend computes on."""
    return False


@contextmanager
def on_host() -> Iterator[None]:
    """Keeps what is made and computed within off the GPU.

    For ids and seeds, where a backend would have them go back and forth; here
    they stay where they are.
    """
    yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Lets products of float32 on a GPU be TF32's, or keeps them float32's.

    TF32 has the range of float32 and 10 bits of its 23. Frameworks differ in
    what they do untold. Elsewhere it changes nothing.
    """
    yield


def device_name() -> str:
    """The processor's name, where no framework knows of a better device."""
    return processor_name()
