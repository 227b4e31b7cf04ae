"""What keeps files and addresses of strangers from running or taking all."""

import ast
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import tiny_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version

import multilstm
from multilstm import (
    Vocabulary,
    load_run,
    plan,
    read_words,
)
from multilstm.__main__ import main
from multilstm.bench import BENCH_SCHEMA
from multilstm.errors import UserError
from multilstm.report import read_results
from multilstm.run_folder import RunFolder
from multilstm.selection import COMPARISON_SCHEMA

PACKAGE = Path(multilstm.__file__).parent

# Of Keras, by the version in which each is mended.
CVES = {
    "CVE-2024-3660": "2.13",  # a Lambda's code
    "CVE-2025-1550": "3.9.0",  # any code, in spite of safe_mode
    "CVE-2025-8747": "3.11.0",
    "CVE-2025-9906": "3.11.0",
    "CVE-2025-9905": "3.11.3",  # .h5, whatever safe_mode says
    "CVE-2025-49655": "3.11.3",
    "CVE-2026-0897": "3.13.1",  # HDF5 that claims any shape
    "CVE-2026-1462": "3.13.2",  # TFSMLayer
    "CVE-2026-1669": "3.14.0",  # HDF5 that links to other files
    "CVE-2026-12481": "3.15.0",  # Lambda.from_config
}


def keras_requirement():
    requirements = map(Requirement, importlib.metadata.requires("multilstm"))
    [found] = [r for r in requirements if r.name == "keras" and not r.marker]
    return found.specifier


@pytest.mark.parametrize("cve", CVES)
def test_no_version_of_keras_with_a_known_hole_is_taken(cve):
    mended = Version(CVES[cve])
    assert not keras_requirement().contains(
        f"{mended.major}.{mended.minor - 1}"
    )
    [floor] = [s for s in keras_requirement() if s.operator == ">="]
    assert Version(floor.version) >= mended
    assert Version(keras.__version__) >= mended


def calls_and_imports():
    """The names of what the package imports, and its calls as text."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path, str(node.module)
            elif isinstance(node, ast.Call):
                yield path, ast.unparse(node)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b",
        r"^(eval|exec|compile)\(",
        r"^torch\.load\(",
        r"allow_pickle=(?!False)",
        r"safe_mode=(?!True)",
        r"enable_unsafe_deserialization",
        r"shell=(?!False)",
        r"^(os\.system|os\.popen)\(",
    ],
)
def test_package_has_no_call_that_runs_what_a_file_says(pattern):
    found = [
        (path.name, text)
        for path, text in calls_and_imports()
        if re.search(pattern, text)
    ]
    assert found == []


@pytest.mark.parametrize("name", ["np.load", "keras.saving.load_model"])
def test_every_reader_of_arrays_and_models_says_that_it_is_safe(name):
    calls = [
        text
        for _, text in calls_and_imports()
        if text.startswith((f"{name}(", f"partial({name},"))
    ]
    assert calls
    for call in calls:
        assert "allow_pickle=False" in call or "safe_mode=True" in call


def test_nothing_is_unpickled_while_a_run_is_made_and_read(tmp_path):
    """Whoever calls it: Python tells of each object that a pickle names."""
    corpus = tiny_runs.write_corpus(tmp_path / "letters")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "found = []\n"
        "sys.addaudithook(lambda event, of: found.append(of)\n"
        "    if event == 'pickle.find_class' else None)\n"
        "from multilstm.__main__ import main\n"
        "out = sys.argv[2]\n"
        "train = ['train', '--corpus', sys.argv[1], '--out', out]\n"
        "assert main([*train, '--epochs', '1']) == 0\n"
        "before = len(found)\n"
        "assert main([*train, '--epochs', '2', '--resume']) == 0\n"
        "assert main(['evaluate', out]) == 0\n"
        "assert main(['generate', out]) == 0\n"
        "sys.exit(str(found[before:]) if len(found) > before else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, program, corpus, tmp_path / "run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that is done."""
    root = tmp_path_factory.mktemp("arguments")
    corpus = tiny_runs.write_corpus(root / "letters")
    with pytest.MonkeyPatch.context() as patch:
        for name, preset in tiny_runs.presets().items():
            patch.setitem(multilstm.PRESETS, name, preset)
        multilstm.train(
            "tiny", corpus=corpus, out=root / "run", epochs=1, progress=False
        )
    return root / "run"


NO_NUMBERS = (None, "10", [], {}, True, -1, 10**30)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("corpus", (None, 3, [])),
        ("max_vocabulary", ("900", "", [])),
        ("seed", (1.5, *NO_NUMBERS)),
        ("precision", (3, [])),
        ("checkpoint_minutes", (None, "", float("nan"))),
        ("preset_settings.batch_size", NO_NUMBERS),
        ("preset_settings.sequence_length", NO_NUMBERS),
        ("preset_settings.units", (None, 1.5, [1, "a"])),
        ("preset_settings.num_layers", (0, 1.5, 10**12, *NO_NUMBERS)),
        ("preset_settings.input_dropout", (None, "", [])),
        ("preset_settings.embedding_dropout", (None, "", [])),
        ("preset_settings.activation_regularization", (None, "")),
        ("preset_settings.length_std", ("", [])),
        ("preset_settings.tied_embeddings", (None, 1)),
        ("preset_settings.loss", ([], "all")),
    ],
    ids=str,
)
def test_config_with_another_kind_of_value_is_one_line(
    name, values, run, tmp_path, capsys
):
    path = shutil.copytree(run, tmp_path / "run") / "config.json"
    *group, last = name.split(".")
    command = ["train", "--out", str(path.parent), "--resume", "--epochs", "2"]
    for value in values:
        config = json.loads((run / "config.json").read_text())
        (config[group[0]] if group else config)[last] = value
        path.write_text(json.dumps(config))
        for words in (command, ["evaluate", str(path.parent)]):
            status = main(words)
            [told] = capsys.readouterr().err.splitlines()
            assert (status, told[:7]) == (1, "error: "), value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)
