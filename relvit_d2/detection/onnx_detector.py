"""Inference with a detector that ``relvit-d2 export-model`` wrote; needs ONNX Runtime, neither torch nor Detectron2."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from relvit_d2.data.images.decode import ImageInput, PixelFormat
from relvit_d2.detection.detections import Detections, Mask, TrainingSizes
from relvit_d2.utils.errors import UserError

FORMAT = "relvit_d2 detector"  # value of the metadata key "format"
MASK_THRESHOLD = 0.5  # probability from which a pixel belongs to an object


class OnnxDetector:
    """Maps images to detections; the image size and the limits of evaluation are part of the file.

    Attributes:
        class_names: name of each class index.
        pixels: format of the images.
        threshold: minimum score of a detection, 0..1.
        training: sizes in the training images; None if they are not known.
        metadata: the metadata of the file.

    Args:
        path: the file.
        threshold: see above; detections below the ``score_threshold`` of the file are never returned.
        threads: threads of ONNX Runtime; 0: one for each core.

    Raises:
        UserError: the file is missing, damaged, or was written by another program.
    """

    def __init__(self, path: str | Path, threshold: float = 0.5, threads: int = 0) -> None:
        self.threshold = threshold
        if not Path(path).is_file():
            raise UserError(f"the model '{path}' does not exist: give a file that relvit-d2 export-model wrote")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common base class of its exceptions
            reason = str(error).splitlines()[0]
            raise UserError(f"'{path}' is not an ONNX model that can be loaded ({reason}): export it again") from error
        values = self._session.get_modelmeta().custom_metadata_map
        if values.get("format") != FORMAT:
            raise UserError(f"'{path}' is an ONNX model of another program: give one that relvit-d2 export-model wrote")
        try:
            self.metadata: dict[str, Any] = {
                name: json.loads(value) for name, value in values.items() if name != "format"
            }
            self.class_names = [str(name) for name in self.metadata["class_names"]]
            self.pixels = PixelFormat(self.metadata["channels"], self.metadata["max_value"])
            sizes = self.metadata.get("training")
            self.training = TrainingSizes(**sizes) if sizes else None
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"'{path}' lacks the metadata {error} of a detector: export it again") from error
        self._names = [output.name for output in self._session.get_outputs()]

    def read(self, image: ImageInput) -> np.ndarray:
        """Return an image as an array ``(H, W, channels)`` of uint8; see :meth:`PixelFormat.array`."""
        return self.pixels.array(image)

    def __call__(self, image: ImageInput) -> Detections:
        """Return the detections in one image: a path, a Pillow image, or an RGB array ``(H, W, channels)`` of uint8.

        Raises:
            UserError: the image cannot be read, or the network fails, as on an image below its ``min_side``.
        """
        pixels = self.read(image)
        try:
            found = dict(zip(self._names, self._session.run(None, {"image": pixels}), strict=True))
        except Exception as error:  # as above
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise UserError(
                f"the model fails on an image of {size} pixels: {str(error).splitlines()[0][:200]}"
            ) from error
        kept = found["scores"] >= self.threshold
        boxes, masks = found["boxes"][kept], None
        if "masks" in found:
            masks = paste_masks(found["masks"][kept], boxes, *pixels.shape[:2])
        return Detections(boxes, found["scores"][kept], found["classes"][kept], masks)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Return the detections in each image."""
        return [self(image) for image in images]


def paste_masks(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> list[Mask]:
    """Return the masks in the image, interpolated like Detectron2's ``paste_masks_in_image``.

    Args:
        masks: probabilities ``(D, M, M)``, whose grids cover the boxes.
        boxes: ``(D, 4)`` XYXY in pixels.
        height, width: size of the image in pixels.
    """
    pasted = []
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        rows, down = _weights(y0, y1, height, len(mask))
        cols, across = _weights(x0, x1, width, len(mask))
        pasted.append(Mask.at(cols.start, rows.start, down @ mask @ across.T >= MASK_THRESHOLD))
    return pasted


def _weights(start: float, end: float, size: int, cells: int) -> tuple[slice, np.ndarray]:
    """Return the pixels around a side of a box and the bilinear weights of the mask's cells in them, ``(P, cells)``."""
    first, last = max(int(np.floor(start)) - 1, 0), min(int(np.ceil(end)) + 1, size)
    places = (np.arange(first, last, dtype=np.float32) + 0.5 - start) / (end - start) * cells - 0.5
    return slice(first, last), np.maximum(1 - np.abs(places[:, None] - np.arange(cells)), 0).astype(np.float32)
