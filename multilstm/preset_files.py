"""A preset by its name, or one of your own, from a JSON file.

    {
      "schema": "multilstm-preset-1",
      "based_on": "zaremba_medium",
      "units": [400, 400],
      "embedding_dim": 400,
      "output_dropout": 0.3
    }

What such a file leaves out is as in the preset that it is based on, or, without
one, as `Preset` has it. Its name is that of the file.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from multilstm.errors import UserError
from multilstm.files import read_json
from multilstm.presets import PRESETS, Preset

PRESET_SCHEMA = "multilstm-preset-1"

# What is of a published preset alone, and not of one that is based on it.
_OF_ITS_SOURCE = ("name", "source", "published_valid", "published_test")


def find_preset(preset: str | Path | Preset | Mapping[str, Any]) -> Preset:
    """The preset of that name, or of a JSON file of your own.

    Args:
        preset: A name of `PRESETS`, the path of a file that ends in `.json`,
            what `settings_of` gave, or a preset, which is given back.

    Raises:
        UserError: Lists the names there are, or tells what is wrong with the
            file.
    """
    if isinstance(preset, Preset):
        return preset
    if isinstance(preset, Mapping):
        return _make(preset, "The settings of a preset")
    if isinstance(preset, str) and preset in PRESETS:
        return PRESETS[preset]
    if isinstance(preset, str | Path) and Path(preset).suffix == ".json":
        return read_preset(Path(preset))
    raise UserError(
        f"A preset is one of {', '.join(PRESETS)}, or a file of your own, "
        "NAME.json, as `multilstm presets small` prints one; received "
        f"{str(preset)!r}.{_meant(str(preset), PRESETS)}"
    )


def read_preset(path: Path) -> Preset:
    """The preset that a JSON file describes.

    Raises:
        UserError: If the file is missing or broken, or has a setting that no
            preset has, or one of another kind, or lacks one.
    """
    settings = read_json(path, schema=PRESET_SCHEMA)
    del settings["schema"]
    if path.stem in PRESETS:
        raise UserError(
            f"A preset of your own must have a name of its own, which is that "
            f"of its file; {path} has that of a published one. Rename it."
        )
    own = {"name": path.stem, "source": f"a file of its own, {path.name}"}
    based_on = settings.pop("based_on", None)
    base: dict[str, Any] = {}
    if based_on is not None:
        if not isinstance(based_on, str) or based_on not in PRESETS:
            raise UserError(
                f"`based_on` of {path} must be one of {', '.join(PRESETS)}; "
                f"received {based_on!r}."
            )
        base = settings_of(PRESETS[based_on])
        own["source"] += f", based on {based_on}"
        for name in _OF_ITS_SOURCE:
            del base[name]
    units = settings.get("units")
    if isinstance(units, list) and "num_layers" not in settings:
        base["num_layers"] = len(units)
    if "name" in settings:
        raise UserError(
            f"The name of a preset of your own is that of its file; {path} "
            "has a `name` in it. Leave that out."
        )
    return _make(base | own | settings, str(path))


def _make(settings: Mapping[str, Any], where: str) -> Preset:
    known = {field.name: field for field in fields(Preset)}
    for name in settings:
        if name not in known:
            raise UserError(
                f"{where} must have settings of a preset; {name!r} is none."
                f"{_meant(name, known)} `multilstm presets small` prints all "
                "there are."
            )
    for name, field in known.items():
        if name not in settings and field.default is MISSING:
            raise UserError(
                f"{where} must have `{name}`; it has not. Give it, or name "
                "the preset that has the rest with `based_on`."
            )
    return Preset(**settings)


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" Is {near[0]} meant?" if near else ""


def settings_of(preset: Preset) -> dict[str, Any]:
    """All settings of a preset, as JSON has them."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(preset)))
    return settings


def describe(preset: Preset) -> str | dict[str, Any]:
    """For `find_preset`: its name if it is ours, else all its settings."""
    is_ours = PRESETS.get(preset.name) == preset
    return preset.name if is_ours else settings_of(preset)


def file_of(preset: Preset) -> str:
    """The text of a file of that preset's settings, to make another of."""
    settings = settings_of(preset)
    for name in _OF_ITS_SOURCE:
        del settings[name]
    return json.dumps({"schema": PRESET_SCHEMA, **settings}, indent=2) + "\n"
