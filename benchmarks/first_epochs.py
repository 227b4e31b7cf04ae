"""The first epoch of each preset, on a part of the text.

    python benchmarks/first_epochs.py --train-tokens 100000

Shows that every recipe learns, where there is no time for a whole run. A run
that is there already is gone on with.
"""

import argparse
import json
from pathlib import Path

from multilstm import PRESETS, train
from multilstm.files import write_json


def main() -> None:
    """Trains them one after another and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/first-epochs"))
    parser.add_argument("--corpus", default="ptb")
    parser.add_argument("--train-tokens", type=int, default=100_000)
    parser.add_argument(
        "--presets",
        nargs="*",
        # What goes on from another run has no first epoch of its own.
        default=[p.name for p in PRESETS.values() if p.starts_from is None],
    )
    options = parser.parse_args()
    rows = []
    for preset in options.presets:
        result = train(
            preset,
            corpus=options.corpus,
            out=options.out / preset,
            epochs=1,
            train_tokens=options.train_tokens,
            resume=True,
            progress=False,
        )
        if result["status"] != "finished":
            return
        [epoch] = result["history"]
        rows.append(
            {
                "preset": preset,
                "parameters": result["parameters"],
                "train_perplexity": round(epoch["train_perplexity"], 1),
                "valid_perplexity": round(epoch["valid_perplexity"], 1),
                "tokens_per_second": epoch["tokens_per_second"],
                "kernel": result["kernel"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        about = {
            "schema": "multilstm-first-epochs-1",
            **{
                key: result[key]
                for key in ("backend", "device", "versions", "corpus", "seed")
            },
            "train_tokens": options.train_tokens,
            "test_unigram_perplexity": result["test_unigram_perplexity"],
            "rows": rows,
        }
        write_json(options.out / "first-epochs.json", about)
    print("\n| preset | train | valid | kernel |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| `{row['preset']}` | {row['train_perplexity']} | "
            f"{row['valid_perplexity']} | {row['kernel']} |"
        )


if __name__ == "__main__":
    main()
