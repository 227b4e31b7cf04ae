"""The folder of a run: held by one, its files whole or explained."""

import errno
import io
import os
from pathlib import Path

import filelock
import pytest

from multilstm import Vocabulary
from multilstm.errors import UserError, WriteError
from multilstm.run_folder import RunFolder, draw_curves

HISTORY = [
    {"epoch": 1, "train_perplexity": 300.0, "valid_perplexity": 200.0},
    {"epoch": 2, "train_perplexity": 150.0, "valid_perplexity": 160.5},
]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_leftovers_of_killed_processes_are_removed(folder):
    folder.path.mkdir()
    folder.checkpoint.parent.mkdir()
    leftovers = [
        folder.path / ".config-ab12_xyz.json",
        folder.path / ".best.weights-ab12_xyz.weights.h5",
        folder.checkpoint.parent / ".last-ab12_xyz.npz",
    ]
    others = [folder.path / "notes.json", folder.path / ".config-mine.json"]
    for path in leftovers + others:
        path.write_text("a part")
    with folder.held():
        assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


def test_folder_where_nothing_was_made_does_not_stay(folder):
    with pytest.raises(KeyError), folder.held():
        raise KeyError("bad settings")
    assert not folder.path.exists()


def test_folder_is_held_by_one(folder):
    with folder.held():
        message = f"is being trained by process {os.getpid()} on .*, since"
        other = RunFolder(folder.path)
        with pytest.raises(UserError, match=message), other.held():
            pass
        assert folder.holder.exists()  # is left to the one who holds
    folder.path.mkdir(exist_ok=True)
    with other.held():
        pass


def test_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = "must be a folder that can be written to; .*File exists.*--out"
    with (
        pytest.raises(UserError, match=message),
        RunFolder(tmp_path / "file").held(),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_may_not_be_written_to_is_one_line(folder, monkeypatch):
    """As one without the permission, which root always has."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    message = "can be written to; .*Permission denied.*--out"
    with pytest.raises(UserError, match=message), folder.held():
        pass


def test_folder_that_is_moved_at_this_moment_is_told_as_moved(
    folder, monkeypatch
):
    """And not as one whose configuration is gone."""
    exists = Path.exists

    def move_first(path):
        if path == folder.config:
            folder.path.rename(folder.path.with_name("elsewhere"))
        return exists(path)

    with folder.held():
        folder.create({}, Vocabulary(["a"]))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "exists", move_first)
            with pytest.raises(WriteError, match="removed, moved or replaced"):
                folder.write_history(HISTORY)


def test_config_comes_back_and_is_not_written_over(folder):
    folder.create({"seed": 3}, Vocabulary(["a", "b"]))
    assert folder.read_config() == {"schema": "multilstm-run-1", "seed": 3}
    assert Vocabulary.load(folder.vocabulary).words == ("a", "b")
    with pytest.raises(UserError, match="already holds a run"):
        folder.create({"seed": 4}, Vocabulary(["c"]))
    assert folder.read_config()["seed"] == 3
    assert Vocabulary.load(folder.vocabulary).words == ("a", "b")


def test_what_a_run_is_asked_for_changes_where_it_came_from_does_not(folder):
    origin = {"model": 1, "corpus_sha256": 2, "initial_weights_sha256": 3}
    folder.create({"epochs": 1, **origin}, Vocabulary(["a"]))
    folder.update_config({"epochs": 5, "model": 9, "corpus_sha256": 9})
    assert folder.read_config() == {
        "schema": "multilstm-run-1",
        "epochs": 5,
        **origin,
    }


def test_config_of_another_version_is_refused(folder):
    folder.path.mkdir()
    folder.config.write_text('{"schema": "multilstm-run-0"}')
    with pytest.raises(UserError, match="multilstm-run-0"):
        folder.read_config()


def test_history_is_one_csv_row_an_epoch(folder):
    folder.write_history(HISTORY)
    assert folder.history.read_text().split() == [
        "epoch,train_perplexity,valid_perplexity",
        "1,300.0,200.0",
        "2,150.0,160.5",
    ]


def test_name_with_dollars_is_no_mathematics(tmp_path):
    folder = RunFolder(tmp_path / "$model_$rate")
    folder.path.mkdir()
    folder.write_curves(HISTORY)
    assert folder.curves.stat().st_size > 1000


def test_curves_of_a_name_that_is_no_utf_8_are_drawn(tmp_path):
    folder = RunFolder(tmp_path / os.fsdecode(b"n\xff"))
    folder.path.mkdir()
    folder.write_curves(HISTORY)
    assert folder.curves.stat().st_size > 1000


def test_curves_of_any_name_have_a_legend():
    figure = draw_curves({"_a": HISTORY})
    shown = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in shown] == ["train, _a", "valid, _a"]


def test_name_that_the_font_has_not_is_drawn_without_a_warning(tmp_path):
    folder = RunFolder(tmp_path / "\N{HIRAGANA LETTER A}")
    folder.path.mkdir()
    folder.write_curves(HISTORY)  # a warning would be an error here
    assert folder.curves.stat().st_size > 1000


def test_curves_show_the_figures_of_each_run():
    figure = draw_curves({"a": HISTORY, "b": HISTORY[:1]})
    lines = {
        line.get_label(): (line.get_xdata(), line.get_ydata())
        for line in figure.axes[0].get_lines()
    }
    shown = {name: (list(x), list(y)) for name, (x, y) in lines.items()}
    assert shown == {
        "train, a": ([1, 2], [300.0, 150.0]),
        "valid, a": ([1, 2], [200.0, 160.5]),
        "train, b": ([1], [300.0]),
        "valid, b": ([1], [200.0]),
    }
    image = io.BytesIO()
    figure.savefig(image, format="png")
    assert image.getvalue().startswith(b"\x89PNG")
