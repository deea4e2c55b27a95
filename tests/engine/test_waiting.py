"""A training step launches its computations without waiting for the device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from relvit_d2.classification.model import build_classifier
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from tests.support.meta_device import without_waiting

OPTIONS = {
    "defaults": (),
    "subset": ("PRETEXT.KEEP", 0.5, "PRETEXT.WEIGHTS.BEARING", 1.0, "PRETEXT.PAIR_DROPOUT", 0.2),
    "mega": ("PRETEXT.MEGA.M", 4, "PRETEXT.PERMUTE", "always", "PRETEXT.CROP", "pad"),
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
