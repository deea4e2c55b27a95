"""The one exception class for faults that a user can mend."""

from relvit_d2.utils.printing import printable


class UserError(Exception):
    """A fault in what the user gave: a file, a key, a class, an argument.

    The message is one sentence that names the thing and the mend. The scripts catch it once,
    print it and end with exit status 1; ``RELVIT_DEBUG=1`` shows the traceback instead. Line breaks, which names of
    files and classes may hold, become blanks, and what cannot be printed its escape: ``\\x1b``.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(" ".join(str(message).splitlines())))


class NotWrittenError(UserError):
    """A file that could not be written; a script that can resume its run adds how."""


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``"; did you mean 'X'?"`` for the entry of ``known`` most like ``word``, else ``""``."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
