"""Initial weights that are the same on every backend.

With one seed, Keras's initializers draw other numbers on each backend, and so
a comparison of backends would compare models. These draw with NumPy.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np

from multilstm.errors import UserError

Initialization = Literal["uniform", "torch", "torch_normal"]

KINDS = ("uniform", "normal", "glorot_uniform", "orthogonal")

_MOST_SCALE = 1e30  # far from what float32 cannot hold


@keras.saving.register_keras_serializable(package="multilstm")
class NumPyInitializer(keras.initializers.Initializer):
    """Draws what a Keras initializer of that name draws, with NumPy.

    `"glorot_uniform"` and `"orthogonal"` are for matrices.

    Args:
        kind: `"uniform"`, `"normal"`, `"glorot_uniform"` or `"orthogonal"`.
        scale: Half the width of `"uniform"`, the standard deviation of
            `"normal"`; not used by the others.
        seed: One number or several, for `numpy.random.default_rng`.

    Reference:
        Glorot and Bengio, 2010, equation 16; Saxe et al., 2014.

    Example:
    >>> draw = NumPyInitializer("uniform", scale=0.1, seed=7)
    >>> [round(float(value), 4) for value in draw((3,))]
    [0.025, 0.0794, 0.0551]
    """

    def __init__(
        self,
        kind: str,
        *,
        scale: float = 0.05,
        seed: int | Sequence[int] = 0,
    ) -> None:
        if kind not in KINDS:
            raise UserError(
                f"`kind` must be one of {', '.join(KINDS)}; received {kind!r}."
            )
        if not 0 <= scale <= _MOST_SCALE:
            raise UserError(
                "The scale of initial weights must be from 0 to "
                f"{_MOST_SCALE:g}; received {scale}."
            )
        self.kind = kind
        self.scale = scale
        self.seed = seed if isinstance(seed, int) else list(seed)

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        generator = np.random.default_rng(self.seed)
        if self.kind == "orthogonal":
            values = _orthogonal(generator, *shape)
        elif self.kind == "normal":
            values = generator.normal(0, self.scale, shape)
        else:
            limit = self.scale
            if self.kind == "glorot_uniform":
                limit = math.sqrt(6 / sum(shape))
            values = generator.uniform(-limit, limit, shape)
        return keras.ops.convert_to_tensor(values.astype(np.float32), dtype)

    def at(self, *place: int) -> "NumPyInitializer":
        """The same kind of draw from other numbers, for another weight."""
        seed = [self.seed] if isinstance(self.seed, int) else self.seed
        return NumPyInitializer(
            self.kind, scale=self.scale, seed=[*seed, *place]
        )

    def get_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "scale": self.scale, "seed": self.seed}


def _orthogonal(generator: np.random.Generator, rows: int, columns: int) -> Any:
    """A matrix whose rows (or columns, the shorter side) are orthonormal."""
    normal = generator.standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q *= np.sign(np.diag(r))  # makes the draw uniform among such matrices
    return q.T if rows < columns else q


class Draws:
    """The initializers of a model's weights, each from a seed of its own."""

    def __init__(
        self, way: Initialization, scale: float | None, seed: int
    ) -> None:
        self.way = way
        self.scale = scale
        self.seed = seed
        self.is_torch = way != "uniform"

    def _draw(
        self, kind: str, *place: int, scale: float | None = None
    ) -> NumPyInitializer:
        seed = [self.seed, *place]
        if scale is None:
            return NumPyInitializer(kind, seed=seed)
        return NumPyInitializer(kind, scale=scale, seed=seed)

    def seed_of(self, *place: int | str) -> int:
        """For dropout, far from every other.

        PyTorch's draws of a step have the sum of seed and step for a seed.
        """
        text = repr((self.seed, *place)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 2

    def embeddings(self) -> NumPyInitializer:
        kind = "normal" if self.way == "torch_normal" else "uniform"
        return self._draw(kind, 0, scale=self.scale)

    def kernel(self, units: int, *place: int) -> NumPyInitializer:
        """Of a layer's input projection (0) or recurrence (1)."""
        if self.is_torch:
            return self._draw("uniform", 1, *place, scale=units**-0.5)
        if self.scale is None:
            kind = ("glorot_uniform", "orthogonal")[place[-1]]
            return self._draw(kind, 1, *place)
        return self._draw("uniform", 1, *place, scale=self.scale)

    def bias(self, units: int, layer: int) -> Any:
        if self.is_torch:
            # PyTorch adds two biases; this has the variance of their sum.
            scale = math.sqrt(2 / units)
            return self._draw("uniform", 1, layer, 2, scale=scale)
        if self.scale is None:
            return "zeros"
        return self._draw("uniform", 1, layer, 2, scale=self.scale)

    def of_projection(self, kind: str, place: int) -> Any:
        is_bias = kind == "zeros"
        if is_bias and (self.is_torch or self.scale is None):
            return kind
        if self.scale is None:
            return self._draw(kind, 2, place)
        return self._draw("uniform", 2, place, scale=self.scale)
