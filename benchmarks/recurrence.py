"""The LSTM of PyTorch on a GPU: cuDNN's beside the one in Triton.

    KERAS_BACKEND=torch python benchmarks/recurrence.py --out recurrence.json

The widest layer of a preset runs forward, and forward and back, recorded as a
CUDA graph and replayed, by cuDNN and by `multilstm/ops/triton_torch.py`, in
turns; for TF32 with the products of a step cut in several ways. First comes how
far outputs and gradients of a replay are from those in float64. What is
measured is in results/recurrence-h200.json. Without a GPU TRITON_INTERPRET=1
shows the numbers alone, slowly.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251  (its graphs)

from multilstm import ops
from multilstm.files import finite_or_none, write_json
from multilstm.ops import torch as by_cudnn
from multilstm.ops import triton_torch
from multilstm.preset_files import find_preset
from multilstm.selection import installed_versions

SCHEMA = "multilstm.recurrence/1"

# Each of them in turn beside the ones that are taken where nothing is said.
BLOCKS = [
    {},
    {"in_parts": True},
    {"programs": 2},
    {"in_parts": True, "programs": 2},
    {"in_parts": True, "programs": 3, "stages": 3},
    {"warps": 4, "programs": 2},
]


def variants(asked: Sequence[dict[str, int]]) -> dict[str, Callable[..., Any]]:
    """`lstm` by name: cuDNN's, then Triton's with each of some blocks."""

    def in_triton(blocks: triton_torch.Blocks) -> Callable[..., Any]:
        return lambda *tensors: triton_torch.lstm(*tensors, blocks)

    by_name: dict[str, Callable[..., Any]] = {"cudnn": by_cudnn.lstm}
    for changes in asked:
        words = (f"{name}={number}" for name, number in changes.items())
        name = " ".join(("triton", *words))
        by_name[name] = in_triton(triton_torch.Blocks(**changes))
    return by_name


def tensors_of(
    batch: int, steps: int, features: int, units: int, dtype: Any
) -> list[Any]:
    """Inputs, states and weights, as `ops.lstm` takes them."""
    drawn = torch.Generator().manual_seed(0)
    scale = units**-0.5
    device = "cuda" if ops.has_gpu() else "cpu"
    return [
        torch.nn.Parameter(
            (factor * torch.randn(shape, generator=drawn)).to(device, dtype)
        )
        for factor, shape in (
            (1.0, (batch, steps, features)),
            *((0.5, (batch, units)),) * 2,
            (scale, (features, 4 * units)),
            (scale, (units, 4 * units)),
            (scale, (4 * units,)),
        )
    ]


def both_ways(lstm: Callable[..., Any], tensors: Sequence[Any]) -> list[Any]:
    """Outputs, and gradients as they are when each output weighs the same."""
    y, _, _ = lstm(*tensors)
    upstream = torch.full_like(y, 1 / y.shape[1])
    return [y, *torch.autograd.grad(y, [tensors[0], *tensors[3:]], upstream)]


def in_float64(tensors: Sequence[Any]) -> list[Any]:
    """`both_ways` by PyTorch's own LSTM."""
    exact = [torch.nn.Parameter(tensor.detach().double()) for tensor in tensors]
    return both_ways(by_cudnn.lstm, exact)


def errors(found: Sequence[Any], exact: Sequence[Any]) -> dict[str, float]:
    """The largest of each tensor, as a share of its largest number."""
    names = ("y", "dx", "d_kernel", "d_recurrent_kernel", "d_bias")
    return {
        name: float((mine.double() - true).detach().abs().max())
        / float(true.detach().abs().max())
        for name, mine, true in zip(names, found, exact, strict=True)
    }


