"""Which backend trains fastest here: rounds of windows that take turns.

Every backend and every peer runs in a process of its own. All begin with the
same weights and see the same batches. What computes something else, by its
losses, is shown and not ranked; what fails is shown with its reason, and the
others go on.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from multilstm import devices
from multilstm.benchmark import CHECK_STEPS, Shape, WorkerError
from multilstm.errors import UserError, check_whole
from multilstm.preset_files import find_preset
from multilstm.presets import Preset
from multilstm.ranking import (
    LOSS_TOLERANCE,
    NOISE,
    PEERS,
    first_loss,
    judge,
    rank,
)
from multilstm.selection import BACKENDS
from multilstm.workers import WorkerProcess

BENCH_SCHEMA = "multilstm-bench-1"
# Threads of some frameworks spin for a fifth of a second after their work.
PAUSE_SECONDS = 0.3


@dataclasses.dataclass
class Row:
    """One backend and one way to train with it, for one shape."""

    backend: str
    variant: str
    worker: Any = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    processes: list[list[float]] = dataclasses.field(default_factory=list)
    compile_seconds: list[float] = dataclasses.field(default_factory=list)
    warm_up_seconds: list[float] = dataclasses.field(default_factory=list)
    joules: list[float] = dataclasses.field(default_factory=list)

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Asks the worker; gives nothing from the first failure on."""
        if self.worker is None or not self.runs:
            return {}
        try:
            answer: dict[str, Any] = self.worker.ask(method, **arguments)
        except WorkerError as failure:
            self.about["reason"] = str(failure)
            return {}
        return answer

    @property
    def runs(self) -> bool:
        """Whether nothing has failed."""
        return "reason" not in self.about

    @property
    def has_lost_its_process(self) -> bool:
        """Whether other shapes need another one."""
        return (
            self.worker is not None and self.worker.process.poll() is not None
        )


