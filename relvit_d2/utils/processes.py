"""Child processes on all operating systems, and the process group of torch.distributed; does not import torch."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_POLL = 0.2  # seconds

_uses = itertools.count()


def process_context() -> Any:
    """Return the context of ``multiprocessing`` for short-lived child processes.

    They are forked on Linux, since a spawned process imports all packages again; forking is not safe on macOS and does
    not exist on Windows.
    """
    return multiprocessing.get_context("fork" if sys.platform == "linux" and hasattr(os, "fork") else "spawn")


def end_with_parent() -> None:
    """Let Linux kill this process when its parent ends; without effect on other systems."""
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    if hasattr(signal, "SIGKILL"):
        _prctl_pr_set_pdeathsig(signal.SIGKILL)


def process_group() -> Any:
    """Return the module ``torch.distributed`` if a process group is initialised, else None."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


@contextmanager
def first_process_first() -> Iterator[bool]:
    """Run the block in the first process, and then in the others, which all must reach it.

    They wait by polling: the work of the first process may take longer than the time limit of a barrier.

    Yields:
        Whether this is the first process.
    """
    group = process_group()
    is_first = group is None or group.get_rank() == 0
    store = group and group.distributed_c10d._get_default_store()
    key = f"relvit_d2/first_process/{next(_uses)}"
    while not is_first and not store.check([key]):
        time.sleep(_POLL)
    yield is_first
    if store and is_first:
        store.set(key, "")
