"""One page of images with their labels, to see at a glance whether they are right."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from relvit_d2.report.predictions import (
    BORDER,
    FONT_SIZE,
    INK,
    PANEL_HEIGHT,
    PAPER,
    STRIP,
    TITLE_HEIGHT,
    class_color,
    draw_boxes,
    escaped,
    fit,
    font,
)
from relvit_d2.utils.files import appearing

COLUMNS, GAP, NAME_HEIGHT = 4, 18, 20
NAME_SIZE = 12
CROWDED = 10  # of more boxes only the largest of each label is labelled, with their number


class Sample(NamedTuple):
    """One image with its labels; boxes are XYXY in pixels of the image."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    boxes: np.ndarray  # (N, 4)
    classes: np.ndarray  # (N,) indices, which decide the colours
    labels: Sequence[str]  # (N,) what is written at each box
    name: str  # written below


def draw_samples(samples: Sequence[Sample], path: str | Path, title: str) -> None:
    """Write a PNG with the images, four a row, their boxes and names.

    Images are scaled to fit 448 x 256 pixels, small ones up. Every box carries its label; of more than ten boxes
    only the largest of each label does, with the number of boxes.

    Args:
        samples: 1 or more, drawn in this order, row by row.
        path: the file to write; it appears whole or not at all, in a folder that exists.
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
        sheet.paste(panel, corner)
        scale = np.array([panel.width / sample.image.shape[1], panel.height / sample.image.shape[0]] * 2)
        limit = np.array([panel.width - 1, panel.height - 1] * 2)
        scaled = np.clip(np.asarray(sample.boxes, dtype=np.float64).reshape(-1, 4) * scale, 0, limit)
        placed = [tuple(box) for box in (scaled + np.array(corner * 2)).tolist()]
        colors = [class_color(int(index)) for index in sample.classes]
        draw_boxes(draw, placed, colors, _labels(sample), (left, top, left + cell_width, bottom))
        name = escaped(sample.name)
        draw.text((left + cell_width / 2, bottom + 2), name, INK, font(NAME_SIZE, name), anchor="mt")
    with appearing(Path(path)) as part:
        sheet.save(part, format="PNG")


def _labels(sample: Sample) -> list[str]:
    """Return what is written at each box, ``""`` for nothing."""
    if len(sample.labels) <= CROWDED:
        return list(sample.labels)
    areas = np.prod(sample.boxes[:, 2:] - sample.boxes[:, :2], axis=1)
    written = [""] * len(sample.labels)
    for label in dict.fromkeys(sample.labels):
        alike = [index for index, other in enumerate(sample.labels) if other == label]
        number = f" \u00d7 {len(alike)}" if len(alike) > 1 else ""
        written[max(alike, key=areas.__getitem__)] = label + number
    return written
