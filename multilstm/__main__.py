"""The command line: one class of options and one function a command.

Arguments are read, the backend is chosen, and only then Keras is imported.
"""

import dataclasses
import json
import logging
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from multilstm.clock import clock
from multilstm.devices import usual_precision
from multilstm.errors import UserError
from multilstm.failures import ProcessLostError, explaining_failures
from multilstm.files import finite_or_none, read_json, write_json
from multilstm.launch import launch, place_among_processes
from multilstm.presets import CONFIG_SCHEMA, find_preset, preset_of
from multilstm.selection import (
    compare,
    describe_presets,
    find_pythons,
    parse_pythons,
    select_backend,
    valid_choice,
    write_keras_json,
)

UnknownWords = Literal["error", "drop"]
Softmax = Literal["exact", "adaptive", "sampled"]
Run = Annotated[Path, tyro.conf.Positional]
Dtype = Literal["float32", "tf32", "bfloat16"]
Pythons = tyro.conf.UseAppendAction[tuple[str, ...]]
Method = Literal[
    "temperature", "cache", "dropout", "dynamic-sgd", "dynamic-rms"
]
Methods = tyro.conf.UseAppendAction[tuple[Method, ...]]
BackendName = Literal["jax", "torch", "tensorflow"]


@dataclasses.dataclass(kw_only=True)
class Common:
    """What every command takes."""

    json: bool = False
    """End with one JSON object on the last line of stdout."""


@dataclasses.dataclass(kw_only=True)
class OnBackend(Common):
    """What every command takes that computes with a model."""

    backend: BackendName | None = None
    """Default: KERAS_BACKEND, what `multilstm choose` found, keras.json, the
    first that is installed."""
    data: Path | None = None
    """Folder with downloaded corpora. Default: MULTILSTM_DATA."""


@dataclasses.dataclass(kw_only=True)
class Train(OnBackend):
    """Train a preset on a corpus, into a run folder."""

    preset: str | None = None
    """A name of `multilstm presets`. Default: small."""
    corpus: str | None = None
    """python-docs, ptb, or a folder with *train*.txt, *valid*.txt and
    *test*.txt. Default: python-docs."""
    out: Path | None = None
    """Run folder. Default: runs/PRESET-CORPUS-BACKEND."""
    epochs: int | None = None
    """Passes over the training text. Default: the preset's."""
    batch_size: int | None = None
    """Rows a batch. Default: the preset's."""
    sequence_length: int | None = None
    """Steps of back-propagation. Default: the preset's."""
    learning_rate: float | None = None
    """Of the first epochs. Default: the preset's."""
    gradient_accumulation_steps: int | None = None
    """Batches whose gradients make one step. Default: the preset's."""
    precision: Literal["float32", "tf32", "mixed_bfloat16"] | None = None
    """Of products; the weights are float32 in all. Default: tf32 on a GPU,
    float32 elsewhere."""
    starts_from: Path | None = None
    """Run whose best weights to begin with, as awd_finetune does."""
    train_tokens: int | None = None
    """Use only so many of the first words of the training text."""
    softmax: Softmax | None = None
    """exact; adaptive: fewer numbers for rare words; sampled: trained on a
    sample of the words. Default: exact."""
    cutoffs: tuple[int, ...] | None = None
    """Of the adaptive softmax, the first word of each tail. Default: a
    twentieth and a quarter of the vocabulary."""
    num_sampled: int | None = None
    """Of the sampled softmax, words drawn for a batch. Default: an eighth of
    the vocabulary, at most 8,192."""
    seed: int | None = None
    """For initial weights and dropout. Default: 0."""
    patience: int | None = None
    """Stop after so many epochs without a better validation perplexity."""
    until_perplexity: float | None = None
    """Stop after the first epoch with this validation perplexity or less."""
    checkpoint_minutes: float | None = None
    """Between checkpoints within an epoch. Default: 10."""
    retries: int = 0
    """How often a run whose loss is no number any more goes back to its last
    checkpoint and on at half the learning rate."""
    minutes: float | None = None
    """Begin no epoch that would end later than this, judged by the last one;
    go on another time with --resume. Imports and test are not counted."""
    devices: int | None = None
    """How many GPUs, or parts of the CPU, share the rows of a batch."""
    max_vocabulary: int | None = None
    """Keep so many of the most frequent words; the others are <unk>."""
    unknown: UnknownWords | None = None
    """What to do with words of valid and test that train has not, where the
    vocabulary has no <unk>: error (default) or drop."""
    resume: bool = False
    """Go on from the checkpoint in --out, or start where there is none. Only
    --epochs, --patience, --until-perplexity, --learning-rate and
    --checkpoint-minutes may change, and --corpus to where the text is now."""


