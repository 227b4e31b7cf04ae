"""Which backend: chosen before Keras is imported, or compared side by side.

Each backend runs in a process of its own, since Keras takes one for good when
it is imported. So nothing here imports Keras.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from multilstm import __version__
from multilstm.choices import (
    find_choice,
    find_choices,
    shape_class,
    why_stale,
)
from multilstm.devices import device_and_driver, how_to_install
from multilstm.errors import UserError
from multilstm.files import read_or_explain, write_json
from multilstm.launch import Processes
from multilstm.presets import MEASURED, PRESETS

BackendName = Literal["jax", "torch", "tensorflow"]
BACKENDS = get_args(BackendName)
COMPARISON_SCHEMA = "multilstm-comparison-2"


def is_installed(backend: str) -> bool:
    """Whether this Python has the framework, without importing it."""
    spec = importlib.util.find_spec(backend)
    # A folder of that name, in the folder one is in, has no origin.
    return spec is not None and spec.origin is not None


def installed_versions(backend: str) -> dict[str, str]:
    """Versions of what decides a backend's speed, without importing it."""
    distributions = {"tensorflow": ("tensorflow", "tensorflow-cpu")}
    names = distributions.get(backend, (backend,))
    found = {"multilstm": __version__}  # which need not be installed
    for name in ("keras", "numpy"):
        found[name] = importlib.metadata.version(name)
    for name in names:
        try:
            found[backend] = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def select_backend(
    asked: str | None = None,
    shape: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> tuple[str, str]:
    """Takes a backend for this process and sets `KERAS_BACKEND` to it.

    In this order: the one asked for, `KERAS_BACKEND`, the one that
    `multilstm choose` found fastest on this device with these versions,
    Keras's own `keras.json` where it names one that is installed, the first
    of jax, torch, tensorflow that is installed.

    Args:
        asked: What `--backend` said.
        shape: Sizes of what is to be trained, named as those of a
            `benchmark.Shape`, for which a choice was made.
        dtype: Of its products, likewise. Default: what training takes.

    Returns:
        The backend, and why it was taken.

    Raises:
        UserError: If it is unknown or not installed, if none is, or if
            `keras.json` is broken.
    """
    backend, reason = _first_named(asked, shape, dtype)
    if backend not in BACKENDS:
        raise UserError(
            f"A backend is one of {', '.join(BACKENDS)}; {reason} says "
            f"{backend!r}. Change it there."
        )
    if not is_installed(backend):
        raise UserError(
            f"{reason} names {backend}, which is not installed here. Give the "
            "command in an environment that has it, or install it: "
            f"{how_to_install(backend)}"
        )
    os.environ["KERAS_BACKEND"] = backend
    # TensorFlow's start-up messages; a user's own level is left alone.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return backend, reason


def _first_named(
    asked: str | None, shape: Mapping[str, Any] | None, dtype: str | None
) -> tuple[str, str]:
    if asked:
        return asked, "--backend"
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "KERAS_BACKEND"
    chosen, said = chosen_backend(shape, dtype)
    if chosen:
        return chosen, said
    backend, reason = _named_by_keras_or_installed()
    return backend, f"{reason}; {said}" if said else reason


def chosen_backend(
    shape: Mapping[str, Any] | None, dtype: str | None
) -> tuple[str | None, str]:
    """The backend of the nearest choice kept for a shape that holds.

    And what it is; or None, and why the nearest does not hold here.
    """
    device, driver = device_and_driver()
    why_not = ""
    for choice in find_choices(device, dtype, shape):
        here = [name for name in choice["ranking"] if is_installed(name)]
        if not here:
            continue
        backend = here[0]
        stale = why_stale(choice, backend, driver, installed_versions(backend))
        if stale:
            why_not = why_not or (
                f"the choice of {choice['backend']} is stale, {stale}: run "
                "multilstm choose"
            )
            continue
        said = (
            f"multilstm choose, {choice['made'][:10]}, on "
            f"{choice['shape_line']}"
        )
        if backend != choice["backend"]:
            said += (
                f"; {choice['backend']} was faster and is not installed here"
            )
        return backend, said
    return None, why_not


def keras_json() -> Path:
    """Where Keras keeps its own default, by its own rule."""
    if home := os.environ.get("KERAS_HOME"):
        return Path(home) / "keras.json"
    of_user = os.path.expanduser("~")  # noqa: PTH111 (it needs no user)
    base = of_user if os.access(of_user, os.W_OK) else "/tmp"
    return Path(base) / ".keras" / "keras.json"


def write_keras_json(backend: str) -> Path:
    """Makes a backend Keras's own default; other settings there stay.

    Raises:
        UserError: If the file is there and is not a JSON object.
    """
    path = keras_json()
    settings = _read_keras_json(path) if path.exists() else {}
    write_json(path, {**settings, "backend": backend})
    return path


def _read_keras_json(path: Path) -> dict[str, Any]:
    content = read_or_explain(path, path.read_bytes)
    try:
        settings = json.loads(content)
        if not isinstance(settings, dict):
            raise ValueError(f"it is {type(settings).__name__}")
    except ValueError as error:
        raise UserError(
            f"{path} must be a JSON object; it is not: {error}. Mend or "
            "remove it, or name a backend with --backend."
        ) from error
    return settings


def _named_by_keras_or_installed() -> tuple[str, str]:
    path = keras_json()
    if path.exists():
        named = _read_keras_json(path).get("backend")
        # Keras writes this file itself, with the default "tensorflow".
        if named and (named not in BACKENDS or is_installed(named)):
            return named, str(path)
    for backend in BACKENDS:
        if is_installed(backend):
            return backend, f"the first installed of {', '.join(BACKENDS)}"
    raise UserError(
        "Keras needs a backend and none is installed. Install one of: "
        f"{'; '.join(map(how_to_install, BACKENDS))}"
    )


def describe_presets(
    vocabulary_size: int = 10_000, num_tokens: int = 929_589
) -> list[dict[str, Any]]:
    """What is known of each preset, and the time that it would take here.

    Args:
        vocabulary_size: Words of the vocabulary.
        num_tokens: Words of the training text; by default of Penn Treebank.

    Returns:
        For each preset its name, `source`, `parameters`, `epochs`, published
        and measured perplexities, and `seconds` of training by the backend
        that `multilstm choose` found fastest on this device: from its tokens
        a second on the nearest shape, in proportion to the weights that a
        word is multiplied by. None where nothing was measured here.
        `is_measured_shape` tells whether the shape is of the same class.
    """
    device, _ = device_and_driver()
    rows = []
    for preset in PRESETS.values():
        shape = preset.shape(vocabulary_size)
        row: dict[str, Any] = {
            "preset": preset.name,
            "source": preset.source,
            "parameters": preset.num_parameters(vocabulary_size),
            "epochs": preset.epochs,
            "published_valid": preset.published_valid,
            "published_test": preset.published_test,
            "measured": [asdict(m) for m in MEASURED.get(preset.name, ())],
            **dict.fromkeys(("backend", "seconds", "is_measured_shape")),
        }
        choice = find_choice(device, shape=shape)
        if choice is not None:
            timed = choice["shape"]
            like = replace(
                preset,
                units=timed["units"],
                num_layers=len(timed["units"]),
                embedding_dim=timed["embedding_dim"],
                tied_embeddings=timed["tied"],
            )
            backend = choice["backend"]
            seconds = (
                preset.epochs
                * num_tokens
                / choice["tokens_per_second"][backend]
                * preset.num_products(vocabulary_size)
                / like.num_products(timed["vocabulary_size"])
            )
            row |= {
                "backend": backend,
                "seconds": round(seconds, 1),
                "is_measured_shape": (
                    choice["shape_class"] == shape_class(shape)
                ),
            }
        rows.append(row)
    return rows


def find_pythons() -> dict[str, Path]:
    """For each backend a Python that has it: this one, or one of nox.

    The environments of nox are looked for in the folder one is in.
    """
    pythons = parse_pythons(())
    for backend in BACKENDS:
        for kind in ("train", "test"):
            for name in ("bin/python", "Scripts/python.exe"):
                path = Path(".nox") / f"{kind}-{backend}" / name
                if path.exists():
                    pythons.setdefault(backend, path.absolute())
    return pythons


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
    until_perplexity: float | None = None,
    tolerance: float = 0.03,
) -> dict[str, Any]:
    """Trains one preset from the same weights on several backends.

    Args:
        pythons: For each backend the Python that has it.
        train_arguments: Of `multilstm train`, but for `--backend`, `--out`.
        out: Folder for the runs and `comparison.json`. A run that is there
            is gone on with.
        until_perplexity: What to tell the time to. Default: the validation
            perplexity that the last of them reached.
        tolerance: Of `largest_difference`. Rounding grows as a model learns:
            ten runs of an epoch of `zaremba_small` that differed in rounding
            alone, four of them of one backend, were up to 2.5 % apart.

    Returns:
        `results`: for each backend the result record, or `{"error": ...}`
        where it failed; `same_initial_weights`, whether those that did not
        fail began alike; `largest_difference`, of the validation
        perplexities of one epoch between two backends, relative to the lower;
        `agree`, whether that is within the tolerance (None for one backend
        alone); and `seconds_to_target`, of training until an epoch whose
        validation perplexity was `target_perplexity` or less, or None.

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
    histories = [record["history"] for record in done]
    apart = largest_difference(histories)
    target = until_perplexity
    if target is None and all(histories) and histories:
        target = max(_best(history) for history in histories)
    comparison = {
        "schema": COMPARISON_SCHEMA,
        "results": results,
        "same_initial_weights": (
            len({r["initial_weights_sha256"] for r in done}) <= 1
        ),
        "largest_difference": apart,
        "tolerance": tolerance,
        "agree": None if apart is None else apart <= tolerance,
        "target_perplexity": target,
        "seconds_to_target": {
            record["backend"]: seconds_to(target, record["history"])
            for record in done
            if target is not None
        },
    }
    write_json(out / "comparison.json", comparison)
    return comparison


def _run(command: Sequence[str], result: Path) -> dict[str, Any]:
    """Runs a command; the record that it wrote, or why there is none."""
    with Processes(with_groups=True) as processes:
        try:
            processes.start(command)
        except OSError as error:
            return {"error": str(error)}
        status = processes.running[0].wait()
    if processes.passed_on:
        raise KeyboardInterrupt
    if status != 0:
        return {"error": f"ended with status {status}"}
    try:
        record: dict[str, Any] = read_or_explain(
            result, lambda: json.loads(result.read_bytes())
        )
    except UserError as error:
        return {"error": str(error)}
    return record


def _best(history: Sequence[Mapping[str, float]]) -> float:
    return min(row["valid_perplexity"] for row in history)


def seconds_to(
    perplexity: float, history: Sequence[Mapping[str, float]]
) -> float | None:
    """Seconds of training until an epoch with that perplexity or less.

    >>> epochs = [{"valid_perplexity": 300, "seconds": 10.0},
    ...           {"valid_perplexity": 200, "seconds": 12.0}]
    >>> seconds_to(250, epochs), seconds_to(100, epochs)
    (22.0, None)
    """
    seconds = 0.0
    for row in history:
        seconds += row["seconds"]
        if row["valid_perplexity"] <= perplexity:
            return round(seconds, 3)
    return None


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
