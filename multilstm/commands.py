"""The commands that need no framework in this process."""

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from multilstm.choices import choices_folder, save_choice
from multilstm.clock import clock
from multilstm.devices import usual_precision
from multilstm.errors import UserError
from multilstm.files import check_folder, finite_or_none, write_json
from multilstm.options import (
    Bench,
    Choose,
    Common,
    Compare,
    Corpus,
    Doctor,
    Measure,
    Presets,
    Report,
)
from multilstm.preset_files import file_of, find_preset, settings_of
from multilstm.selection import (
    chosen_backend,
    compare,
    describe_presets,
    find_pythons,
    is_installed,
    parse_pythons,
    write_keras_json,
)


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
            plain(" ".join(about["first_words"])),
        )
    console.print(table)
    return record


def run_compare(options: Compare, console: Console) -> dict[str, Any]:
    from multilstm.report import write_report

    if options.epochs is None:  # not those of runs that are there already
        options.epochs = find_preset(options.preset or "small").epochs
    arguments = []
    if options.until_perplexity is None:  # likewise; none is lower
        arguments = ["--until-perplexity", "1"]
    names = ("preset", "corpus", "epochs", "until_perplexity", "seed", "data")
    for name in names:
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("tolerance", "until_perplexity"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')} must be a number from 0 on; "
                f"received {value}."
            )
    pythons = _pythons(options)
    check_folder(options.out)
    comparison = compare(
        pythons,
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
        speed = result["tokens_per_second"]
        table.add_row(
            backend,
            str(result["best_epoch"] or "-"),
            *("-" if figure is None else f"{figure:.2f}" for figure in figures),
            "-" if speed is None else f"{speed:,.0f}",
        )
    return table


def run_bench(options: Bench, console: Console) -> dict[str, Any]:
    from multilstm.bench import bench
    from multilstm.report import bench_tables, write_report

    if options.model is not None:
        sizes = ("units", "layers", "embedding_dim", "vocabulary_size")
        refuse(options, sizes, "beside --model, which has its own")
        if not options.model.is_file():
            raise UserError(
                "--model must be a file that Keras saved; there is none at "
                f"{options.model}."
            )
    shapes = _shapes(options, _batch_sizes(options.batch_size))
    how = _how_to_measure(options)
    check_folder(options.out)
    result = bench(
        _pythons(options),
        shapes,
        model=options.model,
        peers=options.peers,
        **how,
    )
    for table in bench_tables(result):
        console.print(table)
    _print_verdicts(result, console)
    out = options.out / "bench.json"
    none_counts = not any(record.get("agrees") for record in result["results"])
    if none_counts and out.exists():
        raise UserError(
            "No backend gave a time that counts; see the table. "
            f"{out} is kept as it was."
        )
    write_json(out, finite_or_none(result))
    write_report([result], options.out)
    console.print(f"{out}, report.html, .md and .png")
    if none_counts:
        raise UserError("No backend gave a time that counts; see the table.")
    return result


def run_choose(options: Choose, console: Console) -> dict[str, Any]:
    from multilstm.choosing import choices_of

    if options.results is None:
        choice, is_kept = _choice_by_measuring(options, console)
        choices = [choice]
    else:
        names = (
            *_SIZES,
            *("preset", "batch_size", "dtype", "again", "python"),
            *("processes", "rounds", "steps", "timeout"),
        )
        refuse(options, names, "beside --results, which was measured already")
        choices, is_kept = choices_of(options.results), False
    _tell_choices(choices, console)
    if not is_kept:
        choices = [
            {**choice, "path": str(save_choice(choice))} for choice in choices
        ]
    if options.results is not None:
        _tell_what_is_stale(choices, console)
    if options.write_keras_json:
        _write_for_keras(choices, console)
    return (choices[0] if len(choices) == 1 else {}) | {"choices": choices}


def _choice_by_measuring(
    options: Choose, console: Console
) -> tuple[dict[str, Any], bool]:
    """The choice for the shape asked for, and whether it is one from before."""
    from multilstm.bench import bench
    from multilstm.choosing import make_choice, valid_choice
    from multilstm.report import bench_tables

    size = options.batch_size
    batch_sizes = () if size is None else (size,)
    [shape] = _shapes(options, batch_sizes)
    pythons = _pythons(options)
    how = _how_to_measure(options)
    if not options.again:
        choice, why_not = valid_choice(
            dataclasses.asdict(shape),
            options.dtype,
            pythons,
            timeout=options.timeout,
        )
        told = why_not or "kept from before; --again measures anew"
        console.print(plain(told))
        if choice is not None:
            return choice, True
    check_folder(choices_folder())
    result = bench(pythons, [shape], **how)
    for table in bench_tables(result):
        console.print(table)
    return make_choice(result), False


def _tell_choices(choices: list[dict[str, Any]], console: Console) -> None:
    for choice in choices:
        equal = ", ".join(choice["equal_within_noise"])
        note = f" (equal within noise: {equal})"
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


def _tell_what_is_stale(
    choices: list[dict[str, Any]], console: Console
) -> None:
    """What the next start would say of choices by an older file."""
    for choice in choices:
        backend, said = chosen_backend(choice["shape"], choice["dtype"])
        if backend is None and said:
            console.print(plain(said), style="red")


def _write_for_keras(choices: list[dict[str, Any]], console: Console) -> None:
    backends = {choice["backend"] for choice in choices}
    if len(backends) > 1:
        raise UserError(
            "--write-keras-json needs one backend; for these shapes it is "
            f"{', '.join(sorted(backends))}. Choose by one shape."
        )
    [backend] = backends
    console.print(f"written to {write_keras_json(backend)}")
    if not is_installed(backend):
        console.print(
            f"{backend} is not installed here: where it is not, import keras "
            "fails unless KERAS_BACKEND names another one.",
            style="red",
        )


def refuse(options: Common, names: Sequence[str], where: str) -> None:
    """Tells of options that would do nothing there."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        if getattr(options, name) != getattr(type(options), name)
    ]
    if given:
        raise UserError(
            f"{', '.join(given)} would do nothing {where}. Leave it out."
        )


def run_presets(options: Presets, console: Console) -> dict[str, Any]:
    for name in ("vocabulary_size", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least 1; received "
                f"{getattr(options, name)}."
            )
    if options.name is not None:
        where = "beside the name of a preset"
        refuse(options, ("vocabulary_size", "tokens"), where)
        preset = find_preset(options.name)
        print(file_of(preset), end="")
        return {"preset": preset.name, "settings": settings_of(preset)}
    rows = describe_presets(options.vocabulary_size, options.tokens)
    table = Table(
        title="perplexity, valid / test (PTB; small: python-docs); weights "
        f"with {options.vocabulary_size:,} words"
    )
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
        console.print(plain(f"{row['preset']}: {row['source']}"))
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
        tell=telling(),
    )
    advice = [f"- {line}" for line in result["advice"]]
    for line in [*doctor_lines(result), "", "What to do", *advice]:
        console.print(plain(line))
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
    return {
        "dtype": options.dtype,
        "processes": options.processes,
        "rounds": options.rounds,
        "steps": options.steps,
        "timeout": _check_timeout(options.timeout),
        "tell": telling(),
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


def _print_verdicts(result: dict[str, Any], console: Console) -> None:
    from multilstm.ranking import by_shape, fastest
    from multilstm.report import NAMES

    for title, records in by_shape(result["results"]).items():
        several = len({record["variant"] for record in records}) > 1
        first = [
            f"{r['backend']} {NAMES[r['variant']]}" if several else r["backend"]
            for r in fastest(records)
        ]
        if len(first) > 1:
            said = f"equal within noise: {', '.join(first)}; take {first[0]}"
        else:
            said = f"fastest: {first[0]}" if first else "nothing to rank"
        console.print(plain(f"{title}: {said}"))


def telling() -> Callable[[str], None]:
    """Progress on stderr: stdout is for what was found."""
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    return lambda line: progress.print(plain(line), style="dim")


def plain(text: str) -> Any:
    """Text that rich prints as it is: corpora hold brackets.

    Not what a terminal would take for a command, nor half a character: a
    strange vocabulary may hold them.
    """
    return Text(
        "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    )
