"""Trained model + valid + test -> what better use of the model gains.

No method here trains the model further or needs more than the run it left:

    temperature    softmax(logits / T)
    cache          some probability for the text's own recent words
    dropout        the mean probability under many dropout masks
    dynamic-sgd    the weights go on learning from what was read; see
    dynamic-rms    `dynamic_evaluation.py`

A method has settings. They are tuned on the valid text, which alone `tune` is
given; the test text is measured once, with what was found. Whatever is
predicted, it is from the words before it alone.
"""

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from multilstm.corpus import Corpus
from multilstm.dynamic_evaluation import (
    STATISTICS_BATCHES,
    STATISTICS_ROWS,
    DynamicEvaluator,
    Weights,
)
from multilstm.errors import UserError, check_whole
from multilstm.evaluation import (
    STATE,
    TOKENS,
    Evaluation,
    Evaluator,
    Reading,
)
from multilstm.neural_cache import cache_probabilities, mix
from multilstm.ops import tf32
from multilstm.tuning import Search, Settings

SCHEMA = "multilstm-adapted-1"
METHODS = ("temperature", "cache", "dropout", "dynamic-sgd", "dynamic-rms")

# Where tuning begins; see `tuning.py`.
TEMPERATURES = (0.9, 1.0, 1.1)
WINDOWS = (100, 500, 2000)  # of these no others are tried
THETAS = (0.1, 0.3, 1.0)
SHARES = tuple(k / 100 for k in range(61))  # nor of these
SGD: dict[str, Sequence[float]] = {
    "learning_rate": (0.1, 0.3, 1.0),
    "decay": (0.001, 0.003, 0.01),
}
RMS: dict[str, Sequence[float]] = {
    "learning_rate": (0.0005, 0.001, 0.002),
    "decay": (0.0003, 0.001, 0.003),
    "epsilon": (0.001,),
}

_WORDS_AT_ONCE = 1024


