"""The Keras LSTM tutorial, top to bottom, on any backend.

    KERAS_BACKEND=jax python examples/train.py
    KERAS_BACKEND=torch python examples/train.py --corpus ptb --epochs 3

Words become ids, ids become batches, a model learns to predict each next
word, and then it is asked how well it does and what it would say.
"""

import argparse
import sys
from pathlib import Path

import keras

import multilstm


def main() -> None:
    """Trains, measures, predicts and generates."""
    preset = multilstm.PRESETS["small"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="python-docs", help="ptb, a folder")
    parser.add_argument("--epochs", type=int, default=preset.epochs)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    options = parser.parse_args()
    print(f"Keras {keras.__version__} on {keras.config.backend()}")

    # Text -> ids. The vocabulary is built from the training text.
    corpus = multilstm.load_corpus(options.corpus)
    words = corpus.vocabulary.decode(corpus.train[:10])
    print(f"{len(corpus.train):,} training words, which begin:", *words)

    # Ids -> batches. A row is a stream of text that goes on in the next batch.
    sizes = (preset.sequence_length, preset.batch_size)
    batches = multilstm.ContinuousStreams(
        corpus.train, *sizes, drop_remainder=True
    )

    # Embedding -> LSTM -> LSTM -> logits; your_own_model.py has the layers.
    model = multilstm.LanguageModel.from_preset(
        "small", vocabulary_size=len(corpus.vocabulary)
    )
    model.compile()
    options.out.mkdir(parents=True, exist_ok=True)
    weights = options.out / "epoch-{epoch:02}.weights.h5"
    callbacks = [
        keras.callbacks.LearningRateScheduler(
            lambda epoch, _: preset.learning_rate_of(epoch)
        ),
        keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
    ]
    model.fit(batches, epochs=options.epochs, verbose=2, callbacks=callbacks)

    # How well does it predict a text it has not seen? Perplexity: as well as
    # if it had to choose among so many equally likely words each time.
    test = multilstm.evaluate(model, corpus.test).perplexity
    unigram = corpus.unigram_perplexity("test")
    print(f"test perplexity {test:.2f} (by frequency alone {unigram:.1f})")

    for split in ("train", "test"):
        pair = multilstm.predict_next_words(model, corpus.split(split))
        for title, ids in zip(("Actual", "Predicted"), pair, strict=True):
            print(f"{title} words ({split}):", *corpus.vocabulary.decode(ids))

    prompt = "The" if "The" in corpus.vocabulary else "the"  # as on PTB
    text = multilstm.generate(
        model, corpus.vocabulary, prompt, temperature=0.8, stop_at="<eos>"
    )
    print("generated:", *text.prompt, *text.words)


if __name__ == "__main__":
    try:
        main()
    except multilstm.UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
