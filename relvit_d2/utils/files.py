"""Atomic writes of files, and checks of output paths."""

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
    """Yield a temporary path in the folder of ``path``; after the block, flush it to disk and rename it to ``path``.

    On an error the temporary file is removed and ``path`` is unchanged. The temporary name contains the process ID.

    Raises:
        NotWrittenError: the disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise NotWrittenError(
            f"'{path}' could not be written ({error.strerror or error}); an existing file is unchanged: free space "
            "or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_target(target: Path, *suffixes: str) -> None:
    """Raise a :class:`UserError` if the folder of an output file is missing, or its suffix is none of ``suffixes``."""
    if suffixes and target.suffix not in suffixes:
        raise UserError(f"'{target}' does not end in {' or '.join(suffixes)}: rename it")
    if not target.parent.is_dir():
        raise UserError(f"the folder '{target.parent}' of '{target.name}' does not exist; create it first")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they do not exist.

    Raises:
        UserError: it is a file or cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be created ({error.strerror}); choose another folder") from error


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes from ``folder``, not from its sub-folders."""
    for part in folder.glob(".*.part"):
        number = part.name.split(".")[-2]
        if not (number.isdecimal() and is_other_process(int(number))):
            part.unlink(missing_ok=True)


def is_other_process(pid: int) -> bool:
    """Whether a process of this machine, other than this one, has the ID ``pid``; on Windows this is assumed."""
    if os.name == "nt":  # where os.kill ends the process
        return pid != os.getpid()
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # in a container process IDs repeat


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes for writing only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8; undecodable bytes of file names (surrogate escapes) are kept."""
    with appearing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, NaN and infinity as null; a missing folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
