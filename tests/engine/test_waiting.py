"""A training step launches its computations without waiting for the device."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relvit_d2.classification.model import build_classifier
from relvit_d2.engine import trainer as trainer_module
from relvit_d2.engine.iteration_values import IterationValues
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weight_average import build_average
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from tests.support.meta_device import without_waiting
from tests.support.scripts import fails

OPTIONS = {
    "defaults": (),
    "subset": ("PRETEXT.KEEP", 0.5, "PRETEXT.WEIGHTS.BEARING", 1.0, "PRETEXT.PAIR_DROPOUT", 0.2),
    "mega": ("PRETEXT.MEGA.M", 4, "PRETEXT.PERMUTE", "always", "PRETEXT.CROP", "pad", "PRETEXT.NOISE_PROB", 0.3),
    "pooled": ("PRETEXT.POOL", 2),
    "t2t": ("MODEL.ENCODER.NAME", "t2t_vit_14", "MODEL.ENCODER.PATCH_SIZE", 16),
    "swin": ("MODEL.ENCODER.NAME", "swin_tiny"),
}
BLOCKING: dict[str, Callable[[Tensor], object]] = {
    "read": lambda x: x.sum().item(),
    "mask": lambda x: x[x > 0],
    "list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "number": lambda x: torch.tensor(1.0).to(x.device),
    "index": lambda x: x[torch.tensor([0])],
    "copy": lambda x: x.copy_(torch.zeros(3)),
}


@pytest.mark.parametrize("name", list(BLOCKING))
def test_operations_that_wait_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.zeros(3, device="meta")
    with (
        pytest.raises((AssertionError, RuntimeError, NotImplementedError)),
        without_waiting(monkeypatch),
    ):
        BLOCKING[name](values)


def batch() -> dict[str, Tensor]:
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    sizes, keys = torch.tensor([[40, 40]] * 2), torch.arange(2)
    return {"images": images, "sizes": sizes, "keys": keys, "labels": torch.tensor([0, 1])}


def step(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.to("meta").train()
    with without_waiting(monkeypatch):
        losses = [value for name, value in model(batch()).items() if name.startswith("loss")]
        torch.stack(losses).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("options", list(OPTIONS))
def test_a_step_of_pretraining_does_not_wait(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("MODEL.DEVICE", "cpu", "DATASETS.TEST", "()", *OPTIONS[options])
    cfg = load_config("configs/demo/ssl_streets.yaml", [*map(str, overrides)], "pretrain")
    step(build_pretraining_model(cfg), monkeypatch)


@pytest.mark.parametrize("joint", [False, True])
def test_a_step_of_classification_does_not_wait(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("MODEL.DEVICE", "cpu", "MODEL.ENCODER.NAME", "vit_nano", "MODEL.RELVIT.JOINT", joint)
    cfg = load_config("configs/cls/cifar10_vit_s4.yaml", [*map(str, overrides)], "classification")
    step(build_classifier(cfg, 2), monkeypatch)


def test_iterations_of_the_trainer_do_not_wait_and_chance_levels_stay_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch, losses, gradients, clipping, step and moving average, up to the copy of the values to the host."""
    copied: list[dict[str, str]] = []

    class NotCopied(IterationValues):
        def __init__(self, iteration: int, means: dict[str, Tensor], *_: Any) -> None:
            copied.append({name: value.device.type for name, value in means.items()})

    monkeypatch.setattr(trainer_module, "IterationValues", NotCopied)
    overrides = (
        "MODEL.DEVICE",
        "cpu",
        "OUTPUT_DIR",
        tmp_path,
        "SOLVER.EMA.ENABLED",
        True,
        "SOLVER.GRAD_ACCUM_STEPS",
        2,
    )
    cfg = load_config("configs/demo/ssl_streets.yaml", [*map(str, overrides)], "pretrain")
    model = build_pretraining_model(cfg).to("meta")
    trainer = Trainer(cfg, model, 10, lambda _: NotImplemented, average=build_average(cfg, model))
    trainer.reads_late = True
    trainer._parts = (batch() for _ in itertools.count())
    with without_waiting(monkeypatch):
        for trainer.iter in range(3):
            trainer.run_step()
    assert trainer.average and trainer.average.updates == 3
    for devices in copied:
        on_host = {name for name, device in devices.items() if device == "cpu"}
        assert on_host == {"chance_relation", "chance_position"} and devices["total_loss"] == "meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the check would run")
def test_the_check_on_a_gpu_needs_cuda(tmp_path: Path) -> None:
    assert "needs CUDA: run it on" in fails(tmp_path, "-m", "benchmarks.gpu_sync_check")
