"""Benchmarks: who is ranked, what is caught, and that no one harms another."""

import dataclasses
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from test_ranking import TINY, timed

import multilstm
from multilstm import PRESETS, benchmark, devices, selection
from multilstm import bench as bench_module
from multilstm.__main__ import main
from multilstm.bench import BENCH_SCHEMA, bench, make_shapes
from multilstm.benchmark import Worker, WorkerError, load_model
from multilstm.config import CONFIG_SCHEMA
from multilstm.errors import UserError, WriteError
from multilstm.files import write_json
from multilstm.native_loops import draw_weights
from multilstm.ranking import PEERS, by_shape, first_loss
from multilstm.selection import installed_versions
from multilstm.workers import WorkerProcess

BACKEND = keras.config.backend()
EXAMPLE = Path(__file__).parents[1] / "examples" / "choose_backend.py"


def script(folder, name, code):
    """A program to be taken for a Python that has a backend."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


# Processes that only pretend to be frameworks.

PRETEND = """
import json, os, signal, sys, time
time_of_a_window, fault = {seconds}, {fault!r}
losses = [2.99573, 2.9, 2.8, 2.7, 2.6, 2.5]
answers = {{
    "start": dict(gpu=False, product_error=2e-7, versions=dict(keras="3")),
    "versions": dict(versions=dict(keras="3")),
    "build": dict(
        kernel="k", losses=losses, compile_time_seconds=1.0, warm_up_seconds=0.6
    ),
    "peak_memory": dict(peak_memory_mb=100.0, peak_device_memory_mb=None),
}}
for line in sys.stdin:
    method, arguments = json.loads(line)
    if method == "start" and fault == "cannot start":
        sys.exit("ImportError: no such framework")
    answer = answers.get(method, {{}})
    if method == "time_window":
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(60)
        if fault == "ends":
            sys.exit("RuntimeError: the device is gone")
        if fault in ("babbles", "counts"):
            print("hello" if fault == "babbles" else 3, flush=True)
            continue
        with open({log!r}, "a") as log:
            print(os.environ["KERAS_BACKEND"], file=log)
        answer = dict(seconds=time_of_a_window, joules={joules})
    if method == "prepare" and fault == "too large":
        if arguments["batch_size"] == 128:
            answer = dict(failure="out of memory")
    if method == "prepare" and fault == "killed by 128":
        if arguments["batch_size"] == 128:
            os.kill(os.getpid(), signal.SIGKILL)
    if method == "start" and fault == "wanders":
        with open({log!r} + ".starts", "a+") as starts:
            print("one", file=starts)
            starts.seek(0)
            number = len(starts.readlines())
        losses[1:] = [loss + 0.1 * number for loss in losses[1:]]
        answers["peak_memory"]["peak_memory_mb"] -= number
    if method == "start" and fault == "rounds":
        with open({log!r} + ".starts", "a+") as starts:
            print("one", file=starts)
            starts.seek(0)
            if len(starts.readlines()) == 1:  # products, in the first process
                answer = answer | dict(product_error=3e-4)
    if method == "prepare_model":
        answer = dict(is_random=fault == "wanders", steps_in_a_row=4)
    if method == "build" and fault == "raises":
        answer = dict(failure="ValueError: no such kernel")
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Makes pretended Pythons; `pretend.log` tells whose windows were timed."""
    monkeypatch.setattr(bench_module, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(bench_module, "first_loss", lambda shape: 2.99573)

    class Pretend:
        log = tmp_path / "log"

        def __call__(self, seconds, fault=None, joules=None):
            code = PRETEND.format(
                seconds=seconds,
                fault=fault,
                joules=joules,
                log=str(self.log),
            )
            name = f"python-{seconds}-{fault}"
            return script(tmp_path, name, code)

    return Pretend()


def rows(result):
    return {record["backend"]: record for record in result["results"]}


def test_windows_take_turns_and_the_fastest_is_first(pretend):
    pythons = {
        "jax": pretend(0.2),
        "torch": pretend(0.1, joules=7.2),
        "tensorflow": pretend(0.4),
    }
    result = bench(pythons, [TINY], processes=1, rounds=3, steps=2)
    there = ["jax", "torch", "tensorflow"]
    back = there[::-1]  # what drifts is not always to the cost of the last
    assert pretend.log.read_text().split() == [*there, *back, *there]
    found = rows(result)
    assert [found[name]["rank"] for name in pythons] == [2, 1, 3]
    jax = found["jax"]
    # 0.2 s for two steps of three rows of four words.
    assert jax["step_time_ms"] == dict.fromkeys(
        ("median", "p20", "p80", "min"), 100.0
    )
    assert jax["tokens_per_second"] == 120.0
    assert jax["joules_per_million_tokens"] is None
    # A second, and what its first window took longer than the others.
    assert jax["compile_time_seconds"] == 1.4
    # 7.2 J for 24 words.
    assert found["torch"]["joules_per_million_tokens"] == 300_000.0


def test_processes_of_other_losses_are_told_by_the_first_ones(pretend):
    result = bench({"jax": pretend(0.1, "wanders")}, [TINY], processes=3)
    found = rows(result)["jax"]
    np.testing.assert_allclose(
        found["losses"], [2.99573, 3.0, 2.9, 2.8, 2.7, 2.6]
    )
    assert found["peak_memory_mb"] == 99.0  # the most of the three
    assert found["steady"] is False
    assert "differ from one process to the next" in found["disagrees"]


def test_processes_of_random_layers_may_have_other_losses(pretend):
    result = bench(
        {"jax": pretend(0.1, "wanders")},
        [TINY],
        model=Path("model.keras"),
        processes=2,
    )
    for found in result["results"]:
        if found["backend"] == "jax":
            assert found["is_random"]
            assert "steady" not in found
            assert found["agrees"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "ValueError: no such kernel"),
        ("killed", "ended by SIGKILL, perhaps for memory"),
        ("hangs", "no answer to 'time_window' within 5 s"),
        ("ends", "status 1: RuntimeError: the device is gone"),
        ("babbles", "what it answered is no JSON object: 'hello'"),
        ("counts", "what it answered is no JSON object: '3'"),
    ],
)
def test_one_that_fails_is_a_row_with_its_reason(pretend, fault, reason):
    pythons = {"jax": pretend(0.2), "torch": pretend(0.1, fault)}
    timeout = 5 if fault == "hangs" else 60  # of which two processes begin
    result = bench(
        pythons, [TINY, TINY], processes=2, rounds=1, steps=2, timeout=timeout
    )
    records = result["results"]
    for of_shape in (records[:3], records[3:]):
        found = rows({"results": of_shape})
        assert reason in found["torch"]["reason"]
        assert found["torch"]["rank"] is None
        assert found["jax"]["rank"] == 1
        assert "pip install tensorflow" in found["tensorflow"]["reason"]


def test_failure_of_one_shape_does_not_lose_the_times_of_another(pretend):
    """A process that lives on is timed in later processes too."""
    pythons = {"jax": pretend(0.1, "too large")}
    large = dataclasses.replace(TINY, batch_size=128)
    result = bench(pythons, [large, TINY], processes=2, rounds=1, steps=2)
    of_large, of_tiny = result["results"][0], result["results"][3]
    assert of_large["reason"] == "out of memory"
    assert [len(windows) for windows in of_tiny["windows_ms"]] == [1, 1]


def test_process_that_died_of_one_shape_is_started_anew_for_the_next(pretend):
    """So that results do not depend on the order of shapes."""
    large = dataclasses.replace(TINY, batch_size=128)
    for shapes in ([large, TINY], [TINY, large]):
        result = bench(
            {"jax": pretend(0.1, "killed by 128")},
            shapes,
            processes=2,
            rounds=1,
            steps=2,
        )
        of_jax = [r for r in result["results"] if r["backend"] == "jax"]
        found = {record["shape"]["batch_size"]: record for record in of_jax}
        assert "ended by SIGKILL" in found[128]["reason"]
        windows = found[TINY.batch_size]["windows_ms"]
        assert [len(process) for process in windows] == [1, 1]


def test_what_numpy_has_no_memory_for_loses_no_other_shape(
    pretend, monkeypatch
):
    def check(shape):
        if shape.batch_size > 64:
            raise MemoryError("Unable to allocate 17.5 PiB")
        return 2.99573

    monkeypatch.setattr(bench_module, "first_loss", check)
    large = dataclasses.replace(TINY, batch_size=65)
    result = bench({"jax": pretend(0.1)}, [TINY, large], processes=1, rounds=1)
    of_tiny, of_large = result["results"][0], result["results"][3]
    assert of_tiny["rank"] == 1
    assert "NumPy cannot check" in of_large["reason"]
    assert "17.5 PiB" in of_large["reason"]


def test_numpy_checks_nothing_where_nothing_ran(pretend, monkeypatch):
    checked = []

    def check(shape):
        checked.append(shape)
        return 2.99573

    monkeypatch.setattr(bench_module, "first_loss", check)
    large = dataclasses.replace(TINY, batch_size=128)
    bench({"jax": pretend(0.1, "too large")}, [large, TINY], processes=1)
    assert checked == [TINY]


def test_backend_without_the_gpu_is_not_timed_beside_those_with_it(
    pretend, monkeypatch
):
    monkeypatch.setattr(devices, "device_and_driver", lambda: ("Chip", "580"))
    result = bench({"jax": pretend(0.1)}, [TINY], processes=1, rounds=1)
    assert "does not see the Chip" in rows(result)["jax"]["reason"]
    assert not pretend.log.exists()


def test_peers_are_of_our_networks_alone(tmp_path):
    with pytest.raises(UserError, match="received peers and the model"):
        bench({"jax": tmp_path}, [TINY], model=tmp_path, peers=True)


def test_own_models_have_the_dtype_of_their_file(tmp_path):
    with pytest.raises(UserError, match="the dtype that its file names"):
        bench({"jax": tmp_path}, [TINY], model=tmp_path, dtype="bfloat16")


def test_python_that_cannot_be_run_is_a_row(pretend, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("no program")
    result = bench(
        {"jax": pretend(0.2), "torch": broken}, [TINY], processes=1, rounds=1
    )
    assert "cannot be run" in rows(result)["torch"]["reason"]
    assert rows(result)["jax"]["rank"] == 1


def test_least_exact_of_the_processes_of_a_row_counts(pretend):
    """Windows of all of them are in its times."""
    result = bench(
        {"jax": pretend(0.1, "rounds"), "torch": pretend(0.1)},
        [TINY],
        processes=2,
        rounds=1,
        steps=2,
    )
    assert rows(result)["jax"]["product_error"] == 3e-4
    assert "not float32" in rows(result)["jax"]["disagrees"]
    assert rows(result)["torch"]["rank"] == 1


@pytest.mark.parametrize("readings", [(None, 5.0), (5.0, None)])
def test_energy_that_was_read_once_is_none(readings, monkeypatch):
    monkeypatch.setattr("multilstm.ops.has_gpu", lambda: True)
    values = iter(readings)
    monkeypatch.setattr(devices, "gpu_joules", lambda: next(values))
    worker = Worker()
    worker.window, worker.loops = [], {"ours": lambda window: 0.0}
    assert worker.time_window("ours")["joules"] is None


@pytest.mark.skipif(
    BACKEND != "jax", reason="JAX alone counts by what may be None"
)
def test_allocator_that_counts_nothing_loses_no_row(monkeypatch):
    """As XLA_PYTHON_CLIENT_ALLOCATOR=platform is, and that of a processor."""
    monkeypatch.setattr("multilstm.ops.has_gpu", lambda: True)
    worker = Worker()
    worker.backend = "jax"
    told = worker.peak_memory()
    assert told["peak_device_memory_mb"] is None
    assert told["peak_memory_mb"] > 0


def test_window_is_timed_from_its_first_step_to_its_last():
    worker = Worker()
    worker.window, worker.loops = [], {"ours": lambda window: time.sleep(0.2)}
    assert worker.time_window("ours")["seconds"] >= 0.2


def test_records_have_the_fields_of_their_schema(pretend):
    """Who changes them gives the schema another version."""
    result = bench(
        {"jax": pretend(0.1)}, [TINY], processes=1, rounds=1, steps=2
    )
    assert BENCH_SCHEMA == "multilstm-bench-1"
    assert result["schema"] == BENCH_SCHEMA
    assert [*result] == [
        *("schema", "device", "driver", "dtype", "model", "protocol"),
        "results",
    ]
    timed_row, absent_row, _ = result["results"]
    common = {"backend", "variant", "shape", "dtype", "installed", "rank"}
    assert absent_row.keys() == common | {"reason"}
    # What `start` and `build` of a real worker say comes with it.
    told = {"gpu", "steady", "warm_up_seconds"}
    assert timed_row.keys() == set(timed()) | told


def test_nothing_to_run_is_refused():
    with pytest.raises(UserError, match="needs at least one backend"):
        bench({}, [TINY])


# The gate


def test_one_word_a_step_is_refused(tmp_path):
    """Its window would come twice and its first loss be a mean of two."""
    shape = dataclasses.replace(TINY, batch_size=1, sequence_length=1)
    with pytest.raises(UserError, match="needs two words or more"):
        bench({"jax": tmp_path}, [TINY, shape])


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "float16"), ("processes", 0), ("rounds", 1.5), ("steps", 0)],
)
def test_what_cannot_be_measured_is_refused(name, value, tmp_path):
    with pytest.raises(UserError, match=f"`{name}` must be .*; received"):
        bench({"jax": tmp_path}, [TINY], **{name: value})


# What may become of a process


def test_what_a_process_started_ends_with_it(tmp_path):
    """Be it a wrapper around a Python that hangs."""
    log = tmp_path / "log"
    child = f"import time; time.sleep(4); open({str(log)!r}, 'w')"
    code = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', "
    wrapper = script(tmp_path, "wrapper", f"{code}{child!r}])")
    worker = WorkerProcess(wrapper, BACKEND, timeout=1)
    with pytest.raises(WorkerError, match="no answer to 'start' within 1 s"):
        worker.ask("start", precision="float32")
    worker.close()  # without waiting for the child to end by itself
    assert not log.exists()


def test_process_ends_where_nobody_is_left_to_answer():
    """Whoever asked may have been killed, and can end it no more."""
    code = (
        "import time; from multilstm import benchmark\n"
        "benchmark.Worker.ask = lambda self, method: time.sleep(600)\n"
        "benchmark.serve()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1)
    process.communicate(b'["start", {}]\n', timeout=60)
    assert process.returncode == 0


def test_ctrl_c_ends_the_process_that_is_asked(pretend, monkeypatch):
    worker = WorkerProcess(pretend(0.1, "hangs"), BACKEND)

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.answers, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.ask("time_window", variant="ours")
    assert worker.process.returncode is not None
    worker.close()


def test_no_file_of_the_folder_is_taken_for_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zipfile.py").write_text("raise SystemExit('mine')")
    worker = WorkerProcess(sys.executable, BACKEND)
    versions = worker.ask("versions", backend=BACKEND)["versions"]
    assert versions == installed_versions(BACKEND)
    worker.close()


def test_process_has_this_package_where_nothing_is_installed(
    tmp_path, monkeypatch
):
    """As in a clone, from another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = "import json, multilstm as m; print(json.dumps({'at': m.__file__}))"
    worker = WorkerProcess(
        sys.executable, BACKEND, program=("-P", "-c", f"input(); {code}")
    )
    assert worker.ask("anything") == {"at": multilstm.__file__}
    worker.close()


