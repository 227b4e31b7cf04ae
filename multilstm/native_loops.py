"""Training loops as the users of each framework write them, without Keras.

All that a benchmark knows of a framework is here. Each loop takes a shape and
initial weights in Keras's layout and gives

    train(batches) -> the loss of the last batch, when the device is done

together with the name of the LSTM that runs in it. Adam has Keras's settings
everywhere. Inputs and targets are int32 arrays of shape `(batch, time)`.
"""

# ruff: noqa: TID251  (a native loop is written in its framework)

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

LEARNING_RATE, BETA_1, BETA_2, EPSILON = 1e-3, 0.9, 0.999, 1e-7

Batches = Iterable[tuple[np.ndarray, np.ndarray]]
Train = Callable[[Batches], float]


class AbsentError(Exception):
    """A variant that does not exist here; the message says why."""


def native_loop(
    backend: str, shape: Any, weights: list, *, precision: str, compiled: bool
) -> tuple[str, Train]:
    if precision == "bfloat16" and backend != "torch":
        raise AbsentError(f"the loop of {backend} has no form in bfloat16")
    loops = {"jax": jax_loop, "torch": torch_loop, "tensorflow": tf_loop}
    loop = loops[backend]
    if backend == "torch":
        loop = partial(loop, autocast=precision == "bfloat16")
    return loop(shape, weights, compiled=compiled)


def draw_weights(shape: Any) -> list[np.ndarray]:
    """Embeddings; kernel, recurrent kernel and bias a layer; kernel and bias.

    The last kernel is left out where the embeddings serve for it. All are
    large enough for a swapped gate to be seen in the loss.
    """
    rng = np.random.default_rng(1)

    def draw(*size: int, scale: float) -> np.ndarray:
        return rng.uniform(-scale, scale, size).astype(np.float32)

    def matrix(*size: int) -> np.ndarray:
        return draw(*size, scale=(6 / sum(size)) ** 0.5)

    features, words = shape.embedding_dim, shape.vocabulary_size
    weights = [draw(words, features, scale=1.0)]
    for units in shape.units:
        weights += [matrix(features, 4 * units), matrix(units, 4 * units)]
        weights.append(draw(4 * units, scale=0.5))
        features = units
    if not shape.tied:
        weights.append(draw(features, words, scale=1.0))
    return [*weights, draw(words, scale=0.5)]


def draw_token_ids(shape: Any, steps: int) -> np.ndarray:
    """Words for so many steps; those of the first step are always the same."""
    drawn = [
        np.random.default_rng([3, step]).integers(
            shape.vocabulary_size, size=shape.tokens, dtype=np.int32
        )
        for step in range(steps + 1)
    ]
    return np.concatenate(drawn)[: steps * shape.tokens + 1]


def split_weights(shape: Any, weights: Sequence) -> tuple[Any, list, Any, Any]:
    """The same weights by place; the last kernel may be None."""
    end = 1 + 3 * len(shape.units)
    lstms = [tuple(weights[i : i + 3]) for i in range(1, end, 3)]
    *kernel, bias = weights[end:]
    return weights[0], lstms, kernel[0] if kernel else None, bias


def stacks(shape: Any) -> list[tuple[int, int, int]]:
    """`(features, units, num_layers)` of each LSTM that one call can run."""
    if len(set(shape.units)) == 1:
        return [(shape.embedding_dim, shape.units[0], len(shape.units))]
    features = (shape.embedding_dim, *shape.units)
    return [(f, u, 1) for f, u in zip(features, shape.units, strict=False)]


def cudnn_vectors(shape: Any, lstms: list) -> list[np.ndarray]:
    """For each stack its weights in one vector, as cuDNN lays them out.

    The matrices of all its layers, transposed, come before all biases. cuDNN
    has two biases a gate, of which one is zero. From weights that are all
    ones it makes masks of what learns: two biases would learn twice as fast.
    """
    vectors, layers = [], iter(lstms)
    for _, _, num_layers in stacks(shape):
        matrices, biases = [], []
        for _ in range(num_layers):
            kernel, recurrent_kernel, bias = next(layers)
            matrices += [kernel.T.ravel(), recurrent_kernel.T.ravel()]
            biases += [bias, np.zeros_like(bias)]
        vectors.append(np.concatenate(matrices + biases))
    return vectors


