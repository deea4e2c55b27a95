"""RPN and ROI heads that skip the padding of the batch and do not train on background inside ignore regions.

Ignore regions are crowds and KITTI's ``DontCare``. A box is inside one if more than half of the box's area is.
"""

from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances, pairwise_ioa, pairwise_iou
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.data.detection.regions import InstancesWithIgnoreRegions
from relvit_d2.detection.matching import match_anchors

INSIDE = 0.5
OUTSIDE_LOGIT = -1e8  # of anchors outside of their image; finite, as Detectron2 reports infinities as divergence


def padded_size(size: tuple[int, int], divisibility: int) -> tuple[int, int]:
    """Return height and width of an image padded to multiples of ``divisibility`` pixels; 0: no padding."""
    height, width = (-(-int(side) // max(divisibility, 1)) * max(divisibility, 1) for side in size)
    return height, width


@PROPOSAL_GENERATOR_REGISTRY.register()
class RelViTRPN(RPN):
    """Detectron2's RPN with proposals that do not depend on the batch, and with ignore regions.

    Anchors outside of an image's padded size are neither trained on nor proposed, and its maps are zero there, like
    the zero padding of convolutions at the edge. Background anchors inside an ignore region are not trained on.

    Args:
        divisibility: images are padded to multiples of this many pixels.
        parts: arguments of Detectron2's class.
    """

    @configurable
    def __init__(self, *, divisibility: int, **parts: Any) -> None:
        super().__init__(**parts)
        self.divisibility = divisibility
        self._sizes: list[tuple[int, int]] = []  # padded sizes of the images of the batch, unless all are equal

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments (Detectron2's ``configurable``)."""
        keys = cfg.MODEL.PYRAMID
        return super().from_config(cfg, input_shape) | {"divisibility": keys.SIZE_DIVISIBILITY or keys.STRIDES[-1]}

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return the proposals and the losses; the arguments are those of Detectron2's class."""
        sizes = [padded_size(size, self.divisibility) for size in images.image_sizes]
        self._sizes = sizes if len(set(sizes)) > 1 else []
        if self._sizes:
            levels = zip(self.in_features, self.anchor_generator.strides, strict=True)
            features = {name: self._masked(features[name], stride) for name, stride in levels}
        return super().forward(images, features, gt_instances)

    def _masked(self, level: Tensor, stride: int) -> Tensor:
        """Set a level ``(B, C, h, w)`` to zero outside of each image's padded size."""
        sizes = torch.tensor(self._sizes, device=level.device)
        rows, cols = (torch.arange(0, side * stride, stride, device=level.device) for side in level.shape[2:])
        inside = (rows < sizes[:, :1])[:, :, None] & (cols < sizes[:, 1:])[:, None]
        return level * inside[:, None]

    def _outside(self, anchors: list[Boxes]) -> list[Tensor]:
        """Return for each level which anchors are outside of each image's padded size, ``(B, R)`` bool."""
        outside = []
        for boxes, stride in zip(anchors, self.anchor_generator.strides, strict=True):
            # Corners of anchor cells are multiples of the stride; half a pixel is more than their rounding error.
            corners = boxes.get_centers() - self.anchor_generator.offset * stride + 0.5
            sizes = corners.new_tensor(self._sizes).flip(1)
            outside.append((corners > sizes[:, None]).any(2))
        return outside

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Return the proposals; the arguments are those of Detectron2's class."""
        if self._sizes:
            pairs = zip(pred_objectness_logits, self._outside(anchors), strict=True)
            pred_objectness_logits = [logits.masked_fill(outside, OUTSIDE_LOGIT) for logits, outside in pairs]
        found = super().predict_proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        return [proposals[proposals.objectness_logits > OUTSIDE_LOGIT] for proposals in found]

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return labels and matched boxes of the anchors, outside of an image -1 (ignored) and 0."""
        every = Boxes.cat(anchors)
        inside = ~torch.cat(self._outside(anchors), 1) if self._sizes else [slice(None)] * len(gt_instances)
        labels, boxes = [], []
        for kept, instances in zip(inside, gt_instances, strict=True):
            objects, candidates = instances.gt_boxes.tensor, every[kept]
            matches, found = match_anchors(objects, candidates.tensor, self.anchor_matcher)
            if self.anchor_boundary_thresh >= 0:
                found[~candidates.inside_box(instances.image_size, self.anchor_boundary_thresh)] = -1
            ignored = inside_regions(candidates, instances)
            if ignored is not None:
                found[(found == 0) & ignored] = -1
            image_labels, image_boxes = found.new_full((len(every),), -1), torch.zeros_like(every.tensor)
            image_labels[kept] = self._subsample_labels(found)
            if len(objects):
                image_boxes[kept] = objects[matches]
            labels.append(image_labels)
            boxes.append(image_boxes)
        return labels, boxes


@ROI_HEADS_REGISTRY.register()
class IgnoringROIHeads(StandardROIHeads):
    """Detectron2's heads; background proposals inside an ignore region are not trained on."""

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Return the sampled proposals; the arguments are those of Detectron2's class."""
        kept = []
        for found, instances in zip(proposals, targets, strict=True):
            inside = inside_regions(found.proposal_boxes, instances)
            if inside is not None:
                _, labels = self.proposal_matcher(pairwise_iou(instances.gt_boxes, found.proposal_boxes))
                found = found[~inside | (labels != 0)]
            kept.append(found)
        return super().label_and_sample_proposals(kept, targets)


# The classes that replace those of Detectron2.
IGNORE_REGION_HEADS = {"RPN": RelViTRPN.__name__, "StandardROIHeads": IgnoringROIHeads.__name__}


def inside_regions(boxes: Boxes, instances: Instances) -> Tensor | None:
    """Return which boxes are inside an ignore region, ``(N,)`` bool; None if the image has no regions."""
    if not isinstance(instances, InstancesWithIgnoreRegions) or not len(instances.regions):
        return None
    return pairwise_ioa(instances.regions, boxes).amax(dim=0) > INSIDE
