"""The tutorial's stack in plain Keras, with multilstm's LSTM and windows.

    KERAS_BACKEND=torch python examples/your_own_model.py

Nothing here needs `LanguageModel`: the layer takes Keras's arguments and the
batches go into Keras's `fit`. The tutorial's sizes are 500 units, 30 steps
and 20 rows; smaller ones keep this example short.
"""

import argparse
import sys

import keras

from multilstm import NextWordWindows, UserError, load_corpus
from multilstm.layers import LSTM


def main() -> None:
    """Trains on windows of text, then predicts the next words of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="python-docs", help="ptb, a folder")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--num-steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=20)
    options = parser.parse_args()

    corpus = load_corpus(options.corpus)
    vocabulary_size = len(corpus.vocabulary)

    model = keras.Sequential(
        [
            keras.layers.Embedding(vocabulary_size, options.units),
            LSTM(options.units, return_sequences=True),
            LSTM(options.units, return_sequences=True),
            keras.layers.Dropout(0.5),
            keras.layers.TimeDistributed(keras.layers.Dense(vocabulary_size)),
            keras.layers.Activation("softmax"),
        ]
    )
    model.compile(
        optimizer="adam",
        # Targets are ids: one-hot ones would take 48 MB a batch on PTB.
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    sizes = (options.num_steps, options.batch_size)
    model.fit(
        NextWordWindows(corpus.train, *sizes),
        validation_data=NextWordWindows(corpus.valid, *sizes),
        epochs=options.epochs,
        verbose=2,
    )

    inputs, targets = NextWordWindows(corpus.test, *sizes)[0]
    scores = model.predict(inputs, verbose=0)  # (batch, time, vocabulary)
    actual, predicted = targets[0, :10], scores[0, :10].argmax(-1)
    print("Actual words:   ", *corpus.vocabulary.decode(actual))
    print("Predicted words:", *corpus.vocabulary.decode(predicted))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
