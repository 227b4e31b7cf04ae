"""Steps as CUDA graphs: all of it but the graph, which a stand-in replaces.

A graph is a step that reads its batch where the batch was when it was
recorded, and that Python does not run again. The stand-in runs Python's step
on that place. On an H100 (PyTorch 2.11) replays gave the same weights as steps
one by one, bit for bit, after 516 steps of `zaremba_medium` and 260 of `awd`.
"""

import logging

import keras
import numpy as np
import pytest

from multilstm import ContinuousStreams, LanguageModel
from multilstm.ops import evidence

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="of PyTorch's implementation"
)

V, ROWS, STEPS = 11, 3, 5
SIZES = {
    "zaremba_medium": {"units": 6, "embedding_dim": 6},
    "adam_512": {"units": 6, "embedding_dim": 6},
    "awd": {"units": (6, 6, 4), "embedding_dim": 4},
    "best": {"units": (6, 6, 4), "embedding_dim": 4},
}


def make_model(name="zaremba_medium", **arguments):
    settings = SIZES[name] | {"initializer_scale": 0.5} | arguments
    model = LanguageModel.from_preset(name, vocabulary_size=V, **settings)
    model.compile()
    model.build((ROWS, STEPS))
    model.optimizer.build(model.trainable_variables)
    return model


def batches_of(rng, steps=STEPS, number=6):
    import torch

    return [
        tuple(torch.tensor(rng.integers(V, size=(2, ROWS, steps))).int())
        for _ in range(number)
    ]


def weights(model):
    return [keras.ops.convert_to_numpy(v) for v in model.variables]


def assert_same(left, right):
    for a, b in zip(weights(left), weights(right), strict=True):
        np.testing.assert_array_equal(a, b)


class StandIn:
    """For a CUDA graph: its step, run by Python."""

    def __init__(self, step):
        self.replay = step


@pytest.fixture
def steps_of(monkeypatch):
    """Makes `RecordedSteps` of a model, and counts what they record."""
    from multilstm.ops import graphs_torch

    def capture(steps, step):
        steps.num_recorded += 1
        return StandIn(step)

    monkeypatch.setattr(graphs_torch.RecordedSteps, "num_recorded", 0, False)
    monkeypatch.setattr(graphs_torch.RecordedSteps, "_capture", capture)
    return graphs_torch.RecordedSteps


