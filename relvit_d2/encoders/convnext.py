"""ConvNeXt, implemented by timm (``timm/models/convnext.py``), for detection and classification."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import Tensor, nn

from relvit_d2.encoders.base import Encoder
from relvit_d2.utils.errors import UserError

PATCH = 4  # pixels; "A ConvNet for the 2020s" (Liu et al., 2022), section 2.2


class ConvNeXt(Encoder):
    """A ConvNeXt: four maps of stride 4, 8, 16 and 32, the last one after the final norm.

    timm applies the final norm to the mean over the map in most models; here it is applied to each position. Images
    have any size: they are padded with zeros on the right and below to multiples of 32 pixels.

    Args:
        net: timm's model.
    """

    patch_embedding = "net.stem.0.weight"

    def __init__(self, net: Any) -> None:
        super().__init__()
        first = not isinstance(net.norm_pre, nn.Identity)
        self.norm: Any = net.norm_pre if first else net.head.norm
        net.norm_pre, net.head = nn.Identity(), nn.Identity()
        self.net = net
        self.strides = {f"s{info['reduction']}": info["reduction"] for info in net.feature_info}
        channels = [info["num_chs"] for info in net.feature_info]
        self.channels = dict(zip(self.strides, channels, strict=True))
        self.stage_depths = tuple(len(stage.blocks) for stage in self._stages())

    def _stages(self) -> list[Any]:
        return list(self.net.stages)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        down, right = (-side % self.strides[self.last] for side in (height, width))
        padded = bool(down or right)
        x = self.net.stem(F.pad(images, (0, right, 0, down)) if padded else images)
        maps = {}
        for name, stage in zip(self.strides, self._stages(), strict=True):
            x = maps[name] = stage(x)
        maps[self.last] = self.norm(x)
        if not padded:
            return maps
        sizes = {name: (-(-height // stride), -(-width // stride)) for name, stride in self.strides.items()}
        return {name: maps[name][..., :rows, :cols] for name, (rows, cols) in sizes.items()}

    def checkpoint_blocks(self) -> None:
        self.net.set_grad_checkpointing()

    def check_pretext(self) -> None:
        raise UserError(
            f"encoder '{self.name}' does not support the pretext tasks, only detection and classification without "
            "them: choose a ViT, T2T-ViT or Swin, or train without them (MODEL.RELVIT.JOINT False; --no-pretrain)"
        )


def convnext_builder(make: Callable[..., TimmConvNeXt]) -> Callable[..., Encoder]:
    """Return the builder of a :class:`ConvNeXt`; ``make`` maps timm's keyword arguments to a model."""

    def build(
        patch_size: int = PATCH,
        img_size: int = 224,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        in_chans: int = 3,
    ) -> Encoder:
        """Build a ConvNeXt.

        ``img_size``, ``pos_embed`` and ``dropout`` have no effect: no weight depends on the image size, and the blocks
        have no dropout.

        Raises:
            UserError: ``patch_size`` is not 4.
        """
        if patch_size != PATCH:
            raise UserError(f"MODEL.ENCODER.PATCH_SIZE {patch_size} is not supported by a ConvNeXt; set it to {PATCH}")
        return ConvNeXt(make(in_chans=in_chans, drop_path_rate=drop_path, num_classes=0))

    return build
