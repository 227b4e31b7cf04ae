"""The Keras LSTM tutorial, top to bottom, on any backend.

    KERAS_BACKEND=jax python examples/train.py
    KERAS_BACKEND=torch python examples/train.py --corpus ptb --epochs 3

Words become ids, ids become batches, a model learns to predict each next
word, and then it is asked how well it does and what it would say.
"""

import argparse
from pathlib import Path

import keras

import multilstm
from multilstm import PRESETS

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--corpus", default="python-docs", help="or ptb, a folder")
parser.add_argument("--epochs", type=int, default=PRESETS["small"].epochs)
parser.add_argument("--out", type=Path, default=Path("runs/example"))
options = parser.parse_args()
print(f"Keras {keras.__version__} on {keras.config.backend()}")

# Text -> ids. The vocabulary is built from the training text.
try:
    corpus = multilstm.load_corpus(options.corpus)
except multilstm.UserError as error:
    parser.exit(1, f"error: {error}\n")
words = corpus.vocabulary.decode(corpus.train[:10])
print(f"{len(corpus.train):,} training words, which begin: {' '.join(words)}")

# Ids -> batches. Each row is a stream of text that goes on in the next batch.
preset = PRESETS["small"]
batches = multilstm.ContinuousStreams(
    corpus.train, preset.sequence_length, preset.batch_size, drop_remainder=True
)

# Embedding -> LSTM -> LSTM -> logits; see your_own_model.py for the layers.
model = multilstm.LanguageModel.from_preset(
    "small", vocabulary_size=len(corpus.vocabulary)
)
model.compile()
options.out.mkdir(parents=True, exist_ok=True)
model.fit(
    batches,
    epochs=options.epochs,
    verbose=2,
    callbacks=[
        keras.callbacks.LearningRateScheduler(
            lambda epoch, _: preset.learning_rate_of(epoch)
        ),
        keras.callbacks.ModelCheckpoint(
            options.out / "epoch-{epoch:02}.weights.h5", save_weights_only=True
        ),
    ],
)

# How well does it predict a text it has not seen? Perplexity: as well as if
# it had to choose among so many equally likely words each time.
test = multilstm.evaluate(model, corpus.test)
unigram = corpus.unigram_perplexity("test")
print(
    f"test perplexity {test.perplexity:.2f} (by frequency alone {unigram:.1f})"
)

for split in ("train", "test"):
    actual, predicted = multilstm.predict_next_words(model, corpus.split(split))
    print(f"{split}, actual words:    {corpus.vocabulary.decode(actual)}")
    print(f"{split}, predicted words: {corpus.vocabulary.decode(predicted)}")

generated = multilstm.generate(
    model, corpus.vocabulary, ["The"], temperature=0.8, seed=1, stop_at="<eos>"
)
print("generated:", " ".join(generated.prompt + generated.words))
