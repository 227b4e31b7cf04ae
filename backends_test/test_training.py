"""Runs: what they leave, how they are stopped, and how they go on."""

import csv
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
import weakref
from dataclasses import asdict, replace

import h5py
import keras
import numpy as np
import pytest

from multilstm import (
    PRESETS,
    LanguageModel,
    Vocabulary,
    evaluate,
    fitting,
    load_corpus,
    load_run,
)
from multilstm import keeper as keeper_module
from multilstm import model as model_module
from multilstm import plan as plan_module
from multilstm import results as results_module
from multilstm import train as train_run
from multilstm import training as training_module
from multilstm.config import CONFIG_SCHEMA, DEFAULTS, preset_of
from multilstm.errors import UserError, WriteError
from multilstm.files import write_json
from multilstm.keeper import DivergedError, best_epoch, figures_of
from multilstm.ops import parallel
from multilstm.run_folder import RunFolder, draw_curves
from multilstm.runs import describe_protocol, load_run_corpus, weights_sha256
from multilstm.weights_file import describe_weights

NO_DROPOUT = dict.fromkeys(
    ("input_dropout", "hidden_dropout", "output_dropout"), 0.0
)
# The same run on the same machine; threads may sum in another order.
SAME = {"rtol": 1e-5, "atol": 1e-6}
WHOLE = {}


@pytest.fixture
def train(tiny, corpus_folder, tmp_path):
    """`train` with the smallest preset and corpus, into `tmp_path / out`."""

    def run(out="run", **arguments):
        arguments = {"preset": tiny, "corpus": corpus_folder} | arguments
        return train_run(out=tmp_path / out, progress=False, **arguments)

    return run


@pytest.fixture
def whole(train):
    """The figures and best weights of a run that never stopped, run once."""

    def whole(preset="tiny"):
        if preset not in WHOLE:
            result = train("whole", preset=preset)
            model, *_ = load_run(result["run"])
            WHOLE[preset] = figures(result), model.get_weights()
        return WHOLE[preset]

    return whole


@pytest.fixture
def steps_at_once(monkeypatch):
    """Sets how many steps a run starts at once; by default the backend does."""

    def steps_at_once(number):
        monkeypatch.setattr(fitting, "steps_per_dispatch", lambda flops: number)

    return steps_at_once


class CrashError(Exception):
    """What no part of the package knows."""


def count_steps(monkeypatch):
    """A list with the learning rate of each step, one by one, from here on."""
    rates = []
    end = training_module.StepTimes.on_train_batch_end

    def note(self, batch, logs=None):
        rates.append(float(self.model.optimizer.learning_rate))
        end(self, batch, logs)

    monkeypatch.setattr(training_module.StepTimes, "on_train_batch_end", note)
    return rates


@pytest.fixture
def stop_after(monkeypatch):
    """Makes a run raise an exception right after its n-th checkpoint."""

    def stop_after(number, exception=CrashError):
        save, saved = RunFolder.save_checkpoint, []

        def save_and_stop(self, model, reached):
            save(self, model, reached)
            saved.append(reached.num_batches)
            if len(saved) == number:
                monkeypatch.setattr(RunFolder, "save_checkpoint", save)
                raise exception

        monkeypatch.setattr(RunFolder, "save_checkpoint", save_and_stop)
        return saved

    return stop_after


@pytest.fixture
def interrupt_at(monkeypatch, steps_at_once):
    """Sends SIGINT, as Ctrl-C does, after the n-th dispatch of a run."""
    # What a shell starts in the background ignores SIGINT from its start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt_at(at, times=1, steps=1, number=signal.SIGINT):
        steps_at_once(steps)
        step, steps = training_module.StepTimes.on_train_batch_end, []

        def step_and_interrupt(self, batch, logs=None):
            step(self, batch, logs)
            steps.append(batch)
            if len(steps) == at:
                for _ in range(times):
                    signal.raise_signal(number)

        monkeypatch.setattr(
            training_module.StepTimes, "on_train_batch_end", step_and_interrupt
        )

    yield interrupt_at
    signal.signal(signal.SIGINT, before)


def test_run_stopped_in_its_first_epoch_keeps_what_it_has_learned(
    train, interrupt_at, monkeypatch, tmp_path
):
    """In bfloat16 files are written from another model, in float32."""
    save, trained = RunFolder.save_checkpoint, []

    def save_and_note(self, model, reached):
        save(self, model, reached)
        trained.append(model.get_weights())

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_and_note)
    interrupt_at(3)
    result = train(precision="mixed_bfloat16")
    assert (result["status"], result["epochs"]) == ("interrupted", 0)
    kept = load_run(tmp_path / "run")[0].get_weights()
    for weight, wanted in zip(kept, trained[-1], strict=True):
        np.testing.assert_array_equal(weight, wanted)


def figures(result):
    """What must not depend on how often a run was stopped."""
    names = ("train_perplexity", "valid_perplexity", "learning_rate")
    rows = [[row[name] for name in names] for row in result["history"]]
    return [*np.ravel(rows), result["test_perplexity"]]


# What a run leaves


def test_run_learns_the_rule_of_its_text(train):
    result = train(epochs=8)
    first, *_, last = result["history"]
    assert last["train_perplexity"] < first["train_perplexity"]
    # A letter follows from the one before, a sentence's end does not.
    assert result["test_perplexity"] < result["test_unigram_perplexity"] / 2


