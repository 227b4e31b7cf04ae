"""Measures which backend is fastest for a network, and imports Keras on it.

    python examples/choose_backend.py

Backends are looked for in this Python's environment and in those of nox, in
the folder `.nox` of where this is started: start it in the clone. The choice is
kept: `multilstm train` takes it too where nothing names a backend.
`KERAS_BACKEND`, where it is set, goes before the choice, here too.
"""

import argparse
import sys

from multilstm import UserError
from multilstm.bench import bench, make_shapes
from multilstm.choosing import choose
from multilstm.selection import find_pythons, select_backend


def main() -> None:
    """Measures, chooses and imports Keras."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()

    # The network to train, and its batches.
    shapes = make_shapes(
        units=200,
        layers=2,
        batch_sizes=[20],
        sequence_length=20,
        vocabulary_size=10_000,
    )

    # Training steps of every backend, each in processes of its own, in turns.
    result = bench(find_pythons(), shapes, tell=print)
    for record in result["results"]:
        if record["rank"]:
            print(
                f"{record['rank']}. {record['backend']}: "
                f"{record['tokens_per_second']:,.0f} tokens/s, "
                f"compiled in {record['compile_time_seconds']:.1f} s"
            )
        else:
            reason = record.get("reason") or record["disagrees"]
            print(f"-  {record['backend']}: {reason}")

    # The backend has to be chosen before Keras is imported.
    choice = choose(result)
    _, reason = select_backend(shape=choice["shape"])
    import keras

    print(f"Keras {keras.__version__} on {keras.config.backend()}: {reason}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
