"""Which backend was fastest, kept for the next start.

A choice holds for a device and its driver, or a processor's number of cores,
the versions of what was timed, a dtype and a class of shapes: sizes rounded to
powers of two, and whether the embeddings are tied. Each is a JSON file of its
own in the user's cache folder, written whole or not at all, so that two that
choose at once do no harm.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multilstm.devices import CUDA_FORMS, processors, usual_precision
from multilstm.errors import UserError
from multilstm.files import MISFITS, cache_folder, read_json, write_json

CHOICE_SCHEMA = "multilstm-choice-2"
_FIELDS = {
    *("made", "device", "driver", "dtype", "shape", "shape_class"),
    *("shape_line", "backend", "ranking", "equal_within_noise", "versions"),
    "tokens_per_second",
}
SIZES = ("layers", "units", "embedding", "batch", "length", "words")


def shape_class(shape: Mapping[str, Any]) -> dict[str, int]:
    """The class of a shape: its sizes as the nearest powers of two.

    >>> of = shape_class({"units": [650, 650], "embedding_dim": 650,
    ...     "batch_size": 20, "sequence_length": 35,
    ...     "vocabulary_size": 10_000, "tied": False})
    >>> of["layers"], of["units"], of["embedding"], of["tied"]
    (2, 512, 512, False)
    >>> of["batch"], of["length"], of["words"]
    (16, 32, 8192)
    """

    def rounded(number: int) -> int:
        return int(2 ** round(math.log2(number)))

    return {
        "layers": len(shape["units"]),
        "units": rounded(max(shape["units"])),
        "embedding": rounded(shape["embedding_dim"]),
        "batch": rounded(shape["batch_size"]),
        "length": rounded(shape["sequence_length"]),
        "words": rounded(shape["vocabulary_size"]),
        "tied": bool(shape["tied"]),
    }


def choices_folder() -> Path:
    """Where they are kept."""
    return cache_folder() / "choices"


def save_choice(choice: Mapping[str, Any]) -> Path:
    """Writes a choice in the place of one for the same device and class."""
    of = choice["shape_class"]
    sizes = (
        f"{of['layers']}x{of['units']}-embedding{of['embedding']}"
        f"{'-tied' * of['tied']}-batch{of['batch']}-length{of['length']}"
        f"-words{of['words']}"
    )
    device = re.sub(r"[^a-z0-9]+", "-", choice["device"].lower()).strip("-")
    path = choices_folder() / f"{device}-{choice['dtype']}-{sizes}.json"
    write_json(path, {"schema": CHOICE_SCHEMA, **choice})
    return path


def find_choice(
    device: str,
    dtype: str | None = None,
    shape: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The choice made for this device whose class is nearest to a shape.

    Or None; see `find_choices`.
    """
    return next(iter(find_choices(device, dtype, shape)), None)


def find_choices(
    device: str,
    dtype: str | None = None,
    shape: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The choices made for this device, those nearest to a shape first.

    Args:
        device: Its name.
        dtype: Of the products; None is what training takes.
        shape: Sizes; None begins with the choice that was made last.

    Returns:
        The choices. A file that cannot be read is passed over with no word,
        as one of an older version is: `choose` writes it anew.
    """
    dtype = dtype or usual_precision()
    found = []
    for path in sorted(choices_folder().glob("*.json")):
        try:
            choice = read_json(path, schema=CHOICE_SCHEMA)
        except (UserError, OSError):
            continue
        if not _is_whole(choice):
            continue
        if (choice["device"], choice["dtype"]) == (device, dtype):
            del choice["schema"]  # as `choose` gives it, which wrote it
            found.append(choice | {"path": str(path)})
    if shape is None:
        return sorted(found, key=lambda choice: choice["made"], reverse=True)
    wanted = shape_class(shape)
    return sorted(found, key=lambda choice: _distance(choice, wanted))


def _is_whole(choice: Mapping[str, Any]) -> bool:
    """Whether all is there, and of the kinds that its readers take."""
    if not choice.keys() >= _FIELDS:
        return False
    try:
        speeds = choice["tokens_per_second"]
        return (
            shape_class(choice["shape"]) == choice["shape_class"]
            and choice["backend"] in choice["ranking"]
            and {*choice["ranking"]} <= {*CUDA_FORMS}  # backends
            and {*choice["equal_within_noise"]} <= {*choice["ranking"]}
            and isinstance(choice["equal_within_noise"], list)
            and all(0 < speeds[name] < math.inf for name in choice["ranking"])
            and all(isinstance(of, dict) for of in choice["versions"].values())
            and isinstance(choice["made"], str)
            and isinstance(choice.get("processors", {}), dict)
        )
    except MISFITS:
        return False


def _distance(choice: Mapping[str, Any], wanted: Mapping[str, int]) -> float:
    """How many doublings two classes are apart; tied or not counts as one."""
    of: Mapping[str, int] = choice["shape_class"]
    apart = [abs(math.log2(of[n] / wanted[n])) for n in SIZES]
    return sum(apart) + (of["tied"] != wanted["tied"])


def why_stale(
    choice: Mapping[str, Any],
    backend: str,
    driver: str | None,
    versions: Mapping[str, str],
) -> str | None:
    """What has changed since a choice was made; None if nothing has."""
    before = {"driver": choice["driver"], **choice["versions"].get(backend, {})}
    now = {"driver": driver, **versions}
    if "processors" in choice:
        before |= choice["processors"]
        now |= processors()
    changed = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in [*now, *(before.keys() - now.keys())]
        if now.get(name) != before.get(name)
    ]
    return ", ".join(changed) or None