@dataclasses.dataclass(kw_only=True)
class Evaluate(OnBackend):
    """Measure the perplexity of a run on a whole split."""

    run: Run
    """Folder of a run."""
    split: Literal["train", "valid", "test"] = "test"
    """Which text."""
    corpus: str | None = None
    """The run's corpus, where its folder has moved."""
    batch_size: int = 20
    """Rows read at once; it does not change the result."""
    sequence_length: int = 64
    """Words a row read at once; it does not change the result."""
    adapt: Methods = ()
    """Tune a better use of the model on valid and measure it on valid and
    test, several times for several; also in the run's adapted.json."""
    tune_tokens: int = 10_000
    """Words of valid on which dynamic evaluation is tuned."""
    num_samples: int = 10
    """Dropout masks a word of the dropout average."""
    seed: int = 0
    """For these masks."""


@dataclasses.dataclass(kw_only=True)
class Predict(OnBackend):
    """Print actual and predicted next words of training and test text."""

    run: Run
    """Folder of a run."""
    start: int = 70
    """Position of the first word to predict."""
    num_words: int = 10
    """How many words to predict."""
    corpus: str | None = None
    """The run's corpus, where its folder has moved."""


@dataclasses.dataclass(kw_only=True)
class Generate(OnBackend):
    """Continue a prompt, word by word."""

    run: Run
    """Folder of a run."""
    prompt: str = ""
    """Text to begin with. Default: a new sentence."""
    max_new_tokens: int = 40
    """How many words to add."""
    temperature: float = 1.0
    """Above 1 more surprising, below 1 less, 0 the most likely word."""
    top_k: int | None = None
    """Sample among so many of the most likely words."""
    top_p: float | None = None
    """Sample among the fewest words with this share of the probability."""
    seed: int = 0
    """For the draws."""


@dataclasses.dataclass(kw_only=True)
class Corpus(Common):
    """Show what a corpus holds."""

    name: Annotated[str, tyro.conf.Positional] = "python-docs"
    """python-docs, ptb or a folder."""
    data: Path | None = None
    """Folder with downloaded corpora. Default: MULTILSTM_DATA."""
    max_vocabulary: int | None = None
    """Keep so many of the most frequent words; the others are <unk>."""
    unknown: UnknownWords = "error"
    """What to do with words of valid and test that train has not, where the
    vocabulary has no <unk>."""


@dataclasses.dataclass(kw_only=True)
class Compare(Common):
    """Train one preset from the same weights on several backends."""

    out: Path = Path("runs/compare")
    """Folder for the runs; runs that are there are gone on with."""
    python: Pythons = ()
    """BACKEND=PATH of the Python that has it, several times. Default: this
    Python and the environments of nox, with every backend they have."""
    preset: str | None = None
    """As of train."""
    corpus: str | None = None
    """As of train."""
    epochs: int | None = None
    """As of train."""
    until_perplexity: float | None = None
    """As of train; the time to it is reported. Default: to the perplexity
    that all reached."""
    tolerance: float = 0.03
    """How far apart, relative, validation perplexities may be."""
    seed: int | None = None
    """As of train."""
    data: Path | None = None
    """As of train."""


