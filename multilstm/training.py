"""Model + data -> trained model, in a run folder that can be gone on from.

The training itself is `keras.Model.fit`. What is here comes before it: the
model is built or its checkpoint read, the text cut for each epoch. `plan.py`
checks what was asked for, `keeper.py` keeps what a run has reached,
`results.py` takes the figures at the end. A run that goes on from a checkpoint
ends as if it had never been stopped.
"""

import dataclasses
import gc
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import keras

from multilstm.checkpoint import Progress
from multilstm.config import DEFAULTS, Precision, Settings, Softmax
from multilstm.corpus import Corpus
from multilstm.dataset import LaterBatches, part_of_rows
from multilstm.devices import (
    CUDA_FORMS,
    device_and_driver,
    is_told_to_use_cpu,
)
from multilstm.errors import UserError, check_whole
from multilstm.evaluation import Evaluator
from multilstm.failures import explaining_failures
from multilstm.files import check_kinds
from multilstm.keeper import (
    DivergedError,
    Keeper,
    figures_of,
    load_checkpoint,
    spread_seeds,
    stop_on_interrupt,
    tokens_per_step,
)
from multilstm.launch import check_count
from multilstm.model import LanguageModel
from multilstm.ops import (
    Devices,
    has_gpu,
    tf32,
    use_devices,
)
from multilstm.optimizers import make_optimizer
from multilstm.plan import (
    check_trainable,
    cut_batches,
    make_plan,
    read_plan,
)
from multilstm.preset_files import find_preset
from multilstm.presets import PRESETS, Preset
from multilstm.progress import ProgressBar, StepTimes
from multilstm.results import read_result, take_figures, tell_again
from multilstm.run_folder import RunFolder
from multilstm.runs import (
    check_corpus_is_there,
    corpus_name,
    load_corpus_of,
    load_run,
    weights_sha256,
)
from multilstm.vocabulary import UnknownWords

logger = logging.getLogger(__name__)


