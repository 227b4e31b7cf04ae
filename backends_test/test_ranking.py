"""The gate and the ranking: who is caught, and who shares a rank."""

import dataclasses

import numpy as np
import pytest

from multilstm.benchmark import Shape, Worker
from multilstm.ranking import fastest, first_batch, first_loss, judge, rank

TINY = Shape("tiny", (6, 6), 6, 3, 4, 20)


def timed(backend="jax", windows=(10.0, 10.0, 10.0), **about):
    """A record as `bench` makes them, for a step of 12 words."""
    median = float(np.median(windows))
    return {
        "backend": backend,
        "variant": "ours",
        "shape": dataclasses.asdict(TINY),
        "dtype": "float32",
        "installed": True,
        "versions": {"keras": "3.15.1"},
        "kernel": f"{backend}: loop",
        "losses": [3.0, 2.9, 2.8, 2.7, 2.6, 2.5],
        "product_error": 2e-7,
        "compile_time_seconds": 1.0,
        "peak_memory_mb": 500.0,
        "peak_device_memory_mb": None,
        "joules_per_million_tokens": None,
        "windows_ms": [[float(ms)] for ms in windows],
        "step_time_ms": dict.fromkeys(("median", "p20", "p80", "min"), median),
        "tokens_per_second": 12_000 / median,
        "agrees": True,
        "disagrees": None,
        "rank": None,
        **about,
    }


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"losses": [3.0, 2.9, 2.8, 2.7, 2.6, 2.51]}, "from those of the"),
        ({"losses": [3.0, 2.9, 2.8, 2.7, 2.6, float("nan")]}, "of the others"),
        ({"product_error": 3e-4}, "not float32"),
        ({"steady": False}, "from one process to the next"),
        ({"is_random": True, "losses": [float("inf")] * 6}, "no numbers"),
    ],
)
def test_other_numbers_are_shown_and_not_ranked(about, said):
    others = [timed("jax"), timed("torch")]
    wrong = timed("tensorflow", windows=(1.0, 1.0, 1.0), **about)
    judge([*others, wrong], 3.0, "float32")
    rank([*others, wrong])
    assert said in wrong["disagrees"]
    assert wrong["rank"] is None
    assert [record["agrees"] for record in others] == [True, True]


def test_one_alone_is_held_against_numpy():
    record = timed()
    judge([record], 3.0 * 1.002, "float32")
    assert "its first loss is 2.0e-03 from NumPy's" in record["disagrees"]


def test_losses_that_fall_to_nothing_are_compared_as_the_first():
    """A rounding of 1e-5 is 2e-3 of the last."""
    records = [
        timed(losses=[3.0, 0.1, 0.05, 0.02, 0.01, 0.006]),
        timed("torch", losses=[3.0, 0.1, 0.05, 0.02, 0.01, 0.00601]),
    ]
    judge(records, 3.0, "float32")
    assert [record["disagrees"] for record in records] == [None, None]


@pytest.mark.parametrize(
    ("dtype", "agrees"), [("float32", False), ("bfloat16", True)]
)
def test_bfloat16_may_round_the_losses_of_few_words(dtype, agrees):
    records = [
        timed(losses=[3.0, *[2.0] * 5]),
        timed("torch", losses=[3.0 * 1.002, *[2.0 * 1.002] * 5]),
    ]
    judge(records, 3.0, dtype)
    assert [record["agrees"] for record in records] == [agrees, agrees]


def test_layer_alone_is_no_witness_for_the_same_layer():
    """What is wrong with ours is so twice; half of it would pass."""
    losses = [3.0, *[2.0 * 1.0019] * 5]
    right = {"losses": [3.0, *[2.0] * 5]}
    records = [
        timed(losses=losses),
        timed(variant="our_layer", losses=losses),
        timed(variant="stock_competent", **right),
        timed(variant="native", **right),
    ]
    judge(records, None, "float32")
    assert [record["agrees"] for record in records] == [
        False,
        False,
        True,
        True,
    ]


def test_of_two_that_differ_neither_is_ranked():
    """Nobody can say which is wrong."""
    for apart in (1.5, 1.0018):  # half as far is not too far
        losses = [3.0, *[2.0 * apart] * 5]
        records = [
            timed(losses=[3.0, *[2.0] * 5]),
            timed("torch", losses=losses),
        ]
        judge(records, None, "float32")
        assert [record["agrees"] for record in records] == [False, False]


def test_of_halves_that_differ_neither_is_ranked():
    """Of four rows two are in the middle, and both count."""
    records = [
        timed(backend, variant=variant, losses=[3.0, *[loss] * 5])
        for variant in ("ours", "native")
        for backend, loss in (("jax", 2.0), ("torch", 2.0 * 1.0018))
    ]
    judge(records, None, "float32")
    assert [record["agrees"] for record in records] == [False] * 4


@pytest.mark.parametrize(
    ("dtype", "error", "agrees"),
    [
        ("float32", 4e-7, True),
        ("float32", 3e-4, False),  # TF32 told as float32
        ("tf32", 3e-4, True),
        ("tf32", 2.3e-3, False),  # bfloat16 told as TF32
        ("bfloat16", 2.3e-3, True),
    ],
)
def test_products_are_those_of_the_dtype(dtype, error, agrees):
    records = [timed(product_error=error), timed("torch", product_error=1e-7)]
    judge(records, None, dtype)
    assert [record["agrees"] for record in records] == [agrees, True]


def test_losses_of_random_layers_are_not_compared():
    records = [
        timed(is_random=True),
        timed("torch", losses=[3.0, *[2.0] * 5], is_random=True),
    ]
    judge(records, None, "float32")
    assert [record["agrees"] for record in records] == [True, True]


