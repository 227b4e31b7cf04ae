"""Times PyTorch on a CPU in float32 and in bfloat16: an LSTM, and steps.

    KERAS_BACKEND=torch python benchmarks/bfloat16_lstm.py --out FILE.json

The LSTM is one layer with as many features as units, forward and backward from
given gradients, 35 time steps, in bfloat16 by both of the ways that there are;
`difference` is how far the gradient of the recurrent weights is from that in
float32, as a share of its norm. The steps are whole training steps of presets
on random words, under the policies float32 and mixed_bfloat16. All take turns.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch  # noqa: TID251  (what is timed is PyTorch's)
from recorded_steps import VOCABULARY_SIZE, words_of

from multilstm import LanguageModel, ops
from multilstm.files import write_json
from multilstm.ops import bfloat16_torch
from multilstm.preset_files import find_preset
from multilstm.selection import installed_versions

SCHEMA = "multilstm.bfloat16_lstm/1"
TIME_STEPS = 35
STEPS = 4  # in a window
PRESETS = ["zaremba_small", "tutorial", "zaremba_medium", "awd"]
# For each way the dtype and the most weights that are for oneDNN's LSTM.
WAYS = {
    "float32": (torch.float32, 0),
    "bfloat16, onednn": (torch.bfloat16, sys.maxsize),
    "bfloat16, loop": (torch.bfloat16, 0),
}


def make_layer(units: int, batch_size: int) -> tuple[list[Any], Any]:
    """Arguments of `ops.lstm` in float32, and a gradient for its outputs."""
    torch.manual_seed(0)
    scale = units**-0.5
    weights = [
        torch.nn.Parameter(scale * (2 * torch.rand(shape) - 1))
        for shape in ((units, 4 * units), (units, 4 * units), (4 * units,))
    ]
    x, dy = torch.randn(2, batch_size, TIME_STEPS, units).unbind()
    zeros = torch.zeros(batch_size, units)
    return [x.requires_grad_(), zeros, zeros, *weights], dy


def train(arguments: list[Any], dy: Any, dtype: Any, most: int) -> Any:
    """The gradient of the recurrent weights, by one of the ways."""
    bfloat16_torch._MOST_WEIGHTS = most
    data = [tensor.to(dtype) for tensor in arguments[:3]]
    y, _, _ = ops.lstm(*data, *arguments[3:])
    wanted = [arguments[0], *arguments[3:]]
    return torch.autograd.grad(y, wanted, dy.to(y.dtype))[2]


def measure_layer(units: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """One size of a layer, by each of the ways."""
    arguments, dy = make_layer(units, batch_size)
    ways = {
        name: partial(train, arguments, dy, *how) for name, how in WAYS.items()
    }
    truth = ways["float32"]()
    norm = truth.norm()
    differences = {
        name: round(float((way().float() - truth).norm() / norm), 5)
        for name, way in ways.items()
    }
    return {
        "units": units,
        "batch_size": batch_size,
        "ms": take_turns(ways, rounds),
        "difference": differences,
    }


def measure_steps(name: str, rounds: int) -> dict[str, Any]:
    """A training step of a preset under both policies."""
    data = words_of(find_preset(name), STEPS)
    windows = {}
    for policy in ("float32", "mixed_bfloat16"):
        keras.config.set_dtype_policy(policy)
        model = LanguageModel.from_preset(name, vocabulary_size=VOCABULARY_SIZE)
        model.compile()
        windows[policy] = partial(model.fit, data, verbose=0)
        windows[policy]()
    keras.config.set_dtype_policy("float32")
    return {"preset": name, "ms": take_turns(windows, rounds, STEPS)}


def take_turns(
    ways: dict[str, Any], rounds: int, repeats: int = 1
) -> dict[str, dict[str, float]]:
    """Milliseconds of each, which does so many of what is timed at once."""
    ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            ms[name].append(1000 * (time.perf_counter() - began) / repeats)
    return {
        name: {
            "median": round(float(np.median(times)), 2),
            "min": round(min(times), 2),
        }
        for name, times in ms.items()
    }


def show(what: str, found: dict[str, Any]) -> None:
    times = ", ".join(
        f"{name} {ms['median']} ({ms['min']})"
        for name, ms in found["ms"].items()
    )
    print(f"{what}, ms: {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--units", type=int, nargs="+", default=[200, 500, 650, 800, 1150])
    add("--batch-sizes", type=int, nargs="+", default=[20, 80])
    add("--presets", nargs="*", default=PRESETS)
    add("--rounds", type=int, default=9)
    add("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if ops.has_gpu():
        sys.exit("bfloat16_lstm.py: it measures processors; hide the GPU.")
    if not bfloat16_torch.is_fast(torch.zeros(1, dtype=torch.bfloat16)):
        sys.exit(
            "bfloat16_lstm.py: this processor has no products of bfloat16 "
            "(AVX512-BF16); the LSTM runs in float32 on it."
        )
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "device": ops.device_name(),
        "threads": torch.get_num_threads(),
        "versions": installed_versions("torch"),
        "time_steps": TIME_STEPS,
        "rounds": options.rounds,
        "layers": [],
        "steps": [],
    }
    print(f"{result['device']}, {result['threads']} threads")
    for batch_size in options.batch_sizes:
        for units in options.units:
            found = measure_layer(units, batch_size, options.rounds)
            result["layers"].append(found)
            show(f"{units} units, batch {batch_size}", found)
    for name in options.presets:
        found = measure_steps(name, options.rounds)
        result["steps"].append(found)
        show(f"a step of {name}", found)
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
