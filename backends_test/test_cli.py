"""The commands: what they print, how they end, what --json gives."""

import errno
import json
import os
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

import multilstm
from multilstm import PRESETS, evaluate, load_corpus, load_run
from multilstm.__main__ import main
from multilstm.preset_files import find_preset

PROJECT = Path(__file__).parent.parent
BACKEND = keras.config.backend()


@pytest.fixture
def command(capsys):
    """Runs a command; its exit status, its lines, and what it complains of."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def run_folder(command, tiny, corpus_folder, tmp_path):
    """A folder with a trained run."""
    out = tmp_path / "run"
    arguments = ("train", "--preset", tiny, "--corpus", corpus_folder)
    status, _, _ = command(*arguments, "--out", out, "--epochs", 1)
    assert status == 0
    return out


@pytest.fixture
def tiny_windows_untied(tiny, monkeypatch):
    """A small preset with a projection of its own."""
    preset = replace(PRESETS["tiny_windows"], tied_embeddings=False)
    monkeypatch.setitem(PRESETS, "tiny_windows", preset)
    return preset.name


def record(lines):
    return json.loads(lines[-1])


def test_softmax_of_the_command_line_is_that_of_the_run(
    command, tiny_windows_untied, corpus_folder, tmp_path
):
    arguments = ["train", "--preset", tiny_windows_untied, "--epochs", 1]
    arguments += ["--corpus", corpus_folder, "--out", tmp_path / "run"]
    status, lines, _ = command(
        *arguments, "--softmax", "adaptive", "--cutoffs", 2, 5, "--json"
    )
    assert status == 0
    assert record(lines)["softmax"] == "adaptive"
    model, *_ = load_run(tmp_path / "run")
    assert model.settings["cutoffs"] == [2, 5]
    status, _, err = command(*arguments, "--num-sampled", 0, "--resume")
    assert status == 1
    assert "num_sampled=None; received 0" in err


def test_train_prints_what_the_result_says(
    command, tiny, corpus_folder, tmp_path
):
    out = tmp_path / "run"
    status, lines, err = command(
        *("train", "--preset", tiny, "--corpus", corpus_folder),
        *("--out", out, "--epochs", 2, "--json"),
    )
    assert status == 0
    result = json.loads((out / "result.json").read_text())
    assert record(lines) == result
    assert lines[0] == f"backend: {BACKEND} (KERAS_BACKEND)"
    assert f"test perplexity {result['test_perplexity']:.2f}" in lines[-2]
    for epoch in (1, 2):  # the progress goes to stderr
        assert f"epoch {epoch}/2: perplexity train" in err


def test_train_says_how_to_go_on_after_an_interrupt(
    command, tiny, corpus_folder, tmp_path, monkeypatch
):
    from multilstm import training

    def interrupt(self, batch, logs=None):
        os.kill(os.getpid(), 2)

    out = tmp_path / "a run"
    arguments = ["train", "--preset", tiny, "--corpus", corpus_folder]
    with monkeypatch.context() as patch:
        patch.setattr(training.StepTimes, "on_train_batch_end", interrupt)
        status, lines, err = command(*arguments, "--out", out, "--json")
    assert status == 1
    assert record(lines)["status"] == "interrupted"
    assert err.splitlines()[-1] == (
        "error: interrupted after 0 epochs, nothing is lost; "
        f"go on with: multilstm train --out '{out}' --resume "
        f"--backend {BACKEND}"
    )
    go_on = shlex.split(err.splitlines()[-1].partition("multilstm ")[2])
    status, lines, _ = command(*go_on, "--json")
    assert status == 0
    assert record(lines)["epochs"] == 3


def test_command_to_go_on_has_what_the_run_does_not_remember():
    from multilstm.model_commands import command_to_go_on
    from multilstm.options import Train

    options = Train(retries=2, devices=4, data=Path("texts"), epochs=9)
    told = command_to_go_on(options, {"run": "a", "backend": BACKEND})
    assert told == (
        f"multilstm train --out a --resume --backend {BACKEND} "
        "--data texts --devices 4 --retries 2"
    )


@pytest.mark.parametrize("name", ["b[/b]", "[a=1]", "[bold]", ":smile:"])
def test_names_are_printed_as_they_are(
    name, command, tiny, corpus_folder, tmp_path
):
    """What has brackets or colons is no markup."""
    corpus = tmp_path / name
    corpus.parent.mkdir(exist_ok=True)
    corpus_folder.rename(corpus)
    status, lines, _ = command("corpus", corpus)
    assert status == 0
    assert f"{corpus.name}: 9 words" in "\n".join(lines)
    out = tmp_path / f"run {name}"
    status, lines, err = command(
        *("train", "--preset", tiny, "--corpus", corpus),
        *("--out", out, "--minutes", 0.0001),
    )
    assert (status, "Traceback" in err) == (0, False)
    assert lines[-2].endswith(f", in {out}")
    assert shlex.join(["--out", str(out)]) in lines[-1]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_evaluate_measures_the_split(split, command, run_folder):
    status, lines, _ = command(
        "evaluate", run_folder, "--split", split, "--json"
    )
    assert status == 0
    model, _, config = load_run(run_folder)
    corpus = load_corpus(config["corpus"])
    measured = evaluate(model, corpus.split(split))
    got = record(lines)
    # Another compilation of the same model.
    np.testing.assert_allclose(
        got[f"{split}_perplexity"], measured.perplexity, rtol=1e-6
    )
    assert got["num_tokens"] == len(corpus.split(split)) - 1
    assert got["split"] == split
    assert got["backend"] == BACKEND
    assert f"{split} perplexity {measured.perplexity:.4f}" in lines[-2]


def test_evaluate_finds_a_corpus_that_has_moved(
    command, run_folder, corpus_folder
):
    _, lines, _ = command("evaluate", run_folder, "--json")
    moved = corpus_folder.rename(corpus_folder.parent / "moved")
    status, _, err = command("evaluate", run_folder)
    assert status == 1
    assert str(corpus_folder) in err
    status, again, _ = command(
        "evaluate", run_folder, "--corpus", moved, "--json"
    )
    assert status == 0
    assert record(again)["test_perplexity"] == record(lines)["test_perplexity"]
    with (moved / "train.txt").open("a") as file:
        file.write("a b c\n")
    status, _, err = command("evaluate", run_folder, "--corpus", moved)
    assert status == 1
    assert "its checksums differ" in err


@pytest.mark.parametrize("command_name", ["evaluate", "train"])
@pytest.mark.parametrize("settings", [None, {"no_such": 1}], ids=str)
def test_run_of_another_version_is_explained(
    settings, command_name, command, run_folder
):
    path = run_folder / "config.json"
    config = json.loads(path.read_text())
    key = {"evaluate": "model", "train": "preset_settings"}[command_name]
    config[key] = settings
    if settings is None:
        del config[key]
    path.write_text(json.dumps(config))
    arguments = {
        "evaluate": ["evaluate", run_folder],
        "train": ["train", "--out", run_folder, "--resume", "--epochs", 2],
    }[command_name]
    status, _, err = command(*arguments)
    assert status == 1
    assert "this version of multilstm" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("adapt", [(), ("--adapt", "cache")], ids=str)
def test_settings_that_cannot_be_read_are_told_before_measuring(
    adapt, command, run_folder, monkeypatch
):
    from multilstm import adaptation, model_commands

    path = run_folder / "config.json"
    config = json.loads(path.read_text())
    del config["preset_settings"]["units"]
    path.write_text(json.dumps(config))
    measured = []
    monkeypatch.setattr(model_commands, "evaluate", measured.append)
    monkeypatch.setattr(adaptation, "adapt", measured.append)
    status, _, err = command("evaluate", run_folder, *adapt)
    assert status == 1
    assert "must hold the settings of a preset of this version" in err
    assert not measured


def test_evaluate_gives_6_digits_for_any_cut(command, run_folder):
    figures = []
    for rows, length in ((20, 64), (1, 7), (3, 200)):
        _, lines, _ = command(
            *("evaluate", run_folder, "--json"),
            *("--batch-size", rows, "--sequence-length", length),
        )
        figures.append(record(lines)["test_perplexity"])
    # The promise of the command.
    np.testing.assert_allclose(figures[1:], figures[0], rtol=5e-7)


def test_evaluate_adapts_on_valid_and_keeps_the_figures(
    command, run_folder, monkeypatch
):
    from multilstm import adaptation

    monkeypatch.setattr(
        adaptation, "SGD", {"learning_rate": (0.1,), "decay": (0.01,)}
    )
    _, lines, _ = command("evaluate", run_folder, "--json")
    plain = record(lines)["test_perplexity"]
    status, lines, err = command(
        *("evaluate", run_folder, "--adapt", "cache"),
        *("--adapt", "dynamic-sgd", "--tune-tokens", 30, "--json"),
    )
    assert status == 0
    got = record(lines)
    kept = json.loads((run_folder / "adapted.json").read_text())
    assert kept == got
    assert got["backend"] == BACKEND
    assert len(got["weights_sha256"]) == 64
    # Another compilation of the same model.
    np.testing.assert_allclose(
        got["plain"]["test_perplexity"], plain, rtol=1e-6
    )
    assert list(got["methods"]) == ["cache", "dynamic-sgd"]
    table = "\n".join(lines)
    for name, figures in got["methods"].items():
        assert f"{figures['test_perplexity']:.2f}" in table
        assert name in table
        assert f"{name}: " in err  # the progress
    assert "dynamic-sgd: learning rate 0.1, decay 0.01" in lines


def test_methods_of_another_command_are_kept_where_they_compare(
    command, run_folder, caplog
):
    def adapt(method):
        command("evaluate", run_folder, "--adapt", method, "--json")
        return json.loads((run_folder / "adapted.json").read_text())

    first = adapt("cache")
    both = adapt("temperature")
    assert list(both["methods"]) == ["cache", "temperature"]
    assert both["methods"]["cache"] == first["methods"]["cache"]
    both["weights_sha256"] = "of another run"
    (run_folder / "adapted.json").write_text(json.dumps(both))
    both["backend"] = "another"
    assert list(adapt("temperature")["methods"]) == ["temperature"]
    assert "of other weights" in caplog.text
    for damage, said in (
        ("{", "adapted.json cannot be read"),
        (json.dumps(first | {"methods": None}), "json must have `methods`"),
    ):
        (run_folder / "adapted.json").write_text(damage)
        status, _, err = command("evaluate", run_folder, "--adapt", "cache")
        assert status == 1
        assert said in err


def test_what_another_backend_measured_is_kept_as_its_own(
    command, run_folder, caplog
):
    path = run_folder / "adapted.json"
    command("evaluate", run_folder, "--adapt", "cache")
    before = json.loads(path.read_text())
    for name in ("backend", "device", "precision"):  # as files were once
        before[name] = "another"
        del before["methods"]["cache"][name]
    path.write_text(json.dumps(before))
    for method in ("temperature", "dropout"):
        command(
            *("evaluate", run_folder, "--adapt", method),
            *(("--num-samples", 1) if method == "dropout" else ()),
        )
    kept = json.loads(path.read_text())
    assert kept["backend"] == BACKEND
    assert {m: v["backend"] for m, v in kept["methods"].items()} == {
        "cache": "another",
        "temperature": BACKEND,
        "dropout": BACKEND,
    }
    assert not caplog.text


def test_a_folder_that_cannot_be_written_to_is_told_before_it_takes_time(
    command, run_folder, monkeypatch
):
    from multilstm import adaptation, files

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(adaptation, "adapt", None)
    monkeypatch.setattr(files.Path, "touch", refuse)
    status, _, err = command("evaluate", run_folder, "--adapt", "cache")
    assert status == 1
    assert "must be a folder that can be written to" in err


def test_what_was_measured_is_shown_where_it_cannot_be_written(
    command, run_folder, monkeypatch
):
    from multilstm import files

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "flush", full)
    status, lines, err = command("evaluate", run_folder, "--adapt", "cache")
    assert status == 1
    told = [line for line in err.splitlines() if "error: " in line]
    assert len(told) == 1
    assert "No space left on device" in told[0]
    text = "\n".join(lines)
    assert "test before" in text
    assert "cache: window " in text
    assert "adapted.json" not in text


def test_what_another_command_measured_in_the_meantime_is_kept(
    command, run_folder, monkeypatch
):
    from multilstm import adaptation

    path, adapt = run_folder / "adapted.json", adaptation.adapt

    def adapt_beside_another(*arguments, keep, **options):
        def keep_later(result):
            keep(result)
            beside = json.loads(path.read_text())
            beside["methods"]["cache"] = {"by": "another command"}
            path.write_text(json.dumps(beside))
            keep(result)

        return adapt(*arguments, keep=keep_later, **options)

    monkeypatch.setattr(adaptation, "adapt", adapt_beside_another)
    status, _, _ = command("evaluate", run_folder, "--adapt", "temperature")
    assert status == 0
    kept = json.loads(path.read_text())
    assert kept["methods"].keys() == {"temperature", "cache"}
    assert kept["kernel"].startswith(f"{BACKEND}: ")


def test_run_that_has_moved_is_not_adapted(command, run_folder, monkeypatch):
    from multilstm import adaptation

    moved, adapt = run_folder.with_name("moved"), adaptation.adapt

    def adapt_what_moves(*arguments, **options):
        run_folder.rename(moved)
        return adapt(*arguments, **options)

    monkeypatch.setattr(adaptation, "adapt", adapt_what_moves)
    try:
        status, _, err = command("evaluate", run_folder, "--adapt", "cache")
        assert status == 1
        assert "must stay while its run is adapted" in err
        assert not run_folder.exists()
    finally:
        moved.rename(run_folder)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--num-samples", 3), "without --adapt dropout"),
        (("--tune-tokens", 30), "without a dynamic evaluation"),
    ],
    ids=str,
)
def test_what_no_method_takes_is_refused(arguments, told, command, run_folder):
    status, _, err = command(
        "evaluate", run_folder, "--adapt", "cache", *arguments
    )
    assert (status, told in err) == (1, True)


@pytest.mark.parametrize("option", ["--tolerance", "--until-perplexity"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_comparison_is_by_numbers(option, value, command):
    status, _, err = command("compare", option, value)
    assert status == 1
    assert f"{option} must be a number from 0 on; received" in err


def test_what_only_adapting_takes_is_refused_without(command, run_folder):
    status, _, err = command("evaluate", run_folder, "--num-samples", 3)
    assert status == 1
    assert err == (
        "error: --num-samples would do nothing without --adapt. Leave it out.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "train"), "--split would do nothing with --adapt, which"),
        (("--split", "valid"), "--split would do nothing with --adapt, which"),
        (
            ("--tune-tokens", 1, "--adapt", "dynamic-sgd"),
            "`tune_tokens` must be a whole number, 2 or more; received 1",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_explained(
    arguments, message, command, run_folder
):
    status, _, err = command(
        "evaluate", run_folder, "--adapt", "cache", *arguments
    )
    assert status == 1
    (line,) = err.splitlines()[-1:]
    assert message in line
    assert not (run_folder / "adapted.json").exists()


def test_predict_prints_nothing_where_a_text_is_too_short(command, run_folder):
    _, _, config = load_run(run_folder)
    corpus = load_corpus(config["corpus"])
    beyond_test = len(corpus.test)
    assert beyond_test + 2 < len(corpus.train)
    status, lines, err = command(
        "predict", run_folder, "--start", beyond_test, "--num-words", 1
    )
    assert status == 1
    assert "error: The test text: " in err
    assert not any("words:" in line for line in lines)


def test_predict_prints_actual_beside_predicted_words(command, run_folder):
    status, lines, _ = command(
        "predict", run_folder, "--start", 3, "--num-words", 4, "--json"
    )
    assert status == 0
    got = record(lines)
    _, vocabulary, config = load_run(run_folder)
    corpus = load_corpus(config["corpus"])
    printed = [line.split(":") for line in lines[1:-1]]
    for split, title in (("train", "Training data"), ("test", "Test data")):
        actual = vocabulary.decode(corpus.split(split)[3:7])
        assert got[split]["actual"] == actual
        assert len(got[split]["predicted"]) == 4
        assert all(word in vocabulary for word in got[split]["predicted"])
        at = printed.index([title, ""])
        heading, words = printed[at + 1]
        assert heading == "Actual words"
        assert words.split() == actual
        heading, words = printed[at + 2]
        assert heading == "Predicted words"
        assert words.split() == got[split]["predicted"]


def test_words_of_the_vocabulary_are_not_cut_in_a_prompt(command, run_folder):
    """Of python-docs, whose punctuation is words of its own."""
    path = run_folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"corpus": "python-docs"}))
    arguments = ("--prompt", "a <eos> b, c", "--max-new-tokens", 1, "--json")
    got = record(command("generate", run_folder, *arguments)[1])
    assert got["prompt"] == ["a", "<eos>", "b", "c"]
    assert got["unknown_words"] == [","]


def test_generate_continues_the_prompt_and_names_unknown_words(
    command, run_folder
):
    arguments = [
        "generate",
        run_folder,
        "--prompt",
        "a b [bold]zebra",
        "--json",
    ]
    status, lines, _ = command(*arguments, "--max-new-tokens", 5)
    assert status == 0
    got = record(lines)
    assert got["prompt"] == ["a", "b"]
    assert got["unknown_words"] == ["[bold]zebra"]
    assert len(got["words"]) == 5
    assert "Not in the vocabulary: [bold]zebra" in lines
    assert lines[-2] == " ".join(["a", "b", *got["words"]])
    again = record(command(*arguments, "--max-new-tokens", 5)[1])
    assert again == got
    other = record(command(*arguments, "--max-new-tokens", 5, "--seed", 7)[1])
    assert other["words"] != got["words"]


def test_generate_passes_its_settings_on(command, run_folder):
    texts = [
        record(command("generate", run_folder, "--json", *arguments)[1])[
            "words"
        ]
        for arguments in (
            ["--temperature", 0],
            ["--top-k", 1],
            ["--top-p", 1e-6],
            [],
        )
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_score_tells_each_sentence_and_each_word(command, run_folder, tmp_path):
    text, table = tmp_path / "text.txt", tmp_path / "made" / "words.csv"
    text.write_text("a b [bold]zebra\n\nb  a")
    arguments = ("score", run_folder, text, "--unknown", "drop", "--json")
    status, lines, _ = command(*arguments, "--out", table)
    assert status == 0
    got = record(lines)
    sentences = got["sentences"]
    assert [each["words"] for each in sentences] == [
        ["a", "b", "<eos>"],
        ["<eos>"],
        ["b", "a", "<eos>"],
    ]
    assert [each["unknown_words"] for each in sentences] == [
        ["[bold]zebra"],
        [],
        [],
    ]
    model, vocabulary, _ = load_run(run_folder)
    ids = vocabulary.encode(["<eos>", "b", "a", "<eos>"])
    alone = evaluate(model, ids)
    # The sum of three float32, read in another number of rows.
    np.testing.assert_allclose(
        sum(sentences[2]["nats"]), alone.total_nats, rtol=1e-5
    )
    assert got["num_words"] == 7
    nats = [nats for each in sentences for nats in each["nats"]]
    np.testing.assert_allclose(got["perplexity"], np.exp(np.mean(nats)))
    assert f"{alone.total_nats:10.2f}      3" in lines[-5]
    assert lines[-5].endswith(f"{alone.perplexity:12.2f}  b a")
    assert lines[-3] == "Not in the vocabulary: [bold]zebra"
    assert lines[-2] == str(table)
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert rows[0] == ["sentence", "word", "nats"]
    words = [w for each in sentences for w in each["words"]]
    assert [word for _, word, _ in rows[1:]] == words
    assert [number for number, *_ in rows[1:]] == list("1112333")
    # Written to six places.
    np.testing.assert_allclose(
        [float(each) for *_, each in rows[1:]], nats, atol=1e-6
    )

    running = record(command(*arguments, "--running")[1])["sentences"]
    assert running[0] == sentences[0]
    assert running[1]["nats"] != sentences[1]["nats"]


def test_score_cuts_off_punctuation_as_python_docs_does(
    command, run_folder, tmp_path
):
    path = run_folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"corpus": "python-docs"}))
    (tmp_path / "text.txt").write_text("a <eos> b, c")
    arguments = ("score", run_folder, tmp_path / "text.txt", "--json")
    got = record(command(*arguments, "--unknown", "drop")[1])["sentences"]
    assert [each["words"] for each in got] == [
        ["a", "<eos>"],
        ["b", "c", "<eos>"],
    ]
    assert got[1]["unknown_words"] == [","]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "must hold a sentence a line; it is empty"),
        (b"a \xff", "must be UTF-8 text"),
        (b"a zebra", "'zebra'"),
    ],
    ids=["missing", "empty", "not UTF-8", "unknown word"],
)
def test_score_says_what_is_wrong_with_a_text(
    content, words, command, run_folder, tmp_path
):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    arguments = ("score", run_folder, tmp_path / "text.txt")
    status, _, err = command(*arguments, "--out", tmp_path / "words.csv")
    assert status == 1
    assert words in err
    assert not (tmp_path / "words.csv").exists()


def test_corpus_tells_what_is_in_a_folder(command, corpus_folder):
    status, lines, _ = command("corpus", corpus_folder, "--json")
    assert status == 0
    got = record(lines)
    corpus = load_corpus(corpus_folder)
    assert got["vocabulary_size"] == len(corpus.vocabulary) == 9
    words = (corpus_folder / "train.txt").read_text().replace("\n", " <eos> ")
    train = got["splits"]["train"]
    assert train["num_tokens"] == len(words.split())
    assert train["first_words"] == words.split()[:5]
    assert train["words_100_to_109"] == words.split()[100:110]
    assert train["first_ids"] == corpus.train[:5].tolist()
    assert any(f"{train['num_tokens']:,}" in line for line in lines)


def test_compare_shows_a_row_for_each_backend(command, corpus_folder, tmp_path):
    arguments = [
        *("compare", "--python", f"{BACKEND}={sys.executable}"),
        *("--corpus", corpus_folder, "--epochs", 1, "--json"),
    ]
    status, lines, _ = command(*arguments, "--out", tmp_path / "both")
    assert status == 0
    got = record(lines)
    assert got == json.loads((tmp_path / "both/comparison.json").read_text())
    result = got["results"][BACKEND]
    (row,) = (line for line in lines if line.startswith(f"│ {BACKEND}"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    valid = result["history"][0]["valid_perplexity"]
    assert cells == [
        BACKEND,
        "1",
        f"{valid:.2f}",
        f"{result['test_perplexity']:.2f}",
        f"{result['tokens_per_second']:,.0f}",
    ]
    # What an earlier comparison ended early goes on to its end.
    config = tmp_path / "both" / BACKEND / "config.json"
    early = json.loads(config.read_text()) | {"until_perplexity": 1e6}
    config.write_text(json.dumps(early))
    arguments[arguments.index("--epochs") + 1] = 2
    got = record(command(*arguments, "--out", tmp_path / "both")[1])
    assert got["results"][BACKEND]["epochs"] == 2
    assert json.loads(config.read_text())["until_perplexity"] is None
    status, lines, err = command(
        *arguments, "--preset", "samll", "--out", tmp_path / "none"
    )
    assert status == 1
    assert any("ended with status 1" in line for line in lines)
    assert f"Training failed on {BACKEND}" in err


# Mistakes: one line, no traceback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "samll"], "received 'samll'"),
        (["train", "--corpus", "no/such"], "no/such"),
        (["train", "--epochs", "0"], "`epochs` must be at least 1"),
        (["train", "--learning-rate", "0"], "`learning_rate` must be above"),
        (["evaluate", "no/such/run"], "must be the folder of a run"),
        (["predict", "no/such/run"], "must be the folder of a run"),
        (["generate", "no/such/run"], "must be the folder of a run"),
        (["corpus", "no/such/folder"], "no/such/folder"),
        (["compare", "--python", "jax=no/such"], "BACKEND=PATH"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_ends_with_1_and_one_line(
    arguments, message, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, lines, err = command(*arguments, "--json")
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not any(line.startswith("{") for line in lines)
    assert list(tmp_path.glob("runs")) == []


def test_failure_of_the_disk_is_one_line(
    command, tiny, corpus_folder, tmp_path
):
    (tmp_path / "file").write_text("")
    status, _, err = command(
        *("train", "--preset", tiny, "--corpus", corpus_folder),
        *("--out", tmp_path / "file" / "run"),
    )
    assert status == 1
    assert err.startswith("error: ")
    assert str(tmp_path / "file") in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train", "--epochs", "many"],
        ["train", "--no-such-option"],
        ["evaluate"],
        ["train", "--backend", "theano"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(arguments, command):
    status, _, err = command(*arguments)
    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "name",
    [
        *("train", "evaluate", "predict", "score", "generate", "corpus"),
        *("compare", "bench", "choose", "doctor", "report"),
    ],
)
def test_every_command_explains_itself(name, command):
    status, lines, _ = command(name, "--help")
    assert status == 0
    assert any("--json" in line for line in lines)


# The real thing, in processes of their own


def in_a_process(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_command_runs_from_the_shell(corpus_folder, tmp_path):
    train = in_a_process(
        *("-m", "multilstm", "train", "--corpus", corpus_folder),
        *("--epochs", 1, "--backend", BACKEND, "--json"),
        cwd=tmp_path,
    )
    assert train.returncode == 0, train.stderr
    assert train.stdout.startswith(f"backend: {BACKEND} (--backend)")
    out = Path("runs") / f"small-letters-{BACKEND}"
    result = json.loads((tmp_path / out / "result.json").read_text())
    assert record(train.stdout.splitlines()) == result
    refused = in_a_process("-m", "multilstm", "evaluate", "none", cwd=tmp_path)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "must be the folder of a run" in refused.stderr


def test_tutorial_script_ends_with_perplexity_and_a_sentence(
    corpus_folder, tmp_path
):
    for split in ("train", "test"):  # it shows words 70 to 79
        path = corpus_folder / f"{split}.txt"
        path.write_text("The a b c d\n" * 60)
    (corpus_folder / "valid.txt").write_text("The a b c d\n")
    done = in_a_process(
        *(PROJECT / "examples" / "train.py", "--corpus", corpus_folder),
        *("--epochs", 2, "--out", tmp_path / "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "test perplexity " in done.stdout
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == ["generated:", "The"]
    assert set(last[2:]) <= {"The", "a", "b", "c", "d", "<eos>"}
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("script", ["train.py", "your_own_model.py"])
def test_script_ends_in_one_line(script, monkeypatch):
    path = PROJECT / "examples" / script
    monkeypatch.setattr(sys, "argv", [script, "--corpus", "no/such"])
    with pytest.raises(SystemExit, match=r"^error: .*no/such"):
        runpy.run_path(str(path), run_name="__main__")

    ends = (SystemExit, KeyboardInterrupt)  # else it ends pytest

    def press_ctrl_c(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(multilstm, "load_corpus", press_ctrl_c)
    with pytest.raises(ends, match=r"^error: interrupted$"):
        runpy.run_path(str(path), run_name="__main__")


def test_script_with_a_model_of_ones_own_runs(corpus_folder, tmp_path):
    done = in_a_process(
        *(PROJECT / "examples" / "your_own_model.py", "--units", 8),
        *("--num-steps", 3, "--batch-size", 4, "--corpus", corpus_folder),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    actual, predicted = (
        line.partition(": ")[2].split()
        for line in done.stdout.splitlines()[-2:]
    )
    assert len(actual) == len(predicted) == 3
    words = (corpus_folder / "test.txt").read_text().replace("\n", " <eos> ")
    assert " ".join(actual) in " ".join(words.split())


def test_tutorial_script_fits_on_a_page():
    lines = (PROJECT / "examples" / "train.py").read_text().splitlines()
    assert len(lines) < 80


def test_version_is_told(command):
    assert command("--version") == (
        0,
        [f"multilstm {multilstm.__version__}"],
        "",
    )


def test_letters_that_a_terminal_has_not_lose_nothing(run_folder, tmp_path):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("a b caf\u00e9\n", encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "multilstm", "score", run_folder),
            *(sentences, "--unknown", "drop", "--json"),
        ],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"caf\\xe9" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["sentences"]


def test_preset_is_printed_as_a_file_to_train(command, tmp_path):
    status, lines, _ = command("presets", "awd", "--json")
    assert status == 0
    assert record(lines)["settings"]["weight_dropout"] == 0.5
    path = tmp_path / "mine.json"
    path.write_text("\n".join(lines[:-1]))
    assert find_preset(path).units_of_layers == [1150, 1150, 400]
    status, _, err = command("presets", "awdd")
    assert (status, "A preset is one of small" in err) == (1, True)
    status, _, err = command("presets", "awd", "--tokens", 5)
    assert (status, "--tokens would do nothing beside" in err) == (1, True)


def test_presets_are_listed_with_their_sources(command):
    status, lines, _ = command("presets", "--json")
    assert status == 0
    rows = record(lines)["presets"]
    assert [row["preset"] for row in rows] == list(PRESETS)
    text = "\n".join(lines)
    assert "60.7 / 58.8" in text
    assert "weights with 10,000 words" in " ".join(text.split())
    # A table of 80 columns has their names whole.
    assert all(f" {name} " in text for name in PRESETS)
    assert "arXiv:1708.02182" in text
    assert "`multilstm choose --preset NAME` measures it" in text
    status, _, err = command("presets", "--tokens", 0)
    assert (status, "--tokens must be at least 1" in err) == (1, True)
