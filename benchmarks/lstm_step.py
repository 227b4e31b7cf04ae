"""Times a whole training step of ours against what others would run.

The variants are those of `multilstm/benchmark.py`. All start from the same
weights and see the same batches, and their losses after a few steps on one
batch must agree before times are compared. What is timed is a window of steps:
it ends when the device is done, it includes the batches' way to the device
and, with Keras, the start of a `fit`. So on a GPU make windows long: `--steps
100`. Compilation and a first window come before.

One process holds one framework, and `KERAS_BACKEND` says which:

    KERAS_BACKEND=jax python benchmarks/lstm_step.py --shapes tutorial

To compare frameworks name a Python for each. Windows then take turns through
all processes, so that a drift of the machine's speed hits all alike:

    python benchmarks/lstm_step.py --python jax=PATH --python torch=PATH

`share` is how near a step comes to its floor: its products at the rate of a
plain product of that framework, measured in every round, over its time. (On a
GPU a product may be so small that its launch takes longer.)
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multilstm.bench import Row
from multilstm.benchmark import (
    CHECK_STEPS,
    KERAS_VARIANTS,
    Shape,
    Worker,
    WorkerError,
)
from multilstm.errors import UserError
from multilstm.files import finite_or_none, read_json, write_json
from multilstm.ranking import LOSS_TOLERANCE, apart_from_middle
from multilstm.selection import BACKENDS, parse_pythons, select_backend
from multilstm.workers import WorkerProcess

SCHEMA = "multilstm.lstm_step/1"
VARIANTS = (*KERAS_VARIANTS, "native", "native_compiled")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tutorial", (500, 500), 500, 20, 30),
        Shape("zaremba_medium", (650, 650), 650, 20, 35),
        Shape("awd", (1150, 1150, 400), 400, 40, 70, tied=True),
        Shape("tiny", (16, 16), 16, 4, 5, 50),
    )
}


@dataclasses.dataclass
class Entry(Row):
    """One variant in one worker, and what is known of it."""

    step_ms: list[float] = dataclasses.field(default_factory=list)
    gflops: list[float] = dataclasses.field(default_factory=list)


def measure(
    workers: dict[str, Any],
    shape: Shape,
    options: argparse.Namespace,
    lost: set[tuple[str, str]],
) -> Iterator[list[Entry]]:
    """Builds all variants of a shape, then times them in turns.

    They are given after each round: what was timed may then be written. What a
    process was lost by is put into `lost`, and left out at the next shape.
    """
    entries = [
        Entry(backend, variant, worker)
        for variant in options.variants
        for backend, worker in workers.items()
    ]
    sizes = dataclasses.asdict(shape)
    for entry in entries:
        if (entry.backend, entry.variant) in lost:
            entry.about["reason"] = "its process was lost at a shape before"
        entry.ask("prepare", steps=options.steps, **sizes)
    for entry in entries:
        runs = entry.runs and not is_lost(entry.worker)
        entry.about |= entry.ask("build", variant=entry.variant)
        if runs and is_lost(entry.worker):
            lost.add((entry.backend, entry.variant))
    check_losses(entries, LOSS_TOLERANCE[options.precision])
    for _ in range(options.rounds):
        time_round(entries, options.steps)
        yield entries


def check_losses(entries: list[Entry], tolerance: float) -> None:
    """Compares the losses of each with those in the middle of all.

    What they differ by is relative to the loss before the first step.
    """
    entries = [entry for entry in entries if entry.runs]
    losses = np.array([entry.about["losses"] for entry in entries])
    if not entries:
        return
    deviations = apart_from_middle(losses, losses).max(axis=1)
    for entry, deviation in zip(entries, deviations, strict=True):
        entry.about["loss_deviation"] = float(deviation)
        entry.about["comparable"] = bool(deviation <= tolerance)


def time_round(entries: list[Entry], steps: int) -> None:
    """One window of each variant, and each framework's plain product."""
    rates: dict[str, float] = {}
    for entry in entries:
        if entry.backend not in rates:
            rates |= entry.ask("time_product")
        if answer := entry.ask("time_window", variant=entry.variant):
            entry.step_ms.append(1000 * answer["seconds"] / steps)
            entry.gflops.append(rates[entry.backend])


