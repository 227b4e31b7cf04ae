"""The numbers of the sources, by hand, and what is made of them."""

import json
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import keras
import numpy as np
import pytest

from multilstm import PRESETS, LanguageModel
from multilstm.errors import UserError
from multilstm.optimizers import make_optimizer
from multilstm.preset_files import find_preset
from multilstm.presets import MEASURED

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED_IN = {
    "small": "small-python-docs.json",
    "zaremba_small": "zaremba-small-ptb-compare.json",
    "zaremba_medium": "zaremba-medium-ptb-h200.json",
    "adam_512": "adam-512-ptb-h200.json",
    "pytorch_650_tied": "pytorch-650-tied-ptb-h200.json",
    "awd_adam": "awd-adam-ptb-h200.json",
}
# From the papers, and from the commands in their code's README.
ZAREMBA = {
    "num_layers": 2,
    "unit_forget_bias": False,
    "carry_state": True,
    "batch_size": 20,
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "loss": "sum_over_time",
}
ZAREMBA_LARGE = ZAREMBA | {
    "units": 1500,
    "embedding_dim": 1500,
    "input_dropout": 0.65,
    "hidden_dropout": 0.65,
    "output_dropout": 0.65,
    "initializer_scale": 0.04,
    "sequence_length": 35,
    "learning_rate_decay": 1 / 1.15,
    "decay_after": 14,
    "clip_norm": 10.0,
    "epochs": 55,
}
AWD = {
    "units": (1150, 1150, 400),
    "num_layers": 3,
    "embedding_dim": 400,
    "input_dropout": 0.4,
    "hidden_dropout": 0.25,
    "output_dropout": 0.4,
    "locked_dropout": True,
    "embedding_dropout": 0.1,
    "weight_dropout": 0.5,
    "activation_regularization": 2.0,
    "temporal_activation_regularization": 1.0,
    "tied_embeddings": True,
    "initializer_scale": 0.1,
    "initializer": "torch",
    "unit_forget_bias": False,
    "carry_state": True,
    "batch_size": 20,
    "sequence_length": 70,
    "length_std": 5.0,
    "half_length_share": 0.05,
    "optimizer": "sgd",
    "learning_rate": 30.0,
    "clip_norm": 0.25,
    "l2": 1.2e-6,
    "epochs": 500,
}
PUBLISHED = {
    "tutorial": {
        "units": 500,
        "num_layers": 2,
        "embedding_dim": 500,
        "output_dropout": 0.5,
        "carry_state": False,
        "batch_size": 20,
        "sequence_length": 30,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "epochs": 50,
    },
    "zaremba_small": ZAREMBA
    | {
        "units": 200,
        "embedding_dim": 200,
        "initializer_scale": 0.1,
        "sequence_length": 20,
        "learning_rate_decay": 0.5,
        "decay_after": 4,
        "clip_norm": 5.0,
        "epochs": 13,
        "published_valid": 120.7,
        "published_test": 114.5,
    },
    "zaremba_medium": ZAREMBA
    | {
        "units": 650,
        "embedding_dim": 650,
        "input_dropout": 0.5,
        "hidden_dropout": 0.5,
        "output_dropout": 0.5,
        "initializer_scale": 0.05,
        "sequence_length": 35,
        "learning_rate_decay": 1 / 1.2,
        "decay_after": 6,
        "clip_norm": 5.0,
        "epochs": 39,
        "published_valid": 86.2,
        "published_test": 82.7,
    },
    "zaremba_large": ZAREMBA_LARGE
    | {"published_valid": 82.2, "published_test": 78.4},
    "press_wolf_large": ZAREMBA_LARGE
    | {
        "tied_embeddings": True,
        "published_valid": 77.7,
        "published_test": 74.3,
    },
    "adam_512": {
        "units": 512,
        "num_layers": 2,
        "embedding_dim": 512,
        "hidden_dropout": 0.5,
        "output_dropout": 0.5,
        "tied_embeddings": True,
        "initializer_scale": 1.0,
        "initializer": "torch_normal",
        "unit_forget_bias": False,
        "carry_state": True,
        "batch_size": 128,
        "sequence_length": 32,
        "optimizer": "adam",
        "learning_rate": 0.01,
        "plateau_factor": 0.25,
        "plateau_patience": 1,
        "plateau_threshold": 1e-3,
        "clip_norm": 2.0,
        "l2": 1e-4,
        "loss": "sum",
        "epochs": 30,
        "published_valid": 76.2,
        "published_test": 73.3,
    },
    "pytorch_650_tied": {
        "units": 650,
        "num_layers": 2,
        "embedding_dim": 650,
        "input_dropout": 0.5,
        "hidden_dropout": 0.5,
        "output_dropout": 0.5,
        "tied_embeddings": True,
        "initializer_scale": 0.1,
        "initializer": "torch",
        "unit_forget_bias": False,
        "carry_state": True,
        "batch_size": 20,
        "sequence_length": 35,
        "optimizer": "sgd",
        "learning_rate": 20.0,
        "plateau_factor": 0.25,
        "clip_norm": 0.25,
        "epochs": 40,
        "published_test": 75.96,
    },
    "awd": AWD
    | {
        "averaging": "triggered",
        "published_valid": 60.7,
        "published_test": 58.8,
    },
    "awd_finetune": AWD
    | {
        "averaging": "always",
        "stops_non_monotone": True,
        "starts_from": "awd",
        "published_valid": 60.0,
        "published_test": 57.3,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_number_of_a_published_preset_is_its_sources(name):
    """Whatever is not named there is as it is where nothing is said."""
    found = {
        field.name: getattr(PRESETS[name], field.name)
        for field in fields(PRESETS[name])
        if field.default is MISSING
        or getattr(PRESETS[name], field.name) != field.default
    }
    del found["name"], found["source"]
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_said_to_be_measured_is_in_the_results(name):
    record = json.loads((RESULTS / MEASURED_IN[name]).read_text())
    results = record.get("results") or {"": record.get("result", record)}
    found = {
        result["backend"]: (
            result["preset"],
            round(result["valid_perplexity"], 2),
            round(result["test_perplexity"], 2),
            round(sum(row["seconds"] for row in result["history"]) / 60, 1),
        )
        for result in results.values()
    }
    assert found == {
        figures.backend: (name, figures.valid, figures.test, figures.minutes)
        for figures in MEASURED[name]
    }


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # Rate 1 for a loss summed over 20 steps, halved from epoch 4 on.
        ("zaremba_small", {0: 20, 3: 20, 4: 10, 5: 5, 12: 20 / 512}),
        # Divided by 1.2 from epoch 6 on, over 35 steps.
        ("zaremba_medium", {0: 35, 5: 35, 6: 29.166667, 7: 24.305556}),
        # Divided by 1.15 from epoch 14 on: 35 / 1.15 = 30.434783.
        ("zaremba_large", {0: 35, 13: 35, 14: 30.434783, 15: 26.465028}),
        ("tutorial", {0: 0.001, 49: 0.001}),
        # Adam's step does not depend on how the loss is summed.
        ("adam_512", {0: 0.01, 29: 0.01}),
        ("awd", {0: 30, 499: 30}),
        ("best", {0: 30, 499: 30}),
        # A warm-up of 3 epochs, times 0.9 from epoch 16 on.
        ("awd_adam", {0: 0.001, 2: 0.003, 3: 0.004, 15: 0.004, 16: 0.0036}),
    ],
)
def test_learning_rate_of_each_epoch(name, rates):
    preset = PRESETS[name]
    got = [preset.learning_rate_of(epoch) for epoch in rates]
    # Written to 8 digits.
    np.testing.assert_allclose(got, list(rates.values()), rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("zaremba_small", 5 / 20),
        ("zaremba_medium", 5 / 35),
        ("zaremba_large", 10 / 35),
        ("small", 1.0),
        ("tutorial", None),
        ("adam_512", 2 / (128 * 32)),
        ("awd", 0.25),
    ],
)
def test_norm_is_scaled_only_for_losses_that_are_summed(name, norm):
    assert PRESETS[name].clip_norm_of_mean() == norm


