"""Files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; on leaving, flush it to the disk and rename it.

    If the block or the flush fails, the temporary file is removed and what was at ``path`` stays. The name holds the
    process's number, so that two processes do not meet.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``."""
    with appearing(path) as part:
        part.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")
