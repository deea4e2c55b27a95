"""Encoders as Detectron2 backbones, and feature pyramids on top of them."""

import math
from itertools import pairwise

import torch
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from relvit_d2.encoders import Encoder, encoder_from_keys
from relvit_d2.utils.errors import UserError

PYRAMIDS = ("simple", "fpn", "multitap")


class EncoderBackbone(Backbone):
    """An encoder with Detectron2's backbone interface."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map normalised images ``(B, in_chans, H, W)`` to feature maps ``(B, C, H / stride, W / stride)`` by name."""
        maps = self.maps(x)
        # The encoder's maps are channels-last. With them, torch's CPU gradients of 3 x 3 convolutions in float32 were
        # measured to take three times as long as with contiguous maps (AMD EPYC).
        return {name: m.contiguous() for name, m in maps.items()} if x.device.type == "cpu" else maps

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Map images to feature maps in any memory layout."""
        return self.encoder(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        strides, channels = self.encoder.strides, self.encoder.channels
        return {name: ShapeSpec(channels=channels[name], stride=strides[name]) for name in strides}


class NormedMaps(EncoderBackbone):
    """The maps of an encoder's stages, each after its own LayerNorm; the last one has the encoder's final norm already.

    As in Detectron2's Swin (``modeling/backbone/swin.py:622-630,689-690``).

    Args:
        encoder: an encoder with maps of several strides.
        names: names of the maps, finest first.
    """

    def __init__(self, encoder: Encoder, names: list[str]) -> None:
        super().__init__(encoder)
        self.names = names
        self.norms = nn.ModuleDict({n: nn.LayerNorm(encoder.channels[n]) for n in names if n != encoder.last})

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Map images to the normalised maps."""
        maps = self.encoder(x)
        normed = {n: norm(maps[n].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for n, norm in self.norms.items()}
        return {name: normed.get(name, maps[name]) for name in self.names}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        shapes = super().output_shape()
        return {name: shapes[name] for name in self.names}


class ResizedBlockMaps(EncoderBackbone):
    """The maps of several blocks of an encoder, which have one stride, resized to several strides, finest first.

    (Y. Li et al., "Benchmarking Detection Transfer Learning with Vision Transformers", 2021, section 2.2.)

    Args:
        encoder: returns the maps of as many blocks as there are scales.
        scales: scale factor of each map: 4, 2, 1 or 0.5.
        norm: Detectron2's name of the norm between the two deconvolutions of scale 4.
    """

    def __init__(self, encoder: Encoder, scales: list[float], norm: str) -> None:
        super().__init__(encoder)
        stride = encoder.strides[encoder.last]
        self.resize = nn.ModuleList([_resizing(encoder.dim, scale, norm) for scale in scales])
        self._strides = {f"s{stride / scale:.0f}": int(stride / scale) for scale in scales}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images to the resized maps, finest first."""
        maps = super().forward(x).values()
        return {name: resize(m) for name, resize, m in zip(self._strides, self.resize, maps, strict=True)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return {name: ShapeSpec(channels=self.encoder.dim, stride=stride) for name, stride in self._strides.items()}


def _resizing(dim: int, scale: float, norm: str) -> nn.Module:
    if scale == 4:
        steps = [nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2) for _ in range(2)]
        return nn.Sequential(steps[0], get_norm(norm, dim) or nn.Identity(), nn.GELU(), steps[1])
    if scale == 2:
        return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
    return nn.Identity() if scale == 1 else nn.MaxPool2d(kernel_size=2, stride=2)


class SimplePyramid(SimpleFeaturePyramid):
    """The simple feature pyramid of "Exploring Plain Vision Transformer Backbones" on an encoder's last map.

    Detectron2's class requests padding under a misspelt key, so images are not padded, and their right and bottom
    borders are cut off unless both sides are multiples of the coarsest stride (``modeling/backbone/vit.py:473``,
    ``structures/image_list.py:97``). This class pads.
    """

    @property
    def size_divisibility(self) -> int:
        """The sides of a padded batch are multiples of this many pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The padding, in the form that Detectron2's ``ImageList.from_tensors`` takes."""
        return {"size_divisibility": self._size_divisibility}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images ``(B, in_chans, H, W)`` to the levels in float32."""
        return in_float32(super().forward(x))

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self.net.encoder


class MapPyramid(FPN):
    """Detectron2's FPN on maps of several strides."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images ``(B, in_chans, H, W)`` to the levels in float32."""
        return in_float32(super().forward(x))

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self.bottom_up.encoder


class SubsampledLevel(nn.Module):
    """A further level: every second row and column of the last one, like Detectron2's ``LastLevelMaxPool``.

    With pooling, or slices with a step, ``torch.export`` would specialise a program to odd or even sizes.
    """

    num_levels = 1

    def __init__(self, in_feature: str) -> None:
        super().__init__()
        self.in_feature = in_feature

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``(B, C, h, w)`` to ``(B, C, ceil(h / 2), ceil(w / 2))``."""
        rows, cols = (torch.arange(0, side, 2, device=x.device) for side in x.shape[-2:])
        return [x.index_select(2, rows).index_select(3, cols)]


def in_float32(levels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the levels in float32: Detectron2's RoIAlign casts boxes to their dtype, and bfloat16 coordinates are
    rounded to more than a pixel above 256."""
    return {name: level.float() for name, level in levels.items()}


@BACKBONE_REGISTRY.register()
def build_encoder_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimplePyramid | MapPyramid:
    """Build the backbone from the keys ``MODEL.ENCODER`` and ``MODEL.PYRAMID``.

    Levels are named by their stride as in Detectron2's pyramids: ``p2`` has stride 4, ``p6`` stride 64.

    Raises:
        UserError: if the pyramid is unknown, cannot make a stride from those of the encoder, or lacks a level that the
            heads read.
    """
    encoder = encoder_from_keys(cfg.MODEL)
    if not 0 <= cfg.MODEL.BACKBONE.FREEZE_AT <= encoder.depth + 1:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}: give 0 for none, 1 for the patch embedding, 2 "
            f"for the first block as well, up to {encoder.depth + 1}"
        )
    for parameter_name, parameter in encoder.named_parameters():
        if encoder.depth_of(parameter_name) < cfg.MODEL.BACKBONE.FREEZE_AT:
            parameter.requires_grad_(False)
    keys = cfg.MODEL.PYRAMID
    name = keys.NAME
    if name == "auto":
        name = "fpn" if len(encoder.strides) > 1 else "simple"
    if name not in PYRAMIDS:
        raise UserError(f"MODEL.PYRAMID.NAME '{keys.NAME}' is unknown; give auto, {', '.join(PYRAMIDS)}")
    strides = list(keys.STRIDES)
    if strides == [0]:
        raise UserError(
            "MODEL.PYRAMID.STRIDES is [0]: give the strides, or load the config with relvit_d2.tasks.load_config, "
            "which derives them from the encoder"
        )
    steps = [math.log2(b / a) for a, b in pairwise(strides)]
    if not strides or any(stride & (stride - 1) for stride in strides) or any(step != 1 for step in steps):
        raise UserError(f"MODEL.PYRAMID.STRIDES {strides} are not powers of two, each twice the one before")
    if keys.SIZE_DIVISIBILITY % strides[-1]:
        raise UserError(
            f"MODEL.PYRAMID.SIZE_DIVISIBILITY {keys.SIZE_DIVISIBILITY} is not a multiple of the coarsest stride of "
            f"MODEL.PYRAMID.STRIDES, {strides[-1]}: give a multiple, or 0 for that stride"
        )
    top = SubsampledLevel(f"p{int(math.log2(strides[-1]))}") if keys.TOP_BLOCK else None
    build = _on_maps if name == "fpn" else _on_one_stride
    backbone = build(encoder, strides, top, keys, name)
    backbone._size_divisibility = keys.SIZE_DIVISIBILITY or strides[-1]
    check_levels(cfg, list(backbone.output_shape()), "MODEL.PYRAMID")
    return backbone