def test_backends_within_noise_share_a_rank_and_compile_time_decides():
    records = [
        timed("jax", windows=(10, 10, 10), compile_time_seconds=9.0),
        timed("torch", windows=(10.2, 10.2, 10.3)),  # 2 % slower
        timed("tensorflow", windows=(11, 11, 11)),  # 10 % slower
    ]
    rank(records)
    assert [record["rank"] for record in records] == [1, 1, 3]
    first = fastest(records)
    assert [record["backend"] for record in first] == ["torch", "jax"]


def test_process_that_was_disturbed_does_not_make_the_slower_one_the_choice():
    """It shares the rank: the next run may turn them round."""
    quiet, disturbed = [100.0] * 3, [350.0] * 3
    records = [
        timed("torch", compile_time_seconds=9.0),
        timed("tensorflow", compile_time_seconds=1.0),
    ]
    records[0] |= {
        "windows_ms": [quiet, quiet, disturbed],
        "step_time_ms": {"median": 100.0},
    }
    records[1] |= {
        "windows_ms": [[300.0] * 3] * 3,
        "step_time_ms": {"median": 300.0},
    }
    rank(records)
    assert [record["rank"] for record in records] == [1, 1]
    first = fastest(records)
    assert [record["backend"] for record in first] == ["torch", "tensorflow"]


def test_third_backend_does_not_decide_whether_two_are_equal():
    windows = {
        "jax": [[100.0] * 3] * 3,
        "torch": [[95.0] * 3, [112.0] * 3, [115.0] * 3],
        "tensorflow": [[108.0] * 3] * 3,
    }
    records = [
        timed(backend)
        | {
            "windows_ms": of,
            "step_time_ms": {"median": float(np.median(of))},
        }
        for backend, of in windows.items()
    ]
    rank(records[:2])
    assert [record["rank"] for record in records[:2]] == [1, 1]
    rank(records)
    assert [record["rank"] for record in records] == [1, 1, 3]


def test_what_comes_after_shares_a_rank_with_its_own_fastest():
    records = [
        timed(backend, windows=(ms, ms, ms))
        for backend, ms in (("jax", 12.2), ("torch", 10.0), ("tensorflow", 12))
    ]
    rank(records)
    assert [record["rank"] for record in records] == [2, 1, 2]


@pytest.mark.parametrize(
    ("slower", "is_noise"),
    [
        # In one window of five the faster one, in its processes never.
        ([[12.0, 12.0, 12.0, 12.0, 9.0]] * 2, True),
        ([[12.0, 12.0, 12.0, 12.0, 11.0]] * 2, False),
        # In fewer windows, but for most of one process of three.
        ([[12.0] * 12, [9.0] * 5 + [10.5] * 7, [12.0] * 12], False),
        ([[12.0] * 12, [9.0] * 7 + [12.0] * 5, [12.0] * 12], True),
    ],
)
def test_windows_and_processes_each_tell_what_is_noise(slower, is_noise):
    """By medians alone 12 ms are a fifth more than 10."""
    faster = [[10.0] * len(process) for process in slower]
    records = [
        timed("jax") | {"windows_ms": faster},
        timed("torch", windows=(12.0,) * 3) | {"windows_ms": slower},
    ]
    rank(records)
    assert [r["rank"] for r in records] == [1, 1 if is_noise else 2]


def test_windows_are_compared_within_their_round():
    """A machine that slows down hits all alike and hides no difference."""
    records = [
        timed("jax", windows_ms=[[10.0, 20.0, 40.0]]),
        timed("torch", windows_ms=[[11.0, 22.0, 44.0]]),
    ]
    records[1]["step_time_ms"] = {"median": 22.0}
    rank(records)
    assert [record["rank"] for record in records] == [1, 2]


def test_processes_that_differ_are_noise():
    """In one process of three torch was slower than the other two's tenth."""
    fast, slow = [95.0, 95.0, 96.0], [116.0, 117.0, 116.0]
    records = [
        timed("torch", windows_ms=[fast, fast, slow]),
        timed("jax", windows_ms=[[110.0, 111.0, 112.0]] * 3),
    ]
    records[1]["step_time_ms"] = {"median": 111.0}
    rank(records)
    assert [record["rank"] for record in records] == [1, 1]
    records[0]["windows_ms"] = [fast] * 3
    rank(records)
    assert [record["rank"] for record in records] == [1, 2]


def test_processes_are_compared_with_those_beside_them():
    """A machine that slows down from process to process hides nothing.

    Measured on two cores: the first torch is faster than the last tensorflow.
    """
    records = [
        timed(
            "torch",
            windows_ms=[
                [300.4, 300.6, 300.1],
                [353.0, 310.3, 310.7],
                [325.5, 318.3, 315.3],
            ],
        ),
        timed(
            "tensorflow",
            windows_ms=[
                [279.9, 280.2, 293.9],
                [294.2, 290.2, 286.9],
                [311.2, 303.0, 285.2],
            ],
        ),
    ]
    records[0]["step_time_ms"] = {"median": 310.7}
    records[1]["step_time_ms"] = {"median": 290.2}
    rank(records)
    assert [record["rank"] for record in records] == [2, 1]


def test_first_loss_is_that_of_the_batch_a_worker_checks(rng):
    worker = Worker()
    worker.start("float32")
    for shape in (TINY, Shape("tied", (5, 6), 6, 3, 4, 20, tied=True)):
        worker.prepare(steps=2, **dataclasses.asdict(shape))
        inputs, targets = worker.window_of_one[0]
        expected_inputs, expected_targets = first_batch(shape)
        np.testing.assert_array_equal(inputs, expected_inputs)
        np.testing.assert_array_equal(targets, expected_targets)
        loss = worker.build("ours")["losses"][0]
        np.testing.assert_allclose(first_loss(shape), loss, rtol=1e-5)
