"""Files that appear whole or not at all."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from relvit_d2.utils.errors import NotWrittenError, UserError


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; on leaving, flush it to the disk and rename it.

    If the block or the flush fails, the temporary file is removed and what was at ``path`` stays. The name holds the
    process's number, so that two processes do not meet.

    Raises:
        NotWrittenError: if the disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise NotWrittenError(
            f"'{path}' could not be written ({error.strerror or error}); what was there is untouched: free space or "
            "choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_target(target: Path, *suffixes: str) -> None:
    """Refuse, before anything is computed, a file that cannot be written.

    Args:
        target: the file.
        suffixes: allowed endings of its name; none: any.

    Raises:
        UserError: if the folder is missing or the name does not end in one of ``suffixes``.
    """
    if suffixes and target.suffix not in suffixes:
        raise UserError(f"'{target}' is written as {' or '.join(suffixes)}: name it so")
    if not target.parent.is_dir():
        raise UserError(f"the folder '{target.parent}' of '{target.name}' does not exist; make it first")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        UserError: if it is a file or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be made ({error.strerror}); choose another folder") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while writing left in ``folder``, not below; a living one's files stay."""
    for part in folder.glob(".*.part"):
        number = part.name.split(".")[-2]
        if not (number.isdecimal() and _is_another_alive(int(number))):
            part.unlink(missing_ok=True)


def _is_another_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # in a container a new run often has the number of the old one


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8; bytes of file names that are not text are written as they are."""
    with appearing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, NaN and infinity as null; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