# Real processes. The names of all three backends run the one that is here.

REAL = """
import os
os.environ["KERAS_BACKEND"] = {backend!r}
from multilstm import benchmark
from multilstm.model import LanguageModel
set_weights = LanguageModel.set_weights

def swap_gates(model, weights):
    def swapped(weight):
        i, f, rest = (weight[..., 6 * k : 6 * (k + 1)] for k in range(3))
        return benchmark.np.concatenate([f, i, weight[..., 12:]], -1)
    lstms = [swapped(weight) for weight in weights[1:7]]
    set_weights(model, [weights[0], *lstms, *weights[7:]])

def lose_bias(model, weights):
    weights = list(weights)
    weights[3] = 0 * weights[3]
    set_weights(model, weights)

LanguageModel.set_weights = {fault}
benchmark.serve()
"""


def test_gate_catches_wrong_gates_and_a_lost_bias_by_numpy(tmp_path):
    faults = {
        "jax": "set_weights",
        "torch": "swap_gates",
        "tensorflow": "lose_bias",
    }
    pythons = {
        name: script(
            tmp_path, f"real-{name}", REAL.format(backend=BACKEND, fault=fault)
        )
        for name, fault in faults.items()
    }
    result = bench(pythons, [TINY], processes=1, rounds=1, steps=2)
    found = rows(result)
    assert "from NumPy's" in found["torch"]["disagrees"]
    assert "from NumPy's" in found["tensorflow"]["disagrees"]
    right = found["jax"]
    # The median of all is among three of which two are wrong.
    assert "NumPy" not in (right["disagrees"] or "")
    assert right["kernel"].startswith(f"{BACKEND}: ")
    assert right["peak_memory_mb"] > 50
    np.testing.assert_allclose(right["losses"][0], first_loss(TINY), rtol=1e-5)
    json.dumps(result, allow_nan=False)


