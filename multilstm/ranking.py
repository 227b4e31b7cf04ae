"""The gate and the ranking: who computes the same, and who is faster.

Records are those of `bench`, one for each backend and way to train of one
shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from multilstm import native_loops
from multilstm.benchmark import Shape

PEERS = ("our_layer", "stock_competent", "native")

# Of a loss between two ways to compute the same, relative to the loss before
# the first step: later ones may fall to nothing. Seen on a CPU after five
# steps: 3e-6 in float32, 7e-4 in bfloat16, 3e-4 for a softmax, which Keras
# clips. A lost bias or a swapped gate changes it by 2e-3 or more. bfloat16
# rounds a logit by up to 2e-3 of it, which in a batch of few words does not
# average out: seen with two words, 1e-3 of the first loss.
LOSS_TOLERANCE = {"float32": 1e-3, "tf32": 1e-3, "bfloat16": 5e-3}
FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "tf32": 1e-3, "bfloat16": 5e-3}
# Of a product of 1024 rows. Seen: 2e-7 in float32; TF32 gives 3e-4, bfloat16
# 2e-3.
PRODUCT_TOLERANCE = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-1}

# Differences below this are not told apart: as much a machine drifts from one
# run to the next, and nobody should change backends for less.
NOISE = 0.05


def judge(
    records: Sequence[dict[str, Any]], truth: float | None, dtype: str
) -> None:
    """Says of each record of one shape whether it computes what it should.

    Three things are looked at: the loss before the first step, against NumPy
    where there is a `truth`; the losses of the steps after it, against those
    in the middle of all rows (the layer alone, which shares what `ours` may do
    wrong, has no part in it); and a plain product, against float64.

    Args:
        records: Those of one shape. `agrees` is set, and `disagrees` to a
            line that says how it does not.
        truth: The loss before the first step, or None.
        dtype: Of the products.
    """
    running = [record for record in records if "reason" not in record]
    if not running:
        return
    losses = np.array([record["losses"] for record in running])
    if any(record.get("is_random") for record in running):
        losses = losses[:, :0]  # every backend drops other numbers
    finite = [np.isfinite(record["losses"]).all() for record in running]
    witnesses = [record["variant"] != "our_layer" for record in running]
    apart = apart_from_middle(losses, losses[witnesses])
    for record, of_steps, is_finite in zip(running, apart, finite, strict=True):
        said = []
        if not is_finite:
            said.append("its losses are no numbers")
        if record.get("steady") is False:
            said.append("its losses differ from one process to the next")
        worst = float(of_steps.max()) if of_steps.size else 0.0
        allowed = LOSS_TOLERANCE[dtype]
        if not worst <= allowed:  # NaN too
            said.append(
                f"its losses are {worst:.1e} from those of the others "
                f"({allowed:g} allowed)"
            )
        if truth is not None:
            off = abs(record["losses"][0] / truth - 1)
            allowed = FIRST_LOSS_TOLERANCE[dtype]
            if not off <= allowed:
                said.append(
                    f"its first loss is {off:.1e} from NumPy's "
                    f"({allowed:g} allowed)"
                )
        allowed = PRODUCT_TOLERANCE[dtype]
        if not record["product_error"] <= allowed:
            said.append(
                f"its products are {record['product_error']:.1e} from exact "
                f"({allowed:g} allowed): not {dtype}"
            )
        record["agrees"] = not said
        record["disagrees"] = "; ".join(said) or None


def apart_from_middle(losses: np.ndarray, witnesses: np.ndarray) -> np.ndarray:
    """How far losses are from those in the middle, relative to the first.

    Of an even number two are in the middle, and the farther one counts: where
    one half of the rows computes something else, none of them agrees.

    Args:
        losses: Of shape `(rows, steps)`.
        witnesses: Those rows of them that the middle is of.

    Returns:
        Of the shape of `losses`.
    """
    with np.errstate(invalid="ignore"):
        low, high = (
            np.nanquantile(witnesses, 0.5, axis=0, method=method)
            for method in ("lower", "higher")
        )
        apart = np.maximum(abs(losses - low), abs(losses - high))
        return np.asarray(apart / low[:1])


def rank(records: Sequence[dict[str, Any]]) -> None:
    """Numbers those of ours that agree, by the time of a step.

    What is within the noise of the fastest shares its rank, the one that
    compiles fastest first; so does what comes after with its own fastest.
    """
    for record in records:
        record["rank"] = None
    ranked = [
        record
        for record in records
        if record.get("agrees")
        and record["variant"] not in (*PEERS, "stock_tutorial")
    ]
    ranked.sort(key=lambda record: record["step_time_ms"]["median"])
    place = 1
    while ranked:
        leader = ranked[0]
        equal = [record for record in ranked if within_noise(record, leader)]
        for record in equal:
            record["rank"] = place
        place += len(equal)
        ranked = [record for record in ranked if record["rank"] is None]


def within_noise(record: Mapping[str, Any], leader: Mapping[str, Any]) -> bool:
    """Whether two rows of one run cannot be told apart.

    Compared are windows of the same round and processes that ran side by
    side, which saw the same machine: where the slower one was the faster in a
    fifth of the windows or a third of the processes, the next run may turn
    them round.
    """
    slower, faster = record["windows_ms"], leader["windows_ms"]
    of_windows = _over(record, leader)
    of_processes = np.divide(
        [np.median(process) for process in slower],
        [np.median(process) for process in faster],
    )
    return bool(
        np.median(of_windows) <= 1 + NOISE
        or np.mean(of_windows <= 1) >= 1 / 5
        or np.mean(of_processes <= 1) >= 1 / 3
    )


def _over(record: Mapping[str, Any], other: Mapping[str, Any]) -> np.ndarray:
    """The time of one over that of the other, window by window."""
    windows = record["windows_ms"], other["windows_ms"]
    return np.asarray(np.divide(*map(np.concatenate, windows)))


def fastest(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the first rank, the one to take first.

    It is the one that compiles fastest of those that are as fast in most
    windows. What shares the rank because a process was disturbed, be it the
    fastest one's, is not taken for that.
    """
    first = [record for record in records if record["rank"] == 1]
    first.sort(key=lambda record: record["step_time_ms"]["median"])
    near = [r for r in first if np.median(_over(r, first[0])) <= 1 + NOISE]
    near.sort(key=lambda record: record["compile_time_seconds"])
    return near + [record for record in first if record not in near]


