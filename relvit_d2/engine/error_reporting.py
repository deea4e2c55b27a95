"""Error messages of a failed command: one sentence, printed by one process.

Does not import torch, since usage errors are reported before it is loaded.
"""

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from relvit_d2.engine import signals
from relvit_d2.utils.errors import ResumableError, UserError, resource_error
from relvit_d2.utils.printing import escape_log_records, print_text
from relvit_d2.utils.processes import process_group

# Seconds that a process waits after a lost connection, since the error of the other process is the cause.
_LOST_DELAY = 10.0
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection refused")


def guard(function: Callable[[], int | None], resumes: bool = False) -> int:
    """Run ``function``, print the error that it raises, and return the exit status.

    The status is that returned by ``function`` (0 for None); 1 after a :class:`UserError`, whose message is printed
    (its traceback with ``RELVIT_DEBUG=1``); 128 + the signal's number after SIGINT or SIGTERM. Of several processes
    only the first that fails prints. Characters that the terminal cannot encode are escaped, such as ``\\u4e2d``.

    Args:
        resumes: whether the command has ``--resume``, which the message recommends if a file could not be written.

    Raises:
        Exception: an unexpected error, unless this is one of several processes (``LOCAL_RANK`` is set).
    """
    escape_log_records()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_arguments()
        return function() or 0
    except UserError as error:
        if is_first_failure():
            print_error(_with_resume(error) if resumes and isinstance(error, ResumableError) else error)
        return 1
    except (signals.Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, signals.Interrupted) else signal.SIGINT
        if is_first_failure():
            print_text(f"stopped by {signal.Signals(number).name}", sys.stderr)
        return 128 + number
    except Exception as error:
        if resource := resource_error(error):
            if is_first_failure():
                resource.__cause__ = error
                print_error(_with_resume(resource) if resumes else resource)
        elif "LOCAL_RANK" not in os.environ:
            raise
        elif isinstance(error, RuntimeError) and any(message in str(error) for message in _LOST):
            _print_lost_connection(error)
        elif is_first_failure():
            print_text("".join(traceback.format_exception(error)), sys.stderr)
        return 1


def _check_arguments() -> None:
    """Raise a :class:`UserError` for an argument, such as a file name, that is invalid in the locale's encoding."""
    for argument in sys.argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the argument {os.fsencode(argument)!r} is not valid in the encoding of this locale, "
                f"{sys.getfilesystemencoding()}: set the environment variable PYTHONUTF8=1 if it is UTF-8, else rename "
                "the file"
            ) from error


def _with_resume(error: ResumableError) -> ResumableError:
    error.args = (f"{error}, then continue with --resume",)
    return error


def print_error(error: UserError) -> None:
    """Print the message of ``error``, or with ``RELVIT_DEBUG=1`` its traceback."""
    if os.environ.get("RELVIT_DEBUG") == "1":
        print_text(error.details + "".join(traceback.format_exception(error)), sys.stderr)
    else:
        print_text(f"error: {error}", sys.stderr)


def is_first_failure() -> bool:
    """Whether this failed process prints the error: the first one that calls this function.

    Before the process group exists, it is the process of local rank 0.
    """
    group = process_group()
    if group is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    signals.uninstall()  # so that the parent process can end this one
    try:
        return group.distributed_c10d._get_default_store().add("relvit_d2/failed", 1) == 1
    except RuntimeError:  # the process of the store has failed before
        return False


def _print_lost_connection(error: Exception) -> None:
    if signals.received():  # the parent process ends all processes and prints the reason
        return
    time.sleep(_LOST_DELAY)
    if is_first_failure():
        reason = str(error).strip().splitlines()[0]
        print_error(
            UserError(
                f"process {process_group().get_rank()} lost the connection to another one ({reason}); "
                "see the output of that process"
            )
        )