def test_rounded_products_are_not_taken_for_float32(monkeypatch):
    """With the ten bits of a TF32 number."""
    worker = Worker()
    assert worker.start("float32")["product_error"] < 1e-5
    exact = worker.tensors

    def rounded(*arrays):
        bits = [array.view(np.uint32) & 0xFFFFE000 for array in arrays]
        return exact(*(array.view(np.float32) for array in bits))

    monkeypatch.setattr(worker, "tensors", rounded)
    assert worker.product_error() > 1e-4


# Models of one's own


@pytest.fixture
def own_model(tmp_path):
    path = tmp_path / "model.keras"
    keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(11, 4),
            keras.layers.LSTM(5, return_sequences=True),
            keras.layers.Dense(2),
        ]
    ).save(path)
    return path


def test_what_an_embedding_takes_is_drawn_as_word_ids():
    """Though Keras declares float32 where no `keras.Input` says otherwise."""
    model = keras.Sequential(
        [keras.layers.Embedding(20, 4), keras.layers.Dense(3)]
    )
    model.build((None, None))
    inputs, targets = benchmark.draw_batches(model, 40, 5)
    assert inputs.shape == (40, 5)
    assert inputs.dtype == np.int32
    assert set(inputs.ravel()) == set(range(20))
    assert targets.shape == (40, 5, 3)


