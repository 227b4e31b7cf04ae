"""Files that are written whole or not at all, and read with clear errors."""

import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multilstm.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path that becomes `path` when the block succeeds.

    The file is flushed to the disk before it is renamed, so that after a
    crash `path` holds either what it held before or all of the new content.
    The temporary name keeps the suffix of `path`, which writers go by.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}-", suffix="".join(path.suffixes)
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    content = read_or_explain(path, lambda: json.loads(path.read_bytes()))
    found = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(content, dict) or found != schema:
        raise UserError(
            f"{path} must have the schema {schema!r}; it has {found!r}. "
            "It is not a file of this kind, or of another version."
        )
    return content


def read_or_explain(path: Path, read: Callable[[], Any]) -> Any:
    """Calls `read`; a missing or broken file becomes a `UserError`."""
    try:
        return read()
    except FileNotFoundError as error:
        raise UserError(f"{path} is needed and does not exist.") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read, it is broken or of another kind: {error}"
        ) from error


def cache_folder() -> Path:
    """`MULTILSTM_CACHE`, else the user's cache folder of this system."""
    named = os.environ.get("MULTILSTM_CACHE")
    if named:
        return Path(named).expanduser()
    import platformdirs  # which a machine that only measures may not have

    return Path(platformdirs.user_cache_dir("multilstm"))


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
