"""The runs of test_devices.py that need a process of their own.

A framework may divide the CPU only before it computes anything. The argument
is a folder with the corpus `letters`; the runs go beside it.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

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
        PRESETS[f"{name}_same"] = replace(preset, **NO_DROPOUT)


def stop_after(number: int) -> None:
    """Lets the run end after so many checkpoints."""
    save, saved = RunFolder.save_checkpoint, []

    def save_and_stop(self, model, reached):
        save(self, model, reached)
        saved.append(reached)
        if len(saved) == number:
            RunFolder.save_checkpoint = save
            raise StopError

    RunFolder.save_checkpoint = save_and_stop


def main() -> None:
    """All runs on two devices."""
    define_presets()
    root = Path(sys.argv[1])
    settings = {"corpus": root / "letters", "progress": False, "devices": 2}
    for preset in ("tiny_same", "tiny_awd_same"):
        train(preset, out=root / f"{preset}-2", **settings)
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        train("tiny_windows_same", out=root / "tiny_windows_same-2", **settings)
    # Goes on where one device stopped, and stops for one device to go on.
    resumed = {"out": root / "1-then-2", "resume": True, "epochs": 2}
    train("tiny_same", **resumed, **settings)
    train("tiny_same", out=root / "2-then-1", epochs=1, **settings)
    # Within an epoch, masks and all.
    for preset in ("tiny", "tiny_awd"):
        train(preset, out=root / f"{preset}-whole", **settings)
        stop_after(2)
        parts = {"out": root / f"{preset}-parts", "resume": True}
        try:
            train(preset, checkpoint_minutes=0, **parts, **settings)
        except StopError:
            train(preset, **parts, **settings)


if __name__ == "__main__":
    main()
