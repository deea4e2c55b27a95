"""Schedules of pre-training and training in the recipe for custom data."""

from typing import NamedTuple

import numpy as np

from relvit_d2.detection.evaluation import TRAINING_IMAGES
from relvit_d2.engine.config import EPOCH_KEYS
from relvit_d2.experiments.recipe import PRETRAINING, Choice, Choices, Data, Given
from relvit_d2.utils.errors import UserError

EVALUATIONS = 8  # during the training, at most
EVALUATING = 0.1  # share of the time that evaluations during the training take at most
PRETEXT_EVALUATIONS = 4  # during the pre-training
PATIENT = 0.75  # share of the evaluations without a better AP after which the training ends
MARGIN = 0.95  # share of the time that is planned
LEAST = 20  # iterations of the training


class Timing(NamedTuple):
    """Measured seconds of a few iterations of pre-training and training.

    Attributes:
        pretraining, training: seconds per iteration; 0 for no pre-training.
        start: seconds of the start and the end of a command.
        image: seconds of the evaluation of an image by the detector.
        view: seconds of the evaluation of an image by the pretext task; 0 for no pre-training.
    """

    pretraining: float
    training: float
    start: float
    image: float
    view: float = 0.0


class Schedules(NamedTuple):
    """The schedules of pre-training and training.

    Attributes:
        pretraining: keys of the pre-training; empty without one.
        training: keys of the training.
        seconds: expected for both.
    """

    pretraining: Choices
    training: Choices
    seconds: float


def choose_schedules(
    data: Data, timing: Timing, seconds: float, given: Given, batch: int, planned: int = 0
) -> Schedules:
    """Choose the schedules of pre-training and training.

    Args:
        data: the data set.
        timing: measured on this machine with the chosen model.
        seconds: for everything that is still to be done.
        given: keys of the user.
        batch: images per iteration of the training.
        planned: iterations of the training in an earlier plan, of which half are done however short the time is;
            0 if this is the first plan.

    Raises:
        UserError: the time is too short for ``LEAST`` iterations, in the first plan.
    """
    for key, replaced in EPOCH_KEYS.items():
        if given.get(key):
            given = {**given, replaced: max(round(given[key] * data.images / batch), 1)}
    iterations, period, why = given.get("SOLVER.MAX_ITER"), given.get("TEST.EVAL_PERIOD"), "given"
    once = data.evaluated * timing.image
    count = int(np.clip(EVALUATING * seconds / once, 1, EVALUATIONS)) if once else 0
    if once and iterations and period:
        count = -(-iterations // period)
    commands = 2 if timing.pretraining else 1
    views = PRETEXT_EVALUATIONS * (data.evaluated or min(data.images, 256)) * timing.view
    last = min(data.images, TRAINING_IMAGES) * timing.image if once else 0.0  # evaluation on training images
    other = (commands + 1) * timing.start + count * once + last + views
    rest = MARGIN * seconds - other
    before = PRETRAINING * rest if timing.pretraining else 0.0
    if not iterations:
        iterations = int((rest - before) / timing.training)
        why = f"in the time that pre-training, evaluations and starts leave, {timing.training:.2g} s each"
        if planned:
            iterations = max(iterations, -(-planned // 2))
        elif iterations < LEAST:
            share = PRETRAINING if timing.pretraining else 0.0
            more = (LEAST * timing.training / (1 - share) + other) / (MARGIN - EVALUATING) - seconds
            raise UserError(
                f"the time is too short: {max(iterations, 0)} iterations of {timing.training:.2g} s fit in beside "
                f"{other:.0f} s for starts and evaluations, but {LEAST} are needed: add {more / 3600 + 0.005:.2f} or "
                "more to --hours"
            )
    pretraining = _pretraining_schedule(timing, before)
    expected = other + iterations * timing.training + (before if timing.pretraining else 0.0)
    return Schedules(pretraining, _training_schedule(data, iterations, why, count, given), expected)


def _training_schedule(data: Data, iterations: int, why: str, count: int, given: Given) -> Choices:
    # Rounded up: one after the last iteration is in any case.
    period = given.get("TEST.EVAL_PERIOD", -(-iterations // count) if count else 0)
    metric = given.get("TEST.BEST_METRIC", "bbox/AP") if period and data.evaluated else ""
    number = -(-iterations // period) if period else 0
    patience = int(np.ceil(PATIENT * number)) if metric and number >= 4 else 0
    evaluated = f"{number} evaluations, which take at most {EVALUATING:.0%} of the time"
    return {
        "SOLVER.MAX_ITER": Choice(iterations, why),
        "SOLVER.WARMUP_ITERS": Choice(iterations // 20, "a twentieth of the iterations"),
        "SOLVER.CHECKPOINT_PERIOD": Choice(period or max(iterations // EVALUATIONS, 1), "as often as evaluations"),
        "SOLVER.CHECKPOINT_MAX_TO_KEEP": Choice(2, "one to resume, one in case it is damaged"),
        "TEST.EVAL_PERIOD": Choice(period, evaluated if data.evaluated else "there are no validation images"),
        "TEST.BEST_METRIC": Choice(metric, "the best of them is kept" if metric else "there are no evaluations"),
        "TEST.PATIENCE": Choice(
            patience, f"evaluations without a better AP that end it: {PATIENT:.0%} of all, 0 (never) of less than 4"
        ),
    }


def _pretraining_schedule(timing: Timing, seconds: float) -> Choices:
    if not timing.pretraining:
        return {}
    count = max(int(seconds / timing.pretraining), 2)
    period = max(count // PRETEXT_EVALUATIONS, 1)
    return {
        "SOLVER.MAX_ITER": Choice(
            count, f"{PRETRAINING:.0%} of the time for iterations, {timing.pretraining:.2g} s each"
        ),
        "SOLVER.WARMUP_ITERS": Choice(count // 10, "a tenth of the iterations"),
        "SOLVER.CHECKPOINT_PERIOD": Choice(period, f"{PRETEXT_EVALUATIONS} checkpoints"),
        "TEST.EVAL_PERIOD": Choice(period, f"{PRETEXT_EVALUATIONS} evaluations of the pretext task"),
        "SOLVER.CHECKPOINT_MAX_TO_KEEP": Choice(2, "one to resume, one in case it is damaged"),
    }