@pytest.mark.parametrize("size", [0.01, 100.0], ids="size={}".format)
@pytest.mark.parametrize("name", ["zaremba_small", "zaremba_large"])
def test_optimizer_steps_as_the_source_does_on_its_summed_loss(name, size, rng):
    preset = PRESETS[name]
    summed = [size * rng.standard_normal(shape) for shape in ((3, 2), (4,))]
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in summed))
    clip = min(1.0, preset.clip_norm / norm)
    variables = [keras.Variable(np.zeros_like(g)) for g in summed]
    optimizer = make_optimizer(preset)
    optimizer.build(variables)
    of_mean = [g.astype(np.float32) / preset.sequence_length for g in summed]
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in of_mean])
    for variable, gradient in zip(variables, summed, strict=True):
        step = keras.ops.convert_to_numpy(variable)
        # float32; the source's rate is 1.
        np.testing.assert_allclose(step, -clip * gradient, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-8, 100.0], ids="size={}".format)
def test_adam_steps_as_on_the_summed_loss_its_epsilon_too(size, rng):
    """As Keras's own on the sum. From weights of zero, without L2's part."""
    preset = PRESETS["adam_512"]
    summed = size * rng.standard_normal((3, 2)).astype(np.float32)
    steps = []
    for optimizer, scale in (
        (make_optimizer(preset), preset.batch_size * preset.sequence_length),
        (
            keras.optimizers.Adam(
                preset.learning_rate,
                global_clipnorm=preset.clip_norm,
                epsilon=1e-8,
            ),
            1,
        ),
    ):
        variable = keras.Variable(np.zeros_like(summed))
        optimizer.build([variable])
        optimizer.apply([keras.ops.convert_to_tensor(summed / scale)])
        steps.append(keras.ops.convert_to_numpy(variable))
    # float32, whose squares of 1e-12 are still numbers.
    np.testing.assert_allclose(*steps, rtol=1e-4)
    assert np.abs(steps[0]).max() > preset.learning_rate / 50


