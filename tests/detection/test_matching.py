"""Anchors are matched as Detectron2 matches them."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from relvit_d2.detection.matching import match_anchors


def boxes(count: int, seed: int) -> torch.Tensor:
    """Return boxes with corners on a coarse grid, so that many IoUs are equal."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (count, 2), generator=generator) * 8.0
    return torch.cat([corners, corners + torch.randint(1, 5, (count, 2), generator=generator) * 8.0], 1)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("objects", [0, 1, 7, 40])
@pytest.mark.parametrize("block", [0, 1, 300, 1000])
@pytest.mark.parametrize("shift", [0, 1000])
def test_the_matches_are_those_of_detectron2(objects: int, block: int, low_quality: bool, shift: int) -> None:
    anchors, truth = boxes(300, 0), boxes(objects, 1)
    truth[:1] += shift  # by 1,000, it overlaps no anchor, and all anchors are its closest ones
    truth[5:6] = truth[4:5]
    truth[6:7, 2:] = truth[6:7, :2]  # without area
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=low_quality)
    matches, labels = match_anchors(truth, anchors, matcher, block)
    expected, expected_labels = matcher(pairwise_iou(Boxes(truth), Boxes(anchors)))
    assert torch.equal(matches, expected)
    assert torch.equal(labels, expected_labels)
