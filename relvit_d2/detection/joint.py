"""Mask R-CNN that is trained on the pretext tasks too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.encoders import Encoder
from relvit_d2.engine.joint import say_if_positions_leak
from relvit_d2.errors import UserError
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.task import PretextTask


@META_ARCH_REGISTRY.register()
class JointRCNN(GeneralizedRCNN):
    """Adds the pretext losses on the encoder's last map to the losses of training, and nothing else.

    The images are not permuted, for the detector needs them as they are. Tokens that see nothing but padding take no
    part.
    """

    @configurable
    def __init__(self, *, pretext: PretextTask, **parts: Any) -> None:
        super().__init__(**parts)
        self.pretext = pretext

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """See Detectron2's ``configurable``.

        Raises:
            UserError: for tasks or a ``MODEL.RELVIT.GRID`` that cannot be.
        """
        parts = super().from_config(cfg)
        encoder: Encoder = parts["backbone"].encoder
        grid = tuple(cfg.MODEL.RELVIT.GRID)
        if len(grid) != 2 or min(grid) < 1:
            raise UserError(f"MODEL.RELVIT.GRID {list(grid)} is no grid: give rows and columns, such as [7, 7]")
        say_if_positions_leak(encoder)
        return parts | {"pretext": PretextTask.from_keys(encoder.dim, grid, cfg.PRETEXT)}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """See Detectron2's class; in training ``loss_T``, ``accuracy_T`` and ``chance_T`` of each task T are added."""
        if not self.training:
            return super().forward(batched_inputs)
        with self._last_map() as maps:
            losses = super().forward(batched_inputs)
        encoder, (height, width) = self.backbone.encoder, maps[0].shape[-2:]
        tokens = maps[0].flatten(2).mT
        grids = [encoder.grid(*entry["image"].shape[-2:]) for entry in batched_inputs]
        layout = PatchLayout.padded((height, width), torch.tensor(grids, device=tokens.device))
        return losses | self.pretext(tokens, layout) | self._chance(grids)

    @contextmanager
    def _last_map(self) -> Iterator[list[Tensor]]:
        """Collect the encoder's last map of a forward pass inside the block."""
        maps: list[Tensor] = []
        handle = self.backbone.encoder.register_forward_hook(
            lambda encoder, _, outputs: maps.append(outputs[encoder.last])
        )
        try:
            yield maps
        finally:
            handle.remove()

    def _chance(self, grids: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return the mean over images of the accuracies by chance."""
        chances: dict[str, Tensor] = {}
        for name, task in self.pretext.named_tasks():
            if task.measure == "accuracy":
                chances[f"chance_{name}"] = torch.tensor([task.chance(grid) for grid in grids]).mean()
        return chances
