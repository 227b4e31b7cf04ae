"""Times LSTM layers that run at once on a GPU, by chunks of the time steps.

    KERAS_BACKEND=torch python benchmarks/layers_at_once.py --out FILE.json

A layer needs of the one below only the steps that it has come to. Cut into
chunks, the second layer's first chunk can run beside the first layer's second
one, each layer in a stream of its own (Appleyard et al., 2016,
arXiv:1604.01946, section 3.2, for layers that cuDNN has in one call). Layers
of different sizes, and those with dropout between, need a call each, and with
batches of 20 rows one call leaves most of a GPU idle. A time is that of a
forward and a backward pass, recorded as a CUDA graph and replayed; on a CPU
there is one stream, for a check of the numbers alone.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch  # noqa: TID251  (its streams and graphs)

from multilstm import ops
from multilstm.files import write_json
from multilstm.presets import find_preset
from multilstm.selection import installed_versions

SCHEMA = "multilstm.layers_at_once/1"


class Stack(torch.nn.Module):
    """LSTM layers with a mask between any two, cut into chunks of time.

    Args:
        sizes: Features, then the units of each layer.
        num_chunks: 1 runs one layer after the other.
    """

    def __init__(self, sizes: Sequence[int], num_chunks: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.LSTM(*pair) for pair in pairwise(sizes)
        )
        self.num_chunks = num_chunks
        self.streams: list[Any] = []

    def forward(self, x: Any, masks: Sequence[Any]) -> Any:
        """Of `(time, batch, features)` what the last layer gives."""
        if x.is_cuda and self.num_chunks > 1:
            if not self.streams:
                self.streams = [torch.cuda.Stream() for _ in self.layers]
            caller = torch.cuda.current_stream()
            for stream in self.streams:
                stream.wait_stream(caller)
        states: list[Any] = [None] * len(self.layers)
        outputs = []
        for chunk in x.chunk(self.num_chunks):
            output, done = chunk, None
            for place, layer in enumerate(self.layers):
                with self._stream(place, output, done):
                    if place:
                        output = output * masks[place - 1]
                    output, states[place] = layer(output, states[place])
                    done = self._note_end()
            outputs.append(output)
        if self.streams:
            for stream in self.streams:
                caller.wait_stream(stream)
            for output in outputs:
                output.record_stream(caller)
        return torch.cat(outputs)

    @contextlib.contextmanager
    def _stream(self, place: int, output: Any, done: Any) -> Any:
        """The stream of a layer, after what comes from the one below."""
        if not self.streams:
            yield
            return
        stream = self.streams[place]
        if done is not None:
            stream.wait_event(done)
        output.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def _note_end(self) -> Any:
        return (
            torch.cuda.current_stream().record_event() if self.streams else None
        )


def passes(
    stack: Stack, x: Any, masks: Any, upstream: Any
) -> Callable[[], Any]:
    """A function that computes the output and the gradients of `upstream`."""

    def run() -> Any:
        for tensor in (x, *stack.parameters()):
            tensor.grad = None
        output = stack(x, masks)
        output.backward(upstream)
        return output

    if not x.is_cuda:
        return run
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is allocated and chosen the first time
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def measure(name: str, chunks: Sequence[int], steps: int, rounds: int) -> Any:
    """Milliseconds of each number of chunks, in turns, and what differs."""
    preset = find_preset(name)
    device = "cuda" if ops.has_gpu() else "cpu"
    time_steps, rows = preset.sequence_length, preset.batch_size
    sizes = [preset.embedding_dim, *preset.units_of_layers]
    torch.manual_seed(0)
    x = torch.randn(time_steps, rows, sizes[0], device=device)
    x.requires_grad_()
    masks = [
        2 * torch.randint(2, (1, rows, size), device=device).float()
        for size in sizes[1:-1]
    ]
    upstream = torch.randn(time_steps, rows, sizes[-1], device=device)
    weights = Stack(sizes, 1).to(device).state_dict()
    runs, results = {}, []
    failed = None
    for asked in chunks:
        number = len(x.chunk(asked))  # 35 steps are cut in 9, not 10
        stack = Stack(sizes, number).to(device)
        stack.load_state_dict(weights)
        try:
            run = passes(stack, x, masks, upstream)
        except RuntimeError as error:  # after which none can be recorded
            failed = f"{number} chunks: {str(error).splitlines()[0]}"
            break
        reached = [run(), x.grad, *(p.grad for p in stack.parameters())]
        results.append([t.detach().cpu().numpy() for t in reached])
        runs[number] = run
    times: dict[int, list[float]] = {number: [] for number in runs}
    for _ in range(rounds):
        for number, run in runs.items():
            wait(device)
            began = time.perf_counter()
            for _ in range(steps):
                run()
            wait(device)
            times[number].append(1000 * (time.perf_counter() - began) / steps)
    return {
        "preset": name,
        "ms": {str(n): round(float(np.median(t)), 3) for n, t in times.items()},
        "least_ms": {str(n): round(min(t), 3) for n, t in times.items()},
        "largest_difference": max(
            float(np.abs(mine - first).max() / np.abs(first).max())
            for other in results[1:]
            for mine, first in zip(other, results[0], strict=True)
        )
        if len(results) > 1
        else None,
        "failed": failed,
    }


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--presets", nargs="+", default=["awd", "zaremba_medium"])
    add("--chunks", nargs="+", type=int, default=[1, 2, 5, 7, 10])
    add("--steps", type=int, default=20, help="in a round")
    add("--rounds", type=int, default=7)
    add("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if keras.config.backend() != "torch":
        sys.exit("layers_at_once.py: needs KERAS_BACKEND=torch.")
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "device": ops.device_name(),
        "versions": installed_versions("torch"),
        "results": [],
    }
    with ops.tf32(True):
        for name in options.presets:
            found = measure(name, options.chunks, options.steps, options.rounds)
            result["results"].append(found)
            print(found, flush=True)
            if options.out:
                write_json(options.out, result)


if __name__ == "__main__":
    main()
