"""Augmentation of a detector's training samples by the keys of ``INPUT.AUGMENT``."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from relvit_d2.data.detection.composition import Sample, copy_paste, erase, mixup, mosaic, rotate
from relvit_d2.data.detection.config import COLORS, changes_objects
from relvit_d2.data.detection.records import Record
from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.data.loader import MAX_REPLACEMENTS


class AugmentedMapper:
    """Maps a training record and augments the result.

    The other images of mosaic, copy-paste and mixup are random records, mapped alike. All draws come from NumPy's
    global generator, after those of the mapper, so that they are a function of the sample's seed.

    Args:
        mapper: mapper of the record and of the other images, such as a
            :class:`relvit_d2.data.detection.mapper.DetectionMapper`.
        records: the training records.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[Record], dict[str, Any]], records: Sequence[Record]) -> None:
        self._mapper, self._records = mapper, records
        self._keys: dict[str, float] = dict(cfg.INPUT.AUGMENT)
        self._changes_objects, self._masks = changes_objects(cfg), cfg.MODEL.MASK_ON
        self._skips = cfg.DATASETS.SKIP_UNREADABLE
        self._square = cfg.INPUT.LSJ.SIZE
        self._bgr = cfg.INPUT.FORMAT == "BGR"
        self._fill = [min(max(round(value), 0), 255) for value in cfg.MODEL.PIXEL_MEAN]

    def __call__(self, record: Record) -> dict[str, Any]:
        """Return the mapped and augmented record; result and errors as of the mapper."""
        mapped = self._mapper(record)
        if self._changes_objects:
            mapped |= self._changed(Sample.of(mapped, self._masks)).mapped()
        return mapped | {"image": self._recolored(mapped["image"])}

    def _changed(self, sample: Sample) -> Sample:
        if self._drawn("MOSAIC"):
            size = (self._square, self._square) if self._square else sample.size
            sample = mosaic([sample, *(self._other() for _ in range(3))], *size)
        if self._drawn("COPY_PASTE"):
            sample = copy_paste(sample, self._other())
        if self._drawn("MIXUP"):
            sample = mixup(sample, self._other())
        if degrees := self._keys["ROTATION"]:
            sample = rotate(sample, degrees, self._fill)
        return erase(sample, self._fill) if self._drawn("ERASING") else sample

    def _drawn(self, key: str) -> bool:
        """Return True with the probability of the key; 0 draws no number."""
        return bool(self._keys[key]) and np.random.random_sample() < self._keys[key]

    def _other(self) -> Sample:
        """Return a random training image; an unreadable one is replaced by the next, as in the loader."""
        index, tried = np.random.randint(len(self._records)), 0
        while True:
            try:
                return Sample.of(self._mapper(self._records[(index + tried) % len(self._records)]), self._masks)
            except UnreadableImageError:
                tried += 1
                if tried == MAX_REPLACEMENTS or not self._skips:
                    raise

    def _recolored(self, image: Tensor) -> Tensor:
        """Change the colours of an image ``(C, H, W)`` uint8 by random factors, and its hue by a random shift."""
        keys = self._keys
        if not any(keys[key] for key in COLORS):
            return image
        if self._bgr and len(image) == 3:
            image = image.flip(0)
        for key, change in zip(COLORS, (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), strict=False):
            if strength := keys[key]:
                image = change(image, float(np.random.uniform(1 - strength, 1 + strength)))
        if strength := keys["HUE"]:
            image = F.adjust_hue(image, float(np.random.uniform(-strength, strength)))
        return image.flip(0) if self._bgr and len(image) == 3 else image
