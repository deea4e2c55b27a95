"""Child processes on all operating systems, and the process group of torch.distributed; does not import torch."""

import multiprocessing
import os
import signal
import sys
from typing import Any


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
