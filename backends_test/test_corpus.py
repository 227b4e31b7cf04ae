"""Text to ids: by hand, by a naive reader, from mirrors and from the cache."""

import codecs
import errno
import functools
import hashlib
import http.server
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from multilstm import corpus, load_corpus, read_words
from multilstm.errors import UserError

# Counted and sorted, the words are: <eos> sat the cat dog
TEXTS = {
    "train": "the cat sat\nthe dog sat\n",
    "valid": "the dog\n",
    "test": "sat cat\n\n",
}
IDS = {
    "train": [2, 3, 1, 0, 2, 4, 1, 0],
    "valid": [2, 4, 0],
    "test": [1, 3, 0, 0],
}


@pytest.fixture(autouse=True)
def fresh_keras():
    """Nothing here uses Keras, and clearing it takes 0.1 s a test."""


@pytest.fixture
def write(tmp_path):
    """Writes the texts of a corpus, some other than in TEXTS; its folder."""

    def write(**texts):
        folder = tmp_path / "story"
        folder.mkdir(exist_ok=True)
        for split, text in (TEXTS | texts).items():
            data = text if isinstance(text, bytes) else text.encode()
            (folder / f"{split}.txt").write_bytes(data)
        return folder

    return write


def ids_of(data):
    return {split: data.split(split).tolist() for split in corpus.SPLITS}


def words_of(data, split):
    return data.vocabulary.decode(data.split(split))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Reading words


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a b\nc\n", "a b <eos> c <eos>"),
        (b"a b\r\nc\r\n", "a b <eos> c <eos>"),
        (b"a b\rc\r", "a b <eos> c <eos>"),
        (codecs.BOM_UTF8 + b"a b\nc\n", "a b <eos> c <eos>"),
        (b"  a \t b \nc", "a b <eos> c <eos>"),
        (b"a\n\n\nb\n \n", "a <eos> <eos> <eos> b <eos> <eos>"),
        (b"a\n  ", "a <eos>"),
        ("ça\u3000va\n".encode(), "ça va <eos>"),
        (b"\r\n", "<eos>"),
        (b" \t", ""),
        (codecs.BOM_UTF8, ""),
        (b"", ""),
    ],
    ids=repr,
)
@pytest.mark.parametrize("chunk", [1, 1000], ids="chunk={}".format)
def test_words_are_those_read_by_hand(
    chunk, data, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "_CHUNK", chunk)
    (tmp_path / "text").write_bytes(data)
    assert list(read_words(tmp_path / "text")) == words.split()


def read_it_whole(data):
    *lines, rest = re.split("\r\n|\r|\n", data.decode("utf-8-sig"))
    lines += [rest] if rest.split() else []
    return [word for line in lines for word in [*line.split(), "<eos>"]]


@settings(max_examples=50, deadline=None)
@given(
    st.text("ab \t\n\r\x0b\x85\u2028\ufeffß😀")
    | st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    ),
    st.integers(1, 7),
)
@example("ab\r\nab", 3)
@example("ab\n \nab ", 4)
def test_words_are_those_of_reading_it_whole(tmp_path_factory, text, chunk):
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_CHUNK", chunk)
        words = list(read_words(path))
    assert words == read_it_whole(text.encode())


