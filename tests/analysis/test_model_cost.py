"""Cost of models: against counts by hand, and the advice on batches."""

import re

import pytest
from torch import nn

from relvit_d2.analysis.model_cost import _advice, cost_table
from relvit_d2.cli.analyze import subject_of
from relvit_d2.tasks import load_config

CONFIGS = ("configs/custom.yaml", "configs/ssl/custom.yaml", "configs/cls/custom.yaml")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_without_data_is_measured(config: str) -> None:
    cfg = load_config(config, ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "7"])
    subject = subject_of(cfg)
    linear = [m for m in subject.model.modules() if isinstance(m, nn.Linear)]
    text = cost_table(subject, 2)
    total = sum(p.numel() for p in subject.model.parameters())
    row = next(line for line in text.splitlines() if line.split()[:1] == ["all"]).split()
    assert row[1] == f"{total / 1e6:.2f}"
    # Every linear layer is applied to at least one token of each image.
    assert float(row[2]) >= 2 * sum(m.weight.numel() for m in linear) / 1e9 - 0.01
    assert "batches of 2\n" in text and "\n7 iterations" in text


@pytest.mark.parametrize(("images", "fits"), [(8, 8), (8, 7), (8, 3), (12, 5), (7, 6), (64, 1)])
def test_the_advised_number_of_parts_is_the_smallest_that_fits(images: int, fits: int) -> None:
    cfg = load_config(CONFIGS[0], ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", str(images)])
    advised = re.search(r"GRAD_ACCUM_STEPS (\d+)", _advice(cfg, fits))
    parts = next(n for n in range(1, images + 1) if images % n == 0 and images // n <= fits)
    assert (int(advised[1]) if advised else 1) == parts
    assert "Not one image" in _advice(cfg, 0)
