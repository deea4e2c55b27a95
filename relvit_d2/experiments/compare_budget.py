"""The time of a comparison: a few iterations of each kind are measured, and schedules shortened to fit."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tabulate import tabulate  # type: ignore[import-untyped]

from relvit_d2.data.detection.catalog import part_of
from relvit_d2.experiments.commands import run_command
from relvit_d2.experiments.compare_arms import ComparedArm, Comparison
from relvit_d2.experiments.runs import Run, plan_runs
from relvit_d2.experiments.steps import Step
from relvit_d2.utils.errors import UserError

TRIAL = 8  # iterations
TESTED = 64  # images, of which the evaluation is measured


class Cost(NamedTuple):
    """Seconds that a kind of training takes.

    Attributes:
        iteration: of one iteration.
        start: of the start and the end of the command.
        image: of the evaluation of one image; 0 for pre-training, which is not evaluated.
    """

    iteration: float
    start: float
    image: float


def kinds(comparison: Comparison) -> list[str]:
    """Return the kinds of iterations that the arms consist of."""
    found = dict.fromkeys(arm.kind for arm in comparison.arms)
    pretraining: dict[str, None] = dict.fromkeys(arm.pretraining for arm in comparison.arms if arm.pretraining)
    if any(arm.longer for arm in comparison.arms):
        pretraining["pretrain"] = None
    return list(dict.fromkeys([*(_pretraining_kind(name) for name in pretraining), *found]))


def _pretraining_kind(name: str) -> str:
    return "pretrain_mega" if name == "pretrain_mega" else "pretrain"


def measure(comparison: Comparison, kind: str, tested: int) -> Cost:
    """Run ``TRIAL`` iterations of a kind in the folder ``trial`` of the output, with an evaluation.

    Args:
        comparison: what is compared.
        kind: of :func:`kinds`.
        tested: number of test images.

    Raises:
        UserError: if the run fails, as it does for a config or data that cannot be trained on.
    """
    short: dict[str, Any] = {"SOLVER.MAX_ITER": TRIAL, "SOLVER.WARMUP_ITERS": 0, "SOLVER.CHECKPOINT_PERIOD": 0}
    pretrains = kind.startswith("pretrain")
    if pretrains:
        keys, config = comparison.pretraining(mega=kind == "pretrain_mega"), comparison.pretrain_config
    else:
        keys, config = comparison.training(joint=kind == "joint"), comparison.config
        short |= {"DATASETS.TEST": (part_of(comparison.data.test, min(1, TESTED / tested)),), "TEST.EVAL_PERIOD": 0}
        short |= {"TEST.BEST_METRIC": ""} | ({"DATASETS.VALIDATION": ""} if "DATASETS.VALIDATION" in dict(keys) else {})
    step = Step(kind, config, overrides=tuple((dict(keys) | short).items()))
    (run,) = plan_runs([step], 0, 1.0, comparison.output / "trial", []).values()
    started = time.monotonic()
    run_command(f"measuring {kind}", [word for word in run.command if word != "--resume"], run.folder, TRIAL)
    wall = time.monotonic() - started
    rows = iteration_seconds(run.folder)
    result, model = run.folder / "inference/results.json", run.folder / "model_final.pth"
    evaluation = 0.0 if pretrains else max(result.stat().st_mtime - model.stat().st_mtime, 0.0)
    images = min(TESTED, tested)
    return Cost(median(rows[TRIAL // 2 :]), max(wall - sum(rows) - evaluation, 0.0), evaluation / images)


def iteration_seconds(folder: Path) -> list[float]:
    """Return the seconds of each iteration that ``metrics.json`` of a run holds, in order."""
    lines = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()
    rows = {row["iteration"]: row["time"] for row in map(json.loads, lines) if "time" in row}
    return [rows[number] for number in sorted(rows)]


class Estimate(NamedTuple):
    """Seconds of a run.

    Attributes:
        training: of its iterations.
        rest: of its start and its evaluations.
    """

    training: float
    rest: float


def estimate(run: Run, cost: Cost, images: Mapping[str, int]) -> Estimate:
    """Return the time that a run will take; ``images`` are the numbers of images by the name of the set."""
    cfg = run.config
    if run.step.evaluates:
        return Estimate(0.0, cost.start + cost.image * images[cfg.DATASETS.TEST[0]])
    iterations, period = cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD
    chosen_on = images.get(cfg.DATASETS.get("VALIDATION", ""), 0) if cfg.TASK == "classification" else 0
    tests = sum(images[name] for name in cfg.DATASETS.TEST)
    evaluations = -(-iterations // period) if period else 1
    evaluated = evaluations * chosen_on + tests if cfg.TASK == "classification" else evaluations * tests
    return Estimate(iterations * cost.iteration, cost.start + cost.image * evaluated)


def longer_by(comparison: Comparison, costs: Mapping[str, Cost]) -> float:
    """Return how many times as long a training is that takes the seconds of itself and of a pre-training."""
    before = comparison.config_of(comparison.pretraining(mega=False), pretraining=True).SOLVER.MAX_ITER
    training = comparison.config_of(comparison.training()).SOLVER.MAX_ITER
    return 1 + before * costs["pretrain"].iteration / (training * costs["train"].iteration)


def estimates(
    comparison: Comparison, seeds: Sequence[dict[str, Run]], costs: Mapping[str, Cost], images: Mapping[str, int]
) -> dict[str, Estimate]:
    """Return the time of all runs of each arm, by its name; a pre-training counts for the first arm that needs it."""
    found, counted = {}, set()
    for arm in comparison.arms:
        parts = []
        for number, runs in enumerate(seeds):
            for name, run in runs.items():
                if (number, name) not in counted and _is_of(arm, comparison, name):
                    counted.add((number, name))
                    kind = _pretraining_kind(name) if name == arm.pretraining else arm.kind
                    parts.append(estimate(run, costs[kind], images))
        found[arm.name] = Estimate(*(sum(part[i] for part in parts) for i in range(2)))
    return found


def _is_of(arm: ComparedArm, comparison: Comparison, name: str) -> bool:
    steps = [arm.step_name(share) for share in comparison.shares]
    return name in (arm.pretraining, *steps, *(f"{step}/test" for step in steps))


def fitting_scale(total: Estimate, hours: float) -> float:
    """Return by how much all schedules are shortened, at most 1, so that the comparison takes ``hours``.

    Raises:
        UserError: if starts and evaluations alone take longer.
    """
    seconds = 3600 * hours
    if total.rest >= seconds:
        raise UserError(
            f"--hours {hours:g}: starts and evaluations of the runs alone take {duration(total.rest)}: give more, or "
            "fewer arms, labels or seeds"
        )
    return min(1.0, (seconds - total.rest) / total.training)


def duration(seconds: float) -> str:
    """Return seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(comparison: Comparison, found: Mapping[str, Estimate], costs: Mapping[str, Cost]) -> str:
    """Return what was measured, and the time of each arm and of all."""
    rows = [(f"{kind}, measured", f"{cost.iteration:.3g} s an iteration") for kind, cost in costs.items()]
    rows += [(arm, duration(sum(part))) for arm, part in found.items()]
    rows.append(("all", duration(sum(map(sum, found.values())))))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
