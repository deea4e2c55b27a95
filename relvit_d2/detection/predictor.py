"""Inference with a trained detector on any images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from fvcore.common.config import CfgNode

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.images.decode import ImageInput, PixelFormat
from relvit_d2.data.images.pixel_cache import PixelCache
from relvit_d2.detection.config import DETECTION
from relvit_d2.detection.detections import Detections
from relvit_d2.detection.model import build_detector
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.weights import load_trained, run_config
from relvit_d2.utils.errors import UserError


class Detector:
    """Maps images to detections, with the image size and the precision of evaluation.

    Attributes:
        class_names: name of each class index; the index itself if the name is not known.
        threshold: minimum score of a detection, 0..1.
        channels: number of channels of an image.
        cfg, model: the config, and the network in evaluation mode.
        network_input: maps an image ``(H, W, channels)`` to the network's input ``(channels, h, w)``, both uint8.
    """

    def __init__(self, cfg: CfgNode, model: GeneralizedRCNN, class_names: Sequence[str], threshold: float) -> None:
        self.class_names, self.threshold = list(class_names), threshold
        self.channels: int = cfg.INPUT.CHANNELS
        self.cfg, self.model = cfg, model.eval()
        self.network_input = DetectionMapper(cfg, False, pixels=PixelCache(PixelFormat.of(cfg))).network_input
        self._pixels = PixelFormat.of(cfg)
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
                found.pred_masks.numpy() if found.has("pred_masks") else None,
            )
            for found in self.batch(images)
        ]

    def read(self, image: ImageInput) -> np.ndarray:
        """Return an image as an array ``(H, W, channels)`` of uint8; see :meth:`batch`."""
        return self._pixels.array(image)


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
    return Detector(cfg, model, names, threshold)


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
