"""What is installed, what it sees, and which LSTM really runs on it.

Each backend is tried in a process of its own: a layer is trained for a second
and compared with the reference. What is said of a kernel was seen, not
believed.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from multilstm.benchmark import WorkerError
from multilstm.devices import (
    CUDA_FORMS,
    device_and_driver,
    how_to_add,
    how_to_install,
)
from multilstm.selection import BACKENDS
from multilstm.workers import WorkerProcess

DOCTOR_SCHEMA = "multilstm-doctor-1"
# Of the trial's outputs and gradients, relative to the largest. Seen in
# float32: 2e-6. TF32 gives 5e-4, a swapped gate 1.
TOLERANCE = 1e-4


def doctor(
    pythons: Mapping[str, Path],
    *,
    timeout: float = 120,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Examines every backend.

    Args:
        pythons: For each backend the Python that has it.
        timeout: Seconds that a process may take for one of its tasks.
        tell: Hears what is being done.

    Returns:
        `schema`, `device`, `driver`, `backends`, a record for each, and
        `advice`, what to do.
    """
    device, driver = device_and_driver()
    records = []
    for backend in BACKENDS:
        tell(f"examining {backend}")
        records.append(_examine(backend, pythons.get(backend), timeout))
    return {
        "schema": DOCTOR_SCHEMA,
        "device": device,
        "driver": driver,
        "backends": records,
        "advice": advise(records, driver),
    }


def _examine(
    backend: str, python: Path | None, timeout: float
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "backend": backend,
        "installed": python is not None,
        "kernel": None,
    }
    if python is None:
        record["reason"] = how_to_add(backend)
        return record
    record["python"] = str(python)
    try:
        with closing(WorkerProcess(python, backend, timeout=timeout)) as worker:
            record |= worker.ask("start", precision="float32")
            record |= worker.ask("diagnose")
    except WorkerError as failure:
        record["reason"] = str(failure)
        return record
    errors = record["output_error"], record["gradient_error"]
    record["correct"] = all(error <= TOLERANCE for error in errors)
    record["fast"] = is_fast(record["kernel"], gpu=record["gpu"])
    record["times_reference"] = round(
        record["reference_step_ms"] / record["step_ms"], 2
    )
    return record


def is_fast(kernel: str, *, gpu: bool) -> bool:
    """Whether a kernel is the best that we have for such a device."""
    if gpu:
        return kernel.endswith((": cudnn", ": miopen", ": triton"))
    return kernel in ("jax: scan", "torch: onednn", "tensorflow: loop")


def advise(records: list[dict[str, Any]], driver: str | None) -> list[str]:
    """What to do about what was found, most urgent first."""
    advice = []
    for record in records:
        name = record["backend"]
        if not record["installed"]:
            continue
        if "reason" in record:
            advice.append(f"{name} does not work: {record['reason']}")
            continue
        if not record["correct"]:
            advice.append(
                f"{name}: its LSTM differs from the reference by "
                f"{record['output_error']:.0e} (outputs) and "
                f"{record['gradient_error']:.0e} (gradients), more than "
                f"{TOLERANCE:g}. Do not train with it; report it."
            )
        if driver and not record["gpu"]:
            advice.append(
                f"{name} does not see the GPU that is here. Install its CUDA "
                f"form: {CUDA_FORMS[name]}"
            )
        if not record["fast"]:
            advice.append(
                f"{name} ran {record['kernel']}, {record['times_reference']:g} "
                "times the speed of the plain loop, and not its fast LSTM. "
                + " ".join(record["notes"])
            )
        elif record["times_reference"] < 1:
            advice.append(
                f"{name} ran {record['kernel']} at "
                f"{record['times_reference']:g} times the speed of the plain "
                "loop. If other work runs here, its threads wait for each "
                "other: set OMP_NUM_THREADS=1, or run doctor again without it."
            )
    missing = [r["backend"] for r in records if not r["installed"]]
    if len(missing) == len(records):
        return [f"Install a backend: {how_to_install('jax')}"]
    if not advice:
        advice.append("What is installed works, each with its fast LSTM.")
    if missing:
        commands = "; ".join(map(how_to_install, missing))
        advice.append(
            "To have more to choose from, in an environment for each whose "
            f"Python --python names: {commands}"
        )
    advice.append("To know which is fastest for your model: multilstm choose")
    return advice
