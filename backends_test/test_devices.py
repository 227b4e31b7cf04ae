"""A run on two devices is the run on one, to rounding."""

import json
import os
import socket
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

from multilstm import (
    PRESETS,
    evaluate,
    load_corpus,
    load_run,
    train,
    training,
)
from multilstm.dataset import ContinuousStreams, PartOfRows, VariableStreams
from multilstm.errors import UserError
from multilstm.launch import place_among_processes, tell_once
from multilstm.ops import Devices
from multilstm.run_folder import RunFolder

BACKEND = keras.config.backend()
SCRIPT = Path(devices_runs.__file__)
# float32, sums of two halves instead of one.
SAME = {"rtol": 2e-5, "atol": 1e-6}


def free_addresses(number):
    """Of this machine, for processes to meet."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    finally:
        for each in sockets:
            each.close()


def environments_of_two():
    """What the launchers of each framework set for two processes."""
    addresses = free_addresses(2)
    if BACKEND == "torch":
        host, port = addresses[0].split(":")
        both = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": "2"}
        return [both | {"RANK": rank} for rank in "01"]
    if BACKEND == "jax":
        name = "KERAS_DISTRIBUTION"
        both = {
            f"{name}_JOB_ADDRESSES": ",".join(addresses),
            f"{name}_NUM_PROCESSES": "2",
        }
        return [both | {f"{name}_PROCESS_ID": rank} for rank in "01"]
    tasks = [{"type": "worker", "index": rank} for rank in range(2)]
    return [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}} | task)}
        for task in ({"task": task} for task in tasks)
    ]


# This package, where it is a clone that is not installed, and the tests.
PATHS = os.pathsep.join(map(str, (SCRIPT.parents[1], SCRIPT.parent)))


def start(arguments, environment):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PATHS} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(process, out):
    """The processes that it has started by then."""
    while not RunFolder(out).has_checkpoint and process.poll() is None:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: child.environ().get("RANK", ""))


def errors_of(process):
    """What it wrote to stderr; one that does not end fails the test."""
    try:
        return process.communicate(timeout=300)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def run_together(environments, *arguments):
    """Runs a Python program in a process for each environment."""
    processes = [start(arguments, each) for each in environments]
    errors = [errors_of(process)[-2000:] for process in processes]
    assert not any(process.returncode for process in processes), errors


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
    environments = environments_of_two() if BACKEND == "torch" else [{}]
    run_together(environments, SCRIPT, root, "same", "on", "parts")
    return root


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of runs in two processes, each with one device."""
    root = tmp_path_factory.mktemp("processes")
    tiny_runs.write_corpus(root / "letters")
    run_together(environments_of_two(), SCRIPT, root, "few")
    return root


ALL = ("train_perplexity", "valid_perplexity", "learning_rate")


def figures(folder, names=ALL):
    result = json.loads((folder / "result.json").read_text())
    rows = [[row[name] for name in names] for row in result["history"]]
    return [*np.ravel(rows), result["test_perplexity"]]


def check_parts_are_the_whole(root, preset):
    """Weights bit for bit; a sum of losses that was stored is rounded."""
    folders = [root / f"{preset}-{run}" for run in ("parts", "whole")]
    np.testing.assert_allclose(*map(figures, folders), rtol=1e-6)
    parts, whole = (figures(each, ["valid_perplexity"]) for each in folders)
    assert parts == whole


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


@pytest.mark.skipif(
    BACKEND == "torch", reason="there two devices are always two processes"
)
def test_two_processes_are_one_device(two_processes, one_device):
    """As on several hosts; and they stop within an epoch and go on."""
    np.testing.assert_allclose(
        figures(two_processes / "tiny_same-2"), one_device("tiny_same"), **SAME
    )
    check_parts_are_the_whole(two_processes, "tiny_awd")


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
    check_parts_are_the_whole(two_devices, preset)
    whole = figures(two_devices / f"{preset}-whole")
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


TWO = '"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker"'