def describe_precision(backend: str) -> dict[str, Any]:
    """How a framework multiplies float32 as it comes."""
    if backend == "torch":
        import torch

        return {
            "matmul": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        }
    if backend == "jax":
        import jax

        return {"matmul": jax.config.jax_default_matmul_precision or "default"}
    import tensorflow as tf

    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    return {"tf32": tf32}


def list_devices(backend: str) -> list[str]:
    """What a framework sees to compute on."""
    if backend == "torch":
        import torch

        count = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(k) for k in range(count)]
        return names or ["cpu"]
    if backend == "jax":
        import jax

        return [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
    import tensorflow as tf

    return [device.name for device in tf.config.list_logical_devices()]


def list_libraries(backend: str) -> dict[str, str | None]:
    """The CUDA and cuDNN that a framework was built with or has loaded."""
    if backend == "torch":
        import torch

        cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
        return {"cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn)}
    if backend == "tensorflow":
        import tensorflow as tf

        built = tf.sysconfig.get_build_info()
        return {
            "cuda": built.get("cuda_version"),
            "cudnn": built.get("cudnn_version"),
        }
    import jax

    said = jax.local_devices()[0].client.platform_version.splitlines()
    return {"platform": said[0] if said else None}


def gpu_peak_bytes(backend: str) -> int | None:
    """The most memory that the framework had in use on its GPU so far."""
    from multilstm import ops

    if not ops.has_gpu():
        return None
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    if backend == "jax":
        import jax

        # None with some allocators, which count nothing.
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def forget_gpu_peak(backend: str) -> None:
    from multilstm import ops

    if not ops.has_gpu():
        return
    if backend == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")


def ones_like(layers: list) -> list[tuple]:
    return [tuple(np.ones_like(weight) for weight in layer) for layer in layers]


def torch_loop(
    shape: Any, weights: list, *, compiled: bool, autocast: bool
) -> tuple[str, Train]:
    import torch

    from multilstm.ops import has_gpu

    device = "cuda" if has_gpu() else "cpu"  # where Keras computes, too
    model = _torch_model(shape)
    _torch_load(model, *split_weights(shape, weights))
    model = model.to(device)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        betas=(BETA_1, BETA_2),
    )
    loss_of = torch.compile(model) if compiled else model
    steps = [0]

    def train(batches: Batches) -> float:
        for inputs, targets in batches:
            # Keras adds epsilon before it corrects the bias, PyTorch after.
            steps[0] += 1
            correction = math.sqrt(1 - BETA_2 ** steps[0])
            optimizer.param_groups[0]["eps"] = EPSILON / correction
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = loss_of(
                    torch.tensor(inputs, device=device),
                    torch.tensor(targets, dtype=torch.int64, device=device),
                )
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return "torch.nn.LSTM" + (", torch.compile" if compiled else ""), train


def _torch_model(shape: Any) -> Any:
    from torch import nn

    words = shape.vocabulary_size

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(words, shape.embedding_dim)
            self.lstms = nn.ModuleList(
                nn.LSTM(features, units, num_layers=n, batch_first=True)
                for features, units, n in stacks(shape)
            )
            self.projection = nn.Linear(shape.units[-1], words)
            if shape.tied:
                self.projection.weight = self.embedding.weight

        def forward(self, inputs: Any, targets: Any) -> Any:
            x = self.embedding(inputs)  # (batch, time, embedding_dim)
            for lstm in self.lstms:
                x, _ = lstm(x)  # (batch, time, units)
            logits = self.projection(x)  # (batch, time, vocabulary)
            return nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten()
            )

    return Model()


def _torch_load(
    model: Any, embeddings: Any, layers: list, kernel: Any, bias: Any
) -> None:
    import torch

    values = {model.embedding.weight: embeddings, model.projection.bias: bias}
    if kernel is not None:
        values[model.projection.weight] = kernel.T
    by_layer = [four for lstm in model.lstms for four in lstm.all_weights]
    for (w_ih, w_hh, b_ih, b_hh), layer in zip(by_layer, layers, strict=True):
        values |= {w_ih: layer[0].T, w_hh: layer[1].T, b_ih: layer[2]}
        # Two biases that both learn would learn twice as fast as one.
        torch.nn.init.zeros_(b_hh.requires_grad_(False))
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(torch.tensor(value))