def test_numbers_and_word_ids_go_where_they_belong():
    words = keras.Input((None,), name="words")
    numbers = keras.Input((3,), name="numbers")
    embedded = keras.layers.Embedding(7, 4)(words)
    model = keras.Model([words, numbers], [embedded, numbers])
    inputs, _ = benchmark.draw_batches(model, 30, 5)
    of_words, of_numbers = inputs.values()
    assert set(of_words.ravel()) == set(range(7))
    assert of_numbers.dtype == np.float32


def test_a_window_takes_no_more_memory_than_is_told(own_model, monkeypatch):
    """One batch then comes in every step."""
    worker = Worker()
    worker.backend = BACKEND
    num_bytes = 3 * 4 * 4 * (1 + 2)  # of a batch: ids and two numbers each
    for limit in (12 * num_bytes, 12 * num_bytes - 1):
        monkeypatch.setattr(benchmark, "MODEL_DATA_LIMIT", limit)
        worker.prepare_model(
            str(own_model), steps=12, batch_size=3, sequence_length=4
        )
        held = worker.window[0][0] if limit % num_bytes else worker.window[0]
        assert len(held) == (3 if limit % num_bytes else 36)
        _, train = worker.make("as_it_is")
        assert np.isfinite(train(worker.window))
        assert int(worker.model_file.optimizer.iterations) == 12


