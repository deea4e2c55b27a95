"""Fault injection into commands.

With this folder on ``PYTHONPATH`` Python imports this module at start-up. ``RELVIT_FAULT=POINT:COUNT`` kills the
process (SIGKILL) the COUNTth time that it reaches POINT; ``POINT:COUNT:RANK`` only the process of that rank.

Points: ``step``, after an optimiser's step; ``checkpoint``, in the middle of writing a checkpoint; ``pointer``, before
``last_checkpoint`` is written; ``evaluation``, after the first batch of an evaluation. Instead of the kill, ``raise``
raises a ZeroDivisionError after a step, ``nan`` makes the losses of a step NaN, and ``memory`` allocates more than the
memory in a step. ``full:BYTES`` limits the size of files, like a full disk;
``clock:SECONDS`` sets the clock by that many seconds after 5 s. ``windows:0`` hides the modules, functions and signals
that Python does not have on Windows.
"""

import io
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FAULT = os.environ.get("RELVIT_FAULT", "")


def install(point: str, count: int, rank: int | None) -> None:
    import torch
    from detectron2.utils import comm

    from relvit_d2.data.loader import Batches
    from relvit_d2.engine.checkpoint import Checkpointer
    from relvit_d2.engine.trainer import Trainer

    calls = itertools.count(1)

    def is_now() -> bool:
        return (rank is None or comm.get_rank() == rank) and next(calls) == count

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        setattr(owner, name, make(getattr(owner, name)))

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if is_now():
                if point == "raise":
                    raise ZeroDivisionError("on demand")
                kill()
            return result

        return stepped

    def make_nan(original: Callable[..., Any]) -> Callable[..., Any]:
        def losses(*args: Any) -> Any:
            factor = float("nan") if is_now() else 1.0
            return {n: v * factor if isinstance(v, torch.Tensor) else v for n, v in original(*args).items()}

        return losses

    def allocate(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: torch.empty(2**50) if is_now() else original(*args)

    def save(original: Callable[..., Any]) -> Callable[..., Any]:
        def saved(data: Any, path: Any) -> None:
            if isinstance(path, Path) and is_now():  # not Detectron2's evaluator, which saves to an open file
                content = io.BytesIO()
                original(data, content)
                with path.open("wb") as file:
                    file.write(content.getvalue()[: len(content.getvalue()) // 2])
                kill()
            original(data, path)

        return saved

    def tag(original: Callable[..., Any]) -> Callable[..., Any]:
        def tagged(*args: Any) -> None:
            if is_now():
                kill()
            original(*args)

        return tagged

    def read(original: Callable[..., Any]) -> Callable[..., Any]:
        def batches(self: Batches) -> Iterator[Any]:
            fatal = isinstance(self.keys, list) and is_now()  # of an evaluation, not of training
            for batch in original(self):
                yield batch
                if fatal:
                    kill()

        return batches

    if point in ("step", "raise"):
        wrap(torch.optim.AdamW, "step", step)
    elif point == "nan":
        wrap(Trainer, "_forward", make_nan)
    elif point == "memory":
        wrap(Trainer, "_forward", allocate)
    elif point == "checkpoint":
        wrap(torch, "save", save)
    elif point == "pointer":
        wrap(Checkpointer, "tag_last_checkpoint", tag)
    elif point == "evaluation":
        wrap(Batches, "__iter__", read)
    else:
        raise ValueError(f"unknown point '{point}'")


class PosixModules:
    """Finder that refuses modules that do not exist on Windows, except for a package that has another way there."""

    NAMES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")

    def find_spec(self, name: str, *_: object) -> None:
        if name in self.NAMES:
            frame = sys._getframe(1)
            while str(frame.f_globals.get("__name__")).startswith("importlib") and frame.f_back:
                frame = frame.f_back
            if str(frame.f_globals.get("__name__")).startswith("portalocker"):
                return
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def hide_posix() -> None:
    import asyncio  # noqa: F401  (in Python 3.13 it reads os.sysconf)
    import multiprocessing.popen_fork
    import socket

    os.environ.setdefault("USERNAME", "user")  # always set on Windows
    multiprocessing.popen_fork.Popen.kill = lambda self: self._send_signal(9)  # type: ignore[attr-defined, method-assign]
    for name in PosixModules.NAMES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, PosixModules())  # type: ignore[arg-type]
    functions = ("fork", "forkpty", "getuid", "geteuid", "getpgid", "killpg", "memfd_create", "nice", "pwrite")
    for name in (*functions, "sched_getaffinity", "setsid", "sysconf"):
        delattr(os, name)
    for name in ("send_fds", "recv_fds"):
        delattr(socket, name)
    for name in ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "pthread_sigmask"):
        delattr(signal, name)


if FAULT and not any("multiprocessing.resource_tracker" in argument for argument in sys.orig_argv):
    where, number, *rest = FAULT.split(":")
    if where == "clock":
        clock, start = time.time, time.monotonic()
        time.time = lambda: clock() + (int(number) if time.monotonic() > start + 5 else 0)
    elif where == "windows":
        hide_posix()
    elif where == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
    else:
        install(where, int(number), int(rest[0]) if rest else None)
