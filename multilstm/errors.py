"""The one exception for mistakes that the person at the keyboard can mend."""


class UserError(ValueError):
    """Bad input, told in one line: what is needed, what was given, what to do.

    The command line prints its message without a traceback and exits with
    status 1. It is a `ValueError`, so that callers of the library need not
    know it.
    """