def jax_loop(shape: Any, weights: list, *, compiled: bool) -> tuple[str, Train]:
    import jax

    if compiled and jax.default_backend() != "gpu":
        raise AbsentError("cuDNN needs a GPU")
    embeddings, layers, kernel, bias = split_weights(shape, weights)
    lstms, run_lstms, masks = layers, _jax_scan, None
    if compiled:
        lstms = cudnn_vectors(shape, layers)
        run_lstms = partial(_jax_cudnn, stacks(shape))
        masks = cudnn_vectors(shape, ones_like(layers))
    params = jax.tree.map(jax.numpy.array, (embeddings, lstms, kernel, bias))
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    state = [params, (zeros, jax.tree.map(jax.numpy.copy, zeros), 0)]
    step = _jax_step(run_lstms, masks)

    def train(batches: Batches) -> float:
        for inputs, targets in batches:
            state[0], state[1], loss = step(*state, inputs, targets)
        jax.block_until_ready(state)
        return float(loss)

    return "jax.experimental.rnn.lstm" if compiled else "jax.lax.scan", train


def _jax_step(run_lstms: Callable, masks: list | None) -> Callable:
    import jax
    import jax.numpy as jnp

    def loss_of(params: Any, inputs: Any, targets: Any) -> Any:
        embeddings, lstms, kernel, bias = params
        x = embeddings[inputs.T]  # (time, batch, embedding_dim)
        x = run_lstms(lstms, x)  # (time, batch, units)
        logits = x @ (embeddings.T if kernel is None else kernel) + bias
        of_target = jnp.take_along_axis(logits, targets.T[..., None], axis=-1)
        return (jax.nn.logsumexp(logits, axis=-1) - of_target[..., 0]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, inputs: Any, targets: Any) -> tuple:
        loss, gradients = jax.value_and_grad(loss_of)(params, inputs, targets)
        if masks is not None:
            of_embeddings, of_lstms, *others = gradients
            of_lstms = jax.tree.map(jnp.multiply, of_lstms, masks)
            gradients = (of_embeddings, of_lstms, *others)
        return *_jax_adam(params, gradients, state), loss

    return step


def _jax_adam(params: Any, gradients: Any, state: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    def mean_of(mean: Any, gradient: Any) -> Any:
        return BETA_1 * mean + (1 - BETA_1) * gradient

    def square_of(square: Any, gradient: Any) -> Any:
        return BETA_2 * square + (1 - BETA_2) * gradient**2

    mean, square, t = state
    t = t + 1
    mean = jax.tree.map(mean_of, mean, gradients)
    square = jax.tree.map(square_of, square, gradients)
    rate = LEARNING_RATE * jnp.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)

    def updated(param: Any, mean: Any, square: Any) -> Any:
        return param - rate * mean / (jnp.sqrt(square) + EPSILON)

    params = jax.tree.map(updated, params, mean, square)
    return params, (mean, square, t)


def _jax_scan(layers: list, x: Any) -> Any:
    for weights in layers:
        x = _jax_scan_layer(weights, x)
    return x


def _jax_scan_layer(weights: tuple, x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    kernel, recurrent_kernel, bias = weights

    def cell(state: Any, x_t: Any) -> Any:
        h, c = state
        gates = x_t @ kernel + h @ recurrent_kernel + bias
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], recurrent_kernel.shape[0]), x.dtype)
    return jax.lax.scan(cell, (zeros, zeros), x)[1]


def _jax_cudnn(sizes: list, vectors: list, x: Any) -> Any:
    import jax.numpy as jnp
    from jax.experimental import rnn
    from jax.experimental.layout import Layout, with_layout_constraint

    def row_major(array: Any) -> Any:
        # Else XLA transposes nothing, and cuDNN reads other rows.
        return with_layout_constraint(array, Layout((0, 1, 2)))

    x = x.swapaxes(0, 1)  # (batch, time, features)
    lengths = jnp.full(x.shape[0], x.shape[1], jnp.int32)
    for size, vector in zip(sizes, vectors, strict=True):
        _, units, num_layers = size
        zeros = jnp.zeros((num_layers, x.shape[0], units), x.dtype)
        x, _, _ = rnn.lstm(
            row_major(x), zeros, zeros, vector, lengths, *size, 0.0, False
        )  # no dropout, one direction
        x = row_major(x)
    return x.swapaxes(0, 1)