@pytest.mark.parametrize(
    ("backend", "environment", "place"),
    [
        ("torch", {}, (0, 1)),
        ("torch", {"WORLD_SIZE": "4", "RANK": "3"}, (3, 4)),
        ("torch", {"RANK": "3"}, (0, 1)),  # of another program
        ("jax", {"WORLD_SIZE": "4", "RANK": "3"}, (0, 1)),
        (
            "jax",
            {
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": "1",
            },
            (1, 2),
        ),
        ("tensorflow", {"TF_CONFIG": "{" + TWO + ', "index": 1}}'}, (1, 2)),
        ("tensorflow", {"TF_CONFIG": ""}, (0, 1)),
        ("tensorflow", {"TF_CONFIG": '{"cluster": {"chief": ["a"]}}'}, (0, 1)),
        ("torch", {"TF_CONFIG": "{" + TWO + ', "index": 1}}'}, (0, 1)),
    ],
)
def test_launchers_tell_each_backend_the_place(
    backend, environment, place, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place_among_processes(backend) == place


@pytest.mark.parametrize(
    ("backend", "environment", "message"),
    [
        ("torch", {"WORLD_SIZE": "2"}, "WORLD_SIZE and RANK must both"),
        ("torch", {"WORLD_SIZE": "two"}, "must both be numbers.*'two'"),
        ("tensorflow", {"TF_CONFIG": "{"}, "TF_CONFIG must be JSON"),
        ("tensorflow", {"TF_CONFIG": "[]"}, "TF_CONFIG must be JSON"),
        ("tensorflow", {"TF_CONFIG": "{" + TWO + "}}"}, "and index.*'index'"),
        (
            "tensorflow",
            {
                "TF_CONFIG": '{"cluster": {"chief": ["a"], "worker": ["b"]}, '
                '"task": {"type": "chief", "index": 0}}'
            },
            "workers alone.*received chief, worker",
        ),
    ],
)
def test_environments_that_tell_no_place_are_refused(
    backend, environment, message, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        place_among_processes(backend)


def test_processes_that_would_train_different_runs_are_refused(
    tiny, corpus_folder, tmp_path, monkeypatch
):
    class OfAnother(Devices):
        def from_first(self, number):
            return number + 1

    monkeypatch.setattr(training, "use_devices", lambda count: OfAnother())
    with pytest.raises(UserError, match="must train the same"):
        train(tiny, corpus=corpus_folder, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_devices_that_are_not_there_are_refused(tiny, corpus_folder, tmp_path):
    """This process has computed on one device already."""
    needed = "a process for each" if BACKEND == "torch" else "there are 1"
    with pytest.raises(UserError, match=f"--devices 64 needs.*{needed}"):
        train(tiny, corpus=corpus_folder, out=tmp_path / "run", devices=64)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    BACKEND != "torch", reason="only there one process starts others"
)
def test_mistake_is_told_once_by_all_processes():
    command = ["-m", "multilstm", "train", "--corpus", "no/such"]
    launcher = start([*command, "--devices", "2"], {})
    [told] = [x for x in errors_of(launcher).splitlines() if "error: " in x]
    assert "no/such" in told
    assert launcher.returncode == 1


def test_what_one_process_alone_finds_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MULTILSTM_TOLD", str(tmp_path / "told"))
    (tmp_path / "told").mkdir()
    for line in ("error: no GPU 1", "error: no room", "error: no GPU 1"):
        tell_once(line)
    assert capsys.readouterr().err == "error: no GPU 1\nerror: no room\n"
    (tmp_path / "told").rename(tmp_path / "gone")
    tell_once("error: no room")
    assert capsys.readouterr().err == "error: no room\n"


@pytest.mark.skipif(
    BACKEND != "torch", reason="only there one process starts others"
)
def test_processes_that_were_told_to_end_are_not_called_lost():
    launcher = start(["-m", "multilstm", "train", "--devices", "2"], {})
    while len(psutil.Process(launcher.pid).children()) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.terminate()  # before they know what to do then
    told = [x for x in errors_of(launcher).splitlines() if "error: " in x]
    assert told == ["error: interrupted"]
    assert launcher.returncode == 1


def test_process_that_dies_ends_the_run_with_a_line(corpus_folder, tmp_path):
    """And the run goes on, on one device."""
    out = tmp_path / "run"
    settings = ["--corpus", str(corpus_folder), "--out", str(out)]
    command = ["-m", "multilstm", "train", *settings]
    command += ["--epochs", "500", "--batch-size", "2"]
    if BACKEND == "torch":
        first = start([*command, "--devices", "2"], {})
        second = wait_for_checkpoint(first, out)[1]
    else:
        first, second = (start(command, each) for each in environments_of_two())
        wait_for_checkpoint(first, out)
    second.kill()
    if BACKEND != "torch":
        errors_of(second)
    errors = errors_of(first)
    assert first.returncode != 0
    told = "number 1 of 2 was ended by SIGKILL"
    assert (told if BACKEND == "torch" else "another one ended") in errors
    lines = (out / "history.csv").read_text().splitlines()
    epochs = len(lines)  # one more than there are
    result = train(out=out, epochs=epochs, resume=True, progress=False)
    assert (result["status"], result["epochs"]) == ("finished", epochs)


@pytest.mark.skipif(
    BACKEND != "torch", reason="only there one process starts others"
)
def test_processes_stop_when_their_launcher_dies(corpus_folder, tmp_path):
    out = tmp_path / "run"
    settings = ["--corpus", corpus_folder, "--out", out, "--epochs", "50000"]
    settings += ["--batch-size", "2", "--devices", "2"]
    launcher = start(
        ["-m", "multilstm", "train", *settings], {"TMPDIR": str(tmp_path)}
    )
    children = wait_for_checkpoint(launcher, out)
    launcher.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    for child in alive:
        child.kill()
    errors_of(launcher)
    assert not alive
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted"
