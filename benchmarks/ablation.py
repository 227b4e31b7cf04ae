"""What each part of a recipe gives: short runs, one part changed in each.

    python benchmarks/ablation.py --out runs/ablation

The base is `awd` made small, on the first words of Penn Treebank, so few that
it overfits within the run. Each run starts from the same seed, and one that
is there already is gone on with. Figures are for comparing rows of the table
with each other, not with published ones.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from multilstm import PRESETS, train
from multilstm.files import write_json

BASE = replace(
    PRESETS["awd"],
    name="base",
    units=(256, 256, 128),
    embedding_dim=128,
    sequence_length=35,
    learning_rate=20.0,
    input_dropout=0.3,
    hidden_dropout=0.2,
    output_dropout=0.3,
    embedding_dropout=0.05,
    weight_dropout=0.3,
    non_monotone=2,
    published_valid=None,
    published_test=None,
)
# What `awd_adam` has instead of `awd`'s.
ADAM = {
    name: getattr(PRESETS["awd_adam"], name)
    for name in (
        *("batch_size", "rotates_rows", "optimizer", "learning_rate"),
        *("warmup_epochs", "learning_rate_decay", "decay_after", "averaging"),
    )
}
AVERAGES = {"averaging": "triggered", "learning_rate_decay": 1.0}
CHANGES = {
    "base": {},
    "rows rotated": {"rotates_rows": True},
    "best": {
        name: getattr(PRESETS["best"], name)
        for name in ("rotates_rows", "averaging", "averaging_power")
    },
    "no weight dropout": {"weight_dropout": 0.0},
    "no embedding dropout": {"embedding_dropout": 0.0},
    "no AR, no TAR": {
        "activation_regularization": 0.0,
        "temporal_activation_regularization": 0.0,
    },
    "dropout new at each step": {"locked_dropout": False},
    "one length": {"length_std": None},
    "never averaged": {"averaging": "never"},
    "batch of 40, warm-up": {"batch_size": 40, "warmup_epochs": 2},
    "Adam": {
        "optimizer": "adam",
        "learning_rate": 2e-3,
        "learning_rate_decay": 0.9,
        "decay_after": 10,
        "averaging": "never",
    },
    "no dropout at all": dict.fromkeys(
        (
            *("input_dropout", "hidden_dropout", "output_dropout"),
            *("embedding_dropout", "weight_dropout"),
            *(
                "activation_regularization",
                "temporal_activation_regularization",
            ),
        ),
        0.0,
    ),
    "awd_adam": ADAM,
    "awd_adam, 20 rows": ADAM | {"batch_size": 20},
    "awd_adam, averages": ADAM | AVERAGES,
    "awd_adam, 20 rows, averages": ADAM | AVERAGES | {"batch_size": 20},
    "rate falls, rows rotated": {
        "rotates_rows": True,
        "learning_rate_decay": 0.9,
        "decay_after": 16,
        "averaging": "never",
    },
}


def main() -> None:
    """Trains what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-tokens", type=int, default=100_000)
    parser.add_argument("--corpus", default="ptb")
    parser.add_argument(
        "--only", nargs="*", default=list(CHANGES), choices=list(CHANGES)
    )
    options = parser.parse_args()
    rows = []
    for name in options.only:
        preset = name.replace(",", "").replace(" ", "-")
        result = train(
            replace(BASE, **CHANGES[name], name=preset),
            corpus=options.corpus,
            out=options.out / preset,
            epochs=options.epochs,
            train_tokens=options.train_tokens,
            resume=True,
            progress=False,
        )
        if result["status"] != "finished":
            return
        seconds = sum(row["seconds"] for row in result["history"])
        rows.append(
            {
                "change": name,
                "valid_perplexity": round(result["valid_perplexity"], 2),
                "best_epoch": result["best_epoch"],
                "test_perplexity": round(result["test_perplexity"], 2),
                "seconds": round(seconds),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        about = {
            "schema": "multilstm-ablation-1",
            **{
                key: result[key]
                for key in ("backend", "device", "versions", "corpus", "seed")
            },
            "train_tokens": options.train_tokens,
            "epochs": options.epochs,
            "rows": rows,
        }
        write_json(options.out / "ablation.json", about)
    print("\n| change | valid | test | best epoch |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['change']} | {row['valid_perplexity']} | "
            f"{row['test_perplexity']} | {row['best_epoch']} |"
        )


if __name__ == "__main__":
    main()
