"""What lies on the disk: written whole, read back the same, or explained."""

import io

import keras
import numpy as np
import pytest

from multilstm import Vocabulary
from multilstm.errors import UserError
from multilstm.run_folder import Progress, RunFolder, draw_curves

HISTORY = [
    {"epoch": 1, "train_perplexity": 300.0, "valid_perplexity": 200.0},
    {"epoch": 2, "train_perplexity": 150.0, "valid_perplexity": 160.5},
]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def make_model(seed=0, units=4):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dropout(0.5, seed=seed),
            keras.layers.Dense(units),
        ]
    )
    model.compile(keras.optimizers.Adam(0.1), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def train_a_little(model, units=4):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    return [model.train_on_batch(x, np.ones((2, units))) for _ in range(3)]


def test_model_from_a_checkpoint_trains_on_as_the_one_that_was_saved(folder):
    """Weights, optimizer, random state and the running loss are all in it."""
    model = make_model()
    train_a_little(model)
    reached = Progress(HISTORY, num_batches=3, seconds=1.5)
    folder.save_checkpoint(model, reached)
    expected = train_a_little(model)
    other = make_model(seed=9)
    assert folder.load_checkpoint(other) == reached
    # float32, the same operations.
    np.testing.assert_allclose(train_a_little(other), expected, rtol=1e-6)
    for weight, truth in zip(
        other.get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_allclose(weight, truth, rtol=1e-6)


def test_checkpoint_of_another_model_is_refused_and_changes_nothing(folder):
    folder.save_checkpoint(make_model(units=5), Progress())
    model = make_model()
    before = model.get_weights()
    with pytest.raises(UserError, match=r"differs in model/"):
        folder.load_checkpoint(model)
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "last.npz cannot be read"),
        (b"PK\x03\x04 torn", "last.npz cannot be read"),
        (b"\x80\x04pickle", "last.npz cannot be read"),
    ],
    ids=["empty", "torn", "pickle"],
)
def test_broken_checkpoints_are_explained(content, message, folder):
    folder.checkpoint.parent.mkdir(parents=True)
    folder.checkpoint.write_bytes(content)
    with pytest.raises(UserError, match=message):
        folder.load_checkpoint(make_model())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(2)}, "cannot be read"),
        ({"about": '{"schema": "other"}'}, "its schema is 'other'"),
    ],
    ids=["no description", "other schema"],
)
def test_files_that_are_no_checkpoint_are_explained(arrays, message, folder):
    folder.checkpoint.parent.mkdir(parents=True)
    np.savez(folder.checkpoint, **arrays)
    with pytest.raises(UserError, match=message):
        folder.load_checkpoint(make_model())


def test_missing_checkpoint_is_explained(folder):
    with pytest.raises(UserError, match=r"last.npz is needed"):
        folder.load_checkpoint(make_model())


def test_checkpoint_that_fails_leaves_the_one_before(folder, monkeypatch):
    model = make_model()
    folder.save_checkpoint(model, Progress(HISTORY))
    before = folder.checkpoint.read_bytes()

    def write_half(path, **arrays):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", write_half)
    with pytest.raises(OSError, match="No space left"):
        folder.save_checkpoint(model, Progress())
    assert folder.checkpoint.read_bytes() == before
    assert list(folder.checkpoint.parent.iterdir()) == [folder.checkpoint]


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


def test_curves_show_the_figures_of_each_run():
    figure = draw_curves({"a": HISTORY, "b": HISTORY[:1]})
    lines = {
        line.get_label(): (line.get_xdata(), line.get_ydata())
        for line in figure.axes[0].get_lines()
    }
    shown = {name: (list(x), list(y)) for name, (x, y) in lines.items()}
    assert shown == {
        "a, train": ([1, 2], [300.0, 150.0]),
        "a, valid": ([1, 2], [200.0, 160.5]),
        "b, train": ([1], [300.0]),
        "b, valid": ([1], [200.0]),
    }
    image = io.BytesIO()
    figure.savefig(image, format="png")
    assert image.getvalue().startswith(b"\x89PNG")
