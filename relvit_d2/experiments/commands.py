"""Execution of relvit-d2 commands in subprocesses, with a progress bar."""

import json
import math
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

from relvit_d2.engine.config import EPOCH_KEYS
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder
from relvit_d2.utils.printing import printable
from relvit_d2.utils.progress import Progress

TRIAL = 8  # iterations of a run that is timed
TRIAL_SECONDS = 30.0  # of the iterations of such a run, after which it is stopped
TRIAL_KEYS = {
    **{"SOLVER.MAX_ITER": TRIAL, "SOLVER.WARMUP_ITERS": 0, "SOLVER.CHECKPOINT_PERIOD": 0, "LOGGERS": ()},
    **dict.fromkeys(EPOCH_KEYS, 0.0),
}


Runner = Callable[[str, list[str], Path, int], None]
"""Runs a command, as :func:`run_command`, whose arguments it has."""


class TrialTime(NamedTuple):
    """Time of a run of ``TRIAL`` iterations, or of fewer that take ``TRIAL_SECONDS``.

    Attributes:
        iteration: seconds per iteration, the median without the first half.
        rest: seconds of the command outside of the iterations.
    """

    iteration: float
    rest: float


def run_trial(title: str, command: list[str], output: Path, run: Runner, console: Path) -> TrialTime:
    """Run a training command, whose config has ``TRIAL_KEYS``, by ``run``, and return its time.

    Only a subprocess can be stopped after ``TRIAL_SECONDS``; it writes its output to ``console``.
    """
    started = time.monotonic()
    if run is run_command:
        run_command(title, command, output, TRIAL, console, TRIAL_SECONDS)
    else:
        run(title, command, output, TRIAL)
    wall = time.monotonic() - started
    seconds = iteration_seconds(output)
    return TrialTime(median(seconds[len(seconds) // 2 :]), max(wall - sum(seconds), 0.0))


def iteration_seconds(output: Path) -> list[float]:
    """Return the seconds of each iteration in the ``metrics.json`` of a run, in order."""
    lines = (output / "metrics.json").read_text(encoding="utf-8").splitlines()
    seconds = {row["iteration"]: row["time"] for row in map(json.loads, lines) if "time" in row}
    return [seconds[iteration] for iteration in sorted(seconds)]


def run_command(
    title: str,
    command: list[str],
    output: Path,
    total: int,
    console: Path | None = None,
    limit: float = math.inf,
) -> None:
    """Run a command and write its output to a file.

    The progress bar counts the iterations in ``output/metrics.json``.

    Args:
        title: text beside the bar.
        command: name of a relvit-d2 command and its arguments.
        output: ``OUTPUT_DIR`` of the command; created if missing.
        total: last iteration of the command; 0 if it does not train.
        console: the file; None: ``output/console.txt``.
        limit: seconds after the first iteration, after which the command is stopped when it has done two others.

    Raises:
        UserError: if the command fails, with its error message, or ``output`` cannot be created.
    """
    make_folder(output)
    console, metrics = console or output / "console.txt", output / "metrics.json"
    with console.open("w", encoding="utf-8") as log, Progress(desc=printable(title), total=total, unit="it") as bar:
        full = [sys.executable, "-m", "relvit_d2", *command]
        before = _iterations(metrics, total)
        end, stopped = math.inf, False
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
                if done > before:
                    end = min(end, time.monotonic() + limit)
                if time.monotonic() > end and before + 2 < done < total and not stopped:  # the first has no time
                    stopped = True
                    process.terminate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode == 0:
            bar.set_postfix_str("done", refresh=False)
            bar.update(total - bar.n)
    if process.returncode and not stopped:
        lines = console.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(f"relvit-d2 {command[0]} failed: {(errors or lines)[-1]} (whole log: {console})")


def _die_with_parent() -> None:
    _prctl_pr_set_pdeathsig(signal.SIGKILL)


def _iterations(metrics: Path, total: int) -> int:
    return min(metrics.read_bytes().count(b"\n"), total) if metrics.exists() else 0
