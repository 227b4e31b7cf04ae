"""Model + data -> trained model, in a run folder that can be gone on from.

The training itself is `keras.Model.fit`. What is here are the callbacks that
a long run needs: after each epoch the exact validation perplexity, history,
best weights and a checkpoint are on the disk, and a checkpoint again every few
minutes within an epoch and when a person stops the run. What is gone on from a
checkpoint ends as if it had never been stopped.
"""

import dataclasses
import gc
import hashlib
import logging
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import keras
import numpy as np
from numpy.typing import NDArray

from multilstm import __version__
from multilstm.corpus import NAMES, Corpus, load_corpus
from multilstm.dataset import (
    ContinuousStreams,
    NextWordWindows,
    VariableStreams,
    part_of_rows,
)
from multilstm.errors import UserError
from multilstm.evaluation import STATE, TOKENS, Evaluation, Evaluator
from multilstm.failures import explaining_failures
from multilstm.files import finite_or_none, read_json, write_json
from multilstm.launch import check_count, was_orphaned
from multilstm.model import LanguageModel, make_optimizer
from multilstm.ops import (
    Devices,
    device_name,
    has_gpu,
    last_kernel,
    sync_variables,
    tf32,
    use_devices,
)
from multilstm.presets import Preset, find_preset, preset_of
from multilstm.progress import ProgressBar, StepTimes
from multilstm.projection import Softmax
from multilstm.run_folder import RESULT_SCHEMA, History, Progress, RunFolder
from multilstm.vocabulary import UnknownWords, Vocabulary

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "preset": "small",
    "corpus": "python-docs",
    "epochs": None,
    "batch_size": None,
    "sequence_length": None,
    "learning_rate": None,
    "gradient_accumulation_steps": None,
    "precision": None,
    "starts_from": None,
    "train_tokens": None,
    "softmax": "exact",
    "cutoffs": None,
    "num_sampled": None,
    "seed": 0,
    "patience": None,
    "until_perplexity": None,
    "checkpoint_minutes": 10.0,
    "max_vocabulary": None,
    "unknown": "error",
}


Precision = Literal["float32", "tf32", "mixed_bfloat16"]

# Where a run has several processes, how often they agree whether to stop.
_BATCHES_BETWEEN_TALKS = 10

_SECONDS_OF_ONE_SIGNAL = 0.5

_SECONDS_BETWEEN_CURVES = 10.0

# What may change when a run goes on. A corpus may lie elsewhere: that it is
# the same text is seen by its checksums.
_CHANGEABLE = (
    *("epochs", "patience", "until_perplexity", "learning_rate"),
    *("checkpoint_minutes", "corpus"),
)


class DivergedError(UserError):
    """The loss is no number any more.

    Attributes:
        learning_rate: The one that was too high, as settings have it.
        asked_to_stop: Whether a person had stopped the run.
    """

    def __init__(
        self, message: str, learning_rate: float, asked_to_stop: bool
    ) -> None:
        super().__init__(message)
        self.learning_rate = learning_rate
        self.asked_to_stop = asked_to_stop


