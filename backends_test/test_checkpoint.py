"""What training goes on from: read back the same, or refused and explained."""

import errno
import io
import json
import os
import threading
import zipfile

import keras
import numpy as np
import pytest

from multilstm import checkpoint, run_folder
from multilstm.checkpoint import Progress
from multilstm.errors import UserError, WriteError
from multilstm.run_folder import RunFolder

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


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: arrays | {"model/0": arrays["model/0"] + 1},
        lambda arrays: {k: v for k, v in arrays.items() if k != "about"},
    ],
    ids=["changed", "lost"],
)
def test_checkpoint_is_read_back_before_it_takes_the_place(
    spoil, folder, monkeypatch
):
    """A disk that loses what it was given, without a word."""
    model = make_model()
    folder.save_checkpoint(model, Progress(HISTORY))
    before = folder.checkpoint.read_bytes()
    savez = np.savez

    def write_wrong(path, **arrays):
        savez(path, **spoil(arrays))

    monkeypatch.setattr(np, "savez", write_wrong)
    with pytest.raises(WriteError, match="must read as it was written"):
        folder.save_checkpoint(model, Progress())
    assert folder.checkpoint.read_bytes() == before
    assert not folder.previous_checkpoint.exists()


@pytest.fixture
def slow_disk(monkeypatch):
    """Files of arrays are written no sooner than this is set."""
    ready, savez = threading.Event(), np.savez

    def write_when_ready(path, **arrays):
        assert ready.wait(20)
        savez(path, **arrays)

    monkeypatch.setattr(np, "savez", write_when_ready)
    return ready


def test_checkpoint_written_behind_holds_what_was_when_it_was_made(
    folder, slow_disk
):
    model = make_model()
    train_a_little(model)
    expected = [np.array(weight) for weight in model.get_weights()]
    with folder.writing_behind():
        folder.save_checkpoint(model, Progress(HISTORY))
        assert not folder.checkpoint.exists()
        assert train_a_little(model)  # goes on meanwhile
        folder.wait_for_checkpoint(if_done=True)  # does not wait
        assert not folder.checkpoint.exists()
        slow_disk.set()
    assert folder.load_checkpoint(model) == Progress(HISTORY)
    for weight, before in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("told_by", ["the next", "looking", "the end"])
def test_checkpoint_that_fails_behind_is_told(folder, monkeypatch, told_by):
    model = make_model()
    folder.save_checkpoint(model, Progress(HISTORY))
    before = folder.checkpoint.read_bytes()
    failed = threading.Event()

    def fail(path, **arrays):
        failed.set()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(np, "savez", fail)
    reached = []

    def go_on():
        with folder.writing_behind():
            folder.save_checkpoint(model, Progress())
            assert failed.wait(60)
            if told_by == "the next":
                folder.save_checkpoint(model, Progress())
            while told_by == "looking":
                folder.wait_for_checkpoint(if_done=True)
            reached.append(told_by)

    with pytest.raises(WriteError, match="No space left"):
        go_on()
    assert reached == (["the end"] if told_by == "the end" else [])
    assert folder.checkpoint.read_bytes() == before
    monkeypatch.undo()
    folder.save_checkpoint(model, Progress())  # tells it once
    assert folder.previous_checkpoint.read_bytes() == before


def test_checkpoint_that_fails_is_told_beside_what_ended_training(
    folder, monkeypatch, caplog
):
    model = make_model()

    def fail(path, **arrays):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(np, "savez", fail)

    def go_on():
        with folder.writing_behind():
            folder.save_checkpoint(model, Progress())
            raise KeyError("what ended it")

    with pytest.raises(KeyError, match="what ended it"):
        go_on()
    assert any("No space left" in line for line in caplog.messages)
    monkeypatch.undo()
    folder.save_checkpoint(model, Progress())


def test_checkpoint_is_written_where_no_thread_can_be_had(
    folder, monkeypatch, caplog
):
    """As in a thread that trains on after the interpreter began to end."""
    model = make_model()

    def refuse(self, *_):
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(run_folder.ThreadPoolExecutor, "submit", refuse)
    with folder.writing_behind():
        for epochs in (1, 2):
            folder.save_checkpoint(model, Progress(HISTORY[:epochs]))
            assert folder.load_checkpoint(model).history == HISTORY[:epochs]
    assert sum("cannot schedule" in line for line in caplog.messages) == 1


