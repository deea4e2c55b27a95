"""Learning rate schedules as functions of the iteration."""

import math
from collections.abc import Callable

from fvcore.common.config import CfgNode

from relvit_d2.utils.errors import UserError, nearest

Schedule = Callable[[int], float]


def quarter_cosine(step: int, steps: int, base: float, end: float, warmup: int) -> float:
    """Return the authors' learning rate at ``step`` of ``steps``.

    Linear from 0 to ``base`` during ``warmup`` steps, then a quarter cosine from ``base`` to ``end``. The cosine starts
    at step 0, so the rate drops slightly after the warm-up (authors' code, ``utils.py:260-295``; there ``warmup`` is a
    tenth of the steps and ``end`` 1.25e-6).
    """
    if step < warmup:
        return base * step / warmup
    weight = 1 - math.cos(math.pi / 2 * step / steps)
    return weight * end + (1 - weight) * base


def warmup_cosine(step: int, steps: int, base: float, end: float, warmup: int) -> float:
    """Return a half cosine from ``base`` to ``end`` after a linear warm-up, whose first value is above 0."""
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return end + (base - end) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_multistep(step: int, base: float, milestones: list[int], gamma: float, warmup: int) -> float:
    """Return ``base``, multiplied by ``gamma`` at each milestone, after a linear warm-up."""
    ramp = min(1.0, (step + 1) / (warmup + 1))
    return base * ramp * gamma ** sum(step >= m for m in milestones)


def batch_factor(cfg: CfgNode) -> float:
    """Return the factor of learning rates: ``IMS_PER_BATCH / REFERENCE_BATCH``, or 1 if the latter is 0.

    The linear scaling rule of "Accurate, Large Minibatch SGD" (Goyal et al., 2017, section 2.1).
    """
    reference = cfg.SOLVER.REFERENCE_BATCH
    return cfg.SOLVER.IMS_PER_BATCH / reference if reference else 1.0


def build_schedule(cfg: CfgNode) -> Schedule:
    """Return the learning rate of each iteration, from the ``SOLVER`` keys, scaled by :func:`batch_factor`.

    Raises:
        UserError: ``SOLVER.LR_SCHEDULER_NAME`` is unknown, or the warm-up is not shorter than the run.
    """
    solver = cfg.SOLVER
    steps, base, end, warmup = solver.MAX_ITER, solver.BASE_LR, solver.BASE_LR_END, solver.WARMUP_ITERS
    if warmup >= steps:
        raise UserError(
            f"SOLVER.WARMUP_ITERS {warmup} is not less than SOLVER.MAX_ITER {steps}, so the learning rate would not "
            f"reach SOLVER.BASE_LR: set SOLVER.WARMUP_ITERS {steps // 10}, a tenth of the run"
        )
    known: dict[str, Schedule] = {
        "QuarterCosineLR": lambda i: quarter_cosine(i, steps, base, end, warmup),
        "WarmupCosineLR": lambda i: warmup_cosine(i, steps, base, end, warmup),
        "WarmupMultiStepLR": lambda i: warmup_multistep(i, base, list(solver.STEPS), solver.GAMMA, warmup),
    }
    name = solver.LR_SCHEDULER_NAME
    if name not in known:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME '{name}' is unknown; known are {', '.join(known)}{nearest(name, list(known))}"
        )
    schedule, factor = known[name], batch_factor(cfg)
    return lambda iteration: factor * schedule(iteration)
