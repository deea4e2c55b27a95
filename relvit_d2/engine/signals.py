"""Ctrl-C and SIGTERM, which Slurm sends: the running iteration is finished and kept before the process ends."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from relvit_d2.utils.processes import process_group

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The run was asked to end; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    received = 0
    deferring = False
    patient = False


def install(patient: bool) -> None:
    """Handle SIGINT and SIGTERM in this process from here on.

    A signal raises :class:`Interrupted`, or is only noted inside :func:`deferred`. A second one raises in any case.

    Args:
        patient: ignore all signals after the first: a terminal sends Ctrl-C to every process of a run, and the process
            that started this one passes it on once more.
    """
    _State.received, _State.deferring, _State.patient = 0, False, patient
    for number in _SIGNALS:
        signal.signal(number, _handle)


def uninstall() -> None:
    """Let the signals end this process at once, as they do by default."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def received() -> int:
    """Return the number of the signal that was noted, 0 for none."""
    return _State.received


@contextmanager
def deferred() -> Iterator[None]:
    """Only note a signal inside the block; who opened the block asks :func:`received` in time."""
    before, _State.deferring = _State.deferring, True
    try:
        yield
    finally:
        _State.deferring = before


@contextmanager
def immediate() -> Iterator[None]:
    """Inside :func:`deferred`, a stretch that a signal may cut short.

    Raises:
        Interrupted: at once if a signal was noted before.
    """
    if _State.received:
        raise Interrupted(_State.received)
    before, _State.deferring = _State.deferring, False
    try:
        yield
    finally:
        _State.deferring = before


def _handle(number: int, frame: FrameType | None) -> None:
    first = not _State.received
    _State.received = _State.received or number
    group = process_group()
    if first and _State.deferring and (group is None or group.get_rank() == 0):
        with suppress(OSError):  # a terminal that is gone
            # Python's streams refuse a write that interrupts another.
            os.write(2, b"finishing this iteration; once more ends at once\n")
    if (first and not _State.deferring) or not (first or _State.patient):
        raise Interrupted(number)