@pytest.fixture
def two_checkpoints(folder):
    """A folder with a last and a previous checkpoint, of known weights."""
    model = make_model()
    for epochs in (1, 2):
        model.layers[-1].bias.assign(np.full(4, epochs))
        folder.save_checkpoint(model, Progress(HISTORY[:epochs]))
    return folder


def test_checkpoint_of_an_epochs_end_is_kept_through_the_next(two_checkpoints):
    """Also in a process that went on from one within it."""
    folder, model = two_checkpoints, make_model()
    for num_batches in (3, 5):
        folder.save_checkpoint(model, Progress(HISTORY, num_batches))
    folder = RunFolder(folder.path)
    assert folder.load_checkpoint(model) == Progress(HISTORY, 5)
    folder.save_checkpoint(model, Progress(HISTORY, 7))
    folder.checkpoint.unlink()
    assert folder.load_checkpoint(model) == Progress(HISTORY)


def test_checkpoint_before_the_last_is_kept(two_checkpoints):
    folder = two_checkpoints
    folder.checkpoint.unlink()  # as between the two renames
    assert folder.has_checkpoint
    model = make_model()
    assert folder.load_checkpoint(model) == Progress(HISTORY[:1])
    np.testing.assert_array_equal(model.layers[-1].bias, np.full(4, 1.0))


@pytest.mark.parametrize("place", [3, 4, 5], ids="{}0 %".format)
def test_flipped_bit_is_found_and_costs_one_checkpoint(
    place, two_checkpoints, caplog
):
    folder = two_checkpoints
    content = bytearray(folder.checkpoint.read_bytes())
    content[len(content) * place // 10] ^= 0x10
    folder.checkpoint.write_bytes(content)
    assert_goes_on_from_the_one_before(folder, caplog)
    damaged = folder.checkpoint.with_name("damaged.npz")
    assert damaged.read_bytes() == content


def test_no_flipped_bit_gives_a_state_that_never_was(two_checkpoints):
    """Some bits mean nothing, such as those of a zip's dates."""
    folder, model = two_checkpoints, make_model()
    content = folder.checkpoint.read_bytes()
    found = 0
    for place in range(0, len(content), 37):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        folder.checkpoint.write_bytes(changed)
        epochs = len(folder.load_checkpoint(model).history)
        bias = keras.ops.convert_to_numpy(model.layers[-1].bias)
        np.testing.assert_array_equal(bias, np.full(4, float(epochs)))
        found += epochs == 1
    assert found > 0.5 * len(content) / 37


def assert_goes_on_from_the_one_before(folder, caplog):
    model = make_model()
    assert folder.load_checkpoint(model) == Progress(HISTORY[:1])
    np.testing.assert_array_equal(model.layers[-1].bias, np.full(4, 1.0))
    [message] = caplog.messages
    assert "last.npz cannot be read" in message
    assert "going on from the one kept beside it" in message
    folder.save_checkpoint(model, Progress(HISTORY))  # does not lose it
    assert folder.load_checkpoint(model) == Progress(HISTORY)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_truncated_checkpoint_costs_one_checkpoint(
    share, two_checkpoints, caplog
):
    content = two_checkpoints.checkpoint.read_bytes()
    two_checkpoints.checkpoint.write_bytes(content[: int(len(content) * share)])
    assert_goes_on_from_the_one_before(two_checkpoints, caplog)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_checkpoint_that_cannot_be_read_now_is_not_set_aside(
    number, two_checkpoints, monkeypatch
):
    def refuse(path):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read_npz", refuse)
        with pytest.raises(UserError, match=os.strerror(number)):
            two_checkpoints.load_checkpoint(make_model())
    assert two_checkpoints.load_checkpoint(make_model()) == Progress(HISTORY)


def test_checkpoint_of_a_newer_version_is_not_set_aside(two_checkpoints):
    rewritten(two_checkpoints, lambda about, _: about.update(schema="newer"))
    with pytest.raises(UserError, match="its schema is 'newer'"):
        two_checkpoints.load_checkpoint(make_model())
    assert two_checkpoints.checkpoint.exists()


def test_where_both_are_damaged_nothing_is_moved(two_checkpoints):
    folder = two_checkpoints
    for path in (folder.checkpoint, folder.previous_checkpoint):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"previous\.npz cannot be read"):
        folder.load_checkpoint(make_model())
    assert folder.checkpoint.read_bytes() == b"torn"