def adapt(
    model: Any,
    corpus: Corpus,
    *,
    methods: Sequence[str] = ("temperature", "cache"),
    batch_size: int = 20,
    sequence_length: int = 64,
    tune_tokens: int = 10_000,
    num_samples: int = 10,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Tunes methods on the valid text and measures them on valid and test.

    With `"temperature"` and `"cache"` there is also `"temperature+cache"`,
    the cache beside the model at the temperature that was found.

    Args:
        model: A `LanguageModel`. It is not changed.
        corpus: Its corpus.
        methods: Some of `METHODS`. Dynamic evaluation takes minutes, as it
            reads word after word in one row.
        batch_size: As of `evaluate`; of a dropout average it changes the
            draws.
        sequence_length: Likewise.
        tune_tokens: From the begin of valid, to tune dynamic evaluation on.
        num_samples: Masks a word of a dropout average.
        seed: For these masks, which differ between backends.
        tell: Called with a line at each step.
        keep: Called with what is returned, as far as it is there, after each
            method.

    Returns:
        `schema`; `plain`, the figures of the model as it is; `methods`, for
        each its `settings`, `valid_perplexity`, `test_perplexity`, the
        cross-entropies, `seconds` and `protocol`: which tokens were predicted
        from which state, and what was tried on how many tokens of which text.

    Raises:
        UserError: If a method is unknown or does not apply to this model, or
            a number is out of its range.
    """
    if isinstance(methods, str):
        methods = [methods]
    _check(model, methods, tune_tokens, num_samples, seed)
    evaluator = Evaluator(
        model,
        batch_size,
        sequence_length,
        with_features=not {"temperature", "cache"}.isdisjoint(methods),
    )
    texts = {
        split: _Text(corpus.split(split), evaluator)
        for split in ("valid", "test")
    }
    start = time.perf_counter()
    plain: dict[str, Any] = _figures(
        {s: Evaluation.of(t.nats) for s, t in texts.items()}
    )
    tell(f"as it is: valid {plain['valid_perplexity']:.2f}")
    plain |= {
        "seconds": time.perf_counter() - start,
        "protocol": {"tokens": TOKENS, "state": STATE},
    }
    record: dict[str, Any] = {"schema": SCHEMA, "plain": plain, "methods": {}}
    temperature = Temperature(model)

    def make(name: str) -> Any:
        if name == "temperature":
            return temperature
        if name == "cache":
            return Cache()
        if name == "temperature+cache":
            found = record["methods"]["temperature"]["settings"]
            return Cache(temperature, found["temperature"])
        if name == "dropout":
            return DropoutAverage(model, evaluator, num_samples, seed)
        train = corpus.train if name == "dynamic-rms" else None
        return Dynamic(model, tune_tokens, train)

    for name in _with_combination(methods):
        record["methods"][name] = _adapt_by(
            make(name), texts, _telling_of(name, tell)
        )
        keep(record)
    return record


def _telling_of(
    name: str, tell: Callable[[str], None]
) -> Callable[[str], None]:
    return lambda line: tell(f"{name}: {line}")


def _adapt_by(
    method: Any, texts: dict[str, "_Text"], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Tunes one method on valid and measures it on every text."""
    start = time.perf_counter()
    settings, tuned = method.tune(texts["valid"], tell)
    figures = _figures(
        {split: method.measure(t, **settings) for split, t in texts.items()}
    )
    tell(f"valid {figures['valid_perplexity']:.2f}")
    return {
        "settings": settings,
        **figures,
        "seconds": time.perf_counter() - start,
        "protocol": {
            "tokens": TOKENS,
            "state": method.state,
            **getattr(method, "details", {}),
            "tuned": tuned,
        },
    }


class _Text:
    """A text, and what the model as it is makes of it."""

    def __init__(
        self, token_ids: NDArray[np.int32], evaluator: Evaluator
    ) -> None:
        self.token_ids = token_ids
        self._evaluator = evaluator
        self._cached: dict[tuple[int, float], NDArray[np.float64]] = {}

    @cached_property
    def reading(self) -> Reading:
        return self._evaluator.read(self.token_ids)

    @property
    def nats(self) -> NDArray[Any]:
        return self.reading.nats

    @property
    def features(self) -> NDArray[np.float32]:
        """As of the reading, from an evaluator that gives them."""
        return np.asarray(self.reading.features)

    def cached(self, window: int, theta: float) -> NDArray[np.float64]:
        """What `cache_probabilities` gives, kept."""
        how = (window, theta)
        if how not in self._cached:
            self._cached[how] = cache_probabilities(
                self.features,
                self.token_ids,
                window=window,
                theta=theta,
            )
        return self._cached[how]


# The methods -----------------------------------------------------------------
#
# Each has `tune`, which gives settings and what was tried, and `measure`.


class Temperature:
    """The logits divided by a number, exact from the features.

    Reference:
        Guo, Pleiss, Sun and Weinberger, 2017, "On calibration of modern
        neural networks", arXiv:1706.04599, section 4.2.
    """

    state = STATE

    def __init__(self, model: Any) -> None:
        self._chunk = _AtTemperature(model.projection)

    def tune(
        self, valid: _Text, tell: Callable[[str], None]
    ) -> tuple[Settings, dict[str, Any]]:
        search = Search(
            lambda temperature: self.measure(valid, temperature).cross_entropy,
            tell,
        )
        search({"temperature": TEMPERATURES})
        return search.best(), search.describe(len(valid.nats))

    def measure(self, text: _Text, temperature: float) -> Evaluation:
        return Evaluation.of(self.nats(text, temperature))

    @tf32(False)
    def nats(self, text: _Text, temperature: float) -> NDArray[np.float32]:
        """Of each word, float32 of shape `(num_tokens - 1,)`."""
        features, targets = text.features, text.token_ids[1:]
        divisor = np.full((1,), temperature, np.float32)
        size = min(_WORDS_AT_ONCE, len(targets))
        nats = np.empty(len(targets), np.float32)
        for first in range(0, len(targets), size):
            # The last part goes back into the one before: one size for all.
            begin = min(first, len(targets) - size)
            part = slice(begin, begin + size)
            nats[part] = self._chunk.predict_on_batch(
                (features[part], targets[part], divisor)
            )
        return nats


class Cache:
    """The neural cache beside the model; see `neural_cache.py`.

    Args:
        temperature: What gives the model's nats, or None for the model as it
            is.
        at: The temperature for that.
    """

    state = STATE + "; the cache has the last words of the same text"

    def __init__(
        self, temperature: Temperature | None = None, at: float = 1.0
    ) -> None:
        self._temperature = temperature
        self._at = at

    def tune(
        self, valid: _Text, tell: Callable[[str], None]
    ) -> tuple[Settings, dict[str, Any]]:
        nats = self._nats(valid)
        shares: dict[tuple[float, float], float] = {}

        def score(window: float, theta: float) -> float:
            cached = valid.cached(int(window), theta)
            best, share = min(
                (Evaluation.of(mix(nats, cached, share)).cross_entropy, share)
                for share in SHARES
            )
            shares[window, theta] = share
            return best

        search = Search(score, tell)
        for window in WINDOWS:
            search({"window": (window,), "theta": THETAS})
        settings = search.best()
        settings["share"] = shares[settings["window"], settings["theta"]]
        tuned = search.describe(len(valid.nats)) | {
            "shares": [min(SHARES), max(SHARES), len(SHARES)]
        }
        if self._temperature is not None:
            settings["temperature"] = self._at
        return settings, tuned

    def measure(
        self,
        text: _Text,
        window: float,
        theta: float,
        share: float,
        temperature: float | None = None,
    ) -> Evaluation:
        cached = text.cached(int(window), theta)
        return Evaluation.of(mix(self._nats(text), cached, share))

    def _nats(self, text: _Text) -> NDArray[np.float32]:
        if self._temperature is None:
            return text.nats
        return self._temperature.nats(text, self._at)


class DropoutAverage:
    """The mean probability under many dropout masks, where there is dropout.

    Args:
        model: The model, with the dropout it was trained with.
        like: An evaluator whose sizes are taken.
        num_samples: Masks a word.
        seed: For the masks.

    Reference:
        Gal and Ghahramani, 2016, "A theoretically grounded application of
        dropout in recurrent neural networks", arXiv:1512.05287, section 4.
    """

    state = (
        "as without dropout at the start of each row, then carried on under "
        "its masks"
    )

    def __init__(
        self, model: Any, like: Evaluator, num_samples: int, seed: int
    ) -> None:
        self._model = model
        self._sizes = (like.batch_size, like.sequence_length)
        self._num_samples = num_samples
        self._seed = seed
        self.details = {
            "num_samples": num_samples,
            "seed": seed,
            "rows": like.batch_size,
            "sequence_length": like.sequence_length,  # one mask for so many
        }

    def tune(
        self, valid: _Text, tell: Callable[[str], None]
    ) -> tuple[Settings, None]:
        """Nothing is tuned: the model's own dropout is applied."""
        return {"num_samples": self._num_samples}, None

    def measure(self, text: _Text, num_samples: float) -> Evaluation:
        # A copy, so that the masks are those of the seed for every text.
        model = self._model.copy(seed=self._seed, carry_state=False)
        evaluator = Evaluator(model, *self._sizes, training=True)
        total = np.full(len(text.nats), -np.inf)
        for _ in range(int(num_samples)):
            nats = evaluator.read(text.token_ids, text.reading.starts).nats
            total = np.logaddexp(total, -np.asarray(nats, np.float64))
        return Evaluation.of(np.log(num_samples) - total)


class Dynamic:
    """Dynamic evaluation; see `dynamic_evaluation.py`.

    Args:
        model: The model.
        tune_tokens: From the begin of valid, to tune on.
        train: The training text, for the RMS form. None: the SGD form.
    """

    state = (
        "one row from zeros, carried to the end; each segment predicted "
        "before the weights learn from it; weights begin anew with each text"
    )

    def __init__(
        self,
        model: Any,
        tune_tokens: int,
        train: NDArray[np.int32] | None = None,
    ) -> None:
        self._evaluator = DynamicEvaluator(model)
        self._tune_tokens = tune_tokens
        self._train = train
        self.details: dict[str, Any] = {
            "segment_length": self._evaluator.segment_length,
            "loss": "mean nats of a segment, gradients not clipped",
        }
        if train is not None:
            self.details["gradient_statistics"] = {
                "text": "train",
                "max_batches": STATISTICS_BATCHES,
                "rows": STATISTICS_ROWS,
            }

    @cached_property
    def _mean_squares(self) -> Weights | None:
        if self._train is None:
            return None
        return self._evaluator.mean_squares(self._train)

    def tune(
        self, valid: _Text, tell: Callable[[str], None]
    ) -> tuple[Settings, dict[str, Any]]:
        begin = valid.token_ids[: self._tune_tokens]

        def score(**settings: float) -> float:
            return self._measure(begin, settings).cross_entropy

        search = Search(score, tell)
        search(SGD if self._train is None else RMS)
        return search.best(), search.describe(len(begin) - 1)

    def measure(self, text: _Text, **settings: float) -> Evaluation:
        return self._measure(text.token_ids, settings)

    def _measure(
        self, token_ids: NDArray[np.int32], settings: Settings
    ) -> Evaluation:
        return self._evaluator.evaluate(
            token_ids, **settings, mean_squares=self._mean_squares
        )


class _AtTemperature(keras.Model):
    """The nats of some words, compiled by Keras, their temperature an input."""

    def __init__(self, projection: Any) -> None:
        super().__init__(name="at_temperature", dtype="float32")
        self.projection = projection

    def call(self, words: tuple[Any, Any, Any]) -> Any:
        features, targets, temperature = words
        features = keras.ops.cast(features, self.projection.compute_dtype)
        return self.projection.negative_log_likelihood(
            features, targets, temperature=temperature
        )


def _with_combination(methods: Sequence[str]) -> list[str]:
    """The methods in order, and what two of them are together."""
    names = [name for name in METHODS if name in methods]
    if {"temperature", "cache"} <= {*names}:
        names.insert(2, "temperature+cache")
    return names


def _figures(measured: dict[str, Evaluation]) -> dict[str, float]:
    figures = {}
    for split, evaluation in measured.items():
        figures[f"{split}_perplexity"] = evaluation.perplexity
        figures[f"{split}_cross_entropy"] = evaluation.cross_entropy
        figures[f"{split}_num_words"] = evaluation.num_tokens
    return figures


def _check(
    model: Any,
    methods: Sequence[str],
    tune_tokens: int,
    num_samples: int,
    seed: int,
) -> None:
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise UserError(
            f"`methods` must be some of {', '.join(METHODS)}; received "
            f"{', '.join(map(repr, unknown)) or 'none'}."
        )
    check_whole("tune_tokens", tune_tokens, 2)
    check_whole("num_samples", num_samples, 1)
    check_whole("seed", seed, 0)
    if "temperature" in methods and model.settings["softmax"] == "adaptive":
        raise UserError(
            "`temperature` divides logits, of which an adaptive softmax has "
            "none for all words together; received softmax='adaptive'. Leave "
            "temperature out."
        )
    if "dropout" in methods and not any(
        value
        for name, value in model.settings.items()
        if name.endswith("_dropout") and name != "locked_dropout"
    ):
        raise UserError(
            "The method 'dropout' needs a model that was trained with "
            "dropout; this one was not. Leave the method out."
        )