def train(
    preset: str | Path | Preset | None = None,
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
        preset: Name of a preset, a JSON file of your own, or a `Preset`.
            Default: `"small"`.
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
            weights, cell states and sums of losses are float32. Evaluation
            is in float32. Default: `"tf32"` on a GPU, `"float32"` elsewhere.
        starts_from: Folder of a run whose best weights to begin with.
            Default: none; a preset that goes on from another needs it.
        train_tokens: Only so many of the training text's first words, at
            most all. Default: all.
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
        retries: How often a run whose loss is no number any more, or whose
            validation has more than twice the nats of a guess among all
            words, goes back to its last checkpoint and on at half the
            learning rate. One within an epoch that leads there twice is left:
            the epoch begins anew.
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
    asked_for = None if preset is None else find_preset(preset)
    name = asked_for and asked_for.name
    if name in PRESETS and asked_for != PRESETS[name]:
        raise UserError(
            "A preset of your own must have a name of its own; received "
            f"another {name}. Give `name` to `dataclasses.replace` as well."
        )
    given = {
        "preset": name,
        "corpus": corpus_name(corpus),
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
    check_kinds(given, Settings, "a run")
    if keras.config.max_epochs() or keras.config.max_steps_per_epoch():
        raise UserError(
            "A run must train as long as it is told to; Keras is told to end "
            "epochs or training early (KERAS_MAX_EPOCHS or "
            "KERAS_MAX_STEPS_PER_EPOCH). Unset them; `epochs` and "
            "`train_tokens` do that here."
        )
    check_whole("retries", retries, 0)
    if minutes is not None and not minutes > 0:
        raise UserError(f"`minutes` must be above 0; received {minutes}.")
    ends_at = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
    if devices is not None:
        check_count(devices)
    group = use_devices(devices)
    _warn_of_unseen_gpu()
    folder = RunFolder(out or _default_folder(given), group)
    asked = given.get("learning_rate")
    kept, goes_back_to = None, None
    with explaining_failures():
        while True:
            try:
                return _train(
                    folder,
                    given,
                    preset=asked_for,
                    data_folder=data_folder,
                    resume=resume,
                    goes_back_to=goes_back_to,
                    can_retry=retries > 0,
                    ends_at=ends_at,
                    progress=progress,
                )
            except DivergedError as error:
                is_late = time.monotonic() > ends_at
                if not retries or error.asked_to_stop or is_late:
                    raise
                retries -= 1
                resume = True
                goes_back_to, before, kept = None, kept, error.kept
                if kept is not None and kept == before:
                    goes_back_to, kept = kept[0], None
                given["halved_from"] = asked
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
    preset: Preset | None,
    data_folder: str | Path | None,
    resume: bool,
    goes_back_to: int | None,
    can_retry: bool,
    ends_at: float,
    progress: bool,
) -> dict[str, Any]:
    """Trains from the beginning or from where the run of a folder is.

    From a checkpoint within an epoch that has led to no number twice, and may
    have gone wrong itself, the run goes back to after so many whole epochs.
    """
    exists = folder.devices.from_first(folder.config.exists())
    resuming = resume and bool(exists)
    if resuming:
        settings, plan = read_plan(folder, given, preset)
        if "corpus" not in given:
            check_corpus_is_there(settings)
    else:
        settings = DEFAULTS | given
        plan = make_plan(settings, preset or find_preset(settings["preset"]))
    if settings["until_perplexity"] == 1:  # which nothing reaches: none
        settings["until_perplexity"] = None
    if settings["precision"] is None:
        settings["precision"] = "tf32" if has_gpu() else "float32"
    data = load_corpus_of(settings, data_folder)
    check_trainable(plan, settings, data, folder.devices, is_new=not resuming)
    _check_all_train_the_same(folder.devices, settings, plan, data)
    with folder.held(), tf32(settings["precision"] != "float32"):
        if goes_back_to is not None:
            folder.go_back_to_epoch(is_first=goes_back_to == 0)
        return _train_held(
            folder,
            settings,
            plan,
            data,
            resuming=resuming,
            can_retry=can_retry,
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
    can_retry: bool,
    ends_at: float,
    progress: bool,
) -> dict[str, Any]:
    """What no other process may do in this folder at the same time."""
    train_ids = data.train[: settings["train_tokens"]]
    batches = cut_batches(plan, train_ids, settings["seed"], 0)
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
    if resuming:
        begun = _go_on(folder, config, data, model if has_checkpoint else None)
    else:
        begun = Progress()
        folder.create(config, data.vocabulary)
        devices.meet()
    if not has_checkpoint:
        spread_seeds(model, devices)
    # Figures are float32's, in whichever precision a run trains.
    is_narrow = model.dtype_policy.name != "float32"
    reader = figures_of(model) if is_narrow else model
    keeper = Keeper(
        folder,
        Evaluator(reader, 64 if has_gpu() else 20),
        data,
        begun,
        plan=plan,
        patience=settings["patience"],
        until_perplexity=settings["until_perplexity"],
        checkpoint_minutes=settings["checkpoint_minutes"],
        ends_at=ends_at,
        refuses_useless=can_retry,
    )
    if settings["starts_from"] is not None and not has_checkpoint:
        keeper.keep_start(model)
    _tell_what_is_unusual(keeper, settings)
    if keeper.has_ended:
        earlier = read_result(folder)
        if (earlier["status"], earlier["epochs"]) == (
            "finished",
            len(begun.history),
        ):
            return tell_again(earlier, settings, keeper)
    else:
        _warn_of_other_backend(begun)
    times = StepTimes()

    def cut(epoch: int) -> Any:
        if plan.length_std is None:
            return batches  # itself, for which steps are compiled once
        return cut_batches(plan, train_ids, settings["seed"], epoch)

    _fit(model, cut, keeper, times, progress=progress)
    model.forget_steps()
    speed = times.summary(tokens_per_step(batches, plan))
    return take_figures(model, settings, keeper, speed)


# Before training -----------------------------------------------------------


def _go_on(
    folder: RunFolder,
    config: dict[str, Any],
    data: Corpus,
    model: LanguageModel | None,
) -> Progress:
    """What a run has reached, read into the model; None has no checkpoint."""
    _check_same_text(folder, data)
    if model is None:
        _check_nothing_is_lost(folder)
        begun = Progress()
    else:
        begun = load_checkpoint(folder, model)
    folder.update_config(config)
    if not folder.vocabulary.exists() and not folder.devices.rank:
        data.vocabulary.save(folder.vocabulary)  # the text is the same
    return begun


def _tell_what_is_unusual(keeper: Keeper, settings: dict[str, Any]) -> None:
    if settings["softmax"] == "sampled":
        logger.warning(
            "The loss and perplexity of training are estimates, from a sample "
            "of the words; those of valid and test are exact."
        )
    if keeper.early_end and len(keeper.history) < keeper.plan.epochs:
        logger.warning(
            "%s has ended after %d of %d epochs, by %s.",
            keeper.folder.path,
            len(keeper.history),
            keeper.plan.epochs,
            keeper.early_end,
        )


def _warn_of_unseen_gpu() -> None:
    name, driver = device_and_driver()
    backend = keras.config.backend()
    if driver is not None and not has_gpu() and not is_told_to_use_cpu():
        logger.warning(
            "%s does not see the %s that is here, and trains on the processor. "
            "Install its CUDA form: %s (CUDA_VISIBLE_DEVICES=-1 says that the "
            "processor is meant).",
            backend,
            name,
            CUDA_FORMS[backend],
        )


def _warn_of_other_backend(begun: Progress) -> None:
    backend = keras.config.backend()
    if begun.backend not in (None, backend):
        logger.warning(
            "The run goes on with %s from a checkpoint of %s: the same to "
            "rounding but for masks of dropout, not bit for bit.",
            backend,
            begun.backend,
        )


def _default_folder(given: dict[str, Any]) -> Path:
    chosen = DEFAULTS | given
    corpus = Path(chosen["corpus"]).name
    backend = keras.config.backend()
    return Path("runs") / f"{chosen['preset']}-{corpus}-{backend}"


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
        preset=plan.name if plan.name in PRESETS else plan,
        dtype=(
            "mixed_bfloat16"
            if settings["precision"] == "mixed_bfloat16"
            else "float32"
        ),
        **{name: settings[name] for name in names},
    )
    model.build((rows, plan.sequence_length))
    if settings["starts_from"] is not None and afresh:
        _take_weights(model, settings["starts_from"], data, plan.name)
    model.compile(make_optimizer(plan))
    model.optimizer.build(model.trainable_variables)
    if plan.averaging == "always":
        model.optimizer.start_averaging()
    return model


