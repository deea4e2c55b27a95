"""Mask R-CNN whose detections in an image do not depend on the rest of the batch, with optional pretext losses."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.detection.mean_teacher import Teacher
from relvit_d2.detection.regions import padded_size
from relvit_d2.encoders import Encoder
from relvit_d2.pretext.task import PretextTask
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import Metric


@META_ARCH_REGISTRY.register()
class RelViTRCNN(GeneralizedRCNN):
    """Detectron2's GeneralizedRCNN with features that do not depend on the padding of the batch.

    Position embeddings, attention and windows of a transformer depend on the input size. Each image is therefore
    padded only to a multiple of the coarsest stride, images of equal padded size pass the backbone together, and the
    RPN (:class:`relvit_d2.detection.regions.RelViTRPN`) ignores the remaining area of the batched maps.

    With ``pretext``, the pretext losses on the encoder's last map are added in training, on unpermuted images. Tokens
    that contain only padding are left out.

    With a ``teacher``, a training batch may have unlabelled images too (:mod:`relvit_d2.detection.mean_teacher`).
    """

    @configurable
    def __init__(self, *, pretext: PretextTask | None, **parts: Any) -> None:
        super().__init__(**parts)
        self.pretext = pretext
        self.teacher: Teacher | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments (Detectron2's ``configurable``)."""
        parts = super().from_config(cfg)
        return parts | {"pretext": _pretext(cfg, parts["backbone"].encoder) if cfg.MODEL.RELVIT.JOINT else None}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return the losses in training (joint training adds pretext losses and metrics), else the detections."""
        if not self.training:
            return self.inference(batched_inputs)
        # First of all, since it replaces the weights for a while.
        labelled, unlabelled = self.teacher.label(batched_inputs) if self.teacher else (batched_inputs, [])
        images = self.preprocess_image(labelled)
        instances = [entry["instances"].to(self.device) for entry in labelled]
        with self._last_maps() as last_maps:
            features = self.features(images)
        proposals, proposal_losses = self.proposal_generator(images, features, instances)
        _, losses = self.roi_heads(images, features, proposals, instances)
        losses |= proposal_losses | self._pretext_losses(images, last_maps)
        return losses | (self.teacher.losses(unlabelled) if self.teacher and unlabelled else {})

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """Return the detections; the arguments are those of Detectron2's class."""
        images = self.preprocess_image(batched_inputs)
        features = self.features(images)
        if detected_instances is None:
            proposals, _ = self.proposal_generator(images, features, None)
            results, _ = self.roi_heads(images, features, proposals, None)
        else:
            boxes = [instances.to(self.device) for instances in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, boxes)
        return self._postprocess(results, batched_inputs, images.image_sizes) if do_postprocess else results

    def features(self, images: ImageList) -> dict[str, Tensor]:
        """Return the backbone's levels, computed at the padded size of each image.

        Outside of that size a level repeats its last row and column, like RoIAlign at the edge of a map.
        """
        groups = self._groups(images)
        if len(groups) == 1:
            return self.backbone(images.tensor)
        levels = [self.backbone(images.tensor[group, :, :h, :w]) for (h, w), group in groups.items()]
        return {name: _batched([maps[name] for maps in levels], groups.values()) for name in levels[0]}

    def _groups(self, images: ImageList) -> dict[tuple[int, int], list[int]]:
        """Return the indices of the images of each padded size ``(height, width)``."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(images.image_sizes):
            groups.setdefault(padded_size(size, self.backbone.size_divisibility), []).append(index)
        return groups

    @contextmanager
    def _last_maps(self) -> Iterator[list[Tensor]]:
        """In joint training, collect the encoder's last map of each forward pass inside the block."""
        maps: list[Tensor] = []
        if self.pretext is None:
            yield maps
            return
        handle = self.backbone.encoder.register_forward_hook(
            lambda encoder, _, outputs: maps.append(outputs[encoder.last])
        )
        try:
            yield maps
        finally:
            handle.remove()

    def _pretext_losses(self, images: ImageList, last_maps: list[Tensor]) -> dict[str, Tensor | Metric[Any]]:
        """Return the pretext losses and metrics on the last maps of the groups of images."""
        if self.pretext is None:
            return {}
        last = _batched(last_maps, self._groups(images).values())
        grids = [self.backbone.encoder.grid(*size) for size in images.image_sizes]
        tokens, layout = self.pretext.pooled(last, torch.tensor(grids, device=last.device))
        return self.pretext(tokens, layout, [(rows, cols) for rows, cols in layout.extent.tolist()])


def _pretext(cfg: CfgNode, encoder: Encoder) -> PretextTask:
    """Build the pretext tasks of joint training."""
    grid = tuple(cfg.MODEL.RELVIT.GRID)
    if len(grid) != 2 or min(grid) < 1:
        raise UserError(f"MODEL.RELVIT.GRID {list(grid)} is not a grid: give rows and columns, such as [7, 7]")
    encoder.check_pretext()
    encoder.warn_position_leak()
    return PretextTask.from_keys(encoder.dim, grid, cfg.PRETEXT)


def _batched(parts: list[Tensor], groups: Iterable[list[int]]) -> Tensor:
    """Combine maps ``(b, C, h, w)`` of several sizes to ``(B, C, max h, max w)``, with replication padding."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (2, 3))
    padded = [F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), mode="replicate") for x in parts]
    indices = torch.tensor([index for group in groups for index in group], device=parts[0].device)
    return torch.cat(padded)[indices.argsort()]
