"""Choices: what is kept, for which sizes, and when one is stale."""

import copy
import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import keras
import pytest
from test_bench import script
from test_ranking import TINY, timed

from multilstm import choices, devices, selection
from multilstm.__main__ import main
from multilstm.bench import BENCH_SCHEMA
from multilstm.choosing import choose, valid_choice
from multilstm.errors import UserError
from multilstm.ranking import rank
from multilstm.selection import select_backend

BACKEND = keras.config.backend()


@pytest.fixture
def result(monkeypatch):
    """A benchmark in which this backend was second to one not installed."""
    monkeypatch.setattr(devices, "device_and_driver", lambda: ("Chip", None))
    monkeypatch.setattr(selection, "device_and_driver", lambda: ("Chip", None))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    absent = next(name for name in selection.BACKENDS if name != BACKEND)
    monkeypatch.setattr(selection, "is_installed", BACKEND.__eq__)
    records = [
        timed(absent, windows=(1.0, 1.0, 1.0)),
        timed(BACKEND, versions=selection.installed_versions(BACKEND)),
    ]
    rank(records)
    return {
        "schema": BENCH_SCHEMA,
        "device": "Chip",
        "driver": None,
        "dtype": "float32",
        "model": None,
        "protocol": {"rounds": 3},
        "results": records,
    }


def test_choice_is_kept_and_taken_where_nothing_else_names_one(result):
    choice = choose(result)
    absent = choice["backend"]
    assert absent != BACKEND
    assert choice["ranking"] == [absent, BACKEND]
    kept = json.loads(Path(choice["path"]).read_text())
    assert kept["schema"] == choices.CHOICE_SCHEMA
    backend, reason = select_backend(None, dataclasses.asdict(TINY))
    assert backend == BACKEND
    assert reason.startswith("multilstm choose, ")
    assert f"{absent} was faster and is not installed here" in reason
    assert os.environ["KERAS_BACKEND"] == BACKEND
    # What the user says comes first, and now KERAS_BACKEND is set.
    assert select_backend()[1] == "KERAS_BACKEND"
    assert select_backend(BACKEND)[1] == "--backend"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"driver": "580.1"}, "driver was 580.1 and is None"),
        ({"versions": {"keras": "3.0"}}, "keras was 3.0 and is 3"),
    ],
)
def test_changed_driver_or_version_makes_a_choice_stale(result, change, said):
    if "driver" in change:
        result["driver"] = change["driver"]
    else:
        result["results"][1] |= change
    choice = choose(result)
    _, reason = select_backend()
    assert said in reason
    assert "run multilstm choose" in reason
    shape = dataclasses.asdict(TINY)
    # The other could not start then, and is not asked.
    kept = json.loads(Path(choice["path"]).read_text())
    kept["versions"][choice["backend"]] = {}
    Path(choice["path"]).write_text(json.dumps(kept))
    pythons = dict.fromkeys(kept["versions"], Path(sys.executable))
    valid, why_not = valid_choice(shape, "float32", pythons)
    assert valid is None
    assert said in why_not


def test_choice_that_holds_goes_before_a_nearer_one_that_is_stale(result):
    """Else to choose anew, as one is told to, would change nothing."""
    wanted = dataclasses.asdict(TINY)
    stale = json.loads(json.dumps(result))
    stale["driver"] = "580.1"
    choose(stale)
    assert "is stale" in select_backend(None, wanted)[1]
    os.environ.pop("KERAS_BACKEND")
    larger = dataclasses.asdict(dataclasses.replace(TINY, batch_size=512))
    for record in result["results"]:
        record["shape"] = larger
    choose(result)
    backend, reason = select_backend(None, wanted)
    assert backend == BACKEND
    assert reason.startswith("multilstm choose, ")
    assert "batch 512" in reason


