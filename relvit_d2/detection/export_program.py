"""A detector as one function of tensors, which ``torch.onnx`` can export.

Detectron2's classes pass lists of objects and branch on the number of boxes. This module computes the same detections
from the trained layers with operators that ONNX has.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torchvision.ops import nms

OUTSIDE = -1e8  # score of entries without a box, below every logit


class DetectorProgram(nn.Module):
    """Inference of a :class:`relvit_d2.detection.rcnn.RelViTRCNN` on one image.

    Args:
        model: the detector, in evaluation mode.
    """

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.backbone, self.rpn, self.heads = model.backbone, model.proposal_generator, model.roi_heads

    def forward(self, image: Tensor, size: Tensor, original: Tensor) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            image: ``(1, C, H, W)``, resized, normalised and padded with zeros.
            size: float32 ``(2,)``, height and width of the resized image without padding.
            original: float32 ``(2,)``, height and width before resizing.

        Returns:
            Boxes ``(N, 4)`` XYXY in pixels before resizing, scores ``(N,)`` in descending order, classes ``(N,)`` int64
            and, with a mask head, mask probabilities ``(N, M, M)``, whose grid covers the box.
        """
        levels = self.backbone(image)
        bounds = size.flip(0).repeat(2)
        boxes, scores, classes = self._detections(levels, self._proposals(levels, bounds), bounds)
        scaled = boxes * (original / size).flip(0).repeat(2)
        if not self.heads.mask_on:
            return scaled, scores, classes
        return scaled, scores, classes, self._masks(levels, boxes, classes)

    def _proposals(self, levels: dict[str, Tensor], bounds: Tensor) -> Tensor:
        """Return proposals ``(P, 4)``, as Detectron2's ``find_top_rpn_proposals``."""
        rpn = self.rpn
        features = [levels[name] for name in rpn.in_features]
        boxes, scores = [], []
        for anchors, logits, deltas in zip(rpn.anchor_generator(features), *rpn.rpn_head(features), strict=True):
            # A fixed number of the best, whatever the size of the level.
            padded = F.pad(logits[0].permute(1, 2, 0).flatten(), (0, rpn.pre_nms_topk[False]), value=OUTSIDE)
            top, indices = padded.topk(rpn.pre_nms_topk[False])
            indices = torch.where(top > OUTSIDE, indices, 0)
            rows = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
            decoded = rpn.box2box_transform.apply_deltas(rows[indices], anchors.tensor[indices])
            clipped = _clip(decoded, bounds)
            top = torch.where(_nonempty(clipped, rpn.min_box_size), top, OUTSIDE)
            kept = nms(clipped, top, rpn.nms_thresh)
            boxes.append(clipped[kept])
            scores.append(top[kept])
        every = torch.cat(scores)
        order = every.argsort(descending=True)[: rpn.post_nms_topk[False]]
        proposals = torch.cat(boxes)[order[every[order] > OUTSIDE]]
        torch._check(proposals.shape[0] <= rpn.post_nms_topk[False])  # else torch.export infers a limit beyond int64
        return proposals

    def _detections(
        self, levels: dict[str, Tensor], proposals: Tensor, bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and classes, as Detectron2's ``fast_rcnn_inference_single_image``."""
        predictor = self.heads.box_predictor
        pooled = _pooled(self.heads.box_pooler, [levels[n] for n in self.heads.box_in_features], proposals)
        logits, deltas = predictor(self.heads.box_head(pooled))
        probabilities = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(-1)
        decoded = predictor.box2box_transform.apply_deltas(deltas, proposals).unflatten(1, (-1, 4))
        rows, classes = (probabilities[:, :-1] > predictor.test_score_thresh).nonzero().unbind(1)
        scores = probabilities[rows, classes]
        boxes = _clip(decoded[rows, classes if decoded.shape[1] > 1 else 0], bounds)
        # Boxes of different classes are moved apart.
        apart = boxes + (classes * (bounds.amax(0) + 1))[:, None]
        kept = nms(apart, scores, predictor.test_nms_thresh)[: predictor.test_topk_per_image]
        kept = kept[_nonempty(boxes[kept])]
        return boxes[kept], scores[kept], classes[kept]

    def _masks(self, levels: dict[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Return mask probabilities ``(N, M, M)``, as Detectron2's ``mask_rcnn_inference``."""
        pooled = _pooled(self.heads.mask_pooler, [levels[n] for n in self.heads.mask_in_features], boxes)
        masks = self.heads.mask_head.layers(pooled)
        chosen = masks[torch.arange(masks.shape[0]), classes] if masks.shape[1] > 1 else masks[:, 0]
        return chosen.sigmoid()


def _clip(boxes: Tensor, bounds: Tensor) -> Tensor:
    """Clip boxes ``(N, 4)`` to ``(width, height, width, height)``."""
    return torch.minimum(boxes.clamp(min=0), bounds)


def _nonempty(boxes: Tensor, side: float = 0.0) -> Tensor:
    """Return which boxes ``(N, 4)`` have both sides above ``side`` pixels, ``(N,)`` bool."""
    return ((boxes[:, 2:] - boxes[:, :2]) > side).all(1)


def _pooled(pooler: ROIPooler, levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Return the features ``(N, C, size, size)`` of boxes ``(N, 4)``, as Detectron2's ``ROIPooler``."""
    rois = F.pad(boxes, (1, 0))  # the index of the image, 0
    if len(levels) == 1:
        return pooler.level_poolers[0](levels[0], rois)
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    numbers = (pooler.canonical_level + torch.log2(sizes / pooler.canonical_box_size + 1e-8)).floor()
    numbers = numbers.clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    pooled = boxes.new_zeros(boxes.shape[0], levels[0].shape[1], *pooler.output_size)
    for number, (level, align) in enumerate(zip(levels, pooler.level_poolers, strict=True)):
        (chosen,) = (numbers == number).nonzero(as_tuple=True)
        pooled = pooled.index_put((chosen,), align(level, rois[chosen]))
    return pooled
