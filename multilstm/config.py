"""The `config.json` of a run: what it was asked for, its preset as it was."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from multilstm.errors import UserError
from multilstm.files import MISFITS, check_kinds, read_json
from multilstm.presets import Preset

CONFIG_SCHEMA = "multilstm-run-1"

Precision = Literal["float32", "tf32", "mixed_bfloat16"]
Softmax = Literal["exact", "adaptive", "sampled"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run may be asked for, see `train`; None is the preset's own."""

    preset: str = "small"
    corpus: str = "python-docs"
    epochs: int | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    learning_rate: float | None = None
    halved_from: float | None = None  # what was asked for, before `retries`
    gradient_accumulation_steps: int | None = None
    precision: Precision | None = None
    starts_from: str | None = None
    train_tokens: int | None = None
    softmax: Softmax = "exact"
    cutoffs: Sequence[int] | None = None
    num_sampled: int | None = None
    seed: int = 0
    patience: int | None = None
    until_perplexity: float | None = None
    checkpoint_minutes: float = 10.0
    max_vocabulary: int | None = None
    unknown: str = "error"


DEFAULTS: dict[str, Any] = asdict(Settings())


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a run.

    Raises:
        UserError: If a setting in it is of another kind than it can be.
    """
    config = read_json(path, schema=CONFIG_SCHEMA)
    check_kinds(config, Settings, str(path))
    return config


def preset_of(config: dict[str, Any]) -> Preset:
    """The preset of a run as it was when it began, with its own changes."""
    try:
        settings = dict(config["preset_settings"])
        # What runs of before 2026-11-25 have instead of `loss`.
        if settings.pop("loss_sum_over_time", False):
            settings["loss"] = "sum_over_time"
        return Preset(**settings)
    except MISFITS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            "The config.json of a run must hold the settings of a preset of "
            f"this version of multilstm; it does not ({reason}). Use the "
            "version that wrote it."
        ) from error