@dataclasses.dataclass(kw_only=True)
class Measure(Common):
    """What the commands take that time training steps."""

    preset: str | None = None
    """Its sizes are timed, its dropout is not. Default: tutorial."""
    units: int | None = None
    """Of each LSTM layer. Default: the preset's, as for all sizes."""
    layers: int | None = None
    """Number of LSTM layers."""
    embedding_dim: int | None = None
    """Size of a word's vector."""
    sequence_length: int | None = None
    """Words in a row."""
    vocabulary_size: int | None = None
    """Number of words. Default: 10,000."""
    dtype: Dtype | None = None
    """Of the products. Default: tf32 on a GPU, float32 elsewhere."""
    processes: int = 3
    """How often each backend is started anew: one process of a framework may
    be a fifth slower than the next."""
    rounds: int = 3
    """Windows of each backend in each process, in turns."""
    steps: int | None = None
    """Training steps in a window. Default: 8, on a GPU 100."""
    timeout: float = 600
    """Seconds that a backend may take for one of its tasks."""
    python: Pythons = ()
    """BACKEND=PATH of the Python that has it, several times. Default: this
    Python and the environments of nox, with every backend they have."""


@dataclasses.dataclass(kw_only=True)
class Bench(Measure):
    """Time training steps on every backend."""

    batch_size: str | None = None
    """Rows a batch; several with commas: 20,64,128."""
    model: Path | None = None
    """A Keras model of your own, MODEL.keras, to train on random numbers."""
    peers: bool = False
    """Time stock Keras and each framework's own loop as well."""
    out: Path = Path("runs/bench")
    """Folder for bench.json and report.html, .md and .png."""


@dataclasses.dataclass(kw_only=True)
class Choose(Measure):
    """Find the fastest backend, then the default of train in that dtype."""

    batch_size: int | None = None
    """Rows a batch."""
    again: bool = False
    """Measure even where a choice is kept that still holds."""
    results: Path | None = None
    """Choose by this bench.json, made on this device, and measure nothing."""
    write_keras_json: bool = False
    """Make it Keras's own default too."""


@dataclasses.dataclass(kw_only=True)
class Presets(Common):
    """List the presets: sizes, published and measured perplexities, time."""

    vocabulary_size: int = 10_000
    """Words of the vocabulary, for the size."""
    tokens: int = 929_589
    """Words of the training text, for the time. Default: Penn Treebank's."""


@dataclasses.dataclass(kw_only=True)
class Doctor(Common):
    """Say what is installed, what it sees and which LSTM runs on it."""

    timeout: float = 120
    """Seconds that a backend may take for one of its tasks."""
    python: Pythons = ()
    """BACKEND=PATH of the Python that has it, several times. Default: this
    Python and the environments of nox, with every backend they have."""


@dataclasses.dataclass(kw_only=True)
class Report(Common):
    """Make one report of the results of several runs or machines."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of `bench` and `compare`."""
    out: Path = Path("runs/report")
    """Folder for report.html, .md and .png."""


def run_train(options: Train, console: Console) -> dict[str, Any]:
    from multilstm.training import train

    arguments = dataclasses.asdict(options)
    for name in ("json", "backend"):
        del arguments[name]
    data = arguments.pop("data")
    result = train(**arguments, data_folder=data)
    if result["status"] == "finished":
        console.print(
            f"test perplexity {result['test_perplexity']:.2f} (valid "
            f"{result['valid_perplexity']:.2f}, epoch {result['best_epoch']}; "
            f"unigram {result['test_unigram_perplexity']:.1f}), "
            f"{_speed(result)}, in {result['run']}"
        )
        if result["is_out_of_time"]:
            console.print(
                f"{result['epochs']} of {result['epochs_planned']} epochs; go "
                f"on with: {_command_to_go_on(options, result)}"
            )
    return result


