"""One record to what a detector takes, one image to what pre-training takes."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError, annotations_to_instances, check_image_size
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.data.decode import PixelFormat
from relvit_d2.errors import UserError


class DetectionMapper(DatasetMapper):
    """Detectron2's mapper with large-scale jitter and images of any channels, faults of an image as one sentence."""

    @configurable
    def __init__(self, *, pixels: PixelFormat, **parts: Any) -> None:
        super().__init__(**parts)
        self._pixels = pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """See Detectron2's class.

        With ``INPUT.LSJ.SIZE`` images are resized and cropped as in "Simple Copy-Paste is a Strong Data Augmentation"
        (Ghiasi et al., 2021), instead of by ``INPUT.MIN_SIZE_TRAIN`` and ``INPUT.CROP``. Smaller ones are padded where
        batches are made, so that padding is known to be padding.
        """
        parts = super().from_config(cfg, is_train)
        size = cfg.INPUT.LSJ.SIZE
        if is_train and size:
            flips = [a for a in parts["augmentations"] if isinstance(a, T.RandomFlip)]
            low, high = cfg.INPUT.LSJ.SCALE
            parts["augmentations"] = [
                T.ResizeScale(low, high, size, size),
                T.FixedSizeCrop((size, size), pad=False),
                *flips,
            ]
        return parts | {"pixels": PixelFormat(cfg.INPUT.CHANNELS, cfg.INPUT.WHITE)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one record; arguments and result as Detectron2's.

        Raises:
            UserError: if the image is missing, damaged or not of the size that the record says.
        """
        record = copy.deepcopy(dataset_dict)
        image = self._pixels.read(record["file_name"])
        try:
            check_image_size(record, image)
        except SizeMismatchError as error:
            raise UserError(f"{' '.join(str(error).split())} Correct the annotation or the image") from error
        if self.image_format == "BGR" and self._pixels.channels == 3:
            image = image[:, :, ::-1]
        # Pillow, which resizes, knows RGB and gray; of two and four channels it takes the last for alpha.
        step = 3 if self._pixels.channels == 3 else 1
        inputs = T.AugInput(image[:, :, :step])
        transforms = self.augmentations(inputs)
        more = [transforms.apply_image(image[:, :, band : band + 1]) for band in range(step, image.shape[2])]
        image = np.concatenate([inputs.image, *more], axis=2) if more else inputs.image
        record["image"] = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        annotations = record.get("annotations", [])
        if not self.is_train:
            record.pop("annotations", None)
        elif any(not thing.get("iscrowd", 0) for thing in annotations):
            self._transform_annotations(record, transforms, image.shape[:2])
        else:  # Detectron2 looks for masks of objects that there are none of
            record.pop("annotations", None)
            record["instances"] = annotations_to_instances([], image.shape[:2])
        return record


class ImageReader:
    """Image file -> uint8 image ``(C, H, W)``.

    Args:
        longest: see :meth:`relvit_d2.data.decode.PixelFormat.read`.
        pixels: channels and range.
    """

    def __init__(self, longest: int, pixels: PixelFormat = PixelFormat()) -> None:  # noqa: B008  (it is frozen)
        self._longest, self._pixels = longest, pixels

    @classmethod
    def of(cls, cfg: CfgNode) -> "ImageReader":
        """Return the reader of ``INPUT.LOAD_SIZE``, ``INPUT.CHANNELS`` and ``INPUT.WHITE``."""
        return cls(cfg.INPUT.LOAD_SIZE, PixelFormat(cfg.INPUT.CHANNELS, cfg.INPUT.WHITE))

    def __call__(self, path: Any) -> Tensor:
        """Read one image."""
        return torch.from_numpy(self._pixels.read(path, self._longest)).permute(2, 0, 1)


def pad_images(images: list[Tensor]) -> dict[str, Tensor]:
    """Stack images of any size.

    Args:
        images: uint8, ``(C, H, W)`` each.

    Returns:
        ``images``: uint8 ``(B, C, max H, max W)``, padded with zeros right and below;
        ``sizes``: int64 ``(B, 2)``, the true height and width of each.
    """
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.max(dim=0).values.tolist()
    batch = torch.zeros(len(images), images[0].shape[0], height, width, dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return {"images": batch, "sizes": sizes}
