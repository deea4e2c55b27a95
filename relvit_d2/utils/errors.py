"""Exceptions for errors that the user can correct."""


class UserError(Exception):
    """Error in the input of the user: a file, a key, a class, an argument.

    The message is one sentence that names the cause and the correction. Commands print it and exit with status 1, or
    with ``RELVIT_DEBUG=1`` print the traceback. Line breaks, as in names of files and classes, are replaced by spaces
    and unprintable characters by escapes, such as ``\\x1b``.
    """

    def __init__(self, message: object) -> None:
        text = " ".join(str(message).splitlines())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


class NotWrittenError(UserError):
    """A file could not be written; commands with ``--resume`` add how to continue."""


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``"; did you mean 'X'?"`` for the entry of ``known`` most similar to ``word``, or ``""``."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
