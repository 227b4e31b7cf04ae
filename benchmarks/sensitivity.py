"""How far apart two runs of one recipe end that differ by rounding alone.

Backends round differently. To tell what that does to a recipe from what a
fault would do, this trains `zaremba_small` on PTB for one epoch on one backend
from the initial weights of seed 0, each changed by one part in ten million up
or down, by as many draws as are asked for:

    KERAS_BACKEND=jax python benchmarks/sensitivity.py --draws 3
"""

import argparse
import json
from pathlib import Path

import keras
import numpy as np

from multilstm import (
    PRESETS,
    ContinuousStreams,
    LanguageModel,
    evaluate,
    load_corpus,
)
from multilstm.ops import device_name, last_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    corpus = load_corpus("ptb")
    preset = PRESETS["zaremba_small"]
    streams = ContinuousStreams(
        corpus.train,
        preset.sequence_length,
        preset.batch_size,
        drop_remainder=True,
    )
    runs = []
    for draw in range(1, options.draws + 1):
        keras.utils.clear_session()
        model = LanguageModel.from_preset(
            preset.name, vocabulary_size=len(corpus.vocabulary)
        )
        model.build((preset.batch_size, preset.sequence_length))
        model.compile()
        generator = np.random.default_rng(draw)
        model.set_weights(
            [
                weight
                * (1 + 1e-7 * generator.choice([-1, 1], weight.shape)).astype(
                    np.float32
                )
                for weight in model.get_weights()
            ]
        )
        model.fit(streams, epochs=1, verbose=0)
        runs.append(
            {
                "draw": draw,
                "valid_perplexity": evaluate(model, corpus.valid).perplexity,
                "test_perplexity": evaluate(model, corpus.test).perplexity,
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    record = {
        "schema": "multilstm-sensitivity-1",
        "preset": preset.name,
        "corpus": "ptb",
        "epochs": 1,
        "backend": keras.config.backend(),
        "device": device_name(),
        "kernel": last_kernel(),
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "zaremba-small-ptb-sensitivity.json"
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
