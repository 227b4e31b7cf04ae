"""The folder of one training run: what is in it, written whole.

    config.json           what was asked for          vocabulary.json
    history.csv           one row an epoch            curves.png
    checkpoint/last.npz   to go on from: weights, optimizer, carried state,
                          random state, position in the data, history
    best.weights.h5       the weights with the lowest validation perplexity
    result.json           the figures, when training has ended
    adapted.json          those of `multilstm evaluate --adapt`

No file is ever half-written: each is written under a temporary name and then
renamed. None is a pickle.
"""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from multilstm.errors import UserError
from multilstm.files import (
    read_json,
    read_or_explain,
    replacing,
    write_json,
    write_text,
)
from multilstm.vocabulary import Vocabulary

CONFIG_SCHEMA = "multilstm-run-1"
CHECKPOINT_SCHEMA = "multilstm-checkpoint-1"
RESULT_SCHEMA = "multilstm-result-1"

History = list[dict[str, float]]


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: One row for each epoch that is done.
        num_batches: Batches done of the epoch after those.
        seconds: What these batches took.
    """

    history: History = field(default_factory=list)
    num_batches: int = 0
    seconds: float = 0.0


class RunFolder:
    """Paths, and reading and writing of what they hold."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.vocabulary = self.path / "vocabulary.json"
        self.history = self.path / "history.csv"
        self.curves = self.path / "curves.png"
        self.checkpoint = self.path / "checkpoint" / "last.npz"
        self.best_weights = self.path / "best.weights.h5"
        self.result = self.path / "result.json"
        self.adapted = self.path / "adapted.json"

    def create(self, config: dict[str, Any], vocabulary: Vocabulary) -> None:
        """Starts a run.

        Raises:
            UserError: If the folder has a run already, which stays as it is.
        """
        if self.config.exists():
            raise UserError(
                f"{self.path} already holds a run. Continue it with --resume, "
                "or choose another folder with --out."
            )
        vocabulary.save(self.vocabulary)
        write_json(self.config, {"schema": CONFIG_SCHEMA, **config})

    def update_config(self, config: dict[str, Any]) -> None:
        """Notes what a run that goes on was asked for, if that is new.

        Where the run came from stays as it was.
        """
        before = self.read_config()
        origin = ("model", "corpus_sha256", "initial_weights_sha256")
        after = before | config | {name: before[name] for name in origin}
        after = json.loads(json.dumps(after))  # tuples are lists in a file
        if after != before:
            write_json(self.config, after)

    def read_config(self) -> dict[str, Any]:
        """What the run was asked for.

        Raises:
            UserError: If the folder holds no run.
        """
        if not self.config.exists():
            raise UserError(
                f"{self.path} must be the folder of a run, with a "
                f"{self.config.name}; it is not. Give the folder that "
                "`multilstm train` wrote."
            )
        return read_json(self.config, schema=CONFIG_SCHEMA)

    def write_history(self, history: History) -> None:
        """Writes one CSV row an epoch, and the curves made from them."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
        write_text(self.history, text.getvalue())
        with replacing(self.curves) as temporary:
            draw_curves({self.path.name: history}).savefig(temporary, dpi=120)

    def save_checkpoint(self, model: Any, reached: Progress) -> None:
        """Writes everything that training goes on from, in one file."""
        arrays = {
            name: keras.ops.convert_to_numpy(variable)
            for name, variable in _state_of(model).items()
        }
        about = {"schema": CHECKPOINT_SCHEMA, **asdict(reached)}
        with replacing(self.checkpoint) as temporary:
            np.savez(temporary, about=json.dumps(about), **arrays)

    def load_checkpoint(self, model: Any) -> Progress:
        """Brings a compiled model back to where it was, and tells how far.

        Raises:
            UserError: If the file is missing, broken or of another model.
        """
        path = self.checkpoint
        about, arrays = read_or_explain(path, lambda: _read_npz(path))
        state = _state_of(model)
        shapes = {name: tuple(v.shape) for name, v in state.items()}
        found = {name: array.shape for name, array in arrays.items()}
        if shapes != found:
            differing = sorted(
                name
                for name in shapes.keys() | found.keys()
                if shapes.get(name) != found.get(name)
            )
            raise UserError(
                f"{path} must hold the state of this model; it differs in "
                f"{', '.join(differing[:3])}. Resume with the settings that "
                "the run was started with."
            )
        for name, variable in state.items():
            variable.assign(arrays[name])
        return Progress(**about)


def draw_curves(histories: dict[str, History]) -> Figure:
    """Draws the perplexity on train and valid by epoch, a colour a run."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, history) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in history]
        for split, style in (("train", "--"), ("valid", "-")):
            axes.plot(
                epochs,
                [row[f"{split}_perplexity"] for row in history],
                style,
                color=f"C{number}",
                marker=".",
                label=f"{name}, {split}",
            )
    axes.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    return figure


def _state_of(model: Any) -> dict[str, Any]:
    """Every variable that training goes on from, under its place's name."""
    groups = {
        "model": model.variables,
        "optimizer": model.optimizer.variables,
        "metrics": model.metrics_variables,
    }
    return {
        f"{group}/{number}": variable
        for group, variables in groups.items()
        for number, variable in enumerate(variables)
    }


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
        arrays = {name: npz[name] for name in npz.files}
    about = json.loads(str(arrays.pop("about")))
    schema = about.pop("schema", None)
    if schema != CHECKPOINT_SCHEMA:
        raise ValueError(f"its schema is {schema!r}")
    return about, arrays