def run_evaluate(options: Evaluate, console: Console) -> dict[str, Any]:
    if options.adapt:
        return run_adapt(options, console)
    from multilstm.evaluation import evaluate
    from multilstm.run_folder import RESULT_SCHEMA
    from multilstm.runs import (
        describe_environment,
        describe_protocol,
        load_run,
        load_run_corpus,
    )

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
    from multilstm.adaptation import adapt
    from multilstm.run_folder import RunFolder
    from multilstm.runs import (
        describe_environment,
        describe_protocol,
        load_run,
        load_run_corpus,
        weights_sha256,
    )
    from multilstm.tuning import show_settings

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

    result = adapt(
        model,
        corpus,
        methods=options.adapt,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        tune_tokens=options.tune_tokens,
        num_samples=options.num_samples,
        seed=options.seed,
        tell=_telling(),
        keep=keep,
    )
    console.print(adaptation_table(result))
    for name, figures in result["methods"].items():
        console.print(f"{name}: {show_settings(figures['settings'])}")
    console.print(str(path))
    return record


def _earlier_methods(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What other commands measured of the same run in the same way."""
    from multilstm.adaptation import SCHEMA

    if not path.exists():
        return {}
    before = read_json(path, schema=SCHEMA)
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
    from multilstm.generation import predict_next_words
    from multilstm.runs import load_run, load_run_corpus

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
    from multilstm.corpus import tokenize
    from multilstm.generation import generate
    from multilstm.runs import load_run

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


def run_corpus(options: Corpus, console: Console) -> dict[str, Any]:
    from multilstm.corpus import SPLITS, load_corpus

    corpus = load_corpus(
        options.name,
        data_folder=options.data,
        max_vocabulary=options.max_vocabulary,
        unknown=options.unknown,
    )
    table = Table(title=f"{corpus.name}: {len(corpus.vocabulary):,} words")
    for heading in ("split", "tokens", "unigram perplexity", "begins"):
        table.add_column(heading)
    record: dict[str, Any] = {
        "corpus": corpus.name,
        "vocabulary_size": len(corpus.vocabulary),
        "sha256": corpus.sha256,
        "splits": {},
    }
    for split in SPLITS:
        ids = corpus.split(split)
        about = {
            "num_tokens": len(ids),
            "unigram_perplexity": corpus.unigram_perplexity(split),
            "first_ids": ids[:5].tolist(),
            "first_words": corpus.vocabulary.decode(ids[:5]),
            "words_100_to_109": corpus.vocabulary.decode(ids[100:110]),
        }
        record["splits"][split] = about
        table.add_row(
            split,
            f"{len(ids):,}",
            f"{about['unigram_perplexity']:.1f}",
            _plain(" ".join(about["first_words"])),
        )
    console.print(table)
    return record


def run_compare(options: Compare, console: Console) -> dict[str, Any]:
    from multilstm.report import write_report

    if options.epochs is None:  # not those of runs that are there already
        options.epochs = find_preset(options.preset or "small").epochs
    arguments = []
    names = ("preset", "corpus", "epochs", "until_perplexity", "seed", "data")
    for name in names:
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    if not options.tolerance >= 0:
        raise UserError(
            f"--tolerance must be 0 or more; received {options.tolerance}."
        )
    comparison = compare(
        _pythons(options),
        arguments,
        out=options.out,
        until_perplexity=options.until_perplexity,
        tolerance=options.tolerance,
    )
    write_report([comparison], options.out)
    console.print(comparison_table(comparison["results"]))
    if not comparison["same_initial_weights"]:
        console.print("The initial weights were not the same.", style="red")
    apart = comparison["largest_difference"]
    if apart is not None:
        console.print(
            "Largest difference of a validation perplexity between backends: "
            f"{apart:.3%}, "
            + ("within" if comparison["agree"] else "MORE THAN")
            + f" the {comparison['tolerance']:.3%} allowed"
        )
    wanted = comparison["target_perplexity"]
    for backend, seconds in comparison["seconds_to_target"].items():
        reached = "not reached" if seconds is None else f"{seconds:,.1f} s"
        console.print(f"{backend} to perplexity {wanted:.2f}: {reached}")
    failed = [b for b, r in comparison["results"].items() if "error" in r]
    if failed:
        raise UserError(
            f"Training failed on {', '.join(failed)}; its own message stands "
            "above. Mend that and run the command again: what is done is kept."
        )
    return comparison


def comparison_table(results: dict[str, Any]) -> Table:
    """One row a backend: the best epoch, its perplexities, tokens/s."""
    table = Table(title="perplexity of the best epoch")
    table.add_column("backend")
    for heading in ("epoch", "valid", "test", "tokens/s"):
        table.add_column(heading, justify="right")
    for backend, result in results.items():
        if "error" in result:
            table.add_row(backend, result["error"])
            continue
        figures = [result["valid_perplexity"], result["test_perplexity"]]
        speeds = [row["tokens_per_second"] for row in result["history"]]
        table.add_row(
            backend,
            str(result["best_epoch"] or "-"),
            *("-" if figure is None else f"{figure:.2f}" for figure in figures),
            f"{sum(speeds) / len(speeds):,.0f}" if speeds else "-",
        )
    return table


def run_bench(options: Bench, console: Console) -> dict[str, Any]:
    from multilstm.bench import bench
    from multilstm.report import bench_tables, write_report

    if options.model is not None:
        sizes = ("units", "layers", "embedding_dim", "vocabulary_size")
        _refuse(options, sizes, "--model, which has its own")
    result = bench(
        _pythons(options),
        _shapes(options, _batch_sizes(options.batch_size)),
        model=options.model,
        peers=options.peers,
        **_how_to_measure(options),
    )
    for table in bench_tables(result):
        console.print(table)
    _print_verdicts(result, console)
    write_json(options.out / "bench.json", finite_or_none(result))
    write_report([result], options.out)
    console.print(f"{options.out / 'bench.json'}, report.html, .md and .png")
    if not any(record.get("agrees") for record in result["results"]):
        raise UserError("No backend gave a time that counts; see the table.")
    return result


def run_choose(options: Choose, console: Console) -> dict[str, Any]:
    from multilstm.bench import bench, choose, choose_by
    from multilstm.report import bench_tables

    if options.results is not None:
        names = (*_SIZES, "preset", "batch_size", "dtype", "again", "python")
        _refuse(options, names, "--results, which was measured already")
        return _tell_choices(choose_by(options.results), options, console)
    size = options.batch_size
    batch_sizes = () if size is None else (size,)
    [shape] = _shapes(options, batch_sizes)
    pythons = _pythons(options)
    choice = None
    if not options.again:
        choice, why_not = valid_choice(
            dataclasses.asdict(shape), options.dtype, pythons
        )
        console.print(why_not or "kept from before; --again measures anew")
    if choice is None:
        result = bench(pythons, [shape], **_how_to_measure(options))
        for table in bench_tables(result):
            console.print(table)
        choice = choose(result)
    return _tell_choices([choice], options, console)


def _tell_choices(
    choices: list[dict[str, Any]], options: Choose, console: Console
) -> dict[str, Any]:
    backends = {choice["backend"] for choice in choices}
    for choice in choices:
        equal = ", ".join(choice["equal_within_noise"])
        note = f" (equal within noise: {equal}; it compiles fastest)"
        console.print(
            f"{choice['backend']} on {choice['device']}, "
            f"{choice['shape_line']}{note if equal else ''}",
            style="bold",
        )
        if choice["dtype"] != usual_precision():
            mixed = "mixed_" if choice["dtype"] == "bfloat16" else ""
            console.print(
                "It is the default of train with --precision "
                f"{mixed}{choice['dtype']} alone."
            )
    if options.write_keras_json:
        if len(backends) > 1:
            raise UserError(
                "--write-keras-json needs one backend; for these shapes it is "
                f"{', '.join(sorted(backends))}. Choose by one shape."
            )
        console.print(f"written to {write_keras_json(backends.pop())}")
    return (choices[0] if len(choices) == 1 else {}) | {"choices": choices}


def _refuse(options: Measure, names: Sequence[str], beside: str) -> None:
    """Tells of options that would do nothing."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        if getattr(options, name)
    ]
    if given:
        raise UserError(
            f"{', '.join(given)} would do nothing beside {beside}. Leave it "
            "out."
        )