def record(entry: Entry, entries: list[Entry], shape: Shape) -> dict[str, Any]:
    """What the result file says of a variant."""
    about = {
        "shape": dataclasses.asdict(shape),
        "backend": entry.backend,
        "variant": entry.variant,
        **entry.about,
    }
    if not entry.runs or not entry.step_ms:
        return about
    of = {(e.backend, e.variant): e for e in entries}
    step_ms, gflops = np.array(entry.step_ms), np.array(entry.gflops)
    floor_ms = shape.step_flops / gflops / 1e6
    p20, median, p80 = np.percentile(step_ms, [20, 50, 80]).round(4).tolist()
    return about | {
        "step_time_ms": {
            "median": median,
            "p20": p20,
            "p80": p80,
            "min": round(float(step_ms.min()), 4),
        },
        "tokens_per_second": round(1000 * shape.tokens / median, 1),
        "product_gflops": round(float(np.median(gflops)), 1),
        "share_of_product_rate": round(float(np.median(floor_ms / step_ms)), 4),
        "time_over_ours": ratio(entry, of.get((entry.backend, "ours"))),
        "time_over_torch_native": ratio(entry, of.get(("torch", "native"))),
        "windows_ms": step_ms.round(4).tolist(),
    }


def ratio(entry: Entry, other: Entry | None) -> dict[str, float] | None:
    """The time of one over that of another, round by round."""
    if other is None or not (
        other.runs and entry.about["comparable"] and other.about["comparable"]
    ):
        return None
    ratios = np.array(entry.step_ms) / np.array(other.step_ms)
    return {
        "median": round(float(np.median(ratios)), 4),
        "min": round(float(ratios.min()), 4),
        "max": round(float(ratios.max()), 4),
    }


