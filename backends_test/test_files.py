"""Files are whole or as they were; broken ones are explained."""

import errno
import json
import math
import os
import signal
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from multilstm.errors import UserError, WriteError
from multilstm.files import (
    check_folder,
    finite_or_none,
    read_json,
    read_or_explain,
    replacing,
    write_json,
    write_text,
)


@pytest.fixture(autouse=True)
def fresh_keras():
    """Nothing here uses Keras, and clearing it takes 0.1 s a test."""


@pytest.fixture
def path(tmp_path):
    """A file that is there."""
    path = tmp_path / "run.v2.json"
    path.write_text("old")
    return path


def names_beside(path):
    return [file.name for file in path.parent.iterdir()]


# Writing


def test_new_content_is_there_when_the_block_ends(path):
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names_beside(path) == [path.name]


def test_old_content_survives_an_exception(path):
    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert names_beside(path) == [path.name]


def test_content_is_on_the_disk_before_it_is_renamed(path, monkeypatch):
    calls = []
    for owner, name in ((os, "fsync"), (Path, "replace")):
        original = getattr(owner, name)

        def record(*args, name=name, original=original):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, record)
    write_text(path, "new")
    assert calls == ["fsync", "replace", "fsync"]  # file, name, folder


@pytest.mark.parametrize(
    ("name", "suffixes"),
    [
        ("result.json", [".json"]),
        ("best.weights.h5", [".weights", ".h5"]),
        ("LICENSE", []),
    ],
)
def test_temporary_name_keeps_all_suffixes(name, suffixes, tmp_path):
    with replacing(tmp_path / name) as temporary:
        assert temporary.suffixes[-2:] == suffixes


def test_a_writer_that_goes_by_the_suffix_writes_the_file_meant(tmp_path):
    with replacing(tmp_path / "last.npz") as temporary:
        np.savez(temporary, ids=[3, 1])
    with np.load(tmp_path / "last.npz") as file:
        assert file["ids"].tolist() == [3, 1]
    assert names_beside(tmp_path / "last.npz") == ["last.npz"]


def test_folders_on_the_way_are_made(tmp_path):
    write_text(tmp_path / "runs" / "first" / "notes.txt", "über")
    file = tmp_path / "runs" / "first" / "notes.txt"
    assert file.read_bytes() == "über".encode()


@pytest.mark.skipif(os.name != "posix", reason="Only POSIX has a umask.")
@pytest.mark.parametrize("umask", [0o022, 0o007], ids="umask={:03o}".format)
def test_file_may_be_read_by_whom_the_umask_allows(umask, path):
    before = os.umask(umask)
    try:
        write_text(path, "new")
    finally:
        after = os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert after == umask


# JSON


def test_json_is_read_as_it_was_written(path):
    content = {"schema": "kind-1", "words": ["naïve", "\n"], "loss": 0.1}
    write_json(path, content)
    assert read_json(path, schema="kind-1") == content


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_has_no_word_for_are_refused(number, path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": number})
    assert path.read_text() == "old"


def test_none_stands_for_numbers_that_are_not_finite():
    content = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": 7}}
    assert finite_or_none(content) == {
        "a": [None, [1.5, None]],
        "b": {"c": None, "d": 7},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read, it is broken or of another kind"),
        (b'{"schema": "kind-1"', "cannot be read, it is broken"),
        (b'{"schema": "kind-1\xff"}', "cannot be read, it is broken"),
        (b'{"schema": "kind-1", "seed": NaN}', "kind: NaN is no JSON"),
        (b'["kind-1"]', "must have the schema 'kind-1'; it has None"),
        (b'"kind-1"', "must have the schema 'kind-1'; it has None"),
        (b"{}", "must have the schema 'kind-1'; it has None"),
        (b'{"schema": "kind-2"}', "schema 'kind-1'; it has 'kind-2'"),
    ],
)
def test_a_file_that_is_no_json_of_this_kind_is_named(content, message, path):
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_json(path, schema="kind-1")
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError) as raised:
        read_json(path, schema="kind-1")
    assert str(raised.value) == f"{path} is needed and does not exist."


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no header"),
        EOFError("no data"),
        KeyError("about"),
        zipfile.BadZipFile("bad CRC"),
        json.JSONDecodeError("no value", "", 0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_broken_file_raises_is_explained(error, path):
    def read():
        raise error

    with pytest.raises(UserError, match="broken or of another kind") as raised:
        read_or_explain(path, read)
    assert str(path) in str(raised.value)
    assert str(error) in str(raised.value)


def test_a_fault_of_ours_is_not_blamed_on_the_file(path):
    with pytest.raises(ZeroDivisionError):
        read_or_explain(path, lambda: 1 / 0)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT]
)
def test_what_the_system_refuses_is_one_line(number, path, monkeypatch):
    write_text(path, "old")

    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WriteError, match=os.strerror(number)) as raised:
        write_text(path, "new")
    assert str(path) in str(raised.value)
    assert path.read_text() == "old"
    assert names_beside(path) == [path.name]


def test_folder_that_cannot_be_flushed_may_hold_files(path, monkeypatch):
    """Some file systems refuse it, of folders alone."""
    flush = os.fsync

    def refuse(number):
        def fsync(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))
            flush(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    write_text(path, "new")
    assert path.read_text() == "new"
    refuse(errno.EIO)
    with pytest.raises(WriteError, match=os.strerror(errno.EIO)):
        write_text(path, "newer")


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(WriteError, match="cannot be written"):
        write_text(tmp_path / "runs" / "config.json", "new")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_disk_that_is_really_full_leaves_the_old_file(path):
    """No file of this process may pass 64 KiB: the system says so."""
    import resource

    write_text(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(WriteError, match="File too large"):
            write_text(path, "new" * (1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert names_beside(path) == [path.name]


def test_trial_of_a_folder_leaves_the_folder_alone(tmp_path):
    check_folder(tmp_path / "runs" / "first")
    assert not [*(tmp_path / "runs" / "first").iterdir()]


def test_json_that_is_nested_too_deep_is_named(path):
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(path, schema="kind-1")
