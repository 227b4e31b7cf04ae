"""Which backend is taken and why; comparisons of programs that only pretend."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import pynvml
import pytest
from test_bench import script

from multilstm import devices, selection
from multilstm.choices import save_choice, shape_class
from multilstm.devices import device_and_driver
from multilstm.errors import UserError
from multilstm.selection import (
    BACKENDS,
    compare,
    describe_presets,
    find_pythons,
    is_installed,
    largest_difference,
    parse_pythons,
    select_backend,
)

# One backend for this process


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what there is to choose from; undone after the test."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))

    def set_up(variable=None, keras_json=None, installed=BACKENDS):
        monkeypatch.setenv("KERAS_BACKEND", variable or "")
        if variable is None:
            monkeypatch.delenv("KERAS_BACKEND")
        (tmp_path / "keras.json").unlink(missing_ok=True)
        if keras_json is not None:
            (tmp_path / "keras.json").write_text(keras_json)
        monkeypatch.setattr(selection, "is_installed", installed.__contains__)

    return set_up


TORCH_JSON = '{"backend": "torch", "floatx": "float32"}'


def test_backends_are_taken_in_this_order(machine):
    both = {"variable": "jax", "keras_json": TORCH_JSON}
    first = "the first installed of jax, torch, tensorflow"
    for asked, around, expected, reason in (
        ("tensorflow", both, "tensorflow", "--backend"),
        (None, both, "jax", "KERAS_BACKEND"),
        (None, both | {"variable": None}, "torch", "/keras.json"),
        (None, both | {"variable": ""}, "torch", "/keras.json"),
        (None, {"keras_json": "{}"}, "jax", first),
        (None, {}, "jax", first),
        (None, {"installed": ["tensorflow", "torch"]}, "torch", first),
        # Written by Keras itself, maybe for another environment.
        (None, {"keras_json": TORCH_JSON, "installed": ["jax"]}, "jax", first),
    ):
        machine(**around)
        backend, told = select_backend(asked)
        assert backend == os.environ["KERAS_BACKEND"] == expected
        assert told.endswith(reason)


def test_keras_json_is_looked_for_in_the_home_folder(
    machine, monkeypatch, tmp_path
):
    machine()
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / ".keras" / "keras.json"
    path.parent.mkdir()
    path.write_text(TORCH_JSON)
    assert select_backend() == ("torch", str(path))


@pytest.mark.skipif(os.name == "nt", reason="there is no /tmp")
def test_keras_json_is_in_tmp_where_no_home_can_be_written_to(
    machine, monkeypatch, tmp_path
):
    """As Keras has it, whether there is such a folder or not."""
    machine()
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    assert selection.keras_json() == Path("/tmp/.keras/keras.json")


def test_keras_json_that_cannot_be_read_is_told(machine, tmp_path):
    machine()
    (tmp_path / "keras.json").mkdir()
    with pytest.raises(UserError, match=r"keras\.json must be a file that can"):
        select_backend()


def test_what_cannot_be_taken_is_refused(machine):
    for asked, around, message in (
        ("theano", {}, r"jax, torch, tensorflow; --backend says 'theano'\."),
        (None, {"variable": "mxnet"}, r"; KERAS_BACKEND says 'mxnet'\."),
        (
            None,
            {"keras_json": '{"backend": "theano"}'},
            r"/keras\.json says 'theano'\. Change it there",
        ),
        (None, {"keras_json": '{"backend": ["jax"]}'}, r"says \['jax'\]"),
        (
            "torch",
            {"installed": ["jax"]},
            r"^--backend names torch, .*: pip install torch",
        ),
        (
            None,
            {"variable": "jax", "installed": ["torch"]},
            r"^KERAS_BACKEND names jax, .*: pip install jax",
        ),
        (
            None,
            {"installed": []},
            r"none is installed\. .*: pip install jax",
        ),
        (
            None,
            {"keras_json": '{"backend": '},
            r"/keras\.json must be a JSON object; .* name .* --backend",
        ),
        (None, {"keras_json": '["torch"]'}, "must be a JSON object"),
    ):
        machine(**around)
        with pytest.raises(UserError, match=message):
            select_backend(asked)
        assert os.environ.get("KERAS_BACKEND") == around.get("variable")


def test_tensorflow_starts_quietly_unless_the_user_chose(machine, monkeypatch):
    machine()
    select_backend("jax")
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "1"
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    select_backend("jax")
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"


def test_this_backend_is_installed():
    assert is_installed(keras.config.backend())
    assert not is_installed("no_such_framework")


def test_folder_with_the_name_of_a_backend_is_none(tmp_path, monkeypatch):
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("only_a_folder")


# Several, each by its own Python


def test_pythons_are_pairs_of_backend_and_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python=3").touch()
    (tmp_path / "link").symlink_to("python=3")
    assert parse_pythons(["torch=python=3", f"jax={tmp_path / 'link'}"]) == {
        "torch": tmp_path / "python=3",
        "jax": tmp_path / "link",  # where it leads is not in an environment
    }


def test_this_python_has_all_that_it_has(monkeypatch):
    monkeypatch.setattr(
        selection, "is_installed", ["tensorflow", "jax"].__contains__
    )
    pythons = parse_pythons([])
    assert [*pythons] == ["jax", "tensorflow"]
    assert {str(path) for path in pythons.values()} == {sys.executable}


def test_environments_of_nox_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selection, "is_installed", "torch".__eq__)
    for name in ("test-jax", "test-torch", "train-jax"):
        folder = tmp_path / ".nox" / name / "bin"
        folder.mkdir(parents=True)
        (folder / "python").touch()
    assert find_pythons() == {
        "torch": Path(sys.executable),  # what is here comes first
        "jax": tmp_path / ".nox/train-jax/bin/python",
    }


def test_pairs_that_are_none_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").touch()
    for pairs in (
        ["jax"],
        ["jax="],
        ["=python"],
        ["jax=no/such/python"],
        ["jax=."],
        ["theano=python"],
        ["jax=python", "jax=./python"],
    ):
        message = f"needs BACKEND=PATH, .* received '{pairs[-1]}'"
        with pytest.raises(UserError, match=message):
            parse_pythons(pairs)


@pytest.fixture
def pretend(tmp_path):
    """Makes programs that do as `python -m multilstm train` would."""

    def make(name, result="", status=0):
        path = tmp_path / name
        path.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, sys\n"
            "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
            "out.mkdir(parents=True, exist_ok=True)\n"
            "with (out / 'arguments').open('a') as file:\n"
            "    print(*sys.argv[1:], file=file)\n"
            f"if {result!r}:\n"
            f"    (out / 'result.json').write_text({result!r})\n"
            f"sys.exit({status})\n"
        )
        path.chmod(0o755)
        return path

    return make


def record(*perplexities, weights="a", backend="jax"):
    return {
        "backend": backend,
        "initial_weights_sha256": weights,
        "history": [
            {"valid_perplexity": value, "seconds": 10.0}
            for value in perplexities
        ],
    }


def test_each_backend_is_trained_by_its_own_python(pretend, tmp_path):
    expected = {
        "jax": record(200, 110),
        "torch": record(202, 109, backend="torch"),
    }
    pythons = {
        backend: pretend(f"{backend}-python", json.dumps(result))
        for backend, result in expected.items()
    }
    out = tmp_path / "out"
    comparison = compare(pythons, ["--preset", "small"], out=out)
    assert comparison == {
        "schema": "multilstm-comparison-2",
        "results": expected,
        "same_initial_weights": True,
        "largest_difference": 0.01,
        "tolerance": 0.03,
        "agree": True,
        "target_perplexity": 110,  # what both reached
        "seconds_to_target": {"jax": 20.0, "torch": 20.0},
    }
    assert json.loads((out / "comparison.json").read_text()) == comparison
    for backend in expected:
        assert (out / backend / "arguments").read_text() == (
            f"-m multilstm train --preset small --backend {backend} "
            f"--out {out / backend} --resume\n"
        )


def test_time_to_a_perplexity_and_tolerance_are_those_asked_for(
    pretend, tmp_path
):
    pythons = {
        "jax": pretend("one", json.dumps(record(200, 110))),
        "torch": pretend("two", json.dumps(record(150, 109, backend="torch"))),
    }
    comparison = compare(
        pythons, [], out=tmp_path, until_perplexity=150, tolerance=0.3
    )
    assert comparison["seconds_to_target"] == {"jax": 20.0, "torch": 10.0}
    assert comparison["agree"] is False  # 200 and 150
    unreached = compare(pythons, [], out=tmp_path, until_perplexity=1)
    assert unreached["seconds_to_target"] == {"jax": None, "torch": None}


def test_same_command_goes_on_with_the_runs(pretend, tmp_path):
    out = tmp_path / "out"
    compare({"jax": pretend("first", status=1)}, [], out=out)
    second = pretend("second", json.dumps(record(150)))
    comparison = compare({"jax": second}, [], out=out)
    assert comparison["results"] == {"jax": record(150)}
    assert json.loads((out / "comparison.json").read_text()) == comparison
    first, second = (out / "jax" / "arguments").read_text().splitlines()
    assert first == second
    assert first.endswith("--resume")


def test_one_that_fails_is_a_row_while_others_go_on(pretend, tmp_path):
    no_program = pretend("no-program")
    no_program.chmod(0o644)
    pythons = {
        "failing": pretend("failing", json.dumps(record(9)), status=3),
        "not a program": no_program,
        "writes nothing": pretend("silent"),
        "writes rubbish": pretend("rubbish", '{"history": '),
        "good": pretend("good", json.dumps(record(120))),
    }
    comparison = compare(pythons, [], out=tmp_path / "out")
    results = comparison["results"]
    assert [*results] == [*pythons]
    assert results.pop("good") == record(120)
    assert results.pop("failing") == {"error": "ended with status 3"}
    for name, reason in (
        ("not a program", f"'{no_program}'"),
        ("writes nothing", "result.json is needed"),
        ("writes rubbish", "result.json cannot be read"),
    ):
        assert [*results[name]] == ["error"]
        assert reason in results[name]["error"]
    assert comparison["same_initial_weights"] is True
    assert comparison["largest_difference"] is None


def test_other_initial_weights_are_told(pretend, tmp_path):
    pythons = {
        "jax": pretend("one", json.dumps(record(100))),
        "torch": pretend("same", json.dumps(record(100))),
        "tensorflow": pretend("other", json.dumps(record(100, weights="b"))),
    }
    comparison = compare(pythons, [], out=tmp_path)
    assert comparison["same_initial_weights"] is False


def test_weights_of_none_are_not_called_different(pretend, tmp_path):
    comparison = compare({"jax": pretend("no", status=1)}, [], out=tmp_path)
    assert comparison["same_initial_weights"] is True


def test_comparison_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one backend"):
        compare({}, [], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


SAVES_AND_STOPS = """
import signal, sys, time
from pathlib import Path

