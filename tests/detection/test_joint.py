"""Joint training: detection losses, and pretext losses on the encoder's last map."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from relvit_d2.detection.model import build_detector
from relvit_d2.detection.rcnn import RelViTRCNN
from relvit_d2.encoders import ENCODERS
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.targets import relation_frequencies
from relvit_d2.pretext.task import PretextTask
from relvit_d2.utils.metrics import as_scalars
from tests.support.detectors import fitting, tiny_config

JOINT = ("MODEL.RELVIT.JOINT", True)
PRETEXT = {"loss_relation", "loss_position", "relation", "position"}


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


def test_detection_and_pretext_losses_are_returned_together() -> None:
    supervised, joint = build_detector(tiny_config()), build_detector(tiny_config(*JOINT))
    missing = joint.load_state_dict(supervised.state_dict(), strict=False)
    assert missing.missing_keys and all(name.startswith("pretext.") for name in missing.missing_keys)
    batch = [entry(40, 64), entry(33, 47)]
    torch.manual_seed(1)
    alone = supervised(batch)
    torch.manual_seed(1)
    both = joint(batch)
    assert both.keys() - alone.keys() == PRETEXT
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value)
    sum(both[f"loss_{task}"] for task in ("relation", "position")).backward()
    reached = [name for name, p in joint.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in reached} == {"backbone", "pretext"}
    assert all("simfp" not in name for name in reached)  # on the encoder's map, before the pyramid


def test_padding_has_no_pretext_loss() -> None:
    """In a batch with a larger image, only the tokens inside the small image have losses."""
    joint = build_detector(tiny_config(*JOINT))
    assert isinstance(joint, RelViTRCNN)
    batch = [entry(64, 64), entry(33, 46)]
    seen: list[PatchLayout] = []
    joint.pretext.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    joint(batch)
    valid = seen[0].valid[1].view(seen[0].grid)
    assert seen[0].extent.tolist() == [[16, 16], [9, 12]]  # patches of 4 pixels, including partly padded ones
    assert valid[:9, :12].all() and valid.sum() == 9 * 12


def test_pretext_losses_equal_those_of_the_task_on_the_last_map() -> None:
    joint = build_detector(tiny_config(*JOINT))
    assert isinstance(joint, RelViTRCNN) and isinstance(joint.pretext, PretextTask)
    batch = [entry(48, 64)]
    both = joint(batch)
    images = joint.preprocess_image(batch).tensor
    expected = joint.pretext(joint.backbone.encoder.tokens(images), PatchLayout.full(1, (12, 16)), [(12, 16)])
    for name, value in as_scalars(expected).items():
        torch.testing.assert_close(as_scalars(both)[name], value)
    assert expected["relation"].chance == max(relation_frequencies((12, 16)))
    torch.testing.assert_close(
        joint([entry(48, 64), entry(33, 47)])["relation"].chance,
        (max(relation_frequencies((12, 16))) + max(relation_frequencies((9, 12)))) / 2,
    )


@pytest.mark.parametrize("name", list(ENCODERS))
def test_joint_training_does_not_change_the_evaluation_of_any_encoder(name: str) -> None:
    model = build_detector(tiny_config(*JOINT, *fitting(name, (1, 0.5))))
    losses = model([entry(40, 56)])
    assert losses.keys() >= PRETEXT and all(math.isfinite(value) for value in as_scalars(losses).values())
    model.eval()
    with torch.no_grad():
        assert "instances" in model([entry(40, 56)])[0]


def test_a_position_leak_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="relvit_d2"):
        build_detector(tiny_config(*JOINT))
    assert sum("has position information" in record.message for record in caplog.records) == 1
    caplog.clear()
    build_detector(tiny_config(*JOINT, "MODEL.ENCODER.POS_EMBED", False))
    assert not caplog.records


def test_t2t_uses_pooled_tokens_and_positions_inside_each_image() -> None:
    """As in the authors' code, 14 x 14 tokens are pooled to 7 x 7 before every head."""
    joint = build_detector(tiny_config(*JOINT, *fitting("t2t_vit_14", (1, 0.5)), "PRETEXT.POOL", 2))
    assert isinstance(joint, RelViTRCNN)
    seen: list[tuple[Any, ...]] = []
    joint.pretext.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    joint([entry(224, 224), entry(100, 150)])
    tokens, layout = seen[0][:2]
    assert tokens.shape[1] == 49 and layout.grid == (7, 7)
    assert layout.extent.tolist() == [[7, 7], [4, 5]]  # of 7 x 10 tokens


def test_pretext_losses_of_a_batch_are_means_over_its_images() -> None:
    """The mean over the pairs and tokens of the images, each computed separately."""
    joint = build_detector(tiny_config(*JOINT))
    joint.eval()
    joint.pretext.eval()
    batch = [entry(64, 40), entry(33, 46)]

    def scores(entries: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = joint.preprocess_image(entries)
        with joint._last_maps() as maps:
            joint.features(images)
        return joint._pretext_losses(images, maps)

    both, alone = scores(batch), [scores([one]) for one in batch]
    tokens = [16 * 10, 9 * 12]
    for name, power in (("loss_position", 1), ("loss_relation", 2)):
        shares = torch.tensor(tokens, dtype=torch.float32) ** power
        expected = (torch.stack([one[name] for one in alone]) * shares).sum() / shares.sum()
        torch.testing.assert_close(both[name], expected)
