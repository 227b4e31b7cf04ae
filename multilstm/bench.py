"""Which backend trains fastest here: rounds of windows that take turns.

Every backend and every peer runs in a process of its own. All begin with the
same weights and see the same batches. What computes something else, by its
losses, is shown and not ranked; what fails is shown with its reason, and the
others go on.
"""

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from multilstm import devices, native_loops
from multilstm.benchmark import CHECK_STEPS, Shape, WorkerError
from multilstm.choices import (
    find_choice,
    save_choice,
    shape_class,
    why_stale,
)
from multilstm.errors import UserError
from multilstm.files import read_json
from multilstm.presets import Preset, find_preset
from multilstm.selection import BACKENDS, installed_versions
from multilstm.workers import WorkerProcess

BENCH_SCHEMA = "multilstm-bench-1"
DTYPES = ("float32", "tf32", "bfloat16")
PEERS = ("our_layer", "stock_competent", "native")

# Of a loss between two ways to compute the same, relative to the loss before
# the first step: later ones may fall to nothing. Seen on a CPU after five
# steps: 3e-6 in float32, 7e-4 in bfloat16, 3e-4 for a softmax, which Keras
# clips. A lost bias or a swapped gate changes it by 2e-3 or more. bfloat16
# rounds a logit by up to 2e-3 of it, which in a batch of few words does not
# average out: seen with two words, 1e-3 of the first loss.
LOSS_TOLERANCE = {"float32": 1e-3, "tf32": 1e-3, "bfloat16": 5e-3}
FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "tf32": 1e-3, "bfloat16": 5e-3}
# Of a product of 1024 rows. Seen: 2e-7 in float32; TF32 gives 3e-4.
PRODUCT_TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 1e-1}

# Differences below this are not told apart: as much a machine drifts from one
# run to the next, and nobody should change backends for less.
NOISE = 0.05
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
        `schema`, `device`, `driver`, `dtype`, `protocol` and `results`, a
        record for each shape, backend and peer; `rank` is 1 for the fastest
        of ours that passed the gate, None for what is not ranked.

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
        if model:
            shape = dataclasses.replace(
                shape, name=model.name, units=(), tied=False
            )
        truth = None if model else _truth(rows, shape)
        records = [_record(row, shape, dtype, steps) for row in rows]
        judge(records, truth, dtype)
        rank(records)
        results += records
    return {
        "schema": BENCH_SCHEMA,
        "device": device,
        "driver": driver,
        "dtype": dtype,
        "model": model.name if model else None,
        "protocol": {
            "processes": processes,
            "rounds": rounds,
            "steps_in_a_window": steps,
            "warm_up_windows": 1,
            "check_steps": CHECK_STEPS,
            "loss_tolerance": LOSS_TOLERANCE[dtype],
            "noise": NOISE,
            "order": "each round goes through all backends and peers",
        },
        "results": results,
    }


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
        for row in running:
            row.about |= answer
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
        for row in rows:
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


def judge(
    records: Sequence[dict[str, Any]], truth: float | None, dtype: str
) -> None:
    """Says of each record of one shape whether it computes what it should.

    Three things are looked at: the loss before the first step, against NumPy
    where there is a `truth`; the losses of the steps after it, against the
    median of all rows, or of two against each other (the layer alone, which
    shares what `ours` may do wrong, has no part in it); and a plain product,
    against float64.

    Args:
        records: Those of one shape. `agrees` is set, and `disagrees` to a
            line that says how it does not.
        truth: The loss before the first step, or None.
        dtype: Of the products.
    """
    running = [record for record in records if "reason" not in record]
    if not running:
        return
    losses = np.array([record["losses"] for record in running])
    if any(record.get("is_random") for record in running):
        losses = losses[:, :0]  # every backend drops other numbers
    finite = [np.isfinite(record["losses"]).all() for record in running]
    witnesses = [record["variant"] != "our_layer" for record in running]
    with np.errstate(invalid="ignore"):
        middle = np.nanmedian(losses[witnesses], axis=0)
        apart = np.abs(losses - middle) / middle[:1]
    if sum(witnesses) == 2:
        apart *= 2  # half of the way between them is the median
    for record, of_steps, is_finite in zip(running, apart, finite, strict=True):
        said = []
        if not is_finite:
            said.append("its losses are no numbers")
        if record.get("steady") is False:
            said.append("its losses differ from one process to the next")
        worst = float(of_steps.max()) if of_steps.size else 0.0
        allowed = LOSS_TOLERANCE[dtype]
        if not worst <= allowed:  # NaN too
            said.append(
                f"its losses are {worst:.1e} from those of the others "
                f"({allowed:g} allowed)"
            )
        if truth is not None:
            off = abs(record["losses"][0] / truth - 1)
            allowed = FIRST_LOSS_TOLERANCE[dtype]
            if not off <= allowed:
                said.append(
                    f"its first loss is {off:.1e} from NumPy's "
                    f"({allowed:g} allowed)"
                )
        allowed = PRODUCT_TOLERANCE[dtype]
        if not record["product_error"] <= allowed:
            said.append(
                f"its products are {record['product_error']:.1e} from exact "
                f"({allowed:g} allowed): not {dtype}"
            )
        record["agrees"] = not said
        record["disagrees"] = "; ".join(said) or None


