"""Features of images from a pre-trained encoder; works without Detectron2."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relvit_d2.conversion.encoder_file import build_described, read_encoder
from relvit_d2.data.images.decode import ImageInput, PixelFormat
from relvit_d2.encoders import Encoder
from relvit_d2.utils.errors import UserError


class Features(NamedTuple):
    """Features of an image, float32 on the CPU.

    Attributes:
        tokens: a vector for each patch, ``(channels, rows, columns)``.
        pooled: a vector for the image, ``(channels,)``: the class token where the encoder has one, else the mean of
            the tokens.
    """

    tokens: Tensor
    pooled: Tensor


class ImageEncoder:
    """Maps images to features.

    Args:
        encoder: the encoder.
        pixels: format of the images.
        mean: of each channel, on the 0 to 255 scale.
        std: as ``mean``.
        size: see the attribute.

    Attributes:
        size: longer side in pixels to which images are resized by default: that of the views in pre-training.
        stride: pixels per token; the sides of a resized image are multiples of it.
    """

    def __init__(
        self, encoder: Encoder, pixels: PixelFormat, mean: Sequence[float], std: Sequence[float], size: int
    ) -> None:
        self._encoder, self._pixels = encoder.eval(), pixels
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.size, self.stride = size, encoder.strides[encoder.last]

    def __call__(self, image: ImageInput, size: int = 0) -> Features:
        """Return the features of one image; see :meth:`batch`."""
        return self.batch([self.prepared(image, size)])[0]

    def prepared(self, image: ImageInput, size: int = 0) -> Tensor:
        """Read and resize an image to normalised pixels ``(channels, h, w)``.

        Args:
            image: a path; a Pillow image, which is converted like a file (EXIF orientation, more
                than 8 bits); or an array ``(H, W, channels)`` of uint8, RGB.
            size: longer side in pixels after resizing, with about the image's aspect ratio; 0: :attr:`size`.

        Raises:
            UserError: if a file cannot be read, or an array has another dtype or shape.
        """
        pixels = torch.from_numpy(self._pixels.array(image)).permute(2, 0, 1)
        scale = (size or self.size) / max(pixels.shape[1:])
        sides = [max(round(side * scale / self.stride), 1) * self.stride for side in pixels.shape[1:]]
        resized = F.interpolate(pixels[None].float(), sides, mode="bilinear", antialias=True)[0]
        return (resized - self._mean) / self._std

    @torch.no_grad()
    def batch(self, images: Sequence[Tensor]) -> list[Features]:
        """Return the features of images that :meth:`prepared` returned; those of equal size are encoded together."""
        device, features = next(self._encoder.parameters()).device, dict[int, Features]()
        for shape in dict.fromkeys(image.shape for image in images):
            chosen = [index for index, image in enumerate(images) if image.shape == shape]
            pooled, tokens = self._encoder.pooled_features(torch.stack([images[i] for i in chosen]).to(device))
            maps = tokens.mT.unflatten(2, self._encoder.grid(*shape[1:]))
            parts = zip(maps.float().cpu(), pooled.float().cpu(), strict=True)
            features |= {index: Features(*part) for index, part in zip(chosen, parts, strict=True)}
        return [features[index] for index in range(len(images))]


def load_encoder(file: str | Path, device: str = "cpu") -> ImageEncoder:
    """Load the encoder that ``relvit-d2 pretrain`` trained.

    Args:
        file: ``encoder.safetensors``, or the folder of the run.
        device: device to compute on, such as ``cuda``.

    Raises:
        UserError: if the file is missing, damaged or not of an encoder.
    """
    tensors, info = read_encoder(file)
    encoder = build_described(file, tensors, info["encoder"]).to(device)
    try:
        mean, std = ([float(value) for value in info[key]] for key in ("pixel_mean", "pixel_std"))
        pixels = PixelFormat(len(mean), float(info.get("max_value", 0)))
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"'{file}' has no valid pixel_mean and pixel_std: write it again with pixel statistics"
        ) from error
    return ImageEncoder(encoder, pixels, mean, std, int(info.get("image_size", encoder.arguments["img_size"])))
