"""Contact sheet of images with their labels, to check them by eye."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw

from relvit_d2.analysis.data_checks import file_of
from relvit_d2.data.detection.records import Record
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.report.predictions import (
    BORDER,
    FONT_SIZE,
    INK,
    PANEL_HEIGHT,
    PAPER,
    STRIP,
    TITLE_HEIGHT,
    class_color,
    draw_panel,
    escaped,
    fit,
    font,
    in_rgb,
    legible,
)
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing

COLUMNS, GAP, NAME_HEIGHT = 4, 18, 20
NAME_SIZE = 12
MAX_LABELS = 10  # of more boxes only the largest of each label has it, with their number


MAX_SAMPLES = 16
MARKS = {"difficult": "*", "iscrowd": "+"}


class Sample(NamedTuple):
    """One image with its labels; boxes are XYXY in pixels of the image."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    boxes: np.ndarray  # (N, 4)
    classes: np.ndarray  # (N,) indices, of which the colours depend
    labels: Sequence[str]  # (N,) text at each box
    name: str  # caption


def draw_samples(samples: Sequence[Sample], path: str | Path, title: str) -> None:
    """Write a PNG with the images, four a row, their boxes and names.

    Images are scaled up or down to fit 448 x 256 pixels. Every box has its label; of more than ten boxes
    only the largest of each label, with the number of boxes.

    Args:
        samples: 1 or more, drawn in this order, row by row.
        path: the file to write, in an existing folder; it appears whole or not at all.
        title: a line above.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("draw_samples needs at least one image")
    panels = [fit(sample.image) for sample in samples]
    cell_width = max(PANEL_HEIGHT, *(panel.width for panel in panels))
    columns = min(COLUMNS, len(samples))
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) + 2 * STRIP + NAME_HEIGHT for row in rows]
    width = 2 * BORDER + columns * (cell_width + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * BORDER + TITLE_HEIGHT + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = escaped(title)
    draw.text((BORDER, BORDER), title, INK, font(FONT_SIZE + 7, title), anchor="lt")
    for index, (sample, panel) in enumerate(zip(samples, panels, strict=True)):
        line, column = divmod(index, columns)
        left = BORDER + column * (cell_width + GAP)
        top = BORDER + TITLE_HEIGHT + sum(heights[:line])
        bottom = top + heights[line] - NAME_HEIGHT
        corner = (left + (cell_width - panel.width) // 2, top + (bottom - top - panel.height) // 2)
        colors = [class_color(int(index)) for index in sample.classes]
        cell = (left, top, left + cell_width, bottom)
        draw_panel(sheet, panel, corner, sample.boxes, sample.image.shape, colors, _labels(sample), cell)
        name = escaped(sample.name)
        draw.text((left + cell_width / 2, bottom + 2), name, INK, font(NAME_SIZE, name), anchor="mt")
    with appearing(Path(path)) as part:
        sheet.save(part, format="PNG")


def _labels(sample: Sample) -> list[str]:
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


def samples_of(items: list[Any], classes: list[str], pixels: PixelFormat) -> list[Sample]:
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
        drawn.append(Sample(image, np.array(boxes).reshape(-1, 4), numbers, labels, Path(str(file_of(item))).name))
    return drawn


def label_of(annotation: Record, classes: list[str]) -> str:
    """Return the text at an object's box: class or type, and marks."""
    marks = "".join(sign for key, sign in MARKS.items() if annotation.get(key))
    return str(annotation.get("type") or classes[annotation["category_id"]]) + marks
