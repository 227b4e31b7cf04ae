"""Processes that hold one framework each, asked through pipes.

A process may be missing, fail, be killed or hang: each gives a `WorkerError`
with one line, and harms no other process.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from multilstm.benchmark import WorkerError

# Where this package is, to be found from a clone that is not installed.
ROOT = Path(__file__).parents[1]


class WorkerProcess:
    """A `benchmark.Worker` in a process of its own.

    Args:
        python: The Python that has the backend.
        backend: Its name.
        timeout: Seconds that an answer may take.
        program: What that Python runs. No file of the folder one is in is
            taken for a module.
    """

    def __init__(
        self,
        python: str | Path,
        backend: str,
        *,
        timeout: float | None = None,
        program: tuple[str, ...] = ("-P", "-m", "multilstm.benchmark"),
    ) -> None:
        self.timeout = timeout
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (see `close`)
        self.answers: queue.Queue[str] = queue.Queue()
        try:
            self.process = subprocess.Popen(
                [str(python), *program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                errors="replace",
                env=_environment(backend),
                # So that it can be killed with what it starts.
                start_new_session=True,
            )
        except OSError as error:
            self.errors.close()
            raise WorkerError(f"{python} cannot be run: {error}") from error
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Calls a method of the worker and waits for what it gives.

        Raises:
            WorkerError: If the worker says so, has ended or does not answer.
        """
        assert self.process.stdin is not None
        question = json.dumps([method, arguments])
        try:
            print(question, file=self.process.stdin, flush=True)
        except (BrokenPipeError, ValueError):  # it has ended, is closed
            raise WorkerError(self._say_how_it_ended()) from None
        try:
            line = self.answers.get(timeout=self.timeout)
        except queue.Empty:
            self._end()
            raise WorkerError(
                f"no answer to {method!r} within {self.timeout:g} s; it was "
                "stopped. Give more time with --timeout."
            ) from None
        except KeyboardInterrupt:  # which it does not hear in its session
            self._end()
            raise
        if not line:
            raise WorkerError(self._say_how_it_ended())
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._end()
            raise WorkerError(
                f"what it answered is no JSON object: {line.strip()[:80]!r}"
            )
        if "failure" in answer:
            raise WorkerError(answer["failure"])
        return answer

    def _say_how_it_ended(self) -> str:
        status = self._end(patience=10)
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", perhaps for memory" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint}"
        said = self.last_line()
        return f"its process ended with status {status}" + (
            f": {said}" if said else ""
        )

    def _end(self, patience: float = 0) -> int:
        """Ends the process after so many seconds, with all that it started.

        What a wrapper leaves behind would hold the pipes. Gives its status.
        """
        if self.process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
            _kill_group(self.process)
        return self.process.wait()

    def last_line(self) -> str:
        """The last line that the process wrote to its stderr."""
        if self.errors.closed:
            return ""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        written = [line.strip() for line in lines if line.strip()]
        return written[-1][:300] if written else ""

    def close(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._end(patience=10)
        self.listener.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


def _kill_group(process: subprocess.Popen[str]) -> None:
    if os.name == "nt":  # which has no groups
        process.kill()
        return
    # No such group, or on macOS no right to it: all have ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(backend: str) -> dict[str, str]:
    """That of a process which finds this package wherever it is started.

    Not by a `site-packages`: it holds all of this environment.
    """
    environment = os.environ | {"KERAS_BACKEND": backend}
    if ROOT.name not in ("site-packages", "dist-packages"):
        known = environment.get("PYTHONPATH")
        paths = [str(ROOT), known] if known else [str(ROOT)]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