def test_tutorial_is_the_tutorials_stack(rng):
    assert PRESETS["tutorial"].architecture() == {
        "units": 500,
        "num_layers": 2,
        "embedding_dim": 500,
        "input_dropout": 0.0,
        "hidden_dropout": 0.0,
        "output_dropout": 0.5,
        "locked_dropout": False,
        "embedding_dropout": 0.0,
        "weight_dropout": 0.0,
        "activation_regularization": 0.0,
        "temporal_activation_regularization": 0.0,
        "tied_embeddings": False,
        "initializer_scale": None,
        "initializer": "uniform",
        "unit_forget_bias": True,
        "carry_state": False,
    }
    model = LanguageModel.from_preset(
        "tutorial", vocabulary_size=30, units=6, embedding_dim=6
    )
    ids = rng.integers(30, size=(3, 4))
    logits = keras.ops.convert_to_numpy(model(ids))
    stack = keras.Sequential(
        [
            keras.layers.Embedding(30, 6),
            keras.layers.LSTM(6, return_sequences=True),
            keras.layers.LSTM(6, return_sequences=True),
            keras.layers.Dropout(0.5),
            keras.layers.TimeDistributed(keras.layers.Dense(30)),
        ]
    )
    stack.build(ids.shape)
    stack.set_weights(model.get_weights())
    truth = keras.ops.convert_to_numpy(stack(ids))
    # float32 sums in another order.
    np.testing.assert_allclose(logits, truth, rtol=1e-5, atol=1e-6)


def test_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"zaremba_small.*received 'samll'"):
        find_preset("samll")


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_says_where_its_numbers_come_from(name):
    assert re.search(r"\d{4}[,:]|^ours|PyTorch's example", PRESETS[name].source)


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", "adamw"), ("loss", "total"), ("averaging", None)],
)
def test_words_of_a_preset_are_those_there_are(name, value):
    with pytest.raises(UserError, match=rf"`{name}` .* received {value!r}"):
        replace(PRESETS["awd"], **{name: value})