def rank(records: Sequence[dict[str, Any]]) -> None:
    """Numbers those of ours that agree, by the time of a step.

    What is within the noise of the fastest shares its rank, the one that
    compiles fastest first; so does what comes after with its own fastest.
    """
    for record in records:
        record["rank"] = None
    ranked = [
        record
        for record in records
        if record.get("agrees")
        and record["variant"] not in (*PEERS, "stock_tutorial")
    ]
    ranked.sort(key=lambda record: record["step_time_ms"]["median"])
    place, leader = 0, None
    for number, record in enumerate(ranked, 1):
        if leader is None or not within_noise(record, leader):
            place, leader = number, record
        record["rank"] = place


def within_noise(record: Mapping[str, Any], leader: Mapping[str, Any]) -> bool:
    """Whether two rows of one run cannot be told apart.

    Compared are windows of the same round and processes that ran side by
    side, which saw the same machine: where the slower one was the faster in a
    fifth of the windows or a third of the processes, the next run may turn
    them round.
    """
    slower, faster = record["windows_ms"], leader["windows_ms"]
    of_windows = np.divide(np.concatenate(slower), np.concatenate(faster))
    of_processes = np.divide(
        [np.median(process) for process in slower],
        [np.median(process) for process in faster],
    )
    return bool(
        np.median(of_windows) <= 1 + NOISE
        or np.mean(of_windows <= 1) >= 1 / 5
        or np.mean(of_processes <= 1) >= 1 / 3
    )


