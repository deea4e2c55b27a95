"""What the user reads when a run fails: one sentence, from one process.

Imports no torch: usage errors are reported before it is loaded.
"""

import errno
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from relvit_d2.engine import signals
from relvit_d2.utils.errors import NotWrittenError, UserError
from relvit_d2.utils.printing import escape_log_records
from relvit_d2.utils.processes import process_group

# How long a process that lost another waits before it speaks: the other one's sentence is the true reason.
_PATIENCE = 5.0  # seconds
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection refused")


def guard(function: Callable[[], int | None], resumes: bool = False) -> int:
    """Run ``function``, tell the user what ended it before its time, and return the exit status.

    Characters that the terminal's encoding lacks are printed as their escape, such as ``\\u4e2d``.

    That is the one that ``function`` returned, 0 for None; 1 after a :class:`UserError`, whose sentence is printed
    (``RELVIT_DEBUG=1``: its traceback); 128 and the signal's number after Ctrl-C and SIGTERM. With several processes
    the first that fails speaks, the others are silent.

    Args:
        function: the work.
        resumes: whether the script takes ``--resume``, which is advised where a file could not be written.

    Raises:
        Exception: what is a defect, with a single process.
    """
    escape_log_records()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_arguments()
        return function() or 0
    except UserError as error:
        if may_tell():
            print_error(_with_resume(error) if resumes and isinstance(error, NotWrittenError) else error)
        return 1
    except (signals.Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, signals.Interrupted) else signal.SIGINT
        if may_tell():
            print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            if may_tell():
                name = f"'{error.filename}'" if error.filename else "a file"
                sentence = NotWrittenError(f"{name} could not be written ({error.strerror}): free space")
                print_error(_with_resume(sentence) if resumes else sentence)
        elif (group := process_group()) is None or group.get_world_size() == 1:
            raise
        elif _lost_another(error):
            _tell_of_loss(error)
        elif may_tell():
            traceback.print_exception(error)
        return 1


def _check_arguments() -> None:
    """Refuse arguments that are not text, as file names are that the locale's encoding does not decode."""
    for word in sys.argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the argument {os.fsencode(word)!r} is not valid in the encoding of this locale, "
                f"{sys.getfilesystemencoding()}: set the environment variable PYTHONUTF8=1 if it is UTF-8, else rename "
                "the file"
            ) from error


def _with_resume(error: NotWrittenError) -> UserError:
    advice = NotWrittenError(f"{error}, then go on with --resume")
    return advice.with_traceback(error.__traceback__)


def print_error(error: UserError) -> None:
    """Print the sentence of ``error``, or with ``RELVIT_DEBUG=1`` its traceback."""
    if os.environ.get("RELVIT_DEBUG") == "1":
        traceback.print_exception(error)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)


def may_tell() -> bool:
    """Whether this process, which failed, is the one that tells the user: the first that asks.

    Before the processes have met, it is the first of each machine.
    """
    group = process_group()
    if group is None:
        return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["LOCAL_RANK"] == "0"
    signals.uninstall()  # who started the processes now ends them all
    try:
        return group.distributed_c10d._get_default_store().add("relvit_d2/failed", 1) == 1
    except RuntimeError:  # the process that kept the store is gone, so it told
        return False


def _lost_another(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


def _tell_of_loss(error: Exception) -> None:
    if signals.received():  # who started the processes ends them all and tells why
        return
    time.sleep(_PATIENCE)
    if may_tell():
        reason = str(error).strip().splitlines()[0]
        print_error(
            UserError(f"process {process_group().get_rank()} lost another one ({reason}); see what that one printed")
        )
