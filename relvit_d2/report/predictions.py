"""One picture of what a detector sees: true boxes beside detected ones, image by image."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor, ImageDraw, ImageFont

from relvit_d2.detection.predictor import Detector
from relvit_d2.utils.files import appearing

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Okabe and Ito, "Color Universal Design" (2008): told apart with every common form of colour blindness.
HUES = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442")
_FONT = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
_BESIDE = " 0123456789.\u00d7*+!?"  # what labels hold beside a name
INK, PAPER = (33, 33, 33), (255, 255, 255)

PANEL_WIDTH, PANEL_HEIGHT = 448, 256  # pixels an image is scaled to fit, up or down
SHEET_WIDTH = 1800  # no wider unless a single pair is; at most three pairs a row
BOX_WIDTH, HALO = 3, 1  # pixels of a box's line and of the contrasting rim on either side of it
FONT_SIZE, LABEL_PADDING = 15, 3
STRIP = 22  # pixels above and below an image, for the labels of boxes at its edge
LEAST_SIDE = 800  # pixels of the longer side of a picture of one image
PAIR_GAP, GAP, BORDER = 10, 36, 16
TITLE_HEIGHT, CAPTION_HEIGHT = 40, 20


class DetectionRow(NamedTuple):
    """One image with its truth and its detections; boxes are XYXY in pixels of the image."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    truth_boxes: np.ndarray  # (T, 4)
    truth_classes: np.ndarray  # (T,) indices into the class names
    boxes: np.ndarray  # (P, 4)
    classes: np.ndarray  # (P,) indices into the class names
    scores: np.ndarray  # (P,) in [0, 1]


def draw_detections(
    rows: Sequence[DetectionRow], class_names: Sequence[str], path: str | Path, title: str | None = None
) -> None:
    """Write the sheet of :func:`detections_sheet` as a PNG, which appears whole or not at all."""
    sheet = detections_sheet(rows, class_names, title)
    with appearing(Path(path)) as part:
        sheet.save(part, format="PNG")