def test_cores_and_threads_make_a_choice_of_a_processor_stale(
    result, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result["protocol"]["processors"] = devices.processors()
    choose(result)
    assert select_backend()[1].startswith("multilstm choose, ")
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS was 1 and is 7" in select_backend()[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(97)})
    assert "and is 97" in select_backend()[1]


def test_choice_that_is_found_is_told_as_when_it_was_made(result):
    made = choose(result)
    assert choices.find_choice("Chip") == json.loads(json.dumps(made))


@pytest.mark.parametrize(
    "damage",
    [
        {"equal_within_noise": 5},
        {"equal_within_noise": ["caffe"]},
        {"ranking": ["jax.numpy", "jax", "torch", "tensorflow"]},
    ],
)
def test_choice_with_other_than_backends_in_it_is_passed_over(result, damage):
    path = Path(choose(result)["path"])
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert choices.find_choice("Chip") is None


def test_what_is_gone_makes_a_choice_stale():
    choice = {"driver": None, "versions": {BACKEND: {"keras": "3", "a": "1"}}}
    stale = choices.why_stale(choice, BACKEND, None, {"keras": "3"})
    assert stale == "a was 1 and is None"
    assert choices.why_stale(
        choice, BACKEND, None, {"keras": "3", "a": "1"}
    ) is (None)


def test_backends_are_ranked_by_time_and_not_by_name(result):
    result["results"] = [
        timed(backend, windows=(ms, ms, ms))
        for backend, ms in (("jax", 30.0), ("tensorflow", 20.0), ("torch", 10))
    ]
    rank(result["results"])
    choice = choose(result)
    assert choice["ranking"] == ["torch", "tensorflow", "jax"]
    assert choice["equal_within_noise"] == []
    result["results"][1] = timed("tensorflow", windows=(10.1, 10.1, 10.1))
    rank(result["results"])
    choice = choose(result)
    assert sorted(choice["equal_within_noise"]) == ["tensorflow", "torch"]
    assert choice["ranking"][2] == "jax"


def test_choice_for_another_device_is_not_taken(result):
    choose({**result, "device": "Another"})
    assert "choose" not in select_backend()[1]


def test_nearest_class_of_shapes_is_taken(result):
    for batch_size in (2, 32):
        shape = dataclasses.asdict(
            dataclasses.replace(TINY, batch_size=batch_size)
        )
        for record in result["results"]:
            record["shape"] = shape
        choose(result)
    wanted = dataclasses.asdict(dataclasses.replace(TINY, batch_size=24))
    assert "batch 32" in select_backend(None, wanted)[1]


@pytest.mark.parametrize("change", [{"embedding_dim": 600}, {"tied": True}])
def test_choice_is_not_kept_for_other_embeddings(result, change):
    """Which decide what the first kernel and the logits cost."""
    del result["results"][0]
    rank(result["results"])
    choose(result)
    pythons = {BACKEND: Path(sys.executable)}
    shape = dataclasses.asdict(TINY)
    assert valid_choice(shape, "float32", pythons)[0] is not None
    choice, why_not = valid_choice(shape | change, "float32", pythons)
    assert choice is None
    assert "nothing chosen yet" in why_not
    # Each has a file of its own.
    result["results"][0]["shape"] = shape | change
    choose(result)
    for of in (shape, shape | change):
        choice, _ = valid_choice(of, "float32", pythons)
        assert choice["shape"] == json.loads(json.dumps(of))


def test_nothing_that_passed_cannot_be_chosen(result):
    for record in result["results"]:
        record |= {"rank": None, "agrees": False, "disagrees": "it is wrong"}
    with pytest.raises(UserError, match="it is wrong"):
        choose(result)


def test_choice_of_an_older_version_is_passed_over(result):
    path = Path(choose(result)["path"])
    choice = json.loads(path.read_text())
    ranking = choice.pop("ranking")
    path.write_text(json.dumps(choice))
    assert choices.find_choice("Chip") is None
    del choice["shape_class"]["embedding"]
    older = {"ranking": ranking, "schema": "multilstm-choice-1"}
    for content in (choice | older, choice | {"ranking": ranking}):
        path.write_text(json.dumps(content))
        assert choices.find_choice("Chip") is None


@pytest.mark.parametrize(
    "change",
    [
        {"versions": []},
        {"versions": {BACKEND: None}},
        {"ranking": 5},
        {"ranking": []},
        {"tokens_per_second": {}},
        {"tokens_per_second": dict.fromkeys(selection.BACKENDS, 0)},
        {"shape": {}},
        {"made": 7},
    ],
    ids=str,
)
def test_choice_that_cannot_be_read_is_passed_over(change, result):
    path = Path(choose(result)["path"])
    assert choices.find_choice("Chip") is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert choices.find_choice("Chip") is None


def test_choice_holds_among_the_same_backends_and_versions(result):
    result["results"][0]["versions"] = {"keras": "3"}
    choose(result)
    shape = dataclasses.asdict(TINY)
    absent = result["results"][0]["backend"]
    both = {BACKEND: Path(sys.executable), absent: Path(sys.executable)}
    _, why_not = valid_choice(shape, "float32", {BACKEND: both[BACKEND]})
    assert why_not == "the last choice was among other backends"
    _, why_not = valid_choice(shape, "float32", both)
    assert "keras was 3 and is" in why_not
    wider = dataclasses.asdict(dataclasses.replace(TINY, units=(64, 64)))
    assert "nothing chosen yet" in valid_choice(wider, "float32", both)[1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(0)", "ended with status 0"),
        ("import time; time.sleep(20)", "no answer to 'versions' within 0.5 s"),
        (None, "cannot be run"),
    ],
)
def test_python_that_tells_no_versions_ends_a_choice(
    result, tmp_path, code, said
):
    del result["results"][0]
    rank(result["results"])
    choose(result)
    broken = script(tmp_path, "broken", code)
    if code is None:
        broken.chmod(0o644)
    shape = dataclasses.asdict(TINY)
    choice, why_not = valid_choice(
        shape, "float32", {BACKEND: broken}, timeout=0.5
    )
    assert choice is None
    assert why_not.startswith(f"{BACKEND} is not as it was: ")
    assert said in why_not


