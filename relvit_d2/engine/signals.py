"""Handling of SIGINT (Ctrl-C) and SIGTERM (Slurm): a run finishes the iteration and saves it before it ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from relvit_d2.utils.processes import process_group

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Raised by a signal; ``number`` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    received = 0
    deferring = False
    patient = False


def install(patient: bool) -> None:
    """Install handlers of SIGINT and SIGTERM in this process.

    A signal raises :class:`Interrupted`; inside :func:`deferred` it is only recorded. A second one always raises.

    Args:
        patient: ignore all signals after the first. Child processes get Ctrl-C from the terminal and again from their
            parent.
    """
    _State.received, _State.deferring, _State.patient = 0, False, patient
    for number in SIGNALS:
        signal.signal(number, _handle)


@contextmanager
def installed() -> Iterator[None]:
    """Install the handlers for the block, and restore the earlier ones; other threads than the main one have none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    install(patient=False)
    try:
        yield
    finally:
        forget()  # a later call, perhaps in another thread, is not interrupted by it
        for number, handler in before.items():
            if handler is not None:  # None: not installed by Python
                signal.signal(number, handler)


def uninstall() -> None:
    """Restore the default: signals end this process immediately."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def forget() -> None:
    """Forget the recorded signal."""
    _State.received = 0


def received() -> int:
    """Return the number of the recorded signal, 0 for none."""
    return _State.received


@contextmanager
def deferred() -> Iterator[None]:
    """Record a signal inside the block instead of raising; the caller checks :func:`received`."""
    before, _State.deferring = _State.deferring, True
    try:
        yield
    finally:
        _State.deferring = before


@contextmanager
def immediate() -> Iterator[None]:
    """Inside :func:`deferred`: a block that a signal interrupts.

    Raises:
        Interrupted: a signal was recorded before, or arrives inside the block.
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
        with suppress(OSError):  # the terminal is closed
            # Not print: Python's streams are not reentrant.
            os.write(2, b"finishing this iteration; repeat the signal to end immediately\n")
    if (first and not _State.deferring) or not (first or _State.patient):
        raise Interrupted(number)
