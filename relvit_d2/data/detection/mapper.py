"""Data set mappers: a record to the input of a detector, an image file to the input of pre-training."""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import Boxes, BoxMode, Instances
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor

from relvit_d2.data.detection.regions import InstancesWithIgnoreRegions, ignored_regions
from relvit_d2.data.images.pixel_cache import PixelCache
from relvit_d2.utils.errors import UserError


class DetectionMapper(DatasetMapper):
    """A faster version of Detectron2's mapper with large-scale jitter and images of any number of channels.

    With the same augmentations and the same state of NumPy's global generator, random draws, boxes, classes and masks
    are bitwise identical to those of Detectron2's mapper; pixels differ by at most one gray level due to rounding.
    Exception: Detectron2 truncates transformed boxes to integers where all coordinates were integers; this mapper does
    not. ``image`` is a ``(C, H, W)`` view of ``(H, W, C)`` memory.
    """

    @configurable
    def __init__(self, *, pixels: PixelCache, **parts: Any) -> None:
        super().__init__(**parts)
        self._pixels = pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor.

        With ``INPUT.LSJ.SIZE`` images are resized and cropped as in "Simple Copy-Paste is a Strong Data Augmentation"
        (Ghiasi et al., 2021), instead of by ``INPUT.MIN_SIZE_TRAIN`` and ``INPUT.CROP``. Smaller ones are padded when
        the batch is made, so that the padding can be masked.
        """
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise UserError(f"INPUT.FORMAT '{cfg.INPUT.FORMAT}' is not supported: use RGB or BGR, or INPUT.CHANNELS 1")
        parts = super().from_config(cfg, is_train)
        parts["augmentations"] = [_faster(a) for a in parts["augmentations"]]
        size = cfg.INPUT.LSJ.SIZE
        if is_train and size:
            flips = [a for a in parts["augmentations"] if isinstance(a, T.RandomFlip)]
            low, high = cfg.INPUT.LSJ.SCALE
            parts["augmentations"] = [
                _Scale(low, high, size, size),
                T.FixedSizeCrop((size, size), pad=False),
                *flips,
            ]
        return parts | {"pixels": PixelCache.of(cfg, 0)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one record; arguments and result as in Detectron2.

        Raises:
            UserError: the image is missing or damaged, or its size differs from the record's.
        """
        if self.proposal_topk is not None or "sem_seg_file_name" in dataset_dict:
            return super().__call__(dataset_dict)
        record: dict[str, Any] = {
            key: value if isinstance(value, str | int) else copy.deepcopy(value)
            for key, value in dataset_dict.items()
            if key != "annotations"
        }
        image = self._pixels.read(record["file_name"])
        try:
            utils.check_image_size(record, image)
        except SizeMismatchError as error:
            height, width = image.shape[:2]
            raise UserError(
                f"image '{record['file_name']}' has {width} x {height} pixels, but {record['width']} x "
                f"{record['height']} were recorded for it: correct the size in its label, or restart if the label has "
                "none, because the image has changed since its size was read"
            ) from error
        pixels, steps = self._augmented(image)
        record["image"] = pixels.contiguous().permute(2, 0, 1)  # copies crops only
        if self.is_train and "annotations" in dataset_dict:
            shape = (pixels.shape[0], pixels.shape[1])
            # Without objects Detectron2 would still read their masks.
            objects = any(not a.get("iscrowd", 0) for a in dataset_dict["annotations"])
            if objects and (self.use_instance_mask or self.use_keypoint):
                record["annotations"] = copy.deepcopy(dataset_dict["annotations"])  # changed in place
                self._transform_annotations(record, T.TransformList(steps), shape)
            else:
                record["instances"] = _boxes_as_instances(dataset_dict["annotations"], steps, shape)
            # Detectron2 drops crowds, so that their regions would be learned as background.
            if crowds := [a for a in dataset_dict["annotations"] if a.get("iscrowd")]:
                regions = ignored_regions(crowds, T.TransformList(steps), shape)
                record["instances"] = InstancesWithIgnoreRegions(record["instances"], regions)
        return record

    def network_input(self, image: np.ndarray) -> Tensor:
        """Return a detector's input ``(channels, h, w)``, uint8, for an RGB image ``(H, W, channels)``, uint8."""
        return self._augmented(image)[0].contiguous().permute(2, 0, 1)

    def _augmented(self, image: np.ndarray) -> tuple[Tensor, list[T.Transform]]:
        if self.image_format == "BGR" and image.shape[2] == 3:
            image = image[:, :, ::-1]
        # No AugmentationList and no arrays for a few boxes: Python code runs five times slower with caches that the
        # decoding has just replaced.
        pixels, steps = torch.from_numpy(np.ascontiguousarray(image)), []
        for augmentation in self.augmentations.augs:
            drawn = augmentation.get_transform(pixels)
            for step in drawn.transforms if isinstance(drawn, T.TransformList) else (drawn,):
                pixels = _transformed(pixels, step)
                steps.append(step)
        return pixels, steps