def test_two_that_choose_at_once_leave_one_whole_file(result, own_cache):
    threads = [
        threading.Thread(target=choose, args=(result,)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [path] = (own_cache / "choices").iterdir()
    assert choices.find_choice("Chip")["ranking"][1] == BACKEND
    assert (
        path.name == "chip-float32-2x8-embedding8-batch4-length4-words16.json"
    )


def test_choice_on_a_gpu_is_that_for_tf32_unless_told(result, monkeypatch):
    choose(result)
    assert choices.find_choice("Chip")["dtype"] == "float32"
    monkeypatch.setattr(devices, "_nvml", lambda: ("NVML", "its GPU"))
    assert choices.find_choice("Chip") is None
    assert choices.find_choice("Chip", "float32")["dtype"] == "float32"
    choose(result | {"dtype": "tf32"})
    assert choices.find_choice("Chip")["dtype"] == "tf32"


def test_broken_choice_is_passed_over(result, own_cache):
    Path(choose(result)["path"]).write_text("{")
    assert choices.find_choice("Chip") is None


def test_choose_takes_a_result_file_of_this_device_alone(
    result, tmp_path, capsys, own_cache
):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    assert main(["choose", "--results", str(path), "--json"]) == 0
    printed = capsys.readouterr()
    choice = json.loads(printed.out.splitlines()[-1])
    assert choice["ranking"][1] == BACKEND
    assert len([*(own_cache / "choices").iterdir()]) == 1
    broken = {name: result[name] for name in ("schema", "device", "driver")}
    odd = copy.deepcopy(result)
    for record in odd["results"]:
        record["shape"]["batch_size"] = 0  # which has no logarithm
    for content, said in (
        (result | {"driver": "580.1"}, "must be of this device and driver"),
        (broken, "must be whole, as bench wrote it"),
        (odd, "must be whole, as bench wrote it"),
        (result | {"model": "m.keras"}, "must hold times of language models"),
        (result | {"results": []}, "must hold times of language models"),
        ({"schema": BENCH_SCHEMA}, "must be of this device and driver"),
    ):
        path.write_text(json.dumps(content))
        assert main(["choose", "--results", str(path)]) == 1
        assert said in capsys.readouterr().err


def test_choices_of_several_shapes_are_all_told(
    result, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    first, second = result["results"]
    wide = dataclasses.asdict(dataclasses.replace(TINY, batch_size=64))
    other = timed(first["backend"], windows=(30.0, 30.0, 30.0), shape=wide)
    mine = second | {"shape": wide}
    rank([other, mine])
    result["results"] += [other, mine]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    choose = ["choose", "--results", str(path)]
    assert main([*choose, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["choices"]
    backends = [choice["backend"] for choice in told]
    assert backends == [first["backend"], BACKEND]
    assert main([*choose, "--write-keras-json"]) == 1
    assert "needs one backend" in capsys.readouterr().err
    assert not (tmp_path / "keras.json").exists()


def test_no_choice_is_kept_where_one_of_a_file_cannot_be_made(
    result, tmp_path, capsys, own_cache
):
    wide = dataclasses.asdict(dataclasses.replace(TINY, batch_size=64))
    result["results"].append(
        timed(shape=wide, agrees=False, disagrees="it is wrong", rank=None)
    )
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    assert main(["choose", "--results", str(path)]) == 1
    assert "it is wrong" in capsys.readouterr().err
    assert not (own_cache / "choices").exists()


def test_choice_by_an_old_file_is_called_stale_at_once(
    result, tmp_path, capsys
):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    assert main(["choose", "--results", str(path)]) == 0
    assert "stale" not in capsys.readouterr().out
    result["results"][1]["versions"] = {"keras": "3.0"}
    path.write_text(json.dumps(result))
    assert main(["choose", "--results", str(path)]) == 0
    assert "is stale, " in capsys.readouterr().out


def test_backend_written_for_keras_and_not_here_is_warned_of(
    result, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr("multilstm.commands.is_installed", BACKEND.__eq__)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    choose = ["choose", "--results", str(path), "--write-keras-json"]
    absent = result["results"][0]["backend"]
    warning = f"{absent} is not installed here"
    assert main(choose) == 0
    assert warning in capsys.readouterr().out
    del result["results"][0]
    rank(result["results"])
    path.write_text(json.dumps(result))
    assert main(choose) == 0
    assert "not installed" not in capsys.readouterr().out


def test_choice_for_a_precision_is_taken_where_it_is_asked_for(
    result, capsys, tmp_path
):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result | {"dtype": "bfloat16"}))
    assert main(["choose", "--results", str(path)]) == 0
    assert "--precision mixed_bfloat16 alone" in capsys.readouterr().out
    shape = dataclasses.asdict(TINY)
    assert "choose" not in select_backend(None, shape)[1]
    os.environ.pop("KERAS_BACKEND")
    assert "choose" in select_backend(None, shape, "bfloat16")[1]
