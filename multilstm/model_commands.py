"""The commands that compute with a model: loaded once a backend is chosen."""

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from multilstm import adaptation
from multilstm.commands import plain, refuse, telling
from multilstm.corpus import tokenize
from multilstm.errors import UserError
from multilstm.evaluation import evaluate
from multilstm.files import finite_or_none, read_json, write_json
from multilstm.generation import generate, predict_next_words
from multilstm.options import Evaluate, Generate, Predict, Train
from multilstm.presets import preset_of
from multilstm.run_folder import RESULT_SCHEMA, RunFolder
from multilstm.runs import (
    describe_environment,
    describe_protocol,
    load_run,
    load_run_corpus,
    weights_sha256,
)
from multilstm.training import train
from multilstm.tuning import show_settings


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
        "protocol": describe_protocol(preset_of(config), config),
    }


def run_adapt(options: Evaluate, console: Console) -> dict[str, Any]:
    if options.split == "train":
        raise UserError(
            "--adapt tunes on valid and reports valid and test; received "
            "--split train. Leave --split out."
        )
    model, _, config = load_run(options.run)
    corpus = load_run_corpus(config, options.data, options.corpus)
    path = RunFolder(options.run).adapted
    record: dict[str, Any] = {
        "run": str(options.run),
        **describe_environment(),
        "preset": config["preset"],
        "corpus": corpus.name,
        "weights_sha256": weights_sha256(model),
    }
    earlier = _earlier_methods(path, record)

    def keep(result: dict[str, Any]) -> None:
        """Writes what there is so far: some methods take long."""
        record.update(result)
        record["methods"] = earlier | result["methods"]
        record["plain"]["protocol"] = describe_protocol(
            preset_of(config), config
        )
        write_json(path, finite_or_none(record))

    result = adaptation.adapt(
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
    console.print(adaptation_table(result))
    for name, figures in result["methods"].items():
        console.print(f"{name}: {show_settings(figures['settings'])}")
    console.print(str(path))
    return record


def _earlier_methods(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What other commands measured of the same run in the same way."""
    if not path.exists():
        return {}
    before = read_json(path, schema=adaptation.SCHEMA)
    for name, value in record.items():
        if name not in ("run", "kernel") and before.get(name) != value:
            logging.getLogger("multilstm").warning(
                "%s is of another %s, so it is written anew.", path, name
            )
            return {}
    methods: dict[str, Any] = before["methods"]
    return methods


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
    for split, title in (("train", "Training data"), ("test", "Test data")):
        actual, predicted = (
            vocabulary.decode(ids)
            for ids in predict_next_words(
                model,
                corpus.split(split),
                start=options.start,
                num_words=options.num_words,
            )
        )
        console.print(f"{title}:", style="bold")
        _print_words(console, "Actual words:   ", actual)
        _print_words(console, "Predicted words:", predicted)
        record[split] = {"actual": actual, "predicted": predicted}
    return record


def run_generate(options: Generate, console: Console) -> dict[str, Any]:
    model, vocabulary, config = load_run(options.run)
    split = tokenize if config["corpus"] == "python-docs" else str.split
    generated = generate(
        model,
        vocabulary,
        split(options.prompt),
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
    command = ["multilstm", "train", "--out", record["run"], "--resume"]
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