def memory_of(
    entry: Entry, shape: Shape, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures a variant alone, in a fresh process."""
    worker = WorkerProcess(options.python[entry.backend], entry.backend)
    with contextlib.closing(worker):
        try:
            worker.ask("start", precision=options.precision)
            sizes = dataclasses.asdict(shape)
            worker.ask("prepare", steps=options.steps, **sizes)
            return worker.ask("measure_memory", variant=entry.variant)
        except WorkerError as failure:
            return {"reason": str(failure)}


def table(records: list[dict[str, Any]], shape: Shape) -> str:
    products = {
        found["backend"]: f"{found['backend']} {found['product_gflops']:,.0f}"
        for found in records
        if "reason" not in found
    }
    return "\n".join(
        [
            f"{shape}, {shape.step_flops / 1e9:.3g} GFLOP a step",
            f"{'':28}{'ms a step':>10}{'p20':>9}{'p80':>9}{'min':>9}"
            f"{'tokens/s':>11}{'share':>7}{'compile':>9}{'loss':>9}"
            f"{'over ours':>19}{'over torch native':>19}  LSTM",
            *map(row, sorted(records, key=lambda found: found["backend"])),
            f"plain product, GFLOP/s: {', '.join(products.values())}",
        ]
    )


def row(record: dict[str, Any]) -> str:
    start = f"{record['backend']:<11}{record['variant']:<17}"
    if "reason" in record:
        return f"{start}absent: {record['reason']}"
    ms, notes = record["step_time_ms"], [record["kernel"]]
    over_ours = show_ratio(record["time_over_ours"])
    over_torch = show_ratio(record["time_over_torch_native"])
    if not record["comparable"]:
        notes.append(f"NOT COMPARABLE, loss {record['loss_deviation']:.1e} off")
    notes += [
        f"{name.replace('_', ' ')} {value}"
        for name, value in record.get("memory", {}).items()
        if value is not None
    ]
    return (
        f"{start}{ms['median']:>10.2f}{ms['p20']:>9.2f}{ms['p80']:>9.2f}"
        f"{ms['min']:>9.2f}{record['tokens_per_second']:>11,.0f}"
        f"{record['share_of_product_rate']:>7.2f}"
        f"{record['compile_time_seconds']:>8.1f}s{record['losses'][-1]:>9.4f}"
        f" {over_ours:>18} {over_torch:>18}  {', '.join(notes)}"
    )


def show_ratio(times: dict[str, float] | None) -> str:
    if times is None:
        return "-"
    return f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"


def markdown(paths: list[Path]) -> str:
    """The README's tables: a row for each variant, a column a framework.

    Files of one device, precision and shape make one table; of what stands
    in several of them, the last file's is taken.
    """
    tables: dict[tuple[str, str, str], dict[tuple[str, str], dict]] = {}
    for path in paths:
        content = read_json(path, schema=SCHEMA)
        for found in content["results"]:
            shape = Shape(**found["shape"])
            key = (str(shape), content["device"], content["precision"])
            cells = tables.setdefault(key, {})
            cells[found["variant"], found["backend"]] = found
    return "\n".join(
        line
        for title, cells in tables.items()
        for line in markdown_table(", ".join(title), cells)
    )


def markdown_table(title: str, cells: dict) -> list[str]:
    backends = [b for b in BACKENDS if any(key[1] == b for key in cells)]
    lines = [f"{title}:", "", f"| | {' | '.join(backends)} |"]
    lines.append("|---|" + "---|" * len(backends))
    for variant in VARIANTS:
        found = [cells.get((variant, backend)) for backend in backends]
        if any(found):
            shown = " | ".join(map(markdown_cell, found))
            lines.append(f"| {variant} | {shown} |")
    return [*lines, ""]


def markdown_cell(record: dict[str, Any] | None) -> str:
    if record is None or "reason" in record:
        return ""
    ms = record["step_time_ms"]["median"]
    cell = f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
    if not record["comparable"]:
        return f"{cell}, another loss"
    if record["variant"] == "ours":
        return f"{cell}, {record['tokens_per_second']:,.0f} tokens/s"
    over_ours = record["time_over_ours"]
    return f"{cell}, x {over_ours['median']:.2f}" if over_ours else cell


def run(options: argparse.Namespace) -> None:
    """Measures, shows and writes all shapes."""
    shapes = [resize(SHAPES[name], options) for name in options.shapes]
    with contextlib.ExitStack() as closed_at_end:
        workers = start_workers(options, closed_at_end)
        result = describe(workers, options)
        lost: set[tuple[str, str]] = set()
        print(f"{result['device']}, {options.precision}", end="\n\n")
        for shape in shapes:
            start_again(workers, options, closed_at_end)
            before = result["results"]
            for entries in measure(workers, shape, options, lost):
                records = [record(entry, entries, shape) for entry in entries]
                result["results"] = before + finite_or_none(records)
                if options.out:
                    write_json(options.out, result)
            if options.memory:
                for entry, found in zip(entries, records, strict=True):
                    if entry.runs:
                        found["memory"] = memory_of(entry, shape, options)
                result["results"] = before + finite_or_none(records)
                if options.out:
                    write_json(options.out, result)
            print(table(records, shape), end="\n\n", flush=True)
    print(json.dumps(result))


def resize(shape: Shape, options: argparse.Namespace) -> Shape:
    """The shape with those sizes that the command line gives."""
    asked = vars(options)
    sizes = {
        field.name: asked[field.name]
        for field in dataclasses.fields(Shape)
        if asked.get(field.name) is not None
    }
    shape = dataclasses.replace(shape, **sizes)
    if shape.tied and shape.embedding_dim != shape.units[-1]:
        raise UserError(
            f"Tied embeddings need the last layer's units; {shape.name} has "
            f"{shape.embedding_dim} and {shape.units[-1]}. Give "
            "--embedding-dim and --units that agree."
        )
    return shape


def start_workers(
    options: argparse.Namespace, closed_at_end: contextlib.ExitStack
) -> dict[str, Any]:
    """Processes for the Pythons that are named; without any, this one."""
    if not options.python:
        backend, _ = select_backend()
        options.python = {backend: sys.executable}
        return {backend: Worker()}
    options.python = parse_pythons(options.python)
    return {
        backend: start_worker(backend, options, closed_at_end)
        for backend in options.python
    }


def start_worker(
    backend: str,
    options: argparse.Namespace,
    closed_at_end: contextlib.ExitStack,
) -> WorkerProcess:
    python = options.python[backend]
    worker = WorkerProcess(python, backend, timeout=options.timeout)
    return closed_at_end.enter_context(contextlib.closing(worker))


def is_lost(worker: Any) -> bool:
    """Whether it was a process that has ended."""
    is_process = isinstance(worker, WorkerProcess)
    return is_process and worker.process.poll() is not None


def start_again(
    workers: dict[str, Any],
    options: argparse.Namespace,
    closed_at_end: contextlib.ExitStack,
) -> None:
    """Another process for one that was lost at the shape before."""
    for backend, worker in workers.items():
        if is_lost(worker):
            again = start_worker(backend, options, closed_at_end)
            with contextlib.suppress(WorkerError):  # the old one is told then
                again.ask("start", precision=options.precision)
                workers[backend] = again


def describe(workers: dict[str, Any], options: argparse.Namespace) -> dict:
    """Starts the workers; gives what a file says besides its results.

    A worker that cannot start, or sees no GPU where one is required, is taken
    out with the reason.
    """
    about, absent = {}, {}
    for backend in [*workers]:
        try:
            answer = workers[backend].ask("start", precision=options.precision)
            if options.require_gpu and not answer["gpu"]:
                raise WorkerError("it sees no GPU, which --require-gpu asks")
        except WorkerError as failure:
            absent[backend] = str(failure)
            worker = workers.pop(backend)
            if isinstance(worker, WorkerProcess):
                worker.close()  # or it would keep a GPU's memory
        else:
            about[backend] = answer
    reasons = "; ".join(f"{name}: {why}" for name, why in absent.items())
    if not about:
        raise UserError(f"No backend can be timed: {reasons}")
    if absent:
        print(f"left out: {reasons}", file=sys.stderr)
    gpu = {backend: each["gpu"] for backend, each in about.items()}
    if len(set(gpu.values())) > 1:
        raise UserError(f"All must run on one kind of device; on a GPU: {gpu}")
    errors = {name: each["product_error"] for name, each in about.items()}
    if options.precision == "float32" and max(errors.values()) > 1e-5:
        raise UserError(
            f"Products are not float32's: their errors are {errors}"
        )
    return {
        "schema": SCHEMA,
        "device": " / ".join(
            sorted({each["device"] for each in about.values()})
        ),
        "versions": {name: each["versions"] for name, each in about.items()},
        "absent": absent,
        "precision": options.precision,
        "product_error": errors,
        "protocol": {
            "rounds": options.rounds,
            "steps_per_window": options.steps,
            "warm_up_windows": 1,
            "check_steps": CHECK_STEPS,
            "loss_tolerance": LOSS_TOLERANCE[options.precision],
            "order": "each round goes through all variants and backends",
        },
        "results": [],
    }


def main() -> None:
    options = parse_arguments()
    try:
        if options.markdown:
            print(markdown(options.markdown))
        else:
            run(options)
    except UserError as error:
        sys.exit(f"lstm_step.py: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="multilstm/benchmark.py says what the variants are.",
        usage="%(prog)s [options]",
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["tutorial"])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--python", action="append", default=[], metavar="BACKEND=PATH")
    add("--rounds", type=positive, default=7, help="windows of each variant")
    add("--timeout", type=positive, help="seconds for a task of a backend")
    add("--steps", type=positive, default=16, help="steps in a window")
    add("--precision", choices=LOSS_TOLERANCE, default="float32")
    add("--memory", action="store_true", help="measure peak memory too")
    add("--require-gpu", action="store_true", help="leave out what sees no GPU")
    add("--out", type=Path, metavar="FILE.json")
    add("--markdown", type=Path, nargs="+", metavar="FILE.json")
    for size in ("embedding-dim", "batch-size", "sequence-length"):
        add(f"--{size}", type=positive, help="instead of the shapes' own")
    add("--vocabulary-size", type=positive)
    add("--units", type=positive, nargs="+", metavar="UNITS")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"a whole number from 1 on is needed; received {text!r}"
        )
    return int(text)


if __name__ == "__main__":
    main()
