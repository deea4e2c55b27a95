"""Provenance of a run: command, machine, versions, commit."""

import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2 import __version__
from relvit_d2.engine.precision import choose_precision
from relvit_d2.utils.hardware import device_name
from relvit_d2.utils.printing import shell_command

VERSIONS = f"relvit_d2 {__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def provenance(cfg: CfgNode) -> dict[str, str]:
    """Return the content of ``run.json``."""
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))
    return {
        "command": command_line(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{device_name(cfg.MODEL.DEVICE)}, processes: {comm.get_world_size()}",
        "precision": f"{precision.name} ({precision.reason})",
        "versions": VERSIONS,
        "commit": _commit(),
    }


def command_line() -> str:
    """Return the command line of this process as ``relvit-d2 COMMAND ...`` or ``python SCRIPT.py ...``."""
    name = Path(sys.argv[0]).name
    scripts = ("pretrain_ssl.py", "train_net.py", "train_cls.py")
    return shell_command([*(("python", name) if name in scripts else ("relvit-d2",)), *sys.argv[1:]])


def _commit() -> str:
    """Return the git commit of this package, with a + if files have changed; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(
            git, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