def detections_sheet(rows: Sequence[DetectionRow], class_names: Sequence[str], title: str | None = None) -> Image.Image:
    """Return a contact sheet with, for each image, the truth on the left and the detections on the right.

    Images are scaled to fit 448 x 256 pixels, small ones up, so that boxes of a few pixels and their labels
    can be read. Each class has its colour (:func:`class_color`) and its name on every box; detections carry
    the score too. Labels stand outside their box where there is room and avoid each other. All detections
    given are drawn: leave out what scores too low beforehand. Equal arguments give equal sheets.

    Args:
        rows: 1 to about 12 images, drawn in this order, row by row.
        class_names: names of the class indices.
        title: a line above the sheet.

    Raises:
        ValueError: ``rows`` is empty.
    """
    if not rows:
        raise ValueError("detections_sheet needs at least one image")
    class_names, title = legible(class_names), escaped(title or "")
    panels = [fit(row.image) for row in rows]
    cell_width = max(PANEL_HEIGHT, *(panel.width for panel in panels))  # never too narrow for a label
    pair_width = 2 * cell_width + PAIR_GAP
    columns = max(1, min(3, len(rows), (SHEET_WIDTH - 2 * BORDER + GAP) // (pair_width + GAP)))
    line_heights = [
        max(panel.height for panel in panels[first : first + columns]) + 2 * STRIP
        for first in range(0, len(panels), columns)
    ]
    header = BORDER + (TITLE_HEIGHT if title else 0)
    tops = list(accumulate(line_heights, initial=header + CAPTION_HEIGHT))
    sheet = Image.new("RGB", (2 * BORDER + columns * (pair_width + GAP) - GAP, tops[-1] + BORDER), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((BORDER, BORDER), title, INK, font(FONT_SIZE + 7, title), anchor="lt")
    for column in range(columns):
        left = BORDER + column * (pair_width + GAP)
        for caption, x in (("truth", left), ("detections", left + cell_width + PAIR_GAP)):
            draw.text((x + cell_width // 2, header), caption, INK, font(FONT_SIZE + 3), anchor="mt")

    for index, (row, panel) in enumerate(zip(rows, panels, strict=True)):
        line, column = divmod(index, columns)
        left, top = BORDER + column * (pair_width + GAP), tops[line]
        truth = [class_names[c] for c in row.truth_classes]
        found = [f"{class_names[c]} {s:.2f}" for c, s in zip(row.classes, row.scores, strict=True)]
        for x, boxes, classes, texts in (
            (left, row.truth_boxes, row.truth_classes, truth),
            (left + cell_width + PAIR_GAP, row.boxes, row.classes, found),
        ):
            cell = (x, top, x + cell_width, top + line_heights[line])
            corner = (x + (cell_width - panel.width) // 2, top + (line_heights[line] - panel.height) // 2)
            sheet.paste(panel, corner)
            scale = np.array([panel.width / row.image.shape[1], panel.height / row.image.shape[0]] * 2)
            limit = np.array([panel.width - 1, panel.height - 1] * 2)
            scaled = np.clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale, 0, limit)
            placed = [tuple(box) for box in (scaled + np.array(corner * 2)).tolist()]
            draw_boxes(draw, placed, [class_color(int(c)) for c in classes], texts, cell)
    return sheet


def annotated(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
    masks: np.ndarray | None = None,
) -> Image.Image:
    """Return an image with its detections drawn on it, small ones enlarged so that labels can be read.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(D, 4)`` XYXY, pixels of the image.
        classes: ``(D,)`` indices into ``class_names``.
        scores: ``(D,)`` in [0, 1].
        class_names: names of the class indices.
        masks: ``(D, H, W)`` bool, tinted in their class's colour; None for none.
    """
    height, width = image.shape[:2]
    colors = [class_color(int(index)) for index in classes]
    tinted = image.astype(np.float32)
    for mask, color in zip(masks if masks is not None else (), colors, strict=False):
        tinted[mask] = 0.55 * tinted[mask] + 0.45 * np.array(color, dtype=np.float32)
    scale = max(1.0, LEAST_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(tinted.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    placed = np.clip(boxes.reshape(-1, 4) * scale, 0, np.array([size[0] - 1, size[1] - 1] * 2))
    class_names = legible(class_names)
    texts = [f"{class_names[int(c)]} {s:.2f}" for c, s in zip(classes, scores, strict=True)]
    zoom = max(1.0, max(size) / LEAST_SIDE * 0.75)
    draw_boxes(ImageDraw.Draw(picture), [tuple(box) for box in placed.tolist()], colors, texts, (0, 0, *size), zoom)
    return picture


def class_color(index: int) -> Color:
    """Return the RGB colour of a class index: seven hues, then the same darker, then lighter, 21 in all.

    From index 21 on the colours come again.
    """
    hue = np.array(ImageColor.getrgb(HUES[index % len(HUES)]), dtype=np.float64)
    shade = index // len(HUES) % 3
    mixed = (hue, 0.55 * hue, 0.5 * hue + 127.5)[shade].round().astype(int).tolist()
    return mixed[0], mixed[1], mixed[2]


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Return the font of all pictures in a size of pixels, or for a text that it lacks letters of an installed one."""
    return _face(font_of(text) or _FONT, size)


@lru_cache(maxsize=64)
def _face(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def font_of(text: str) -> str | None:
    """Return the file of a font that has all characters of a text and those of scores and counts, or None.

    It is that of all pictures, else an installed one; labels of one class have the same.
    """
    return _file_with(frozenset(map(ord, text + _BESIDE)))


@cache
def _file_with(letters: frozenset[int]) -> str | None:
    if letters <= _characters(_FONT):
        return _FONT
    return next((path for path in _installed_fonts() if letters <= _characters(path)), None)


@cache
def _installed_fonts() -> list[str]:
    """Return the system's font files, regular styles first."""
    other = re.compile("bold|italic|oblique|black|light|thin", re.IGNORECASE)
    return sorted(findSystemFonts(), key=lambda path: (bool(other.search(Path(path).stem)), path))


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        ImageFont.truetype(path, FONT_SIZE)  # fonts of bitmaps have no such size
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def legible(class_names: Sequence[str]) -> list[str]:
    """Return class names for a picture: the number of the class where no installed font has the name's letters."""
    return [name if font_of(name) else str(number) for number, name in enumerate(class_names)]


def escaped(text: str) -> str:
    """Return a text for a picture, its letters as escapes where no installed font has them."""
    return text if font_of(text) else text.encode("ascii", "backslashreplace").decode()


def in_rgb(image: np.ndarray) -> np.ndarray:
    """Return an (H, W, C) image as one of three channels: of any other number the first is shown, in gray."""
    return image if image.shape[2] == 3 else np.repeat(image[:, :, :1], 3, axis=2)


def fit(image: np.ndarray) -> Image.Image:
    """Return the (H, W, 3) image scaled to the greatest size that fits a panel, its aspect kept."""
    height, width = image.shape[:2]
    scale = min(PANEL_WIDTH / width, PANEL_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)


def _contrast(color: Color) -> Color:
    """Return black or white, whichever stands out more: the contrast ratio of WCAG 2.1 is at least 4.5."""
    value = np.array(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def draw_boxes(
    draw: ImageDraw.ImageDraw, boxes: list[Box], colors: list[Color], texts: list[str], cell: Box, zoom: float = 1.0
) -> None:
    """Draw boxes, in pixels of the sheet, and on top of all of them their labels, inside the cell.

    A label ``""`` is none. Lines and letters are ``zoom`` times as large as on a sheet.
    """
    line = round(BOX_WIDTH * zoom)
    for (x0, y0, x1, y1), color in zip(boxes, colors, strict=True):
        rim = (x0 - HALO, y0 - HALO, x1 + HALO, y1 + HALO)
        draw.rectangle(rim, outline=_contrast(color), width=line + 2 * HALO)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=line)
    taken: list[Box] = []
    for box, color, text in zip(boxes, colors, texts, strict=True):
        if not text:
            continue
        face = font(round(FONT_SIZE * zoom), text)
        width, height = face.getlength(text) + 2 * LABEL_PADDING, sum(face.getmetrics())
        label = _place_label(box, width, height, cell, boxes, taken)
        taken.append(label)
        draw.rectangle(label, fill=color)
        draw.text((label[0] + LABEL_PADDING, label[1] + height / 2), text, _contrast(color), face, anchor="lm")


def _place_label(box: Box, width: float, height: float, cell: Box, boxes: list[Box], taken: list[Box]) -> Box:
    """Return the place, near its box and inside the cell, where a label hides least.

    Above the box is tried first, then below, then a line or two further off, then inside. The cost is the
    area hidden, other labels' four times that of boxes, and a part of the label's own for being far off.
    """
    x0, y0, x1, y1 = box
    above, below = y0 - HALO - 1 - height, y1 + HALO + 1
    best, lowest = box, float("inf")
    for y, distance in (
        (above, 0.0),
        (below, 0.0),
        (above - height, 0.3),
        (below + height, 0.3),
        (above - 2 * height, 0.6),
        (below + 2 * height, 0.6),
        (y0, 0.6),
    ):
        for x in (x0 - HALO, x1 + HALO - width, (x0 + x1 - width) / 2):
            left, top = min(max(x, cell[0]), cell[2] - width), min(max(y, cell[1]), cell[3] - height - 1)
            spot = (left, top, left + width, top + height)
            cost = distance * width * height
            cost += 4 * sum(_overlap(spot, other) for other in taken)
            cost += sum(_overlap(spot, other) for other in boxes)
            if cost < lowest:
                best, lowest = spot, cost
    return best


def _overlap(a: Box, b: Box) -> float:
    """Return the area in which two XYXY boxes meet."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def draw_instances(detector: Detector, image: np.ndarray, instances: Instances) -> Image.Image:
    """Draw detections on an image."""
    fields = instances.pred_boxes.tensor.numpy(), instances.pred_classes.numpy(), instances.scores.numpy()
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    return annotated(in_rgb(image), *fields, detector.class_names, masks)


def coco_results(name: str, instances: Instances, detector: Detector) -> list[dict[str, Any]]:
    """Return detections as COCO results, with the name of the class beside its index."""
    results = instances_to_coco_json(instances, name)
    return [result | {"category": detector.class_names[result["category_id"]]} for result in results]
