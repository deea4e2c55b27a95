"""Augmentation of batches of uint8 images for classification, on their device."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from relvit_d2.pretext.resampling import padded_window, random_boxes, random_flips, random_pad_corners, resample
from relvit_d2.utils.errors import UserError

CROPS = ("pad", "resized")
RATIO = (3 / 4, 4 / 3)  # width over height, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class AugmentationConfig:
    """Parameters of the augmentation. Defaults are the authors' for small images (transforms.py:206-259).

    Attributes:
        size: side of the encoder's square input, pixels.
        crop: in training ``pad``, a crop of an image of ``size`` pixels with black padding, or ``resized``.
        pad: width of the padding, pixels.
        scale: range of the fraction of the image area in a resized crop.
        flip: probability of a horizontal flip in training.
        centre: in evaluation, the side of the centre crop as a fraction of the shorter side; 0: resize the whole image
            to a square.
        randaugment: number of RandAugment operations per image (Cubuk et al., 2020); 0: none.
        magnitude: magnitude of the operations, 0..30.
        mean, std: of RGB values in 0..1.
    """

    size: int
    crop: str = "pad"
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    centre: float = 0.0
    randaugment: int = 0
    magnitude: int = 9
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"INPUT.VIEW.CROP '{self.crop}' is unknown; give {' or '.join(CROPS)}")
        for key, value, least, most in (
            ("SIZE", self.size, 1, float("inf")),
            ("PAD", self.pad, 0, float("inf")),
            ("FLIP", self.flip, 0, 1),
            ("CENTRE", self.centre, 0, 1),
            ("RANDAUGMENT", self.randaugment, 0, float("inf")),
            ("MAGNITUDE", self.magnitude, 0, 30),
        ):
            if not least <= value <= most:
                raise UserError(f"INPUT.VIEW.{key} {value} is out of range; give {least} to {most}")


class Augmentation:
    """Maps images to the encoder's input."""

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config
        self._augment = v2.RandAugment(config.randaugment, config.magnitude) if config.randaugment else None

    @torch.no_grad()
    def train(self, images: Tensor, sizes: Tensor, keys: Tensor) -> Tensor:
        """Crop, flip, augment and normalise at random.

        Args:
            images: ``(B, 3, H, W)`` uint8.
            sizes: ``(B, 2)`` heights and widths without padding.
            keys: ``(B,)`` random keys of the images.

        Returns:
            ``(B, 3, size, size)`` float32.
        """
        config = self.config
        flip = random_flips(keys, config.flip)
        if config.crop == "pad":
            corner = random_pad_corners(keys, config.pad)
            window = padded_window(corner, flip, (config.size,) * 2, config.pad, "constant")
            pixels = self._resized(images, _whole(sizes), flip, window)
        else:
            pixels = self._resized(images, random_boxes(sizes, config.scale, RATIO, keys), flip)
        if self._augment:
            pixels = torch.stack([self._augmented(*pair) for pair in zip(pixels, keys.tolist(), strict=True)])
        return self._normalised(pixels)

    def _augmented(self, image: Tensor, key: int) -> Tensor:
        """Apply RandAugment, which uses torch's global CPU generator."""
        assert self._augment is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            return self._augment(image)

    @torch.no_grad()
    def evaluate(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Resize the images or their centre crops, and normalise; arguments and result as for :meth:`train`."""
        size, centre = self.config.size, self.config.centre
        if not centre and images.shape[2:] == (size, size):
            return self._normalised(images.float().div_(255))
        if centre:
            side = (sizes.amin(1, keepdim=True) * centre).round().long().clamp(min=1).expand(-1, 2)
            boxes = torch.cat(((sizes - side) // 2, side), 1)
        else:
            boxes = _whole(sizes)
        return self._normalised(self._resized(images, boxes, torch.zeros(len(images), dtype=torch.bool)))

    def _resized(
        self, images: Tensor, boxes: Tensor, flip: Tensor, window: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        # Autocast would round the products to bfloat16, which is coarser than 8-bit pixels.
        with torch.autocast(images.device.type, enabled=False):
            return resample(images, boxes, flip, (self.config.size,) * 2, window=window).transpose(0, 1)

    def _normalised(self, pixels: Tensor) -> Tensor:
        values = torch.tensor((self.config.mean, self.config.std)).to(pixels.device, non_blocking=True)
        mean, std = values.view(2, 3, 1, 1)
        return torch.addcmul(-mean / std, pixels, 1 / std)


def _whole(sizes: Tensor) -> Tensor:
    """Return the boxes of whole images of ``sizes`` ``(B, 2)``."""
    return torch.cat((torch.zeros_like(sizes), sizes), 1)
