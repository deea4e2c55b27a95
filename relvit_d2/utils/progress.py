"""Progress bars, which are lines of text where the output is not a terminal."""

import sys
from typing import Any

from tqdm import tqdm

_LINE = "{desc}: {percentage:.0f} % ({n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left){postfix}"


class Progress(tqdm):
    """A tqdm bar on a terminal; elsewhere, as in a log file, a line for each tenth of the total.

    Args:
        kwargs: those of tqdm.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lines, self._tenth = not sys.stderr.isatty(), -1
        if self._lines:
            kwargs |= {"bar_format": _LINE, "leave": False, "mininterval": 0, "miniters": 1}
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print a line if another tenth is reached."""
        if not self._lines:
            return super().display(msg, pos)
        tenth = 10 * self.n // self.total if self.total else -1
        if msg is None and tenth > self._tenth:
            self._tenth = tenth
            print(str(self).strip(), file=self.fp, flush=True)
        return False  # nothing is on the current line
