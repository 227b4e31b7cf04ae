"""The command line.

Arguments are read, the backend is chosen, and only then Keras is imported.
"""

import importlib
import io
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console

from multilstm import __version__
from multilstm.config import preset_of, read_config
from multilstm.errors import UserError
from multilstm.failures import ProcessLostError, explaining_failures
from multilstm.files import finite_or_none
from multilstm.launch import launch, place_among_processes, tell_once
from multilstm.options import (
    Bench,
    Choose,
    Common,
    Compare,
    Corpus,
    Doctor,
    Evaluate,
    Generate,
    OnBackend,
    Predict,
    Presets,
    Report,
    Score,
    Train,
)
from multilstm.preset_files import find_preset
from multilstm.selection import select_backend

COMMANDS = (
    *(Train, Evaluate, Predict, Score, Generate, Corpus, Compare, Bench),
    *(Choose, Presets, Doctor, Report),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0 done, 1 failed with one line on stderr. Wrong
        usage exits with 2.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: what was computed is not lost to a letter that this
        # terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    if (sys.argv[1:] if arguments is None else [*arguments]) == ["--version"]:
        print(f"multilstm {__version__}")
        return 0
    options = tyro.extras.subcommand_cli_from_dict(
        {kind.__name__.lower(): kind for kind in COMMANDS},
        prog="multilstm",
        description="Word-level LSTM language models on any Keras backend; "
        "--version tells which multilstm this is.",
        args=arguments,
    )
    # Paths and words may hold brackets and colons, which are no markup.
    console = Console(
        highlight=False, soft_wrap=True, markup=False, emoji=False
    )
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
            record = _run(options, console)
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
    if isinstance(options, Train) and record["status"] == "interrupted":
        if not is_first:
            return 1
        from multilstm.model_commands import command_to_go_on

        return _fail(
            f"interrupted after {record['epochs']} epochs, nothing is lost; "
            f"go on with: {command_to_go_on(options, record)}"
        )
    return 0


def _run(options: Common, console: Console) -> dict[str, Any]:
    """Calls the command's function, whose module may load a framework."""
    computes = isinstance(options, OnBackend)
    name = "model_commands" if computes else "commands"
    module = importlib.import_module(f"multilstm.{name}")
    function = getattr(module, f"run_{type(options).__name__.lower()}")
    record: dict[str, Any] = function(options, console)
    return record


def _what_to_train(options: Train) -> tuple[dict[str, Any], str | None]:
    """Sizes and dtype, for which a backend may have been chosen."""
    preset = find_preset(options.preset or "small")
    precision, max_vocabulary = options.precision, options.max_vocabulary
    config = options.out and options.out / "config.json"
    if options.resume and config and config.exists():
        settings = read_config(config)
        preset, precision = preset_of(settings), settings.get("precision")
        max_vocabulary = settings.get("max_vocabulary")
    dtype = "bfloat16" if precision == "mixed_bfloat16" else precision
    shape = preset.shape(max(max_vocabulary or 10_000, 1))
    for name in ("batch_size", "sequence_length"):
        shape[name] = max(getattr(options, name) or shape[name], 1)
    return shape, dtype


def _fail(message: str) -> int:
    tell_once(f"error: {message}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
