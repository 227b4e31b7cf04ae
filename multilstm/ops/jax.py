"""JAX: cuDNN on a GPU; elsewhere a scan whose gradient is written by hand.

XLA's own gradient of a scan adds up the weights' gradients step by step, one
skinny product each. Here the loop back leaves only the gates' gradients, and
each weight's gradient is one product after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from jax.experimental import rnn
from jax.experimental.layout import Layout, with_layout_constraint

from multilstm.ops import reference
from multilstm.ops.evidence import explain_once, note_kernel

_float32 = jnp.float32

# Blocks in which a part of a batch's tokens is worked off: each reads all
# weights, and a block that is not full is computed in whole.
_LEAST_BLOCK, _MOST_BLOCKS = 16, 8

# For what has a loop in it. Outside of a compiled step JAX would compile that
# anew in every call, in which the loop's body is a new function. Within a step
# nothing changes: it is inlined.
_compiled = partial(jax.jit, inline=True)


def lstm(
    x: Any,
    h0: Any,
    c0: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    mask: Any = None,
) -> tuple[Any, Any, Any]:
    """As `reference.lstm`: cuDNN on a GPU, a scan of our own elsewhere."""
    arguments = (x, h0, c0, kernel, recurrent_kernel, bias)
    if mask is not None:
        return reference.run_masked(lstm, *arguments, mask)
    if not _has_cudnn():
        note_kernel("jax: scan")
        y, h, c = _lstm(*arguments)
    else:
        y, [(h, c)] = _cudnn(x, [(h0, c0)], [arguments[3:]])
    return y, h, c


def lstm_stack(
    x: Any,
    states: list[reference.State],
    weights: list[reference.Weights],
) -> tuple[Any, list[reference.State]]:
    """As `reference.lstm_stack`: one call for layers of one size on a GPU."""
    distribution = keras.distribution.distribution()
    if distribution is not None:
        return _on_each_device(distribution, x, states, weights)
    return _stack_of(x, states, weights)


def _stack_of(
    x: Any,
    states: list[reference.State],
    weights: list[reference.Weights],
) -> tuple[Any, list[reference.State]]:
    same_size = len({recurrent.shape[0] for _, recurrent, _ in weights}) == 1
    if _has_cudnn() and same_size:
        return _cudnn(x, states, weights)
    return reference.stack(lstm, x, states, weights)


def _on_each_device(
    distribution: Any,
    x: Any,
    states: list[reference.State],
    weights: list[reference.Weights],
) -> tuple[Any, list[reference.State]]:
    """Each device runs the layers over its rows.

    XLA cannot divide cuDNN's call by itself: every device would run all rows.
    """
    mesh = distribution.device_mesh.backend_mesh
    rows = jax.sharding.PartitionSpec(distribution.batch_dim_name)
    whole = jax.sharding.PartitionSpec()
    divided = jax.shard_map(
        _stack_of,
        mesh=mesh,
        in_specs=(rows, rows, whole),
        out_specs=(rows, rows),
        check_vma=False,  # not known of cuDNN's call
    )
    outputs, ends = divided(x, list(states), list(weights))
    return outputs, ends


def _has_cudnn() -> bool:
    """Whether cuDNN computes an LSTM at the precision that is asked for."""
    if not has_gpu():
        return False
    precision = jax.config.jax_default_matmul_precision
    if precision in ("default", "bfloat16"):
        explain_once(
            "jax: cuDNN has no LSTM for jax_default_matmul_precision="
            f"{precision!r}, so a scan runs, some times slower. Leave it out "
            "for TF32, or use 'highest' for float32."
        )
        return False
    return True


def _cudnn(
    x: Any,
    states: list[reference.State],
    weights: list[reference.Weights],
) -> tuple[Any, list[reference.State]]:
    """Layers of one size, in one call of cuDNN."""
    note_kernel("jax: cudnn")
    if x.dtype != _float32:
        explain_once(
            f"jax: its cuDNN LSTM is for float32 alone; of this model in "
            f"{x.dtype} the LSTMs run in float32, with TF32 products."
        )
    h0, c0 = map(jnp.stack, zip(*states, strict=True))
    packed = reference.pack_for_cudnn(weights)
    y, h, c = rnn.lstm(
        *(_row_major(array.astype(_float32)) for array in (x, h0, c0)),
        packed.astype(_float32),
        jnp.full(x.shape[0], x.shape[1], jnp.int32),  # rows' lengths
        input_size=x.shape[2],
        hidden_size=weights[0][1].shape[0],
        num_layers=len(weights),
        dropout=0.0,
        bidirectional=False,
    )
    y, h, c = map(_row_major, (y, h, c))
    ends = zip(h.astype(x.dtype), c.astype(c0.dtype), strict=True)
    return y.astype(x.dtype), list(ends)


def _row_major(array: Any) -> Any:
    """Lets XLA lay an array, and its gradient, out in no other order.

    JAX does not tell XLA in which order its call of cuDNN reads arrays. Of
    what is a transposed array to XLA, cuDNN then takes one row's words for
    another's, in silence (seen on an H100 with JAX 0.11.2; JAX's issue 19177).
    """
    array = jnp.asarray(array)
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


@jax.custom_vjp
def _lstm(
    x: Any, h0: Any, c0: Any, kernel: Any, recurrent: Any, bias: Any
) -> Any:
    outputs, _ = _lstm_forward(x, h0, c0, kernel, recurrent, bias)
    return outputs


@_compiled
def _lstm_forward(
    x: Any, h0: Any, c0: Any, kernel: Any, recurrent: Any, bias: Any
) -> tuple[Any, Any]:
    x = _time_first(x)
    projected = _product(x, kernel) + bias  # (time, batch, 4 * units)

    def step(carry: Any, projection: Any) -> tuple[Any, Any]:
        h, c = carry  # h as the products want it
        i, f, g, o = jnp.split(projection + _product(h, recurrent), 4, -1)
        i, f, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jax.nn.sigmoid(o)
        g = jnp.tanh(g)
        c = f * c + i * g
        h = (o * jnp.tanh(c)).astype(h.dtype)
        gates = jnp.concatenate([i, f, g, o], -1).astype(h.dtype)
        return (h, c), (h, c, gates)

    carry = (h0.astype(x.dtype), c0.astype(_wide(x)))
    (h, c), (hs, cs, gates) = lax.scan(step, carry, projected)
    outputs = _time_first(hs), h.astype(h0.dtype), c.astype(c0.dtype)
    return outputs, (x, h0, c0, kernel, recurrent, bias, hs, cs, gates)


@_compiled
def _lstm_backward(residuals: Any, upstream: Any) -> tuple[Any, ...]:
    x, h0, c0, kernel, recurrent, bias, hs, cs, gates = residuals
    dy, dh, dc = upstream
    wide = cs.dtype
    # XLA reads a transposed matrix at half the speed; once is cheap.
    recurrent_transposed = lax.optimization_barrier(recurrent.T)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        dh, dc = carry
        dy, gate, c, c_before = inputs
        i, f, g, o = jnp.split(gate.astype(wide), 4, -1)
        dh = dh + dy
        tanh_c = jnp.tanh(c)
        d_cell = dc + dh * o * (1 - tanh_c * tanh_c)
        d_gates = jnp.concatenate(
            [
                d_cell * g * i * (1 - i),
                d_cell * c_before * f * (1 - f),
                d_cell * i * (1 - g * g),
                dh * tanh_c * o * (1 - o),
            ],
            -1,
        ).astype(hs.dtype)
        return (_product(d_gates, recurrent_transposed), d_cell * f), d_gates

    c_before = jnp.concatenate([c0[None].astype(wide), cs[:-1]])
    h_before = jnp.concatenate([h0[None].astype(hs.dtype), hs[:-1]])
    (dh0, dc0), d_gates = lax.scan(
        step,
        (dh.astype(wide), dc.astype(wide)),
        (_time_first(dy).astype(wide), gates, cs, c_before),
        reverse=True,
    )
    dx = _product(d_gates, lax.optimization_barrier(kernel.T))
    flat = d_gates.reshape(-1, d_gates.shape[-1])  # (time * batch, 4 * units)
    return (
        _time_first(dx).astype(x.dtype),
        dh0.astype(h0.dtype),
        dc0.astype(c0.dtype),
        _transposed_product(
            x.reshape(len(flat), len(kernel)), flat, kernel.dtype
        ),
        _transposed_product(
            h_before.reshape(len(flat), len(recurrent)), flat, recurrent.dtype
        ),
        flat.sum(0, dtype=wide).astype(bias.dtype),
    )


_lstm.defvjp(_lstm_forward, _lstm_backward)


def linear_cross_entropy(
    features: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    weights: Any = None,
    *,
    max_logits_bytes: int | None = None,
) -> Any:
    """As `reference.linear_cross_entropy`, in chunks of the vocabulary."""
    shape = targets.shape
    targets = targets.reshape(-1)
    if weights is not None:
        weights = weights.astype(_float32).reshape(-1)
        targets = jnp.where(weights == 0, 0, targets)
    features = features.reshape(targets.size, len(kernel))
    if max_logits_bytes is None:
        max_logits_bytes = reference.default_logits_bytes(_device_memory())
    size = reference.chunk_size(targets.size, kernel.shape[1], max_logits_bytes)
    nll = _cross_entropy(features, kernel, bias, targets, size)
    is_word = (targets >= 0) & (targets < kernel.shape[1])
    nll = jnp.where(is_word, nll, jnp.nan)
    if weights is not None:
        nll = nll * weights
    return nll.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    features: Any, kernel: Any, bias: Any, targets: Any, size: int
) -> Any:
    return _cross_entropy_forward(features, kernel, bias, targets, size)[0]


@partial(_compiled, static_argnums=4)
def _cross_entropy_forward(
    features: Any, kernel: Any, bias: Any, targets: Any, size: int
) -> tuple[Any, Any]:
    # Each array once: XLA would compute it again for every sum over it.
    once = lax.optimization_barrier

    def add(carry: Any, first: Any, width: int) -> Any:
        largest, total, chosen, _ = carry
        logits = once(_logits(features, kernel, bias, first, width))
        new_largest = once(jnp.maximum(largest, logits.max(-1)))
        exponentials = once(jnp.exp(logits - new_largest[:, None]))
        total = total * jnp.exp(largest - new_largest) + exponentials.sum(-1)
        here = logits.at[rows, _places(targets, first, width)].get(
            mode="fill", fill_value=0
        )
        # They reach the number of words: too much for float16.
        is_kept = width == kernel.shape[1] and features.dtype != jnp.float16
        kept = exponentials if is_kept else None
        return new_largest, total, chosen + here, kept

    rows = jnp.arange(len(targets))
    zeros = jnp.zeros(len(targets), _float32)
    lowest = zeros + jnp.finfo(_float32).min  # -inf less itself is no number
    largest, total, chosen, exponentials = _for_chunks(
        add, (lowest, zeros, zeros, None), kernel.shape[1], size
    )
    log_total = largest + jnp.log(total)
    if exponentials is None:
        kept = (None, log_total)
    else:
        exponentials = exponentials.at[rows, targets].add(-total)
        kept = (exponentials.astype(features.dtype), total)
    return log_total - chosen, (features, kernel, bias, targets, *kept)


@partial(_compiled, static_argnums=0)
def _cross_entropy_backward(
    size: int, residuals: Any, upstream: Any
) -> tuple[Any, ...]:
    features, kernel, bias, targets, exponentials, total = residuals
    rows = jnp.arange(len(targets))
    if exponentials is not None:
        upstream = upstream / total
    scaled = (features * upstream[:, None]).astype(features.dtype)

    def add(carry: Any, first: Any, width: int) -> Any:
        d_features, d_kernel, d_bias = carry
        part = lax.dynamic_slice_in_dim(kernel, first, width, 1)
        if exponentials is not None:
            errors = exponentials
        else:
            logits = _logits(features, kernel, bias, first, width)
            errors = jnp.exp(logits - total[:, None])
            errors = errors.at[rows, _places(targets, first, width)].add(
                -1.0, mode="drop"
            )
            errors = lax.optimization_barrier(errors.astype(features.dtype))
        update = lax.dynamic_update_slice_in_dim
        kernel_part = _transposed_product(scaled, errors, kernel.dtype)
        bias_part = _product(upstream.astype(errors.dtype), errors)
        return (
            d_features + _product(errors, part.T),
            update(d_kernel, kernel_part, first, 1),
            update(d_bias, bias_part, first, 0),
        )

    zeros = (
        jnp.zeros(features.shape, _wide(features)),
        jnp.zeros_like(kernel),
        jnp.zeros(bias.shape, _wide(features)),
    )
    d_features, d_kernel, d_bias = _for_chunks(
        add, zeros, kernel.shape[1], size
    )
    d_features = (d_features * upstream[:, None]).astype(features.dtype)
    return d_features, d_kernel, d_bias.astype(bias.dtype), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def cross_entropy_of_some(
    features: Any,
    down: Any,
    kernel: Any,
    targets: Any,
    is_wanted: Any,
) -> Any:
    """As `reference.cross_entropy_of_some`, in blocks of a fixed size.

    Tokens that are wanted move to the front; there are as many blocks as it
    takes to reach the last of them.
    """
    num_tokens = targets.size
    if not num_tokens:  # of which there is no last to fill up with
        return jnp.zeros(targets.shape, _float32)
    order = jnp.argsort(~is_wanted.reshape(-1))
    # Filled up to whole blocks, with the last token of the order.
    size = max(_LEAST_BLOCK, -(-num_tokens // _MOST_BLOCKS))
    filled = jnp.pad(order, (0, -num_tokens % size), mode="edge")
    nll = _cross_entropy_of_first(
        features.reshape(num_tokens, len(down))[filled],
        down,
        kernel,
        jnp.where(is_wanted, targets, 0).reshape(-1)[filled],
        is_wanted.sum(),
        size,
    )
    all_nll = jnp.zeros(num_tokens, _float32).at[order].set(nll[:num_tokens])
    return all_nll.reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
@partial(_compiled, static_argnums=5)
def _cross_entropy_of_first(
    features: Any,
    down: Any,
    kernel: Any,
    targets: Any,
    count: Any,
    size: int,
) -> Any:
    """Of the first `count` tokens, in blocks of `size`; 0 of the others."""

    def add(k: Any, nll: Any) -> Any:
        part, is_first = _block(k, size, count, features, targets)
        new = jnp.where(
            is_first, _cross_entropy_of_block(down, kernel, *part), 0
        )
        return lax.dynamic_update_slice_in_dim(nll, new, k * size, 0)

    nll = jnp.zeros(len(targets), _float32)
    return lax.fori_loop(0, -(-count // size), add, nll)


def _cross_entropy_of_first_forward(*arguments: Any) -> tuple[Any, Any]:
    return _cross_entropy_of_first(*arguments), arguments[:5]


@partial(_compiled, static_argnums=0)
def _cross_entropy_of_first_backward(
    size: int, residuals: Any, upstream: Any
) -> tuple[Any, ...]:
    features, down, kernel, targets, count = residuals

    def add(k: Any, gradients: Any) -> Any:
        d_down, d_kernel, d_features = gradients
        (*part, upstream_part), is_first = _block(
            k, size, count, features, targets, upstream
        )
        _, pull = jax.vjp(
            lambda down, kernel, features: _cross_entropy_of_block(
                down, kernel, features, part[1]
            ),
            down,
            kernel,
            part[0],
        )
        down_part, kernel_part, features_part = pull(
            jnp.where(is_first, upstream_part, 0)
        )
        d_features = lax.dynamic_update_slice_in_dim(
            d_features, features_part, k * size, 0
        )
        return d_down + down_part, d_kernel + kernel_part, d_features

    zeros = (
        *(jnp.zeros(x.shape, _float32) for x in (down, kernel)),
        jnp.zeros_like(features),
    )
    d_down, d_kernel, d_features = lax.fori_loop(
        0, -(-count // size), add, zeros
    )
    d_down, d_kernel = d_down.astype(down.dtype), d_kernel.astype(kernel.dtype)
    return d_features, d_down, d_kernel, None, None


_cross_entropy_of_first.defvjp(
    _cross_entropy_of_first_forward, _cross_entropy_of_first_backward
)


def _block(
    k: Any, size: int, count: Any, *arrays: Any
) -> tuple[list[Any], Any]:
    """Block `k` of arrays, and which of its rows are of the first `count`."""
    rows = [
        lax.dynamic_slice_in_dim(array, k * size, size, 0) for array in arrays
    ]
    return rows, k * size + jnp.arange(size) < count


def _cross_entropy_of_block(
    down: Any, kernel: Any, features: Any, targets: Any
) -> Any:
    bias = jnp.zeros(kernel.shape[1], kernel.dtype)
    return linear_cross_entropy(features @ down, kernel, bias, targets)


def _for_chunks(add: Any, carry: Any, vocabulary_size: int, size: int) -> Any:
    """Folds `add(carry, first, width)` over all chunks, one after another."""
    if size == vocabulary_size:
        return add(carry, 0, size)
    num_full, rest = divmod(vocabulary_size, size)
    carry = lax.fori_loop(
        0, num_full, lambda k, carry: add(carry, k * size, size), carry
    )
    return add(carry, num_full * size, rest) if rest else carry


def _logits(
    features: Any, kernel: Any, bias: Any, first: Any, width: int
) -> Any:
    kernel = lax.dynamic_slice_in_dim(kernel, first, width, 1)
    bias = lax.dynamic_slice_in_dim(bias, first, width)
    return _product(features, kernel) + bias


def _places(targets: Any, first: Any, width: int) -> Any:
    """Where in a chunk the targets are; outside of it for those elsewhere."""
    places = targets - first
    return jnp.where(places < 0, width, places)


def _product(left: Any, right: Any) -> Any:
    """A matrix product, summed and given in float32 or what is wider."""
    return jnp.matmul(left, right, preferred_element_type=_wide(left))


def _wide(array: Any) -> Any:
    """What sums and cell states are in, which fewer bits would lose steps of.

    float32, or float64 where the array is.
    """
    return jnp.promote_types(array.dtype, _float32)


def _transposed_product(left: Any, right: Any, dtype: Any) -> Any:
    """`left.T @ right`; XLA reads a transposed matrix at half the speed."""
    left = lax.optimization_barrier(left.T)
    return _product(left, right).astype(dtype)


def _time_first(x: Any) -> Any:
    """`(batch, time, ...)` <-> `(time, batch, ...)`."""
    return jnp.swapaxes(x, 0, 1)


def steps_per_dispatch(flops: float) -> int:
    """As `reference.steps_per_dispatch`."""
    on_cpu = jax.default_backend() == "cpu"
    return reference.steps_in_a_dispatch(flops, on_cpu=on_cpu)


def make_train_function(model: Any) -> Any:
    """As `reference.make_train_function`: one program for many steps.

    Keras's own `steps_per_execution` runs its program once for each step. A
    program for many allocates its arrays once, too, which on a CPU is a
    fifth of a step's time.
    """
    if (
        model.run_eagerly
        or not model.jit_compile
        or keras.distribution.distribution()
        or (model.steps_per_execution == 1 and model.text is None)
    ):
        return None
    num_steps = model.steps_per_execution

    @partial(jax.jit, donate_argnums=0)
    def run(state: Any, text: Any, batches: Any, count: Any) -> Any:
        def step(k: Any, state: Any) -> Any:
            batch = jax.tree.map(lambda array: array[k], batches)
            with model.text_on_device(text):
                _, state = model.train_step(state, batch)
            return state

        state = lax.fori_loop(0, count, step, state)
        metrics = list(zip(model.metrics_variables, state[3], strict=True))
        with keras.StatelessScope(metrics):
            return model.get_metrics_result(), state

    def train_function(state: Any, iterator: Any) -> Any:
        batches = list(islice(iterator, num_steps))
        if not batches:
            raise StopIteration
        for group in _equal_shapes(batches):
            # Filled up to the size that the program is compiled for.
            filled = group + group[-1:] * (num_steps - len(group))
            stack = jax.tree.map(_stack, *filled)
            logs, state = run(state, model.text, stack, len(group))
        return logs, state

    return train_function


def _stack(*arrays: Any) -> Any:
    """Arrays in one, those of the host in one transfer to the device."""
    on_device = isinstance(arrays[0], jax.Array)
    return jnp.stack(arrays) if on_device else np.stack(arrays)


def _equal_shapes(batches: list[Any]) -> Iterator[list[Any]]:
    """Runs of batches of one shape; the last of a text may be shorter."""

    def shapes(batch: Any) -> Any:
        return [array.shape for array in jax.tree.leaves(batch)]

    for _, group in groupby(batches, shapes):
        yield list(group)


def _part(variables: list[Any]) -> None:
    """Gives each variable an array of its own.

    At the end of a `fit` Keras makes averaged weights the weights (`use_ema`):
    one array for two variables, which a step would be given away twice.
    """
    seen = set()
    for variable in variables:
        if id(variable.value) in seen:
            variable.assign(jnp.copy(variable.value))
        seen.add(id(variable.value))


@contextmanager
def keeping_variables(model: Any) -> Iterator[None]:
    """As `reference.keeping_variables`.

    For its steps Keras takes the arrays out of a model's variables, and a
    step that cannot be compiled, for a mistake in its data, leaves them out.
    """
    variables = [*model.variables, *model.metrics_variables]
    if model.compiled:
        variables += model.optimizer.variables
    _part(variables)
    before = [variable.value for variable in variables]
    try:
        yield
    except BaseException:
        for variable, value in zip(variables, before, strict=True):
            # What steps were done with is gone, and its variable not empty.
            if variable._value is None and not value.is_deleted():
                variable.assign(value)
        raise


def sync_variables(model: Any) -> None:
    """Brings a model's variables up to date within `fit`."""
    model.jax_state_sync()


def has_gpu() -> bool:
    """As `reference.has_gpu`."""
    return bool(jax.default_backend() == "gpu")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """As `reference.tf32`."""
    if not has_gpu():
        yield
        return
    # Of the other names some turn JAX's cuDNN LSTM off.
    name = "tensorfloat32" if allowed else "highest"
    with jax.default_matmul_precision(name):
        yield


def device_name() -> str:
    """The name of the device that JAX computes on."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return reference.device_name()
    return str(device.device_kind)


def _device_memory() -> int | None:
    """Bytes of the accelerator's memory, where there is one that tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
