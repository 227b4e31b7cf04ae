"""The commands that compute with a model: loaded once a backend is chosen."""

import csv
import dataclasses
import io
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from multilstm import adaptation
from multilstm.commands import plain, refuse, telling
from multilstm.config import preset_of
from multilstm.corpus import read_words, tokenize
from multilstm.errors import UserError, WriteError
from multilstm.evaluation import Evaluation, evaluate
from multilstm.files import (
    check_folder,
    finite_or_none,
    read_json,
    write_json,
    write_text,
)
from multilstm.generation import generate, predict_next_words
from multilstm.ops import last_kernel
from multilstm.options import Evaluate, Generate, Predict, Score, Train
from multilstm.results import RESULT_SCHEMA
from multilstm.run_folder import RunFolder
from multilstm.runs import (
    describe_environment,
    describe_protocol,
    load_run,
    load_run_corpus,
    weights_sha256,
)
from multilstm.scoring import SentenceScore, score
from multilstm.training import train
from multilstm.tuning import show_settings
from multilstm.vocabulary import END_OF_SENTENCE, Vocabulary

# Where a method's figures were measured; others may be another backend's.
_OF_A_METHOD = ("backend", "device", "versions", "precision", "kernel")


def run_train(options: Train, console: Console) -> dict[str, Any]:
    arguments = dataclasses.asdict(options)
    for name in ("json", "backend"):
        del arguments[name]
    data = arguments.pop("data")
    result = train(**arguments, data_folder=data)
    if result["status"] == "finished":
        epoch = result["best_epoch"]
        which = "an epoch that was lost" if epoch is None else f"epoch {epoch}"
        console.print(
            f"test perplexity {result['test_perplexity']:.2f} (valid "
            f"{result['valid_perplexity']:.2f}, {which}; "
            f"unigram {result['test_unigram_perplexity']:.1f}), "
            f"{_speed(result)} on {result['device']}, in {result['run']}"
        )
        if result["is_out_of_time"]:
            console.print(
                f"{result['epochs']} of {result['epochs_planned']} epochs; go "
                f"on with: {command_to_go_on(options, result)}"
            )
    return result


def run_evaluate(options: Evaluate, console: Console) -> dict[str, Any]:
    if options.adapt:
        return run_adapt(options, console)
    refuse(options, ("tune_tokens", "num_samples", "seed"), "without --adapt")
    model, _, config = load_run(options.run)
    protocol = describe_protocol(preset_of(config), config)
    corpus = load_run_corpus(config, options.data, options.corpus)
    measured = evaluate(
        model,
        corpus.split(options.split),
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
    )
    console.print(
        f"{options.split} perplexity {measured.perplexity:.4f} "
        f"({measured.cross_entropy:.6f} nats a word, "
        f"{measured.num_tokens:,} words)"
    )
    return {
        "schema": RESULT_SCHEMA,
        "run": str(options.run),
        **describe_environment(),
        "preset": config["preset"],
        "corpus": corpus.name,
        "seed": config["seed"],
        "split": options.split,
        f"{options.split}_perplexity": measured.perplexity,
        "cross_entropy": measured.cross_entropy,
        "num_tokens": measured.num_tokens,
        "protocol": protocol,
    }


def run_adapt(options: Evaluate, console: Console) -> dict[str, Any]:
    refuse(options, ("split",), "with --adapt, which reports valid and test")
    if "dropout" not in options.adapt:
        refuse(options, ("num_samples", "seed"), "without --adapt dropout")
    if not any(method.startswith("dynamic") for method in options.adapt):
        refuse(options, ("tune_tokens",), "without a dynamic evaluation")
    model, _, config = load_run(options.run)
    protocol = describe_protocol(preset_of(config), config)
    corpus = load_run_corpus(config, options.data, options.corpus)
    folder = RunFolder(options.run)
    path = folder.adapted
    check_folder(folder.path)
    record: dict[str, Any] = {
        "run": str(options.run),
        **describe_environment(),
        "preset": config["preset"],
        "corpus": corpus.name,
        "weights_sha256": weights_sha256(model),
    }
    # What cannot be read, or is of another run, is told at once.
    _earlier_methods(path, record, tell=True)

    done: dict[str, Any] = {}

    def keep(result: dict[str, Any]) -> None:
        """Writes what there is so far: some methods take long.

        Another command may have written in the meantime.
        """
        done.update(result)
        if not folder.config.exists():
            raise WriteError(
                f"{folder.path} must stay while its run is adapted; it was "
                "removed or moved. Nothing is written to it."
            )
        record.update(result, kernel=last_kernel())
        here = {name: record[name] for name in _OF_A_METHOD}
        record["methods"] = _earlier_methods(path, record) | {
            name: here | figures for name, figures in result["methods"].items()
        }
        record["plain"]["protocol"] = protocol
        write_json(path, finite_or_none(record))

    try:
        adaptation.adapt(
            model,
            corpus,
            methods=options.adapt,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            tune_tokens=options.tune_tokens,
            num_samples=options.num_samples,
            seed=options.seed,
            tell=telling(),
            keep=keep,
        )
    finally:
        if done:  # shown also where it could not be written
            _print_adapted(done, console)
    console.print(str(path))
    return record


def _earlier_methods(
    path: Path, record: dict[str, Any], *, tell: bool = False
) -> dict[str, Any]:
    """What other commands measured of the same run, each with where."""
    if not path.exists():
        return {}
    before = read_json(path, schema=adaptation.SCHEMA)
    if not isinstance(before.get("methods"), dict):
        raise UserError(
            f"{path} must have `methods`; it has none. Remove it and measure "
            "again."
        )
    if before.get("weights_sha256") != record["weights_sha256"]:
        if tell:
            logging.getLogger("multilstm").warning(
                "%s is of other weights, so it is written anew.", path
            )
        return {}
    there = {name: before.get(name) for name in _OF_A_METHOD}
    return {
        name: there | figures for name, figures in before["methods"].items()
    }