def bench(
    pythons: Mapping[str, Path],
    shapes: Sequence[Shape],
    *,
    model: Path | None = None,
    dtype: str | None = None,
    peers: bool = False,
    processes: int = 3,
    rounds: int = 3,
    steps: int | None = None,
    timeout: float = 600,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times training steps of every backend, in turns.

    Args:
        pythons: For each backend the Python that has it. A backend that is
            not among them is a row that says how to install it.
        shapes: Sizes of networks and batches; with `model` those of batches.
        model: A `.keras` file to train instead.
        dtype: Of the products: `"float32"`, `"tf32"` or `"bfloat16"`.
            Default: what training takes, TF32 on a GPU.
        peers: Whether to time stock Keras, the same with this package's LSTM
            in it, and the framework's own loop too.
        processes: How often all is started anew. One process of a framework
            may be a fifth slower than the next, for all its life.
        rounds: Windows of each row in each process.
        steps: Training steps in a window. Default: 8, on a GPU 100.
        timeout: Seconds that a process may take for one of its tasks.
        tell: Hears what is being done.

    Returns:
        `schema`, `device`, `driver`, `dtype`, `model` (its file's name),
        `protocol` and `results`, a record for each shape, backend and peer;
        `rank` is 1 for the fastest of ours that passed the gate, None for
        what is not ranked.

    Raises:
        UserError: If no backend can be run at all, or what is given does
            not go together.
    """
    if not pythons:
        raise UserError(
            "A benchmark needs at least one backend and none is installed. "
            f"Install one: {devices.how_to_install('jax')}"
        )
    dtype = dtype or devices.usual_precision()
    _check_asked(shapes, model, dtype, peers=peers)
    for name, number in (
        ("processes", processes),
        ("rounds", rounds),
        ("steps", steps),
    ):
        if number is not None:
            check_whole(name, number, 1)
    ways: tuple[str, ...] = ("as_it_is", "accelerated") if model else ("ours",)
    if peers:
        ways += PEERS
    device, driver = devices.device_and_driver()
    rows_of = [
        [Row(backend, way) for way in ways for backend in BACKENDS]
        for _ in shapes
    ]
    for row in (row for rows in rows_of for row in rows):
        row.about["installed"] = row.backend in pythons
        if row.backend not in pythons:
            added = devices.how_to_add(row.backend)
            row.about["reason"] = f"not found; {added}"
    lengths = [shape.sequence_length for shape in shapes]
    for number in range(processes):
        with ExitStack() as closed_at_end:
            tell(f"processes, {number + 1} of {processes}")
            start = partial(
                _start,
                pythons=pythons,
                timeout=timeout,
                dtype=dtype,
                closed_at_end=closed_at_end,
                gpu=device if driver else None,
            )
            for same in zip(*rows_of, strict=True):
                start(same)
            if steps is None:
                started = [row for row in rows_of[0] if row.runs]
                steps = 100 if any(row.about["gpu"] for row in started) else 8
            for place, (shape, rows) in enumerate(
                zip(shapes, rows_of, strict=True)
            ):
                lengths[place] = _prepare(rows, shape, model, steps)
                _measure(rows, shape, rounds, steps, dtype, tell)
                for same in zip(*rows_of, strict=True):
                    if same[place].has_lost_its_process:
                        start(same[place + 1 :])
            for row in (row for rows in rows_of for row in rows):
                row.worker = None
    assert steps is not None
    results: list[dict[str, Any]] = []
    for shape, length, rows in zip(shapes, lengths, rows_of, strict=True):
        shape = dataclasses.replace(shape, sequence_length=length)
        results += _ranked(rows, shape, model, dtype, steps)
    return {
        "schema": BENCH_SCHEMA,
        "device": device,
        "driver": driver,
        "dtype": dtype,
        "model": model.name if model else None,
        "protocol": {
            "processors": devices.processors(),
            "processes": processes,
            "rounds": rounds,
            "steps_in_a_window": steps,
            "warm_up_windows": 1,
            "check_steps": CHECK_STEPS,
            "loss_tolerance": LOSS_TOLERANCE[dtype],
            "noise": NOISE,
            "order": "each round goes through all backends and peers, every "
            "second one backwards",
        },
        "results": results,
    }


def _ranked(
    rows: Sequence[Row],
    shape: Shape,
    model: Path | None,
    dtype: str,
    steps: int,
) -> list[dict[str, Any]]:
    """The records of one shape, judged and ranked."""
    if model:
        shape = dataclasses.replace(
            shape, name=model.name, units=(), tied=False
        )
    truth = None if model else _truth(rows, shape)
    records = [_record(row, shape, dtype, steps) for row in rows]
    judge(records, truth, dtype)
    rank(records)
    return records


def _check_asked(
    shapes: Sequence[Shape], model: Path | None, dtype: str, *, peers: bool
) -> None:
    if dtype not in LOSS_TOLERANCE:
        raise UserError(
            f"`dtype` must be one of {', '.join(LOSS_TOLERANCE)}; received "
            f"{dtype!r}."
        )
    if model and dtype == "bfloat16":
        raise UserError(
            "A model of one's own has the dtype that its file names; received "
            "dtype bfloat16. Save it with that policy and leave the dtype out."
        )
    if model and peers:
        raise UserError(
            "Peers are timed beside networks of this package; received peers "
            f"and the model {model}. Leave one of them out."
        )
    if not model and any(shape.tokens < 2 for shape in shapes):
        # Windows of one word come once more, and count as two steps.
        raise UserError(
            "A step needs two words or more; received a batch of one row of "
            "one word. Give a larger batch size or sequence length."
        )


def _start(
    same: Sequence[Row],
    *,
    pythons: Mapping[str, Path],
    timeout: float,
    dtype: str,
    closed_at_end: ExitStack,
    gpu: str | None,
) -> None:
    """Starts one process for the rows of one backend and way.

    One that does not see a GPU that is there would be timed on the processor.
    """
    running = [row for row in same if row.runs]
    if not running:
        return
    first = running[0]
    try:
        process = WorkerProcess(
            pythons[first.backend], first.backend, timeout=timeout
        )
        closed_at_end.enter_context(closing(process))
        answer = process.ask("start", precision=dtype)
        for row in running:  # the least exact of its processes counts
            before = row.about.get("product_error", 0.0)
            row.about |= answer
            row.about["product_error"] = max(answer["product_error"], before)
        if gpu and not answer["gpu"]:
            raise WorkerError(
                f"it does not see the {gpu}; what to install says: multilstm "
                "doctor"
            )
    except WorkerError as failure:
        for row in running:
            row.about["reason"] = str(failure)
        return
    for row in running:
        row.worker = process


def _prepare(
    rows: Sequence[Row], shape: Shape, model: Path | None, steps: int
) -> int:
    """Makes data and weights everywhere; gives the length of a row."""
    length = shape.sequence_length
    for row in rows:
        if model is None:
            row.ask("prepare", steps=steps, **dataclasses.asdict(shape))
            continue
        answer = row.ask(
            "prepare_model",
            path=str(model.absolute()),
            steps=steps,
            batch_size=shape.batch_size,
            sequence_length=shape.sequence_length,
        )
        if answer:
            row.about["is_random"] = answer["is_random"]
            length = answer["steps_in_a_row"]
    return length


def _measure(
    rows: Sequence[Row],
    shape: Shape,
    rounds: int,
    steps: int,
    dtype: str,
    tell: Callable[[str], None],
) -> None:
    """Builds every row, then times windows of all of them in turns."""
    for row in rows:
        if row.runs:
            tell(f"building {row.backend}, {row.variant}: {shape}")
        if answer := row.ask("build", variant=row.variant):
            row.compile_seconds.append(answer.pop("compile_time_seconds"))
            row.warm_up_seconds.append(answer["warm_up_seconds"])
            row.processes.append([])
            first = row.about.setdefault("losses", answer["losses"])
            if not row.about.get("is_random"):
                off = np.abs(np.subtract(answer["losses"], first)) / first[0]
                row.about["steady"] = bool(off.max() <= LOSS_TOLERANCE[dtype])
            row.about = answer | row.about  # the losses of the first process
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for row in rows if number % 2 == 0 else reversed(rows):
            if not row.runs:
                continue
            time.sleep(PAUSE_SECONDS)
            if answer := row.ask("time_window", variant=row.variant):
                row.processes[-1].append(1000 * answer["seconds"] / steps)
                if answer["joules"] is not None:
                    row.joules.append(answer["joules"])
    for row in rows:
        for name, megabytes in row.ask("peak_memory").items():
            known = row.about.get(name)
            row.about[name] = max(megabytes, known) if known else megabytes


def _truth(rows: Sequence[Row], shape: Shape) -> float | None:
    """`first_loss`, where a row has one to be held against it.

    Other shapes were measured too: what NumPy has no memory for loses these
    rows and no others.
    """
    running = [row for row in rows if row.runs]
    if not running:
        return None
    try:
        return first_loss(shape)
    except MemoryError as error:
        for row in running:
            row.about["reason"] = f"NumPy cannot check its first loss: {error}"
        return None


def _record(row: Row, shape: Shape, dtype: str, steps: int) -> dict[str, Any]:
    """What a result file says of a row."""
    record = {
        "backend": row.backend,
        "variant": row.variant,
        "shape": dataclasses.asdict(shape),
        "dtype": dtype,
        **row.about,
    }
    if not row.runs:
        return record
    windows = [ms for process in row.processes for ms in process]
    p20, median, p80 = np.percentile(windows, [20, 50, 80])
    joules = None
    if row.joules:
        tokens = len(row.joules) * steps * shape.tokens
        joules = round(1e6 * sum(row.joules) / tokens, 1)
    return record | {
        "compile_time_seconds": _compile_seconds(row, steps),
        "joules_per_million_tokens": joules,
        "step_time_ms": {
            "median": round(float(median), 4),
            "p20": round(float(p20), 4),
            "p80": round(float(p80), 4),
            "min": round(min(windows), 4),
        },
        "windows_ms": [
            [round(ms, 4) for ms in process] for process in row.processes
        ],
        "tokens_per_second": round(1000 * shape.tokens / float(median), 1),
    }


def _compile_seconds(row: Row, steps: int) -> float:
    """Up to the first step, and what the first window took over the others.

    Several steps at once are compiled as a program of their own.
    """
    seconds = [
        built + max(0.0, warm_up - steps * float(np.median(windows)) / 1000)
        for built, warm_up, windows in zip(
            row.compile_seconds, row.warm_up_seconds, row.processes, strict=True
        )
    ]
    return round(float(np.median(seconds)), 3)


def make_shapes(
    *,
    preset: str | None = None,
    batch_sizes: Sequence[int] = (),
    **sizes: Any,
) -> list[Shape]:
    """Shapes for `bench`: a preset's, or the tutorial's, with sizes changed.

    Args:
        preset: Name of a preset. Its dropout is left out: every backend
            draws other numbers for it, and losses would not be comparable.
        batch_sizes: One shape for each; default that of the preset.
        **sizes: `units`, `layers`, `embedding_dim`, `sequence_length`,
            `vocabulary_size`; None where the preset's is to stay.

    Raises:
        UserError: If there is no such preset, a size is not positive, or
            the sizes do not go together.
    """
    of = find_preset(preset or "tutorial")
    given = {name: size for name, size in sizes.items() if size is not None}
    of_batches = [("batch_size", number) for number in batch_sizes]
    for name, size in [*given.items(), *of_batches]:
        # One word alone has a loss of 0, which compares with nothing.
        least = 2 if name == "vocabulary_size" else 1
        check_whole(name, size, least)
    units = _units(of, given.get("units"), given.get("layers"))
    features = given.get("embedding_dim")
    if features is None:
        features = units[-1] if "units" in given else of.embedding_dim
    if of.tied_embeddings and features != units[-1]:
        raise UserError(
            f"The embeddings of {of.name} are tied: `embedding_dim` must be "
            f"the {units[-1]} units of its last layer; received {features}. "
            "Give both alike, or leave `embedding_dim` out."
        )
    return [
        Shape(
            name=of.name,
            units=units,
            embedding_dim=features,
            batch_size=batch_size,
            sequence_length=given.get("sequence_length", of.sequence_length),
            vocabulary_size=given.get("vocabulary_size", 10_000),
            tied=of.tied_embeddings,
        )
        for batch_size in batch_sizes or (of.batch_size,)
    ]


def _units(
    of: Preset, units: int | None, layers: int | None
) -> tuple[int, ...]:
    """The units of each layer: a preset's, or as many everywhere."""
    of_layers = of.units_of_layers
    if units is None and layers is not None:
        if len({*of_layers}) > 1:
            raise UserError(
                f"The layers of {of.name} differ: `layers` needs `units` "
                f"beside it; received `layers` {layers} alone. Give both, or "
                "neither."
            )
        units = of_layers[0]
    if units is None:
        return tuple(of_layers)
    return (units,) * (layers or len(of_layers))