def test_run_folder_holds_what_the_result_says(train, corpus_folder, tmp_path):
    result = train()
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "best.weights.h5",
        "checkpoint",
        "config.json",
        "curves.png",
        "history.csv",
        "result.json",
        "vocabulary.json",
    }
    assert json.loads((folder / "result.json").read_text()) == result
    with (folder / "history.csv").open() as file:
        rows = [
            {name: float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
    assert rows == result["history"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    corpus = load_corpus(corpus_folder)
    assert Vocabulary.load(folder / "vocabulary.json") == corpus.vocabulary
    config = json.loads((folder / "config.json").read_text())
    assert config["corpus_sha256"] == corpus.sha256
    assert config["preset_settings"]["units"] == 8


def test_result_record_has_what_the_contract_names(train):
    result = train(epochs=1)
    assert result["schema"] == "multilstm-result-1"
    assert result["status"] == "finished"
    assert result["backend"] == keras.config.backend()
    assert result["versions"]["keras"] == keras.__version__
    assert result["versions"][result["backend"]]
    assert result["precision"] == "float32"
    assert result["preset"] == "tiny"
    assert result["corpus"] == "letters"
    assert result["seed"] == 0
    assert result["kernel"].startswith(keras.config.backend() + ": ")
    assert result["tokens_per_second"] > 0
    assert set(result["step_time_ms"]) == {"median", "p20", "p80", "min"}
    assert "compile_time_seconds" in result
    assert result["peak_memory_mb"] > 0
    assert result["device"].strip()
    assert result["protocol"]["state"].endswith("carried to the last")
    assert result["protocol"]["tuned"]["text"] == "valid"


def test_figures_are_those_of_the_best_weights(train, tmp_path):
    result = train(seed=3)
    model, vocabulary, config = load_run(tmp_path / "run")
    corpus = load_run_corpus(config)
    assert corpus.vocabulary == vocabulary
    best = best_epoch(result["history"])
    for split, figure in (
        ("valid", best["valid_perplexity"]),
        ("valid", result["valid_perplexity"]),
        ("test", result["test_perplexity"]),
    ):
        measured = evaluate(model, corpus.split(split)).perplexity
        # Another compilation of the same model.
        np.testing.assert_allclose(figure, measured, rtol=1e-6)
    assert result["best_epoch"] == best["epoch"]


def test_best_weights_are_not_the_last_where_the_last_are_worse(
    train, tmp_path, monkeypatch
):
    """The rate of the third epoch ruins the model."""
    preset = replace(PRESETS["tiny"], **NO_DROPOUT)  # it only gets better
    monkeypatch.setitem(PRESETS, "tiny", preset)
    rates = {0: 0.01, 1: 0.01, 2: 10.0}
    monkeypatch.setattr(
        type(PRESETS["tiny"]), "learning_rate_of", lambda self, e, *_: rates[e]
    )
    result = train()
    perplexities = [row["valid_perplexity"] for row in result["history"]]
    assert perplexities[1] < perplexities[0] < perplexities[2]
    assert result["best_epoch"] == 2
    model, _, config = load_run(tmp_path / "run")
    measured = evaluate(model, load_run_corpus(config).valid).perplexity
    # Another compilation of the same model.
    np.testing.assert_allclose(measured, perplexities[1], rtol=1e-6)


def test_rates_are_those_of_the_presets_schedule(train, monkeypatch):
    preset = replace(
        PRESETS["tiny"], learning_rate=0.1, learning_rate_decay=0.5
    )
    monkeypatch.setitem(PRESETS, "tiny", replace(preset, decay_after=1))
    rates = [row["learning_rate"] for row in train()["history"]]
    # float32.
    np.testing.assert_allclose(rates, [0.1, 0.05, 0.025], rtol=1e-6)


def test_one_seed_gives_the_same_initial_weights(train):
    checksums = [
        train(out, epochs=1, seed=seed)["initial_weights_sha256"]
        for out, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert checksums[0] == checksums[1] != checksums[2]


def test_checksum_of_weights_changes_with_one_bit():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    before = weights_sha256(model)
    kernel, bias = model.get_weights()
    kernel[0, 0] = np.nextafter(kernel[0, 0], np.float32(9))
    model.set_weights([kernel, bias])
    assert weights_sha256(model) != before


def test_sizes_replace_those_of_the_preset(train):
    result = train(epochs=1, batch_size=2, sequence_length=4)
    history = result["history"]
    assert len(history) == 1
    config = json.loads(
        (RunFolder(result["run"]).path / "config.json").read_text()
    )
    assert config["preset_settings"]["batch_size"] == 2
    assert config["preset_settings"]["sequence_length"] == 4


def test_nothing_is_printed_without_progress(train, capfd):
    train(epochs=1)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_training_stops_where_a_perplexity_is_reached(train, caplog):
    first = train(epochs=1)["history"][0]["valid_perplexity"]
    result = train(epochs=9, until_perplexity=first, resume=True)
    assert (result["status"], result["epochs"]) == ("finished", 1)
    [told] = [line for line in caplog.messages if "has ended" in line]
    assert "ended after 1 of 9 epochs, by --until-perplexity" in told
    assert "Go on with a lower one." in told
    longer = train(epochs=9, until_perplexity=first - 0.01, resume=True)
    history = [row["valid_perplexity"] for row in longer["history"]]
    assert history[-1] < first
    assert all(value > first - 0.01 for value in history[:-1])


def test_training_stops_before_an_epoch_that_would_end_too_late(
    train, whole, monkeypatch
):
    expected, _ = whole()
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    save = RunFolder.save_checkpoint

    def save_after_a_minute(self, model, reached):
        save(self, model, reached)
        now[0] += 60.0

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_after_a_minute)
    first = train(minutes=0.001)
    assert (first["status"], first["epochs"]) == ("finished", 1)
    assert (first["epochs_planned"], first["test_perplexity"] > 1) == (3, True)
    second = train(minutes=1.5, resume=True)  # of which a second epoch is one
    assert (second["status"], second["epochs"]) == ("finished", 2)
    third = train(minutes=3.0, resume=True)
    np.testing.assert_allclose(figures(third), expected, **SAME)


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan])
def test_minutes_are_checked(minutes, train):
    with pytest.raises(UserError, match="`minutes` must be above 0"):
        train(minutes=minutes)


def test_training_stops_when_patience_is_at_its_end(train, monkeypatch, caplog):
    rates = dict.fromkeys(range(9), 0.0) | {0: 0.01}
    monkeypatch.setattr(
        type(PRESETS["tiny"]), "learning_rate_of", lambda self, e, *_: rates[e]
    )
    result = train(epochs=9, patience=2)
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    assert result["best_epoch"] == 1
    assert result["status"] == "finished"
    # It has ended: it does not train one epoch more each time.
    assert train(epochs=9, patience=2, resume=True) == result
    assert "3 of 9 epochs, by --patience 2. Go on with a higher" in caplog.text
    caplog.clear()
    longer = train(patience=3, resume=True)
    assert "has ended" not in caplog.text
    assert [row["epoch"] for row in longer["history"]] == [1, 2, 3, 4]


# Going on


@pytest.mark.parametrize("preset", ["tiny", "tiny_windows", "tiny_awd"])
def test_run_that_goes_on_ends_as_one_that_never_stopped(preset, train, whole):
    expected, expected_weights = whole(preset)
    train("parts", preset=preset, epochs=1)
    parts = train("parts", preset=preset, epochs=3, resume=True)
    np.testing.assert_array_equal(figures(parts), expected)
    best, *_ = load_run(parts["run"])
    for weight, other in zip(best.get_weights(), expected_weights, strict=True):
        np.testing.assert_array_equal(weight, other)


@pytest.mark.parametrize("preset", ["tiny", "tiny_windows", "tiny_awd"])
def test_crash_within_an_epoch_costs_no_more_than_a_checkpoint(
    preset, train, whole, stop_after, monkeypatch, steps_at_once
):
    expected, _ = whole(preset)
    steps_at_once(1)
    saved = stop_after(5)
    with pytest.raises(CrashError):
        train("parts", preset=preset, checkpoint_minutes=0)
    assert saved == [1, 2, 3, 4, 5]
    done = count_steps(monkeypatch)
    parts = train("parts", preset=preset, resume=True)
    np.testing.assert_allclose(figures(parts), expected, **SAME)
    resumed = len(done)
    undisturbed = train("again", preset=preset)
    assert resumed == len(done) - resumed - 5
    # Bit for bit that of a run that starts as many steps at once.
    assert figures(parts) == figures(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_run_cleanly(number, train, interrupt_at, whole):
    expected, _ = whole()
    interrupt_at(4, number=number)
    assert train("parts")["status"] == "interrupted"
    parts = train("parts", resume=True)
    assert parts["status"] == "finished"
    np.testing.assert_allclose(figures(parts), expected, **SAME)


def test_second_process_is_refused_and_told_of_the_first(
    train, tmp_path, monkeypatch
):
    """The lock is of a file that is open, whichever process opened it."""
    message = re.escape(f"trained by process {os.getpid()} on ") + ".*, since "
    save, held = RunFolder.save_checkpoint, []

    def train_there(self, model, reached):
        with pytest.raises(UserError, match=message):
            train(resume=True)
        held.append(reached)
        save(self, model, reached)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", train_there)
        train(epochs=1)
    assert held
    assert train(epochs=1, resume=True)["status"] == "finished"


def test_folder_that_was_moved_is_not_made_anew(train, tmp_path, stop_after):
    class MovedError(Exception):
        pass

    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save = RunFolder.save_checkpoint
    stop_after(2, MovedError)
    with pytest.raises(MovedError):
        train()
    assert not (run / ".holder").exists()
    expected = train(resume=True)

    def save_and_move(self, model, reached):
        save(self, model, reached)
        if len(reached.history) == 2:
            run.rename(elsewhere)

    shutil.rmtree(run)
    RunFolder.save_checkpoint = save_and_move
    try:
        with pytest.raises(WriteError, match="it was removed, moved or"):
            train()
    finally:
        RunFolder.save_checkpoint = save
    assert not run.exists()
    parts = train("elsewhere", resume=True)
    np.testing.assert_allclose(figures(parts), figures(expected), **SAME)


def test_folder_without_its_config_is_told_as_it_is(train, tmp_path):
    run = tmp_path / "run"
    save = RunFolder.save_checkpoint

    def save_and_lose(self, model, reached):
        save(self, model, reached)
        self.config.unlink()

    RunFolder.save_checkpoint = save_and_lose
    try:
        with pytest.raises(
            WriteError, match=r"config.json must stay .*is gone"
        ):
            train()
    finally:
        RunFolder.save_checkpoint = save
    assert run.exists()


def test_result_that_was_lost_tells_kernel_and_speed_again(train, monkeypatch):
    """As of a run that was killed after its last checkpoint."""
    before = train()
    RunFolder(before["run"]).result.unlink()
    for module in (keeper_module, results_module):  # as in another process
        monkeypatch.setattr(module, "last_kernel", lambda: None)
    again = train(resume=True)
    assert before["kernel"] is not None
    assert again["kernel"] == before["kernel"]
    assert again["step_time_ms"] is None
    rows = before["history"]
    tokens = sum(row["tokens_per_second"] * row["seconds"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    # It is rounded to a tenth.
    assert again["tokens_per_second"] == pytest.approx(
        tokens / seconds, abs=0.1
    )


def test_curves_of_short_epochs_are_drawn_first_and_last(train, monkeypatch):
    """To draw them takes a third of a second, more than an epoch may."""
    drawn, draw = [], RunFolder.write_curves

    def count(self, history):
        drawn.append(len(history))
        draw(self, history)

    monkeypatch.setattr(RunFolder, "write_curves", count)
    monkeypatch.setattr(keeper_module, "_SECONDS_BETWEEN_CURVES", 3600.0)
    train()
    assert drawn == [1, 3]


def test_full_disk_is_told_and_costs_no_more_than_a_checkpoint(
    train, whole, monkeypatch
):
    expected, _ = whole()
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="No space left on device"):
            train()
    parts = train(resume=True)
    np.testing.assert_allclose(figures(parts), expected, **SAME)


def test_words_of_an_epoch_are_counted_not_summed_in_float32(
    train, whole, monkeypatch
):
    """As after 67 million words, of which float32 counts 8 at a time."""
    expected, _ = whole()
    add = model_module.Perplexity.add
    monkeypatch.setattr(
        model_module.Perplexity,
        "add",
        lambda self, nats, tokens: add(self, nats, tokens + 1),
    )
    np.testing.assert_allclose(figures(train()), expected, **SAME)


def test_clock_that_goes_back_changes_nothing(train, whole, monkeypatch):
    expected, _ = whole()
    seconds = itertools.count(2e9, -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    result = train()
    np.testing.assert_allclose(figures(result), expected, **SAME)
    assert all(row["seconds"] > 0 for row in result["history"])


def test_gpu_that_is_not_seen_is_told(train, monkeypatch, caplog):
    def told(*, driver, seen):
        monkeypatch.setattr(
            training_module, "device_and_driver", lambda: ("Chip 9", driver)
        )
        monkeypatch.setattr(training_module, "has_gpu", lambda: seen)
        caplog.clear()
        train(f"{driver}-{seen}", epochs=1, precision="float32")
        return [line for line in caplog.messages if "does not see" in line]

    [line] = told(driver="580.1", seen=False)
    backend = keras.config.backend()
    assert line.startswith(f"{backend} does not see the Chip 9 that is here")
    assert "Install its CUDA form: pip" in line
    assert told(driver=None, seen=False) == []
    assert told(driver="580.1", seen=True) == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert told(driver="580.2", seen=False) == []


def test_diverged_run_goes_on_at_half_the_rate(train, tmp_path, caplog):
    result = train(preset="tiny_wild", learning_rate=3e3, retries=20, epochs=1)
    times = sum("This is done now" in line for line in caplog.messages)
    assert 0 < times < 20
    assert result["learning_rate"] == 3e3 / 2**times
    assert math.isfinite(result["test_perplexity"])


def test_finite_weights_of_no_use_are_tried_again_at_half_the_rate(
    train, monkeypatch, caplog
):
    """Clipped gradients let a rate that is too high lead there."""
    preset = replace(PRESETS["tiny_wild"], clip_norm=1.0)
    monkeypatch.setitem(PRESETS, "tiny_wild", preset)
    command = {"preset": "tiny_wild", "learning_rate": 300.0, "epochs": 2}
    result = train(**command, retries=20)
    told = [line for line in caplog.messages if "This is done now" in line]
    assert 0 < len(told) < 20
    assert "less than a guess among 9 words has" in told[-1]
    assert result["learning_rate"] == 300 / 2 ** len(told)
    valid = [row["valid_perplexity"] for row in result["history"]]
    assert max(valid) <= 81


def test_weights_of_no_use_are_told_once(train, monkeypatch, caplog):
    preset = replace(PRESETS["tiny_wild"], clip_norm=1.0)
    monkeypatch.setitem(PRESETS, "tiny_wild", preset)
    result = train(preset="tiny_wild", learning_rate=100.0, epochs=2)
    assert result["epochs"] == 2
    [line] = [line for line in caplog.messages if "a guess among" in line]
    assert "Lower the learning rate (--learning-rate, 100 here)" in line


@pytest.mark.parametrize("epoch", [1, 2])
def test_epoch_begins_anew_where_a_checkpoint_in_it_leads_nowhere(
    epoch, train, tmp_path, monkeypatch, caplog
):
    """One with finite weights, from which no rate leads on."""
    monkeypatch.setattr(fitting, "steps_per_dispatch", lambda flops: 1)
    batch_end = keeper_module.Keeper.on_train_batch_end
    seen, failed = [], []

    def fail_at_the_fourth(self, batch, logs):
        place = (len(self.history) + 1, self._first_batch + batch + 1)
        seen.append(place)
        if place == (epoch, 4) and len(failed) < 2:
            failed.append(place)
            logs = {"loss": math.inf}
        batch_end(self, batch, logs)

    monkeypatch.setattr(
        keeper_module.Keeper, "on_train_batch_end", fail_at_the_fourth
    )
    result = train(epochs=2, retries=3, checkpoint_minutes=0)
    assert result["epochs"] == 2
    of_epoch = [number for at, number in seen if at == epoch]
    assert of_epoch[:8] == [1, 2, 3, 4, 4, 1, 2, 3]
    assert of_epoch[5:] == list(range(1, len(of_epoch) - 4))
    assert any("the epoch begins anew" in line for line in caplog.messages)
    assert (tmp_path / "run" / "checkpoint" / "diverged.npz").exists()
    rate = PRESETS["tiny"].learning_rate / 4
    assert result["history"][-1]["learning_rate"] <= rate


def test_checkpoint_that_leads_on_is_gone_on_from_again(
    train, monkeypatch, caplog
):
    """To fail twice in an epoch, each time after another one, is no reason."""
    monkeypatch.setattr(fitting, "steps_per_dispatch", lambda flops: 1)
    batch_end = keeper_module.Keeper.on_train_batch_end
    seen, failed = [], set()

    def fail_once_at(self, batch, logs):
        number = self._first_batch + batch + 1
        seen.append(number)
        if number in {3, 5} - failed:
            failed.add(number)
            logs = {"loss": math.inf}
        batch_end(self, batch, logs)

    monkeypatch.setattr(
        keeper_module.Keeper, "on_train_batch_end", fail_once_at
    )
    train(epochs=1, retries=3, checkpoint_minutes=0)
    assert seen[:8] == [1, 2, 3, 3, 4, 5, 5, 6]
    assert not any("begins anew" in line for line in caplog.messages)


def test_diverged_run_keeps_the_end_of_an_epoch(train, tmp_path, caplog):
    """However often it fails from there: the rate may still be too high."""
    train(preset="tiny_wild", learning_rate=0.5, epochs=1)
    with pytest.raises(DivergedError, match=r"after epoch 1 is kept in .*last"):
        train(
            preset="tiny_wild",
            learning_rate=1e30,
            retries=4,
            epochs=2,
            resume=True,
        )
    assert not any("begins anew" in line for line in caplog.messages)


def test_huge_perplexity_is_drawn(tmp_path):
    figure = draw_curves(
        {
            "run": [
                {"epoch": 1, "train_perplexity": 8.5, "valid_perplexity": 9.0},
                {"epoch": 2, "train_perplexity": 1e300, "valid_perplexity": 9},
                {
                    "epoch": 3,
                    "train_perplexity": math.inf,
                    "valid_perplexity": 1e307,
                },
            ]
        }
    )
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_halved_rate_stays_where_the_command_is_given_again(train, caplog):
    command = {"preset": "tiny_wild", "learning_rate": 3e3, "retries": 20}
    halved = train(**command, epochs=1)["learning_rate"]
    again = train(**command, epochs=2, resume=True)
    assert again["learning_rate"] <= halved
    assert f"The learning rate stays {halved:g}" in caplog.text
    command["learning_rate"] = halved / 3000  # far from where it diverges
    other = train(**command, epochs=3, resume=True)
    assert other["learning_rate"] == halved / 3000
    command |= {"learning_rate": 3e3, "retries": 0}
    with pytest.raises(DivergedError):  # asked for anew, and taken
        train(**command, epochs=4, resume=True)


def test_rate_that_was_asked_for_is_noted_however_often_it_is_halved(
    train, monkeypatch
):
    """In a command that was given again, and runs at what is left of it."""
    calls = []

    def diverge(folder, given, **_):
        calls.append((given["learning_rate"], given.get("halved_from")))
        raise DivergedError("no number", 750.0, False)

    monkeypatch.setattr(training_module, "_train", diverge)
    with pytest.raises(DivergedError):
        train(learning_rate=3e3, retries=2)
    assert calls == [(3e3, None), (375.0, 3e3), (375.0, 3e3)]


def test_rate_that_was_asked_for_outlasts_retries_without_one(tmp_path):
    """By `--resume` alone; the first command, given again, still tells it."""
    folder = RunFolder(tmp_path)
    config = {"preset_settings": asdict(PRESETS["small"]), "preset": "small"}
    config |= {"learning_rate": 375.0, "halved_from": 3e3}
    write_json(folder.config, {"schema": CONFIG_SCHEMA} | config)
    for given, rate, halved_from in (
        ({"learning_rate": 187.5, "halved_from": None}, 187.5, 3e3),
        ({"learning_rate": 3e3}, 375.0, 3e3),
        ({"learning_rate": 1.0}, 1.0, None),
        ({}, 375.0, 3e3),
    ):
        settings, _ = plan_module.read_plan(folder, given)
        assert settings["learning_rate"] == rate
        assert settings["halved_from"] == halved_from


@pytest.mark.parametrize(("stopped", "times"), [(False, 3), (True, 1)])
def test_run_that_was_stopped_is_not_tried_again(
    stopped, times, train, monkeypatch
):
    calls = []

    def diverge(*_, **settings):
        calls.append(settings["resume"])
        raise DivergedError("no number", 1.0, stopped)

    monkeypatch.setattr(training_module, "_train", diverge)
    with pytest.raises(DivergedError):
        train(retries=2)
    assert calls == [False, True, True][:times]


def test_model_that_diverged_is_freed_before_the_next(train, monkeypatch):
    build, models, alive = training_module._build, [], []

    def note(*arguments, **settings):
        alive.append(sum(model() is not None for model in models))
        model = build(*arguments, **settings)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(training_module, "_build", note)
    with pytest.raises(DivergedError):
        train(preset="tiny_wild", retries=2)
    assert alive == [0, 0, 0]


def test_run_that_is_out_of_time_is_not_tried_again(train, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    calls = []

    def diverge(*_, **settings):
        calls.append(settings["resume"])
        now[0] += 60.0
        raise DivergedError("no number", 1.0, False)

    monkeypatch.setattr(training_module, "_train", diverge)
    with pytest.raises(DivergedError):
        train(retries=9, minutes=1.5)
    assert calls == [False, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patience", 1.5),
        ("max_vocabulary", 20.5),
        ("train_tokens", 100.0),
        ("until_perplexity", "low"),
        ("precision", "float16"),
    ],
)
def test_settings_of_another_kind_leave_no_folder(name, value, train, tmp_path):
    """A run that was trained with them could not be read, nor gone on with."""
    with pytest.raises(UserError, match=f"`{name}` of a run must be .*receiv"):
        train(**{name: value})
    assert not (tmp_path / "run").exists()


def test_retries_come_to_an_end(train, caplog):
    with pytest.raises(DivergedError, match="Lower the learning rate"):
        train(preset="tiny_wild", retries=2)
    assert sum("This is done now" in line for line in caplog.messages) == 2
    with pytest.raises(UserError, match="`retries` must be a whole number"):
        train(retries=-1)


@pytest.mark.parametrize("minutes", [-1.0, math.nan, math.inf])
def test_time_between_checkpoints_is_checked(minutes, train):
    with pytest.raises(UserError, match=r"`checkpoint_minutes`.* must be"):
        train(checkpoint_minutes=minutes)


@pytest.mark.parametrize(
    ("dispatch", "steps"),
    [(4, 1), (100, 1), (2, 16), (3, 16)],
    ids=str,
)
def test_interrupted_run_stops_cleanly_and_goes_on(
    dispatch, steps, train, whole, interrupt_at
):
    if steps > 1 and keras.config.backend() == "torch":
        pytest.skip("Keras's fit takes one step at a time on PyTorch")
    expected, weights = whole()
    interrupt_at(dispatch, steps=steps)
    stopped = train("parts")
    assert stopped["status"] == "interrupted"
    assert stopped["test_perplexity"] is None
    assert stopped["epochs"] == {100: 2, 3: 1}.get(dispatch, 0)
    on_disk = json.loads(RunFolder(stopped["run"]).result.read_text())
    assert on_disk == stopped
    model, *_ = load_run(stopped["run"])  # what it had can be used
    assert [w.shape for w in model.get_weights()] == [w.shape for w in weights]
    parts = train("parts", resume=True)
    assert parts["status"] == "finished"
    np.testing.assert_allclose(figures(parts), expected, **SAME)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_at_the_end_of_an_epoch_loses_nothing(
    train, interrupt_at, monkeypatch
):
    steps_per_epoch = 40
    interrupt_at(steps_per_epoch)
    ends = []
    stop = keeper_module.Keeper.on_epoch_end

    def note(self, epoch, logs):
        ends.append(self.num_batches)
        stop(self, epoch, logs)

    monkeypatch.setattr(keeper_module.Keeper, "on_epoch_end", note)
    stopped = train()
    assert ends == [steps_per_epoch]
    assert stopped["epochs"] == 1
    assert stopped["status"] == "interrupted"
    assert stopped["valid_perplexity"] is not None


def test_stop_before_the_first_batch_leaves_a_run_to_go_on(
    train, whole, monkeypatch
):
    expected, _ = whole()
    begin = keeper_module.Keeper.__init__

    def begin_and_stop(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        self.signalled = True

    with monkeypatch.context() as patch:
        patch.setattr(keeper_module.Keeper, "__init__", begin_and_stop)
        result = train()
    assert (result["status"], result["best_epoch"]) == ("interrupted", None)
    parts = train(resume=True)
    np.testing.assert_allclose(figures(parts), expected, **SAME)


def test_signal_that_comes_twice_at_once_is_one(train, interrupt_at):
    """`timeout` sends it to a process, and again to its group."""
    interrupt_at(4, times=2)
    assert train()["status"] == "interrupted"


def test_weights_that_a_lost_epoch_left_are_told_as_what_they_are(
    train, tmp_path, monkeypatch
):
    """Killed between weights and checkpoint, and the epoch then went worse."""
    train(epochs=1)
    folder = RunFolder(tmp_path / "run")
    model, *_ = load_run(folder.path)
    folder.save_best_weights(model, 2, 8.9)
    result = train(epochs=2, resume=True)
    row = result["history"][1]
    assert row["valid_perplexity"] < 8.9
    assert result["valid_perplexity"] == row["valid_perplexity"]
    assert result["best_epoch"] == 2
    monkeypatch.setattr(
        type(PRESETS["tiny"]), "learning_rate_of", lambda *_: 10.0
    )
    folder.save_best_weights(model, 3, 1.5)
    result = train(epochs=3, resume=True)
    assert (result["best_epoch"], result["valid_perplexity"]) == (None, 1.5)
    assert result["history"][2]["valid_perplexity"] > 1.5


def damage(path):
    """Flips a bit of the last weights or state in a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_better_weights_outlive_a_checkpoint_that_is_lost(
    train, tmp_path, caplog
):
    """What is trained again goes worse."""
    expected = train()
    folder = RunFolder(tmp_path / "run")
    best = folder.best_weights.read_bytes()
    damage(folder.checkpoint)
    result = train(learning_rate=1e-4, resume=True)
    assert folder.best_weights.read_bytes() == best
    assert result["history"][:2] == expected["history"][:2]
    kept = expected["valid_perplexity"]
    rows = [row["valid_perplexity"] for row in result["history"]]
    assert kept < rows[2] < rows[1]
    # Those of the weights that are kept, of which the history has no epoch.
    assert (result["valid_perplexity"], result["best_epoch"]) == (kept, None)
    assert result["test_perplexity"] == expected["test_perplexity"]
    told = [line for line in caplog.messages if "is of epoch 3" in line]
    assert len(told) == 1
    assert f"perplexity {kept:.2f}" in told[0]


def test_epoch_that_is_trained_again_the_same_is_the_best(
    train, tmp_path, monkeypatch
):
    expected = train()
    damage(RunFolder(tmp_path / "run").checkpoint)
    saved = []
    monkeypatch.setattr(
        RunFolder, "save_best_weights", lambda *about: saved.append(about)
    )
    result = train(resume=True)
    assert figures(result) == figures(expected)
    assert result["best_epoch"] == expected["best_epoch"] == 3
    assert not saved


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"best\.weights\.h5 is gone\. The next"),
        (damage, "best.weights.h5 cannot be read.* The next epoch writes"),
        (lambda path: path.write_bytes(b"no HDF5"), "be read.* The next epoch"),
    ],
    ids=["gone", "damaged", "another"],
)
def test_best_weights_that_are_lost_are_told_and_written_anew(
    spoil, message, train, tmp_path, caplog
):
    train(epochs=2)
    folder = RunFolder(tmp_path / "run")
    spoil(folder.best_weights)
    result = train(epochs=3, learning_rate=1.0, resume=True)
    assert sum(bool(re.search(message, m)) for m in caplog.messages) == 1
    first, *_, last = result["history"]
    assert last["valid_perplexity"] > first["valid_perplexity"]
    assert result["best_epoch"] == 3
    model, _, config = load_run(folder.path)
    measured = evaluate(model, load_run_corpus(config).valid).perplexity
    # Another compilation of the same model.
    np.testing.assert_allclose(measured, last["valid_perplexity"], rtol=1e-6)


def test_best_weights_that_cannot_be_read_now_are_kept(
    train, tmp_path, monkeypatch
):
    train(epochs=1)
    best = RunFolder(tmp_path / "run").best_weights
    before = best.read_bytes()
    open_file = h5py.File

    def refuse(path, *mode, **settings):
        if path == best:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, *mode, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", refuse)
        with pytest.raises(UserError, match="Permission denied"):
            train(epochs=2, resume=True)
    assert best.read_bytes() == before


def test_run_that_has_ended_without_its_weights_says_how_to_go_on(
    train, tmp_path
):
    train(epochs=1)
    folder = RunFolder(tmp_path / "run")
    folder.best_weights.unlink()
    folder.result.unlink()
    message = "is gone, after 1 epochs.*--resume and more --epochs"
    with pytest.raises(UserError, match=message):
        train(resume=True)
    assert train(epochs=2, resume=True)["best_epoch"] == 2


def test_vocabulary_that_is_lost_is_written_anew(train, tmp_path):
    train(epochs=1)
    vocabulary = RunFolder(tmp_path / "run").vocabulary
    before = vocabulary.read_bytes()
    vocabulary.unlink()
    assert train(epochs=2, resume=True)["status"] == "finished"
    assert vocabulary.read_bytes() == before


def test_second_interrupt_ends_at_once(train, interrupt_at, monkeypatch):
    monkeypatch.setattr(keeper_module, "_SECONDS_OF_ONE_SIGNAL", 0.0)
    interrupt_at(4, times=2)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_finished_run_is_not_trained_again(train, stop_after):
    expected = train()
    stop_after(1)  # a checkpoint would fail
    assert train(resume=True) == expected


def test_another_backend_is_told_of_where_it_trains(train, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(keras.config, "backend", lambda: "other")
        train(epochs=1)
    train(resume=True)
    assert "goes on with" not in caplog.text
    train(epochs=2, resume=True)
    backend = keras.config.backend()
    told = f"The run goes on with {backend} from a checkpoint of other: the"
    assert told in caplog.text


def test_run_remembers_for_how_long_it_was_asked_to_go_on(
    train, whole, interrupt_at
):
    expected, _ = whole()
    train("parts", epochs=1)
    interrupt_at(50)
    stopped = train("parts", epochs=3, resume=True)
    assert (stopped["status"], stopped["epochs"]) == ("interrupted", 2)
    parts = train("parts", resume=True)
    np.testing.assert_allclose(figures(parts), expected, **SAME)


def test_result_of_fewer_epochs_is_not_given_for_more(train, stop_after):
    train(epochs=1)
    stop_after(1, KeyboardInterrupt)  # the second epoch is on the disk
    with pytest.raises(KeyboardInterrupt):
        train(epochs=2, resume=True)
    result = train(resume=True)
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    assert result["epochs"] == 2


def test_interrupted_run_may_end_where_it_is(train, interrupt_at):
    interrupt_at(50)
    assert train()["status"] == "interrupted"
    result = train(epochs=1, resume=True)
    assert (result["status"], result["epochs"]) == ("finished", 1)
    assert result["test_perplexity"] > 1


def test_run_keeps_the_preset_that_it_began_with(train, whole, monkeypatch):
    expected, _ = whole()
    train("parts", epochs=1)
    other = replace(PRESETS["tiny"], learning_rate=9.0, units=5)
    monkeypatch.setitem(PRESETS, "tiny", other)
    parts = train("parts", epochs=3, resume=True)
    np.testing.assert_allclose(figures(parts), expected, **SAME)


def test_learning_rate_replaces_that_of_the_preset(train):
    result = train(epochs=1, learning_rate=0.001)
    assert result["learning_rate"] == 0.001
    again = train(epochs=2, learning_rate=0.002, resume=True)
    rates = [row["learning_rate"] for row in again["history"]]
    # float32.
    np.testing.assert_allclose(rates, [0.001, 0.002], rtol=1e-6)


def test_resume_starts_a_run_where_there_is_none(train):
    assert train(epochs=1, resume=True)["epochs"] == 1


def test_result_is_made_where_only_that_was_missing(train, tmp_path):
    expected = train(epochs=1)
    (tmp_path / "run" / "result.json").unlink()
    again = train(resume=True)
    assert again["test_perplexity"] == expected["test_perplexity"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"schema": "multilstm-result-1"}', "lacks backend, best_epoch"),
        ('{"schema": "multilstm-result-0"}', "must have the schema"),
    ],
    ids=["torn", "incomplete", "another"],
)
def test_result_that_is_damaged_is_made_anew(
    content, message, train, tmp_path, caplog
):
    expected = train(epochs=2)
    folder = RunFolder(tmp_path / "run")
    folder.result.write_text(content)
    again = train(resume=True)
    assert again["test_perplexity"] == expected["test_perplexity"]
    assert json.loads(folder.result.read_text()) == again
    [told] = [line for line in caplog.messages if "made anew" in line]
    assert re.search(rf"result\.json .*{message}.* It is made anew\.", told)
    # And where the checkpoint is gone, the other files tell of two epochs.
    folder.result.write_text(content)
    shutil.rmtree(folder.checkpoint.parent)
    with pytest.raises(UserError, match="which is gone"):
        train(epochs=3, resume=True)
    folder.best_weights.unlink()
    folder.history.unlink()
    assert train(epochs=1, resume=True)["epochs"] == 1


def test_result_is_of_the_options_that_the_run_has_now(train, tmp_path):
    """Which end a run that had no more time."""
    first = train(epochs=3, minutes=1e-6)
    assert (first["epochs"], first["is_out_of_time"]) == (1, True)
    again = train(epochs=1, resume=True)
    changed = {"epochs_planned": 1, "is_out_of_time": False}
    assert again == first | changed
    file = tmp_path / "run" / "result.json"
    assert json.loads(file.read_text()) == again
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = train("moved", resume=True)
    assert moved == again | {"run": str(tmp_path / "moved")}


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_model_is_copied_once_for_all_that_is_saved(
    precision, train, monkeypatch
):
    """To build one takes longer than to write it; it is not compiled."""
    copies, saved = [], []
    save = RunFolder.save_best_weights

    def note(model):
        copies.append(model)
        return figures_of(model)

    def save_and_note(self, model, *about):
        saved.append([weight.copy() for weight in model.get_weights()])
        save(self, model, *about)

    for module in (keeper_module, training_module):
        monkeypatch.setattr(module, "figures_of", note)
    monkeypatch.setattr(RunFolder, "save_best_weights", save_and_note)
    result = train(precision=precision)
    assert len(copies) == 1
    assert len(saved) > 1
    assert not np.array_equal(saved[0][0], saved[1][0])
    best, *_ = load_run(result["run"])
    for weight, last in zip(best.get_weights(), saved[-1], strict=True):
        np.testing.assert_array_equal(weight, last)


def test_kernel_is_that_of_training(train, monkeypatch):
    """Validation may run another one, where it is in float32."""
    kernels = iter(["trains", "validates"])
    monkeypatch.setattr(keeper_module, "last_kernel", lambda: next(kernels))
    assert train(epochs=2)["kernel"] == "trains"


# Runs that go wrong


def test_run_whose_checkpoint_is_gone_is_not_begun_anew(train, tmp_path):
    train(epochs=2)
    folder = RunFolder(tmp_path / "run")
    best = folder.best_weights.read_bytes()
    shutil.rmtree(folder.checkpoint.parent)
    with pytest.raises(UserError, match=r"last\.npz, which is gone"):
        train(epochs=3, resume=True)
    assert folder.best_weights.read_bytes() == best
    folder.result.unlink()  # as of a run that was killed
    with h5py.File(folder.best_weights, "r+") as file:
        file.attrs["epoch"] = 1  # and the history tells of more
    with pytest.raises(UserError, match="which is gone"):
        train(epochs=3, resume=True)


def test_run_killed_before_its_first_checkpoint_begins_anew(train, tmp_path):
    expected = train(epochs=1)
    folder = RunFolder(tmp_path / "run")
    shutil.rmtree(folder.checkpoint.parent)
    folder.result.unlink()
    again = train(resume=True)
    np.testing.assert_allclose(
        again["test_perplexity"], expected["test_perplexity"], **SAME
    )


@pytest.mark.parametrize("name", ["max_epochs", "max_steps_per_epoch"])
def test_limits_of_keras_for_debugging_are_refused(name, train, monkeypatch):
    monkeypatch.setattr(keras.config, name, lambda: 2)
    with pytest.raises(UserError, match="KERAS_MAX_EPOCHS or"):
        train()


@pytest.mark.parametrize("good_epochs", [0, 1])
def test_loss_that_is_no_number_stops_the_run(
    good_epochs, train, tmp_path, monkeypatch
):
    if good_epochs:
        train(epochs=good_epochs)
        before = RunFolder(tmp_path / "run").checkpoint.read_bytes()
    monkeypatch.setattr(
        type(PRESETS["tiny"]), "learning_rate_of", lambda *_: np.inf
    )
    kept = "epoch 1 is kept" if good_epochs else "no epoch was completed"
    message = f"became nan in epoch {good_epochs + 1}, batch .*{kept}"
    with pytest.raises(DivergedError, match=message):
        train(epochs=3, resume=True)
    folder = RunFolder(tmp_path / "run")
    assert folder.checkpoint.exists() == bool(good_epochs)
    if good_epochs:
        assert folder.checkpoint.read_bytes() == before
        load_run(folder.path)


def test_weights_that_are_no_numbers_are_not_kept(
    train, monkeypatch, steps_at_once
):
    """The loss of their batch was a number still."""
    steps_at_once(1)
    step, steps = training_module.StepTimes.on_train_batch_end, []

    def step_and_ruin(self, batch, logs=None):
        step(self, batch, logs)
        steps.append(batch)
        if len(steps) == 5:
            keeper_module.sync_variables(self.model)
            self.model.projection.bias.assign(np.full(9, np.nan))

    with monkeypatch.context() as patch:
        patch.setattr(
            training_module.StepTimes, "on_train_batch_end", step_and_ruin
        )
        message = "nan in epoch 1, batch 5; .* after batch 4 of epoch 1 is kept"
        with pytest.raises(DivergedError, match=message):
            train(checkpoint_minutes=0)
    assert train(resume=True)["status"] == "finished"


def test_folder_with_a_run_is_left_as_it_is(train, tmp_path):
    train(epochs=1)
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        train(epochs=1)
    for path, content in before.items():
        assert path.read_bytes() == content


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "best.weights.h5",
        "checkpoint/last.npz",
        "checkpoint/previous.npz",
        "result.json",
    ],
)
def test_a_run_without_its_config_is_not_trained_over(
    name, resume, train, tmp_path
):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of days")
    with pytest.raises(
        UserError, match=rf"{name} is of .*config\.json is gone"
    ):
        train(epochs=1, resume=resume)
    assert path.read_bytes() == b"of days"
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "before", "value"),
    [
        ("preset", "tiny", "tiny_windows"),
        ("seed", 0, 4),
        ("batch_size", 3, 4),
    ],
)
def test_run_goes_on_with_its_own_settings_alone(name, before, value, train):
    train(epochs=1)
    message = f"started with {name}={before!r}; received {value!r}"
    with pytest.raises(UserError, match=message):
        train(resume=True, **{name: value})


def test_run_goes_on_where_it_is_told_what_its_preset_says(train, whole):
    expected, _ = whole()
    train(epochs=1)
    sizes = {"batch_size": 3, "sequence_length": 5}
    parts = train(epochs=3, resume=True, gradient_accumulation_steps=1, **sizes)
    np.testing.assert_allclose(figures(parts), expected, **SAME)


def test_run_goes_on_where_its_corpus_was_moved(
    train, whole, corpus_folder, tmp_path
):
    expected, _ = whole()
    train(epochs=1)
    moved = corpus_folder.rename(tmp_path / "moved")
    message = f"trained on the corpus in {corpus_folder}, which .* --corpus"
    with pytest.raises(UserError, match=message):
        train(corpus=None, resume=True)
    with pytest.raises(UserError, match="which is no folder"):
        train(resume=True)
    with pytest.raises(UserError, match=message):
        load_run_corpus(load_run(tmp_path / "run")[2])
    result = train(corpus=moved, epochs=3, resume=True)
    assert result["corpus"] == "moved"
    np.testing.assert_allclose(figures(result), expected, **SAME)
    assert train(corpus=None, resume=True)["corpus"] == "moved"


def test_run_does_not_go_on_with_another_text(train, corpus_folder, tmp_path):
    train(epochs=1)
    with (corpus_folder / "train.txt").open("a") as file:
        file.write("a b c\n")
    with pytest.raises(UserError, match="on another text of letters"):
        train(resume=True)
    _, _, config = load_run(tmp_path / "run")
    with pytest.raises(UserError, match="its checksums differ"):
        load_run_corpus(config)


def test_rate_that_is_lowered_holds_within_an_epoch_too(
    train, stop_after, steps_at_once, monkeypatch
):
    steps_at_once(1)
    stop_after(2)
    with pytest.raises(CrashError):
        train(epochs=1, checkpoint_minutes=0)
    rates = count_steps(monkeypatch)
    train(epochs=1, resume=True, learning_rate=1e-4)
    assert rates
    # float32.
    np.testing.assert_allclose(rates, 1e-4, rtol=1e-6)


def test_run_of_an_older_version_goes_on(train, tmp_path):
    train(epochs=1)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["preset_settings"]["loss"]
    config["preset_settings"]["loss_sum_over_time"] = False
    path.write_text(json.dumps(config))
    assert train(epochs=2, resume=True)["epochs"] == 2
    config["preset_settings"]["loss_sum_over_time"] = True
    assert preset_of(config).loss == "sum_over_time"


@pytest.mark.skipif(
    keras.config.backend() == "torch", reason="PyTorch compiles no steps"
)
@pytest.mark.parametrize("preset", ["tiny", "tiny_awd"])
def test_later_epochs_compile_no_step_anew(preset, train, monkeypatch):
    """A step's Python runs when it is traced, and then no more."""
    lengths, traced = set(), []
    step = model_module.LanguageModel.train_step

    def count(self, *arguments):
        traced.append(len(epochs))
        return step(self, *arguments)

    monkeypatch.setattr(model_module.LanguageModel, "train_step", count)
    epochs = []
    begin = keeper_module.Keeper.begin_epoch

    def note(self, batches):
        begin(self, batches)
        epochs.append(batches)
        lengths.update(getattr(batches, "lengths", [0]))

    monkeypatch.setattr(keeper_module.Keeper, "begin_epoch", note)
    train(preset=preset, epochs=4)
    assert len(epochs) == 4
    # JAX's lengths are compiled when they first come.
    assert len(traced) <= 2 + len(lengths)
    if preset == "tiny":
        assert set(traced) == {1}


# What published recipes need


@pytest.fixture
def optimizers(monkeypatch):
    """Those that runs make, in order."""
    made = []
    make = training_module.make_optimizer

    def make_and_keep(plan):
        made.append(make(plan))
        return made[-1]

    monkeypatch.setattr(training_module, "make_optimizer", make_and_keep)
    return made


def test_averages_are_what_is_evaluated_and_kept(
    train, optimizers, monkeypatch
):
    preset = replace(
        PRESETS["tiny_awd"], averaging="always", averaging_power=[2.0]
    )
    monkeypatch.setitem(PRESETS, "tiny_awd", preset)
    result = train(preset="tiny_awd", epochs=1)
    [optimizer] = optimizers
    assert optimizer.averaging_powers == (2.0,)
    [row] = result["history"]
    assert row["averaged_steps"] == int(optimizer.num_averaged) > 5
    model, _, config = load_run(result["run"])
    for weight, average in zip(
        model.weights, optimizer.averages_of[0], strict=True
    ):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(weight),
            keras.ops.convert_to_numpy(average),
        )
    valid = evaluate(model, load_run_corpus(config).valid).perplexity
    assert row["valid_perplexity"] == pytest.approx(valid, rel=1e-5)


@pytest.mark.parametrize("powers", [(0.0, 60.0), (60.0, 0.0)])
def test_of_several_averages_the_best_is_taken(
    powers, train, optimizers, monkeypatch
):
    preset = replace(
        PRESETS["tiny_awd"], averaging="always", averaging_power=powers
    )
    monkeypatch.setitem(PRESETS, "tiny_awd", preset)
    result = train(preset="tiny_awd", epochs=1)
    [row] = result["history"]
    model, _, config = load_run(result["run"])
    valid = load_run_corpus(config).valid
    assert row["valid_perplexity"] == pytest.approx(
        evaluate(model, valid).perplexity, rel=1e-5
    )
    [optimizer] = optimizers
    of_each = []
    for averages in optimizer.averages_of:
        for weight, average in zip(model.weights, averages, strict=True):
            weight.assign(keras.ops.convert_to_numpy(average))
        of_each.append(evaluate(model, valid).perplexity)
    # The mean of all weights since the start is far behind.
    assert max(of_each) > 1.005 * min(of_each)
    assert row["valid_perplexity"] == pytest.approx(min(of_each), rel=1e-5)
    assert row["averaging_power"] == powers[np.argmin(of_each)] == 60.0
    chosen = result["protocol"]["tuned"]["what"]
    assert "which average is evaluated and kept" in chosen


def test_averaging_begins_where_the_validation_is_not_monotone(
    train, monkeypatch
):
    preset = replace(PRESETS["tiny_awd"], plateau_factor=None)
    monkeypatch.setitem(PRESETS, "tiny_awd", preset)
    rows = train(preset="tiny_awd", epochs=5)["history"]
    valid = [row["valid_perplexity"] for row in rows]
    worse = [preset.is_non_monotone(valid[:n]) for n in range(1, len(valid))]
    first = worse.index(True) + 1  # the first epoch that is averaged
    averaged = [row["averaged_steps"] for row in rows]
    assert averaged[:first] == [0.0] * first
    assert 0 < averaged[first] < averaged[-1]


def test_training_may_end_where_the_validation_is_not_monotone(
    train, monkeypatch, caplog
):
    preset = replace(PRESETS["tiny_awd"], stops_non_monotone=True)
    monkeypatch.setitem(PRESETS, "tiny_awd", preset)
    result = train(preset="tiny_awd", epochs=30)
    valid = [row["valid_perplexity"] for row in result["history"]]
    assert result["status"] == "finished"
    assert len(valid) < 30
    assert preset.is_non_monotone(valid)
    assert not preset.is_non_monotone(valid[:-1])
    again = train(preset="tiny_awd", epochs=31, resume=True)
    assert again["history"] == result["history"]
    assert "of 31 epochs, by the rule of tiny_awd" in caplog.text


def test_run_begins_with_the_best_weights_of_another(
    train, tmp_path, monkeypatch
):
    before = train("before", epochs=1)
    model, *_ = load_run(before["run"])
    preset = replace(PRESETS["tiny"], starts_from="tiny")
    monkeypatch.setitem(PRESETS, "tiny", preset)
    result = train("after", epochs=1, starts_from=before["run"])
    assert result["initial_weights_sha256"] == weights_sha256(model)
    # That run is not needed any more, and is the best that there is so far.
    (tmp_path / "before").rename(tmp_path / "moved")
    worse = train("after", epochs=2, resume=True, learning_rate=3.0)
    assert worse["epochs"] == 2
    wild = train(
        "wild", epochs=1, starts_from=tmp_path / "moved", learning_rate=3.0
    )
    assert wild["best_epoch"] == 0
    assert wild["valid_perplexity"] == pytest.approx(
        before["valid_perplexity"], rel=1e-6
    )
    assert wild["test_perplexity"] == pytest.approx(
        before["test_perplexity"], rel=1e-6
    )
    with pytest.raises(UserError, match=r"--starts-from"):
        train("alone", epochs=1)
    with pytest.raises(UserError, match="others"):
        train("other", preset="tiny_awd", starts_from=tmp_path / "moved")


def test_better_weights_than_the_start_stay_where_a_run_was_killed(
    train, tmp_path, monkeypatch
):
    """After the first epoch's best weights and before its checkpoint."""
    before = train("before", epochs=1, learning_rate=1e-4)
    save = RunFolder.save_checkpoint
    monkeypatch.setattr(
        RunFolder, "save_checkpoint", lambda *_: 1 / 0, raising=True
    )
    with pytest.raises(ZeroDivisionError):
        train("after", epochs=1, starts_from=before["run"])
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    path = tmp_path / "after" / "best.weights.h5"
    kept = describe_weights(path)
    assert kept["epoch"] == 1
    train("after", epochs=1, resume=True, learning_rate=1e-12)
    assert describe_weights(path) == kept


def test_only_the_first_words_are_trained_on(train):
    few = train("few", epochs=1, train_tokens=100)
    times = few["history"][0]
    # Three rows of 33 words: six steps of five.
    words = times["tokens_per_second"] * times["seconds"]
    # The seconds are rounded to a thousandth, the words a second to a tenth.
    off = 0.001 * times["tokens_per_second"] + 0.1 * times["seconds"]
    assert words == pytest.approx(6 * 15, abs=off)
    assert few["train_tokens"] == 100


def test_more_words_than_there_are_are_refused(train, tmp_path, corpus_folder):
    number = len(load_corpus(corpus_folder).train)
    told = f"at most the {number:,} words .* letters; received {number + 1:,}"
    with pytest.raises(UserError, match=told):
        train(train_tokens=number + 1)
    assert not (tmp_path / "run").exists()
    assert train(epochs=1, train_tokens=number)["train_tokens"] == number


def test_run_that_was_begun_with_too_many_words_goes_on(train):
    """As by versions that did not refuse them."""
    folder = RunFolder(train(epochs=1)["run"])
    folder.update_config({"train_tokens": 10**9})
    assert train(epochs=2, resume=True)["epochs"] == 2


def test_run_does_not_go_on_after_the_end_of_an_epoch(train, interrupt_at):
    """As where its settings were changed by hand."""
    interrupt_at(10)
    folder = RunFolder(train()["run"])
    config = json.loads(folder.config.read_text())
    folder.config.write_text(json.dumps(config | {"train_tokens": 100}))
    message = "after batch 10 of epoch 1, which must have more.* it has 6"
    with pytest.raises(UserError, match=message):
        train(resume=True)


def test_a_gpu_trains_with_tf32_unless_told(train, monkeypatch):
    monkeypatch.setattr(training_module, "has_gpu", lambda: True)
    assert train(epochs=1)["precision"] == "tf32"
    told = train("told", epochs=1, precision="float32")
    assert told["precision"] == "float32"
    config = RunFolder(told["run"]).read_config()
    assert config["precision"] == "float32"  # to go on with


def test_precision_is_noted_and_kept(train):
    result = train(epochs=1, precision="mixed_bfloat16")
    assert result["precision"] == "mixed_bfloat16"
    # bfloat16 of a short run: within a few percent of float32's.
    full = train("full", epochs=1)
    assert full["precision"] == "float32"
    assert result["valid_perplexity"] != full["valid_perplexity"]
    model, _, config = load_run(result["run"])
    measured = evaluate(model, load_run_corpus(config).valid).perplexity
    assert result["valid_perplexity"] == pytest.approx(measured, rel=1e-6)
    assert result["valid_perplexity"] == pytest.approx(
        full["valid_perplexity"], rel=0.05
    )


def test_accumulated_steps_are_fewer(train, monkeypatch):
    """Two batches each half as large make the step of a whole one."""
    preset = replace(PRESETS["tiny"], **NO_DROPOUT, clip_norm=None)
    monkeypatch.setitem(PRESETS, "tiny", preset)
    one, two = (
        train(out, epochs=1, **arguments)
        for out, arguments in (
            ("one", {"train_tokens": 31, "batch_size": 2}),
            (
                "two",
                {"train_tokens": 31, "batch_size": 2}
                | {"gradient_accumulation_steps": 2},
            ),
        )
    )
    # Three batches: three steps, or one of two and no other.
    assert two["gradient_accumulation_steps"] == 2
    before, *_ = load_run(two["run"])
    fresh = LanguageModel(**before.settings)
    fresh.build((None, None))
    moved = []
    for result in (one, two):
        model, *_ = load_run(result["run"])
        pairs = zip(model.get_weights(), fresh.get_weights(), strict=True)
        moved.append(max(np.abs(new - old).max() for new, old in pairs))
    # Adam's first steps are as long as the rate, each.
    assert moved[0] == pytest.approx(0.09, rel=0.2)
    assert moved[1] == pytest.approx(0.03, rel=0.01)


def test_accumulation_that_never_makes_a_step_is_refused(train, tmp_path):
    few = {"train_tokens": 31, "batch_size": 2}  # three batches
    with pytest.raises(UserError, match="which are 3; received 4"):
        train(**few, gradient_accumulation_steps=4)
    assert not (tmp_path / "run").exists()
    train(**few, gradient_accumulation_steps=3)


def test_adaptive_softmax_of_tied_embeddings_is_refused(train, tmp_path):
    told = "the preset tiny are the softmax's too.*--preset zaremba_medium"
    with pytest.raises(UserError, match=told):
        train(softmax="adaptive")
    assert not (tmp_path / "run").exists()


def test_devices_that_do_not_accumulate_leave_no_folder(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr(parallel.Devices, "accumulates", False)
    with pytest.raises(UserError, match=r"received --gradient-acc.*-steps 2"):
        train(gradient_accumulation_steps=2)
    assert not (tmp_path / "run").exists()
    train()


def test_lengths_and_accumulation_do_not_go_together(train):
    with pytest.raises(UserError, match="batches of one length"):
        train(preset="tiny_awd", gradient_accumulation_steps=2)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_other_precisions_are_refused(train, precision):
    with pytest.raises(UserError, match="float32, tf32, mixed_b"):
        train(precision=precision)


@pytest.mark.parametrize(
    "name",
    [
        "epochs",
        "batch_size",
        "sequence_length",
        "gradient_accumulation_steps",
        "train_tokens",
        "patience",
        "until_perplexity",
    ],
)
def test_sizes_below_one_are_refused(name, train, tmp_path):
    with pytest.raises(UserError, match=f"`{name}` must be at least 1.*0"):
        train(**{name: 0})
    assert not (tmp_path / "run").exists()


def test_rate_of_zero_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="`learning_rate` must be above 0"):
        train(learning_rate=0.0)
    assert not (tmp_path / "run").exists()


def test_time_between_checkpoints_may_change(train):
    train(epochs=1)
    parts = train(epochs=2, resume=True, checkpoint_minutes=1.0)
    assert parts["epochs"] == 2


def test_lengths_are_new_in_each_epoch_and_as_the_preset_says(tiny):
    plan, ids = PRESETS["tiny_awd"], np.arange(3000, dtype=np.int32)
    cuts = [
        plan_module.cut_batches(plan, ids, seed, epoch)
        for seed, epoch in ((0, 0), (0, 1), (4, 0))
    ]
    assert len({tuple(cut.lengths) for cut in cuts}) == 3
    for cut in cuts:  # rows begin at places of their own
        assert cut[0][0][:, 0].tolist() != [0, 999, 1998]
    plan = replace(plan, half_length_share=1.0)
    halves = plan_module.cut_batches(plan, ids, 0, 0)
    assert halves.lengths.mean() == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize(
    ("changes", "settings", "chosen"),
    [
        ({}, {}, []),
        ({"plateau_factor": 0.5}, {}, ["when the learning rate falls"]),
        ({"averaging": "triggered"}, {}, ["when averaging begins"]),
        ({"stops_non_monotone": True}, {}, ["when training ends"]),
        ({}, {"patience": 2}, ["when training ends"]),
        ({}, {"until_perplexity": 9.0}, ["when training ends"]),
    ],
    ids=str,
)
def test_protocol_tells_all_that_was_chosen_on_valid(changes, settings, chosen):
    plan = replace(PRESETS["small"], **changes)
    protocol = describe_protocol(plan, DEFAULTS | settings)
    kept = "the epoch whose weights are kept"
    assert protocol["tuned"] == {"text": "valid", "what": [kept, *chosen]}
    assert ("average" in protocol["weights"]) == (plan.averaging != "never")


def test_seconds_before_a_run_went_on_are_of_that_epoch(
    train, stop_after, monkeypatch
):
    stop_after(2)
    with pytest.raises(CrashError):
        train(checkpoint_minutes=0)
    load = RunFolder.load_checkpoint
    monkeypatch.setattr(
        RunFolder,
        "load_checkpoint",
        lambda *arguments: replace(load(*arguments), seconds=1e6),
    )
    first, second = train(epochs=2, resume=True)["history"]
    assert second["seconds"] < 1e6 <= first["seconds"]


def test_signals_do_afterwards_what_they_did_before(train):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    train(epochs=1)
    assert [signal.getsignal(number) for number in numbers] == before


def test_text_that_is_too_short_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="need at least 50001 tokens"):
        train(batch_size=1000, sequence_length=50)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_text_without_a_word_to_predict_is_refused(
    split, train, corpus_folder, tmp_path
):
    (corpus_folder / f"{split}.txt").write_text("\n")
    with pytest.raises(UserError, match=f"{split} text of letters .* it has 1"):
        train()
    assert not (tmp_path / "run").exists()


def test_run_without_weights_is_told(train, tmp_path):
    train(epochs=1)
    RunFolder(tmp_path / "run").best_weights.unlink()
    with pytest.raises(UserError, match="is gone, after 1 epochs"):
        load_run(tmp_path / "run")
    RunFolder(tmp_path / "run").history.unlink()
    with pytest.raises(UserError, match=r"no best\.weights\.h5 yet"):
        load_run(tmp_path / "run")


def test_broken_weights_are_told(train, tmp_path):
    train(epochs=1)
    best = RunFolder(tmp_path / "run").best_weights
    content = best.read_bytes()
    flipped = bytearray(content)
    with h5py.File(best) as file:
        weights = file["layers/projection/vars/0"][()]
    flipped[content.index(weights.tobytes()) + 5] ^= 1
    for broken, message in (
        (b"no weights", "must hold the .* bytes of the model"),
        (bytes(len(content)), "must be a file that can be read"),
        (content[:-100], "must be a file that can be read"),
        (bytes(flipped), "its checksum is not that of its content"),
    ):
        best.write_bytes(broken)
        with pytest.raises(UserError, match=message):
            load_run(tmp_path / "run")
    best.write_bytes(content)
    load_run(tmp_path / "run")


@pytest.fixture
def trained(train, tmp_path):
    """The folder of a run of one epoch."""
    train(epochs=1)
    return RunFolder(tmp_path / "run")


def relink(file, link):
    """Puts something else in the place of a file's first array."""
    names = []
    file.visititems(
        lambda name, item: (
            names.append(name) if isinstance(item, h5py.Dataset) else None
        )
    )
    shape = file[names[0]].shape
    del file[names[0]]
    link(file, names[0], shape)


@pytest.mark.parametrize(
    "link",
    [
        lambda file, name, _: file.__setitem__(
            name, h5py.ExternalLink("/etc/passwd", "/")
        ),
        lambda file, name, _: file.__setitem__(name, h5py.SoftLink("/layers")),
        lambda file, name, shape: file.create_dataset(
            name, shape, "f4", external=[("/etc/hostname", 0, 1 << 20)]
        ),
        lambda file, name, _: file.create_dataset(
            name, (10**9,), "f4", compression="gzip", fillvalue=1.0
        ),
        lambda file, name, _: file.create_dataset(name, data="words"),
    ],
    ids=["external link", "soft link", "external data", "gigabytes", "text"],
)
def test_weights_that_lie_elsewhere_are_refused(link, trained):
    """A file of a stranger's might read others, or have no end."""
    with h5py.File(trained.best_weights, "r+") as file:
        relink(file, link)
    with pytest.raises(UserError, match=r"in it is (no plain|not of)"):
        load_run(trained.path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("units", 10**9, "bytes of the model"),
        ("vocabulary_size", 10**9, "must be of a model of 9 words"),
        ("embedding_dim", 10**9, "bytes of the model"),
        ("units", "many", "`units` must be a whole number, 1 or more"),
        ("units", [[2]], "`units` must be a whole number, 1 or more"),
        ("units", None, "`units` must be a whole number, 1 or more"),
        ("units", [], "must have one layer or more"),
        ("units", -1, "`units` must be a whole number, 1 or more"),
        ("units", 7, "must hold the weights of this run's model"),
        ("output_dropout", "much", "must describe a run of this version"),
        ("softmax", 3, "softmax"),
        ("tomorrow", 3, "must describe a run of this version"),
    ],
)
def test_config_that_says_otherwise_is_refused(name, value, message, trained):
    """And takes no memory for what it claims."""
    config = json.loads(trained.config.read_text())
    config["model"][name] = value
    trained.config.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_run(trained.path)


def places_in(content, *path):
    """The path of every value in JSON."""
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places_in(value, *path, key)


STRANGE = (
    None,
    -1,
    0,
    10**30,
    1e308,
    math.nan,
    True,
    "",
    "x\ud800",
    [],
    [[1]],
    {},
)


def test_no_config_gives_more_than_a_line(trained, rng):
    """One value in it is another: it is read as it is, or refused."""
    config = json.loads(trained.config.read_text())
    places = list(places_in(config))
    refused = 0
    for number in rng.permutation(len(places) * len(STRANGE))[:100]:
        *path, last = places[number // len(STRANGE)]
        changed = json.loads(json.dumps(config))
        inner = changed
        for key in path:
            inner = inner[key]
        inner[last] = STRANGE[number % len(STRANGE)]
        trained.config.write_text(json.dumps(changed))
        for read in (
            lambda: load_run(trained.path),
            lambda: plan_module.read_plan(trained, {}),
            lambda: preset_of(trained.read_config()),
        ):
            try:
                read()
            except UserError as error:
                refused += 1
                if "\n" in str(error):
                    raise RuntimeError("It must be one line") from error
    assert refused > 10
