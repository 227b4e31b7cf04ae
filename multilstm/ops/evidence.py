"""Which LSTM implementation ran, noted by the implementation as it runs.

Under `jit` and `tf.function` an implementation runs while it is traced: what
is noted is what went into the program. On PyTorch it is the operation that
the dispatcher called.
"""

import logging

logger = logging.getLogger("multilstm.ops")

_last_kernel: str | None = None
_explained: set[str] = set()


def last_kernel() -> str | None:
    """The LSTM implementation that ran last in this process.

    Returns:
        Backend and implementation, such as `"torch: onednn"`; None if no LSTM
        of multilstm has run yet.
    """
    return _last_kernel


def note_kernel(kernel: str) -> None:
    """Notes, from within an implementation, that it runs."""
    global _last_kernel
    _last_kernel = kernel


def explain_once(reason: str) -> None:
    """Says once in a process why something is not on the fastest path."""
    if reason not in _explained:
        _explained.add(reason)
        logger.warning(reason)


def explanations() -> list[str]:
    """What `explain_once` has said in this process."""
    return sorted(_explained)
