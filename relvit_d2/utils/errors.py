"""Exceptions for errors that the user can correct; does not import torch."""

import errno

from relvit_d2.utils.printing import printable

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
# Messages of torch's allocators.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")


class UserError(Exception):
    """Error in the input of the user: a file, a key, a class, an argument.

    The message is one sentence that names the cause and the correction. Commands print it and exit with status 1, or
    with ``RELVIT_DEBUG=1`` print the traceback. Line breaks, as in names of files and classes, are replaced by spaces
    and unprintable characters by escapes, such as ``\\x1b``.

    Attributes:
        details: the traceback, if the error was raised in another process.
    """

    details = ""

    def __init__(self, message: object) -> None:
        super().__init__(printable(" ".join(str(message).splitlines())))


class ResumableError(UserError):
    """The run ended for lack of a resource; commands with ``--resume`` add how to continue."""


class NotWrittenError(ResumableError):
    """A file could not be written."""


def one_line(error: BaseException, length: int | None = None) -> str:
    """Return the message of an exception without line breaks, cut to ``length`` characters if given."""
    return " ".join(str(error).split())[:length]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the operating system, or torch on a CPU or a GPU reported a lack of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _NO_MEMORY)
    )


def resource_error(error: BaseException) -> ResumableError | None:
    """Return the error for an exception by lack of memory, disk space or file descriptors, None for others."""
    if is_out_of_memory(error):
        return ResumableError(
            "out of memory: lower SOLVER.IMS_PER_BATCH, raise SOLVER.GRAD_ACCUM_STEPS, or lower DATALOADER.NUM_WORKERS"
        )
    if not isinstance(error, OSError):
        return None
    if error.errno in _NO_DESCRIPTOR:
        return ResumableError(f"too many files are open ({error.strerror}): raise the limit, such as ulimit -n 4096")
    if error.errno in _NO_SPACE:
        name = f"'{error.filename}'" if error.filename else "a file"
        return NotWrittenError(f"{name} could not be written ({error.strerror}): free space")
    return None


def defect(what: str, error: Exception) -> UserError:
    """Return the error for an unexpected exception in the work on ``what``."""
    return UserError(f"{what} failed ({type(error).__name__}: {error}); RELVIT_DEBUG=1 prints the traceback")


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``"; did you mean 'X'?"`` for the entry of ``known`` most similar to ``word``, or ``""``."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
