"""A run folder -> model, vocabulary and corpus, whichever backend trained it.

And what a result record says of where and how its figures came to be.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from multilstm import __version__
from multilstm.config import DEFAULTS
from multilstm.corpus import NAMES, Corpus, load_corpus
from multilstm.errors import UserError
from multilstm.evaluation import STATE, TOKENS
from multilstm.failures import explaining_failures
from multilstm.files import MISFITS
from multilstm.model import LanguageModel
from multilstm.ops import device_name, last_kernel
from multilstm.presets import Preset
from multilstm.run_folder import RunFolder
from multilstm.vocabulary import Vocabulary
from multilstm.weights_file import load_weights


def load_run(
    path: str | Path,
) -> tuple[LanguageModel, Vocabulary, dict[str, Any]]:
    """Loads the best weights of a run, whichever backend trained it.

    Returns:
        The model, its vocabulary, and the run's `config.json`.

    Raises:
        UserError: If the folder holds no run, or none that has weights yet.
    """
    folder = RunFolder(path)
    config = DEFAULTS | folder.read_config()
    if not folder.best_weights.exists():
        epochs = folder.num_epochs_told()
        if epochs:
            raise UserError(
                f"{folder.best_weights} is needed and is gone, after {epochs} "
                "epochs. Put it back, or train on with --resume and more "
                "--epochs, which writes it anew."
            )
        raise UserError(
            f"{folder.path} has no {folder.best_weights.name} yet: no epoch "
            "was completed. Train it on with --resume."
        )
    vocabulary = Vocabulary.load(folder.vocabulary)
    with explaining_failures():
        with explaining_config(folder):
            model = LanguageModel(**config["model"] | {"carry_state": False})
            _check_fits(model, vocabulary, folder)
            model.build((None, None))
        load_weights(folder.best_weights, model)
    return model, vocabulary, config


def _check_fits(
    model: LanguageModel, vocabulary: Vocabulary, folder: RunFolder
) -> None:
    """Before memory is taken for what files of strangers may ask for."""
    if model.vocabulary_size != len(vocabulary):
        raise UserError(
            f"{folder.config} must be of a model of {len(vocabulary)} words, "
            f"as {folder.vocabulary.name} has; it is of "
            f"{model.vocabulary_size}. Both must come from one run."
        )
    needed = 4 * model.least_num_weights()  # at the very least
    found = folder.best_weights.stat().st_size
    if needed > found:
        raise UserError(
            f"{folder.best_weights} must hold the {needed:,} bytes of the "
            f"model of {folder.config.name}; it has {found:,}. Both must come "
            "from one run."
        )


def load_run_corpus(
    config: dict[str, Any],
    data_folder: str | Path | None = None,
    corpus: str | Path | None = None,
) -> Corpus:
    """The corpus of a run, from its `config.json` or, if moved, `corpus`.

    Raises:
        UserError: If its text is not the text that the run was trained on.
    """
    if corpus is not None:
        config = config | {"corpus": corpus_name(corpus)}
    else:
        check_corpus_is_there(config)
    data = load_corpus_of(config, data_folder)
    if data.sha256 != config.get("corpus_sha256"):
        raise UserError(
            f"The run was trained on another text than that of {data.name!r} "
            "now (its checksums differ). Give it the same files, with "
            "--corpus if they have moved; python-docs changes with the "
            "version of Python."
        )
    return data


def check_corpus_is_there(config: dict[str, Any]) -> None:
    """Tells of a run's corpus folder that has moved how to go on."""
    corpus = config["corpus"]
    if corpus not in NAMES and not Path(corpus).is_dir():
        raise UserError(
            f"The run was trained on the corpus in {corpus}, which is no "
            "folder now. Give the folder where the same text is with --corpus."
        )


def weights_sha256(model: Any) -> str:
    """The checksum of a model's weights: equal where they are, bit for bit."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()


def describe_environment() -> dict[str, Any]:
    """Backend, device, versions and precision, for a result record."""
    backend = keras.config.backend()
    return {
        "backend": backend,
        "device": device_name(),
        "versions": {
            "multilstm": __version__,
            "python": platform.python_version(),
            "keras": keras.__version__,
            backend: getattr(sys.modules.get(backend), "__version__", None),
            "numpy": np.__version__,
        },
        "precision": keras.config.dtype_policy().name,
        "kernel": last_kernel(),
    }


def load_corpus_of(
    settings: dict[str, Any], data_folder: str | Path | None
) -> Corpus:
    """The corpus that settings name."""
    return load_corpus(
        settings["corpus"],
        data_folder=data_folder,
        max_vocabulary=settings["max_vocabulary"],
        unknown=settings["unknown"],
    )


def corpus_name(corpus: str | Path | None) -> str | None:
    """As `config.json` has it: a name, or a folder's whole path."""
    if corpus is None:
        return None
    return str(corpus) if corpus in NAMES else os.path.realpath(corpus)


@contextmanager
def explaining_config(folder: RunFolder) -> Iterator[None]:
    """What a config of another version, or of nobody's, may lead to."""
    try:
        yield
    except UserError:
        raise
    except MISFITS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder.config} must describe a run of this version of "
            f"multilstm; it does not ({reason}). Use the version that wrote it."
        ) from error


def describe_protocol(plan: Preset, settings: dict[str, Any]) -> dict[str, Any]:
    """What the figures of a run are of, and what was chosen on what."""
    chosen = ["the epoch whose weights are kept"]
    if plan.plateau_factor is not None:
        chosen.append("when the learning rate falls")
    if plan.averaging == "triggered":
        chosen.append("when averaging begins")
    if plan.averaging != "never" and np.size(plan.averaging_power) > 1:
        chosen.append("which average is evaluated and kept")
    if plan.stops_non_monotone or any(
        settings[name] is not None for name in ("patience", "until_perplexity")
    ):
        chosen.append("when training ends")
    average = ", averages once they begin" if plan.averaging != "never" else ""
    return {
        "tokens": TOKENS,
        "state": STATE,
        "weights": f"those of the best epoch{average}",
        "tuned": {"text": "valid", "what": chosen},
    }
