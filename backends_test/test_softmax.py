"""Adaptive and sampled softmax: against NumPy, PyTorch and the exact one."""

import json
import math
from dataclasses import replace

import keras
import numpy as np
import oracles
import pytest

from multilstm import (
    PRESETS,
    ContinuousStreams,
    LanguageModel,
    NextWordWindows,
    evaluate,
    generate,
    load_corpus,
    load_run,
    train,
)
from multilstm.adaptive_softmax import default_cutoffs
from multilstm.errors import UserError
from multilstm.projection import draw_words, log_expected_count

BACKEND = keras.config.backend()
V = 40
CUTOFFS = [5, 15]
# float32 against float64, through two layers.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}

KINDS = {
    "exact": {},
    "adaptive": {"softmax": "adaptive", "cutoffs": CUTOFFS},
    "sampled": {"softmax": "sampled", "num_sampled": 15},
}
each_softmax = pytest.mark.parametrize("kind", KINDS)
new_softmax = pytest.mark.parametrize("kind", ["adaptive", "sampled"])


def small_model(kind, **arguments):
    """Weights large enough that words and states matter."""
    settings = {"units": 16, "initializer_scale": 0.5}
    return LanguageModel(V, **settings | KINDS[kind] | arguments)


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def draw_ids(rng, low=0, high=V, shape=(4, 6)):
    return rng.integers(low, high, size=shape).astype(np.int32)


def changes(model, inputs, targets, **arguments):
    """Negative gradients of the mean loss, by one step of SGD."""
    if not model.built:
        model.build(inputs.shape)
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(1.0), **arguments)
    model.train_on_batch(inputs, targets)
    pairs = zip(before, model.get_weights(), strict=True)
    return [after - start for start, after in pairs]


# Adaptive


def test_log_probabilities_are_numpys_and_sum_to_1(rng):
    model = small_model("adaptive")
    ids = draw_ids(rng)
    got = numpy(model(ids)).reshape(-1, V)
    features, _ = model.read(ids)
    features = numpy(features).reshape(-1, 16).astype(float)
    head_kernel, head_bias, *tails = map(float64, model.get_weights()[7:])
    truth = oracles.adaptive_log_softmax(
        features, head_kernel, head_bias, tails
    )
    np.testing.assert_allclose(got, truth, **CLOSE)
    # float32 sums of 40 numbers.
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-5)
    assert [w.shape for w in tails] == [(16, 4), (4, 10), (16, 1), (1, 25)]


def float64(array):
    return array.astype(np.float64)


@pytest.mark.skipif(BACKEND != "torch", reason="the truth is PyTorch's")
def test_numpys_adaptive_softmax_is_pytorchs(rng):
    import torch

    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(
        16, V, CUTOFFS, div_value=4, head_bias=True, dtype=torch.float64
    )
    features = torch.as_tensor(rng.standard_normal((9, 16)))
    weights = [w.detach().numpy().T for w in theirs.parameters()]
    head_kernel, head_bias, *tails = weights
    np.testing.assert_allclose(
        oracles.adaptive_log_softmax(
            features.numpy(), head_kernel, head_bias, tails
        ),
        theirs.log_prob(features).detach().numpy(),
        rtol=1e-12,  # float64
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0, V), (0, 5), (5, 15), (15, V)], ids=str
)
def test_tails_are_exact_whichever_targets_a_batch_has(low, high, rng):
    """Loss, and gradients against those through all log-probabilities."""
    inputs, targets = draw_ids(rng), draw_ids(rng, low, high)
    own, all_words = small_model("adaptive"), small_model("adaptive")
    log_p = numpy(own(inputs))
    nll = own.projection.negative_log_likelihood(
        own.read(inputs)[0], keras.ops.convert_to_tensor(targets)
    )
    truth = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(numpy(nll), truth, **CLOSE)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for got, expected in zip(
        changes(own, inputs, targets),
        changes(all_words, inputs, targets, loss=loss),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, **CLOSE)