def by_shape(
    results: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Records under the line that describes their shape, in order."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for record in results:
        title = str(Shape(**record["shape"]))
        shapes.setdefault(title, []).append(record)
    return shapes


def first_loss(shape: Shape) -> float:
    """The loss of the weights that all begin with, by NumPy in float64."""
    weights = [w.astype(float) for w in native_loops.draw_weights(shape)]
    embeddings, lstms, kernel, bias = native_loops.split_weights(shape, weights)
    inputs, targets = first_batch(shape)
    x = embeddings[inputs.T]  # (time, batch, features)
    for layer in lstms:
        x = _lstm(x, *layer)
    total = 0.0
    for features, words in zip(x, targets.T, strict=True):
        logits = features @ (embeddings.T if kernel is None else kernel) + bias
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, words[:, None], -1)[:, 0]
        total += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
    return total / shape.tokens


def first_batch(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and targets that losses are checked on, `(batch, time)`."""
    ids = native_loops.draw_token_ids(shape, steps=1)
    starts = np.arange(shape.batch_size)[:, None] * shape.sequence_length
    places = starts + np.arange(shape.sequence_length)
    return ids[places], ids[places + 1]


def _lstm(
    x: np.ndarray, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    h = c = np.zeros((x.shape[1], len(recurrent)))
    outputs = []
    for projected in x @ kernel + bias:
        i, f, g, o = np.split(projected + h @ recurrent, 4, -1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)
