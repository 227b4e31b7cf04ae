"""The truth that tests compare with, written in plain NumPy in float64."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def lstm(
    x: Array,
    h: Array,
    c: Array,
    kernel: Array,
    recurrent: Array,
    bias: Array,
    mask: NDArray[np.bool_] | None = None,
) -> tuple[Array, Array, Array]:
    """Steps through time with the textbook's equations, one at a time."""
    outputs = []
    for t in range(x.shape[1]):
        gates = x[:, t] @ kernel + h @ recurrent + bias
        i, f, g, o = np.split(gates, 4, axis=-1)
        is_read = True if mask is None else mask[:, t, np.newaxis]
        c = np.where(is_read, sigmoid(f) * c + sigmoid(i) * np.tanh(g), c)
        h = np.where(is_read, sigmoid(o) * np.tanh(c), h)
        outputs.append(h)
    return np.stack(outputs, axis=1), h, c


def lstm_gradients(
    arguments: Sequence[Array],
    upstream: Sequence[Array],
    mask: NDArray[np.bool_] | None = None,
) -> list[Array]:
    """Back through time, one weight gradient added up at each step.

    `arguments` are those of `lstm`, `upstream` belongs to its three outputs.
    """
    x, h, c, kernel, recurrent, bias = arguments
    steps = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, -1)
        gates = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        before = h, c
        read = slice(t, t + 1)
        _, h, c = lstm(
            x[:, read],
            h,
            c,
            kernel,
            recurrent,
            bias,
            None if mask is None else mask[:, read],
        )
        steps.append((*gates, *before, c))
    dy, dh, dc = upstream
    dx = np.zeros_like(x)
    d_kernel, d_recurrent, d_bias = (
        np.zeros_like(weight) for weight in (kernel, recurrent, bias)
    )
    for t in reversed(range(x.shape[1])):
        i, f, g, o, h_before, c_before, c = steps[t]
        is_read = np.ones((len(x), 1), bool)
        if mask is not None:
            is_read = mask[:, t, np.newaxis]
        dh = dh + dy[:, t]
        d_cell = dc + dh * o * (1 - np.tanh(c) ** 2)
        d_gates = np.concatenate(
            [
                d_cell * g * i * (1 - i),
                d_cell * c_before * f * (1 - f),
                d_cell * i * (1 - g**2),
                dh * np.tanh(c) * o * (1 - o),
            ],
            axis=-1,
        )
        d_gates = np.where(is_read, d_gates, 0)
        dx[:, t] = d_gates @ kernel.T
        d_kernel += x[:, t].T @ d_gates
        d_recurrent += h_before.T @ d_gates
        d_bias += d_gates.sum(0)
        dc = np.where(is_read, d_cell * f, dc)
        dh = np.where(is_read, d_gates @ recurrent.T, dh)
    return [dx, dh, dc, d_kernel, d_recurrent, d_bias]


def negative_log_likelihood(logits: Array, targets: NDArray[np.int_]) -> Array:
    """Nats of each target under the softmax of `logits`."""
    logits = logits.astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return log_total - chosen


def linear_cross_entropy(
    features: Array, kernel: Array, bias: Array, targets: NDArray[np.int32]
) -> Array:
    """-log softmax(features @ kernel + bias) at the targets, a row each."""
    log_p = log_softmax(features @ kernel + bias)
    return -log_p[np.arange(len(targets)), targets]


def linear_cross_entropy_gradients(
    features: Array,
    kernel: Array,
    bias: Array,
    targets: NDArray[np.int32],
    upstream: Array,
) -> list[Array]:
    """Of features, kernel and bias: those of the logits are p - one_hot."""
    p = np.exp(log_softmax(features @ kernel + bias))
    p[np.arange(len(targets)), targets] -= 1
    errors = p * upstream[:, np.newaxis]
    return [errors @ kernel.T, features.T @ errors, errors.sum(0)]


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def perplexity(logits: Array, targets: NDArray[np.int32]) -> float:
    """exp of the mean negative log-likelihood over all tokens."""
    nats = [
        -log_softmax(row)[target]
        for row, target in zip(
            logits.reshape(-1, logits.shape[-1]), targets.ravel(), strict=True
        )
    ]
    return math.exp(math.fsum(nats) / len(nats))


def tutorial_batches(
    ids: Sequence[int], num_steps: int, batch_size: int, skip_step: int
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """What the tutorial's generator was meant to yield, by its own rule."""
    current = 0
    while True:
        inputs, targets = [], []
        for _ in range(batch_size):
            if current + num_steps >= len(ids):
                current = 0
            inputs.append(list(ids[current : current + num_steps]))
            targets.append(list(ids[current + 1 : current + num_steps + 1]))
            current += skip_step
        yield inputs, targets


def language_model(
    weights: Sequence[NDArray[np.float32]], ids: NDArray[np.int32]
) -> Array:
    """Logits of rows that begin from zeros, from a model's `get_weights`.

    The weights are the embeddings, three for each LSTM layer, then kernel and
    bias of the projection, or its bias alone where the embeddings are tied.
    """
    embeddings, *rest = (weight.astype(np.float64) for weight in weights)
    bias = rest.pop()
    kernel = rest.pop() if len(rest) % 3 else embeddings.T
    x = embeddings[ids]
    for layer in range(0, len(rest), 3):
        zeros = np.zeros((len(ids), len(rest[layer + 1])))
        x, _, _ = lstm(x, zeros, zeros, *rest[layer : layer + 3])
    return x @ kernel + bias


def neural_cache(
    features: Array, token_ids: NDArray[np.int32], window: int, theta: float
) -> Array:
    """How likely the words of the window make each word, word by word."""
    probabilities = []
    for t in range(len(token_ids) - 1):
        total = same = 0.0
        for i in range(max(0, t - window), t):
            weight = math.exp(theta * (features[t] @ features[i]))
            total += weight
            same += weight * (token_ids[i + 1] == token_ids[t + 1])
        probabilities.append(same / total if total else math.nan)
    return np.array(probabilities)


def adaptive_log_softmax(
    features: Array,
    head_kernel: Array,
    head_bias: Array,
    tails: Sequence[Array],
) -> Array:
    """Log-probabilities of all words; `tails` has two matrices for each."""
    num_tails = len(tails) // 2
    head = log_softmax(features @ head_kernel + head_bias)
    parts = [head[:, : head.shape[1] - num_tails]]
    for k in range(num_tails):
        within = log_softmax(features @ tails[2 * k] @ tails[2 * k + 1])
        parts.append(head[:, k - num_tails, np.newaxis] + within)
    return np.concatenate(parts, axis=1)


def sampled_cross_entropy(
    logits: Array, targets: NDArray[np.int32], sampled: NDArray[np.int32]
) -> Array:
    """The target among a sample of words, one token and word at a time."""
    vocabulary_size = logits.shape[1]
    losses = []
    for row, target in zip(logits, targets, strict=True):
        total = math.exp(row[target])
        for word in sampled:
            probability = math.log((word + 2) / (word + 1)) / math.log(
                vocabulary_size + 1
            )
            if word != target:
                total += math.exp(row[word]) / (len(sampled) * probability)
        losses.append(math.log(total) - row[target])
    return np.array(losses)
