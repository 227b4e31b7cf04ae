"""Presets of one's own: what files of them mean, and how they are trained."""

import json
from dataclasses import asdict, replace

import keras
import numpy as np
import pytest
import tiny_runs

from multilstm import PRESETS, LanguageModel, load_run, train
from multilstm.errors import UserError
from multilstm.files import read_json
from multilstm.preset_files import file_of, find_preset

SIZES = {"units": 8, "embedding_dim": 8, "batch_size": 3, "sequence_length": 5}


@pytest.fixture
def write(tmp_path):
    def write(stem="mine", **settings):
        path = tmp_path / f"{stem}.json"
        schema = {"schema": "multilstm-preset-1"}
        path.write_text(json.dumps(schema | settings))
        return path

    return write


def test_what_a_file_leaves_out_is_as_in_the_preset_it_is_based_on(write):
    path = write(based_on="zaremba_medium", units=400, output_dropout=0.3)
    wanted = replace(
        PRESETS["zaremba_medium"],
        name="mine",
        source="a file of its own, mine.json, based on zaremba_medium",
        units=400,
        output_dropout=0.3,
        published_valid=None,
        published_test=None,
    )
    assert find_preset(path) == wanted
    assert find_preset(str(path)) == wanted


def test_file_based_on_nothing_has_the_defaults_of_a_preset(write):
    needed = {"num_layers": 2, "carry_state": True, "optimizer": "sgd"}
    path = write(**SIZES, **needed, learning_rate=1.0, epochs=2)
    preset = find_preset(path)
    assert (preset.output_dropout, preset.clip_norm) == (0.0, None)
    assert preset.units_of_layers == [8, 8]


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_of_a_preset_is_a_file_of_the_same_settings(
    name, tmp_path
):
    path = tmp_path / "copy.json"
    path.write_text(file_of(PRESETS[name]))
    read, ours = asdict(find_preset(path)), asdict(PRESETS[name])
    for its_own in ("name", "source", "published_valid", "published_test"):
        del read[its_own], ours[its_own]
    assert json.dumps(read) == json.dumps(ours)


def test_several_units_are_of_as_many_layers(write):
    preset = find_preset(write(based_on="awd", units=[16, 8]))
    assert (preset.num_layers, preset.units_of_layers) == (2, [16, 8])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"units": 8}, "must have `num_layers`; it has not"),
        ({"based_on": "smal"}, "must be one of small, tutorial.*'smal'"),
        ({"based_on": ["small"]}, r"must be one of small.*\['small'\]"),
        ({"based_on": "small", "unit": 8}, "'unit' is none. Is units meant"),
        ({"based_on": "small", "name": "x"}, "is that of its file.*Leave"),
        ({"based_on": "small", "units": "8"}, "`units` of a preset must be a"),
        (
            {"based_on": "small", "units": [8, 8, 8], "num_layers": 2},
            r"one for each of its 2 layers.*received \[8, 8, 8\]",
        ),
        ({"based_on": "small", "rotates_rows": True}, "`length_std` is none"),
        ({"based_on": "small", "epochs": 0}, "`epochs`.*at least 1; received"),
        ({"based_on": "small", "batch_size": 0}, "`batch_size`.*at least 1"),
        ({"based_on": "small", "learning_rate": 0}, "above 0; received 0"),
        ({"based_on": "small", "clip_norm": -1}, "above 0; received -1"),
        ({"based_on": "small", "l2": -1e-6}, "at least 0; received -1e-06"),
        ({"schema": "multilstm-run-1"}, "must have the schema 'multilstm-pre"),
    ],
    ids=str,
)
def test_file_that_is_no_preset_is_refused_with_what_is_wrong(
    settings, said, write
):
    with pytest.raises(UserError, match=said):
        find_preset(write(**settings))


def test_file_must_be_there_and_have_a_name_of_its_own(write, tmp_path):
    with pytest.raises(UserError, match=r"gone\.json is needed and does not"):
        find_preset(tmp_path / "gone.json")
    with pytest.raises(UserError, match="must have a name of its own"):
        find_preset(write(stem="awd", based_on="awd"))
    with pytest.raises(UserError, match=r"or a file of your own, NAME\.json"):
        find_preset(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"A preset is one of .* received '5'"):
        find_preset(5)


def test_run_of_a_file_is_that_of_the_preset_it_describes(
    write, corpus_folder, tmp_path
):
    tiny = tiny_runs.presets()["tiny"]
    path = write(based_on="small", **SIZES, learning_rate=0.03, epochs=2)
    results = [
        train(preset, corpus=corpus_folder, out=tmp_path / out, progress=False)
        for preset, out in (
            (path, "by-file"),
            (replace(tiny, name="ours", epochs=2), "by-object"),
        )
    ]
    assert [result["preset"] for result in results] == ["mine", "ours"]
    by_file, by_object = (result["history"] for result in results)
    assert len(by_file) == 2
    for one, other in zip(by_file, by_object, strict=True):
        assert one["valid_perplexity"] == other["valid_perplexity"]
    model, _, config = load_run(tmp_path / "by-file")
    assert config["preset_settings"]["units"] == 8
    model.compile()  # by the file's settings, which the run keeps
    assert float(model.optimizer.learning_rate) == pytest.approx(0.03)


def test_run_goes_on_by_its_file_while_that_is_as_it_was(
    write, corpus_folder, tmp_path
):
    settings = SIZES | {"based_on": "small", "epochs": 1}
    out = tmp_path / "run"

    def go_on(epochs=None):
        return train(
            tmp_path / "mine.json",
            corpus=corpus_folder,
            out=out,
            epochs=epochs,
            resume=True,
            progress=False,
        )

    write(**settings)
    go_on()
    assert go_on(epochs=2)["epochs"] == 2
    write(**settings | {"hidden_dropout": 0.1})
    with pytest.raises(
        UserError, match=r"hidden_dropout=0.4 .* of mine it is 0.1 now"
    ):
        go_on()
    assert read_json(out / "config.json", schema="multilstm-run-1")
    write(**settings | {"epochs": 5})  # what --epochs has changed already
    assert go_on(epochs=3)["epochs"] == 3


def test_another_preset_must_not_go_by_a_published_name(corpus_folder):
    other = replace(PRESETS["small"], units=8)
    with pytest.raises(UserError, match="received another small"):
        train(other, corpus=corpus_folder)


def test_saved_model_of_a_file_keeps_its_optimizer(write, tmp_path):
    path = write(based_on="awd", **SIZES, learning_rate=3.0, clip_norm=0.5)
    model = LanguageModel.from_preset(path, vocabulary_size=11)
    model(np.zeros((3, 5), "int32"))
    model.save(tmp_path / "model.keras")
    path.unlink()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.compile()
    assert float(loaded.optimizer.learning_rate) == 3.0
    assert loaded.optimizer.global_clipnorm == 0.5
