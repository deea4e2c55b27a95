"""Inference with a trained detector on any images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.images.decode import ImageInput, PixelFormat
from relvit_d2.data.images.pixel_cache import PixelCache
from relvit_d2.data.images.strips import StripImage
from relvit_d2.detection.config import DETECTION
from relvit_d2.detection.detections import Detections, Mask, TrainingSizes
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.tiles import Tiling, detect_in_tiles
from relvit_d2.detection.training_sizes import read_training_sizes
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.weights import load_trained, run_config
from relvit_d2.utils.errors import UserError


class Detector:
    """Maps images to detections, with the image size and the precision of evaluation.

    Attributes:
        class_names: name of each class index; the index itself if the name is not known.
        threshold: minimum score of a detection, 0..1.
        pixels: format of the images.
        training: sizes in the training images; None if they are not known.
        cfg, model: the config, and the network in evaluation mode.
        network_input: maps an image ``(H, W, channels)`` to the network's input ``(channels, h, w)``, both uint8.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: GeneralizedRCNN,
        class_names: Sequence[str],
        threshold: float,
        training: TrainingSizes | None = None,
    ) -> None:
        self.class_names, self.threshold = list(class_names), threshold
        self.cfg, self.model = cfg, model.eval()
        self.network_input = DetectionMapper(cfg, False, pixels=PixelCache(PixelFormat.of(cfg))).network_input
        self.pixels = PixelFormat.of(cfg)
        self.training = training
        self._precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE))

    def __call__(self, image: ImageInput) -> Instances:
        """Return the detections of one image; see :meth:`batch`."""
        return self.batch([image])[0]

    @torch.no_grad()
    def batch(self, images: Sequence[ImageInput]) -> list[Instances]:
        """Return Detectron2's instances of each image on the CPU, with boxes in pixels of the image.

        Args:
            images: paths; Pillow images, which are converted like files (EXIF orientation, more than 8 bits); or
                arrays ``(H, W, channels)`` of uint8, RGB.

        Raises:
            UserError: if a file cannot be read, or an array has another dtype or shape.
        """
        arrays = [self.read(image) for image in images]
        if not arrays:
            return []
        inputs = [{"image": self.network_input(a), "height": a.shape[0], "width": a.shape[1]} for a in arrays]
        with self._precision.autocast():
            outputs = self.model(inputs)
        found = [output["instances"].to("cpu") for output in outputs]
        return [instances[instances.scores >= self.threshold] for instances in found]

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Return the detections in each image as arrays; see :meth:`batch`."""
        return [
            Detections(
                found.pred_boxes.tensor.numpy(),
                found.scores.numpy(),
                found.pred_classes.numpy(),
                [Mask.of(mask) for mask in found.pred_masks.numpy()] if found.has("pred_masks") else None,
            )
            for found in self.batch(images)
        ]

    def read(self, image: ImageInput) -> np.ndarray:
        """Return an image as an array ``(H, W, channels)`` of uint8; see :meth:`batch`."""
        return self.pixels.array(image)


class TiledDetector(nn.Module):
    """A detector of large images, tile by tile (``TEST.TILES``), with Detectron2's interface.

    Args:
        cfg, model: the config and the detector.
        training: sizes in the training images, if known.
    """

    def __init__(self, cfg: CfgNode, model: GeneralizedRCNN, training: TrainingSizes | None) -> None:
        super().__init__()
        self._tiling = Tiling.of(str(cfg.TEST.TILES), cfg.TEST.TILE_OVERLAP, training)
        self._detector = Detector(cfg, model, (), 0.0)

    def __str__(self) -> str:
        return f"tiles of {self._tiling.width} x {self._tiling.height} pixels"

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Return the detections in the image files of ``inputs``, dicts of Detectron2's mapper."""
        return [{"instances": self._detect(record["file_name"])} for record in inputs]

    def _detect(self, file: str) -> Instances:
        image = self._detector.read(file)
        height, width = image.shape[:2]
        batch = self._detector.cfg.TEST.BATCH_SIZE
        found = detect_in_tiles(self._detector, StripImage.of(image), self._tiling, batch)
        instances = Instances((height, width))
        instances.pred_boxes = Boxes(torch.from_numpy(found.boxes))
        instances.scores, instances.pred_classes = torch.from_numpy(found.scores), torch.from_numpy(found.classes)
        if found.masks is not None:
            masks = [mask.whole(height, width) for mask in found.masks]
            instances.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
        return instances


def load_detector(
    path: str | Path, config_file: str = "", overrides: Sequence[Any] = (), threshold: float = 0.5
) -> Detector:
    """Load a detector that ``relvit-d2 train`` trained.

    Args:
        path: a checkpoint ``model_*.pth``, or ``OUTPUT_DIR`` for the last checkpoint.
        config_file: default: ``config.yaml`` in the folder of the checkpoint.
        overrides: alternating keys and values, such as ``["MODEL.DEVICE", "cpu"]``.
        threshold: minimum score of a detection, 0..1; the default is that of ``relvit-d2 predict``. Detections below
            ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` of the config are never returned.

    Raises:
        UserError: if the checkpoint or the config is missing or invalid.
    """
    path = Path(path)
    cfg = run_config(path, config_file, overrides, DETECTION)
    names = _class_names(cfg, path if path.is_dir() else path.parent)
    if not cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)
    model = build_detector(cfg)
    load_trained(cfg, model, path)
    return Detector(cfg, model, names, threshold, read_training_sizes(path))


def _class_names(cfg: CfgNode, folder: Path) -> list[str]:
    file = folder / "classes.json"
    if file.is_file():
        try:
            return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))]
        except ValueError as error:
            raise UserError(f"'{file}' is damaged: remove it, or write a list of the class names") from error
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        try:
            return list(catalog.get_metadata(name).thing_classes)
        except (UserError, AttributeError):
            continue
    if not cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise UserError(f"the classes of '{folder}' are not known: set MODEL.ROI_HEADS.NUM_CLASSES")
    return [str(index) for index in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
