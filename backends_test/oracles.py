"""The truth that tests compare with, written in plain NumPy in float64."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def lstm(
    x: Array, h: Array, c: Array, kernel: Array, recurrent: Array, bias: Array
) -> tuple[Array, Array, Array]:
    """Steps through time with the textbook's equations, one at a time."""
    outputs = []
    for t in range(x.shape[1]):
        gates = x[:, t] @ kernel + h @ recurrent + bias
        i, f, g, o = np.split(gates, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1), h, c


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
