"""Lock of an output folder, so that one training at a time writes into it."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.utils import comm
from filelock import FileLock, Timeout

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import is_other_process, write_json

# Seconds to wait for the lock, which loader processes of a killed run hold until they end.
_WAIT = 5.0

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold the lock of ``output`` in the first process of a training; the folder is created.

    The operating system releases the lock when its process ends. ``.run.json`` contains host and ID of the process, for
    messages. If a folder is shared between machines without a common lock, another machine's ``.run.json`` is reported.

    Raises:
        UserError: another training holds it.
    """
    if not comm.is_main_process() or not _acquire(lock := FileLock(output / ".run.lock", timeout=_WAIT), output):
        yield
        return
    holder = output / ".run.json"
    try:
        _report_previous(output, _read(holder))
        write_json(holder, {"host": socket.gethostname(), "process": os.getpid()})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, output: Path) -> bool:
    """Take the lock; return whether the file system has locks."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        host, process = _read(output / ".run.json") or ("an unknown machine", "of unknown number")
        raise UserError(
            f"OUTPUT_DIR '{output}' is in use by another training, process {process} on {host}: wait for its end, end "
            "it, or choose another OUTPUT_DIR"
        ) from error
    except (OSError, NotImplementedError, ValueError) as error:
        # A folder that cannot be written is reported at the start of the run.
        logger.warning(f"OUTPUT_DIR '{output}' cannot be locked ({error}): whether another run uses it is not known")
        return False
    return True


def _read(path: Path) -> tuple[str, int] | None:
    """Return host and process ID of a training that has not ended regularly."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return str(entry["host"]), int(entry["process"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _report_previous(output: Path, holder: tuple[str, int] | None) -> None:
    """Log whether the previous training ended, which the lock does not show for another machine."""
    if holder is None:
        return
    host, process = holder
    if host != socket.gethostname():
        logger.warning(
            f"OUTPUT_DIR '{output}' was in use by process {process} on {host}; whether it has ended cannot be known "
            "here: make sure that only one training writes to the folder"
        )
    elif is_other_process(process):
        logger.warning(f"OUTPUT_DIR '{output}' was in use by process {process}, which exists but holds no lock")
    else:
        logger.warning(f"the previous training in '{output}', process {process}, ended without releasing its lock")