def run_presets(options: Presets, console: Console) -> dict[str, Any]:
    for name in ("vocabulary_size", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least 1; received "
                f"{getattr(options, name)}."
            )
    rows = describe_presets(options.vocabulary_size, options.tokens)
    table = Table(title="perplexity, valid / test (PTB; small: python-docs)")
    table.add_column("preset", no_wrap=True)  # as --preset takes it
    for heading in ("weights", "epochs", "published", "measured", "time here"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["preset"],
            f"{row['parameters'] / 1e6:.1f}M",
            str(row["epochs"]),
            _pair(row["published_valid"], row["published_test"]),
            "\n".join(
                f"{m['valid']:.1f} / {m['test']:.1f} ({m['backend']})"
                for m in row["measured"]
            )
            or "-",
            _time_here(row),
        )
    console.print(table)
    for row in rows:
        console.print(_plain(f"{row['preset']}: {row['source']}"))
    if all(row["seconds"] is None for row in rows):
        console.print(
            "No time is known: `multilstm choose --preset NAME` measures it."
        )
    return {"presets": rows}


def _pair(valid: float | None, test: float | None) -> str:
    figures = ["-" if f is None else f"{f:g}" for f in (valid, test)]
    return "-" if figures == ["-", "-"] else " / ".join(figures)