def tf_loop(shape: Any, weights: list, *, compiled: bool) -> tuple[str, Train]:
    import tensorflow as tf

    # On a GPU cuDNN, of which XLA has no LSTM: compiled, it is the scan.
    use_cudnn = bool(tf.config.list_logical_devices("GPU")) and not compiled
    embeddings, layers, kernel, bias = split_weights(shape, weights)
    lstms = [weight for layer in layers for weight in layer]
    name, run_lstms = "tf.scan, XLA" if compiled else "tf.scan", _tf_scan
    masks = {}
    if use_cudnn:
        name, run_lstms = "CudnnRNNV3", partial(_tf_cudnn, stacks(shape))
        lstms = cudnn_vectors(shape, layers)
        masks = dict(enumerate(cudnn_vectors(shape, ones_like(layers)), 1))
    values = [embeddings, *lstms, bias, *([] if kernel is None else [kernel])]
    variables = [tf.Variable(value) for value in values]
    loss_of = partial(_tf_loss, variables, len(lstms), run_lstms)
    step = _tf_step(variables, masks, loss_of)
    step = tf.function(step, jit_compile=compiled)

    def train(batches: Batches) -> float:
        for inputs, targets in batches:
            loss = step(tf.constant(inputs), tf.constant(targets))
        variables[-1].numpy()
        return float(loss)

    return name, train


def _tf_loss(
    variables: list, num_lstms: int, run_lstms: Any, inputs: Any, targets: Any
) -> Any:
    import tensorflow as tf

    embeddings, bias, *kernel = variables[0], *variables[num_lstms + 1 :]
    x = tf.gather(embeddings, tf.transpose(inputs))  # (time, batch, ...)
    x = run_lstms(variables[1 : num_lstms + 1], x)  # (time, batch, units)
    logits = bias + tf.matmul(
        tf.reshape(x, (-1, x.shape[-1])),
        kernel[0] if kernel else embeddings,
        transpose_b=not kernel,
    )  # (time * batch, vocabulary)
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.reshape(tf.transpose(targets), [-1]), logits
        )
    )


def _tf_step(variables: list, masks: dict, loss_of: Callable) -> Callable:
    import tensorflow as tf

    masks = {place: tf.constant(mask) for place, mask in masks.items()}

    means, squares = (
        [tf.Variable(tf.zeros_like(variable)) for variable in variables]
        for _ in range(2)
    )
    steps = tf.Variable(0.0)

    def step(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(inputs, targets)
        gradients = tape.gradient(loss, variables)
        t = steps.assign_add(1.0)
        for place, variable in enumerate(variables):
            gradient = tf.convert_to_tensor(gradients[place])
            if place in masks:
                gradient *= masks[place]
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=means[place].handle,
                v=squares[place].handle,
                beta1_power=BETA_1**t,
                beta2_power=BETA_2**t,
                lr=LEARNING_RATE,
                beta1=BETA_1,
                beta2=BETA_2,
                epsilon=EPSILON,
                grad=gradient,
            )
        return loss

    return step


def _tf_scan(variables: list, x: Any) -> Any:
    for first in range(0, len(variables), 3):
        x = _tf_scan_layer(*variables[first : first + 3], x)
    return x


def _tf_scan_layer(
    kernel: Any, recurrent_kernel: Any, bias: Any, x: Any
) -> Any:
    import tensorflow as tf

    def cell(state: Any, x_t: Any) -> Any:
        h, c = state
        gates = x_t @ kernel + h @ recurrent_kernel + bias
        i, f, g, o = tf.split(gates, 4, axis=-1)
        c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
        return tf.sigmoid(o) * tf.tanh(c), c

    zeros = tf.zeros((x.shape[1], recurrent_kernel.shape[0]))
    return tf.scan(cell, x, (zeros, zeros))[0]


def _tf_cudnn(sizes: list, vectors: list, x: Any) -> Any:
    import tensorflow as tf

    time, batch = x.shape[:2]
    for (_, units, num_layers), vector in zip(sizes, vectors, strict=True):
        zeros = tf.zeros((num_layers, batch, units))
        x = tf.raw_ops.CudnnRNNV3(
            input=x,
            input_h=zeros,
            input_c=zeros,
            params=vector,
            sequence_lengths=tf.fill([batch], time),
            rnn_mode="lstm",
            is_training=True,
        ).output
    return x
