"""Times PyTorch's steps on a GPU: replayed from a recording, and one by one.

    KERAS_BACKEND=torch python benchmarks/recorded_steps.py --out FILE.json

Both ways train a preset, dropout and all, from the same weights on the same
words, and must reach the same weights. A time is that of a `fit` over the
number of its steps. Of the replayed steps the kernels that took most of the
GPU's time are listed, as PyTorch's profiler names them.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np

from multilstm import ContinuousStreams, LanguageModel, ops
from multilstm.files import write_json
from multilstm.ops.graphs_torch import RecordedSteps
from multilstm.preset_files import find_preset
from multilstm.presets import Preset
from multilstm.selection import installed_versions

SCHEMA = "multilstm.recorded_steps/1"
VOCABULARY_SIZE = 10_000
WAYS = ("replayed", "one_by_one")


def words_of(preset: Preset, steps: int) -> ContinuousStreams:
    """Random words, frequent ones and rare ones, for so many steps."""
    number = steps * preset.tokens_per_step + preset.batch_size
    drawn = np.random.default_rng(0).zipf(1.3, 4 * number) - 1
    token_ids = drawn[drawn < VOCABULARY_SIZE][:number].astype(np.int32)
    return ContinuousStreams(
        token_ids,
        preset.sequence_length,
        preset.batch_size,
        drop_remainder=True,
    )


def train(preset: Preset, data: ContinuousStreams, *, fits: int) -> Any:
    """A model after so many epochs, and the milliseconds of their steps."""
    model = LanguageModel.from_preset(
        preset.name, vocabulary_size=VOCABULARY_SIZE
    )
    model.compile()
    step_ms = []
    for _ in range(fits):
        began = time.perf_counter()
        model.fit(data, verbose=0)
        keras.ops.convert_to_numpy(model.trainable_variables[-1])  # waits
        step_ms.append(1000 * (time.perf_counter() - began) / len(data))
    return model, step_ms


def kernels_of(model: Any, data: ContinuousStreams) -> list[dict[str, Any]]:
    """What the GPU ran in one epoch, the longest first."""
    import torch  # noqa: TID251  (its profiler)

    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        model.fit(data, verbose=0)
    kernels = sorted(
        profile.key_averages(), key=lambda kernel: -kernel.device_time_total
    )
    return [
        {
            "name": kernel.key,
            "calls_a_step": round(kernel.count / len(data), 2),
            "us_a_step": round(kernel.device_time_total / len(data), 1),
        }
        for kernel in kernels
    ]


def do_nothing(*arguments: Any) -> None:
    pass


def measure(preset: Preset, steps: int, fits: int) -> dict[str, Any]:
    data = words_of(preset, steps)
    found: dict[str, Any] = {"preset": preset.name, "steps": len(data)}
    weights = {}
    for way in WAYS:
        if way == "one_by_one":
            # Not by a MagicMock, which keeps what it is called with.
            with mock.patch.object(RecordedSteps, "_record", new=do_nothing):
                model, step_ms = train(preset, data, fits=fits)
        else:
            model, step_ms = train(preset, data, fits=fits)
        first, *others = step_ms
        weights[way] = model.get_weights()
        found[way] = {
            "first_fit_ms_a_step": round(first, 3),
            "ms_a_step": [round(ms, 3) for ms in others],
        }
        if way == "replayed":
            found["kernel"] = ops.last_kernel()
            kernels = kernels_of(model, data)
            found["gpu_us_a_step"] = sum(k["us_a_step"] for k in kernels)
            found["kernels"] = kernels[:20]
    found["largest_difference"] = max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(*weights.values(), strict=True)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--presets", nargs="+", default=["zaremba_medium", "awd", "adam_512"])
    add("--steps", type=int, default=128, help="in a fit")
    add("--fits", type=int, default=4, help="of which the first records")
    add("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if keras.config.backend() != "torch" or not ops.has_gpu():
        sys.exit("recorded_steps.py: needs KERAS_BACKEND=torch and a GPU.")
    result = {
        "schema": SCHEMA,
        "device": ops.device_name(),
        "versions": installed_versions("torch"),
        "results": [],
    }
    with ops.tf32(True):
        for name in options.presets:
            found = measure(find_preset(name), options.steps, options.fits)
            result["results"].append(found)
            times = {way: min(found[way]["ms_a_step"]) for way in WAYS}
            print(
                f"{name}: {times} ms a step, of which the GPU is busy "
                f"{found['gpu_us_a_step'] / 1000:.2f} ms; largest difference "
                f"of the weights {found['largest_difference']}"
            )
            if options.out:
                write_json(options.out, result)


if __name__ == "__main__":
    main()
