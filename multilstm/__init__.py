"""Word-level LSTM language models, the same on JAX, PyTorch and TensorFlow.

The public names, in the order in which the data meets them:

    text -> words -> ids -> batches -> logits -> training -> perplexity, words

Importing `multilstm` loads neither Keras nor a framework: each name is
imported when it is first used, so that the backend can still be chosen.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "UserError": "errors",
    "Corpus": "corpus",
    "load_corpus": "corpus",
    "read_words": "corpus",
    "Vocabulary": "vocabulary",
    "NextWordWindows": "dataset",
    "ContinuousStreams": "dataset",
    "VariableStreams": "dataset",
    "LSTM": "layers",
    "Embedding": "layers",
    "ResetCarriedState": "layers",
    "accelerate": "acceleration",
    "LanguageModel": "model",
    "Perplexity": "metrics",
    "Preset": "presets",
    "PRESETS": "presets",
    "train": "training",
    "load_run": "runs",
    "evaluate": "evaluation",
    "score": "scoring",
    "predict_next_words": "generation",
    "generate": "generation",
    "adapt": "adaptation",
}
_MODULES = ("layers", "ops", "optimizers")

__all__ = [*_HOME, "layers"]

if TYPE_CHECKING:
    from multilstm import layers as layers
    from multilstm.acceleration import accelerate as accelerate
    from multilstm.adaptation import adapt as adapt
    from multilstm.corpus import Corpus as Corpus
    from multilstm.corpus import load_corpus as load_corpus
    from multilstm.corpus import read_words as read_words
    from multilstm.dataset import ContinuousStreams as ContinuousStreams
    from multilstm.dataset import NextWordWindows as NextWordWindows
    from multilstm.dataset import VariableStreams as VariableStreams
    from multilstm.errors import UserError as UserError
    from multilstm.evaluation import evaluate as evaluate
    from multilstm.generation import generate as generate
    from multilstm.generation import predict_next_words as predict_next_words
    from multilstm.layers import LSTM as LSTM
    from multilstm.layers import Embedding as Embedding
    from multilstm.layers import ResetCarriedState as ResetCarriedState
    from multilstm.metrics import Perplexity as Perplexity
    from multilstm.model import LanguageModel as LanguageModel
    from multilstm.presets import PRESETS as PRESETS
    from multilstm.presets import Preset as Preset
    from multilstm.runs import load_run as load_run
    from multilstm.scoring import score as score
    from multilstm.training import train as train
    from multilstm.vocabulary import Vocabulary as Vocabulary


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = globals()[name] = getattr(_load(_HOME[name]), name)
        return found
    if name in _MODULES:
        return _load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _load(name: str) -> Any:
    """A module of ours, which may be the first to import Keras."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        from multilstm.devices import how_to_install
        from multilstm.errors import UserError
        from multilstm.selection import BACKENDS, is_installed

        absent = (error.name or "").partition(".")[0]
        if absent not in BACKENDS:
            raise
        others = [backend for backend in BACKENDS if is_installed(backend)]
        raise UserError(
            "Keras needs the framework that KERAS_BACKEND or its keras.json "
            f"names, or tensorflow; {absent} is not installed. "
            + (
                f"Set KERAS_BACKEND to {' or '.join(others)} before Python "
                "starts or first imports Keras."
                if others
                else f"Install it: {how_to_install(absent)}"
            )
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
