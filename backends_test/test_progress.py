"""Times worked by hand, and what the bar writes where there is no terminal."""

import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from multilstm import progress
from multilstm.progress import ProgressBar, StepTimes


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(
        progress, "time", SimpleNamespace(perf_counter=lambda: clock.now)
    )
    return clock


@pytest.fixture
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "20")


def pass_steps(callback, clock, seconds):
    for batch, duration in enumerate(seconds):
        callback.on_train_batch_begin(batch)
        clock.now += duration
        callback.on_train_batch_end(batch, {"loss": 1.0, "perplexity": 12.345})


# StepTimes


def test_summary_is_that_worked_by_hand():
    times = StepTimes()
    times.first_seconds, times.first_steps = [2.5], 1
    times.seconds = [0.05, 0.01, 0.02, 0.08, 0.03, 0.04]
    assert times.summary(tokens_per_step=460) == {
        # 6 * 460 tokens in 0.23 s.
        "tokens_per_second": 12000.0,
        # Sorted they are at 0, 20, 40, 60, 80 and 100 percent.
        "step_time_ms": {"median": 35.0, "p20": 20.0, "p80": 50.0, "min": 10.0},
        "compile_time_seconds": 2.465,
    }


def test_compilation_took_no_less_than_no_time():
    times = StepTimes()
    times.first_seconds, times.first_steps = [0.01], 1
    times.seconds = [0.02]
    assert times.summary(1)["compile_time_seconds"] == 0.0


def test_too_few_steps_tell_nothing(clock):
    times = StepTimes()
    nothing = {
        "tokens_per_second": None,
        "step_time_ms": None,
        "compile_time_seconds": None,
    }
    assert times.summary(1) == nothing
    times.on_epoch_begin(0)
    pass_steps(times, clock, [3.0])
    assert times.summary(1) == nothing


def test_first_step_and_what_lies_between_epochs_are_kept_apart(clock):
    times = StepTimes()
    times.on_epoch_begin(0)
    pass_steps(times, clock, [0.0, 0.25, 0.5])
    clock.now += 60  # the validation
    times.on_epoch_begin(1)
    pass_steps(times, clock, [0.125, 1.0])
    assert times.first_seconds == [0.0]
    assert times.seconds == [0.25, 0.5, 0.125, 1.0]


def test_first_step_of_each_length_may_be_compiled(clock):
    times = StepTimes()
    for lengths, seconds in (
        ([70, 70, 35, 70], [3.0, 0.25, 4.0, 0.5]),
        ([35, 70], [0.125, 1.0]),
    ):
        times.begin_epoch(lengths)
        times.on_epoch_begin(0)
        pass_steps(times, clock, seconds)
    assert times.first_seconds == [3.0, 4.0]
    assert times.seconds == [0.25, 0.5, 0.125, 1.0]
    # The median of a step is 0.375 s.
    assert times.summary(1)["compile_time_seconds"] == 6.25


# Both, as Keras calls them


@pytest.mark.usefixtures("no_terminal")
def test_fit_calls_them_for_every_step(capsys):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    times = StepTimes()
    bar = ProgressBar(tokens_per_step=4, epochs=3)
    for initial_epoch, epochs in ((0, 2), (2, 3)):
        model.fit(
            np.ones((12, 1)),
            np.ones((12, 1)),
            batch_size=4,
            epochs=epochs,
            initial_epoch=initial_epoch,
            verbose=0,
            callbacks=[times, bar],
        )
    assert len(times.seconds) == 3 * 3 - 1
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/3: ",
        "epoch 2/3: ",
        "epoch 3/3: ",
    ]


# ProgressBar


def begin(bar, *, steps=10):
    bar.set_params({"steps": steps, "epochs": 3})
    bar.on_train_begin()