def fastest(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the first rank, the one to take first."""
    first = [record for record in records if record["rank"] == 1]
    return sorted(first, key=lambda record: record["compile_time_seconds"])


def choose(result: dict[str, Any]) -> dict[str, Any]:
    """Picks the fastest backend of a benchmark of one shape, and keeps it.

    Args:
        result: What `bench` gave.

    Returns:
        What `make_choice` gives, and `path`, where it is kept.

    Raises:
        UserError: If no backend passed the gate.
    """
    choice = make_choice(result)
    return {**choice, "path": str(save_choice(choice))}


def make_choice(result: dict[str, Any]) -> dict[str, Any]:
    """Picks the fastest backend of a benchmark of one shape.

    Args:
        result: What `bench` gave.

    Returns:
        The choice: `backend`; `ranking`, those that passed the gate, fastest
        first; `equal_within_noise`, those that could not be told apart from
        the fastest; and what they were measured on.

    Raises:
        UserError: If no backend passed the gate.
    """
    ours = [r for r in result["results"] if r["variant"] == "ours"]
    equal = [record["backend"] for record in fastest(ours)]
    if not equal:
        reasons = "; ".join(
            f"{record['backend']}: "
            f"{record.get('reason') or record.get('disagrees')}"
            for record in ours
        )
        raise UserError(f"No backend can be chosen: {reasons}.")
    ranked = sorted(
        (record for record in ours if record["rank"]),
        key=lambda record: record["step_time_ms"]["median"],
    )
    others = [r["backend"] for r in ranked if r["backend"] not in equal]
    shape = ours[0]["shape"]
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "device": result["device"],
        "driver": result["driver"],
        "dtype": result["dtype"],
        "shape_class": shape_class(shape),
        "shape": shape,
        "shape_line": str(Shape(**shape)),
        "backend": equal[0],
        "ranking": equal + others,
        "equal_within_noise": equal if len(equal) > 1 else [],
        "tokens_per_second": {
            record["backend"]: record["tokens_per_second"] for record in ranked
        },
        "versions": {  # of all that were there, ranked or not
            record["backend"]: record.get("versions", {})
            for record in ours
            if record["installed"]
        },
    }


def choices_of(path: Path) -> list[dict[str, Any]]:
    """A choice for every shape of a result file that was made here.

    None is kept before all are known to be good.

    Raises:
        UserError: If the file is not a benchmark of this device and driver,
            or nothing in it passed the gate.
    """
    result = read_json(path, schema=BENCH_SCHEMA)
    here = devices.device_and_driver()
    made = result.get("device"), result.get("driver")
    if made != here:
        raise UserError(
            f"{path} must be of this device and driver, {here}; it is of "
            f"{made}. Measure here: multilstm choose"
        )
    try:
        of_shapes = by_shape(result["results"]).values()
        if not of_shapes or result["model"]:
            raise UserError(
                f"{path} must hold times of language models; it has none. "
                "Measure here: multilstm choose"
            )
        return [
            make_choice(result | {"results": records}) for records in of_shapes
        ]
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} must be whole, as bench wrote it; it is not ({error!r}). "
            "Measure here: multilstm choose"
        ) from error


def valid_choice(
    shape: Mapping[str, Any],
    dtype: str | None,
    pythons: Mapping[str, Path],
    *,
    timeout: float | None = None,
) -> tuple[dict[str, Any] | None, str]:
    """The choice kept for this very class of shapes, if it still holds.

    Args:
        shape: Sizes.
        dtype: Of the products; None is what training takes.
        pythons: For each backend the Python that has it: a choice among
            others does not hold.
        timeout: Seconds that a Python may take to say what it has.

    Returns:
        The choice and an empty string, or None and why there is none.
    """
    device, driver = devices.device_and_driver()
    choice = find_choice(device, dtype, shape)
    if choice is None or choice["shape_class"] != shape_class(shape):
        return None, "nothing chosen yet for this device and shape"
    if set(choice["versions"]) != set(pythons):
        return None, "the last choice was among other backends"
    for backend, python in pythons.items():
        if not choice["versions"][backend]:  # it could not even start
            continue
        try:
            versions = _versions_in(python, backend, timeout=timeout)
        except WorkerError as failure:
            return None, f"{backend} is not as it was: {failure}"
        stale = why_stale(choice, backend, driver, versions)
        if stale:
            return None, f"the last choice is stale: {stale}"
    return choice, ""


def _versions_in(
    python: Path, backend: str, *, timeout: float | None = None
) -> dict[str, str]:
    """`installed_versions` of another Python.

    Raises:
        WorkerError: If it does not tell them.
    """
    if python == Path(sys.executable):
        return installed_versions(backend)
    with closing(WorkerProcess(python, backend, timeout=timeout)) as worker:
        answer = worker.ask("versions", backend=backend)
    versions: dict[str, str] = answer["versions"]
    return versions


def by_shape(
    results: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Records under the line that describes their shape, in order."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for record in results:
        title = str(Shape(**record["shape"]))
        shapes.setdefault(title, []).append(record)
    return shapes


def first_loss(shape: Shape) -> float:
    """The loss of the weights that all begin with, by NumPy in float64."""
    weights = [w.astype(float) for w in native_loops.draw_weights(shape)]
    embeddings, lstms, kernel, bias = native_loops.split_weights(shape, weights)
    inputs, targets = first_batch(shape)
    x = embeddings[inputs.T]  # (time, batch, features)
    for layer in lstms:
        x = _lstm(x, *layer)
    total = 0.0
    for features, words in zip(x, targets.T, strict=True):
        logits = features @ (embeddings.T if kernel is None else kernel) + bias
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, words[:, None], -1)[:, 0]
        total += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
    return total / shape.tokens


def first_batch(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and targets that losses are checked on, `(batch, time)`."""
    ids = native_loops.draw_token_ids(shape, steps=1)
    starts = np.arange(shape.batch_size)[:, None] * shape.sequence_length
    places = starts + np.arange(shape.sequence_length)
    return ids[places], ids[places + 1]


def _lstm(
    x: np.ndarray, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    h = c = np.zeros((x.shape[1], len(recurrent)))
    outputs = []
    for projected in x @ kernel + bias:
        i, f, g, o = np.split(projected + h @ recurrent, 4, -1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)


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
        if size < least:
            raise UserError(
                f"`{name}` must be a whole number from {least} on; received "
                f"{size}."
            )
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