out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)

def stop(number, frame):
    time.sleep(0.3)
    (out / "saved").write_text(str(number))
    sys.exit(1)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
(out / "ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_a_stopped_comparison_lets_its_run_save_what_it_has(number, tmp_path):
    """Where the signal comes to the one process alone, too.

    The end of a terminal tells it to stop, as SIGTERM does.
    """
    python = script(tmp_path, "python", SAVES_AND_STOPS)
    run = tmp_path / "out" / "jax"
    command = [sys.executable, "-m", "multilstm", "compare"]
    for backend in ("jax", "torch"):
        command += ["--python", f"{backend}={python}"]
    comparison = subprocess.Popen(
        [*command, "--out", run.parent], stderr=subprocess.PIPE, text=True
    )
    while not (run / "ready").exists():
        assert comparison.poll() is None
        time.sleep(0.01)
    comparison.send_signal(number)
    _, err = comparison.communicate(timeout=50)
    assert comparison.returncode == 1
    assert err.splitlines()[-1] == "error: interrupted"
    heard = signal.SIGTERM if number == signal.SIGHUP else number
    assert (run / "saved").read_text() == str(int(heard))
    assert not (run.parent / "torch").exists()


def test_backends_are_compared_in_a_thread(pretend, tmp_path):
    """Where Python lets no signals be heard."""
    python = pretend("python", json.dumps(record(120)))
    with ThreadPoolExecutor() as threads:
        done = threads.submit(compare, {"jax": python}, [], out=tmp_path)
        assert done.result()["results"] == {"jax": record(120)}


def test_largest_difference_is_that_worked_by_hand():
    def of(*runs):
        return largest_difference([record(*run)["history"] for run in runs])

    assert of([200, 100], [190, 105]) == round(10 / 190, 6)
    assert of([200, 100], [190, 105], [200, 80]) == 0.3125  # 105 / 80
    assert of([200, 100], [200]) == 0.0  # the epochs that both have
    assert of([200, 100]) is None
    assert of([200], []) is None
    assert of() is None


# Presets --------------------------------------------------------------------


def test_time_of_a_preset_comes_from_what_was_chosen_here():
    assert {row["seconds"] for row in describe_presets()} == {None}
    device, _ = device_and_driver()
    shape = {
        "units": [200, 200],
        "embedding_dim": 200,
        "batch_size": 20,
        "sequence_length": 20,
        "vocabulary_size": 10_000,
        "tied": False,
    }
    save_choice(
        {
            "made": "2026-11-25",
            "device": device,
            "driver": None,
            "dtype": "float32",
            "shape_class": shape_class(shape),
            "shape_line": "",
            "shape": shape,
            "backend": "jax",
            "ranking": ["jax"],
            "equal_within_noise": [],
            "tokens_per_second": {"jax": 13_000},
            "versions": {},
        }
    )
    rows = {row["preset"]: row for row in describe_presets(num_tokens=2_000)}
    small, medium = rows["zaremba_small"], rows["zaremba_medium"]
    assert (small["seconds"], small["is_measured_shape"]) == (2.0, True)
    # In proportion to 4 * 400 * 200 * 2 + 200 * 10,000 products and biases
    # of a word, 2,651,600, against 13,275,200.
    expected = 39 * 2_000 / 13_000 * 13_275_200 / 2_651_600
    assert medium["seconds"] == pytest.approx(expected, abs=0.06)
    assert (medium["backend"], medium["is_measured_shape"]) == ("jax", False)


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("1", "second"),
        ("GPU-89", "second"),  # as CUDA takes it
        ("GPU-12345678", "first"),
        ("-1", None),
        ("GPU-7", None),
    ],
)
def test_gpu_is_the_first_that_cuda_sees(visible, name, monkeypatch):
    uuids = {"first": "GPU-12345678", "second": "GPU-89abcdef"}
    names = list(uuids)

    def by_uuid(uuid):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    pretended = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: len(names),
        "nvmlDeviceGetHandleByIndex": names.__getitem__,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": uuids.__getitem__,
        "nvmlDeviceGetName": str,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
    }
    for function, pretend in pretended.items():
        monkeypatch.setattr(pynvml, function, pretend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices._nvml.cache_clear()
    try:
        found, driver = device_and_driver()
    finally:
        devices._nvml.cache_clear()
    if name is None:
        assert driver is None
    else:
        assert (found, driver) == (name, "580.1")
