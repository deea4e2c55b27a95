"""Arguments, alternating timing of two functions, and output of the benchmarks."""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from relvit_d2.utils.hardware import device_name

Row = dict[str, Any]


class Pair(NamedTuple):
    """Seconds of two functions, timed alternately."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """Speed-up of ours over theirs."""
        return self.theirs / self.ours


def arguments(description: str | None, name: str) -> argparse.Namespace:
    """Parse ``--quick``, ``--json`` and ``--device``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  python -m benchmarks.{name} --quick --json",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller batches")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args()


def seconds(function: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Run ``function`` once and return the seconds by ``clock``, including asynchronous GPU work."""
    _wait(device)
    start = clock()
    function()
    _wait(device)
    return clock() - start


def in_turn(
    ours: Callable[[], object], theirs: Callable[[], object], device: str, budget: float, least: int = 3
) -> Pair:
    """Time two functions alternately, after one warm-up run of each.

    Args:
        ours, theirs: the functions.
        device: device that they run on.
        budget: seconds after which no further round starts.
        least: minimum number of rounds.
    """
    rounds: list[tuple[float, float]] = []
    ours(), theirs()
    start = time.perf_counter()
    while len(rounds) < least or time.perf_counter() - start < budget:
        rounds.append((seconds(ours, device), seconds(theirs, device)))
    return Pair(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Return the peak of the tensor memory that a run of ``function`` allocates, bytes.

    On a CPU it is computed from the allocations in torch's profiler; the memory of the process is not used, since the
    allocator keeps freed memory.
    """
    if device != "cpu":
        _wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        _wait(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def matrix_rate(device: str, dtype: torch.dtype, budget: float = 3.0) -> float:
    """Return the highest rate, FLOP/s, of square matrix products within ``budget`` seconds."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    torch.mm(a, b)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < budget:
        best = min(best, seconds(lambda: torch.mm(a, b), device))
    return 2 * size**3 / best


def print_rows(rows: Iterable[Row], args: argparse.Namespace) -> None:
    """Print each row as soon as it is measured: ``name``, ``ratio`` and the settings."""
    machine = {
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if args.json:
        for row in rows:
            print(json.dumps(row | machine), flush=True)
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for row in rows:
        more = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in ("name", "ratio")
        )
        print(f"{row['name']:<32} {row['ratio']:>9.3f}   {more}", flush=True)