def _transformed(image: Tensor, step: T.Transform) -> Tensor:
    """Apply one of Detectron2's transforms to an image ``(H, W, C)``.

    uint8 stays uint8: torch's antialiased bilinear resampling is a vectorized version of Pillow's, within
    one gray level. Crops are views.
    """
    if isinstance(step, T.NoOpTransform):
        return image
    if isinstance(step, T.CropTransform):
        return image[step.y0 : step.y0 + step.h, step.x0 : step.x0 + step.w]
    if isinstance(step, T.HFlipTransform | T.VFlipTransform):
        return image.flip(1 if isinstance(step, T.HFlipTransform) else 0)
    if isinstance(step, T.ResizeTransform) and image.dtype == torch.uint8 and step.interp == Image.Resampling.BILINEAR:
        # torch resamples the width first; when the height shrinks, resampling the height first is cheaper.
        if step.new_h < step.h:
            image = _resampled(image, step.new_h, step.w)
        return _resampled(image, step.new_h, step.new_w)
    # A copy if the augmentation returns a view or a read-only array.
    return torch.from_numpy(np.require(step.apply_image(image.numpy()), requirements=("C", "W")))


def _resampled(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 ``(H, W, C)``."""
    rows, columns, channels = image.shape
    # The stride of a larger batch makes torch treat it as channels last, which avoids a copy.
    strides = (rows * columns * channels, 1, columns * channels, channels)
    batch = image.contiguous().as_strided((1, channels, rows, columns), strides)
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _faster(a: T.Augmentation) -> T.Augmentation:
    """Return a faster augmentation with the same random draws, if there is one."""
    if isinstance(a, T.ResizeShortestEdge):
        return ShortestEdge(a.short_edge_length, a.max_size, "range" if a.is_range else "choice", a.interp)
    if isinstance(a, T.RandomFlip):
        return _Flip(a.prob, horizontal=a.horizontal, vertical=a.vertical)
    return a


class ShortestEdge(T.ResizeShortestEdge):
    """Detectron2's resize with the same draws, without the slow ``np.random.choice``.

    The shorter side of an image with an extreme aspect ratio keeps at least one pixel.
    """

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """Return the new height and width in pixels."""
        height, width = T.ResizeShortestEdge.get_output_shape(oldh, oldw, short_edge_length, max_size)
        return max(height, 1), max(width, 1)

    def get_transform(self, image: Tensor) -> T.Transform:
        """Draw the size."""
        sizes, (height, width) = self.short_edge_length, image.shape[:2]
        if self.is_range:
            size = np.random.randint(sizes[0], sizes[1] + 1)
        else:  # a choice from one value does not advance NumPy's generator
            size = sizes[np.random.randint(len(sizes)) if len(sizes) > 1 else 0]
        if size == 0:
            return T.NoOpTransform()
        return T.ResizeTransform(height, width, *self.get_output_shape(height, width, size, self.max_size), self.interp)


class _Scale(T.ResizeScale):
    """Detectron2's resize, but the shorter side keeps at least one pixel."""

    def _get_resize(self, image: Tensor, scale: float) -> T.Transform:
        step = super()._get_resize(image, scale)
        return T.ResizeTransform(step.h, step.w, max(step.new_h, 1), max(step.new_w, 1), step.interp)


class _Flip(T.RandomFlip):
    """Detectron2's flip with the same draws, as numbers instead of arrays."""

    def get_transform(self, image: Tensor) -> T.Transform:
        if np.random.random_sample() >= self.prob:
            return T.NoOpTransform()
        return T.HFlipTransform(image.shape[1]) if self.horizontal else T.VFlipTransform(image.shape[0])


def _boxes_as_instances(
    annotations: list[dict[str, Any]], steps: list[T.Transform], shape: tuple[int, int]
) -> Instances:
    """Return boxes and classes of the objects that are not crowds and still have an area, as Detectron2 does."""
    objects = [a for a in annotations if not a.get("iscrowd", 0)]
    exact = BoxMode.XYXY_ABS
    boxes = [
        a["bbox"] if a["bbox_mode"] == exact else BoxMode.convert(a["bbox"], a["bbox_mode"], exact) for a in objects
    ]
    for step in steps:
        if isinstance(step, T.ResizeTransform):
            across, down = step.new_w / step.w, step.new_h / step.h
            boxes = [(x0 * across, y0 * down, x1 * across, y1 * down) for x0, y0, x1, y1 in boxes]
        elif isinstance(step, T.CropTransform):
            left, top = step.x0, step.y0
            boxes = [(x0 - left, y0 - top, x1 - left, y1 - top) for x0, y0, x1, y1 in boxes]
        elif isinstance(step, T.HFlipTransform):
            boxes = [(step.width - x1, y0, step.width - x0, y1) for x0, y0, x1, y1 in boxes]
        elif isinstance(step, T.VFlipTransform):
            boxes = [(x0, step.height - y1, x1, step.height - y0) for x0, y0, x1, y1 in boxes]
        elif not isinstance(step, T.NoOpTransform):
            boxes = step.apply_box(np.array(boxes, dtype=np.float64).reshape(-1, 4)).tolist()
    height, width = shape
    boxes = [
        (min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height))
        for x0, y0, x1, y1 in boxes
    ]
    classes = [int(a["category_id"]) for a in objects]
    instances = Instances(shape)
    # Instances.set changes the state of Python's warnings, which takes longer than this whole function.
    instances.get_fields().update(
        gt_boxes=Boxes(torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(-1, 4))),
        gt_classes=torch.from_numpy(np.array(classes, dtype=np.int64)),
    )
    # Boxes far above the threshold of Detectron2's filter (1e-5 pixels) need no filter.
    if all(x1 - x0 > 1e-3 and y1 - y0 > 1e-3 for x0, y0, x1, y1 in boxes):
        return instances
    return utils.filter_empty_instances(instances)


class ImageReader:
    """Reads image files as uint8 tensors ``(C, H, W)``."""

    def __init__(self, pixels: PixelCache) -> None:
        self._pixels = pixels

    @classmethod
    def of(cls, cfg: CfgNode) -> "ImageReader":
        """Return a reader with ``INPUT.LOAD_SIZE``, and the cache and format of the config."""
        return cls(PixelCache.of(cfg, cfg.INPUT.LOAD_SIZE))

    def __call__(self, path: Any) -> Tensor:
        """Read one image."""
        return torch.from_numpy(self._pixels.read(path)).permute(2, 0, 1)


def pad_images(images: list[Tensor]) -> dict[str, Tensor]:
    """Stack uint8 images ``(C, H, W)`` of any size.

    Returns:
        ``images``: uint8 ``(B, C, max H, max W)``, padded with zeros right and below;
        ``sizes``: int64 ``(B, 2)``, height and width of each without padding.
    """
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.max(dim=0).values.tolist()
    batch = torch.zeros(len(images), images[0].shape[0], height, width, dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return {"images": batch, "sizes": sizes}
