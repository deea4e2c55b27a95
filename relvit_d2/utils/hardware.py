"""Names and memory of the hardware."""

import math
import os
import platform
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

UNKNOWN_MEMORY = 8 * 2.0**30  # bytes that are assumed to be free where the system does not report them


def default_device() -> str:
    """Return the device of a run that does not set ``MODEL.DEVICE``: CUDA, Apple's GPU (untested) or the processor."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def processor() -> str:
    """Return the name of the processor and the number of available cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = (
            line.partition(":")[2].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        )
        name = next(models, name)
    return f"{name}, {cores()} cores"


def cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: str) -> str:
    """Return the name of the GPU for a CUDA device, else of the processor."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def peak_memory(device: str) -> float:
    """Return the peak memory in GiB: on the GPU for a CUDA device, else of this process; NaN if it is not known."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss includes the memory of the process that started this one
        return float(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) / 2**20
    if not resource:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def free_memory(device: str) -> float:
    """Return the free memory in bytes: on the GPU for a CUDA device, else of this machine."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
        return float(lines["MemAvailable"].split()[0]) * 2**10
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else UNKNOWN_MEMORY
