"""What is to be measured on a GPU, as far as the minutes go.

    python benchmarks/on_gpu.py --minutes 14 --out FOLDER \\
        --python torch=PATH --python jax=PATH --python tensorflow=PATH

In this order: `pytorch_650_tied`; `zaremba_medium`; `awd_adam`; recorded steps
of PyTorch, and layers that run at once; `adam_512` on each backend, for the
time to its perplexity; training steps of all backends; `best` and `awd` side by
side, at equal compute, for as many epochs as there is time. Next in a quarter
of an hour: `--only layers-at-once pytorch_650_tied-torch best-torch awd-torch`.
The corpus is Penn Treebank, from MULTILSTM_DATA or by download. What fails is
told and the rest goes on; logs and run folders are in FOLDER, and what is there
already is gone on from.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from multilstm.selection import parse_pythons

HERE = Path(__file__).parent
SECONDS_TO_STOP = 30  # for a checkpoint and the figures so far
SECONDS_AROUND = 40  # training, for imports and the test text


@dataclass(frozen=True)
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

    def training(preset: str, backend: str) -> Task:
        folder = out / f"{preset}-{backend}"
        command = (
            *(str(pythons[backend]), "-m", "multilstm", "train", "--resume"),
            *("--preset", preset, "--corpus", "ptb", "--out", str(folder)),
        )
        environment = {"KERAS_BACKEND": backend}
        return Task(folder.name, command, environment, takes_minutes=True)

    first = "torch" if "torch" in pythons else next(iter(pythons))
    for preset in ("pytorch_650_tied", "zaremba_medium", "awd_adam"):
        yield 420, [training(preset, first)]
    if "torch" in pythons:
        for name in ("recorded-steps", "layers-at-once"):
            script = HERE / f"{name.replace('-', '_')}.py"
            result = str(out / f"{name}.json")
            command = (str(pythons["torch"]), str(script), "--out", result)
            yield 90, [Task(name, command, {"KERAS_BACKEND": "torch"})]
    for backend in pythons:
        yield 150, [training("adam_512", backend)]
    named = [f"--python={name}={path}" for name, path in pythons.items()]
    command = (
        *(sys.executable, str(HERE / "lstm_step.py"), "--require-gpu", *named),
        *("--precision", "tf32", "--steps", "100", "--rounds", "3"),
        *("--variants", "ours", "native", "native_compiled"),
        *("--shapes", "tutorial", "zaremba_medium", "awd"),
        *("--out", str(out / "lstm-step.json")),
    )
    yield 300, [Task("lstm-step", command)]
    yield float("inf"), [training("best", first), training("awd", first)]


def run(group: Sequence[Task], seconds: float, out: Path) -> None:
    """Runs tasks side by side, asks what is left to stop, and tells of each."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as closed_at_end:
        running = [
            (task, start(task, seconds, out, closed_at_end), time.monotonic())
            for task in group
        ]
        for _, process, _ in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
        for _, process, _ in running:
            process.send_signal(signal.SIGTERM)  # one that has ended hears none
        for task, process, began in running:
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            took = time.monotonic() - began
            print(f"{task.name}: exit {process.returncode}, {took:.0f} s")
            print(f"    {last_line(out / f'{task.name}.log')}", flush=True)


def start(
    task: Task, seconds: float, out: Path, closed_at_end: contextlib.ExitStack
) -> "subprocess.Popen[bytes]":
    log = closed_at_end.enter_context((out / f"{task.name}.log").open("ab"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, required=True, help="for all together")
    add("--python", action="append", required=True, metavar="BACKEND=PATH")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--only", nargs="+", metavar="TASK", help="names of tasks")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for most, group in tasks(parse_pythons(options.python), options.out):
        wanted = [t for t in group if t.name in (options.only or [t.name])]
        left = end - time.monotonic() - SECONDS_TO_STOP
        if wanted and left > 0:
            run(wanted, min(most, left), options.out)
        for task in wanted if left <= 0 else ():
            print(f"{task.name}: no time left")


if __name__ == "__main__":
    main()
