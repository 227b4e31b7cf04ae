"""Several processes of one command, one for each device of this machine.

What PyTorch needs: its processes find each other by what `torchrun` sets in
their environment too. One that dies ends all. And what the launchers of all
frameworks tell a process of its place.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from multilstm.errors import UserError

_LAUNCHER = "MULTILSTM_LAUNCHER"
_TOLD = "MULTILSTM_TOLD"  # a folder with a file for each line that was told
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # which Windows has not
_HANGUP = getattr(signal, "SIGHUP", None)  # nor this
_PASSED_ON = [n for n in (signal.SIGINT, signal.SIGTERM, _HANGUP) if n]
_MOST_DEVICES = 64  # of one machine; `torchrun` starts several machines


def check_count(count: int) -> None:
    """Refuses numbers of devices that no machine has.

    Raises:
        UserError: As it says.
    """
    if not 1 <= count <= _MOST_DEVICES:
        raise UserError(
            f"`devices` must be from 1 to {_MOST_DEVICES}; received {count}."
        )


_VARIABLES = {  # how many there are, and which one this is
    "torch": ("WORLD_SIZE", "RANK"),
    "jax": (
        "KERAS_DISTRIBUTION_NUM_PROCESSES",
        "KERAS_DISTRIBUTION_PROCESS_ID",
    ),
}


def was_launched() -> bool:
    """Whether a launcher may have started this process as one of several."""
    names = [*sum(_VARIABLES.values(), ()), "TF_CONFIG"]
    return any(name in os.environ for name in names)


def place_among_processes(backend: str) -> tuple[int, int]:
    """The number of this process, and how many were started together.

    As `torchrun` tells, as `keras.distribution.initialize` reads it, and as
    TensorFlow does; `(0, 1)` for one that was started alone.

    Raises:
        UserError: If the environment does not tell that.
    """
    if backend == "tensorflow":
        return _place_in_cluster(os.environ.get("TF_CONFIG") or "{}")
    count, rank = _VARIABLES.get(backend, ("", ""))
    try:
        started = int(os.environ.get(count) or 1)
        return (int(os.environ[rank]), started) if started > 1 else (0, 1)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{count} and {rank} must both be numbers, or not be set; "
            f"received {error}."
        ) from error


def _place_in_cluster(text: str) -> tuple[int, int]:
    try:
        config = json.loads(text)
        tasks = {k: len(v) for k, v in config.get("cluster", {}).items()}
        if sum(tasks.values()) < 2:
            return 0, 1
        kind, rank = config["task"]["type"], int(config["task"]["index"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            "TF_CONFIG must be JSON with a cluster of workers and this task's "
            f"type and index, or not be set; received {error}: {text[:80]}."
        ) from error
    if kind != "worker" or set(tasks) != {"worker"}:
        raise UserError(
            "TF_CONFIG must have workers alone, the first of which writes; "
            f"received {', '.join(tasks)}, this one as {kind}."
        )
    return rank, tasks["worker"]


def was_orphaned() -> bool:
    """Whether `launch` started this process and is no more."""
    launcher = os.environ.get(_LAUNCHER)
    return launcher is not None and os.getppid() != int(launcher)


def tell_once(line: str) -> None:
    """Writes a line to stderr, unless another process of `launch` has.

    So what all find wrong is told once, and what one alone finds is told too.
    """
    told = os.environ.get(_TOLD)
    if told is not None:
        path = Path(told) / hashlib.sha256(line.encode()).hexdigest()
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # a line told twice is better than one that is lost
    print(line, file=sys.stderr)


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs `multilstm` with these arguments in so many processes.

    Ctrl-C and SIGTERM are passed on to them: each stops after its batch.

    Returns:
        The exit status of the first.

    Raises:
        UserError: If one died; the others were then ended.
    """
    check_count(count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "multilstm", *arguments]
    with (
        tempfile.TemporaryDirectory(prefix="multilstm-") as told,
        Processes() as processes,
    ):
        for rank in range(count):
            processes.start(
                command,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                WORLD_SIZE=str(count),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                **{_LAUNCHER: str(os.getpid()), _TOLD: told},
            )
        status = _wait(processes.running, processes.passed_on)
        if status and processes.passed_on and not any(Path(told).iterdir()):
            print("error: interrupted", file=sys.stderr)
        return status


class Processes:
    """Processes that get the Ctrl-C and SIGTERM that come to this one.

    Within the block; those that still run at its end are killed. The end of a
    terminal is SIGTERM to them.

    Args:
        with_groups: Whether signals go to all that a process has started:
            where it may be the wrapper of what is meant.
    """

    def __init__(self, *, with_groups: bool = False) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.passed_on: set[int] = set()
        self.with_groups = with_groups and os.name != "nt"  # which has none
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Processes":
        for number in _PASSED_ON:
            if number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # as `nohup` wants it
            with suppress(ValueError):  # not in the main thread
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self.running:
            self._send(process, _KILL)
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], **environment: str) -> None:
        """Starts one more.

        Raises:
            OSError: If it cannot be run.
        """
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            # Or a terminal would send it each Ctrl-C once more.
            start_new_session=True,
        )
        self.running.append(process)
        for number in [*self.passed_on]:  # while it was started
            self._send(process, number)

    def _pass_on(self, number: int, frame: object) -> None:
        number = signal.SIGTERM if number == _HANGUP else number
        self.passed_on.add(number)
        for process in self.running:
            self._send(process, number)

    def _send(self, process: subprocess.Popen[bytes], number: int) -> None:
        if os.name == "nt" and number == signal.SIGINT:
            return  # Windows tells all processes of a console
        if not self.with_groups:
            process.send_signal(number)
        elif process.poll() is None:
            # It may end just now, which macOS tells as a missing right.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], passed_on: Collection[int]
) -> int:
    """Until all have ended, or one was killed by a signal not passed on."""
    while True:
        ended = [process.poll() for process in processes]
        for rank, status in enumerate(ended):
            if status is not None and status < 0 and -status not in passed_on:
                name = signal.Signals(-status).name
                raise UserError(
                    f"All processes of a run must live; number {rank} of "
                    f"{len(processes)} was ended by {name}, and so the others. "
                    "Go on from the last checkpoint with --resume, on any "
                    "number of devices."
                )
        if any(status not in (None, 0) for status in ended):
            # It said why; the others may wait for it without end.
            deadline = time.monotonic() + 10
            for process in processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
            status = next(s for s in ended if s not in (None, 0))
            return max(status, 1)  # by a signal it is below 0
        if all(status == 0 for status in ended):
            return 0
        time.sleep(0.05)
