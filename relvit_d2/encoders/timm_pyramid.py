"""Models of timm with maps of several strides, such as ResNet and ConvNeXt, for detection and classification."""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from timm.models import group_parameters
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relvit_d2.encoders.base import Encoder
from relvit_d2.utils.errors import UserError

FINEST = 4  # stride of the finest map, pixels

# timm's modules whose models take images of any size and have maps of stride 4, 8, 16 and 32. Models of other modules
# need images of one size, have a batch norm that timm cannot freeze, or have other maps.
PYRAMIDS = frozenset(
    f"timm.models.{name}"
    for name in (
        *("byobnet", "convnext", "cspnet", "davit", "densenet", "dla", "edgenext", "efficientnet"),
        *("fasternet", "fastvit", "focalnet", "hgnet", "hrnet", "mambaout", "mobilenetv3", "mobilevit"),
        *("nfnet", "pvt_v2", "rdnet", "regnet", "res2net", "resnest", "resnet", "resnetv2", "senet", "sknet"),
        *("starnet", "swiftformer", "tiny_vit", "twins", "vovnet"),
    )
)


class TimmPyramid(Encoder):
    """A model of timm with four maps, of stride 4, 8, 16 and 32.

    Batch norm is frozen, as in Detectron2's ResNet: it uses the statistics of the loaded weights, in training too, so
    that results do not depend on the batch. Images have any size: they are padded with zeros on the right and below to
    multiples of 32 pixels. The last map has timm's final norm, also in a ConvNeXt, where timm applies it to the mean
    over the map.

    Args:
        net: timm's model.
        in_chans: channels of its images.
    """

    def __init__(self, net: Any, in_chans: int) -> None:
        super().__init__()
        self.frozen_statistics = any(isinstance(module, _BatchNorm) for module in net.modules())
        self.norm: Any = nn.Identity()
        if isinstance(net, ConvNeXt) and isinstance(net.norm_pre, nn.Identity):
            self.norm = net.head.norm
        maps = [(i, info) for i, info in enumerate(net.feature_info) if info["reduction"] >= FINEST]
        self.indices = [i for i, _ in maps]
        self.strides = {f"s{info['reduction']}": info["reduction"] for _, info in maps}
        self.channels = {f"s{info['reduction']}": info["num_chs"] for _, info in maps}
        first = net.default_cfg["first_conv"]
        self.patch_embedding = f"net.{first}.weight" if isinstance(first, str) else ""
        net.reset_classifier(0, "")
        self.net = freeze_batch_norm_2d(net)
        self._remove_unused(torch.zeros(1, in_chans, 64, 64, device="meta"))

    def _remove_unused(self, images: Tensor) -> None:
        """Replace the modules that no map depends on, such as those between the last map and the classifier."""
        probe: Any = copy.deepcopy(self.net).to("meta")  # computes no values
        with torch.enable_grad():
            maps = probe.forward_intermediates(images, indices=self.indices, norm=True, intermediates_only=True)
            sum(level.sum() for level in maps).backward()
        for name, parameter in probe.named_parameters():
            if parameter.grad is None:
                path, _, _ = name.rpartition(".")
                parent, _, child = path.rpartition(".")
                setattr(self.net.get_submodule(parent), child, nn.Identity())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        down, right = (-side % self.strides[self.last] for side in (height, width))
        padded = F.pad(images, (0, right, 0, down)) if down or right else images
        levels = self.net.forward_intermediates(padded, indices=self.indices, norm=True, intermediates_only=True)
        maps = dict(zip(self.strides, levels, strict=True))
        maps[self.last] = self.norm(maps[self.last])
        if padded is images:
            return maps
        sizes = {name: (-(-height // stride), -(-width // stride)) for name, stride in self.strides.items()}
        return {name: maps[name][..., :rows, :cols] for name, (rows, cols) in sizes.items()}

    @cached_property
    def _layers(self) -> dict[str, int]:
        layers: dict[str, int] = group_parameters(self.net, self.net.group_matcher(), reverse=True)
        return layers

    def depth_of(self, name: str) -> int:
        return self._layers.get(name.removeprefix("net."), self.depth + 1)

    @property
    def depth(self) -> int:
        return max(self._layers.values())

    def checkpoint_blocks(self) -> None:
        try:
            self.net.set_grad_checkpointing()
        except AssertionError:  # timm's answer of models without it
            super().checkpoint_blocks()

    def check_pretext(self) -> None:
        raise UserError(
            f"encoder '{self.name}' does not support the pretext tasks, only detection and classification without "
            "them: choose a ViT, T2T-ViT or Swin, or train without them (MODEL.RELVIT.JOINT False; --no-pretrain)"
        )


def pyramid_builder(model: str, make: Callable[..., Any]) -> Callable[..., Encoder]:
    """Return the builder of a :class:`TimmPyramid`; ``make`` maps timm's keyword arguments to ``model``."""

    def build(
        patch_size: int = FINEST,
        img_size: int = 224,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        in_chans: int = 3,
    ) -> Encoder:
        """Build the encoder.

        ``img_size``, ``pos_embed`` and ``dropout`` have no effect: no weight depends on the image size, and the blocks
        have no dropout.

        Raises:
            UserError: ``patch_size`` is not 4, or the model has no drop path.
        """
        if patch_size != FINEST:
            raise UserError(
                f"MODEL.ENCODER.PATCH_SIZE {patch_size} is not supported by encoder 'timm:{model}'; set it to {FINEST}"
            )
        rate = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            return TimmPyramid(make(in_chans=in_chans, **rate), in_chans)
        except TypeError as error:
            if not rate:
                raise
            raise UserError(
                f"MODEL.ENCODER.DROP_PATH {drop_path}: encoder 'timm:{model}' has no drop path; set it to 0.0"
            ) from error

    return build
