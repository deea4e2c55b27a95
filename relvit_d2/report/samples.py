"""Contact sheet of images with their labels, to check them by eye."""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from fvcore.common.config import CfgNode

from relvit_d2.analysis.data_checks import file_of
from relvit_d2.data.detection.records import Record
from relvit_d2.data.detection.regions import InstancesWithIgnoreRegions
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.detection.detections import Mask
from relvit_d2.detection.run import resolve_config, training_batches, training_records
from relvit_d2.report.predictions import Cell, class_color, contact_sheet, in_rgb, legible, tinted
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing

COLUMNS, WIDTH = 4, 2000
MAX_LABELS = 10  # of more boxes only the largest of each label has it, with their number

MAX_SAMPLES = 16
MARKS = {"difficult": "*", "iscrowd": "+"}


def draw_samples(samples: Sequence[Cell], path: str | Path, title: str) -> None:
    """Write a PNG with the images, four a row, their boxes and names, in an existing folder.

    Every box has its label; of more than ten boxes only the largest of each label, with the number of boxes.

    Raises:
        ValueError: ``samples`` is empty.
    """
    cells = [sample._replace(labels=_labels(sample)) for sample in samples]
    sheet = contact_sheet(cells, title, ("",), COLUMNS, WIDTH)
    with appearing(Path(path)) as part:
        sheet.save(part, format="PNG")


def _labels(sample: Cell) -> list[str]:
    """Return the text at each box, ``""`` for none."""
    if len(sample.labels) <= MAX_LABELS:
        return list(sample.labels)
    areas = np.prod(sample.boxes[:, 2:] - sample.boxes[:, :2], axis=1)
    written = [""] * len(sample.labels)
    for label in dict.fromkeys(sample.labels):
        alike = [index for index, other in enumerate(sample.labels) if other == label]
        number = f" \u00d7 {len(alike)}" if len(alike) > 1 else ""
        written[max(alike, key=areas.__getitem__)] = label + number
    return written


def samples_of(items: list[Any], classes: list[str], pixels: PixelFormat) -> list[Cell]:
    """Return images at equal intervals among those with objects, if labelled; unreadable images are left out."""
    classes = legible(classes)
    shown = [item for item in items if not isinstance(item, dict) or item.get("annotations")] or items
    drawn = []
    for index in np.unique(np.linspace(0, len(shown) - 1, min(MAX_SAMPLES, len(shown))).round().astype(int)):
        item = shown[index]
        try:
            image = in_rgb(pixels.read(file_of(item)))
        except UserError:
            continue
        found = item.get("annotations", []) if isinstance(item, dict) else []
        found = [entry for entry in found if entry["category_id"] in range(len(classes))]
        # An ignore region that holds for several classes has an annotation of each.
        regions = {(*entry["bbox"], entry.get("type")): entry for entry in found if entry.get("iscrowd")}
        found = [entry for entry in found if not entry.get("iscrowd")] + list(regions.values())
        boxes = [BoxMode.convert(list(entry["bbox"]), entry["bbox_mode"], BoxMode.XYXY_ABS) for entry in found]
        numbers = np.array([entry["category_id"] for entry in found], dtype=int)
        labels = [label_of(entry, classes) for entry in found]
        drawn.append(Cell(image, np.array(boxes).reshape(-1, 4), numbers, labels, Path(str(file_of(item))).name))
    return drawn


def augmented_samples(cfg: CfgNode, classes: list[str]) -> list[Cell]:
    """Return the first training images as the detector of a config receives them, with masks if they are trained.

    Raises:
        UserError: the config names no training images or cannot be used with them.
    """
    records = training_records(cfg)
    cfg = resolve_config(cfg, records)
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    batches = training_batches(cfg, records, 0)
    samples = list(islice(chain.from_iterable(batches), MAX_SAMPLES))
    return [_cell_of(sample, cfg.INPUT.FORMAT, legible(classes)) for sample in samples]


def _cell_of(sample: dict[str, Any], order: str, classes: list[str]) -> Cell:
    """Return the picture of a mapper's output."""
    image, instances = sample["image"].permute(1, 2, 0).numpy(), sample["instances"]
    numbers, boxes = instances.gt_classes.numpy(), instances.gt_boxes.tensor.numpy()
    labels = [classes[number] for number in numbers]
    picture = in_rgb(image if order == "RGB" else image[:, :, ::-1])
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        colors = [class_color(number) for number in numbers]
        picture = tinted(picture, [Mask.of(mask) for mask in masks.tensor.numpy()], colors)
    if isinstance(instances, InstancesWithIgnoreRegions):
        regions = instances.regions.tensor.numpy()
        boxes = np.concatenate([boxes, regions])
        numbers = np.concatenate([numbers, np.full(len(regions), len(classes))])
        labels += ["ignored"] * len(regions)
    return Cell(np.ascontiguousarray(picture), boxes, numbers, labels, Path(sample["file_name"]).name)


def label_of(annotation: Record, classes: list[str]) -> str:
    """Return the text at an object's box: class or type, and marks."""
    marks = "".join(sign for key, sign in MARKS.items() if annotation.get(key))
    return str(annotation.get("type") or classes[annotation["category_id"]]) + marks
