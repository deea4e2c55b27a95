"""Text from others, such as names of classes, files and tensors, without control characters of terminals."""

import logging
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any, TextIO

LAYOUT = "\n\t"  # control characters of text of several lines
_COLOR = re.compile(r"(\x1b\[[0-9;]*m)")
_LIBRARIES = ("detectron2", "fvcore", "iopath")


def printable(text: object, kept: str = "") -> str:
    """Return text with an escape such as ``\\x1b`` for each character that is not printable and not in ``kept``."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def print_text(text: object, file: TextIO | None = None) -> None:
    """Print text of several lines that may contain names from others; ``file`` as of ``print``."""
    print(printable(text, LAYOUT), file=file, flush=True)


def shell_command(words: Sequence[str]) -> str:
    """Return a command line to copy into bash; words with control characters become ``$'...'``."""
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_quoted(word) for word in words)


def _ansi_quoted(word: str) -> str:
    def escaped(letter: str) -> str:
        if letter.isprintable() and letter not in "'\\":
            return letter
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))

    return f"$'{''.join(map(escaped, word))}'"


def escape_log_records() -> None:
    """Make the messages of the loggers printable, from now on in this process; libraries may use colours."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "escapes", False):
        return

    def record(*args: Any, **more: Any) -> logging.LogRecord:
        made = factory(*args, **more)
        package = made.name.partition(".")[0]
        if package == "relvit_d2":
            made.msg, made.args = printable(made.getMessage(), LAYOUT), ()
        elif package in _LIBRARIES:
            parts = _COLOR.split(made.getMessage())  # every other part is a colour
            made.msg, made.args = "".join(p if i % 2 else printable(p, LAYOUT) for i, p in enumerate(parts)), ()
        return made

    record.escapes = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


def first_few(names: Sequence[Any]) -> str:
    """Return the first five of ``names``, separated by commas."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
