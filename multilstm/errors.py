"""The exceptions for what the person at the keyboard can mend."""

from numbers import Integral
from typing import Any


class UserError(ValueError):
    """Bad input, told in one line: what is needed, what was given, what to do.

    The command line prints its message without a traceback and exits with
    status 1. It is a `ValueError`, so that callers of the library need not
    know it.
    """


class WriteError(UserError, OSError):
    """A file that the system did not let us write: full, forbidden, gone."""


def check_whole(name: str, value: Any, least: int) -> int:
    """Gives a whole number, of Python's or NumPy's, as one of Python's.

    Raises:
        UserError: If it is none, or below `least`.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise UserError(
            f"`{name}` must be a whole number, {least} or more; received "
            f"{value!r}."
        )
    return int(value)
