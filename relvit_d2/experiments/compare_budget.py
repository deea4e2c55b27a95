"""The time of a comparison: a few iterations of each kind are measured, and schedules are shortened to a time limit."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate  # type: ignore[import-untyped]

from relvit_d2.data.subsets import subset_name
from relvit_d2.experiments.commands import TRIAL_KEYS, run_command, run_trial
from relvit_d2.experiments.compare_arms import ComparedArm, Comparison
from relvit_d2.experiments.runs import Run, plan_runs
from relvit_d2.experiments.steps import Step
from relvit_d2.utils.errors import UserError

TRIAL_IMAGES = 64  # test images on which the evaluation is timed


class Cost(NamedTuple):
    """Time of a kind of training in seconds.

    Attributes:
        iteration: one iteration.
        start: start and end of the command.
        image: evaluation of one image; 0 for pre-training, which is not evaluated.
    """

    iteration: float
    start: float
    image: float


def kinds(comparison: Comparison) -> list[str]:
    """Return the kinds of iterations in the arms: ``pretrain``, ``pretrain_mega``, ``train``, ``joint``."""
    found = dict.fromkeys(arm.kind for arm in comparison.arms)
    pretraining: dict[str, None] = dict.fromkeys(arm.pretraining for arm in comparison.arms if arm.pretraining)
    if any(arm.longer for arm in comparison.arms):
        pretraining["pretrain"] = None
    return list(dict.fromkeys([*(_pretraining_kind(name) for name in pretraining), *found]))


def _pretraining_kind(name: str) -> str:
    return "pretrain_mega" if name == "pretrain_mega" else "pretrain"


def measure(comparison: Comparison, kind: str, tested: int) -> Cost:
    """Measure a few iterations of a kind and an evaluation, in the folder ``trial`` of the output.

    Args:
        kind: one of :func:`kinds`.
        tested: number of test images.
    """
    short: dict[str, Any] = dict(TRIAL_KEYS)
    pretrains = kind.startswith("pretrain")
    if pretrains:
        keys, config = comparison.pretraining(mega=kind == "pretrain_mega"), comparison.pretrain_config
    else:
        keys, config = comparison.training(joint=kind == "joint"), comparison.config
        short |= {
            "DATASETS.TEST": (subset_name(comparison.data.test, min(1, TRIAL_IMAGES / tested)),),
            "TEST.EVAL_PERIOD": 0,
        }
        short |= {"TEST.BEST_METRIC": ""} | ({"DATASETS.VALIDATION": ""} if "DATASETS.VALIDATION" in dict(keys) else {})
    step = Step(kind, config, overrides=tuple((dict(keys) | short).items()))
    (run,) = plan_runs([step], 0, 1.0, comparison.output / "trial", []).values()
    command = ["--overwrite" if word == "--resume" else word for word in run.command]
    iteration, rest = run_trial(f"measuring {kind}", command, run.folder, run_command, run.folder / "console.txt")
    result, model = run.folder / "inference/results.json", run.folder / "model_final.pth"
    evaluation = 0.0 if pretrains else max(result.stat().st_mtime - model.stat().st_mtime, 0.0)
    return Cost(iteration, max(rest - evaluation, 0.0), evaluation / min(TRIAL_IMAGES, tested))


class Estimate(NamedTuple):
    """Expected time of runs in seconds.

    Attributes:
        training: iterations.
        rest: starts and evaluations.
    """

    training: float
    rest: float


def estimate(run: Run, cost: Cost, images: Mapping[str, int]) -> Estimate:
    """Return the expected time of a run; ``images`` is the number of images by data set name."""
    cfg = run.config
    if run.step.evaluates:
        return Estimate(0.0, cost.start + cost.image * images[cfg.DATASETS.TEST[0]])
    iterations, period = cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD
    validated = images.get(cfg.DATASETS.get("VALIDATION", ""), 0) if cfg.TASK == "classification" else 0
    tests = sum(images[name] for name in cfg.DATASETS.TEST)
    evaluations = -(-iterations // period) if period else 1
    evaluated = evaluations * validated + tests if cfg.TASK == "classification" else evaluations * tests
    return Estimate(iterations * cost.iteration, cost.start + cost.image * evaluated)


def longer_by(comparison: Comparison, costs: Mapping[str, Cost]) -> float:
    """Return the factor by which a training is lengthened to the seconds of pre-training and training together."""
    before = comparison.config_of(comparison.pretraining(mega=False), pretraining=True).SOLVER.MAX_ITER
    training = comparison.config_of(comparison.training()).SOLVER.MAX_ITER
    return 1 + before * costs["pretrain"].iteration / (training * costs["train"].iteration)


def estimates(
    comparison: Comparison, seeds: Sequence[dict[str, Run]], costs: Mapping[str, Cost], images: Mapping[str, int]
) -> dict[str, Estimate]:
    """Return the expected time of all runs of each arm; a shared pre-training is counted in the first arm."""
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
    """Return the factor, at most 1, for all schedules with which the comparison takes ``hours``.

    Raises:
        UserError: starts and evaluations alone take longer.
    """
    seconds = 3600 * hours
    if total.rest >= seconds:
        raise UserError(
            f"--hours {hours:g} is too short: starts and evaluations of the runs alone take {duration(total.rest)}; "
            "give more time or fewer arms, label shares or seeds"
        )
    return min(1.0, (seconds - total.rest) / total.training)


def duration(seconds: float) -> str:
    """Format a duration, such as ``12 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(comparison: Comparison, found: Mapping[str, Estimate], costs: Mapping[str, Cost]) -> str:
    """Return a table of the measured times and of the expected time of each arm and of the comparison."""
    rows = [(f"{kind}, measured", f"{cost.iteration:.3g} s per iteration") for kind, cost in costs.items()]
    rows += [(arm, duration(sum(part))) for arm, part in found.items()]
    rows.append(("all", duration(sum(map(sum, found.values())))))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
