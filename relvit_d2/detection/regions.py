"""Region heads that make no background of regions to be ignored: crowds, KITTI's ``DontCare``.

A box counts as inside a region if more than half of its own area is.
"""

import torch
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor

from relvit_d2.data.regions import Targets

INSIDE = 0.5


@PROPOSAL_GENERATOR_REGISTRY.register()
class IgnoringRPN(RPN):
    """Detectron2's RPN; an anchor inside a region that would be background is not trained on."""

    _inside: Tensor | None = None  # of the anchors of the image whose labels are being made, which are in a region

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See Detectron2's class."""
        every = Boxes.cat(anchors)
        labels, boxes = [], []
        for instances in gt_instances:
            self._inside = inside_regions(every, instances)
            (image_labels,), (image_boxes,) = super().label_and_sample_anchors([every], [instances])
            labels.append(image_labels)
            boxes.append(image_boxes)
        self._inside = None
        return labels, boxes

    def _subsample_labels(self, label: Tensor) -> Tensor:
        if self._inside is not None:
            label[(label == 0) & self._inside] = -1
        return super()._subsample_labels(label)


@ROI_HEADS_REGISTRY.register()
class IgnoringROIHeads(StandardROIHeads):
    """Detectron2's heads; a proposal inside a region that would be background is not trained on."""

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """See Detectron2's class."""
        kept = []
        for found, instances in zip(proposals, targets, strict=True):
            inside = inside_regions(found.proposal_boxes, instances)
            if inside is not None:
                _, labels = self.proposal_matcher(pairwise_iou(instances.gt_boxes, found.proposal_boxes))
                found = found[~inside | (labels != 0)]
            kept.append(found)
        return super().label_and_sample_proposals(kept, targets)


HEEDING = {"RPN": IgnoringRPN.__name__, "StandardROIHeads": IgnoringROIHeads.__name__}
"""Detectron2's names, and those of the classes here that stand in for them."""


def inside_regions(boxes: Boxes, instances: Instances) -> Tensor | None:
    """Return which of the boxes, ``(N,)`` bool, are inside a region that the image has; ``None`` if it has none."""
    if not isinstance(instances, Targets) or not len(instances.regions):
        return None
    return pairwise_ioa(instances.regions, boxes).amax(dim=0) > INSIDE
