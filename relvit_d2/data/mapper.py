"""One record to what a detector takes."""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import Boxes, BoxMode, Instances
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor

from relvit_d2.data.decode import read_rgb, reading
from relvit_d2.errors import UserError

EMPTY = 1e-5  # pixels; an object that is no wider or higher is left out (Detectron2's filter_empty_instances)


class DetectionMapper(DatasetMapper):
    """Detectron2's mapper, faster and with large-scale jitter; a damaged image is one sentence instead of a traceback.

    Draws, boxes, classes and masks are those of Detectron2's mapper with the same augmentations and the same state of
    NumPy's global generator, to the bit; pixels of uint8 images differ by at most one grey level, where resizing rounds
    the other way. The one exception: boxes of whole numbers are transformed as numbers, not cut to whole ones again.
    """

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
        if self.proposal_topk is not None or "sem_seg_file_name" in dataset_dict:
            return super().__call__(dataset_dict)
        record = copy.deepcopy({key: value for key, value in dataset_dict.items() if key != "annotations"})
        image = self._read(record["file_name"])
        try:
            utils.check_image_size(record, image)
        except SizeMismatchError as error:
            raise UserError(f"{' '.join(str(error).split())} Correct the annotation or the image") from error
        pixels = _Pixels(image)
        transforms = self.augmentations(pixels)
        record["image"] = pixels.image.permute(2, 0, 1).contiguous()
        if self.is_train and "annotations" in dataset_dict:
            record["annotations"] = dataset_dict["annotations"]
            self._transform_annotations(record, transforms, tuple(pixels.image.shape[:2]))
        return record

    def _read(self, path: str) -> np.ndarray:
        if self.image_format == "RGB":
            return read_rgb(path)
        with reading(path):
            return utils.read_image(path, self.image_format)

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        """Put the :class:`Instances` in place of the annotations; boxes alone are transformed all at once."""
        if self.use_instance_mask or self.use_keypoint:
            dataset_dict["annotations"] = copy.deepcopy(dataset_dict["annotations"])  # changed in place
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        objects = [a for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
        corners = [
            a["bbox"]
            if a["bbox_mode"] == BoxMode.XYXY_ABS
            else BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in objects
        ]
        points = transforms.apply_coords(np.array(corners, np.float64).reshape(-1, 2)).reshape(-1, 2, 2)
        height, width = image_shape
        # A flip swaps the corners. Clipping comes before float32, as in Detectron2.
        boxes = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1).clip(0, [width, height] * 2)
        boxes = boxes.astype(np.float32)
        kept = (boxes[:, 2:] - boxes[:, :2] > EMPTY).all(axis=1)
        classes = np.array([a["category_id"] for a in objects], np.int64)
        dataset_dict["instances"] = Instances(
            image_shape, gt_boxes=Boxes(torch.from_numpy(boxes[kept])), gt_classes=torch.from_numpy(classes[kept])
        )


class _Pixels:
    """What Detectron2's augmentations change: an image ``(H, W, C)``, transformed as soon as a transform is drawn.

    uint8 stays uint8: torch's antialiased bilinear resampling is Pillow's up to one grey level, vectorised. Crops are
    views, so that those before a resize spare its work; flips of whole rows are vectorised copies.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image = torch.from_numpy(np.ascontiguousarray(image))

    def transform(self, transform: T.Transform) -> None:
        """Apply one of Detectron2's transforms."""
        for step in transform.transforms if isinstance(transform, T.TransformList) else [transform]:
            self.image = self._transformed(step)

    def _transformed(self, step: T.Transform) -> Tensor:
        image = self.image
        if isinstance(step, T.NoOpTransform):
            return image
        if isinstance(step, T.CropTransform):
            return image[step.y0 : step.y0 + step.h, step.x0 : step.x0 + step.w]
        if isinstance(step, T.HFlipTransform):
            return image.permute(2, 0, 1).flip(2).permute(1, 2, 0)
        if isinstance(step, T.VFlipTransform):
            return image.permute(2, 0, 1).flip(1).permute(1, 2, 0)
        if isinstance(step, T.ResizeTransform) and image.dtype == torch.uint8 and step.interp == Image.BILINEAR:
            size = (step.new_h, step.new_w)
            planes = image.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)  # copies crops
            return F.interpolate(planes, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        return torch.from_numpy(np.ascontiguousarray(step.apply_image(image.numpy())))


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
