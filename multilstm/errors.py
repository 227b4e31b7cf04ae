"""The exceptions for what the person at the keyboard can mend."""


class UserError(ValueError):
    """Bad input, told in one line: what is needed, what was given, what to do.

    The command line prints its message without a traceback and exits with
    status 1. It is a `ValueError`, so that callers of the library need not
    know it.
    """


class WriteError(UserError, OSError):
    """A file that the system did not let us write: full, forbidden, gone."""
