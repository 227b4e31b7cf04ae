"""One run of SGD, several averages of its weights: what each one is worth.

    KERAS_BACKEND=torch python benchmarks/averages.py --out runs/averages.json

The model is that of `ablation.py`. Averages do not change where the run goes,
so all are made of the same one: the mean of all weights since validation of
the plain ones stalled, as `awd` has it, and those from the first step on in
which the weights of step t count as t to some power does. They are made here
in NumPy, apart from the optimizer's own.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from ablation import BASE
from numpy.typing import NDArray

from multilstm import LanguageModel, load_corpus
from multilstm.evaluation import Evaluator
from multilstm.files import write_json
from multilstm.optimizers import make_optimizer
from multilstm.plan import cut_batches
from multilstm.runs import describe_environment

AFTER_A_STALL = "mean since valid stalled"


class Average:
    """A mean of weights in which later ones count for more."""

    def __init__(self, power: float) -> None:
        self.power = power
        self.num_steps = 0
        self.weights: list[NDArray[np.float32]] = []

    def add(self, weights: list[NDArray[np.float32]]) -> None:
        """Counts the weights after one more step."""
        if not self.weights:
            self.weights = [weight.copy() for weight in weights]
        self.num_steps += 1
        share = (self.power + 1) / (self.power + self.num_steps)
        for average, weight in zip(self.weights, weights, strict=True):
            average += np.float32(share) * (weight - average)


class Averages(keras.callbacks.Callback):
    """The averages that have begun, by name."""

    def __init__(self, powers: Iterable[float]) -> None:
        super().__init__()
        self.all = {f"power {power:g}": Average(power) for power in powers}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        weights = read(self.model)
        for average in self.all.values():
            average.add(weights)


def read(model: LanguageModel) -> list[NDArray[np.float32]]:
    """A copy of what is trained."""
    return [
        np.array(keras.ops.convert_to_numpy(variable))
        for variable in model.trainable_variables
    ]


def write(model: LanguageModel, weights: list[NDArray[np.float32]]) -> None:
    """Puts them there."""
    for variable, weight in zip(
        model.trainable_variables, weights, strict=True
    ):
        variable.assign(weight)


def main() -> None:
    """Trains once and writes the curves of all averages after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/averages.json"))
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--train-tokens", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=4, help="epochs")
    parser.add_argument("--powers", nargs="*", type=float, default=[2, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rotates-rows", action="store_true")
    options = parser.parse_args()
    corpus = load_corpus("ptb")
    plan = replace(BASE, rotates_rows=options.rotates_rows)
    model = LanguageModel(
        len(corpus.vocabulary), **plan.architecture(), seed=options.seed
    )
    model.build((plan.batch_size, plan.sequence_length))
    model.compile(make_optimizer(plan))
    evaluate = Evaluator(model)
    averages = Averages(options.powers)
    plain: list[float] = []
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, epoch: int) -> float:
        perplexity = evaluate(corpus.valid).perplexity
        row = rows.setdefault(name, {"curve": {}, "valid": math.inf})
        row["curve"][epoch] = round(perplexity, 2)
        if perplexity < row["valid"]:
            row["valid"], row["best_epoch"] = perplexity, epoch
            row["weights"] = read(model)
        return perplexity

    for epoch in range(1, options.epochs + 1):
        text = corpus.train[: options.train_tokens]
        batches = cut_batches(plan, text, options.seed, epoch - 1)
        model.fit(batches, shuffle=False, verbose=0, callbacks=[averages])
        plain.append(measure("none", epoch))
        if epoch % options.every == 0:
            weights = read(model)
            for name, average in averages.all.items():
                write(model, average.weights)
                measure(name, epoch)
            write(model, weights)
        has_begun = AFTER_A_STALL in averages.all
        if not has_begun and plan.is_non_monotone(plain):
            averages.all[AFTER_A_STALL] = Average(0)
            print(f"valid stalled in epoch {epoch}", flush=True)
        print(
            epoch,
            *(f"{n}: {list(r['curve'].values())[-1]}" for n, r in rows.items()),
            flush=True,
        )
    for row in rows.values():
        write(model, row.pop("weights"))
        row["test"] = round(evaluate(corpus.test).perplexity, 2)
        row["valid"] = round(row["valid"], 2)
    write_json(
        options.out,
        {
            "schema": "multilstm-averages-1",
            **describe_environment(),
            "corpus": corpus.name,
            "rotates_rows": options.rotates_rows,
            **{
                name: getattr(options, name)
                for name in ("seed", "epochs", "train_tokens")
            },
            "averages": rows,
        },
    )


if __name__ == "__main__":
    main()
