"""Joint training: the detector's losses and the pretext losses of the encoder's last map."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_detection import tiny_config

from relvit_d2.detection.joint import JointRCNN
from relvit_d2.detection.model import build_detector
from relvit_d2.encoders import ENCODERS, build_encoder
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.task import PretextTask

JOINT = ("MODEL.RELVIT.JOINT", True)
PRETEXT = {"loss_relation", "loss_position", "accuracy_relation", "accuracy_position"}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(), EventStorage():
        torch.manual_seed(0)
        yield


def entry(height: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(height + width)
    objects = Instances((height, width))
    objects.gt_boxes, objects.gt_classes = Boxes(torch.tensor([[2.0, 3, 14, 20]])), torch.tensor([3])
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=generator).float(),
        "height": height,
        "width": width,
        "instances": objects,
    }


def test_the_losses_of_both_come_side_by_side() -> None:
    supervised, joint = build_detector(tiny_config()), build_detector(tiny_config(*JOINT))
    missing = joint.load_state_dict(supervised.state_dict(), strict=False)
    assert missing.missing_keys and all(name.startswith("pretext.") for name in missing.missing_keys)
    batch = [entry(40, 64), entry(33, 47)]
    torch.manual_seed(1)
    alone = supervised(batch)
    torch.manual_seed(1)
    both = joint(batch)
    assert both.keys() - alone.keys() == PRETEXT | {"chance_relation", "chance_position"}
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value)
    sum(both[f"loss_{task}"] for task in ("relation", "position")).backward()
    reached = [name for name, p in joint.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in reached} == {"backbone", "pretext"}
    assert all("simfp" not in name for name in reached)  # on the encoder's map, before the pyramid


def test_padding_takes_no_part() -> None:
    """A small image beside a large one has the pretext losses of the encoder's own tokens inside it."""
    joint = build_detector(tiny_config(*JOINT))
    assert isinstance(joint, JointRCNN)
    batch = [entry(64, 64), entry(33, 46)]
    seen: list[PatchLayout] = []
    joint.pretext.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    joint(batch)
    valid = seen[0].valid[1].view(seen[0].grid)
    assert seen[0].extent().tolist() == [[16, 16], [9, 12]]  # of 4 pixels; a patch that is partly seen takes part
    assert valid[:9, :12].all() and valid.sum() == 9 * 12


def test_pretext_losses_are_those_of_the_task_on_the_last_map() -> None:
    joint = build_detector(tiny_config(*JOINT))
    assert isinstance(joint, JointRCNN) and isinstance(joint.pretext, PretextTask)
    batch = [entry(48, 64)]
    both = joint(batch)
    images = joint.preprocess_image(batch).tensor
    expected = joint.pretext(joint.backbone.encoder.tokens(images), PatchLayout.full(1, (12, 16)))
    for name, value in expected.items():
        torch.testing.assert_close(both[name], value)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_trains_jointly_and_evaluates_as_before(name: str) -> None:
    encoder = build_encoder(name)
    own = encoder.strides[encoder.last]
    levels = [f"p{stride.bit_length() - 1}" for stride in (own // 2, own)]
    own_keys = ["MODEL.ENCODER.NAME", name, "MODEL.ENCODER.PATCH_SIZE", encoder.arguments["patch_size"]]
    pyramid = ["MODEL.PYRAMID.STRIDES", [own // 2, own], "MODEL.RPN.IN_FEATURES", levels]
    cfg = tiny_config(*JOINT, *own_keys, *pyramid, "MODEL.ROI_HEADS.IN_FEATURES", levels)
    model = build_detector(cfg)
    losses = model([entry(40, 56)])
    assert losses.keys() >= PRETEXT and all(value.isfinite() for value in losses.values())
    model.eval()
    with torch.no_grad():
        assert "instances" in model([entry(40, 56)])[0]


def test_that_positions_leak_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="relvit_d2"):
        build_detector(tiny_config(*JOINT))
    assert sum("positions" in record.message for record in caplog.records) == 1
    caplog.clear()
    build_detector(tiny_config(*JOINT, "MODEL.ENCODER.POS_EMBED", False))
    assert not caplog.records
