"""A run on two devices is the run on one, to rounding."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import devices_runs
import keras
import numpy as np
import psutil
import pytest
import tiny_runs

from multilstm import PRESETS, evaluate, load_corpus, load_run, train
from multilstm.dataset import ContinuousStreams, PartOfRows, VariableStreams
from multilstm.errors import UserError
from multilstm.run_folder import RunFolder

BACKEND = keras.config.backend()
SCRIPT = Path(devices_runs.__file__)
# float32, sums of two halves instead of one.
SAME = {"rtol": 2e-5, "atol": 1e-6}


def run_on_two(program, *arguments):
    """Runs a Python program so that it has two devices."""
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPT.parent),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }
    ranks = [{}]
    if BACKEND == "torch":
        ranks = [{"WORLD_SIZE": "2", "RANK": rank} for rank in "01"]
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, (program, *arguments))],
            env=environment | rank,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    errors = [process.communicate()[1][-2000:] for process in processes]
    assert [p.returncode for p in processes] == [0] * len(ranks), errors


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    for name in (*tiny_runs.presets(), "tiny_same", "tiny_awd_same"):
        monkeypatch.setitem(PRESETS, name, None)  # to be put back
    before = dict(PRESETS)
    devices_runs.define_presets()
    yield
    PRESETS.clear()
    PRESETS.update(before)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """The folder of all runs on two devices."""
    root = tmp_path_factory.mktemp("devices")
    tiny_runs.write_corpus(root / "letters")
    before = dict(PRESETS)
    devices_runs.define_presets()
    train(
        "tiny_same",
        corpus=root / "letters",
        out=root / "1-then-2",
        epochs=1,
        progress=False,
    )
    PRESETS.clear()
    PRESETS.update(before)
    run_on_two(SCRIPT, root)
    return root


def figures(folder):
    result = json.loads((folder / "result.json").read_text())
    names = ("train_perplexity", "valid_perplexity", "learning_rate")
    rows = [[row[name] for name in names] for row in result["history"]]
    return [*np.ravel(rows), result["test_perplexity"]]


@pytest.fixture
def one_device(two_devices, tmp_path):
    """Trains on one device, with the same corpus."""

    def one_device(preset, out=None, **settings):
        out = out or tmp_path / "one"
        corpus = two_devices / "letters"
        train(preset, corpus=corpus, out=out, progress=False, **settings)
        return figures(out)

    return one_device


@pytest.mark.parametrize(
    "preset", ["tiny_same", "tiny_awd_same", "tiny_windows_same"]
)
def test_two_devices_are_one(preset, two_devices, one_device):
    """Clipping, L2, averages, accumulation, drawn lengths: all of the whole."""
    if preset == "tiny_windows_same" and BACKEND == "tensorflow":
        pytest.skip("accumulation is refused on several devices there")
    expected = one_device(preset)
    np.testing.assert_allclose(
        figures(two_devices / f"{preset}-2"), expected, **SAME
    )
    result = json.loads(
        (two_devices / f"{preset}-2" / "result.json").read_text()
    )
    assert result["devices"] == 2


def test_run_goes_on_with_another_number_of_devices(two_devices, one_device):
    expected = one_device("tiny_same")
    np.testing.assert_allclose(
        figures(two_devices / "1-then-2"), expected, **SAME
    )
    found = one_device(
        "tiny_same", two_devices / "2-then-1", resume=True, epochs=2
    )
    np.testing.assert_allclose(found, expected, **SAME)


@pytest.mark.parametrize("preset", ["tiny", "tiny_awd"])
def test_devices_have_masks_of_their_own_that_come_back(
    preset, two_devices, one_device
):
    whole = figures(two_devices / f"{preset}-whole")
    parts = figures(two_devices / f"{preset}-parts")
    np.testing.assert_allclose(parts, whole, **SAME)
    if BACKEND == "jax":
        pytest.skip("there masks are drawn for all rows, as on one device")
    alone = np.array(one_device(preset))
    # More than rounding, of which some 1e-6 was seen in so short a run; the
    # rates of `tiny_awd` are small.
    assert np.abs(alone / whole - 1).max() > 1e-5


def test_weights_are_kept_once_and_belong_to_the_figures(two_devices):
    """As any other run is: on one device, whatever it was trained on."""
    model, *_ = load_run(two_devices / "tiny_same-2")
    corpus = load_corpus(two_devices / "letters")
    measured = evaluate(model, corpus.test).perplexity
    np.testing.assert_allclose(
        measured, figures(two_devices / "tiny_same-2")[-1], rtol=1e-5
    )


def test_rows_that_cannot_be_divided_are_refused(rng):
    ids = rng.integers(5, size=100).astype(np.int32)
    with pytest.raises(UserError, match="a --batch-size that 2 divides"):
        PartOfRows(ContinuousStreams(ids, 5, 3), 0, 2)


@pytest.mark.parametrize("kind", [ContinuousStreams, VariableStreams])
def test_parts_are_the_rows_of_each_batch(kind, rng):
    ids = rng.integers(50, size=200).astype(np.int32)
    batches = kind(ids, 5, 6)
    parts = [PartOfRows(batches, part, 3) for part in range(3)]
    assert [part.batch_size for part in parts] == [2, 2, 2]
    for k in range(len(batches)):
        for arrays in zip(batches[k], *(p[k] for p in parts), strict=True):
            whole, *rest = arrays
            np.testing.assert_array_equal(np.concatenate(rest), whole)


def test_devices_that_are_not_there_are_refused(tiny, corpus_folder, tmp_path):
    """This process has computed on one device already."""
    needed = "a process for each" if BACKEND == "torch" else "there are 1"
    with pytest.raises(UserError, match=f"--devices 64 needs.*{needed}"):
        train(tiny, corpus=corpus_folder, out=tmp_path / "run", devices=64)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    BACKEND != "torch",
    reason="on JAX and TensorFlow a run is one process: none dies alone",
)
def test_process_that_dies_ends_the_run_with_a_line(corpus_folder, tmp_path):
    """And the run goes on, on one device."""
    out = tmp_path / "run"
    settings = ["--corpus", str(corpus_folder), "--out", str(out)]
    command = [sys.executable, "-m", "multilstm", "train", *settings]
    command += ["--epochs", "50", "--batch-size", "2", "--devices", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not RunFolder(out).has_checkpoint and process.poll() is None:
        time.sleep(0.05)
    [second] = [
        child
        for child in psutil.Process(process.pid).children()
        if child.environ()["RANK"] == "1"
    ]
    second.kill()
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "number 1 of 2 was ended by SIGKILL" in errors
    lines = (out / "history.csv").read_text().splitlines()
    epochs = len(lines)  # one more than there are
    result = train(out=out, epochs=epochs, resume=True, progress=False)
    assert (result["status"], result["epochs"]) == ("finished", epochs)
