"""The figures of a run, taken from its best weights when training has ended."""

import logging
import math
from typing import Any

from multilstm.checkpoint import History
from multilstm.devices import peak_memory_mb
from multilstm.errors import UserError
from multilstm.files import finite_or_none, read_json, write_json
from multilstm.keeper import Keeper
from multilstm.model import LanguageModel
from multilstm.ops import last_kernel
from multilstm.run_folder import RunFolder
from multilstm.runs import (
    describe_environment,
    describe_protocol,
    load_run,
)
from multilstm.weights_file import describe_weights

RESULT_SCHEMA = "multilstm-result-1"

logger = logging.getLogger(__name__)

# What a result must have, to stand for a run that is not trained again.
_TOLD_AGAIN = {
    *("status", "epochs", "device", "backend", "history", "best_epoch"),
    *("valid_perplexity", "test_perplexity", "test_unigram_perplexity"),
    "tokens_per_second",
}


def read_result(folder: RunFolder) -> dict[str, Any]:
    """The figures of a run that has ended before, or that of none."""
    none = {"status": "missing", "epochs": 0}
    if not folder.result.exists():
        return none
    try:
        result = read_json(folder.result, schema=RESULT_SCHEMA)
        missing = sorted(_TOLD_AGAIN - result.keys())
        if missing:
            raise UserError(f"{folder.result} lacks {', '.join(missing)}.")
    except UserError as error:
        logger.warning("%s It is made anew.", error)
        return none
    return result


def tell_again(
    earlier: dict[str, Any], settings: dict[str, Any], keeper: Keeper
) -> dict[str, Any]:
    """The figures of a run that has ended, by the options that it has now."""
    result = earlier | {
        "run": str(keeper.folder.path),
        "epochs_planned": keeper.plan.epochs,
        "is_out_of_time": False,
        "protocol": describe_protocol(keeper.plan, settings),
    }
    if result != earlier and not keeper.folder.devices.rank:
        write_json(keeper.folder.result, result)
    return result


def _epoch_of(best: dict[str, float], history: History) -> float | None:
    """The epoch that the best weights are of, if the history has it.

    It has not where a checkpoint was lost, and the epochs after the one
    before it went worse when they were trained again.
    """
    if not best:
        return None
    epoch = best["epoch"]
    if epoch == 0:  # of the run that it began with
        return epoch
    told = {row["epoch"]: row["valid_perplexity"] for row in history}
    return epoch if told.get(epoch) == best["valid_perplexity"] else None


def _mean_speed(history: History) -> float | None:
    """Tokens a second over all epochs; None where there is none."""
    seconds = sum(row["seconds"] for row in history)
    if not seconds:
        return None
    tokens = sum(row["seconds"] * row["tokens_per_second"] for row in history)
    return round(tokens / seconds, 1)


def take_figures(
    model: LanguageModel,
    settings: dict[str, Any],
    keeper: Keeper,
    speed: dict[str, Any],
) -> dict[str, Any]:
    """Writes the result record of a run, and gives it.

    Args:
        model: That was trained.
        settings: What the run was asked for.
        keeper: Of the run.
        speed: Of the steps of this process. Where it made none, since the one
            before was killed after them, the tokens a second are the history's.
    """
    folder, data, history = keeper.folder, keeper.data, keeper.history
    # There are none where it was stopped in its first epoch, or before.
    has_best = math.isfinite(keeper.best_perplexity)
    best = describe_weights(folder.best_weights) if has_best else {}
    result: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "status": "interrupted" if keeper.interrupted else "finished",
        "run": str(folder.path),
        **describe_environment(),
        "preset": settings["preset"],
        "corpus": data.name,
        "seed": settings["seed"],
        "devices": folder.devices.count,
        "initial_weights_sha256": folder.read_config()[
            "initial_weights_sha256"
        ],
        "precision": settings["precision"],
        "learning_rate": keeper.plan.learning_rate,
        "train_tokens": settings["train_tokens"],
        "starts_from": settings["starts_from"],
        "gradient_accumulation_steps": (
            keeper.plan.gradient_accumulation_steps
        ),
        "softmax": settings["softmax"],
        "kernel": keeper.kernel or last_kernel(),
        "parameters": model.count_params(),
        "epochs": len(history),
        "epochs_planned": keeper.plan.epochs,
        "is_out_of_time": keeper.out_of_time and not keeper.has_ended,
        "best_epoch": _epoch_of(best, history),
        "valid_perplexity": best["valid_perplexity"] if best else None,
        "test_perplexity": None,
        "test_unigram_perplexity": data.unigram_perplexity("test"),
        "protocol": describe_protocol(keeper.plan, settings),
        **speed,
        "tokens_per_second": speed["tokens_per_second"] or _mean_speed(history),
        "peak_memory_mb": peak_memory_mb(),
        "history": history,
    }
    if not keeper.interrupted:
        folder.devices.meet()  # the first has written them
        kept, _, _ = load_run(folder.path)
        keeper.evaluator.model.set_weights(kept.get_weights())
        result["test_perplexity"] = keeper.evaluator(data.test).perplexity
    if not folder.devices.rank:
        write_json(folder.result, finite_or_none(result))
    folder.devices.meet()  # none goes before the first has written
    return result