def _take_weights(
    model: LanguageModel, run: str, data: Corpus, name: str
) -> None:
    """Begins with the best weights of another run."""
    trained, vocabulary, config = load_run(run)
    shapes, needed = (
        [tuple(weight.shape) for weight in one.weights]
        for one in (trained, model)
    )
    if shapes != needed or vocabulary.words != data.vocabulary.words:
        raise UserError(
            "The run to start from must have the same architecture and "
            f"vocabulary; {run}, {config['preset']} on {config['corpus']}, has "
            f"others than {name} on {data.name}. Give a run of the "
            "same preset, corpus (--corpus), vocabulary (--max-vocabulary) "
            "and softmax (--softmax, --cutoffs)."
        )
    model.set_weights(trained.get_weights())


def _check_same_text(folder: RunFolder, data: Corpus) -> None:
    config = folder.read_config()
    if data.sha256 != config.get("corpus_sha256"):
        raise UserError(
            f"{folder.path} was started on another text of {data.name} (its "
            "checksums differ). Resume with the same files, with --corpus if "
            "they have moved."
        )


def _check_nothing_is_lost(folder: RunFolder) -> None:
    """Of a run without a checkpoint, which is about to begin anew."""
    # One may have been killed between its first weights and checkpoint, but
    # before a second epoch the first one's checkpoint is waited for.
    if folder.num_epochs_told() > 1 or read_result(folder)["epochs"]:
        raise UserError(
            f"A run goes on from its {folder.checkpoint}, which is gone; it "
            "would begin anew and its best weights be overwritten. Put the "
            "checkpoint back, or train in another folder (--out), with "
            f"--starts-from {folder.path} from these weights."
        )


# Training ------------------------------------------------------------------


def _fit(
    model: LanguageModel,
    cut: Callable[[int], Any],
    keeper: Keeper,
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
    # The same object for the same batches, as steps are compiled by it.
    part_of = lru_cache(maxsize=1)(devices.part)
    with stop_on_interrupt(keeper), keeper.folder.writing_behind():
        try:
            while not (keeper.has_ended or keeper.out_of_time):
                [keeper.asked_to_stop] = devices.any(keeper.is_to_stop)
                if keeper.asked_to_stop:
                    break
                epoch = len(keeper.history)
                batches = cut(epoch)
                keeper.begin_epoch(batches)
                for bar in bars:
                    bar.whole_epoch = len(batches)
                lengths = getattr(batches, "lengths", None)
                if keeper.num_batches:
                    batches = LaterBatches(batches, keeper.num_batches)
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