def _time_here(row: dict[str, Any]) -> str:
    if row["seconds"] is None:
        return "-"
    about = "" if row["is_measured_shape"] else "about "
    return f"{about}{clock(row['seconds'])} ({row['backend']})"


def run_doctor(options: Doctor, console: Console) -> dict[str, Any]:
    from multilstm.doctor import doctor
    from multilstm.report import doctor_lines

    result = doctor(
        _pythons(options),
        timeout=_check_timeout(options.timeout),
        tell=_telling(),
    )
    advice = [f"- {line}" for line in result["advice"]]
    for line in [*doctor_lines(result), "", "What to do", *advice]:
        console.print(_plain(line))
    return result


def run_report(options: Report, console: Console) -> dict[str, Any]:
    from multilstm.report import read_results, write_report

    paths = write_report(read_results(options.results), options.out)
    for path in paths:
        console.print(str(path))
    return {"paths": [str(path) for path in paths]}


def _pythons(options: Compare | Measure | Doctor) -> dict[str, Path]:
    return parse_pythons(options.python) if options.python else find_pythons()


def _check_timeout(seconds: float) -> float:
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UserError(
            "--timeout must be above 0 s and at most "
            f"{threading.TIMEOUT_MAX:g} s; received {seconds}."
        )
    return seconds


