"""Kills training runs at random moments and lets them go on, fifty times.

    nox -s test-faults            on each backend whose test environment exists
    KERAS_BACKEND=jax python backends_test/faults.py --kills 50

One run is never stopped. Others are killed (SIGKILL) after a random time, over
and over, while they train, evaluate or write, and go on with `--resume` until
the wanted number of kills is reached. Weights and history of each must then be
those of the first, bit for bit. Only kills of processes that had their run
folder count; what they were writing then is told.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import tiny_runs

# Differ from run to run however it is stopped.
TIMES = ("seconds", "tokens_per_second")


def start(corpus: Path, out: Path) -> subprocess.Popen:
    """A run that makes a checkpoint whenever it can."""
    command = [
        *(sys.executable, "-m", "multilstm", "train", "--preset", "small"),
        *("--corpus", str(corpus), "--out", str(out), "--epochs", "4"),
        *("--checkpoint-minutes", "0", "--resume", "--batch-size", "5"),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for a run's end, which must be a good one."""
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"The run must go on; it said: {errors[-2000:]}")


def wait_for_training(process: subprocess.Popen) -> Path:
    """Waits until a run has its folder, in which its name is then written."""
    out = Path(process.args[process.args.index("--out") + 1])
    holder = out / ".holder"
    while process.poll() is None:
        if holder.exists() and f" {process.pid} " in holder.read_text():
            break
        time.sleep(0.01)
    return out


def kill(process: subprocess.Popen, after: float) -> str | None:
    """Kills a run some time after it began to train; what it was at.

    None where it had ended by itself.
    """
    out = wait_for_training(process)
    try:
        process.wait(timeout=after)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    leftovers = [
        path.name.split("-")[0].lstrip(".")
        for path in out.rglob(".*-????????*")
    ]
    return f"writing {leftovers[0]}" if leftovers else "computing"


def outcome(out: Path) -> dict[str, str]:
    """Checksums of all that must be the same, and the history."""
    digest = hashlib.sha256()
    with np.load(out / "checkpoint" / "last.npz", allow_pickle=False) as npz:
        for name in sorted(set(npz.files) - {"about"}):
            digest.update(name.encode() + npz[name].tobytes())
    best = hashlib.sha256()

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            best.update(name.encode() + item[()].tobytes())

    with h5py.File(out / "best.weights.h5") as file:
        file.visititems(add)
    result = json.loads((out / "result.json").read_text())
    history = [
        {name: row[name] for name in row if name not in TIMES}
        for row in result["history"]
    ]
    return {
        "checkpoint": digest.hexdigest(),
        "best_weights": best.hexdigest(),
        "history": json.dumps(history),
        "test_perplexity": repr(result["test_perplexity"]),
    }


def main() -> None:
    """Prints a line a run and a summary; exits with 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="for the summary, as JSON")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kills: list[str] = []
    equal = runs = 0
    with tempfile.TemporaryDirectory() as root:
        corpus = Path(root) / "letters"
        tiny_runs.write_corpus(corpus, (600, 400, 100))
        undisturbed = Path(root) / "undisturbed"
        process = start(corpus, undisturbed)
        wait_for_training(process)
        began = time.monotonic()
        finish(process)
        length = time.monotonic() - began
        expected = outcome(undisturbed)
        print(f"undisturbed: {length:.1f} s of training", flush=True)
        while len(kills) < options.kills:
            out = Path(root) / f"run-{runs}"
            moments = []
            for _ in range(10):
                if len(kills) == options.kills:
                    break
                was = kill(start(corpus, out), chance.uniform(0, length))
                if was is None:
                    break
                moments.append(was)
                kills.append(was)
            finish(start(corpus, out))
            runs += 1
            found = outcome(out)
            is_equal = found == expected
            equal += len(moments) if is_equal else 0
            differing = [
                name for name in found if found[name] != expected[name]
            ]
            said = "equal" if is_equal else f"DIFFERS in {', '.join(differing)}"
            print(f"run {runs}: {len(moments)} kills, {said}", flush=True)
    at = {was: kills.count(was) for was in sorted(set(kills))}
    summary = {
        "schema": "multilstm-faults-1",
        "backend": os.environ["KERAS_BACKEND"],
        "kills": len(kills),
        "kills_of_equal_runs": equal,
        "runs": runs,
        "killed_while": at,
        "seed": options.seed,
    }
    print(json.dumps(summary, indent=2))
    if options.out:
        options.out.write_text(json.dumps(summary, indent=2) + "\n")
    if equal != len(kills):
        raise SystemExit(f"{len(kills) - equal} kills of runs that differ")


if __name__ == "__main__":
    main()
