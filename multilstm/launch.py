"""Several processes of one command, one for each device of this machine.

What PyTorch needs: its processes find each other by what `torchrun` sets in
their environment too. One that dies ends all.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from multilstm.errors import UserError

_LAUNCHER = "MULTILSTM_LAUNCHER"
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


def was_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return _rank() is not None


def is_first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not _rank()


def _rank() -> int | None:
    """The number of this process; None where it was started alone.

    As `torchrun` has it, as `keras.distribution.initialize` reads it, and as
    TensorFlow does.
    """
    for name in ("RANK", "KERAS_DISTRIBUTION_PROCESS_ID"):
        if name in os.environ:
            return int(os.environ[name])
    task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task")
    return int(task["index"]) if task else None


def was_orphaned() -> bool:
    """Whether `launch` started this process and is no more."""
    launcher = os.environ.get(_LAUNCHER)
    return launcher is not None and os.getppid() != int(launcher)


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
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    before = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for rank in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "multilstm", *arguments],
                env=os.environ
                | {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "WORLD_SIZE": str(count),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    _LAUNCHER: str(os.getpid()),
                },
                # Or a terminal would send them each Ctrl-C once more.
                start_new_session=True,
            )
            processes.append(process)
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one was killed by a signal."""
    while True:
        ended = [process.poll() for process in processes]
        for rank, status in enumerate(ended):
            if status is not None and status < 0:
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
            return next(s for s in ended if s not in (None, 0))
        if all(status == 0 for status in ended):
            return 0
        time.sleep(0.05)
