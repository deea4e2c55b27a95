"""Encoders converted from weights of other projects, and the comparison of their features with the original model."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from relvit_d2.conversion.reference_models import Reference
from relvit_d2.encoders.base import Encoder
from relvit_d2.utils.errors import UserError

TOLERANCE = 1e-4  # relative; two float32 passes with the same weights differ only by the order of summation


def pixel_metadata(statistics: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of an encoder file for timm's ``mean`` and ``std`` (RGB, 0..1); empty without them."""
    if not {"mean", "std"} <= statistics.keys():
        return {}
    scaled = {f"pixel_{key}": [round(255 * value, 4) for value in statistics[key]] for key in ("mean", "std")}
    return scaled | {"input_format": "RGB"}


IMAGENET_PIXELS = pixel_metadata({"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD})


@dataclass
class Converted:
    """An encoder with converted weights.

    Attributes:
        encoder: the encoder, in evaluation mode.
        kind: the family of the weights, a key of :data:`relvit_d2.conversion.convert.CONVERTERS`.
        reference: the original model: images to features of the last map, ``(B, N, D)``.
        side: side of the square images that ``reference`` takes, pixels.
        dropped: names of tensors that do not belong to the encoder.
        notes: notes on the conversion, for the user.
        pixels: ``pixel_mean``, ``pixel_std`` and ``input_format``, if known.
    """

    encoder: Encoder
    kind: str
    reference: Reference
    side: int
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pixels: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        config = self.encoder.to_config()
        keys = ", ".join(f"{key.upper()} {config[key]}" for key in ("name", "patch_size", "img_size", "pos_embed"))
        values = sum(p.numel() for p in self.encoder.state_dict().values())
        groups = sorted({re.sub(r"\.\d+\..*", "", re.sub(r"\.(weight|bias)$", "", name)) for name in self.dropped})
        lines = [
            f"{self.kind}: {len(self.encoder.state_dict())} tensors, {values / 1e6:.1f} million values",
            f"  encoder    {keys}",
            f"  dropped    {len(self.dropped)}{': ' if groups else ''}{', '.join(groups)}",
            *(f"  note       {note}" for note in self.notes),
        ]
        if not self.pixels:
            lines.append("  note       unknown pixel statistics: set MODEL.PIXEL_MEAN and PIXEL_STD as in pre-training")
        return "\n".join(lines)


@torch.no_grad()
def verify(converted: Converted, path: str) -> None:
    """Compare the features of a random image with those of the original model, and note the difference.

    Raises:
        UserError: if the relative difference exceeds :data:`TOLERANCE`.
    """
    image = random_image(converted.side, converted.encoder.arguments["in_chans"])
    difference = checked_difference(
        converted.encoder.tokens(image),
        converted.reference(image),
        f"'{path}' as {converted.encoder.name} differ from those of the original {converted.kind} model",
        "give --from with the project that the file is from",
    )
    converted.notes.append(
        f"features of a random {converted.side} x {converted.side} image agree with the original model: "
        f"relative difference {difference:.1e}"
    )


def random_image(side: int, channels: int) -> Tensor:
    """Return the image ``(1, channels, side, side)`` on which features are compared."""
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))


def relative_difference(features: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute value of ``expected``."""
    return ((features - expected).abs().max() / expected.abs().max()).item()


def checked_difference(features: Tensor, expected: Tensor, text: str, hint: str) -> float:
    """Return the :func:`relative_difference`; above :data:`TOLERANCE` raise a :class:`UserError` with text and hint."""
    difference = relative_difference(features, expected)
    if not difference <= TOLERANCE:
        raise UserError(f"features of {text} by {difference:.1e} (allowed: {TOLERANCE:.0e}): {hint}")
    return difference