def test_own_model_is_timed_as_it_is_and_accelerated(own_model, tmp_path):
    code = REAL.format(backend=BACKEND, fault="set_weights")
    pythons = {BACKEND: script(tmp_path, "real", code)}
    result = bench(
        pythons, [TINY], model=own_model, processes=1, rounds=1, steps=2
    )
    found = {
        record["variant"]: record
        for record in result["results"]
        if record["backend"] == BACKEND
    }
    assert list(found) == ["as_it_is", "accelerated"]
    for record in found.values():
        assert record["agrees"], record
    assert found["accelerated"]["kernel"].startswith(f"{BACKEND}: ")
    assert result["model"] == "model.keras"
    assert [*by_shape(result["results"])] == ["model.keras: batch 3, length 4"]
    assert found["as_it_is"]["is_random"] is False


def test_models_that_could_run_code_are_refused(tmp_path):
    path = tmp_path / "lambda.keras"
    keras.Sequential(
        [keras.Input((2,)), keras.layers.Lambda(lambda x: x + 1)]
    ).save(path)
    with pytest.raises(UserError, match="Lambda layers"):
        load_model(path)
    with pytest.raises(UserError, match=r"needs a file MODEL\.keras"):
        load_model(tmp_path / "model.h5")
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(broken)


def test_models_larger_than_allowed_are_refused(own_model, monkeypatch):
    monkeypatch.setattr("multilstm.benchmark.MODEL_FILE_LIMIT", 100)
    with pytest.raises(UserError, match="at most 100 are read"):
        load_model(own_model)


