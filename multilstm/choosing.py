"""What was measured -> a choice of the backend, and whether one still holds."""

import datetime
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from multilstm import devices
from multilstm.bench import BENCH_SCHEMA
from multilstm.benchmark import Shape, WorkerError
from multilstm.choices import (
    find_choice,
    save_choice,
    shape_class,
    why_stale,
)
from multilstm.errors import UserError
from multilstm.files import MISFITS, read_json
from multilstm.ranking import by_shape, fastest
from multilstm.selection import installed_versions
from multilstm.workers import WorkerProcess


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
    protocol = result["protocol"]  # older ones tell nothing of processors
    return {k: protocol[k] for k in ("processors",) if k in protocol} | {
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
    except UserError:
        raise
    except MISFITS as error:
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
