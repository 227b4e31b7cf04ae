"""Which backend: chosen before Keras is imported, or compared side by side.

Each backend runs in a process of its own, since Keras takes one for good when
it is imported. So nothing here imports Keras.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multilstm.errors import UserError
from multilstm.files import read_or_explain, write_json

BACKENDS = ("jax", "torch", "tensorflow")
COMPARISON_SCHEMA = "multilstm-comparison-1"


def is_installed(backend: str) -> bool:
    """Whether this Python has the framework, without importing it."""
    return importlib.util.find_spec(backend) is not None


def select_backend(asked: str | None = None) -> tuple[str, str]:
    """Takes a backend for this process and sets `KERAS_BACKEND` to it.

    In this order: the one asked for, `KERAS_BACKEND`, Keras's own
    `keras.json` where it names one that is installed, the first of jax,
    torch, tensorflow that is installed.

    Args:
        asked: What `--backend` said.

    Returns:
        The backend, and why it was taken.

    Raises:
        UserError: If it is unknown or not installed, if none is, or if
            `keras.json` is broken.
    """
    backend, reason = _first_named(asked)
    if backend not in BACKENDS:
        raise UserError(
            f"A backend is one of {', '.join(BACKENDS)}; {reason} says "
            f"{backend!r}. Change it there."
        )
    if not is_installed(backend):
        raise UserError(
            f"{reason} names {backend}, which is not installed. Install it "
            f"with: pip install 'multilstm[{backend}]'"
        )
    os.environ["KERAS_BACKEND"] = backend
    # TensorFlow's start-up messages; a user's own level is left alone.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return backend, reason


def _first_named(asked: str | None) -> tuple[str, str]:
    if asked:
        return asked, "--backend"
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "KERAS_BACKEND"
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    path = home / "keras.json"
    if path.exists():
        try:
            named = json.loads(path.read_bytes()).get("backend")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path} must be a JSON object; it is not: {error}. Mend or "
                "remove it, or name a backend with --backend."
            ) from error
        # Keras writes this file itself, with the default "tensorflow".
        if named and (named not in BACKENDS or is_installed(named)):
            return named, str(path)
    for backend in BACKENDS:
        if is_installed(backend):
            return backend, f"the first installed of {', '.join(BACKENDS)}"
    raise UserError(
        "Keras needs a backend and none is installed. Install one with: pip "
        "install 'multilstm[jax]' (or multilstm[torch], "
        "multilstm[tensorflow])."
    )


def parse_pythons(pythons: Sequence[str]) -> dict[str, Path]:
    """Reads `backend=path-to-python` pairs; by default this Python for all.

    Raises:
        UserError: If a pair is not of that form or has no such file.
    """
    if not pythons:
        here = Path(sys.executable)
        return {name: here for name in BACKENDS if is_installed(name)}
    parsed = {}
    for pair in pythons:
        backend, _, path = pair.partition("=")
        known = backend in BACKENDS and Path(path).is_file()
        if not known or backend in parsed:
            raise UserError(
                "--python needs BACKEND=PATH, each backend of "
                f"{', '.join(BACKENDS)} at most once and the Python that has "
                f"it; received {pair!r}."
            )
        # A bare name would be looked for in PATH; links lead out of a venv.
        parsed[backend] = Path(path).absolute()
    return parsed


def compare(
    pythons: Mapping[str, Path],
    train_arguments: Sequence[str],
    *,
    out: Path,
) -> dict[str, Any]:
    """Trains one preset from the same weights on several backends.

    Args:
        pythons: For each backend the Python that has it.
        train_arguments: Of `multilstm train`, but for `--backend`, `--out`.
        out: Folder for the runs and `comparison.json`. A run that is there
            is gone on with.

    Returns:
        `results`: for each backend the result record, or `{"error": ...}`
        where it failed; `same_initial_weights`, whether those that did not
        fail began alike; and `largest_difference`, of the validation
        perplexities of one epoch between two backends, relative to the lower.

    Raises:
        UserError: If there is no backend to run.
    """
    if not pythons:
        raise UserError(
            "A comparison needs at least one backend and none is installed. "
            "Install some, or name environments with --python BACKEND=PATH."
        )
    results: dict[str, Any] = {}
    for backend, python in pythons.items():
        run = out / backend
        command = [
            *(str(python), "-m", "multilstm", "train", *train_arguments),
            *("--backend", backend, "--out", str(run), "--resume"),
        ]
        results[backend] = _run(command, run / "result.json")
    done = [r for r in results.values() if "error" not in r]
    comparison = {
        "schema": COMPARISON_SCHEMA,
        "results": results,
        "same_initial_weights": (
            len({r["initial_weights_sha256"] for r in done}) <= 1
        ),
        "largest_difference": largest_difference([r["history"] for r in done]),
    }
    write_json(out / "comparison.json", comparison)
    return comparison


def _run(command: Sequence[str], result: Path) -> dict[str, Any]:
    """Runs a command; the record that it wrote, or why there is none."""
    try:
        process = subprocess.Popen(command)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it heard Ctrl-C too, and saves what it has
            raise
        if status != 0:
            return {"error": f"ended with status {status}"}
        record: dict[str, Any] = read_or_explain(
            result, lambda: json.loads(result.read_bytes())
        )
    except (OSError, UserError) as error:
        return {"error": str(error)}
    return record


def largest_difference(
    histories: Sequence[Sequence[Mapping[str, float]]],
) -> float | None:
    """How far validation perplexities of one epoch are apart, at most.

    >>> one, other = [{"valid_perplexity": 100}], [{"valid_perplexity": 102}]
    >>> largest_difference([one, other])
    0.02
    """
    if len(histories) < 2:
        return None
    apart = []
    for rows in zip(*histories, strict=False):
        values = [row["valid_perplexity"] for row in rows]
        apart.append(max(values) / min(values) - 1)
    return round(max(apart), 6) if apart else None
