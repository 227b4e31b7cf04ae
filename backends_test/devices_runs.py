"""The runs of test_devices.py that need a process of their own.

A framework may divide the CPU only before it computes anything. The arguments
are a folder with the corpus `letters`, beside which the runs go, and which.
"""

import atexit
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import tiny_runs

from multilstm import PRESETS, train
from multilstm.run_folder import RunFolder

# Masks of rows are drawn by each device, all others are the same on all.
NO_DROPOUT = {
    "input_dropout": 0.0,
    "hidden_dropout": 0.0,
    "output_dropout": 0.0,
}


class StopError(Exception):
    """Raised after a checkpoint."""


def define_presets() -> None:
    """Those of `tiny_runs` with four rows, and without dropout of rows."""
    for name, preset in tiny_runs.presets().items():
        preset = replace(preset, batch_size=4, epochs=2)
        PRESETS[name] = preset
        same = f"{name}_same"
        PRESETS[same] = replace(preset, **NO_DROPOUT, name=same)


def stop_at_checkpoint() -> None:
    """Lets the next run end after its first."""
    save = RunFolder.save_checkpoint

    def save_and_stop(self, model, reached):
        RunFolder.save_checkpoint = save
        save(self, model, reached)
        assert reached.num_batches  # within an epoch
        raise StopError

    RunFolder.save_checkpoint = save_and_stop


def train_same(root: Path, settings: dict[str, Any]) -> None:
    """Runs that one device can repeat."""
    for preset in ("tiny_same", "tiny_awd_same"):
        train(preset, out=root / f"{preset}-2", **settings)
    if keras.config.backend() != "tensorflow":
        train("tiny_windows_same", out=root / "tiny_windows_same-2", **settings)


def train_on(root: Path, settings: dict[str, Any]) -> None:
    """Goes on where one device stopped, and stops for one to go on."""
    resumed = {"out": root / "1-then-2", "resume": True, "epochs": 2}
    train("tiny_same", **resumed, **settings)
    train("tiny_same", out=root / "2-then-1", epochs=1, **settings)


def train_in_parts(root: Path, settings: dict[str, Any], *presets: str) -> None:
    """Stops within an epoch, masks and all."""
    for preset in presets or ("tiny", "tiny_awd"):
        train(preset, out=root / f"{preset}-whole", **settings)
        stop_at_checkpoint()
        parts = {"out": root / f"{preset}-parts", "resume": True}
        try:
            train(preset, checkpoint_minutes=0, **parts, **settings)
        except StopError:
            train(preset, **parts, **settings)


def train_a_few(root: Path, settings: dict[str, Any]) -> None:
    """One that a device can repeat, one in parts."""
    train("tiny_same", out=root / "tiny_same-2", **settings)
    train_in_parts(root, settings, "tiny_awd")


RUNS = {
    "same": train_same,
    "on": train_on,
    "parts": train_in_parts,
    "few": train_a_few,
}


def check_group_has_ended() -> None:
    """Else PyTorch may abort the process, now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        os.write(2, b"the process group is still there at exit")
        os._exit(1)


def main() -> None:
    """The runs that were asked for, on two devices."""
    atexit.register(check_group_has_ended)  # called last, as it is the first
    define_presets()
    root = Path(sys.argv[1])
    settings = {"corpus": root / "letters", "progress": False, "devices": 2}
    for name in sys.argv[2:]:
        RUNS[name](root, settings)


if __name__ == "__main__":
    main()
