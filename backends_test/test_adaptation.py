"""What the methods gain, and that only valid tells them how."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
from tiny_runs import float32_products

from multilstm import Corpus, LanguageModel, Vocabulary, adapt, evaluate, ops
from multilstm import adaptation as module
from multilstm.adaptation import DropoutAverage, Temperature
from multilstm.errors import UserError
from multilstm.evaluation import Evaluator
from multilstm.neural_cache import mix

V = 7
FEW = {"learning_rate": (0.1, 0.3), "decay": (0.01,), "epsilon": (0.1,)}


@pytest.fixture
def corpus(rng):
    """Texts about two words, which the model does not know."""
    texts = [
        np.where(
            rng.random(size) < 0.8,
            rng.integers(2, size=size),
            rng.integers(V, size=size),
        ).astype(np.int32)
        for size in (120, 90, 70)
    ]
    return Corpus("letters", Vocabulary(list("abcdefg")), *texts, sha256={})


@pytest.fixture
def few(monkeypatch):
    """Grids that take no time."""
    monkeypatch.setattr(module, "RMS", FEW)
    monkeypatch.setattr(module, "WINDOWS", (5, 20))


def make_model(**arguments):
    """Weights large enough for the state to matter."""
    model = LanguageModel(V, units=3, initializer_scale=0.9, **arguments)
    model.build((2, 5))
    return model


def read(model, token_ids, evaluator=None):
    evaluator = evaluator or Evaluator(model, 2, 8, with_features=True)
    return module._Text(token_ids, evaluator)


def test_temperature_is_measured_in_float32(products, monkeypatch):
    text = SimpleNamespace(
        features=np.zeros((1, 3), np.float32), token_ids=np.zeros(2, np.int32)
    )
    temperature = Temperature(make_model())
    monkeypatch.setattr(temperature._chunk, "predict_on_batch", products.stop)
    with ops.tf32(True), pytest.raises(KeyboardInterrupt):
        temperature.nats(text, 1.0)
    with ops.tf32(False):
        assert products.seen == [float32_products()]


@pytest.mark.parametrize("tied", [False, True], ids="tied={}".format)
def test_temperature_divides_the_logits(tied, corpus, monkeypatch):
    monkeypatch.setattr(module, "_WORDS_AT_ONCE", 32)
    model = make_model(tied_embeddings=tied)
    ids = corpus.valid
    logits = oracles.language_model(model.get_weights(), ids[None, :-1])[0]
    temperature = Temperature(model)
    text = read(model, ids)
    for divisor in (1.0, 0.7):
        log_p = oracles.log_softmax(logits / divisor)
        # float32 logits.
        np.testing.assert_allclose(
            temperature.nats(text, divisor),
            -log_p[np.arange(len(ids) - 1), ids[1:]],
            rtol=1e-5,
        )


def test_temperature_of_a_model_in_bfloat16(corpus):
    model = make_model(dtype="mixed_bfloat16")
    text = read(model, corpus.valid)
    nats = Temperature(model).nats(text, 1.0)
    expected = evaluate(model, corpus.valid).cross_entropy
    # The same products, of other sizes, of numbers with 8 bits.
    np.testing.assert_allclose(nats.mean(), expected, rtol=1e-3)


def test_dropout_average_without_dropout_is_plain_evaluation(corpus):
    model = make_model()
    text = read(model, corpus.valid)
    average = DropoutAverage(model, Evaluator(model, 2, 8), 2, seed=0)
    # float32 logits.
    np.testing.assert_allclose(
        average.measure(text, 2).cross_entropy,
        evaluate(model, corpus.valid).cross_entropy,
        rtol=1e-6,
    )


def test_dropout_average_is_that_of_probabilities_under_masks_of_a_seed(
    corpus,
):
    model = make_model(output_dropout=0.5)
    text = read(model, corpus.valid)

    def average(seed, num_samples):
        method = DropoutAverage(
            model, Evaluator(model, 2, 8), num_samples, seed=seed
        )
        return method.measure(text, num_samples).cross_entropy

    several = average(1, 8)
    assert average(1, 8) == several
    assert average(2, 8) != several
    copy = model.copy(seed=1, carry_state=False)
    evaluator = Evaluator(copy, 2, 8, training=True)
    nats = np.array(
        [
            evaluator.read(corpus.valid, text.reading.starts).nats
            for _ in range(8)
        ],
        np.float64,
    )
    of_words = -np.log(np.exp(-nats).mean(axis=0))
    assert several == pytest.approx(of_words.mean(), rel=1e-6)  # float32
    # Masks differ, and the mean of logarithms is below that of the mean.
    assert several < nats.mean() - 1e-3


def test_each_method_gains_and_says_how(corpus, few):
    model = make_model(hidden_dropout=0.3)
    # That of SGD is in the test of the command.
    methods = [name for name in module.METHODS if name != "dynamic-sgd"]
    lines = []
    got = adapt(
        model,
        corpus,
        methods=methods,
        tune_tokens=40,
        num_samples=2,
        tell=lines.append,
    )
    for split in ("valid", "test"):
        plain = evaluate(model, corpus.split(split))
        # Another compilation of the same model.
        np.testing.assert_allclose(
            got["plain"][f"{split}_perplexity"], plain.perplexity, rtol=1e-6
        )
    assert list(got["methods"]) == [
        *methods[:2],
        "temperature+cache",
        *methods[2:],
    ]
    for name, record in got["methods"].items():
        assert any(line.startswith(f"{name}: ") for line in lines)
        assert record["valid_num_words"] == len(corpus.valid) - 1
        assert record["test_num_words"] == len(corpus.test) - 1
        assert record["protocol"]["state"]
        if name == "dropout":
            assert record["protocol"]["tuned"] is None
            continue
        tuned = record["protocol"]["tuned"]
        assert tuned["text"] == "valid"
        words = 39 if name.startswith("dynamic") else len(corpus.valid) - 1
        assert tuned["num_words"] == words
        best = min(tuned["tried"], key=lambda tried: tried["cross_entropy"])
        assert (
            best.items()
            <= (
                record["settings"] | {"cross_entropy": best["cross_entropy"]}
            ).items()
        )
        for split in ("valid", "test"):
            assert (
                record[f"{split}_perplexity"]
                < got["plain"][f"{split}_perplexity"]
            )


def test_each_method_is_kept_when_it_is_done(corpus, few):
    kept = []
    adapt(
        make_model(),
        corpus,
        keep=lambda record: kept.append([*record["methods"]]),
    )
    names = ["temperature", "cache", "temperature+cache"]
    assert kept == [names[:1], names[:2], names]


def test_cache_goes_with_the_temperature_that_was_found(corpus, few):
    model = make_model()
    got = adapt(model, corpus)["methods"]
    record = got["temperature+cache"]
    settings = record["settings"]
    assert (
        settings["temperature"]
        == (got["temperature"]["settings"]["temperature"])
    )
    text = read(model, corpus.test)
    nats = mix(
        Temperature(model).nats(text, settings["temperature"]),
        text.cached(settings["window"], settings["theta"]),
        settings["share"],
    )
    # float32 logits.
    np.testing.assert_allclose(
        nats.mean(), record["test_cross_entropy"], rtol=1e-6
    )


def test_nothing_is_tuned_on_test(corpus, few):
    model = make_model()
    first, second = (
        adapt(model, texts, methods=["temperature", "cache"])["methods"]
        for texts in (corpus, replace(corpus, test=corpus.test[::-1].copy()))
    )
    for name in first:
        assert first[name]["settings"] == second[name]["settings"]
        assert first[name]["protocol"] == second[name]["protocol"]
        for split, is_same in (("valid", True), ("test", False)):
            figure = f"{split}_cross_entropy"
            assert (first[name][figure] == second[name][figure]) == is_same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["cash"]}, "must be some of temperature, .*'cash'"),
        ({"methods": []}, "must be some of temperature, .*received none"),
        ({"methods": ["dropout"]}, "'dropout' needs a model that was trained"),
        (
            {"tune_tokens": 1},
            "`tune_tokens` must be a whole .*2 or more.* 1",
        ),
        ({"num_samples": 2.5}, "`num_samples` must be a whole number"),
        (
            {"num_samples": 0},
            "`num_samples` must be a whole .*1 or more.* 0",
        ),
        ({"seed": -1}, "`seed` must be a whole .*0 or more.* -1"),
        (
            {"batch_size": 0},
            "`batch_size` must be a whole .*1 or more.* 0",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused(arguments, message, corpus):
    with pytest.raises(UserError, match=message):
        adapt(make_model(), corpus, **arguments)


def test_logits_of_an_adaptive_softmax_have_no_temperature(corpus):
    with pytest.raises(UserError, match="softmax='adaptive'"):
        adapt(make_model(softmax="adaptive"), corpus)