def test_words_come_before_the_file_is_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 4)
    (tmp_path / "text").write_bytes(b"first " + 99_999 * b"a " + b"\xff")
    words = read_words(tmp_path / "text")
    assert next(words) == "first"
    with pytest.raises(UserError, match="0xff"):
        list(words)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\0b\n", "it holds NUL bytes"),
        ("café\n".encode("latin-1"), "UTF-8 text; it has the byte 0xe9"),
        ("a b\n".encode("utf-16"), "UTF-8 text; it has the byte 0xff"),
        ("a ç".encode()[:-1], "UTF-8 text; it has the byte 0xc3"),
        (b"a " + 15 * b"b", "it holds a word of over 10 characters"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("split", corpus.SPLITS)
def test_what_is_no_text_is_named(
    split, data, message, write, own_cache, monkeypatch
):
    monkeypatch.setattr(corpus, "_CHUNK", 4)
    monkeypatch.setattr(corpus, "_LONGEST_WORD", 10)
    folder = write(**{split: data})
    with pytest.raises(UserError, match=message) as raised:
        load_corpus(folder)
    assert str(folder / f"{split}.txt") in str(raised.value)
    assert names_in(own_cache / "encoded") == []


def test_a_long_word_is_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 4)
    monkeypatch.setattr(corpus, "_LONGEST_WORD", 10)
    (tmp_path / "text").write_text("a internally")
    assert list(read_words(tmp_path / "text")) == ["a", "internally", "<eos>"]


@pytest.mark.parametrize(
    ("encoding", "told"),
    [("utf-16-le", "utf-16"), ("utf-16-be", "utf-16"), ("latin-1", "latin1")],
)
def test_the_encoding_of_a_text_is_that_which_is_told(encoding, told, write):
    mark = "\ufeff" if told == "utf-16" else ""
    folder = write(train=f"{mark}café\n".encode(encoding))
    with pytest.raises(UserError, match=f"iconv -f {told} -t utf-8"):
        load_corpus(folder)