def test_accumulated_batches_are_one_sum():
    whole = PRESETS["adam_512"]
    parts = replace(whole, batch_size=32, gradient_accumulation_steps=4)
    assert parts.clip_norm_of_mean() == whole.clip_norm_of_mean()
    assert parts.l2_of_mean() == whole.l2_of_mean()


def plateaus(preset, cross_entropies):
    return [
        preset.learning_rate_of(len(before), np.exp(before))
        for before in (
            cross_entropies[:n] for n in range(len(cross_entropies) + 1)
        )
    ]


def test_rate_falls_where_the_validation_does_not():
    preset = replace(
        PRESETS["adam_512"], plateau_patience=1, plateau_threshold=0.01
    )
    # Of 5 a hundredth is 0.05: 4.97 is no better, nor is the one after it.
    rates = plateaus(preset, [5.0, 4.97, 4.96, 4.9, 5.0, 5.0, 5.0, 5.0])
    falls = [0, 0, 0, 1, 1, 1, 2, 2, 3]
    np.testing.assert_allclose(rates, 0.01 * 0.25 ** np.array(falls))


def test_rate_falls_at_once_without_patience():
    # PyTorch's example: any epoch that is not better.
    rates = plateaus(PRESETS["pytorch_650_tied"], [5.0, 4.9, 4.9, 4.8, 5.0])
    np.testing.assert_allclose(rates, [20, 20, 20, 5, 5, 1.25])


@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="PyTorch has the schedule"
)
def test_plateaus_are_those_of_pytorchs_schedule(rng):
    import torch

    losses = 5 - np.cumsum(rng.normal(0.002, 0.01, 60))
    for patience, threshold in ((0, 0.0), (1, 1e-3), (3, 1e-2)):
        preset = replace(
            PRESETS["adam_512"],
            plateau_patience=patience,
            plateau_threshold=threshold,
        )
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=0.25,
            patience=patience,
            threshold=threshold,
            eps=0,
        )
        truth = [0.01]
        for loss in losses:
            schedule.step(loss)
            truth.append(optimizer.param_groups[0]["lr"])
        np.testing.assert_allclose(plateaus(preset, losses), truth)


def test_rate_grows_in_the_warm_up():
    preset = replace(PRESETS["tutorial"], warmup_epochs=3, learning_rate=8.0)
    rates = [preset.learning_rate_of(epoch) for epoch in range(5)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0]


@pytest.mark.parametrize(
    "name", ["adam_512", "awd", "awd_adam", "best", "pytorch_650_tied"]
)
def test_preset_trains_a_step(name, rng):
    """Made small, which changes neither its dropouts nor its optimizer."""
    preset = PRESETS[name]
    units = 4 if isinstance(preset.units, int) else (6, 5, 4)
    small = replace(preset, units=units, embedding_dim=4)
    model = LanguageModel(9, **small.architecture(), preset=name)
    model.build((2, 3))
    assert model.count_params() == small.num_parameters(9)
    model.compile()
    before = model.get_weights()
    ids = rng.integers(9, size=(2, 3)).astype(np.int32)
    model.fit(ids, ids, batch_size=2, verbose=0)
    pairs = zip(before, model.get_weights(), strict=True)
    assert all((old != new).any() for old, new in pairs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("units", [3, (5, 4)])
def test_parameters_are_counted_as_they_are_built(units, tied):
    preset = replace(
        PRESETS["small"], units=units, embedding_dim=4, tied_embeddings=tied
    )
    model = LanguageModel(9, **preset.architecture())
    model.build((10, 1))
    assert model.count_params() == preset.num_parameters(9)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("zaremba_small", 4_651_600),
        ("zaremba_medium", 19_775_200),
        ("zaremba_large", 66_022_000),
        ("press_wolf_large", 51_022_000),
        ("adam_512", 9_328_400),
        ("awd", 24_210_800),
    ],
)
def test_size_is_that_of_the_published_model(name, parameters):
    """By hand: embeddings, 4 gates a layer, logits' weights and biases.

    PyTorch's models have a second bias for each gate: AWD's 24,221,600
    parameters are 4 (1150 + 1150 + 400) more.
    """
    assert PRESETS[name].num_parameters(10_000) == parameters