def rewritten(folder, change):
    """The last checkpoint's content, changed and written, its checksum too."""
    with np.load(folder.checkpoint) as npz:
        arrays = {name: npz[name] for name in npz.files}
    about = json.loads(str(arrays.pop("about")))
    del about["sha256"]
    change(about, arrays)
    about["sha256"] = checkpoint._sha256(about, arrays)
    np.savez(folder.checkpoint, about=json.dumps(about), **arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "multilstm-checkpoint-99"}, "its schema is .*-99'"),
        ({"history": {}}, "'history' is no list"),
        ({"history": [1]}, "a row that is not of numbers"),
        ({"history": [{"epoch": "1"}]}, "a row that is not of numbers"),
        ({"num_batches": "3"}, "'num_batches' is no int"),
        ({"num_batches": -3}, "'num_batches' is below 0"),
        ({"seconds": None}, "'seconds' is no float"),
        ({"backend": None}, "'backend' is no str"),
    ],
    ids=str,
)
def test_description_of_another_kind_is_refused(changes, message, folder):
    folder.save_checkpoint(make_model(), Progress(HISTORY))
    rewritten(folder, lambda about, arrays: about.update(changes))
    with pytest.raises(UserError, match=message):
        folder.load_checkpoint(make_model())


def test_checksum_covers_the_description(folder):
    folder.save_checkpoint(make_model(), Progress(HISTORY))
    with np.load(folder.checkpoint) as npz:
        arrays = {name: npz[name] for name in npz.files}
    about = json.loads(str(arrays.pop("about")))
    about["history"][0]["valid_perplexity"] = 1.0
    np.savez(folder.checkpoint, about=json.dumps(about), **arrays)
    with pytest.raises(UserError, match="its checksum is not that of its"):
        folder.load_checkpoint(make_model())


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.update({"model/0": np.zeros(7, np.float32)}),
        lambda arrays: arrays.update({"model/0": arrays["model/0"] > 0}),
        lambda arrays: arrays.pop("optimizer/1"),
        lambda arrays: arrays.update({"model/99": np.zeros(1)}),
    ],
    ids=["shape", "kind", "one less", "one more"],
)
def test_state_of_another_model_does_not_cost_the_last_one(
    change, two_checkpoints, caplog
):
    """It is not damaged: the one before it must not take its place."""
    rewritten(two_checkpoints, lambda about, arrays: change(arrays))
    with pytest.raises(UserError, match="must hold the state of this model"):
        two_checkpoints.load_checkpoint(make_model())
    assert two_checkpoints.checkpoint.exists()
    assert not caplog.messages


def test_array_that_claims_too_much_takes_no_memory(folder):
    """NumPy would ask for the 4 TB that the header tells of."""
    folder.save_checkpoint(make_model(), Progress())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    )
    with zipfile.ZipFile(folder.checkpoint, "w") as archive:
        archive.writestr("model/0.npy", header.getvalue() + b"1234")
    with pytest.raises(UserError, match="claims too large an array"):
        folder.load_checkpoint(make_model())


def test_compressed_checkpoint_is_refused(folder):
    """It might hold gigabytes of zeros in a kilobyte; ours never are."""
    folder.checkpoint.parent.mkdir(parents=True)
    np.savez_compressed(folder.checkpoint, about=np.zeros(10**6))
    with pytest.raises(UserError, match="is compressed"):
        folder.load_checkpoint(make_model())


def test_pickled_array_is_refused(folder):
    folder.save_checkpoint(make_model(), Progress())
    rewritten(
        folder,
        lambda about, arrays: arrays.update(
            {"model/0": np.zeros((3, 4), object)}
        ),
    )
    with pytest.raises(UserError, match="allow_pickle"):
        folder.load_checkpoint(make_model())


def test_checkpoint_of_before_it_told_a_kernel_is_read(folder):
    folder.save_checkpoint(make_model(), Progress(kernel="torch: onednn"))
    assert folder.load_checkpoint(make_model()).kernel == "torch: onednn"
    rewritten(folder, lambda about, _: about.pop("kernel"))
    assert folder.load_checkpoint(make_model()).kernel is None
    rewritten(folder, lambda about, _: about.update(kernel=3))
    with pytest.raises(UserError, match="its 'kernel' is no str"):
        folder.load_checkpoint(make_model())


def test_checkpoint_tells_its_backend(folder):
    folder.save_checkpoint(make_model(), Progress())
    rewritten(folder, lambda about, _: about.update(backend="other"))
    assert folder.load_checkpoint(make_model()).backend == "other"