def test_worker_tells_failures_in_a_line():
    worker = Worker()
    worker.start("float32")
    with pytest.raises(WorkerError, match="needs a file"):
        worker.ask(
            "prepare_model",
            path="nowhere",
            steps=1,
            batch_size=1,
            sequence_length=1,
        )


# Shapes


def test_shapes_are_those_of_presets_with_sizes_changed():
    [shape] = make_shapes()
    assert str(shape) == (
        "tutorial: LSTM 500+500, embedding 500, batch 20, length 30, "
        "vocabulary 10,000"
    )
    small, large = make_shapes(
        preset="zaremba_medium", batch_sizes=[4, 8], units=7, layers=1
    )
    assert (small.units, small.embedding_dim, small.batch_size) == ((7,), 7, 4)
    assert large == dataclasses.replace(small, batch_size=8)
    with pytest.raises(UserError, match="`units` must be a whole number"):
        make_shapes(units=0)
    for size in (0, 2.5):
        with pytest.raises(UserError, match=f"`batch_size` must be .* {size}"):
            make_shapes(batch_sizes=[size])


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda of: of.name)
def test_shape_of_every_preset_has_as_many_weights(preset):
    """By what the preset itself counts, of the same layers."""
    [shape] = make_shapes(preset=preset.name, vocabulary_size=100)
    assert [*shape.units] == preset.units_of_layers
    number = sum(weight.size for weight in draw_weights(shape))
    assert number == preset.num_parameters(100)


def test_sizes_of_unequal_and_tied_layers_are_told_apart():
    [awd] = make_shapes(preset="awd")
    assert str(awd) == (
        "awd: LSTM 1150+1150+400, embedding 400 tied, batch 20, length 70, "
        "vocabulary 10,000"
    )
    [small] = make_shapes(preset="awd", units=8)
    assert (small.units, small.embedding_dim) == ((8, 8, 8), 8)
    [deep] = make_shapes(preset="small", layers=3, embedding_dim=256)
    assert (deep.units, deep.embedding_dim) == ((256, 256, 256), 256)
    with pytest.raises(UserError, match="`layers` needs `units`"):
        make_shapes(preset="awd", layers=2)
    with pytest.raises(UserError, match=r"the 400 units .* received 8"):
        make_shapes(preset="awd", embedding_dim=8)


def test_weights_are_large_enough_for_a_lost_bias_to_be_seen():
    biases = [weight for weight in draw_weights(TINY) if weight.ndim == 1]
    assert all(np.abs(bias).max() > 0.3 for bias in biases)


def test_choice_lasts_beside_a_backend_that_cannot_start(pretend, capsys):
    """Nothing is known of it, then and now: nothing has changed."""
    pythons = {"jax": pretend(0.1), "torch": pretend(0.2, "cannot start")}
    arguments = ["choose", "--rounds", "1", "--processes", "1"]
    for backend, python in pythons.items():
        arguments += ["--python", f"{backend}={python}"]
    for said in ("nothing chosen yet", "kept from before"):
        assert main(arguments) == 0
        assert said in capsys.readouterr().out
    assert pretend.log.read_text().split() == ["jax"]


def test_versions_are_known_of_what_does_not_see_the_gpu(pretend, monkeypatch):
    monkeypatch.setattr(devices, "device_and_driver", lambda: ("Chip", "580"))
    result = bench({"jax": pretend(0.1)}, [TINY], processes=1, rounds=1)
    assert rows(result)["jax"]["versions"] == {"keras": "3"}


