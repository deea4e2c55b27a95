"""An encoder made of somebody's weights, what was done to them, and the proof."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from relvit_d2.conversion.reference_models import Definition
from relvit_d2.encoders.base import Encoder
from relvit_d2.utils.errors import UserError

# Two float32 passes through the same weights differ only where kernels sum in another order.
TOLERANCE = 1e-4


def pixels_of(statistics: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of an encoder file for timm's ``mean`` and ``std``, RGB of 0..1; nothing without them."""
    if not {"mean", "std"} <= statistics.keys():
        return {}
    scaled = {f"pixel_{key}": [round(255 * value, 4) for value in statistics[key]] for key in ("mean", "std")}
    return scaled | {"input_format": "RGB"}


IMAGENET_PIXELS = pixels_of({"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD})


@dataclass
class Converted:
    """An encoder made of somebody's weights.

    Attributes:
        encoder: ours, in evaluation mode.
        kind: the family, a key of :data:`CONVERTERS`.
        definition: the source model's features of the last map, ``(B, N, D)``.
        side: pixels of the square images that the definition takes.
        dropped: names of tensors that are no part of an encoder.
        notes: what else was done, a sentence each.
        pixels: ``pixel_mean``, ``pixel_std`` and ``input_format`` where they are known.
    """

    encoder: Encoder
    kind: str
    definition: Definition
    side: int
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pixels: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        config = self.encoder.to_config()
        asked = ", ".join(f"{key.upper()} {config[key]}" for key in ("name", "patch_size", "img_size", "pos_embed"))
        values = sum(p.numel() for p in self.encoder.state_dict().values())
        groups = sorted({re.sub(r"\.\d+\..*", "", re.sub(r"\.(weight|bias)$", "", name)) for name in self.dropped})
        lines = [
            f"{self.kind}: {len(self.encoder.state_dict())} tensors, {values / 1e6:.1f} million values",
            f"  encoder    {asked}",
            f"  dropped    {len(self.dropped)}{': ' if groups else ''}{', '.join(groups)}",
            *(f"  note       {note}" for note in self.notes),
        ]
        if not self.pixels:
            lines.append("  note       pixel statistics unknown: set MODEL.PIXEL_MEAN and PIXEL_STD to the training's")
        return "\n".join(lines)


@torch.no_grad()
def prove(converted: Converted, path: str) -> float:
    """Compare the features of a random image with those of the source's definition.

    Returns:
        The largest difference, relative to the largest feature.

    Raises:
        UserError: if it is more than :data:`TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    side, channels = converted.side, converted.encoder.arguments["in_chans"]
    image = torch.randn(1, channels, side, side, generator=generator)
    expected = converted.definition(image)
    difference = ((converted.encoder.tokens(image) - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"features of '{path}' as {converted.encoder.name} differ by {difference:.1e} from those that "
            f"{converted.kind} defines, where {TOLERANCE:.0e} is allowed: say --from with what it is of"
        )
    converted.notes.append(
        f"features of a random {side} x {side} image agree with the source's definition to {difference:.1e}"
    )
    return difference
