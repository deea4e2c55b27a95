"""Execution of a command in the process of a caller, such as a notebook or a script."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout

from detectron2.utils.logger import _cached_log_stream, setup_logger
from tqdm.auto import tqdm

from relvit_d2.engine import signals
from relvit_d2.engine.run_setup import LOGGERS
from relvit_d2.engine.writers import bar_title
from relvit_d2.utils.printing import escape_log_records


@contextmanager
def in_process(title: str, command: Sequence[str]) -> Iterator[None]:
    """Run a command of relvit-d2 inside the block with a progress bar; its log lines are in its files only.

    Warnings are printed to stderr. Signal handlers, loggers and ``sys.argv`` are those of the caller again afterwards.
    SIGINT and SIGTERM end a training after the current iteration, which is saved, and then reach the caller's handler.

    Args:
        title: text beside the progress bar.
        command: name of the command and its arguments, for the files of the run.

    Raises:
        KeyboardInterrupt: a signal arrived.
    """
    escape_log_records()
    try:
        with ExitStack() as stack:
            stack.enter_context(signals.installed())
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            stack.enter_context(_loggers())
            stack.callback(bar_title.reset, bar_title.set(title))
            stack.callback(setattr, sys, "argv", sys.argv)
            stack.callback(setattr, logging, "raiseExceptions", logging.raiseExceptions)
            sys.argv = ["relvit-d2", *command]
            yield
    except signals.Interrupted as stop:
        signal.raise_signal(stop.number)
        raise KeyboardInterrupt from stop


class _Warnings(logging.Handler):
    """Prints warnings beside a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _loggers() -> Iterator[None]:
    """Remove the handlers that the block adds, and close their files."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    _forget_log_files()
    warnings = _Warnings(logging.WARNING)
    loggers[0].addHandler(warnings)
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler) and handler not in handlers:
                    handler.stream.close()
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        _forget_log_files()


def _forget_log_files() -> None:
    """Let Detectron2 add handlers again, and open files again that it has open."""
    setup_logger.cache_clear()
    _cached_log_stream.cache_clear()
