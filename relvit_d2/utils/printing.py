"""Text from others, such as names of classes, files and tensors, without control characters of terminals."""

import logging
import os
import shlex
from collections.abc import Sequence
from typing import Any

_LAYOUT = "\n\t"


def printable(text: object, kept: str = "") -> str:
    """Return text with an escape such as ``\\x1b`` for each character that is not printable and not in ``kept``."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in str(text))


def print_text(text: object) -> None:
    """Print text of several lines that may contain names from others."""
    print(printable(text, _LAYOUT), flush=True)


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
    """Make the messages of the package's loggers printable, from now on in this process."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "escapes", False):
        return

    def record(*args: Any, **more: Any) -> logging.LogRecord:
        made = factory(*args, **more)
        if made.name.partition(".")[0] == "relvit_d2":
            made.msg, made.args = printable(made.getMessage(), _LAYOUT), ()
        return made

    record.escapes = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)
