"""The benchmark runs, and what it compares computes the same."""

import argparse
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import tyro
from test_bench import script as write_script

from multilstm import PRESETS, ops
from multilstm.__main__ import COMMANDS
from multilstm.selection import BACKENDS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lstm_step.py"
LARGE_VOCABULARY = SCRIPT.with_name("large_vocabulary.py")
ON_GPU = SCRIPT.with_name("on_gpu.py")
RECURRENCE = SCRIPT.with_name("recurrence.py")


SCRIPTS = sorted(SCRIPT.parent.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)  # as for what Python starts
    try:
        runpy.run_path(str(script), run_name="imported")
    except ModuleNotFoundError as error:
        if error.name not in ("jax", "torch", "tensorflow", "triton"):
            raise
        pytest.skip(f"it is for {error.name}, which is not installed")


def run(*arguments, script=SCRIPT):
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_ours_keras_and_a_native_loop_have_the_same_losses(tmp_path):
    """Five steps of Adam from the same weights, for a loss within 1e-3."""
    out = tmp_path / "result.json"
    keras_ones = ["ours", "our_layer", "stock_tutorial", "stock_competent"]
    variants = [*keras_ones, "native"]
    sizes = ["--units", "5", "6", "--rounds", "1", "--steps", "2"]
    done = run(
        *("--shapes", "tiny", *sizes, "--out", out, "--variants", *variants)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == result
    records = {record["variant"]: record for record in result["results"]}
    assert list(records) == variants
    for record in records.values():
        assert record["comparable"], record
        assert record["step_time_ms"]["median"] > 0
    backend = keras.config.backend()
    assert records["ours"]["kernel"].startswith(f"{backend}: ")
    table = run("--markdown", out).stdout
    assert table.count("| ours |") == 1


def test_no_more_is_needed_than_keras_numpy_and_a_framework():
    others = [
        "platformdirs",
        "psutil",
        "pynvml",
        "tyro",
        "pooch",
        "matplotlib",
    ]
    arguments = [
        "--shapes",
        "tiny",
        "--variants",
        "ours",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    code = (
        "import importlib.util, runpy, sys\n"
        f"others = {others}\n"
        "sys.modules.update(dict.fromkeys(others))\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = (\n"
        "    lambda name: None if name in others else find(name)\n"
        ")\n"
        f"sys.argv = ['lstm_step.py', *{arguments}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [result] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert result["comparable"]


def test_benchmark_refuses_sizes_that_cannot_be():
    done = run("--shapes", "tiny", "--rounds", "0")
    assert done.returncode == 2
    assert "received '0'" in done.stderr


def test_a_backend_that_cannot_start_leaves_the_others_theirs(tmp_path):
    backend, out = keras.config.backend(), tmp_path / "result.json"
    absent = next(name for name in BACKENDS if name != backend)
    broken = write_script(
        tmp_path, "python", "import sys; sys.exit('no such GPU')"
    )
    arguments = ["--shapes", "tiny", "--variants", "ours", "--out", out]
    done = run(
        *("--python", f"{absent}={broken}", "--rounds", "1", "--steps", "1"),
        *("--python", f"{backend}={sys.executable}", *arguments),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [record["backend"] for record in result["results"]] == [backend]
    assert "no such GPU" in result["absent"][absent]
    done = run("--python", f"{absent}={broken}", *arguments)
    assert done.returncode == 1
    assert f"No backend can be timed: {absent}: " in done.stderr


PRETEND = """
import json, os, signal, sys, time
answers = {
    "start": dict(device="Chip", gpu=False, versions={}, product_error=1e-7),
    "build": dict(losses=[2.9] * 6, kernel="k", compile_time_seconds=1.0),
    "time_product": {"jax": 1.0},
    "time_window": dict(seconds=0.5, joules=None),
}
windows = 0
for line in sys.stdin:
    method, arguments = json.loads(line)
    if method == "build" and arguments["variant"] == "native":
        time.sleep(60)
    windows += method == "time_window"
    if windows == 2 and "stops" in sys.argv[0]:
        os.kill(os.getppid(), signal.SIGKILL)
        break
    print(json.dumps(answers.get(method, {})), flush=True)
"""


def test_variant_that_hangs_costs_one_shape(tmp_path):
    out = tmp_path / "result.json"
    done = run(
        *("--python", f"jax={write_script(tmp_path, 'hangs', PRETEND)}"),
        *("--shapes", "tiny", "tutorial", "--variants", "ours", "native"),
        *("--rounds", "2", "--timeout", "5", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    first, second = (
        [r.get("reason", "") for r in json.loads(out.read_text())["results"]][
            start : start + 2
        ]
        for start in (0, 2)
    )
    assert "no answer to 'build' within 5 s" in first[1]
    assert second == ["", "its process was lost at a shape before"]


def test_what_was_timed_is_written_after_each_round(tmp_path):
    out = tmp_path / "result.json"
    done = run(
        *("--python", f"jax={write_script(tmp_path, 'stops', PRETEND)}"),
        *("--shapes", "tiny", "--variants", "ours", "--rounds", "3"),
        *("--steps", "2", "--out", out),
    )
    assert done.returncode == -signal.SIGKILL
    [found] = json.loads(out.read_text())["results"]
    assert found["step_time_ms"]["median"] == 250.0


def test_table_of_large_vocabularies_has_what_was_measured(tmp_path):
    out = tmp_path / "result.json"
    sizes = ["--vocabulary-size", "60", "--units", "8", "--steps", "1"]
    done = run(
        *("--kinds", "sampled", "--rounds", "1", "--out", out, *sizes),
        script=LARGE_VOCABULARY,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(
        out.read_text()
    )
    [(kind, found)] = json.loads(out.read_text())["results"].items()
    assert (kind, found["num_sampled"]) == ("sampled", 7)
    assert found["step_time_ms"]["median"] > 0
    assert found["peak_over_start_mb"] > 0
    rows = run("--markdown", out, script=LARGE_VOCABULARY).stdout.splitlines()
    assert f"{found['tokens_per_second']:,.0f} tokens/s" in rows[3]
    assert rows[4] == "| adaptive |  |"


def test_tasks_on_a_gpu_end_in_time_and_none_stops_the_others(tmp_path, capsys):
    script = runpy.run_path(str(ON_GPU))
    quick = "import os; print('first'); print(os.environ['WORD'])"
    stops = (
        "import signal, sys, time; print('begun', flush=True);"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('stopped')));"
        "time.sleep(60)"
    )
    programs = {"quick": quick, "fails": "1 / 0", "stops": stops}
    group = [
        script["Task"](name, (sys.executable, "-c", text), {"WORD": "last"})
        for name, text in programs.items()
    ]
    arguments = (sys.executable, "-c", "import sys; print(*sys.argv[1:])")
    group.append(script["Task"]("limited", arguments, takes_minutes=True))
    script["run"](group, 10, tmp_path)
    said = capsys.readouterr().out.splitlines()
    ended = [line.partition(",")[0] for line in said[::2]]
    assert dict(zip(ended, map(str.strip, said[1::2]), strict=True)) == {
        "quick: exit 0": "last",
        "fails: exit 1": "ZeroDivisionError: division by zero",
        "stops: exit 0": "stopped",
        "limited: exit 0": "--minutes 0.017",
    }
    assert ended[-1] == "stops: exit 0"


def test_runs_on_a_gpu_begin_once_and_are_gone_on_from(tmp_path):
    tasks = runpy.run_path(str(ON_GPU))["tasks"]
    pythons = {"jax": Path("a"), "torch": Path("b")}
    names, commands = [], {}
    for _, group in tasks(pythons, tmp_path):
        names.append([task.name for task in group])
        commands |= {task.name: task.command for task in group}
    assert names == [
        ["lstm-step"],
        ["adam_512-torch"],
        ["adam_512-jax"],
        ["recurrence"],
        ["between-epochs"],
        ["zaremba_medium-torch"],
        ["awd_adam-torch"],
        ["pytorch_650_tied-torch"],
        ["zaremba_large-torch"],
        ["press_wolf_large-torch"],
        ["recorded-steps"],
        ["best-torch", "awd-torch"],
    ]
    assert commands["adam_512-jax"][0] == "a"
    for name in ("adam_512-jax", "awd_adam-torch", "best-torch"):
        preset = name.rpartition("-")[0]
        assert commands[name][commands[name].index("--preset") + 1] == preset
        assert "--resume" in commands[name]  # begins where there is none


def test_task_that_says_nothing_is_not_told_by_what_was_said_before(
    tmp_path, capsys
):
    script = runpy.run_path(str(ON_GPU))
    for text in ("print('test perplexity 71.9')", "pass"):
        command = (sys.executable, "-c", text)
        script["run"]([script["Task"]("one", command)], 10, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said[1].strip() == "test perplexity 71.9"
    assert said[3].strip().startswith("$ ")


def test_commands_on_a_gpu_are_ones_that_there_are(tmp_path, monkeypatch):
    parsers = {
        "lstm_step.py": "parse_arguments",
        "recurrence.py": "main",
        "recorded_steps.py": "main",
    }
    pythons = dict.fromkeys(BACKENDS, Path(sys.executable))
    here = {"KERAS_BACKEND": keras.config.backend()}
    understood = []

    def note(parser, *arguments):
        understood.append(parse(parser, *arguments))
        raise InterruptedError  # instead of what the command would do

    parse = argparse.ArgumentParser.parse_args
    for _, group in runpy.run_path(str(ON_GPU))["tasks"](pythons, tmp_path):
        for task in group:
            if task.takes_minutes:
                words = task.command[task.command.index("multilstm") + 1 :]
                commands = {kind.__name__.lower(): kind for kind in COMMANDS}
                options = tyro.extras.subcommand_cli_from_dict(
                    commands, args=[*words, "--minutes", "1"]
                )
                assert options.preset in PRESETS
                continue
            name, *arguments = task.command[1:]
            if task.environment not in ({}, here):
                continue  # what it imports is not installed
            script = runpy.run_path(name)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [name, *arguments])
                patch.setattr(argparse.ArgumentParser, "parse_args", note)
                with pytest.raises(InterruptedError):
                    script[parsers[Path(name).name]]()
    names = {options.out.name for options in understood}
    of_torch = {"recurrence.json", "recorded-steps.json"}
    is_torch = keras.config.backend() == "torch"
    assert names == {"lstm-step.json", *(of_torch if is_torch else ())}


def test_a_task_that_is_not_there_is_told(tmp_path):
    done = run(
        *("--only", "awd", "--minutes", "1", "--out", tmp_path),
        *("--python", f"torch={sys.executable}"),
        script=ON_GPU,
    )
    assert done.returncode == 2
    assert "--only takes lstm-step, adam_512-torch, recurrence, " in done.stderr


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="of PyTorch's implementation"
)
def test_cudnns_and_tritons_layers_are_compared(tmp_path):
    pytest.importorskip("triton", reason="Triton is for Linux")
    out = tmp_path / "result.json"
    sizes = ["--time-steps", "2", "--steps", "1", "--rounds", "1"]
    arguments = ["--presets", "zaremba_small", "--precisions", "tf32", *sizes]
    done = run(*arguments, "--out", out, script=RECURRENCE)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(out.read_text())["results"]
    assert found["batch_time_features_units"] == [20, 2, 200, 200]
    kernels = {row["variant"]: row["kernel"] for row in found["variants"]}
    assert (
        kernels["triton in_parts=True"] == "torch: triton" != kernels["cudnn"]
    )
    for row in found["variants"]:
        assert row["least_ms"] > 0
        assert row["least_forward_ms"] > 0
        # Of float32, as the interpreter multiplies; 2e-2 on a GPU in TF32.
        most = 2e-2 if ops.has_gpu() else 1e-5
        assert len(row["errors"]) == 5
        assert all(0 < error < most for error in row["errors"].values())