def _print_adapted(result: dict[str, Any], console: Console) -> None:
    console.print(adaptation_table(result))
    for name, figures in result["methods"].items():
        console.print(f"{name}: {show_settings(figures['settings'])}")


def adaptation_table(result: dict[str, Any]) -> Table:
    """One row a method: perplexities before and after, and seconds."""
    table = Table(title="perplexity, tuned on valid")
    table.add_column("method")
    for heading in ("valid before", "after", "test before", "after", "s"):
        table.add_column(heading, justify="right")
    for name, figures in result["methods"].items():
        perplexities = [
            f"{about[f'{split}_perplexity']:.2f}"
            for split in ("valid", "test")
            for about in (result["plain"], figures)
        ]
        table.add_row(name, *perplexities, f"{figures['seconds']:,.0f}")
    return table


def run_predict(options: Predict, console: Console) -> dict[str, Any]:
    model, vocabulary, config = load_run(options.run)
    corpus = load_run_corpus(config, options.data, options.corpus)
    record: dict[str, Any] = {"run": str(options.run)}
    for split in ("train", "test"):
        try:
            of_both = predict_next_words(
                model,
                corpus.split(split),
                start=options.start,
                num_words=options.num_words,
            )
        except UserError as error:
            raise UserError(f"The {split} text: {error}") from error
        actual, predicted = (vocabulary.decode(ids) for ids in of_both)
        record[split] = {"actual": actual, "predicted": predicted}
    for split, title in (("train", "Training data"), ("test", "Test data")):
        console.print(f"{title}:", style="bold")
        _print_words(console, "Actual words:   ", record[split]["actual"])
        _print_words(console, "Predicted words:", record[split]["predicted"])
    return record


def run_score(options: Score, console: Console) -> dict[str, Any]:
    if options.out:
        check_folder(options.out.parent)
    model, vocabulary, config = load_run(options.run)
    sentences = _sentences(options.file)
    scores = score(
        model,
        vocabulary,
        [_as_of_corpus(words, config, vocabulary) for words in sentences],
        running=options.running,
        unknown=options.unknown,
    )
    console.print(f"{'nats':>10}{'words':>7}{'perplexity':>12}  sentence")
    for of, words in zip(scores, sentences, strict=True):
        console.print(f"{_totals(of.evaluation)}  {' '.join(words)}")
    whole = Evaluation.of(np.concatenate([of.nats for of in scores]))
    console.print(f"{_totals(whole)}  in all, each sentence's end included")
    unknown_words = [word for of in scores for word in of.unknown_words]
    if unknown_words:
        _print_words(
            console, "Not in the vocabulary:", [*dict.fromkeys(unknown_words)]
        )
    if options.out:
        write_text(options.out, _word_table(scores))
        console.print(str(options.out))
    return {
        "run": str(options.run),
        "perplexity": whole.perplexity,
        "num_words": whole.num_tokens,
        "sentences": [
            dataclasses.asdict(of) | {"nats": of.nats.tolist()} for of in scores
        ],
    }


def _sentences(path: Path) -> list[list[str]]:
    """The words of each line of a text file."""
    sentences: list[list[str]] = [[]]
    for word in read_words(path):
        if word == END_OF_SENTENCE:
            sentences.append([])
        else:
            sentences[-1].append(word)
    sentences.pop()  # the last line has its end, too
    if not sentences:
        raise UserError(f"{path} must hold a sentence a line; it is empty.")
    return sentences


def _totals(of: Evaluation) -> str:
    return f"{of.total_nats:>10.2f}{of.num_tokens:>7}{of.perplexity:>12.2f}"


def _word_table(scores: list[SentenceScore]) -> str:
    """CSV with a row for each word."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sentence", "word", "nats"])
    for number, of in enumerate(scores, start=1):
        for word, nats in zip(of.words, of.nats.tolist(), strict=True):
            table.writerow([number, word, f"{nats:.6f}"])
    return text.getvalue()


def _as_of_corpus(
    words: list[str], config: dict[str, Any], vocabulary: Vocabulary
) -> list[str]:
    """Words as the run's corpus has them: python-docs cuts off punctuation."""
    if config["corpus"] != "python-docs":
        return words
    return [
        word
        for piece in words  # `<eos>` is one word, and no three
        for word in ([piece] if piece in vocabulary else tokenize(piece))
    ]


def run_generate(options: Generate, console: Console) -> dict[str, Any]:
    model, vocabulary, config = load_run(options.run)
    prompt = _as_of_corpus(options.prompt.split(), config, vocabulary)
    generated = generate(
        model,
        vocabulary,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    if generated.unknown_words:
        _print_words(console, "Not in the vocabulary:", generated.unknown_words)
    _print_words(console, "", generated.prompt + generated.words)
    return {"run": str(options.run), **dataclasses.asdict(generated)}


def command_to_go_on(options: Train, record: dict[str, Any]) -> str:
    run = record["run"]
    if run.startswith("-"):  # which would be an option
        run = f"./{run}"
    command = ["multilstm", "train", "--out", run, "--resume"]
    command += ["--backend", record["backend"]]
    for name in ("data", "devices", "retries"):  # what no config.json has
        value = getattr(options, name)
        if value:
            command += [f"--{name}", str(value)]
    return shlex.join(command)


def _speed(result: dict[str, Any]) -> str:
    speed = result["tokens_per_second"]
    return "speed not measured" if speed is None else f"{speed:,.0f} tokens/s"


def _print_words(console: Console, title: str, words: list[str]) -> None:
    console.print(plain(f"{title} {' '.join(words)}".strip()))
