"""Files that are written whole or not at all, and read with clear errors."""

import errno
import json
import math
import os
import secrets
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from multilstm.errors import UserError, WriteError

# What json, zipfile, NumPy and h5py raise for content that is not theirs.
_BROKEN = (
    *(ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error),
    RuntimeError,  # JSON nested too deep, an encrypted npz
    *(SyntaxError, TypeError, OverflowError, tokenize.TokenError),  # headers
)

# What code meets in a file that is JSON, but not what it was written as.
MISFITS = (
    *(ArithmeticError, AttributeError, LookupError),
    *(TypeError, ValueError),
)

_MOST = 10**18  # frameworks have 64 bits for a number

_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number from 0 to 10**18",
    float: "a finite number",
}

# What some file systems answer, of shared folders among others.
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path that becomes `path` when the block succeeds.

    The file is flushed to the disk before it is renamed, and the folder
    after that, so that after a crash `path` holds either what it held before
    or all of the new content. The temporary name keeps the suffix of `path`,
    which writers go by.

    Raises:
        WriteError: If the system refuses, for a full disk among others.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix, suffix = _temporary_name(path)
        new = path.with_name(f"{prefix}{secrets.token_hex(4)}{suffix}")
        new.touch(exist_ok=False)  # for whom the umask allows
        temporary = new
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush_folder(path.parent)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {reason_of(error)}. What was there "
            "before is still whole. Make room or mend the permissions, and do "
            "it again."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Brings what was written to a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes new names in a folder last through a crash of the system."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(handle)


def check_folder(folder: Path) -> None:
    """Makes a folder and a file in it, before long work that ends there.

    Raises:
        WriteError: If the system refuses.
    """
    trial = folder / f".trial-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise WriteError(
            f"{folder} must be a folder that can be written to; the system "
            f"says: {reason_of(error)}. Name another one or mend the "
            "permissions."
        ) from error


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of `replacing(path)`.

    Only where no other process writes to `path` now.
    """
    prefix, suffix = _temporary_name(path)
    for leftover in path.parent.glob(f"{prefix}????????{suffix}"):
        leftover.unlink(missing_ok=True)


def _temporary_name(path: Path) -> tuple[str, str]:
    """Prefix and suffix around eight letters at random."""
    return f".{path.stem}-", "".join(path.suffixes)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def finite_or_none(content: Any) -> Any:
    """The same with None for every number that JSON has no word for.

    >>> finite_or_none({"perplexity": math.inf, "history": [1.5]})
    {'perplexity': None, 'history': [1.5]}
    """
    if isinstance(content, dict):
        return {key: finite_or_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_or_none(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def read_json(path: Path, *, schema: str) -> dict[str, Any]:
    """Reads a JSON object that names its schema.

    Raises:
        UserError: If the file is missing, broken or of another schema.
    """
    content = read_or_explain(
        path, lambda: json.loads(path.read_bytes(), parse_constant=_refuse)
    )
    found = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(content, dict) or found != schema:
        raise UserError(
            f"{path} must have the schema {schema!r}; it has {found!r}. "
            "It is not a file of this kind, or of another version."
        )
    return content


def _refuse(word: str) -> None:
    """NaN or Infinity, which Python reads and JSON has not."""
    raise ValueError(f"{word} is no JSON")


def check_kinds(values: dict[str, Any], described_by: type, where: str) -> None:
    """Refuses values that are not of the kinds that a class names.

    Args:
        values: By name; others than the class has are let pass.
        described_by: A dataclass: its annotations are of texts, words of a
            `Literal`, numbers, of which the whole ones are counts, several of
            these, or None.
        where: What the message says that they are of.

    Raises:
        UserError: Names the first one that is not.
    """
    for name, kind in get_type_hints(described_by).items():
        if name in values and not _is_of(values[name], kind):
            raise UserError(
                f"`{name}` of {where} must be {_in_words(kind)}; received "
                f"{repr(values[name])[:80]}."
            )


def _is_of(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):  # which one, the kinds decide
        return any(_is_of(value, one) for one in inner)
    if origin is Sequence:
        is_list = isinstance(value, list | tuple)
        return is_list and all(_is_of(item, inner[0]) for item in value)
    if kind is float and isinstance(value, float):
        return math.isfinite(value)
    if kind in (int, float):  # JSON has whole numbers of any size, and bools
        least = 0 if kind is int else -_MOST
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and least <= value <= _MOST
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin in (Union, UnionType):  # which one, the kinds decide
        # A setting that is not given, which nobody needs to be told.
        return " or ".join(_in_words(k) for k in inner if k is not NoneType)
    if origin is Sequence:
        return f"a list, each of it {_in_words(inner[0])}"
    return _KINDS[kind]


def read_or_explain(path: Path, read: Callable[[], Any]) -> Any:
    """Calls `read`; a missing or broken file becomes a `UserError`."""
    try:
        return read()
    except OSError as error:
        raise unreadable(path, error) from error
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} cannot be read, it is broken or of another kind: "
            f"{reason[:300]}"
        ) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """What to say where the system does not let a file be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} is needed and does not exist.")
    return UserError(
        f"{path} must be a file that can be read; the system says: "
        f"{reason_of(error)}. Look at its permissions and where it leads."
    )


def reason_of(error: OSError) -> str:
    """What the system says, without the path that Python adds."""
    return os.strerror(error.errno) if error.errno else str(error)


def cache_folder() -> Path:
    """`MULTILSTM_CACHE`, else the user's cache folder of this system."""
    named = os.environ.get("MULTILSTM_CACHE")
    if named:
        return Path(named).expanduser()
    import platformdirs  # which a machine that only measures may not have

    return Path(platformdirs.user_cache_dir("multilstm"))
