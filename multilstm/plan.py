"""What a run was asked for -> its plan: a preset with the changes in it.

A plan that cannot be trained is refused here, before anything is written.
"""

import dataclasses
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multilstm.config import DEFAULTS, preset_of
from multilstm.corpus import Corpus
from multilstm.dataset import (
    ContinuousStreams,
    NextWordWindows,
    VariableStreams,
    part_of_rows,
)
from multilstm.errors import UserError
from multilstm.ops import Devices
from multilstm.optimizers import make_optimizer
from multilstm.preset_files import settings_of
from multilstm.presets import PRESETS, Preset
from multilstm.run_folder import RunFolder
from multilstm.runs import explaining_config

logger = logging.getLogger(__name__)

# What may change when a run goes on. A corpus may lie elsewhere: that it is
# the same text is seen by its checksums.
_CHANGEABLE = (
    *("epochs", "patience", "until_perplexity", "learning_rate"),
    *("checkpoint_minutes", "corpus", "halved_from"),
)


def _settings_to_resume(
    folder: RunFolder, config: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], Preset]:
    """The settings of a run, and the preset as it was when it began."""
    preset = preset_of(config)
    settings = {name: config[name] for name in DEFAULTS}
    asked = given.get("learning_rate")
    given = dict(given)
    if "halved_from" in given:  # by `retries`; None stays as it was
        given["halved_from"] = given["halved_from"] or config["halved_from"]
    elif asked is not None and asked != config["halved_from"]:
        given["halved_from"] = None
    elif asked is not None:
        # The same command as before its rate had proved too high.
        given = {k: v for k, v in given.items() if k != "learning_rate"}
        logger.warning(
            "The learning rate stays %g: with %g the run diverged. Give "
            "another one to change it.",
            config["learning_rate"],
            asked,
        )
    for name, value in given.items():
        before = settings[name]
        if before is None:  # the preset's, where it has such a value
            before = getattr(preset, name, None)
        if name in _CHANGEABLE:
            settings[name] = value
        elif before != value:
            raise UserError(
                f"{folder.path} was started with {name}={before!r}; "
                f"received {value!r}. Resume without it, or start another "
                "run with --out."
            )
    return settings, preset


def _check_same_preset(
    folder: RunFolder, config: dict[str, Any], asked_for: Preset
) -> None:
    """Of a run that goes on: a file of one's own may have changed."""
    if PRESETS.get(asked_for.name) == asked_for:  # ours may be of a version
        return
    before, now = settings_of(preset_of(config)), settings_of(asked_for)
    for name in now:
        # The run's own settings have been put into its preset.
        is_of_run = config.get(name) is not None
        if before[name] != now[name] and name != "source" and not is_of_run:
            raise UserError(
                f"{folder.path} was started with {name}={before[name]!r} of "
                f"its preset; in that of {asked_for.name} it is {now[name]!r} "
                "now. Resume without --preset, or start another run with "
                "--out."
            )


def read_plan(
    folder: RunFolder, given: dict[str, Any], asked_for: Preset | None = None
) -> tuple[dict[str, Any], Preset]:
    """What a run that goes on was asked for before, and is now."""
    with explaining_config(folder):
        config = DEFAULTS | folder.read_config()
        settings, preset = _settings_to_resume(folder, config, given)
        if asked_for is not None:
            _check_same_preset(folder, config, asked_for)
        plan = make_plan(settings, preset)
        make_optimizer(plan)  # so that what it cannot be made of is told
    return settings, plan


def make_plan(settings: dict[str, Any], preset: Preset) -> Preset:
    """The preset with the settings' changes in it."""
    needed = {
        "epochs": 1,
        "batch_size": 1,
        "sequence_length": 1,
        "patience": 1,
        "until_perplexity": 1,
        "gradient_accumulation_steps": 1,
        "train_tokens": 1,
        "checkpoint_minutes": 0,
        "seed": 0,
    }
    for name, least in needed.items():
        value = settings[name]
        if value is not None and value < least:
            raise UserError(
                f"`{name}` must be at least {least}; received {value}."
            )
    rate = settings["learning_rate"]
    if rate is not None and rate <= 0:
        raise UserError(f"`learning_rate` must be above 0; received {rate}.")
    if preset.starts_from and settings["starts_from"] is None:
        raise UserError(
            f"The preset {preset.name} goes on from a run of "
            f"{preset.starts_from}; received none. Give its folder with "
            "--starts-from."
        )
    if settings["softmax"] == "adaptive" and preset.tied_embeddings:
        raise UserError(
            "--softmax adaptive needs weights of its own; the embeddings of "
            f"the preset {preset.name} are the softmax's too. Take a preset "
            "whose are not (--preset zaremba_medium), or --softmax sampled."
        )
    names = (
        "epochs batch_size sequence_length learning_rate "
        "gradient_accumulation_steps"
    )
    changes = {
        name: settings[name]
        for name in names.split()
        if settings[name] is not None
    }
    plan = dataclasses.replace(preset, **changes)
    if plan.length_std is not None and plan.gradient_accumulation_steps > 1:
        raise UserError(
            f"Accumulated gradients need batches of one length; {plan.name} "
            "has a rate for each. Leave --gradient-accumulation-steps out."
        )
    return plan


def check_trainable(
    plan: Preset,
    settings: dict[str, Any],
    data: Corpus,
    devices: Devices,
    *,
    is_new: bool,
) -> None:
    """Refuses a text or devices that a plan cannot be trained on."""
    for split in ("valid", "test"):
        if len(data.split(split)) < 2:
            raise UserError(
                f"The {split} text of {data.name} must have two words or "
                f"more; it has {len(data.split(split))}. Add text to it."
            )
    num_words = settings["train_tokens"]
    # A run that was begun with too many goes on.
    if is_new and num_words is not None and num_words > len(data.train):
        raise UserError(
            f"`train_tokens` must be at most the {len(data.train):,} words of "
            f"the training text of {data.name}; received {num_words:,}. "
            "Leave it out to train on all of them."
        )
    batches = cut_batches(plan, data.train[:num_words], 0, 0)  # if it can be
    if plan.gradient_accumulation_steps > len(batches):
        raise UserError(
            "--gradient-accumulation-steps must be at most the batches of an "
            f"epoch, which are {len(batches)}; received "
            f"{plan.gradient_accumulation_steps}. Lower it, or give more text."
        )
    part_of_rows(plan.batch_size, devices.count)  # likewise
    if plan.gradient_accumulation_steps > 1 and not devices.accumulates:
        raise UserError(
            "Several devices take one batch a step with this backend; received "
            f"--gradient-accumulation-steps {plan.gradient_accumulation_steps}"
            ". Leave it out, or take another backend."
        )


def cut_batches(
    plan: Preset, token_ids: NDArray[np.int32], seed: int, epoch: int
) -> Any:
    """The batches that a preset trains on in an epoch, counted from 0."""
    sizes = (plan.sequence_length, plan.batch_size)
    if plan.length_std is not None:
        return VariableStreams(
            token_ids,
            *sizes,
            std=plan.length_std,
            half_share=plan.half_length_share,
            rotates_rows=plan.rotates_rows,
            seed=[seed, epoch],
        )
    if plan.carry_state:
        return ContinuousStreams(token_ids, *sizes, drop_remainder=True)
    return NextWordWindows(token_ids, *sizes)
