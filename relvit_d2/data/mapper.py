"""One record to what a detector takes."""

from typing import Any

import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor

from relvit_d2.data.decode import read_rgb
from relvit_d2.data.regions import Targets, ignored_regions
from relvit_d2.errors import UserError


class DetectionMapper(DatasetMapper):
    """Detectron2's mapper with large-scale jitter; a damaged image is one sentence instead of a traceback."""

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
        return parts

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one record; arguments and result as Detectron2's.

        Raises:
            UserError: if the image is missing, damaged or not of the size that the record says.
        """
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:
            raise UserError(f"{' '.join(str(error).split())} Correct the annotation or the image") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            read_rgb(dataset_dict["file_name"])  # says so if the image is the reason
            raise

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Do as Detectron2's class, and keep the crowds that it drops as regions to be ignored."""
        crowds = [a for a in dataset_dict["annotations"] if a.get("iscrowd")]
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        if crowds:
            regions = ignored_regions(crowds, transforms, image_shape)
            dataset_dict["instances"] = Targets(dataset_dict["instances"], regions)


class ImageReader:
    """Path -> uint8 image ``(3, H, W)``.

    Args:
        longest: see :func:`relvit_d2.data.decode.read_rgb`.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest

    def __call__(self, path: Any) -> Tensor:
        """Read one image."""
        return torch.from_numpy(read_rgb(path, self._longest)).permute(2, 0, 1)


def pad_images(images: list[Tensor]) -> dict[str, Tensor]:
    """Stack images of any size.

    Args:
        images: uint8, ``(3, H, W)`` each.

    Returns:
        ``images``: uint8 ``(B, 3, max H, max W)``, padded with zeros right and below;
        ``sizes``: int64 ``(B, 2)``, the true height and width of each.
    """
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.max(dim=0).values.tolist()
    batch = torch.zeros(len(images), images[0].shape[0], height, width, dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return {"images": batch, "sizes": sizes}