def check_levels(cfg: CfgNode, levels: list[str], owner: str) -> None:
    """Raise a :class:`UserError` if the heads read a level that is not in ``levels``; ``owner`` is named in it."""
    for part in ("RPN", "ROI_HEADS"):
        if missing := set(cfg.MODEL[part].IN_FEATURES) - set(levels):
            raise UserError(f"MODEL.{part}.IN_FEATURES names {sorted(missing)}, but {owner} has the levels {levels}")


def _on_one_stride(
    encoder: Encoder, strides: list[int], top: nn.Module | None, keys: CfgNode, name: str
) -> SimplePyramid | MapPyramid:
    base = encoder.strides[encoder.last]
    scales = [base / stride for stride in strides]
    if not set(scales) <= {4.0, 2.0, 1.0, 0.5}:
        raise UserError(
            f"MODEL.PYRAMID.STRIDES {strides} do not fit an encoder of stride {base}: give strides "
            f"from {max(base // 4, 1)} to {base * 2}, or [0] to derive them"
        )
    if name == "simple":
        return SimplePyramid(EncoderBackbone(encoder), encoder.last, keys.OUT_CHANNELS, scales, top, keys.NORM)
    encoder.select_blocks(len(strides))
    maps = ResizedBlockMaps(encoder, scales, keys.NORM)
    return MapPyramid(maps, list(maps.output_shape()), keys.OUT_CHANNELS, keys.NORM, top)


def _on_maps(encoder: Encoder, strides: list[int], top: nn.Module | None, keys: CfgNode, _: str) -> MapPyramid:
    names = [name for name, stride in encoder.strides.items() if stride in strides]
    if [encoder.strides[name] for name in names] != strides:
        raise UserError(
            f"MODEL.PYRAMID.STRIDES {strides} must be among the strides {list(encoder.strides.values())} of encoder "
            f"'{encoder.name}' for MODEL.PYRAMID.NAME fpn; for an encoder of one stride set simple or multitap"
        )
    return MapPyramid(NormedMaps(encoder, names), names, keys.OUT_CHANNELS, keys.NORM, top)