def _how_to_measure(options: Measure) -> dict[str, Any]:
    for name in ("processes", "rounds", "steps"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0; received {value}.")
    return {
        "dtype": options.dtype,
        "processes": options.processes,
        "rounds": options.rounds,
        "steps": options.steps,
        "timeout": _check_timeout(options.timeout),
        "tell": _telling(),
    }


# What `make_shapes` takes besides.
_SIZES = (
    *("units", "layers", "embedding_dim", "sequence_length"),
    "vocabulary_size",
)


def _shapes(options: Measure, batch_sizes: Sequence[int]) -> list[Any]:
    from multilstm.bench import make_shapes

    return make_shapes(
        preset=options.preset,
        batch_sizes=batch_sizes,
        **{name: getattr(options, name) for name in _SIZES},
    )


def _batch_sizes(text: str | None) -> list[int]:
    """Reads "20,64,128"."""
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(
            "--batch-size needs whole numbers with commas between, as "
            f"20,64,128; received {text!r}."
        )
    return [*dict.fromkeys(int(part) for part in parts)]


def _telling() -> Callable[[str], None]:
    """Progress on stderr: stdout is for what was found."""
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    return lambda line: progress.print(_plain(line), style="dim")


def _print_verdicts(result: dict[str, Any], console: Console) -> None:
    from multilstm.bench import by_shape, fastest
    from multilstm.report import NAMES

    for title, records in by_shape(result["results"]).items():
        several = len({record["variant"] for record in records}) > 1
        first = [
            f"{r['backend']} {NAMES[r['variant']]}" if several else r["backend"]
            for r in fastest(records)
        ]
        if len(first) > 1:
            said = f"equal within noise: {', '.join(first)}; {first[0]} "
            said += "compiles fastest"
        else:
            said = f"fastest: {first[0]}" if first else "nothing to rank"
        console.print(_plain(f"{title}: {said}"))


COMMANDS: dict[type, Callable[[Any, Console], dict[str, Any]]] = {
    Train: run_train,
    Evaluate: run_evaluate,
    Predict: run_predict,
    Generate: run_generate,
    Corpus: run_corpus,
    Compare: run_compare,
    Bench: run_bench,
    Choose: run_choose,
    Presets: run_presets,
    Doctor: run_doctor,
    Report: run_report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0 done, 1 failed with one line on stderr. Wrong
        usage exits with 2.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = tyro.extras.subcommand_cli_from_dict(
        {kind.__name__.lower(): kind for kind in COMMANDS},
        prog="multilstm",
        description="Word-level LSTM language models on any Keras backend.",
        args=arguments,
    )
    console = Console(highlight=False, soft_wrap=True)
    is_first = True
    try:
        if isinstance(options, OnBackend):
            shape, dtype = None, None
            if isinstance(options, Train):
                shape, dtype = _what_to_train(options)
            backend, reason = select_backend(options.backend, shape, dtype)
            count = 1
            if isinstance(options, Train):
                rank, started = place_among_processes(backend)
                is_first = rank == 0
                count = options.devices or 1
            if not is_first:
                console.quiet = True
                logging.disable(logging.WARNING)
            console.print(f"backend: {backend} ({reason})")
            if backend == "torch" and count > 1 and started == 1:
                given = sys.argv[1:] if arguments is None else arguments
                return launch(count, [*given, "--backend", backend])
        with explaining_failures():
            record = COMMANDS[type(options)](options, console)
    except ProcessLostError as error:
        # Where the first is lost, whoever lost it has said why.
        return _fail(str(error)) if is_first else 1
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    if options.json and is_first:
        print(json.dumps(finite_or_none(record), allow_nan=False))
    if record.get("status") == "interrupted" and not is_first:
        return 1
    if record.get("status") == "interrupted":
        return _fail(
            f"interrupted after {record['epochs']} epochs, nothing is lost; "
            f"go on with: {_command_to_go_on(options, record)}"
        )
    return 0


def _what_to_train(options: Train) -> tuple[dict[str, Any], str | None]:
    """Sizes and dtype, for which a backend may have been chosen."""
    preset = find_preset(options.preset or "small")
    precision = options.precision
    config = options.out and options.out / "config.json"
    if options.resume and config and config.exists():
        settings = read_json(config, schema=CONFIG_SCHEMA)
        preset, precision = preset_of(settings), settings.get("precision")
    dtype = "bfloat16" if precision == "mixed_bfloat16" else precision
    shape = {
        "units": preset.units_of_layers,
        "batch_size": max(options.batch_size or preset.batch_size, 1),
        "sequence_length": max(
            options.sequence_length or preset.sequence_length, 1
        ),
        "vocabulary_size": max(options.max_vocabulary or 10_000, 1),
    }
    return shape, dtype


def _command_to_go_on(options: Train, record: dict[str, Any]) -> str:
    command = ["multilstm", "train", "--out", record["run"], "--resume"]
    command += ["--backend", record["backend"]]
    if options.data is not None:
        command += ["--data", str(options.data)]
    return shlex.join(command)


def _speed(result: dict[str, Any]) -> str:
    speed = result["tokens_per_second"]
    return "speed not measured" if speed is None else f"{speed:,.0f} tokens/s"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _print_words(console: Console, title: str, words: list[str]) -> None:
    console.print(_plain(f"{title} {' '.join(words)}".strip()))


def _plain(text: str) -> Any:
    """Text that rich prints as it is: corpora hold brackets.

    Not what a terminal would take for a command, nor half a character: a
    strange vocabulary may hold them.
    """
    from rich.text import Text

    return Text(
        "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    )


if __name__ == "__main__":
    sys.exit(main())