def train(
    preset: str | None = None,
    *,
    corpus: str | Path | None = None,
    out: str | Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    learning_rate: float | None = None,
    gradient_accumulation_steps: int | None = None,
    precision: Precision | None = None,
    starts_from: str | Path | None = None,
    train_tokens: int | None = None,
    softmax: Softmax | None = None,
    cutoffs: Sequence[int] | None = None,
    num_sampled: int | None = None,
    seed: int | None = None,
    patience: int | None = None,
    until_perplexity: float | None = None,
    checkpoint_minutes: float | None = None,
    retries: int = 0,
    minutes: float | None = None,
    devices: int | None = None,
    max_vocabulary: int | None = None,
    unknown: UnknownWords | None = None,
    data_folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a preset on a corpus, into a run folder.

    Args:
        preset: Name of a preset. Default: `"small"`.
        corpus: Name or folder of a corpus. Default: `"python-docs"`.
        out: The run folder. Default: `runs/<preset>-<corpus>-<backend>`.
        epochs: Passes over the training text. Default: the preset's.
        batch_size: Rows a batch. Default: the preset's.
        sequence_length: Steps of back-propagation. Default: the preset's.
        learning_rate: Of the first epochs, for the loss that the preset's
            source has. Default: the preset's.
        gradient_accumulation_steps: Batches whose gradients make one step;
            they follow each other in the text. Default: the preset's.
        precision: Of products. `"float32"`; `"tf32"`, which a GPU multiplies
            faster, with 10 bits instead of 23; or `"mixed_bfloat16"`, while
            weights, cell states within a batch and sums of losses are
            float32. Evaluation is in float32. Default: `"tf32"` on a GPU,
            `"float32"` elsewhere.
        starts_from: Folder of a run whose best weights to begin with.
            Default: none; a preset that goes on from another needs it.
        train_tokens: Only so many of the training text's first words.
            Default: all.
        softmax: `"exact"`, `"adaptive"` or `"sampled"`; see `LanguageModel`.
            With `"sampled"` the perplexity of training is an estimate, the
            others are exact. Default: `"exact"`.
        cutoffs: Of the adaptive softmax; see `LanguageModel`.
        num_sampled: Of the sampled softmax; see `LanguageModel`.
        seed: For initial weights and dropout. Default: 0.
        patience: Stop after this many epochs without a better validation
            perplexity. Default: never.
        until_perplexity: Stop after the first epoch with a validation
            perplexity of this or less. Default: never.
        checkpoint_minutes: Between checkpoints within an epoch, so that a
            crash costs no more than this; 0 for one after each batch, or
            group of batches. Default: 10.
        retries: How often a run whose loss is no number any more goes back
            to its last checkpoint and on at half the learning rate.
        minutes: Begin no epoch that would end later than this after the
            call, judged by the last one; then the figures are taken, which
            is not counted, as at the end. One epoch is trained in any case,
            and `resume` goes on after the last. Default: no limit.
        devices: How many GPUs, or parts of a CPU, share the rows of a batch.
            Default: one, or those of all processes that a launcher of the
            framework has started.
        max_vocabulary: Keep the most frequent words only; see `load_corpus`.
        unknown: `"error"` or `"drop"`; see `load_corpus`.
        data_folder: Where downloaded corpora lie; see `load_corpus`.
        resume: Go on from the checkpoint in `out`, with the settings of its
            `config.json`; only `epochs`, `patience`, `until_perplexity`,
            `learning_rate` and `checkpoint_minutes` may change, and `corpus`
            to where the same text lies now. Without a run there, start one.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The result record, as in `result.json`: among others
        `valid_perplexity` and `test_perplexity` of the best epoch's weights,
        `tokens_per_second` and `status` (`"finished"` or `"interrupted"`).

    Raises:
        UserError: For bad settings, a folder that holds another run or in
            which another process trains, a file that cannot be written,
            memory that is too small, a device that fails, or a loss that is
            no number: the last good checkpoint is still there.
    """
    given = {
        "preset": preset,
        "corpus": _corpus_name(corpus),
        "epochs": epochs,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "learning_rate": learning_rate,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "precision": precision,
        "starts_from": starts_from and os.path.realpath(starts_from),
        "train_tokens": train_tokens,
        "softmax": softmax,
        "cutoffs": None if cutoffs is None else list(cutoffs),
        "num_sampled": num_sampled,
        "seed": seed,
        "patience": patience,
        "until_perplexity": until_perplexity,
        "checkpoint_minutes": checkpoint_minutes,
        "max_vocabulary": max_vocabulary,
        "unknown": unknown,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if retries < 0:
        raise UserError(f"`retries` must be at least 0; received {retries}.")
    if minutes is not None and not minutes > 0:
        raise UserError(f"`minutes` must be above 0; received {minutes}.")
    ends_at = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
    if devices is not None:
        check_count(devices)
    group = use_devices(devices)
    folder = RunFolder(out or _default_folder(given), group)
    with explaining_failures():
        while True:
            try:
                return _train(
                    folder,
                    given,
                    data_folder=data_folder,
                    resume=resume,
                    ends_at=ends_at,
                    progress=progress,
                )
            except DivergedError as error:
                is_late = time.monotonic() > ends_at
                if not retries or error.asked_to_stop or is_late:
                    raise
                retries -= 1
                resume = True
                given["learning_rate"] = error.learning_rate / 2
                logger.warning(  # of the text alone: what logs may keep it
                    "%s This is done now, at %g.",
                    str(error),
                    given["learning_rate"],
                )
            # The model refers to itself, and until here the error to it.
            gc.collect()


def _train(
    folder: RunFolder,
    given: dict[str, Any],
    *,
    data_folder: str | Path | None,
    resume: bool,
    ends_at: float,
    progress: bool,
) -> dict[str, Any]:
    """Trains from the beginning or from where the run of a folder is."""
    exists = folder.devices.from_first(folder.config.exists())
    resuming = resume and bool(exists)
    if resuming:
        settings, plan = _read_plan(folder, given)
    else:
        settings = DEFAULTS | given
        plan = _plan(settings, find_preset(settings["preset"]))
    if settings["precision"] is None:
        settings["precision"] = "tf32" if has_gpu() else "float32"
    data = _load_corpus(settings, data_folder)
    _check_splits(data)
    _cut(plan, data.train[: settings["train_tokens"]], 0, 0)  # if it can be
    part_of_rows(plan.batch_size, folder.devices.count)
    _check_all_train_the_same(folder.devices, settings, plan, data)
    with folder.held(), tf32(settings["precision"] != "float32"):
        return _train_held(
            folder,
            settings,
            plan,
            data,
            resuming=resuming,
            ends_at=ends_at,
            progress=progress,
        )


def _check_all_train_the_same(
    devices: Devices, settings: dict[str, Any], plan: Preset, data: Corpus
) -> None:
    """Of processes that were started on several hosts, by hand perhaps."""
    places = ("corpus", "starts_from")  # may lie elsewhere there
    asked = {k: v for k, v in settings.items() if k not in places}
    text = repr((data.sha256, sorted(asked.items()), dataclasses.asdict(plan)))
    digest = hashlib.sha256(text.encode()).digest()
    mine = int.from_bytes(digest[:6], "big")  # a float64 has 53 bits
    if any(devices.any(mine != devices.from_first(mine))):
        raise UserError(
            "All processes of a run must train the same; they were given other "
            "options or another text. Start them with one command, on one "
            "corpus folder (python-docs changes with the version of Python)."
        )


def _train_held(
    folder: RunFolder,
    settings: dict[str, Any],
    plan: Preset,
    data: Corpus,
    *,
    resuming: bool,
    ends_at: float,
    progress: bool,
) -> dict[str, Any]:
    """What no other process may do in this folder at the same time."""
    train_ids = data.train[: settings["train_tokens"]]
    batches = _cut(plan, train_ids, settings["seed"], 0)
    devices = folder.devices
    has_checkpoint = resuming and bool(
        devices.from_first(folder.has_checkpoint)
    )
    with devices.building():
        model = _build(
            plan,
            data,
            settings,
            rows=part_of_rows(plan.batch_size, devices.num_parts),
            afresh=not has_checkpoint,
        )
    config = settings | {
        "model": model.settings,
        "preset_settings": dataclasses.asdict(plan),
        "corpus_sha256": data.sha256,
        "initial_weights_sha256": weights_sha256(model),
    }
    begun = Progress()
    if resuming:
        _check_same_text(folder, data)
        if has_checkpoint:
            begun = _load_checkpoint(folder, model)
        folder.update_config(config)
    else:
        folder.create(config, data.vocabulary)
        devices.total(0)  # the others wait for it
    if not has_checkpoint:
        _spread_seeds(model, devices)
    # Figures are float32's, in whichever precision a run trains.
    reader = model if model.dtype_policy.name == "float32" else _copy(model)
    keeper = _Keeper(
        folder,
        Evaluator(reader, 64 if has_gpu() else 20),
        data,
        begun,
        plan=plan,
        patience=settings["patience"],
        until_perplexity=settings["until_perplexity"],
        checkpoint_minutes=settings["checkpoint_minutes"],
        ends_at=ends_at,
    )
    if settings["starts_from"] is not None and not has_checkpoint:
        keeper.keep_start(model)
    if settings["softmax"] == "sampled":
        logger.warning(
            "The loss and perplexity of training are estimates, from a sample "
            "of the words; those of valid and test are exact."
        )
    if keeper.has_ended and folder.result.exists():
        result = read_json(folder.result, schema=RESULT_SCHEMA)
        if (result["status"], result["epochs"]) == (
            "finished",
            len(begun.history),
        ):
            return result
    times = StepTimes()

    def cut(epoch: int) -> Any:
        if plan.length_std is None:
            return batches  # itself, for which steps are compiled once
        return _cut(plan, train_ids, settings["seed"], epoch)

    _fit(model, cut, keeper, times, progress=progress)
    model.forget_steps()
    speed = times.summary(_tokens_per_step(batches, plan))
    return _finish(model, settings, keeper, speed)


def load_run(
    path: str | Path,
) -> tuple[LanguageModel, Vocabulary, dict[str, Any]]:
    """Loads the best weights of a run, whichever backend trained it.

    Returns:
        The model, its vocabulary, and the run's `config.json`.

    Raises:
        UserError: If the folder holds no run, or none that has weights yet.
    """
    folder = RunFolder(path)
    config = DEFAULTS | folder.read_config()
    if not folder.best_weights.exists():
        raise UserError(
            f"{folder.path} has no {folder.best_weights.name} yet: no epoch "
            "was completed. Train it on with --resume."
        )
    vocabulary = Vocabulary.load(folder.vocabulary)
    with explaining_failures():
        with _explaining_config(folder):
            model = LanguageModel(**config["model"] | {"carry_state": False})
            _check_fits(model, vocabulary, folder)
            model.build((None, None))
        folder.load_best_weights(model)
    return model, vocabulary, config


def _check_fits(
    model: LanguageModel, vocabulary: Vocabulary, folder: RunFolder
) -> None:
    """Before memory is taken for what files of strangers may ask for."""
    if model.vocabulary_size != len(vocabulary):
        raise UserError(
            f"{folder.config} must be of a model of {len(vocabulary)} words, "
            f"as {folder.vocabulary.name} has; it is of "
            f"{model.vocabulary_size}. Both must come from one run."
        )
    needed = 4 * model.least_num_weights()  # at the very least
    found = folder.best_weights.stat().st_size
    if needed > found:
        raise UserError(
            f"{folder.best_weights} must hold the {needed:,} bytes of the "
            f"model of {folder.config.name}; it has {found:,}. Both must come "
            "from one run."
        )


def load_run_corpus(
    config: dict[str, Any],
    data_folder: str | Path | None = None,
    corpus: str | Path | None = None,
) -> Corpus:
    """The corpus of a run, from its `config.json` or, if moved, `corpus`.

    Raises:
        UserError: If its text is not the text that the run was trained on.
    """
    if corpus is not None:
        config = config | {"corpus": _corpus_name(corpus)}
    data = _load_corpus(config, data_folder)
    if data.sha256 != config.get("corpus_sha256"):
        raise UserError(
            f"The run was trained on a corpus {data.name!r} with another "
            "text (its checksums differ). Give it the same files; "
            "python-docs changes with the version of Python."
        )
    return data


def weights_sha256(model: Any) -> str:
    """The checksum of a model's weights: equal where they are, bit for bit."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()


def describe_environment() -> dict[str, Any]:
    """Backend, device, versions and precision, for a result record."""
    backend = keras.config.backend()
    return {
        "backend": backend,
        "device": device_name(),
        "versions": {
            "multilstm": __version__,
            "python": platform.python_version(),
            "keras": keras.__version__,
            backend: getattr(sys.modules.get(backend), "__version__", None),
            "numpy": np.__version__,
        },
        "precision": keras.config.dtype_policy().name,
        "kernel": last_kernel(),
    }


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in MB."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset / 1e6)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * unit / 1e6, 1)


# Before training -----------------------------------------------------------


def _load_corpus(
    settings: dict[str, Any], data_folder: str | Path | None
) -> Corpus:
    return load_corpus(
        settings["corpus"],
        data_folder=data_folder,
        max_vocabulary=settings["max_vocabulary"],
        unknown=settings["unknown"],
    )


def _corpus_name(corpus: str | Path | None) -> str | None:
    if corpus is None or corpus in NAMES:
        return None if corpus is None else str(corpus)
    return os.path.realpath(corpus)


def _default_folder(given: dict[str, Any]) -> Path:
    chosen = DEFAULTS | given
    corpus = Path(chosen["corpus"]).name
    backend = keras.config.backend()
    return Path("runs") / f"{chosen['preset']}-{corpus}-{backend}"


def _settings_to_resume(
    folder: RunFolder, given: dict[str, Any]
) -> tuple[dict[str, Any], Preset]:
    """The settings of a run, and the preset as it was when it began."""
    config = DEFAULTS | folder.read_config()
    preset = preset_of(config)
    settings = {name: config[name] for name in DEFAULTS}
    for name, value in given.items():
        if name in _CHANGEABLE:
            settings[name] = value
        elif settings[name] != value:
            raise UserError(
                f"{folder.path} was started with {name}={settings[name]!r}; "
                f"received {value!r}. Resume without it, or start another "
                "run with --out."
            )
    return settings, preset


def _read_plan(
    folder: RunFolder, given: dict[str, Any]
) -> tuple[dict[str, Any], Preset]:
    """What a run that goes on was asked for before, and is now."""
    with _explaining_config(folder):
        settings, preset = _settings_to_resume(folder, given)
        plan = _plan(settings, preset)
        make_optimizer(plan)  # so that what it cannot be made of is told
    return settings, plan


@contextmanager
def _explaining_config(folder: RunFolder) -> Iterator[None]:
    """What a config of another version, or of nobody's, may lead to."""
    try:
        yield
    except UserError:
        raise
    except (
        *(AttributeError, KeyError, IndexError, OverflowError),
        *(TypeError, ValueError),
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder.config} must describe a run of this version of "
            f"multilstm; it does not ({reason}). Use the version that wrote it."
        ) from error


