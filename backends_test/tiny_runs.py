"""A corpus and presets that train in a second."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np


def write_corpus(
    folder: Path, num_lines: tuple[int, int, int] = (120, 15, 10)
) -> Path:
    """Sentences with a rule: letters go on in their order."""
    generator = np.random.default_rng(5)
    folder.mkdir()
    splits = ("train", "valid", "test")
    for split, number in zip(splits, num_lines, strict=True):
        lines = [
            " ".join("abcdefgh"[(first + i) % 8] for i in range(length))
            for first, length in generator.integers(1, 8, (number, 2))
        ]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def presets() -> dict[str, Any]:
    """Presets by name.

    `tiny` has all that `small` has. `tiny_windows` has no carried state and a
    step from two batches, `tiny_wild` a learning rate with which the loss is
    soon no number, `tiny_awd` all that `awd` has and a little more.
    """
    from multilstm import PRESETS

    small = PRESETS["small"]
    sizes = {
        "units": 8,
        "embedding_dim": 8,
        "batch_size": 3,
        "sequence_length": 5,
        "learning_rate": 0.03,
        "epochs": 3,
    }
    changes: dict[str, dict[str, Any]] = {
        "tiny": {},
        "tiny_windows": {
            "carry_state": False,
            "gradient_accumulation_steps": 2,
        },
        "tiny_wild": {
            "optimizer": "sgd",
            "learning_rate": 1e30,
            "clip_norm": None,
        },
        "tiny_awd": {
            "units": (8, 6),
            "embedding_dim": 5,  # not the last layer's units
            "locked_dropout": True,
            "embedding_dropout": 0.2,
            "weight_dropout": 0.3,
            "activation_regularization": 0.2,
            "temporal_activation_regularization": 0.1,
            "initializer": "torch",
            "sequence_length": 10,
            "length_std": 2.0,
            "half_length_share": 0.2,
            "rotates_rows": True,
            "optimizer": "sgd",
            "learning_rate": 8.0,  # some epoch is worse than the first
            "plateau_factor": 0.5,
            "l2": 1e-5,
            "averaging": "triggered",
            "non_monotone": 0,
        },
    }
    return {
        name: replace(small, name=name, **sizes | change)
        for name, change in changes.items()
    }


def float32_products():
    """How the framework multiplies float32 at this moment, on a GPU."""
    if keras.config.backend() == "jax":
        import jax

        return jax.config.jax_default_matmul_precision
    if keras.config.backend() == "torch":
        import torch

        precision = torch.get_float32_matmul_precision()
        return precision, torch.backends.cudnn.allow_tf32
    import tensorflow as tf

    return tf.config.experimental.tensor_float_32_execution_enabled()
