"""What frameworks raise for want of memory and for lost devices, explained.

Each framework has exceptions of its own for the two, some of them only a word
in a message. Here they are told by name and text, so none is imported.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from multilstm.errors import UserError
from multilstm.launch import was_launched

_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|OOM when allocating"
    r"|can't allocate memory|not enough memory|Unable to allocate",
    re.IGNORECASE,
)
_PROCESS_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|\bgloo\b|NCCL error"
    r"|Collective ops is aborted"
)
_DEVICE_LOST = re.compile(
    r"CUDA_ERROR|CUDA error|CUDA driver error|GPU is lost|device.{0,20}lost"
    r"|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
)


_WRONG_BUILD = re.compile(r"no kernel image|CUDA_ERROR_NO_BINARY_FOR_GPU")
# Errors of CUDA that a fault of the program leads to.
_FAULT = re.compile(r"device-side assert|invalid device ordinal")


class OutOfMemoryError(UserError):
    """Model and batch do not fit into the memory of the device."""


class DeviceLostError(UserError):
    """The device failed, and what was on it is lost."""


class ProcessLostError(DeviceLostError):
    """Another process of the run ended."""


@contextmanager
def explaining_failures() -> Iterator[None]:
    """Gives a failure of the machine one line that says what to do.

    Raises:
        OutOfMemoryError: For memory that was refused, by NumPy or by any of
            the frameworks.
        DeviceLostError: For a GPU that failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        failure = explain_failure(error)
        if failure is None:
            raise
        raise failure from error


def explain_failure(error: BaseException) -> UserError | None:
    """The failure of the machine that an exception tells of, if it is one."""
    first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
    said = f"{type(error).__name__}: {first_line[:200]}"
    # Memory first: CUDA tells of it as an error of its own.
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return OutOfMemoryError(
            f"The model and a batch must fit into memory; they do not ({said})."
            " Lower --batch-size, with --gradient-accumulation-steps for the "
            "same step, then --sequence-length, or take a smaller preset; for "
            "many words also --max-vocabulary or --softmax sampled. The last "
            "checkpoint, if there was one, is kept."
        )
    if _WRONG_BUILD.search(str(error)):
        return UserError(
            f"The framework must be built for this GPU; it is not ({said}). "
            "Install a build for it (multilstm doctor), or train on the "
            "processor with CUDA_VISIBLE_DEVICES=-1."
        )
    if _FAULT.search(str(error)):
        return None
    if _DEVICE_LOST.search(str(error)):
        return DeviceLostError(
            f"The device must last as long as the run; it failed ({said}). "
            "The last checkpoint, if there was one, is kept. Look at the "
            "driver (nvidia-smi, dmesg) and go on with --resume, in a new "
            "process."
        )
    if was_launched() and _PROCESS_LOST.search(str(error)):
        return ProcessLostError(
            f"All processes of a run must live; another one ended ({said}). Go "
            "on from the last checkpoint with --resume, on any number of "
            "devices."
        )
    return None