# Nothing, anything, or JSON of our kind with anything in it.
FILES = (
    st.binary(max_size=300)
    | JSON.map(lambda content: json.dumps(content).encode())
    | st.dictionaries(
        st.sampled_from(
            [
                *("words", "model", "preset_settings", "history", "preset"),
                *("results", "device", "driver", "dtype", "protocol"),
            ]
        ),
        JSON,
    ).flatmap(
        lambda content: st.sampled_from(
            [
                "multilstm-vocabulary-1",
                "multilstm-run-1",
                BENCH_SCHEMA,
                COMPARISON_SCHEMA,
            ]
        ).map(lambda schema: json.dumps(content | {"schema": schema}).encode())
    )
)


def what_it_says(read):
    """The line of a reader that refuses; empty where it does not."""
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def readers(folder):
    """What reads files, each with its file."""
    run = RunFolder(folder)
    return {
        "vocabulary": (run.vocabulary, Vocabulary.load),
        "config": (run.config, lambda path: load_run(path.parent)),
        "resumed config": (
            run.config,
            lambda path: plan.read_plan(RunFolder(path.parent), {}),
        ),
        "text": (folder / "train.txt", lambda path: list(read_words(path))),
        "result": (folder / "bench.json", lambda path: read_results([path])),
    }


@pytest.mark.parametrize("name", list(readers(Path())))
def test_no_file_makes_a_reader_say_more_than_a_line(
    name, run, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("files")
    path, read = readers(folder)[name]
    if name == "config":  # beside the other files of a run
        shutil.copytree(run, folder, dirs_exist_ok=True)

    @settings(max_examples=150, deadline=None, database=None)
    @given(content=FILES)
    def try_file(content):
        path.write_bytes(content)
        assert "\n" not in what_it_says(lambda: read(path))

    try_file()


def leaves(content, *path):
    """The path of every value in JSON that holds no other."""
    pairs = enumerate(content) if isinstance(content, list) else content.items()
    for key, value in pairs:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, *path, key)
        else:
            yield (*path, key)


def test_no_result_makes_a_report_say_more_than_a_line(tmp_path, rng):
    """One value of a result is another, or is missing."""
    source = Path(__file__).parent.parent / "benchmarks" / "results"
    names = ("bench-tutorial-2core-cpu-1", "zaremba-small-ptb-compare")
    refused = 0
    for name in names:
        text = (source / f"{name}.json").read_text()
        places = list(leaves(json.loads(text)))
        for number in rng.integers(len(places), size=60):
            changed = json.loads(text)
            *path, last = places[number]
            inner = changed
            for key in path:
                inner = inner[key]
            strange = (None, "", -1, 10**400, [], {}, "<script>", True)
            inner[last] = strange[number % len(strange)]
            file = tmp_path / "result.json"
            file.write_text(json.dumps(changed))
            said = what_it_says(lambda file=file: read_results([file]))
            refused += bool(said)
            assert "\n" not in said
    assert refused > 10


WITH_FRACTIONS = (
    "generate RUN --max-new-tokens 3 --temperature",
    "generate RUN --max-new-tokens 3 --top-p",
    "train --learning-rate",
    "train --until-perplexity",
    "train --checkpoint-minutes",
)
WHOLE = (
    "evaluate RUN --batch-size",
    "evaluate RUN --sequence-length",
    "generate RUN --max-new-tokens 3 --top-k",
    "generate RUN --max-new-tokens 3 --seed",
    "predict RUN --start 5 --num-words",
    "predict RUN --start",
    "train --batch-size",
    "train --sequence-length",
    "train --train-tokens",
    "train --max-vocabulary",
    "train --patience",
    "train --seed",
    "train --devices",
)


@pytest.mark.parametrize(
    ("command", "value"),
    [
        *itertools.product(WITH_FRACTIONS + WHOLE, ("0", "-1", str(10**15))),
        # Which the parser refuses where whole numbers are asked for.
        *itertools.product(WITH_FRACTIONS + WHOLE[:1], ("nan", "1e999")),
    ],
)
def test_strange_numbers_end_in_a_result_or_one_line(
    command, value, run, tiny, tmp_path, capfd
):
    words = [str(run) if word == "RUN" else word for word in command.split()]
    if words[0] == "train":
        corpus, out = run.parent / "letters", tmp_path / "out"
        settings = f"--preset {tiny} --epochs 1 --corpus {corpus} --out {out}"
        words[1:1] = settings.split()
    try:
        status = main([*words, value])
    except (
        SystemExit
    ) as end:  # of the parser, for what is no number of its kind
        status = end.code
        assert status == 2
    _, errors = capfd.readouterr()
    assert status in (0, 1, 2)
    if status == 1:
        assert sum("error:" in line for line in errors.splitlines()) == 1
    assert "Traceback" not in errors