@pytest.mark.parametrize("name", SIZES)
def test_steps_bring_nothing_from_the_host_and_read_nothing(rng, name):
    """Neither can be recorded: a graph would fail or do the same for ever."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from multilstm.ops import graphs_torch

    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            called.append(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    steps = graphs_torch.RecordedSteps(make_model(name))
    first, second, *_ = batches_of(rng)
    steps([first])
    with Watch(), graphs_torch.Constants():
        steps._train(second)
    assert {"bernoulli_", "embedding"} <= set(called)
    # A number that is read; a tensor made of Python's numbers.
    assert not {"_local_scalar_dense", "lift_fresh"} & set(called)
    called.clear()
    with Watch():
        steps._train(second)
        int(torch.ones(()))
    assert {"_local_scalar_dense", "lift_fresh"} <= set(called)


@pytest.mark.parametrize("name", SIZES)
def test_without_dropout_they_are_keras_own_steps(rng, steps_of, name):
    no_dropout = {
        f"{kind}_dropout": 0.0
        for kind in ("input", "hidden", "output", "embedding", "weight")
    }
    model, other = (
        make_model(name, **no_dropout),
        make_model(name, **no_dropout),
    )
    batches = batches_of(rng)
    steps = steps_of(model)
    steps(batches[:4])
    logs = steps(batches[4:])
    expected = [other.train_step(batch) for batch in batches][-1]
    assert_same(model, other)
    assert {k: float(v) for k, v in logs.items()} == {
        k: float(v) for k, v in expected.items()
    }
    assert steps.num_recorded == 1


def test_layers_know_where_a_step_is_recorded(rng, steps_of, monkeypatch):
    from multilstm.ops.torch import is_recorded

    model, told = make_model(), []
    train_step = model.train_step

    def watched(batch):
        told.append(is_recorded.get())
        return train_step(batch)

    monkeypatch.setattr(model, "train_step", watched)
    steps = steps_of(model)
    steps(batches_of(rng, number=3))
    assert told == [True] * 3  # before the recording, and in it
    steps.is_refused = True
    steps(batches_of(rng, steps=2, number=1))
    assert told == [True] * 3 + [False]
    assert not is_recorded.get()


def test_what_a_step_has_moved_is_recorded_anew(rng, steps_of, monkeypatch):
    """As a step that is not recorded may store the weights elsewhere."""
    from multilstm.ops import graphs_torch

    monkeypatch.setattr(graphs_torch, "_MOST_GRAPHS", 1)
    model = make_model()
    steps = steps_of(model)
    steps(batches_of(rng, number=2))
    train_step = model.train_step

    def move(batch):
        parameter = model.trainable_variables[0].value
        parameter.data = parameter.data.clone()
        return train_step(batch)

    monkeypatch.setattr(model, "train_step", move)
    steps(batches_of(rng, steps=2, number=1))  # of another shape
    monkeypatch.setattr(model, "train_step", train_step)
    assert steps.num_recorded == 1
    assert not steps.graphs
    steps(batches_of(rng, number=2))
    assert steps.num_recorded == 2


def test_masks_come_from_the_seed_and_the_number_of_the_step(rng, steps_of):
    model, other, third = make_model(), make_model(), make_model(seed=1)
    batches = batches_of(rng)
    steps_of(model)(batches)
    steps_of(other)(batches[:2])
    steps_of(other)(batches[2:])  # as a run that goes on does
    assert_same(model, other)
    third.set_weights(make_model().get_weights())
    steps_of(third)(batches)
    assert any(
        (a != b).any()
        for a, b in zip(model.get_weights(), third.get_weights(), strict=True)
    )
    # Taken again with the number of another step, a step has other masks.
    again = make_model()
    again.optimizer.iterations.assign(7)
    steps_of(again)(batches)
    assert any(
        (a != b).any()
        for a, b in zip(model.get_weights(), again.get_weights(), strict=True)
    )


def test_the_number_of_a_step_is_read_again_when_another_sets_it(rng, steps_of):
    model, other = make_model(), make_model()
    first, second, *_ = batches_of(rng)
    steps = steps_of(model)
    steps([first])
    model.optimizer.iterations.assign(7)
    steps([second])
    steps_of(other)([first])
    other.optimizer.iterations.assign(7)
    steps_of(other)([second])
    assert_same(model, other)


def test_each_shape_has_its_own_recording_from_its_second_batch_on(
    rng, steps_of
):
    model, other = make_model(), make_model()
    long, short = batches_of(rng), batches_of(rng, steps=3)
    steps = steps_of(model)
    for k, pair in enumerate(zip(long, short, strict=True)):
        steps(list(pair))
        assert steps.num_recorded == (0 if k == 0 else 2)
    one_by_one = steps_of(other)
    one_by_one.is_refused = True
    one_by_one(
        [batch for pair in zip(long, short, strict=True) for batch in pair]
    )
    assert one_by_one.num_recorded == 0
    assert_same(model, other)


def test_batches_may_be_arrays_and_may_lack_weights(rng, steps_of):
    model, other = make_model(), make_model()
    batches = batches_of(rng)
    steps_of(model)(batches)
    arrays = [(x.numpy(), y.numpy(), None) for x, y in batches]
    for x, _, _ in arrays:
        x.flags.writeable = False
    steps_of(other)(arrays)
    assert_same(model, other)


@pytest.mark.parametrize(
    "case",
    [
        "accumulation",
        "momentum",
        "AdamW",
        "metric",
        "adaptive",
        "sampled",
        "eagerly",
    ],
)
def test_what_asks_the_host_in_every_step_is_not_recorded(
    monkeypatch, steps_of, case
):
    from multilstm.ops import graphs_torch

    monkeypatch.setattr(graphs_torch, "has_gpu", lambda: True)
    plain = make_model()
    assert isinstance(graphs_torch.make_train_function(plain), steps_of)
    sizes = {"cutoffs": (4,)} if case == "adaptive" else {}
    is_softmax = case in ("adaptive", "sampled")
    model = make_model(softmax=case if is_softmax else "exact", **sizes)
    optimizers = keras.optimizers
    model.compile(
        {
            "accumulation": optimizers.Adam(gradient_accumulation_steps=2),
            "momentum": optimizers.SGD(1.0, momentum=0.9),
            "AdamW": optimizers.AdamW(),
        }.get(case),
        metrics=["accuracy"] if case == "metric" else None,
        run_eagerly=case == "eagerly",
    )
    assert graphs_torch.make_train_function(model) is None


@pytest.mark.parametrize("what", ["place", "precision", "trainable"])
def test_what_is_no_longer_as_it_was_is_recorded_anew(
    rng, steps_of, monkeypatch, what
):
    import torch

    model = make_model()
    batches = batches_of(rng)
    steps = steps_of(model)
    steps(batches[:3])
    value = model.trainable_variables[0].value
    if what == "place":
        value.data = value.data.clone()
    elif what == "precision":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    else:
        model.embedding.trainable = False
    kept = value.detach().clone()
    steps(batches[3:])
    assert steps.num_recorded == 2
    assert torch.equal(kept, value) == (what == "trainable")


def test_what_cannot_be_recorded_runs_all_the_same_and_says_why(
    rng, steps_of, monkeypatch, caplog
):
    def fail(steps, step):
        raise RuntimeError("not permitted when a stream is capturing\nmore")

    monkeypatch.setattr(evidence, "_explained", set())
    model, other = make_model(), make_model()
    batches = batches_of(rng)
    steps_of(other)(batches)
    monkeypatch.setattr(steps_of, "_capture", fail)
    with caplog.at_level(logging.WARNING, logger="multilstm.ops"):
        steps_of(model)(batches)
    [message] = caplog.messages
    assert "one by one: not permitted when a stream is capturing" in message
    assert "more" not in message
    assert_same(model, other)


@pytest.mark.parametrize("noise_shape", [None, (None, 1, None)])
def test_dropout_keeps_its_share_and_scales_it(noise_shape):
    import torch

    from multilstm.ops import graphs_torch

    inputs = torch.ones(40, 50, 60)
    generator = torch.Generator()
    token = graphs_torch._generator.set(generator.manual_seed(3))
    try:
        outputs = graphs_torch.dropout(inputs, 0.25, noise_shape, None)
    finally:
        graphs_torch._generator.reset(token)
    assert set(outputs.unique().tolist()) == {0.0, np.float32(1 / 0.75)}
    mask = outputs if noise_shape is None else outputs[:, :1]
    assert torch.equal(outputs, mask.expand_as(outputs))
    # Five standard deviations of the share of so many draws.
    tolerance = 5 * (0.25 * 0.75 / mask.numel()) ** 0.5
    assert abs((mask == 0).float().mean() - 0.25) < tolerance


def test_fit_takes_groups_of_steps_where_there_is_a_gpu(
    rng, steps_of, monkeypatch
):
    """And reaches what Keras's own loop does, but for masks."""
    from multilstm.ops import graphs_torch

    ids = rng.integers(V, size=200).astype(np.int32)
    data = ContinuousStreams(ids, STEPS, ROWS, drop_remainder=True)
    none = {f"{kind}_dropout": 0.0 for kind in ("input", "hidden", "output")}
    predictions = []

    class Predict(keras.callbacks.Callback):
        takes_several_batches = True

        def on_epoch_end(self, epoch, logs=None):
            predictions.append(self.model.predict(data, verbose=0))

    def fit():
        model = make_model(**none)
        history = model.fit(
            data,
            epochs=2,
            validation_data=data,
            callbacks=[Predict()],
            verbose=0,
        ).history
        return model, history

    other, expected = fit()
    monkeypatch.setattr(graphs_torch, "has_gpu", lambda: True)
    monkeypatch.setattr("multilstm.fitting.steps_per_dispatch", lambda flops: 4)
    model, history = fit()
    assert_same(model, other)
    assert history == expected
    for k in range(2):
        np.testing.assert_array_equal(predictions[k], predictions[k + 2])
    assert isinstance(model.train_function, steps_of)
    assert model.train_function.num_recorded == 1
