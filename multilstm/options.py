"""What each command can be told: one class a command, for tyro."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from multilstm.config import Precision, Softmax
from multilstm.devices import Dtype
from multilstm.selection import BackendName

UnknownWords = Literal["error", "drop"]
Run = Annotated[Path, tyro.conf.Positional]
Pythons = tyro.conf.UseAppendAction[tuple[str, ...]]
Method = Literal[
    "temperature", "cache", "dropout", "dynamic-sgd", "dynamic-rms"
]
Methods = tyro.conf.UseAppendAction[tuple[Method, ...]]


@dataclasses.dataclass(kw_only=True)
class Common:
    """What every command takes."""

    json: bool = False
    """End with one JSON object on the last line of stdout."""


@dataclasses.dataclass(kw_only=True)
class OnBackend(Common):
    """What every command takes that computes with a model."""

    backend: BackendName | None = None
    """Default: KERAS_BACKEND, what `multilstm choose` found, keras.json, the
    first that is installed."""


@dataclasses.dataclass(kw_only=True)
class OnCorpus(OnBackend):
    """What those of them take that read a corpus."""

    data: Path | None = None
    """Folder with downloaded corpora. Default: MULTILSTM_DATA."""


@dataclasses.dataclass(kw_only=True)
class Train(OnCorpus):
    """Train a preset on a corpus, into a run folder."""

    preset: str | None = None
    """A name of `multilstm presets`, or a file of your own, NAME.json, as
    `multilstm presets NAME` prints one. Default: small."""
    corpus: str | None = None
    """python-docs, ptb, or a folder with *train*.txt, *valid*.txt and
    *test*.txt. Default: python-docs."""
    out: Path | None = None
    """Run folder. Default: runs/PRESET-CORPUS-BACKEND."""
    epochs: int | None = None
    """Passes over the training text. Default: the preset's."""
    batch_size: int | None = None
    """Rows a batch. Default: the preset's."""
    sequence_length: int | None = None
    """Steps of back-propagation. Default: the preset's."""
    learning_rate: float | None = None
    """Of the first epochs. Default: the preset's."""
    gradient_accumulation_steps: int | None = None
    """Batches whose gradients make one step. Default: the preset's."""
    precision: Precision | None = None
    """Of products; the weights are float32 in all. Default: tf32 on a GPU,
    float32 elsewhere."""
    starts_from: Path | None = None
    """Run whose best weights to begin with, as awd_finetune does."""
    train_tokens: int | None = None
    """Use only so many of the first words of the training text, at most all.
    Default: all."""
    softmax: Softmax | None = None
    """exact; adaptive: fewer numbers for rare words; sampled: trained on a
    sample of the words. Default: exact."""
    cutoffs: tuple[int, ...] | None = None
    """Of the adaptive softmax, the first word of each tail. Default: a
    twentieth and a quarter of the vocabulary."""
    num_sampled: int | None = None
    """Of the sampled softmax, words drawn for a batch. Default: an eighth of
    the vocabulary, at most 8,192."""
    seed: int | None = None
    """For initial weights and dropout. Default: 0."""
    patience: int | None = None
    """Stop after so many epochs without a better validation perplexity."""
    until_perplexity: float | None = None
    """Stop after the first epoch with this validation perplexity or less."""
    checkpoint_minutes: float | None = None
    """Between checkpoints within an epoch. Default: 10."""
    retries: int = 0
    """How often a run whose loss is no number any more, or of no use, goes
    back to its last checkpoint and on at half the learning rate."""
    minutes: float | None = None
    """Begin no epoch that would end later than this, judged by the last one;
    go on another time with --resume. Imports and test are not counted."""
    devices: int | None = None
    """How many GPUs, or parts of the CPU, share the rows of a batch."""
    max_vocabulary: int | None = None
    """Keep so many of the most frequent words; the others are <unk>."""
    unknown: UnknownWords | None = None
    """What to do with words of valid and test that train has not, where the
    vocabulary has no <unk>: error (default) or drop."""
    resume: bool = False
    """Go on from the checkpoint in --out, or start where there is none. Only
    --epochs, --patience, --until-perplexity, --learning-rate and
    --checkpoint-minutes may change, and --corpus to where the text is now."""


@dataclasses.dataclass(kw_only=True)
class Evaluate(OnCorpus):
    """Measure the perplexity of a run on a whole split."""

    run: Run
    """Folder of a run."""
    split: Literal["train", "valid", "test"] = "test"
    """Which text; not with --adapt, which has its own."""
    corpus: str | None = None
    """The run's corpus, where its folder has moved."""
    batch_size: int = 20
    """Rows read at once; it does not change the result."""
    sequence_length: int = 64
    """Words a row read at once; it does not change the result."""
    adapt: Methods = ()
    """Tune a better use of the model on valid and measure it on valid and
    test, several times for several; also in the run's adapted.json."""
    tune_tokens: int = 10_000
    """Words of valid on which dynamic evaluation is tuned."""
    num_samples: int = 10
    """Dropout masks a word of the dropout average."""
    seed: int = 0
    """For these masks."""


@dataclasses.dataclass(kw_only=True)
class Predict(OnCorpus):
    """Print actual and predicted next words of training and test text."""

    run: Run
    """Folder of a run."""
    start: int = 70
    """Position of the first word to predict."""
    num_words: int = 10
    """How many words to predict."""
    corpus: str | None = None
    """The run's corpus, where its folder has moved."""


