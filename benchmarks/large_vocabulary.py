"""Times training steps with 250,000 words by each of the three softmaxes.

    KERAS_BACKEND=torch python benchmarks/large_vocabulary.py --out torch.json

All three stand in one process, and windows of steps take turns through them,
so that a drift of the machine hits all alike. A window is a `fit`, and ends
when the device is done. Words are drawn by Zipf's law, the same for all: 76 %
of them are in the head of the adaptive softmax (of real text more). Memory is
that of a process for each softmax, which trains two steps and does no more.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from multilstm.benchmark import Shape
from multilstm.devices import memory_mb, peak_memory_mb
from multilstm.files import read_json, write_json

SCHEMA = "multilstm.large_vocabulary/1"
KINDS = ("exact", "sampled", "adaptive")


def draw_token_ids(shape: Shape, steps: int) -> np.ndarray:
    """Ids by Zipf's law, for so many batches."""
    rng = np.random.default_rng(3)
    place = rng.random(shape.tokens * steps + 1)
    words = np.exp(place * np.log(shape.vocabulary_size + 1)).astype(np.int64)
    return np.minimum(words - 1, shape.vocabulary_size - 1).astype(np.int32)


def make(softmax: str, shape: Shape, optimizer: str) -> Any:
    import keras

    from multilstm import LanguageModel

    model = LanguageModel(
        shape.vocabulary_size,
        units=shape.units,
        embedding_dim=shape.embedding_dim,
        softmax=softmax,
    )
    model.build((shape.batch_size, shape.sequence_length))
    model.compile(
        {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}[optimizer](
            1e-3
        )
    )
    return model


def train(model: Any, window: Any) -> float:
    """Trains on all batches; seconds until the device is done."""
    import keras

    began = time.perf_counter()
    model.fit(window, shuffle=False, verbose=0)
    keras.ops.convert_to_numpy(model.projection.weights[-1])  # waits
    return time.perf_counter() - began


def measure_times(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Milliseconds a step of each softmax, in turns."""
    window = cut(shape, options.steps)
    models = {
        kind: make(kind, shape, options.optimizer) for kind in options.kinds
    }
    found: dict[str, Any] = {}
    for kind, model in models.items():
        found[kind] = {
            "parameters": model.count_params(),
            "cutoffs": model.settings["cutoffs"],
            "num_sampled": model.settings["num_sampled"],
            "first_window_seconds": round(train(model, window), 2),
            "windows_ms": [],
        }
    for _ in range(options.rounds):
        for kind, model in models.items():
            ms = 1000 * train(model, window) / options.steps
            found[kind]["windows_ms"].append(round(ms, 2))
    for about in found.values():
        times = np.array(about["windows_ms"])
        about["step_time_ms"] = {
            "median": float(np.median(times)),
            "min": float(times.min()),
        }
        median = about["step_time_ms"]["median"]
        about["tokens_per_second"] = round(1000 * shape.tokens / median, 1)
        if "exact" in found:
            ratios = np.array(found["exact"]["windows_ms"]) / times
            about["times_as_fast_as_exact"] = {
                "median": round(float(np.median(ratios)), 2),
                "min": round(float(ratios.min()), 2),
                "max": round(float(ratios.max()), 2),
            }
    return found


def cut(shape: Shape, steps: int) -> Any:
    from multilstm import NextWordWindows

    ids = draw_token_ids(shape, steps)
    return NextWordWindows(ids, shape.sequence_length, shape.batch_size)


def measure_memory(kind: str, optimizer: str, shape: Shape) -> dict[str, Any]:
    """The most memory that two steps take over the start, in this process."""
    # Loaded for their own memory, which is not to be counted.
    import keras  # noqa: F401

    from multilstm import model  # noqa: F401

    before = memory_mb()
    train(make(kind, shape, optimizer), cut(shape, 2))
    return {"peak_over_start_mb": round(peak_memory_mb() - before, 1)}


def ask_for_memory(kind: str) -> dict[str, Any]:
    """`measure_memory` in a process of its own."""
    arguments = [sys.executable, *sys.argv, "--memory-of", kind]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def markdown(paths: list[Path]) -> str:
    """The README's table, a column for each file."""
    files = [read_json(path, schema=SCHEMA) for path in paths]
    heads = [f"{each['backend']}, {each['optimizer']}" for each in files]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(files)]
    for kind in KINDS:
        cells = [markdown_cell(each["results"].get(kind)) for each in files]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    cell = f"{found['step_time_ms']['median']:,.0f} ms, "
    cell += f"{found['tokens_per_second']:,.0f} tokens/s"
    if "times_as_fast_as_exact" in found:
        cell += f", x {found['times_as_fast_as_exact']['median']:.2f}"
    if "peak_over_start_mb" in found:
        cell += f", {found['peak_over_start_mb'] / 1000:.1f} GB"
    return cell


def main() -> None:
    options = parse_arguments()
    if options.markdown:
        print(markdown(options.markdown))
        return
    units = [options.units] * options.layers
    shape = Shape(
        "large_vocabulary",
        units,
        options.units,
        options.batch_size,
        options.sequence_length,
        options.vocabulary_size,
    )
    if options.memory_of:
        kind, optimizer = options.memory_of, options.optimizer
        print(json.dumps(measure_memory(kind, optimizer, shape)))
        return
    memory = {kind: ask_for_memory(kind) for kind in options.kinds}
    found = measure_times(options, shape)

    from multilstm.runs import describe_environment

    result = {
        "schema": SCHEMA,
        **describe_environment(),
        "shape": str(shape),
        "optimizer": options.optimizer,
        "steps_per_window": options.steps,
        "results": {kind: found[kind] | memory[kind] for kind in found},
    }
    if options.out:
        write_json(options.out, result)
    for kind, about in result["results"].items():
        print(f"{kind:9} {markdown_cell(about)}")
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--vocabulary-size", type=int, default=250_000)
    add("--units", type=int, default=256, help="and size of the embeddings")
    add("--layers", type=int, default=1)
    add("--batch-size", type=int, default=20)
    add("--sequence-length", type=int, default=35)
    add("--optimizer", choices=("adam", "sgd"), default="adam")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=3, help="in a window")
    add("--out", type=Path, help="JSON file")
    add("--markdown", nargs="+", type=Path, help="files to make a table of")
    add("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
