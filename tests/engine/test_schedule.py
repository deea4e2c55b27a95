"""Learning rates against closed forms and an independent implementation."""

import math
from collections import Counter
from itertools import chain

import pytest
from detectron2.config import get_cfg
from fvcore.common.param_scheduler import CosineParamScheduler

from relvit_d2.data.loader import EndlessOrder
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.engine.config import resolve_epochs
from relvit_d2.engine.schedule import build_schedule, quarter_cosine, warmup_cosine, warmup_multistep
from relvit_d2.utils.errors import UserError


# Values of the authors' schedule with base rate 5e-4 (fraction of the run, rate).
@pytest.mark.parametrize(
    ("fraction", "rate"),
    [
        (0, 0.0),
        (0.05, 2.5e-4),
        (0.1, 4.9386e-4),
        (0.25, 4.6203e-4),
        (0.5, 3.5392e-4),
        (0.75, 1.9211e-4),
        (0.9, 7.9272e-5),
        (1, 1.25e-6),
    ],
)
def test_quarter_cosine_has_the_published_values(fraction: float, rate: float) -> None:
    assert quarter_cosine(int(fraction * 10_000), 10_000, 5e-4, 1.25e-6, 1000) == pytest.approx(
        rate, rel=2e-4, abs=1e-12
    )


def test_warmup_cosine_is_fvcores_cosine_after_the_warmup() -> None:
    oracle = CosineParamScheduler(3e-4, 1e-5)
    for step in range(20, 120):
        assert warmup_cosine(step, 120, 3e-4, 1e-5, 20) == pytest.approx(oracle((step - 20) / 100), rel=1e-9)


def test_warmup_rises_to_the_base_rate_and_never_starts_at_zero() -> None:
    rates = [warmup_cosine(step, 100, 1.0, 0.0, 10) for step in range(11)]
    assert rates[0] > 0
    assert rates == sorted(rates)
    assert rates[10] == 1.0


def test_multistep_multiplies_by_gamma_at_each_milestone() -> None:
    rates = [warmup_multistep(step, 1.0, [4, 8], 0.1, 0) for step in range(10)]
    assert rates == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 2)


@pytest.mark.parametrize("name", ["QuarterCosineLR", "WarmupCosineLR", "WarmupMultiStepLR"])
def test_every_schedule_by_name_is_finite_and_below_the_base_rate(name: str) -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.merge_from_list(["SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.MAX_ITER", 50, "SOLVER.WARMUP_ITERS", 5])
    schedule = build_schedule(cfg)
    rates = [schedule(step) for step in range(50)]
    assert all(math.isfinite(rate) and 0 <= rate <= cfg.SOLVER.BASE_LR * (1 + 1e-12) for rate in rates)


@pytest.mark.parametrize("warmup", [30, 31])
def test_a_warmup_as_long_as_the_run_is_refused(warmup: int) -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.merge_from_list(["SOLVER.MAX_ITER", 30, "SOLVER.WARMUP_ITERS", warmup])
    with pytest.raises(
        UserError, match=rf"WARMUP_ITERS {warmup} is not less than SOLVER.MAX_ITER 30, .*: set SOLVER.WARMUP_ITERS 3,"
    ):
        build_schedule(cfg)
    cfg.SOLVER.WARMUP_ITERS = 29
    assert build_schedule(cfg)(29) == pytest.approx(cfg.SOLVER.BASE_LR)


def test_an_unknown_schedule_names_the_nearest() -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.SOLVER.LR_SCHEDULER_NAME = "QuaterCosineLR"
    with pytest.raises(UserError, match="did you mean 'QuarterCosineLR'"):
        build_schedule(cfg)


@pytest.mark.parametrize("epochs", [1.0, 3.0])
@pytest.mark.parametrize(("images", "batch"), [(10, 4), (12, 4), (3, 8), (7, 7), (1, 2)])
def test_a_run_of_some_epochs_is_the_shortest_that_sees_every_image_so_often(
    images: int, batch: int, epochs: float
) -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.EPOCHS, cfg.SOLVER.IMS_PER_BATCH = 0, epochs, batch
    iterations = resolve_epochs(cfg, images).SOLVER.MAX_ITER
    order = EndlessOrder(images, batch, seed=0, start=0)

    def least(count: int) -> int:
        seen = Counter(index for _, index in chain.from_iterable(map(order.keys, range(count))))
        return min(seen[index] for index in range(images))

    assert least(iterations) >= epochs > least(iterations - 1)


def test_periods_are_in_epochs_and_parts_of_the_schedule_in_fractions() -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    solver = cfg.SOLVER
    solver.MAX_ITER, solver.EPOCHS, solver.IMS_PER_BATCH, solver.GRAD_ACCUM_STEPS = 0, 0.1, 10, 5
    solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_EPOCHS, cfg.TEST.EVAL_EPOCHS = 0, 0.05, 1e-4
    solver.WARMUP_ITERS, solver.STEPS = 0.1, (0.7, 28)
    found = resolve_epochs(cfg, 3000)
    assert found.SOLVER.MAX_ITER == 30  # 0.1 * 300 is 30.000000000000004 in floating point
    assert (found.SOLVER.CHECKPOINT_PERIOD, found.TEST.EVAL_PERIOD) == (15, 1)
    assert (found.SOLVER.WARMUP_ITERS, found.SOLVER.STEPS) == (3, (21, 28))
    assert resolve_epochs(found, 77) == found  # it has no epochs any more
    assert solver.EPOCHS == 0.1
    iterations = get_cfg()
    add_relvit_config(iterations)
    assert resolve_epochs(iterations, 3000) == iterations