@new_softmax
def test_padding_counts_nothing_whatever_its_target(kind, rng):
    inputs, targets = draw_ids(rng), draw_ids(rng)
    weights = (rng.random(targets.shape) < 0.5).astype(np.float32)
    results = []
    for padding in (-100, 3):
        model = small_model(kind, num_layers=1)
        model.build(inputs.shape)
        features, _ = model.read(inputs)
        padded = np.where(weights == 0, padding, targets).astype(np.int32)
        nll = model.projection.negative_log_likelihood(
            features,
            *map(keras.ops.convert_to_tensor, (padded, weights)),
            training=True,
        )
        results.append(numpy(nll))
    assert np.isfinite(results[0]).all()
    np.testing.assert_allclose(*results, **CLOSE)
    np.testing.assert_array_equal(results[0] == 0, weights == 0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is chosen there")
def test_tails_are_not_given_to_xla_which_cannot_compile_them(rng):
    model = small_model("adaptive")
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile(jit_compile=True)
    assert model.jit_compile is False


@pytest.mark.parametrize(
    ("size", "cutoffs"),
    [(250_000, [12_500, 62_500]), (40, [2, 10]), (4, [1, 2]), (3, [1, 2])],
)
def test_default_cutoffs_leave_words_in_every_cluster(size, cutoffs):
    assert default_cutoffs(size) == cutoffs
    model = LanguageModel(size, units=1, num_layers=1, softmax="adaptive")
    assert model.settings["cutoffs"] == cutoffs
    assert min(model.projection.tail_sizes) > 0


# Sampled


def fixed_sample(model, sampled):
    """Lets a model draw these words."""
    projection = model.projection
    words = keras.ops.convert_to_tensor(sampled)
    estimate = projection._estimate
    projection._estimate = lambda features, targets, _: estimate(
        features, targets, words
    )


@pytest.mark.parametrize("tied", [False, True], ids="tied={}".format)
def test_loss_of_a_known_sample_is_numpys(tied, rng):
    inputs, targets = draw_ids(rng), draw_ids(rng, high=6)
    sampled = draw_ids(rng, high=12, shape=15)  # with repetitions
    assert np.isin(targets, sampled).any()
    model = small_model("sampled", tied_embeddings=tied)
    fixed_sample(model, sampled)
    model.compile(keras.optimizers.SGD(0.0))
    loss, perplexity = model.train_on_batch(inputs, targets)
    truth = oracles.sampled_cross_entropy(
        float64(numpy(model(inputs))).reshape(-1, V), targets.ravel(), sampled
    )
    np.testing.assert_allclose(loss, truth.mean(), **CLOSE)
    np.testing.assert_allclose(math.log(perplexity), truth.mean(), **CLOSE)


def test_target_is_no_word_against_itself(rng):
    inputs = draw_ids(rng)
    targets = np.full_like(inputs, 7)
    model = small_model("sampled")
    fixed_sample(model, np.full(15, 7, np.int32))
    for change in changes(model, inputs, targets):
        # 0 but for the rounding of a logarithm.
        np.testing.assert_allclose(change, 0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids="tied={}".format)
def test_gradient_of_a_large_sample_is_the_exact_one(tied, rng):
    inputs, targets = draw_ids(rng), draw_ids(rng)
    exact, many, few = (
        changes(
            small_model(kind, tied_embeddings=tied, **arguments),
            inputs,
            targets,
        )
        for kind, arguments in (
            ("exact", {}),
            ("sampled", {"num_sampled": 20_000}),
            ("sampled", {"num_sampled": 10}),
        )
    )
    if not tied:
        many[-2], few[-2] = many[-2].T, few[-2].T
    # Each word comes as often as expected, give or take one or two; the
    # rarest are expected 130 times. A gradient is a sum of such terms, in
    # which larger ones may cancel.
    for got, truth in zip(many, exact, strict=True):
        atol = 0.02 * np.abs(truth).max()
        np.testing.assert_allclose(got, truth, rtol=0.02, atol=atol)
    atol = 0.02 * np.abs(exact[-1]).max()
    assert not np.allclose(few[-1], exact[-1], rtol=0.02, atol=atol)


@pytest.mark.parametrize(
    ("vocabulary_size", "num_sampled"), [(250_000, 8192), (1000, 7), (40, 1)]
)
def test_words_come_as_often_as_the_formula_says(vocabulary_size, num_sampled):
    seed = keras.random.SeedGenerator(3)
    draws = np.concatenate(
        [
            numpy(draw_words(num_sampled, vocabulary_size, seed))
            for _ in range(200)
        ]
    )
    assert draws.dtype == np.int32
    assert draws.min() >= 0
    assert draws.max() < vocabulary_size
    ends = np.unique(np.geomspace(1, vocabulary_size, 30).astype(int))
    counts = np.histogram(draws, [0, *ends])[0]
    shares = np.diff(np.log([1, *ends + 1])) / math.log(vocabulary_size + 1)
    expected = len(draws) * shares
    # Chi-square of independent draws: its mean, and 4 standard deviations.
    limit = len(ends) + 4 * math.sqrt(2 * len(ends))
    assert np.sum((counts - expected) ** 2 / expected) < limit
    # The words of the last part, which a number in 0..1 hardly tells apart.
    last = draws[draws > vocabulary_size * 0.9]
    odd = np.count_nonzero(last % 2)
    assert abs(odd - len(last) / 2) <= 4 * math.sqrt(len(last) / 4)


def test_frequent_words_come_no_more_often_than_expected():
    """Up to one at either end; independent draws would vary by ten."""
    seed = keras.random.SeedGenerator(3)
    counts = [
        np.count_nonzero(numpy(draw_words(1000, 1000, seed)) == 0)
        for _ in range(20)
    ]
    expected = 1000 * math.log(2) / math.log(1001)
    assert np.abs(np.array(counts) - expected).max() < 1
    got = float(log_expected_count(np.array([0]), 1000, 1000)[0])
    # float32.
    np.testing.assert_allclose(got, math.log(expected), rtol=1e-6)


def test_each_step_draws_anew_and_a_seed_repeats_it(rng):
    data = NextWordWindows(draw_ids(rng, shape=78), 5, 2)

    def losses(seed):
        # Weights of 0 and a rate of 0: steps differ by what is drawn alone.
        model = small_model("sampled", seed=seed, initializer_scale=1e-9)
        model.compile(keras.optimizers.SGD(0.0))
        history = model.fit(data, epochs=4, shuffle=False, verbose=0).history
        return history["loss"]

    first = losses(1)
    assert len(set(first)) == 4
    # The same sums of the same numbers.
    np.testing.assert_allclose(losses(1), first, rtol=1e-6)
    assert losses(2)[0] != first[0]


# All


@each_softmax
def test_evaluation_is_exact(kind, rng):
    token_ids = draw_ids(rng, shape=2 * 12 + 1)
    streams = ContinuousStreams(token_ids, 3, 2, drop_remainder=True)
    model = small_model(kind, carry_state=True)
    model.compile(keras.optimizers.SGD(0.0))
    history = model.fit(streams, validation_data=streams, verbose=0).history
    logits = numpy(
        model(
            token_ids[:-1].reshape(2, 12),
            initial_state=model.get_initial_state(2),
        )
    )
    expected = oracles.perplexity(float64(logits), token_ids[1:])
    evaluated = model.evaluate(streams, verbose=0, return_dict=True)
    got = [evaluated["perplexity"], *history["val_perplexity"]]
    # float32 sums over batches.
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    is_exact = np.isclose(history["perplexity"][0], expected, rtol=1e-5)
    assert is_exact == (kind != "sampled")


def test_sampled_model_begins_as_the_exact_one(rng):
    ids = draw_ids(rng)
    exact, sampled = (small_model(kind)(ids) for kind in ("exact", "sampled"))
    # Products of the same numbers, in another order.
    np.testing.assert_allclose(numpy(sampled), numpy(exact), **CLOSE)


@pytest.mark.skipif(
    BACKEND != "torch", reason="the others lay arrays out themselves"
)
def test_rows_of_the_sampled_words_are_in_one_piece():
    """Else each step would transpose the gradient of all words."""
    model = small_model("sampled")
    model.build((4, 6))
    assert model.projection.kernel.value.is_contiguous()


def test_matrices_of_the_adaptive_softmax_are_draws_of_their_own():
    model = small_model("adaptive")
    model.build((1, 1))
    drawn = np.concatenate([w.ravel() for w in model.get_weights()])
    assert len(np.unique(drawn)) == len(drawn)


@each_softmax
def test_saved_model_gives_the_same_logits(kind, rng, tmp_path):
    ids = draw_ids(rng)
    model = small_model(kind)
    model.compile()
    model.train_on_batch(ids, ids)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    np.testing.assert_allclose(numpy(loaded(ids)), numpy(model(ids)), **CLOSE)


@new_softmax
def test_mixed_precision_learns(kind, rng):
    data = NextWordWindows(np.tile(draw_ids(rng, shape=7), 12), 5, 2)
    model = small_model(kind, dtype="mixed_bfloat16")
    model.compile(keras.optimizers.Adam(0.03))
    model.fit(data, epochs=8, verbose=0)
    assert model.evaluate(data, verbose=0)[0] < math.log(V) / 2


@pytest.fixture
def untied(tiny, monkeypatch):
    """The smallest preset, with a projection of its own."""
    preset = replace(PRESETS[tiny], name="untied", tied_embeddings=False)
    monkeypatch.setitem(PRESETS, "untied", preset)
    return "untied"


@new_softmax
def test_run_is_trained_gone_on_with_evaluated_and_read(
    kind, untied, corpus_folder, tmp_path
):
    """The letters' corpus; nine words, of which the tails have two each."""
    softmax = {
        "adaptive": {"softmax": "adaptive", "cutoffs": (5, 7)},
        "sampled": {"softmax": "sampled", "num_sampled": 6},
    }[kind]
    common = {"corpus": corpus_folder, "progress": False, "preset": untied}
    common |= softmax
    train(out=tmp_path / "run", epochs=1, **common)
    result = train(
        out=tmp_path / "run",
        epochs=2,
        resume=True,
        corpus=corpus_folder,
        progress=False,
    )
    assert result["epochs"] == 2
    if kind == "sampled":  # going on draws what would have been drawn
        whole = train(out=tmp_path / "whole", epochs=2, **common)
        for name in ("valid_perplexity", "test_perplexity"):
            # The same run on the same machine; threads may sum otherwise.
            np.testing.assert_allclose(result[name], whole[name], rtol=1e-5)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["softmax"] == kind
    model, vocabulary, _ = load_run(tmp_path / "run")
    text = load_corpus(corpus_folder).test
    got = evaluate(model, text).perplexity
    np.testing.assert_allclose(got, result["test_perplexity"], rtol=1e-5)
    words = generate(model, vocabulary, "a b", max_new_tokens=3, seed=1).words
    assert len(words) == 3
    with pytest.raises(UserError, match="was started with softmax="):
        train(out=tmp_path / "run", resume=True, softmax="exact")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softmax": "full"}, "exact, adaptive, sampled; received 'full'"),
        ({"cutoffs": [5]}, "`cutoffs` needs softmax='adaptive'; received"),
        ({"num_sampled": 5}, "`num_sampled` needs softmax='sampled'"),
        ({"softmax": "sampled", "num_sampled": 0}, "1 or more; received 0"),
        ({"softmax": "sampled", "num_sampled": 2.5}, "whole.*received 2.5"),
        (KINDS["adaptive"] | {"tied_embeddings": True}, "Untie them"),
        *(
            ({"softmax": "adaptive", "cutoffs": cutoffs}, "40 words.*received")
            for cutoffs in ([], [0, 5], [5, 5], [15, 5], [5, V], [2.5])
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        LanguageModel(V, units=4, **arguments)


def test_two_words_have_no_adaptive_softmax():
    with pytest.raises(UserError, match=r"three words or more.*received 2"):
        LanguageModel(2, units=4, softmax="adaptive")


@new_softmax
def test_metrics_that_need_all_words_are_refused(kind):
    with pytest.raises(UserError, match="logits of all words"):
        small_model(kind).compile(metrics=["accuracy"])