@pytest.mark.usefixtures("no_terminal")
def test_one_line_an_epoch_goes_to_stderr(clock, capsys):
    bar = ProgressBar(tokens_per_step=700, epochs=3)
    begin(bar)
    logs = {"loss": 4.6, "perplexity": 101.456}
    for epoch in range(2):
        bar.on_epoch_begin(epoch)
        pass_steps(bar, clock, [0.2] * 10)
        measured = {"valid_perplexity": 98.7654, "tokens_per_second": 34567.8}
        bar.on_epoch_end(epoch, logs | measured)
    bar.on_epoch_begin(2)
    bar.on_epoch_end(2, logs)  # stopped before there was more to tell
    bar.on_train_end()
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "epoch 1/3: perplexity train 101.46, valid 98.77, 34,568 tokens/s",
        "epoch 2/3: perplexity train 101.46, valid 98.77, 34,568 tokens/s",
        "epoch 3/3: perplexity train 101.46",
    ]


@pytest.mark.usefixtures("no_terminal")
def test_bar_that_was_never_begun_writes_nothing(capsys):
    ProgressBar(tokens_per_step=700, epochs=3).close()
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def terminal(no_terminal, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("terminal")
def test_bar_shows_perplexity_speed_and_time_left(clock, capsys):
    bar = ProgressBar(tokens_per_step=700, epochs=3)
    begin(bar)
    bar.on_epoch_begin(0)
    pass_steps(bar, clock, [0.5] * 4)
    bar.close()
    drawn = capsys.readouterr().err
    assert "epoch 1/3" in drawn
    assert "perplexity 12.3" in drawn
    assert "1,400 tokens/s" in drawn  # 700 each half a second
    assert "left 0:13" in drawn  # 26 steps
    begin(bar)
    assert "epoch" not in capsys.readouterr().err
    bar.on_epoch_begin(1)
    bar.on_epoch_begin(2)
    pass_steps(bar, clock, [2.0] * 3)
    capsys.readouterr()
    bar.close()
    drawn = capsys.readouterr().err
    assert "epoch 3/3" in drawn
    assert "epoch 2/3" not in drawn
    assert "350 tokens/s" in drawn
    assert "left 0:14" in drawn  # 7 steps


@pytest.mark.usefixtures("terminal")
def test_time_left_counts_whole_epochs_where_one_goes_on(clock, capsys):
    bar = ProgressBar(tokens_per_step=700, epochs=3)
    begin(bar)  # of the 10 steps that are left of 100
    bar.whole_epoch = 100
    bar.on_epoch_begin(1)
    pass_steps(bar, clock, [0.5] * 4)
    bar.close()
    assert "left 0:53" in capsys.readouterr().err  # 6 and 100 steps


@pytest.mark.usefixtures("terminal")
def test_bar_is_drawn_four_times_a_second_at_most(clock, monkeypatch):
    bar = ProgressBar(tokens_per_step=700, epochs=3)
    begin(bar)
    bar.on_epoch_begin(0)
    drawn = []
    monkeypatch.setattr(
        bar._progress, "update", lambda task, **what: drawn.append(what)
    )
    pass_steps(bar, clock, [0.125] * 7)
    bar.close()
    assert [what["completed"] for what in drawn] == [2, 4, 6]


@pytest.mark.usefixtures("terminal")
def test_end_within_an_epoch_gives_the_terminal_back(capsys):
    hide, show = "\x1b[?25l", "\x1b[?25h"
    bar = ProgressBar(tokens_per_step=700, epochs=3)
    for end in (bar.on_train_end, bar.close):
        begin(bar)
        bar.on_epoch_begin(0)
        assert hide in capsys.readouterr().err
        end()
        assert show in capsys.readouterr().err
        print("after", file=sys.stderr)
        assert capsys.readouterr().err == "after\n"


def test_clock_shows_hours_minutes_seconds():
    shown = {
        0: "0:00",
        59.4: "0:59",
        59.6: "1:00",
        600: "10:00",
        3599.6: "1:00:00",
        90061: "25:01:01",
    }
    assert {seconds: progress.clock(seconds) for seconds in shown} == shown