def _plan(settings: dict[str, Any], preset: Preset) -> Preset:
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
        if value is not None and not least <= value < math.inf:
            raise UserError(
                f"`{name}` must be at least {least}, and finite; received "
                f"{value}."
            )
    rate = settings["learning_rate"]
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"`learning_rate` must be above 0; received {rate}.")
    if settings["precision"] not in (None, *get_args(Precision)):
        raise UserError(
            f"`precision` must be one of {', '.join(get_args(Precision))}; "
            f"received {settings['precision']!r}."
        )
    if preset.starts_from and settings["starts_from"] is None:
        raise UserError(
            f"The preset {preset.name} goes on from a run of "
            f"{preset.starts_from}; received none. Give its folder with "
            "--starts-from."
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


def _check_splits(data: Corpus) -> None:
    for split in ("valid", "test"):
        if len(data.split(split)) < 2:
            raise UserError(
                f"The {split} text of {data.name} must have two words or "
                f"more; it has {len(data.split(split))}. Add text to it."
            )


def _build(
    plan: Preset,
    data: Corpus,
    settings: dict[str, Any],
    *,
    rows: int,
    afresh: bool,
) -> LanguageModel:
    names = ("softmax", "cutoffs", "num_sampled", "seed")
    model = LanguageModel(
        len(data.vocabulary),
        **plan.architecture(),
        preset=plan.name,
        dtype=(
            "mixed_bfloat16"
            if settings["precision"] == "mixed_bfloat16"
            else "float32"
        ),
        **{name: settings[name] for name in names},
    )
    model.build((rows, plan.sequence_length))
    if settings["starts_from"] is not None and afresh:
        _take_weights(model, settings["starts_from"], data)
    model.compile(make_optimizer(plan))
    model.optimizer.build(model.trainable_variables)
    if plan.averaging == "always":
        model.optimizer.start_averaging()
    return model


def _load_checkpoint(folder: RunFolder, model: LanguageModel) -> Progress:
    reached = folder.load_checkpoint(model)
    place = len(reached.history), reached.num_batches
    differs = place != tuple(folder.devices.from_first(n) for n in place)
    if any(folder.devices.any(differs)):
        raise UserError(
            "All processes must go on from the same checkpoint; one of them "
            f"read another in {folder.path}. Look at the disk they share."
        )
    _spread_seeds(model, folder.devices)
    return reached


def _spread_seeds(model: LanguageModel, devices: Devices) -> None:
    """Masks of rows differ on devices; those of weights and words do not."""
    for dropout in model.dropouts:
        if dropout.rate:
            devices.spread_seed(dropout.seed_generator.state)


def _copy(model: LanguageModel) -> LanguageModel:
    """The model in float32, never compiled: for figures and files."""
    return model.copy(dtype="float32", carry_state=False)


def _take_weights(model: LanguageModel, run: str, data: Corpus) -> None:
    """Begins with the best weights of another run."""
    trained, vocabulary, _ = load_run(run)
    shapes, needed = (
        [tuple(weight.shape) for weight in one.weights]
        for one in (trained, model)
    )
    if shapes != needed or vocabulary.words != data.vocabulary.words:
        raise UserError(
            "The run to start from must have the same architecture and "
            f"vocabulary; {run} has others. Give a run of the same preset and "
            "corpus."
        )
    model.set_weights(trained.get_weights())


def _cut(
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
            bucket=min(5, plan.sequence_length),
            rotates_rows=plan.rotates_rows,
            seed=[seed, epoch],
        )
    if plan.carry_state:
        return ContinuousStreams(token_ids, *sizes, drop_remainder=True)
    return NextWordWindows(token_ids, *sizes)


def _tokens_per_step(batches: Any, plan: Preset) -> float:
    """The mean, where the lengths of batches differ."""
    if isinstance(batches, VariableStreams):
        return float(batches.lengths.mean()) * plan.batch_size
    return plan.tokens_per_step


def _check_same_text(folder: RunFolder, data: Corpus) -> None:
    config = folder.read_config()
    if data.sha256 != config.get("corpus_sha256"):
        raise UserError(
            f"{folder.path} was started on another text of {data.name} (its "
            "checksums differ). Resume with the same files."
        )


# Training ------------------------------------------------------------------


class _Keeper(keras.callbacks.Callback):
    """Keeps on the disk what a run has reached.

    After each epoch validation, history, best weights and a checkpoint;
    within one a checkpoint from time to time.
    """

    takes_several_batches = True

    def __init__(
        self,
        folder: RunFolder,
        evaluator: Evaluator,
        data: Corpus,
        begun: Progress,
        *,
        plan: Preset,
        patience: int | None,
        until_perplexity: float | None,
        checkpoint_minutes: float,
        ends_at: float,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.devices = folder.devices
        self.evaluator = evaluator
        self.data = data
        self.history = begun.history
        self.num_batches = begun.num_batches
        self.seconds = begun.seconds
        self.kept = _describe(begun)  # what the checkpoint holds
        self.plan = plan
        self.steps_per_epoch = 0  # of the epoch in hand, see `begin_epoch`
        self.tokens_per_step = 0.0
        self.patience = patience
        self.until_perplexity = until_perplexity
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.ends_at = ends_at  # as `time.monotonic` counts
        self.out_of_time = False
        self._turned = time.monotonic()  # when the epoch in hand began
        self.num_drawn, self.drawn = 0, -math.inf  # epochs in curves, and when
        self.signalled = False  # this process, which may be one of several
        self.asked_to_stop = False  # any of them, as all know
        self.start_perplexity = folder.read_config().get(
            "start_valid_perplexity", math.inf
        )

    def begin_epoch(self, batches: Any) -> None:
        """Tells what the next epoch is of; all of it, also if it goes on."""
        self.steps_per_epoch = len(batches)
        self.tokens_per_step = _tokens_per_step(batches, self.plan)
        self.tokens_per_epoch = round(len(batches) * self.tokens_per_step)

    @property
    def valid_perplexities(self) -> list[float]:
        """Of the epochs that are done."""
        return [row["valid_perplexity"] for row in self.history]

    @property
    def has_ended(self) -> bool:
        """Whether epochs, patience or what was to be reached are at an end."""
        if len(self.history) >= self.plan.epochs:
            return True
        if not self.history:
            return False
        is_non_monotone = self.plan.is_non_monotone(self.valid_perplexities)
        if self.plan.stops_non_monotone and is_non_monotone:
            return True
        best = best_epoch(self.history)
        wanted = self.until_perplexity
        if wanted is not None and best["valid_perplexity"] <= wanted:
            return True
        since_best = len(self.history) - best["epoch"]
        return self.patience is not None and since_best >= self.patience

    @property
    def is_to_stop(self) -> bool:
        """Whether this process was told to stop, or has none to obey."""
        return self.signalled or was_orphaned()

    @property
    def interrupted(self) -> bool:
        """Whether a person stopped the run before its end."""
        return self.asked_to_stop and not self.has_ended

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.num_batches:
            # Keras and the reset of carried states began an epoch; this one
            # goes on in its middle.
            _load_checkpoint(self.folder, self.model)
        self._first_batch = self._talked = self.num_batches
        self._saved = time.perf_counter()
        self._began = self._saved - self.seconds

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Where several batches are run at once, Keras tells the last one's
        # number, which in an epoch's last group may be too high.
        done = self._first_batch + batch + 1
        self.num_batches = min(done, self.steps_per_epoch)
        is_last = self.num_batches == self.steps_per_epoch
        since_talk = self.num_batches - self._talked
        if self.devices.num_processes > 1 and not (
            is_last or since_talk >= _BATCHES_BETWEEN_TALKS
        ):
            return
        self._talked = self.num_batches
        self.folder.wait_for_checkpoint(if_done=True)
        loss = (logs or {}).get("loss", 0.0)
        since = time.perf_counter() - self._saved
        is_bad, self.asked_to_stop, is_due = self.devices.any(
            not math.isfinite(loss),
            self.is_to_stop,
            since >= self.checkpoint_seconds,
        )
        if is_bad:
            self._stop_diverged(f"batch {self.num_batches}", loss)
        if self.asked_to_stop:
            self.model.stop_training = True
        elif is_due and not is_last:  # else that of the epoch is about to be
            sync_variables(self.model)
            self._save_checkpoint()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.num_batches < self.steps_per_epoch:  # asked to stop
            self._save_checkpoint()
            if not self.folder.best_weights.exists():
                self._save_best(0, math.inf)
            return
        seconds = time.perf_counter() - self._began
        num_tokens = self.num_batches * self.tokens_per_step
        optimizer = self.model.optimizer
        rate = _number(optimizer.learning_rate)
        with optimizer.averaged_weights():
            valid = self._evaluate()
            if not math.isfinite(valid):
                self._stop_diverged("its validation", valid)
            self.folder.wait_for_checkpoint()  # none is two epochs behind
            best = min(self.valid_perplexities, default=math.inf)
            if valid < min(best, self.start_perplexity):
                self._save_best(epoch + 1, valid)
        row = {
            "epoch": epoch + 1,
            "train_perplexity": self._train_perplexity(),
            "valid_perplexity": valid,
            "learning_rate": rate,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1),
        }
        if self.plan.averaging != "never":
            row["averaged_steps"] = _number(optimizer.num_averaged)
        # For the progress bar; that of fit is of this process alone.
        logs.update(row, perplexity=row["train_perplexity"])
        self.history.append(row)
        self.num_batches, self.seconds = 0, 0.0
        if self.plan.averaging == "triggered" and self.plan.is_non_monotone(
            self.valid_perplexities
        ):
            optimizer.start_averaging()
        self.folder.write_history(self.history)
        self._draw_now_and_then()
        self._save_checkpoint()
        now = time.monotonic()
        # `seconds` has what was done of it before a run went on.
        took, self._turned = max(now - self._turned, seconds), now
        [self.out_of_time] = self.devices.any(
            self._turned + took > self.ends_at
        )
        if self.has_ended or self.out_of_time:
            self.model.stop_training = True

    def _draw_now_and_then(self) -> None:
        """On a GPU an epoch may be shorter than it takes to draw curves."""
        if time.monotonic() - self.drawn >= _SECONDS_BETWEEN_CURVES:
            self.draw()

    def draw(self) -> None:
        """Draws the curves, unless those that there are have all epochs."""
        if self.num_drawn < len(self.history):
            self.folder.write_curves(self.history)
        self.num_drawn, self.drawn = len(self.history), time.monotonic()

    def _train_perplexity(self) -> float:
        """Of the epoch, on all devices.

        Within a device the nats are summed in float32. Its count of tokens
        is not taken: from 2**24 on float32 does not hold every whole number.
        """
        nats = self.devices.whole_sum(self.model.perplexity.nats)
        return Evaluation(float(nats), self.tokens_per_epoch).perplexity

    def _save_checkpoint(self) -> None:
        """Saves a state that can be gone on from, or ends the run.

        The loss tells of numbers that are none only a step later.
        """
        self._saved = time.perf_counter()
        if self.num_batches:
            self.seconds = self._saved - self._began
        for variable in self.model.trainable_variables:
            if not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
                place = f"batch {self.num_batches}"
                self._stop_diverged(place, math.nan)
        reached = Progress(self.history, self.num_batches, self.seconds)
        self.folder.save_checkpoint(self.model, reached)
        self.kept = _describe(reached)

    def _save_best(self, epoch: int, valid_perplexity: float) -> None:
        # Keras would save the optimizer of a model that is compiled too,
        # which is three times the weights for Adam.
        with self.devices.alone():
            self.folder.save_best_weights(
                _copy(self.model), epoch, valid_perplexity
            )

    def _evaluate(self) -> float:
        reader = self.evaluator.model
        if reader is not self.model:
            reader.set_weights(self.model.get_weights())
        with self.devices.alone():
            perplexity = self.evaluator(self.data.valid).perplexity
        return self.devices.from_first(perplexity)

    def keep_start(self, model: LanguageModel) -> None:
        """Keeps the weights of another run that this one begins with.

        They are its best until an epoch is better.
        """
        self.set_model(model)
        self.start_perplexity = self._evaluate()
        self._save_best(0, self.start_perplexity)
        self.folder.update_config(
            self.folder.read_config()
            | {"start_valid_perplexity": self.start_perplexity}
        )

    def _stop_diverged(self, place: str, value: float) -> None:
        self.folder.wait_for_checkpoint()  # else it is not as told
        kept = "no epoch was completed before"
        if self.kept:
            kept = (
                f"the checkpoint after {self.kept} is kept in "
                f"{self.folder.checkpoint}"
            )
        raise DivergedError(
            f"The loss must stay a finite number; it became {value} in epoch "
            f"{len(self.history) + 1}, {place}; {kept}. Lower the learning "
            f"rate (--learning-rate, {self.plan.learning_rate:g} here), also "
            "for a run that goes on with --resume.",
            self.plan.learning_rate,
            self.asked_to_stop,
        )


def _number(variable: Any) -> float:
    return float(keras.ops.convert_to_numpy(variable))


def _describe(reached: Progress) -> str:
    """How far a checkpoint is; empty where nothing was done."""
    epochs = len(reached.history)
    if reached.num_batches:
        return f"batch {reached.num_batches} of epoch {epochs + 1}"
    return f"epoch {epochs}" if epochs else ""


def best_epoch(history: History) -> dict[str, float]:
    """The row with the lowest validation perplexity."""
    return min(history, key=lambda row: row["valid_perplexity"])


def _fit(
    model: LanguageModel,
    cut: Callable[[int], Any],
    keeper: _Keeper,
    times: StepTimes,
    *,
    progress: bool,
) -> None:
    plan = keeper.plan
    schedule = keras.callbacks.LearningRateScheduler(
        lambda epoch, _: plan.learning_rate_of(epoch, keeper.valid_perplexities)
    )
    bars = []
    devices = keeper.devices
    if progress and not devices.rank:
        bars.append(ProgressBar(plan.tokens_per_step, plan.epochs))
    kept: dict[int, Any] = {}

    def part_of(batches: Any) -> Any:
        """The same object for the same batches, as steps are compiled by it."""
        if id(batches) not in kept:
            kept.clear()
            kept[id(batches)] = (batches, devices.part(batches))
        return kept[id(batches)][1]

    with _stop_on_interrupt(keeper), keeper.folder.writing_behind():
        try:
            while not (keeper.has_ended or keeper.out_of_time):
                [keeper.asked_to_stop] = devices.any(keeper.is_to_stop)
                if keeper.asked_to_stop:
                    break
                epoch = len(keeper.history)
                batches = cut(epoch)
                keeper.begin_epoch(batches)
                lengths = getattr(batches, "lengths", None)
                if keeper.num_batches:
                    batches = _Rest(batches, keeper.num_batches)
                    if lengths is not None:
                        lengths = lengths[keeper.num_batches :]
                times.begin_epoch(lengths)
                with devices.training():
                    model.fit(
                        part_of(batches),
                        initial_epoch=epoch,
                        epochs=epoch + 1,
                        shuffle=False,
                        verbose=0,
                        # The rate after what a checkpoint brings back.
                        callbacks=[times, keeper, schedule, *bars],
                    )
        finally:
            for bar in bars:
                bar.close()
        keeper.draw()


class _Rest(keras.utils.PyDataset):
    """The batches of a dataset from a certain one on."""

    def __init__(self, batches: Any, first: int) -> None:
        super().__init__()
        self.batches = batches
        self.first = first
        self.is_sliced = batches.is_sliced
        self.varies = getattr(batches, "varies", False)
        self.token_ids = batches.token_ids
        self.batch_size = batches.batch_size
        self.sequence_length = batches.sequence_length

    def __len__(self) -> int:
        return len(self.batches) - self.first

    def row_starts(self, index: int) -> NDArray[np.int32]:
        starts: NDArray[np.int32] = self.batches.row_starts(self.first + index)
        return starts

    def __getitem__(self, index: int) -> Any:
        return self.batches[self.first + index]


@contextmanager
def _stop_on_interrupt(keeper: _Keeper) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends training after the batch in hand.

    A checkpoint is made then. A second one ends it at once, but for one that
    comes with the first: `timeout` and others send it to a process and again
    to its group.
    """
    before: dict[int, Any] = {}
    first = math.inf

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if keeper.signalled and now - first < _SECONDS_OF_ONE_SIGNAL:
            return
        if keeper.signalled:
            signal.signal(number, before[number])
            signal.raise_signal(number)
            return
        first = now
        again = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        logger.warning("Stopping after this batch; %s again: at once", again)
        keeper.signalled = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread, where alone it can be set
        yield
        return
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


# After training ------------------------------------------------------------


def describe_protocol(plan: Preset, settings: dict[str, Any]) -> dict[str, Any]:
    """What the figures of a run are of, and what was chosen on what."""
    chosen = ["the epoch whose weights are kept"]
    if plan.plateau_factor is not None:
        chosen.append("when the learning rate falls")
    if plan.averaging == "triggered":
        chosen.append("when averaging begins")
    if plan.stops_non_monotone or any(
        settings[name] is not None for name in ("patience", "until_perplexity")
    ):
        chosen.append("when training ends")
    average = ", averages once they begin" if plan.averaging != "never" else ""
    return {
        "tokens": TOKENS,
        "state": STATE,
        "weights": f"those of the best epoch{average}",
        "tuned": {"text": "valid", "what": chosen},
    }


def _finish(
    model: LanguageModel,
    settings: dict[str, Any],
    keeper: _Keeper,
    speed: dict[str, Any],
) -> dict[str, Any]:
    folder, data, history = keeper.folder, keeper.data, keeper.history
    best = folder.describe_best_weights()
    if math.isinf(best.get("valid_perplexity", math.inf)):
        best = {}  # stopped in its first epoch, or before
    result: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "status": "interrupted" if keeper.interrupted else "finished",
        "run": str(folder.path),
        **describe_environment(),
        "preset": settings["preset"],
        "corpus": data.name,
        "seed": settings["seed"],
        "devices": folder.devices.count,
        "initial_weights_sha256": folder.read_config()[
            "initial_weights_sha256"
        ],
        "precision": settings["precision"],
        "learning_rate": keeper.plan.learning_rate,
        "train_tokens": settings["train_tokens"],
        "starts_from": settings["starts_from"],
        "gradient_accumulation_steps": (
            keeper.plan.gradient_accumulation_steps
        ),
        "softmax": settings["softmax"],
        "parameters": model.count_params(),
        "epochs": len(history),
        "epochs_planned": keeper.plan.epochs,
        "is_out_of_time": keeper.out_of_time and not keeper.has_ended,
        "best_epoch": best["epoch"] if best else None,
        "valid_perplexity": best["valid_perplexity"] if best else None,
        "test_perplexity": None,
        "test_unigram_perplexity": data.unigram_perplexity("test"),
        "protocol": describe_protocol(keeper.plan, settings),
        **speed,
        "peak_memory_mb": peak_memory_mb(),
        "history": history,
    }
    if not keeper.interrupted:
        folder.devices.total(0)  # until the first has written them
        kept, _, _ = load_run(folder.path)
        keeper.evaluator.model.set_weights(kept.get_weights())
        result["test_perplexity"] = keeper.evaluator(data.test).perplexity
    if not folder.devices.rank:
        write_json(folder.result, finite_or_none(result))
    folder.devices.total(0)  # none goes before the first has written
    return result