def test_a_folder_that_cannot_be_listed_is_not_called_empty(write, monkeypatch):
    """As one without the permission to read it, which root always has."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    folder = write()
    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"be read; .* Permission denied"):
        load_corpus(folder)


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"novel\.txt is needed and does not"):
        next(read_words(tmp_path / "novel.txt"))


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    link = tmp_path / "loop.txt"
    link.symlink_to(link)
    with pytest.raises(UserError, match="must be a file that can be read"):
        next(read_words(link))


# Folders


def test_links_in_a_circle_are_no_corpus(tmp_path, write):
    folder = tmp_path / "circle"
    folder.symlink_to(folder)
    with pytest.raises(UserError, match="which is no folder"):
        load_corpus(folder)
    folder = write()
    (folder / "train.txt").unlink()
    (folder / "train.txt").symlink_to(folder / "train.txt")
    with pytest.raises(UserError, match=r"exactly one \*train\*\.txt"):
        load_corpus(folder)


def test_one_text_in_two_splits_is_told(write, caplog):
    load_corpus(write(train=b"a b\n", valid=b"b a\n", test=b"b a\n"))
    [message] = caplog.messages
    assert message.startswith("valid and test of")
    assert "are the same text" in message


def test_ids_of_a_folder_are_those_worked_by_hand(write):
    data = load_corpus(write())
    assert data.name == "story"
    assert data.vocabulary.words == ("<eos>", "sat", "the", "cat", "dog")
    assert ids_of(data) == IDS
    assert {data.split(split).dtype for split in corpus.SPLITS} == {
        np.dtype(np.int32)
    }
    assert data.sha256 == {
        split: hashlib.sha256(text.encode()).hexdigest()
        for split, text in TEXTS.items()
    }


def test_splits_are_told_by_a_part_of_the_name(write):
    folder = write()
    for split in corpus.SPLITS:
        file = folder / f"{split}.txt"
        file.rename(folder / f"my.{split}.tokens.txt")
    (folder / "train.md").write_text("no text of the corpus")
    (folder / "train-parts.txt").mkdir()
    assert ids_of(load_corpus(str(folder))) == IDS


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_a_folder_needs_one_file_a_split(split, write):
    folder = write()
    shutil.copy(folder / f"{split}.txt", folder / f"{split}2.txt")
    found = rf"exactly one \*{split}\*\.txt; it holds "
    with pytest.raises(UserError, match=rf"{found}{split}.txt, {split}2.txt"):
        load_corpus(folder)
    (folder / f"{split}.txt").unlink()
    (folder / f"{split}2.txt").unlink()
    with pytest.raises(UserError, match=f"{found}none. Add"):
        load_corpus(folder)


def test_one_file_is_not_two_splits(write):
    folder = write()
    (folder / "train.txt").rename(folder / "contest-train.txt")
    (folder / "test.txt").unlink()
    with pytest.raises(
        UserError, match=r"contest-train\.txt is both train and test"
    ):
        load_corpus(folder)


@pytest.mark.parametrize("name", ["story/train.txt", "ptbb"])
def test_what_is_no_folder_is_refused_with_the_names_there_are(name, write):
    source = write().parent / name
    with pytest.raises(UserError, match="python-docs, ptb or a folder") as told:
        load_corpus(source)
    assert repr(str(source)) in str(told.value)


@pytest.mark.parametrize("split", corpus.SPLITS)
@pytest.mark.parametrize("text", ["", " \t ", "\ufeff"], ids=ascii)
def test_a_text_without_words_is_named(text, split, write):
    folder = write(**{split: text})
    with pytest.raises(UserError, match="must hold words; it is empty") as told:
        load_corpus(folder)
    assert str(folder / f"{split}.txt") in str(told.value)


def test_a_text_without_line_ends_ends_once(write):
    data = load_corpus(write(train="a b " * 3, valid="a", test="b"))
    assert words_of(data, "train") == [*"ababab", "<eos>"]
    assert words_of(data, "test") == ["b", "<eos>"]


def test_blank_lines_are_a_corpus_of_one_word(write):
    data = load_corpus(write(train="\n\n\n", valid="\n", test=" \n\n"))
    assert data.vocabulary.words == ("<eos>",)
    assert ids_of(data) == {"train": [0, 0, 0], "valid": [0], "test": [0, 0]}
    assert data.unigram_perplexity() == 1


# Unknown words and the vocabulary's size


def test_words_of_valid_that_train_lacks_become_unk(write):
    data = load_corpus(
        write(train="a <unk> b\n", valid="b z\n", test="y <unk>")
    )
    assert words_of(data, "valid") == ["b", "<unk>", "<eos>"]
    assert words_of(data, "test") == ["<unk>", "<unk>", "<eos>"]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_unknown_words_without_unk_are_counted_and_named(
    split, write, own_cache
):
    with pytest.raises(UserError) as told:
        load_corpus(write(**{split: "a zebra sat\na yak\n"}))
    assert str(told.value).startswith(
        f"In {split}: 4 words (3 distinct) are not in the vocabulary"
    )
    assert "'a', 'zebra', 'yak'. Put '<unk>'" in str(told.value)
    assert names_in(own_cache / "encoded") == []


def test_unknown_words_are_dropped_on_request(write):
    folder = write(valid="a zebra sat\n", test="yak\nyak")
    data = load_corpus(folder, unknown="drop")
    assert words_of(data, "train") == list(read_words(folder / "train.txt"))
    assert words_of(data, "valid") == ["sat", "<eos>"]
    assert words_of(data, "test") == ["<eos>", "<eos>"]


@pytest.mark.parametrize(
    ("arguments", "vocabulary", "train"),
    [
        ({}, "<eos> a b c", "a b a c <eos> a <eos> <eos>"),
        # b and c are <unk>, twice.
        (
            {"min_count": 2},
            "<eos> a <unk>",
            "a <unk> a <unk> <eos> a <eos> <eos>",
        ),
        (
            {"max_vocabulary": 2},
            "<unk> <eos>",
            "<unk> <unk> <unk> <unk> <eos> <unk> <eos> <eos>",
        ),
        ({"max_vocabulary": 1}, "<unk>", 8 * "<unk> "),
        ({"max_vocabulary": 4}, "<eos> a b c", "a b a c <eos> a <eos> <eos>"),
    ],
    ids=str,
)
def test_rare_words_become_unk_on_request(arguments, vocabulary, train, write):
    folder = write(train="a b a c\na\n\n", valid="a", test="a")
    data = load_corpus(folder, **arguments)
    assert data.vocabulary.words == tuple(vocabulary.split())
    assert words_of(data, "train") == train.split()


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("min_count", 0, "a whole number, 1 or more"),
        ("min_count", -1, "a whole number, 1 or more"),
        ("max_vocabulary", 0, "a whole number, 1 or more"),
        ("max_vocabulary", -5, "a whole number, 1 or more"),
        ("max_vocabulary", 5.5, "a whole number, 1 or more"),
        ("unknown", "ignore", "one of error, drop"),
    ],
)
def test_arguments_out_of_range_are_refused(name, value, must, write):
    message = f"`{name}` must be {must}; received {value!r}"
    with pytest.raises(UserError, match=re.escape(message)):
        load_corpus(write(), **{name: value})


# Perplexity of guessing by frequency


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        # In train a has 1/2, b and <eos> have 1/4.
        ("train", (2 * 2 * 4 * 4) ** (1 / 4)),
        ("valid", (2 * 4) ** (1 / 2)),
        ("test", (4 * 4 * 4 * 2 * 4) ** (1 / 5)),
    ],
)
def test_unigram_perplexity_is_that_worked_by_hand(split, expected, write):
    data = load_corpus(write(train="a b a\n", valid="a\n", test="b b b a\n"))
    # float64 throughout.
    np.testing.assert_allclose(
        data.unigram_perplexity(split), expected, rtol=1e-12
    )


def test_another_name_of_a_split_is_refused(write):
    data = load_corpus(write())
    with pytest.raises(UserError, match="train, valid, test; received 'dev'"):
        data.unigram_perplexity("dev")


def test_corpora_are_told_apart(write):
    folder = write()
    first, second = load_corpus(folder), load_corpus(folder)
    assert first != second
    assert len({first, second, first}) == 2


# The embedded corpus


def test_python_docs_is_split_90_5_5():
    data = load_corpus("python-docs")
    sizes = np.array([len(data.split(split)) for split in corpus.SPLITS])
    assert sizes.sum() > 100_000
    # Whole paragraphs are dealt out, of up to 500 words; 1,000 are 0.9 %.
    np.testing.assert_allclose(
        sizes / sizes.sum(), [0.9, 0.05, 0.05], atol=0.015
    )
    assert data.name == "python-docs"
    assert {"<unk>", "<eos>"} <= set(data.vocabulary.words)
    assert data.train.max() == len(data.vocabulary) - 1


def test_paragraphs_of_python_docs_are_dealt_by_their_rule(monkeypatch):
    unique = [f"word{number}" for number in range(22)]
    unique[20] = " long" * 501
    topics = {
        "second": "\n\n".join(["again", *unique[11:]]),
        "first": "\n \n".join([*unique[:11], "again", " "]),
    }
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    texts = corpus._python_docs()
    assert texts["valid"].lines == [["word9", "<eos>"]]
    assert texts["test"].lines == [["word10", "<eos>"], ["word21", "<eos>"]]
    first_words = [line[0] for line in texts["train"].lines]
    assert first_words == [
        *unique[:9],
        *("again", "again"),
        *unique[11:20],
        "long",
    ]


def test_no_line_of_python_docs_is_in_two_splits():
    train, valid, test = (
        {" ".join(line) for line in text.lines}
        for text in corpus._python_docs().values()
    )
    assert len(valid) > 100
    assert len(test) > 100
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_python_docs_is_the_same_in_another_process(own_cache):
    program = (
        "import zlib, multilstm;"
        "data = multilstm.load_corpus('python-docs');"
        "print(data.sha256, zlib.crc32(data.train), data.vocabulary.words)"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {"PYTHONHASHSEED": "1", "MULTILSTM_CACHE": str(own_cache / "other")},
        capture_output=True,
        text=True,
        check=True,
    )
    data = load_corpus("python-docs")
    here = f"{data.sha256} {zlib.crc32(data.train)} {data.vocabulary.words}"
    assert there.stdout.strip() == here


def test_python_docs_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert len(load_corpus("python-docs").train) > 90_000


def test_a_corpus_named_keeps_its_name_beside_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    Path("python-docs").symlink_to("elsewhere")
    assert load_corpus("python-docs").name == "python-docs"


# Penn Treebank


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.path.startswith("/moved/"):
            super().do_GET()
            return
        port = self.server.server_port
        file = self.path.removeprefix("/moved")
        self.send_response(302)
        self.send_header("Location", f"http://127.0.0.2:{port}/good{file}")
        self.end_headers()


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The address of a server on this machine, and a small treebank on it.

    good/ has its files, changed/ has others of these names, missing/ none;
    moved/ leads to good/ by an address that is not https.
    """
    for split, text in TEXTS.items():
        for mirror, content in (("good", text), ("changed", text + "more\n")):
            path = tmp_path / "web" / mirror / f"ptb.{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        monkeypatch.setitem(corpus.PTB_SHA256, f"ptb.{split}.txt", sha256)
    for name in ("NO_PROXY", "no_proxy"):  # requests takes the second first
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.delenv("MULTILSTM_DATA", raising=False)
    handler = functools.partial(QuietHandler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def set_mirrors(web, monkeypatch):
    def set_mirrors(*names):
        mirrors = tuple(f"{web}{name}/" for name in names)
        monkeypatch.setattr(corpus, "PTB_MIRRORS", mirrors)
        return mirrors

    return set_mirrors


def test_ptb_has_several_mirrors():
    assert len(set(corpus.PTB_MIRRORS)) >= 2
    for mirror in corpus.PTB_MIRRORS:
        assert re.fullmatch("https://.+/", mirror)


@pytest.mark.parametrize("first", ["missing", "changed"])
def test_ptb_comes_from_the_second_mirror_where_the_first_fails(
    first, set_mirrors, tmp_path, caplog
):
    mirrors = set_mirrors(first, "good")
    data = load_corpus("ptb", data_folder=tmp_path / "data")
    assert data.name == "ptb"
    assert ids_of(data) == IDS
    assert names_in(tmp_path / "data" / "ptb") == sorted(corpus.PTB_SHA256)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 3
    assert all(mirrors[0] in record.getMessage() for record in warnings)


def test_a_server_that_is_not_there_is_a_mirror_that_fails(
    set_mirrors, tmp_path, monkeypatch
):
    mirrors = set_mirrors("good")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        monkeypatch.setattr(corpus, "PTB_MIRRORS", (closed, *mirrors))
        data = load_corpus("ptb", data_folder=tmp_path / "data")
    assert ids_of(data) == IDS


def test_a_server_that_sends_too_much_is_a_mirror_that_fails(
    set_mirrors, tmp_path, monkeypatch
):
    set_mirrors("good")
    monkeypatch.setattr(corpus, "_LARGEST_DOWNLOAD", 3)
    with pytest.raises(UserError, match="it has over 3 bytes"):
        load_corpus("ptb", data_folder=tmp_path / "data")
    assert names_in(tmp_path / "data" / "ptb") == []


def test_no_damaged_download_is_taken(set_mirrors, web, tmp_path, rng):
    """Bits flipped, bytes left out or put in: each is refused and removed."""
    set_mirrors("good")
    served = tmp_path / "web" / "good" / "ptb.train.txt"
    content = served.read_bytes()
    for number in range(30):
        damaged = bytearray(content)
        place = int(rng.integers(len(content)))
        if number % 3 == 0:
            damaged[place] ^= 1 << number % 8
        elif number % 3 == 1:
            del damaged[place:]
        else:
            damaged[place:place] = b"\0" * (number + 1)
        served.write_bytes(damaged)
        with pytest.raises(UserError, match="hash of downloaded file"):
            load_corpus("ptb", data_folder=tmp_path / "data")
        assert names_in(tmp_path / "data" / "ptb") == []


def test_only_https_is_asked(tmp_path, web, monkeypatch):
    """The first address is refused unasked, the second for where it leads."""
    elsewhere = web.replace("127.0.0.1", "127.0.0.2") + "good/"
    monkeypatch.setattr(corpus, "PTB_MIRRORS", (elsewhere,))
    message = r"127\.0\.0\.2.* is not https"
    with pytest.raises(UserError, match=message):
        load_corpus("ptb", data_folder=tmp_path / "data")
    monkeypatch.setattr(corpus, "PTB_MIRRORS", (f"{web}moved/",))
    with pytest.raises(UserError, match=f"moved/: http://{message}"):
        load_corpus("ptb", data_folder=tmp_path / "data")


def test_folder_that_is_none_is_told_before_a_mirror_is_asked(
    set_mirrors, tmp_path, caplog
):
    set_mirrors("good")
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(UserError, match="must be a folder that can be written"):
        load_corpus("ptb", data_folder=path)
    assert not caplog.messages


def test_address_that_is_not_https_is_asked_nothing(web, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("requests.get", lambda url, **_: asked.append(url))
    address = web.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(ValueError, match="is not https"):
        corpus._fetch(address, str(tmp_path / "file"), None)
    assert not asked


def test_where_every_mirror_fails_each_is_named(set_mirrors, tmp_path):
    mirrors = set_mirrors("missing", "changed")
    with pytest.raises(UserError) as told:
        load_corpus("ptb", data_folder=tmp_path / "data")
    message = str(told.value)
    assert message.startswith("ptb.train.txt must be downloaded and no mirror")
    assert f"{mirrors[0]}: 404" in message
    assert f"{mirrors[1]}: SHA256 hash of downloaded file" in message
    assert f"Put the file into {tmp_path / 'data' / 'ptb'}" in message
    assert names_in(tmp_path / "data" / "ptb") == []


@pytest.mark.parametrize(
    "place",
    ["data_folder", "MULTILSTM_DATA", "MULTILSTM_CACHE", "platformdirs"],
)
def test_ptb_is_downloaded_once_to_the_place_that_is_named(
    place, set_mirrors, tmp_path, monkeypatch
):
    folder = tmp_path / "named"
    arguments = {}
    if place == "data_folder":
        arguments = {"data_folder": folder}
        monkeypatch.setenv("MULTILSTM_DATA", str(tmp_path / "elsewhere"))
    elif place == "platformdirs":
        monkeypatch.delenv("MULTILSTM_CACHE")
        monkeypatch.setattr(
            platformdirs, "user_cache_dir", {"multilstm": folder}.get
        )
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv(place, "~/named")
    set_mirrors("good")
    assert ids_of(load_corpus("ptb", **arguments)) == IDS
    assert names_in(folder / "ptb") == sorted(corpus.PTB_SHA256)
    if place in ("MULTILSTM_CACHE", "platformdirs"):
        assert names_in(folder) == ["encoded", "ptb"]
    set_mirrors()
    assert ids_of(load_corpus("ptb", **arguments)) == IDS


def test_ptb_files_that_are_there_are_checked_and_kept(set_mirrors, tmp_path):
    set_mirrors("good")
    path = tmp_path / "ptb" / "ptb.valid.txt"
    path.parent.mkdir()
    path.write_text("another text\n")
    with pytest.raises(UserError) as told:
        load_corpus("ptb", data_folder=tmp_path)
    message = str(told.value)
    sums = (
        corpus.PTB_SHA256[path.name],
        hashlib.sha256(b"another text\n").hexdigest(),
    )
    assert (
        "{} must have the sha256 {}; it has {}.".format(path, *sums) in message
    )
    assert path.read_text() == "another text\n"


def test_other_files_beside_ptb_do_no_harm(set_mirrors, tmp_path):
    set_mirrors("good")
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.char.train.txt").write_text("t h e\n")
    assert ids_of(load_corpus("ptb", data_folder=tmp_path)) == IDS


def test_known_facts_of_ptb():
    folder = os.environ.get("MULTILSTM_DATA")
    if not folder or not Path(folder, "ptb", "ptb.train.txt").is_file():
        pytest.skip(
            "Penn Treebank may not be carried with this project; "
            "MULTILSTM_DATA names no folder with ptb/ptb.train.txt"
        )
    data = load_corpus("ptb")
    assert len(data.vocabulary) == 10_000
    assert [len(data.split(split)) for split in corpus.SPLITS] == [
        929_589,
        73_760,
        82_430,
    ]
    assert data.train[:5].tolist() == [9970, 9971, 9972, 9974, 9975]
    assert " ".join(words_of(data, "train")[100:110]) == (
        "workers exposed to it more than N years ago researchers"
    )


# The cache


@pytest.fixture
def never_encode(monkeypatch):
    """Call it to have every encoding fail from then on."""

    def never_encode():
        def refuse(*args):
            raise AssertionError("the corpus was encoded")

        monkeypatch.setattr(corpus, "_encode", refuse)

    return never_encode


def cached(own_cache):
    (folder,) = (own_cache / "encoded").iterdir()
    return folder


def test_a_text_is_encoded_once(write, never_encode):
    folder = write()
    first = load_corpus(folder)
    never_encode()
    second = load_corpus(folder)
    assert ids_of(second) == IDS
    assert second.vocabulary == first.vocabulary


def test_the_same_text_in_another_folder_is_not_encoded_again(
    write, never_encode
):
    folder = write()
    load_corpus(folder)
    never_encode()
    copy = folder.rename(folder.with_name("copy"))
    data = load_corpus(copy)
    assert data.name == "copy"
    assert ids_of(data) == IDS


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_a_changed_text_is_encoded_anew(split, write):
    load_corpus(write())
    text = TEXTS[split] + "cat cat\n"
    data = load_corpus(write(**{split: text}))
    assert words_of(data, split) == read_it_whole(text.encode())


def test_text_that_changes_while_it_is_read_is_not_kept(
    write, own_cache, monkeypatch
):
    """Or the ids of another would be taken for it from then on."""
    folder = write()
    encode = corpus._encode

    def change_and_encode(*arguments):
        write(train="cat cat cat mat\n")
        return encode(*arguments)

    monkeypatch.setattr(corpus, "_encode", change_and_encode)
    with pytest.raises(UserError, match=r"train\.txt must stay as it is"):
        load_corpus(folder)
    assert names_in(own_cache / "encoded") == []
    monkeypatch.undo()
    assert ids_of(load_corpus(write())) == IDS


@pytest.mark.skipif(os.name == "nt", reason="it has no umask")
def test_cache_can_be_read_by_whoever_may_read_its_folder(write, own_cache):
    before = os.umask(0o022)
    try:
        load_corpus(write())
    finally:
        os.umask(before)
    (entry,) = (own_cache / "encoded").iterdir()
    assert entry.stat().st_mode & 0o777 == 0o755


def test_what_killed_processes_left_is_removed_after_a_day(write, own_cache):
    old, new = (own_cache / "encoded" / f".new-{age}" for age in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    load_corpus(write())
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize(
    "arguments", [{"min_count": 2}, {"max_vocabulary": 2}], ids=str
)
def test_another_vocabulary_is_not_taken_from_the_cache(arguments, write):
    folder = write(train="a a b c\n", valid="a", test="a")
    assert len(load_corpus(folder).vocabulary) == 4
    assert len(load_corpus(folder, **arguments).vocabulary) == 2


def test_words_once_dropped_are_an_error_where_that_is_asked(write):
    folder = write(valid="zebra")
    load_corpus(folder, unknown="drop")
    with pytest.raises(UserError, match="'zebra'"):
        load_corpus(folder)


def test_ids_are_mapped_from_the_disk_and_read_only(write):
    folder = write()
    for _ in range(2):  # encoded, then cached
        data = load_corpus(folder)
        for split in corpus.SPLITS:
            ids = data.split(split)
            assert isinstance(ids.base, np.memmap)
            with pytest.raises(ValueError, match="read-only"):
                ids[0] = 1


def swap_words(path):
    words = path.read_text()
    path.write_text(words.replace("cat", "cow"))


def make_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.npy", Path.unlink),
        ("train.npy", make_folder),
        ("valid.npy", lambda path: path.write_bytes(b"")),
        ("valid.npy", lambda path: path.write_text("no array")),
        ("test.npy", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("test.npy", lambda path: np.save(path, np.zeros(4, np.int64))),
        ("test.npy", lambda path: np.save(path, np.zeros((2, 2), np.int32))),
        ("vocabulary.json", Path.unlink),
        ("vocabulary.json", lambda path: path.write_text("{")),
        ("valid.npy", lambda path: np.save(path, np.int32([2, 3, 0]))),
        ("train.npy", lambda path: np.save(path, np.int32([2, 4, 0]))),
        ("test.npy", lambda path: np.save(path, np.int32([1, 3, 0, 99]))),
        ("vocabulary.json", swap_words),
        ("checksums.json", Path.unlink),
        ("checksums.json", lambda path: path.write_text("{}")),
    ],
    ids=[
        "missing ids",
        "folder for ids",
        "empty ids",
        "text for ids",
        "cut ids",
        "int64 ids",
        "table of ids",
        "missing vocabulary",
        "broken vocabulary",
        "another id",
        "fewer ids",
        "id of no word",
        "other words",
        "missing checksums",
        "broken checksums",
    ],
)
def test_a_broken_cache_is_encoded_anew_with_one_warning(
    name, damage, write, own_cache, caplog, never_encode
):
    folder = write()
    load_corpus(folder)
    damage(cached(own_cache) / name)
    data = load_corpus(folder)
    assert ids_of(data) == IDS
    assert data.vocabulary.words == ("<eos>", "sat", "the", "cat", "dog")
    (record,) = caplog.records
    assert "Encoding story anew, the cache is bad: " in record.getMessage()
    assert name in record.getMessage()
    never_encode()
    assert ids_of(load_corpus(folder)) == IDS


def test_without_a_cache_folder_ids_are_in_memory(
    write, own_cache, caplog, monkeypatch
):
    (own_cache / "file").write_text("no folder")
    monkeypatch.setenv("MULTILSTM_CACHE", str(own_cache / "file"))
    data = load_corpus(write())
    assert ids_of(data) == IDS
    for split in corpus.SPLITS:
        assert data.split(split).dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            data.split(split)[0] = 1
    (record,) = caplog.records
    assert "in memory, without a cache: " in record.getMessage()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(np.lib.format, "write_array_header_1_0"), (Path, "rename")],
    ids=["write", "rename"],
)
def test_a_full_disk_leaves_the_ids_in_memory_and_nothing_behind(
    owner, name, write, own_cache, caplog, monkeypatch
):
    def fail(*args):
        raise OSError(28, "No space left on device")

    folder = write()
    monkeypatch.setattr(owner, name, fail)
    assert ids_of(load_corpus(folder)) == IDS
    (record,) = caplog.records
    assert "without a cache: [Errno 28] No space" in record.getMessage()
    assert names_in(own_cache / "encoded") == []


def test_two_that_encode_at_once_do_not_disturb_each_other(
    write, own_cache, monkeypatch, caplog
):
    """The second one begins and ends while the first is at it."""
    folder = write()
    encode = corpus._encode
    seconds = []

    def encode_after_another(*args):
        monkeypatch.setattr(corpus, "_encode", encode)
        seconds.append(load_corpus(folder))
        return encode(*args)

    monkeypatch.setattr(corpus, "_encode", encode_after_another)
    first = load_corpus(folder)
    assert ids_of(first) == ids_of(seconds[0]) == IDS
    assert len(names_in(own_cache / "encoded")) == 1
    assert not caplog.records
