"""Execution of relvit-d2 commands in subprocesses, with a progress bar."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from tqdm import tqdm

from relvit_d2.engine.config import EPOCH_KEYS
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder
from relvit_d2.utils.printing import printable

TRIAL = 8  # iterations of a run that is timed
TRIAL_KEYS = {
    **{"SOLVER.MAX_ITER": TRIAL, "SOLVER.WARMUP_ITERS": 0, "SOLVER.CHECKPOINT_PERIOD": 0},
    **dict.fromkeys(EPOCH_KEYS, 0.0),
}


Runner = Callable[[str, list[str], Path, int], None]
"""Runs a command, as :func:`run_command`, whose arguments it has."""


class TrialTime(NamedTuple):
    """Time of a run of ``TRIAL`` iterations.

    Attributes:
        iteration: seconds per iteration, the median without the first half.
        rest: seconds of the command outside of the iterations.
    """

    iteration: float
    rest: float


def run_trial(title: str, command: list[str], output: Path, run: Runner) -> TrialTime:
    """Run a training command, whose config has ``TRIAL_KEYS``, by ``run``, and return its time."""
    started = time.monotonic()
    run(title, command, output, TRIAL)
    wall = time.monotonic() - started
    seconds = iteration_seconds(output)
    return TrialTime(median(seconds[TRIAL // 2 :]), max(wall - sum(seconds), 0.0))


def iteration_seconds(output: Path) -> list[float]:
    """Return the seconds of each iteration in the ``metrics.json`` of a run, in order."""
    lines = (output / "metrics.json").read_text(encoding="utf-8").splitlines()
    seconds = {row["iteration"]: row["time"] for row in map(json.loads, lines) if "time" in row}
    return [seconds[iteration] for iteration in sorted(seconds)]


def run_command(title: str, command: list[str], output: Path, total: int) -> None:
    """Run a command and write its output to ``output/console.txt``.

    The progress bar counts the iterations in ``output/metrics.json``.

    Args:
        title: text beside the bar.
        command: name of a relvit-d2 command and its arguments.
        output: ``OUTPUT_DIR`` of the command; created if missing.
        total: last iteration of the command; 0 if it does not train.

    Raises:
        UserError: if the command fails, with its error message, or ``output`` cannot be created.
    """
    make_folder(output)
    console, metrics = output / "console.txt", output / "metrics.json"
    pause = 0.5 if sys.stderr.isatty() else 10.0
    with (
        console.open("w", encoding="utf-8") as log,
        tqdm(desc=printable(title), total=total, unit="it", mininterval=pause) as bar,
    ):
        full = [sys.executable, "-m", "relvit_d2", *command]
        before = _iterations(metrics, total)
        # A session of its own: Ctrl-C reaches this process only, which sends one signal; a second one would stop the
        # command without a checkpoint. If this process is killed, the command ends too: another run may use its folder.
        preexec = _die_with_parent if os.name == "posix" else None
        process = subprocess.Popen(
            full, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=preexec
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)
                done = _iterations(metrics, total)
                phase = "evaluating" if done == total else "training" if done > before else "starting"
                bar.set_postfix_str(phase, refresh=False)
                bar.update(done - bar.n)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode == 0:
            bar.set_postfix_str("done", refresh=False)
            bar.update(total - bar.n)
    if process.returncode:
        lines = console.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(f"relvit-d2 {command[0]} failed: {(errors or lines)[-1]} (whole log: {console})")


def _die_with_parent() -> None:
    _prctl_pr_set_pdeathsig(signal.SIGKILL)


def _iterations(metrics: Path, total: int) -> int:
    return min(metrics.read_bytes().count(b"\n"), total) if metrics.exists() else 0
