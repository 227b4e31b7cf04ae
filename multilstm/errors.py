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


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuses what is no whole number, of Python's or NumPy's, or below.

    Raises:
        UserError: As it says.
    """
    if not isinstance(value, Integral) or value < least:
        raise UserError(
            f"`{name}` must be a whole number, {least} or more; received "
            f"{value!r}."
        )