def test_keras_json_keeps_its_other_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    path = tmp_path / "keras.json"
    assert selection.write_keras_json("torch") == path
    path.write_text('{"floatx": "float32", "backend": "jax"}')
    selection.write_keras_json("torch")
    assert json.loads(path.read_text()) == {
        "floatx": "float32",
        "backend": "torch",
    }
    path.write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        selection.write_keras_json("torch")
    assert path.read_text() == "[]"


# The command


def test_commands_bench_choose_and_report(pretend, tmp_path, capsys):
    python = ["--python", f"{BACKEND}={pretend(0.1)}", "--rounds", "1"]
    bench_out, report_out = tmp_path / "bench", tmp_path / "report"
    sizes = ["--batch-size", "2,4"]
    status = main(["bench", *python, *sizes, "--out", str(bench_out), "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    record = json.loads(printed.out.splitlines()[-1])
    assert json.loads((bench_out / "bench.json").read_text()) == record
    assert f"fastest: {BACKEND}" in printed.out
    assert len(record["results"]) == 6
    reports = {"report.html", "report.md", "report.png"}
    made = {path.name for path in bench_out.iterdir()}
    assert made == {"bench.json", *reports}
    file = str(bench_out / "bench.json")
    assert main(["report", file, file, "--out", str(report_out)]) == 0
    assert {path.name for path in report_out.iterdir()} == reports
    status = main(["choose", *python, "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    choice = json.loads(printed.out.splitlines()[-1])
    assert choice["backend"] == BACKEND


def test_what_was_measured_is_kept_where_nothing_counts(
    pretend, tmp_path, capsys
):
    kept = tmp_path / "bench.json"
    worker = str(pretend(0.1, fault="raises"))
    arguments = ["bench", "--python", f"{BACKEND}={worker}", "--rounds", "1"]
    arguments += ["--out", str(tmp_path)]
    assert main(arguments) == 1
    assert kept.exists()  # what went wrong is worth more than nothing
    kept.write_text("measured")
    assert main(arguments) == 1
    assert kept.read_text() == "measured"
    assert f"{kept} is kept as it was" in capsys.readouterr().err
    assert main([*arguments, "--model", str(tmp_path / "no.keras")]) == 1
    assert "--model must be a file" in capsys.readouterr().err


def test_peers_of_each_backend_have_rows_and_no_rank(pretend, tmp_path, capsys):
    python = ["--python", f"{BACKEND}={pretend(0.1)}", "--rounds", "1"]
    status = main(["bench", *python, "--peers", "--out", str(tmp_path)])
    assert status == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    ranks = {
        record["variant"]: record["rank"]
        for record in results
        if record["backend"] == BACKEND
    }
    assert ranks == {"ours": 1} | dict.fromkeys(PEERS)


def test_choice_is_kept_and_written_for_keras(
    pretend, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    python = ["--python", f"{BACKEND}={pretend(0.1)}", "--rounds", "1"]
    assert main(["choose", *python, "--write-keras-json"]) == 0
    settings = json.loads((tmp_path / "keras.json").read_text())
    assert settings["backend"] == BACKEND
    assert "written to " in capsys.readouterr().out


def test_model_of_ones_own_has_its_python_and_length(pretend, tmp_path, capsys):
    (tmp_path / "model.keras").touch()
    status = main(
        [
            *("bench", "--model", str(tmp_path / "model.keras")),
            *("--python", f"{BACKEND}={pretend(0.1)}", "--rounds", "1"),
            *("--sequence-length", "4", "--batch-size", "2"),
            *("--out", str(tmp_path / "out")),
        ]
    )
    assert status == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    titles = {*by_shape(result["results"])}
    assert titles == {"model.keras: batch 2, length 4"}


def test_run_that_goes_on_is_looked_up_by_its_own_sizes(tmp_path):
    from multilstm.__main__ import _what_to_train
    from multilstm.options import Train

    run = tmp_path / "run"
    config = {
        "schema": CONFIG_SCHEMA,
        "precision": "mixed_bfloat16",
        "max_vocabulary": 50_000,
        "preset_settings": dataclasses.asdict(PRESETS["awd"]),
    }
    write_json(run / "config.json", config)
    shape, dtype = _what_to_train(Train(out=run, resume=True))
    assert (shape["embedding_dim"], shape["tied"]) == (400, True)
    assert shape["vocabulary_size"] == 50_000
    assert (shape["units"], dtype) == ([1150, 1150, 400], "bfloat16")
    shape, dtype = _what_to_train(Train(out=run))  # which then is refused
    assert (shape["units"], dtype) == ([256, 256], None)


@pytest.fixture
def example(monkeypatch):
    """Runs the example as a script."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    return lambda: runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_example_takes_what_it_found_fastest(
    example, pretend, monkeypatch, capsys
):
    pythons = {BACKEND: pretend(0.1)}
    monkeypatch.setattr(selection, "find_pythons", lambda: pythons)
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setattr(
        selection, "why_stale", lambda *_: None
    )  # what is pretended has no versions
    example()
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"Keras {keras.__version__} on {BACKEND}: ")
    assert "multilstm choose, " in last


def test_example_ends_in_one_line(example, pretend, monkeypatch):
    pythons = {BACKEND: pretend(0.1, fault="raises")}
    monkeypatch.setattr(selection, "find_pythons", lambda: pythons)
    with pytest.raises(SystemExit, match=r"^error: No backend can be chosen"):
        example()

    ends = (SystemExit, KeyboardInterrupt)  # else it ends pytest

    def press_ctrl_c():
        raise KeyboardInterrupt

    monkeypatch.setattr(selection, "find_pythons", press_ctrl_c)
    with pytest.raises(ends, match=r"^error: interrupted$"):
        example()


def test_full_disk_is_told_in_a_line(pretend, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multilstm.commands.write_json", full)
    python = ["--python", f"{BACKEND}={pretend(0.1)}", "--rounds", "1"]
    assert main(["bench", *python, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err.splitlines()[-1]
    assert f"fastest: {BACKEND}" in printed.out  # not lost


def test_where_a_result_goes_is_tried_before_it_is_measured(
    pretend, tmp_path, monkeypatch, capsys
):
    no_folder = tmp_path / "file"
    no_folder.touch()
    monkeypatch.setenv("MULTILSTM_CACHE", str(no_folder))
    python = ["--python", f"{BACKEND}={pretend(0.1)}"]
    for command in (
        ["choose", *python],
        ["bench", *python, "--out", str(no_folder / "out")],
    ):
        assert main(command) == 1
        assert "must be a folder that can be" in capsys.readouterr().err
    assert not pretend.log.exists()
    assert no_folder.read_bytes() == b""


def test_choice_that_cannot_be_kept_is_told(pretend, monkeypatch, capsys):
    def full(choice):
        raise WriteError("No space left on device")

    monkeypatch.setattr("multilstm.commands.save_choice", full)
    python = ["--python", f"{BACKEND}={pretend(0.1)}", "--rounds", "1"]
    assert main(["choose", *python]) == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert f"{BACKEND} on " in printed.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--batch-size", "20;64"], "--batch-size needs whole"),
        (["bench", "--rounds", "0"], "`rounds` must be a whole number, 1 or"),
        (["bench", "--units", "-1"], "`units` must be"),
        (["bench", "--vocabulary-size", "1"], "a whole number, 2 or more"),
        (["bench", "--timeout", "inf"], "--timeout must be above 0 s and at"),
        (["doctor", "--timeout", "-1"], "--timeout must be above 0 s and at"),
        (
            ["bench", "--model", "m.keras", "--units", "3"],
            "--units would do nothing beside --model",
        ),
        (
            ["choose", "--results", "b.json", "--preset", "awd"],
            "--preset would do nothing beside --results",
        ),
        (
            ["choose", "--results", "b.json", "--dtype", "bfloat16"],
            "--dtype would do nothing beside --results",
        ),
        (
            ["choose", "--results", "b.json", "--processes", "5"],
            "--processes would do nothing beside --results",
        ),
        (["choose", "--preset", "nothing"], "nothing"),
        (["report", "nowhere.json"], "nowhere.json is needed"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments, said, capsys):
    assert main(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