@dataclasses.dataclass(kw_only=True)
class Score(OnBackend):
    """Tell how likely the sentences of a file are, word by word."""

    run: Run
    """Folder of a run."""
    file: Annotated[Path, tyro.conf.Positional]
    """UTF-8 text, a sentence a line; /dev/stdin reads from a pipe."""
    running: bool = False
    """Each line follows the one before: the state is carried on. Default:
    each line stands alone."""
    unknown: UnknownWords = "error"
    """What to do with unknown words where the vocabulary has no <unk>."""
    out: Path | None = None
    """CSV file for the nats of each word."""


@dataclasses.dataclass(kw_only=True)
class Generate(OnBackend):
    """Continue a prompt, word by word."""

    run: Run
    """Folder of a run."""
    prompt: str = ""
    """Text to begin with. Default: a new sentence."""
    max_new_tokens: int = 40
    """How many words to add."""
    temperature: float = 1.0
    """Above 1 more surprising, below 1 less, 0 the most likely word."""
    top_k: int | None = None
    """Sample among so many of the most likely words."""
    top_p: float | None = None
    """Sample among the fewest words with this share of the probability."""
    seed: int = 0
    """For the draws."""


@dataclasses.dataclass(kw_only=True)
class Corpus(Common):
    """Show what a corpus holds."""

    name: Annotated[str, tyro.conf.Positional] = "python-docs"
    """python-docs, ptb or a folder."""
    data: Path | None = None
    """Folder with downloaded corpora. Default: MULTILSTM_DATA."""
    max_vocabulary: int | None = None
    """Keep so many of the most frequent words; the others are <unk>."""
    unknown: UnknownWords = "error"
    """What to do with words of valid and test that train has not, where the
    vocabulary has no <unk>."""


@dataclasses.dataclass(kw_only=True)
class Compare(Common):
    """Train one preset from the same weights on several backends."""

    out: Path = Path("runs/compare")
    """Folder for the runs; runs that are there are gone on with."""
    python: Pythons = ()
    """BACKEND=PATH of the Python that has it, several times. Default: this
    Python and the environments of nox, with every backend they have."""
    preset: str | None = None
    """As of train."""
    corpus: str | None = None
    """As of train."""
    epochs: int | None = None
    """As of train."""
    until_perplexity: float | None = None
    """As of train; the time to it is reported. Default: to the perplexity
    that all reached."""
    tolerance: float = 0.03
    """How far apart, relative, validation perplexities may be."""
    seed: int | None = None
    """As of train."""
    data: Path | None = None
    """As of train."""


@dataclasses.dataclass(kw_only=True)
class Measure(Common):
    """What the commands take that time training steps."""

    preset: str | None = None
    """Its sizes are timed, its dropout is not. Default: tutorial."""
    units: int | None = None
    """Of each LSTM layer. Default: the preset's, as for all sizes."""
    layers: int | None = None
    """Number of LSTM layers."""
    embedding_dim: int | None = None
    """Size of a word's vector."""
    sequence_length: int | None = None
    """Words in a row."""
    vocabulary_size: int | None = None
    """Number of words. Default: 10,000."""
    dtype: Dtype | None = None
    """Of the products. Default: tf32 on a GPU, float32 elsewhere."""
    processes: int = 3
    """How often each backend is started anew: one process of a framework may
    be a fifth slower than the next."""
    rounds: int = 3
    """Windows of each backend in each process, in turns."""
    steps: int | None = None
    """Training steps in a window. Default: 8, on a GPU 100."""
    timeout: float = 600
    """Seconds that a backend may take for one of its tasks."""
    python: Pythons = ()
    """BACKEND=PATH of the Python that has it, several times. Default: this
    Python and the environments of nox, with every backend they have."""


@dataclasses.dataclass(kw_only=True)
class Bench(Measure):
    """Time training steps on every backend."""

    batch_size: str | None = None
    """Rows a batch; several with commas: 20,64,128."""
    model: Path | None = None
    """A Keras model of your own, MODEL.keras, to train on random numbers."""
    peers: bool = False
    """Time stock Keras, the same with our LSTM in it, and each framework's
    own loop as well."""
    out: Path = Path("runs/bench")
    """Folder for bench.json and report.html, .md and .png."""


@dataclasses.dataclass(kw_only=True)
class Choose(Measure):
    """Find the fastest backend, then the default of train in that dtype."""

    batch_size: int | None = None
    """Rows a batch."""
    again: bool = False
    """Measure even where a choice is kept that still holds."""
    results: Path | None = None
    """Choose by this bench.json, made on this device, and measure nothing."""
    write_keras_json: bool = False
    """Make it Keras's own default too."""


@dataclasses.dataclass(kw_only=True)
class Presets(Common):
    """List the presets: sizes, published and measured perplexities, time."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Print all settings of this one, as a file to change and to train."""
    vocabulary_size: int = 10_000
    """Words of the vocabulary, for the size."""
    tokens: int = 929_589
    """Words of the training text, for the time. Default: Penn Treebank's."""


@dataclasses.dataclass(kw_only=True)
class Doctor(Common):
    """Say what is installed, what it sees and which LSTM runs on it."""

    timeout: float = 120
    """Seconds that a backend may take for one of its tasks."""
    python: Pythons = ()
    """BACKEND=PATH of the Python that has it, several times. Default: this
    Python and the environments of nox, with every backend they have."""


@dataclasses.dataclass(kw_only=True)
class Report(Common):
    """Make one report of the results of several runs or machines."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of `bench` and `compare`."""
    out: Path = Path("runs/report")
    """Folder for report.html, .md and .png."""