def recorded(run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """A function that does on the GPU what another does, and what it gives."""
    if not ops.has_gpu():
        return run, run()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is compiled and allocated the first time
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    graph.replay()
    return graph.replay, given


def measure(
    tensors: Sequence[Any],
    by_name: dict[str, Callable[..., Any]],
    steps: int,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Of each variant its errors, then the milliseconds there and back.

    A row is given when there is something new in it, as the next one may end
    the process: what a kernel does to the GPU nobody can take back.
    """
    exact = in_float64(tensors)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[tuple[str, str], Any] = {}
    for name, lstm in by_name.items():
        row = rows[name] = {"variant": name}
        try:
            back, given = recorded(partial(both_ways, lstm, tensors))
            row["errors"] = errors(given, exact)
            row["kernel"] = ops.last_kernel()
            there, _ = recorded(partial(lstm, *tensors))
        except Exception as problem:  # too large for a GPU, say: told, and on
            said = str(problem).strip() or repr(problem)
            row["failed"] = said.splitlines()[0][:200]
        else:
            runs[name, "forward_ms"] = there
            runs[name, "ms"] = back
        yield row
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            wait()
            began = time.perf_counter()
            for _ in range(steps):
                run()
            wait()
            times[key].append(1000 * (time.perf_counter() - began) / steps)
    for (name, what), taken in times.items():
        rows[name][what] = round(float(np.median(taken)), 4)
        rows[name][f"least_{what}"] = round(min(taken), 4)
        if what == "ms":
            yield rows[name]


def wait() -> None:
    if ops.has_gpu():
        torch.cuda.synchronize()


def parse_blocks(text: str) -> dict[str, int]:
    """Fields of `triton_torch.Blocks` from `units=8,stages=6`, or `-`."""
    try:
        pairs = [part.split("=") for part in text.strip("-").split(",") if part]
        fields = {name: int(number) for name, number in pairs}
        triton_torch.Blocks(**fields)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    presets = ["zaremba_medium", "adam_512", "awd", "awd_adam", "zaremba_large"]
    add("--presets", nargs="+", default=presets)
    add("--precisions", nargs="+", default=["tf32", "float32", "bfloat16"])
    add(
        "--blocks",
        nargs="+",
        type=parse_blocks,
        metavar="NAME=NUMBER[,...]",
        help="fields of Blocks, instead of those tried in TF32",
    )
    add("--steps", type=int, default=20, help="in a round")
    add("--rounds", type=int, default=5)
    add("--time-steps", type=int, help="instead of the preset's")
    add("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if not ops.has_gpu() and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit(
            "recurrence.py: needs KERAS_BACKEND=torch and a GPU that PyTorch "
            "sees; or TRITON_INTERPRET=1, for a check of the numbers alone."
        )
    if os.environ.get("MULTILSTM_TRITON") == "1":
        sys.exit(
            "recurrence.py: MULTILSTM_TRITON=1 would put Triton in cuDNN's "
            "place; leave it out."
        )
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "device": ops.device_name(),
        "versions": installed_versions("torch"),
        "default_blocks": asdict(triton_torch.Blocks()),
        "results": [],
    }
    for precision in options.precisions:
        tried = BLOCKS if precision == "tf32" else BLOCKS[:1]
        by_name = variants(options.blocks or tried)
        dtype = getattr(torch, precision.replace("tf32", "float32"))
        for name in options.presets:
            preset = find_preset(name)
            # The widest layer, from one as wide or from the embedding.
            units = max(preset.units_of_layers)
            shape = (
                preset.batch_size,
                options.time_steps or preset.sequence_length,
                units if preset.num_layers > 2 else preset.embedding_dim,
                units,
            )
            rows: dict[str, dict[str, Any]] = {}
            result["results"].append(
                {
                    "preset": name,
                    "precision": precision,
                    "batch_time_features_units": shape,
                }
            )
            print(name, precision, shape)
            with ops.tf32(precision != "float32"):  # as where models train
                tensors = tensors_of(*shape, dtype)
                repeats = options.steps, options.rounds
                for row in measure(tensors, by_name, *repeats):
                    print("   ", row, flush=True)
                    rows[row["variant"]] = row
                    result["results"][-1]["variants"] = [*rows.values()]
                    if options.out:
                        write_json(options.out, finite_or_none(result))


if __name__ == "__main__":
    main()
