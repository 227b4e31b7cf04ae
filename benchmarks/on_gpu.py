"""What is to be measured on a GPU, as far as the minutes go.

    python benchmarks/on_gpu.py --minutes 12 --out FOLDER \\
        --python torch=PATH --python jax=PATH --python tensorflow=PATH

In this order: training steps of all backends, with PyTorch's LSTM in Triton;
`adam_512` on each backend, for the time to its perplexity; PyTorch's LSTM
layers by cuDNN and in Triton; `adam_512` under Python's profiler;
`zaremba_medium`, `awd_adam`, `pytorch_650_tied`, `zaremba_large` and
`press_wolf_large`, each of these two in a command of its own; recorded steps of
PyTorch; `best` and `awd` side by side, at equal compute, for as many epochs as
there is time. Next: `--only lstm-step adam_512-tensorflow adam_512-torch
recurrence`, in nine minutes, of which the last gets what the others leave (its
file grows by rows): what must not be lost belongs into one command. The corpus
is Penn Treebank, from MULTILSTM_DATA or by download, and looked for first.
Every Python has multilstm in it, this one too (or PYTHONPATH leads there). What
fails is told and the rest goes on; logs and run folders are in FOLDER, and what
is there already is gone on from.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from multilstm.selection import parse_pythons

HERE = Path(__file__).parent
SECONDS_TO_STOP = 30  # for a checkpoint and the figures so far
SECONDS_AROUND = 60  # training, for imports and the test text


@dataclass(frozen=True, eq=False)
class Task:
    """A command, and in which file of the folder its output goes.

    One that takes `--minutes` ends in time by itself, with its figures.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    takes_minutes: bool = False


def tasks(
    pythons: dict[str, Path], out: Path
) -> Iterator[tuple[float, list[Task]]]:
    """Groups of tasks that run side by side, and the most seconds for each."""

    def training(
        preset: str, backend: str, *, epochs: int | None = None
    ) -> Task:
        name = f"{preset}-{backend}"
        if epochs:
            name += f"-{epochs}-epochs"
        folder = out / name
        command = (
            *(str(pythons[backend]), "-m", "multilstm", "train", "--resume"),
            *("--preset", preset, "--corpus", "ptb", "--out", str(folder)),
        )
        if epochs:
            command += ("--epochs", str(epochs))
        return Task(
            name, command, {"KERAS_BACKEND": backend}, takes_minutes=True
        )

    first = "torch" if "torch" in pythons else next(iter(pythons))

    def of_torch(name: str, script: str) -> Task:
        command = (str(pythons["torch"]), str(HERE / script))
        where = ("--out", str(out / f"{name}.json"))
        return Task(name, (*command, *where), {"KERAS_BACKEND": "torch"})

    named = [f"--python={name}={path}" for name, path in pythons.items()]
    command = (
        *(str(pythons[first]), str(HERE / "lstm_step.py"), "--require-gpu"),
        *(*named, "--timeout", "100"),
        *("--precision", "tf32", "--steps", "100", "--rounds", "3"),
        *("--variants", "ours", "native", "native_compiled"),
        *("--shapes", "tutorial", "zaremba_medium", "awd"),
        *("--out", str(out / "lstm-step.json")),
    )
    yield 300, [Task("lstm-step", command)]
    for backend in reversed(pythons):
        yield 180, [training("adam_512", backend)]
    if "torch" in pythons:
        yield 180, [of_torch("recurrence", "recurrence.py")]
        # What takes the time between epochs, which on a GPU are short.
        epochs = training("adam_512", "torch", epochs=4)
        profiler = ("-m", "cProfile", "-o", str(out / "between-epochs.prof"))
        python, *rest = epochs.command
        command = (python, *profiler, *rest)
        yield 90, [replace(epochs, name="between-epochs", command=command)]
    for preset in ("zaremba_medium", "awd_adam", "pytorch_650_tied"):
        yield 280, [training(preset, first)]
    for preset in ("zaremba_large", "press_wolf_large"):
        yield 600, [training(preset, first)]
    if "torch" in pythons:
        yield 90, [of_torch("recorded-steps", "recorded_steps.py")]
    yield float("inf"), [training("best", first), training("awd", first)]


def run(group: Sequence[Task], seconds: float, out: Path) -> None:
    """Runs tasks side by side, asks what is left to stop, and tells of each."""
    began = time.monotonic()
    running = {}
    with contextlib.ExitStack() as closed_at_end:
        try:
            for task in group:
                running[task] = start(task, seconds, out, closed_at_end)
            wait(running, began, began + seconds, out)
        finally:  # also where this process is told to stop
            for process in running.values():
                process.send_signal(signal.SIGTERM)  # not heard by the dead
            wait(running, began, time.monotonic() + SECONDS_TO_STOP, out)
            for process in running.values():
                process.kill()
            wait(running, began, time.monotonic() + SECONDS_TO_STOP, out)


def wait(
    running: "dict[Task, subprocess.Popen[bytes]]",
    began: float,
    deadline: float,
    out: Path,
) -> None:
    """Tells of each task that ends until then, and takes it out."""
    while running and time.monotonic() < deadline:
        for task, process in [*running.items()]:
            if process.poll() is None:
                continue
            took = time.monotonic() - began
            print(f"{task.name}: exit {process.returncode}, {took:.0f} s")
            print(f"    {last_line(out / f'{task.name}.log')}", flush=True)
            del running[task]
        time.sleep(0.1)


def start(
    task: Task, seconds: float, out: Path, closed_at_end: contextlib.ExitStack
) -> "subprocess.Popen[bytes]":
    log = closed_at_end.enter_context((out / f"{task.name}.log").open("ab"))
    # So that the last line is never that of a command before.
    log.write(f"$ {shlex.join(task.command)}\n".encode())
    log.flush()
    minutes = f"{max(1.0, seconds - SECONDS_AROUND) / 60:.3f}"
    limit = ("--minutes", minutes) if task.takes_minutes else ()
    return subprocess.Popen(
        (*task.command, *limit),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | task.environment,
    )


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    said = [line for line in lines if line.strip()]
    return said[-1][:200] if said else "said nothing"


def check_corpus(python: Path) -> None:
    """Looks for Penn Treebank before minutes go by that do not need it."""
    command = (str(python), "-m", "multilstm", "corpus", "ptb")
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"Penn Treebank is needed: {found.stderr.strip()[-300:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, required=True, help="for all together")
    add("--python", action="append", required=True, metavar="BACKEND=PATH")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--only", nargs="+", metavar="TASK", help="names of tasks")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which stops tasks
    end = time.monotonic() + 60 * options.minutes
    pythons = parse_pythons(options.python)
    groups = [*tasks(pythons, options.out)]
    names = [task.name for _, group in groups for task in group]
    only = options.only or names
    if not {*only} <= {*names}:
        parser.error(f"--only takes {', '.join(names)}; received {only}")
    groups = [
        (most, [task for task in group if task.name in only])
        for most, group in groups
    ]
    if any(task.takes_minutes for _, group in groups for task in group):
        check_corpus(next(iter(pythons.values())))
    for most, wanted in groups:
        left = end - time.monotonic() - SECONDS_TO_STOP
        if wanted and left > 0:
            run(wanted, min(most, left), options.out)
        for task in wanted if left <= 0 else ():
            print(f"{task.name}: no time left")


if __name__ == "__main__":
    main()
