"""Pictures of detections: contact sheets with the ground truth beside them, and annotated images."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor, ImageDraw, ImageFont

from relvit_d2.detection.detections import AnyDetector, Detections, Mask
from relvit_d2.detection.tiles import scaled
from relvit_d2.utils.files import appearing

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Okabe and Ito, "Color Universal Design" (2008): distinct with every common form of colour blindness.
HUES = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442")
_FONT = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
_BESIDE = " 0123456789.\u00d7*+!?"  # characters of labels besides those of names
INK, PAPER = (33, 33, 33), (255, 255, 255)

PANEL_WIDTH, PANEL_HEIGHT = 448, 256  # pixels an image is scaled to fit, up or down
SHEET_WIDTH = 1800  # maximum, unless a single pair is wider; at most three pairs a row
BOX_WIDTH, HALO = 3, 1  # pixels of a box's line and of its contrasting border on either side
FONT_SIZE, LABEL_PADDING = 15, 3
STRIP = 22  # pixels above and below an image, for the labels of boxes at its edge
MIN_SIDE = 800  # pixels of the longer side of a picture of one image
PAIR_GAP, GAP, BORDER = 10, 36, 16
TITLE_HEIGHT, CAPTION_HEIGHT, NAME_HEIGHT = 40, 20, 20
NAME_SIZE = 12


class DetectionRow(NamedTuple):
    """One image with ground truth and detections; boxes are XYXY in pixels of the image."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    truth_boxes: np.ndarray  # (T, 4)
    truth_classes: np.ndarray  # (T,) indices into the class names
    boxes: np.ndarray  # (P, 4)
    classes: np.ndarray  # (P,) indices into the class names
    scores: np.ndarray  # (P,) in [0, 1]


class Cell(NamedTuple):
    """One image of a contact sheet; boxes are XYXY in pixels of the image."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    boxes: np.ndarray  # (N, 4)
    classes: np.ndarray  # (N,) indices, on which the colours depend
    labels: Sequence[str]  # (N,) text at each box, empty for none
    name: str = ""  # caption


def draw_detections(
    rows: Sequence[DetectionRow], class_names: Sequence[str], path: str | Path, title: str | None = None
) -> None:
    """Write :func:`detections_sheet` as a PNG, which appears whole or not at all."""
    sheet = detections_sheet(rows, class_names, title)
    with appearing(Path(path)) as part:
        sheet.save(part, format="PNG")


def detections_sheet(rows: Sequence[DetectionRow], class_names: Sequence[str], title: str | None = None) -> Image.Image:
    """Return a contact sheet with, for each image, the ground truth on the left and the detections on the right.

    Images are scaled up or down to fit 448 x 256 pixels, so that small boxes and their labels are legible. Each box
    has the colour (:func:`class_color`) and the name of its class, a detection also its score. Labels are outside
    their box where there is space, and do not overlap if possible. All given detections are drawn. Equal arguments
    give equal sheets.

    Args:
        rows: 1 to about 12 images, drawn in this order, row by row.
        class_names: names of the class indices.
        title: a line above the sheet.

    Raises:
        ValueError: ``rows`` is empty.
    """
    names, cells = legible(class_names), []
    for row in rows:
        truth = [names[c] for c in row.truth_classes]
        found = [f"{names[c]} {s:.2f}" for c, s in zip(row.classes, row.scores, strict=True)]
        cells.append(Cell(row.image, row.truth_boxes, row.truth_classes, truth))
        cells.append(Cell(row.image, row.boxes, row.classes, found))
    return contact_sheet(cells, title or "", ("truth", "detections"), most=3, limit=SHEET_WIDTH)


def contact_sheet(cells: Sequence[Cell], title: str, heads: Sequence[str], most: int, limit: int) -> Image.Image:
    """Return a sheet of images, row by row, as :func:`detections_sheet` describes it.

    Args:
        cells: 1 or more images, as many for each group as there are heads.
        title: a line above the sheet, or empty.
        heads: texts above the images of a group, which are beside each other.
        most: maximum number of groups in a row.
        limit: maximum width in pixels, unless a single group is wider.

    Raises:
        ValueError: ``cells`` is empty.
    """
    if not cells:
        raise ValueError("a contact sheet needs at least one image")
    title = escaped(title)
    panels = [fit(cell.image) for cell in cells]
    width = max(PANEL_HEIGHT, *(panel.width for panel in panels))  # never too narrow for a label
    group = len(heads) * (width + PAIR_GAP) - PAIR_GAP
    groups = max(1, min(most, len(cells) // len(heads), (limit - 2 * BORDER + GAP) // (group + GAP)))
    columns = groups * len(heads)
    below = NAME_HEIGHT if any(cell.name for cell in cells) else 0
    heights = [
        max(panel.height for panel in panels[first : first + columns]) + 2 * STRIP + below
        for first in range(0, len(panels), columns)
    ]
    header = BORDER + (TITLE_HEIGHT if title else 0)
    tops = list(accumulate(heights, initial=header + (CAPTION_HEIGHT if any(heads) else 0)))
    sheet = Image.new("RGB", (2 * BORDER + groups * (group + GAP) - GAP, tops[-1] + BORDER), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((BORDER, BORDER), title, INK, font(FONT_SIZE + 7, title), anchor="lt")
    places = (divmod(column, len(heads)) for column in range(columns))
    lefts = [BORDER + number * (group + GAP) + inner * (width + PAIR_GAP) for number, inner in places]
    for left, head in zip(lefts, [*heads] * groups, strict=True):
        draw.text((left + width // 2, header), head, INK, font(FONT_SIZE + 3), anchor="mt")
    for index, (cell, panel) in enumerate(zip(cells, panels, strict=True)):
        line, column = divmod(index, columns)
        left, top, bottom = lefts[column], tops[line], tops[line + 1] - below
        corner = (left + (width - panel.width) // 2, top + (bottom - top - panel.height) // 2)
        sheet.paste(panel, corner)
        scale = np.array([panel.width / cell.image.shape[1], panel.height / cell.image.shape[0]] * 2)
        inside = np.array([panel.width - 1, panel.height - 1] * 2)
        scaled = np.clip(np.asarray(cell.boxes, dtype=np.float64).reshape(-1, 4) * scale, 0, inside)
        placed = [tuple(box) for box in (scaled + np.array(corner * 2)).tolist()]
        colors = [class_color(int(number)) for number in cell.classes]
        draw_boxes(draw, placed, colors, cell.labels, (left, top, left + width, bottom))
        name = escaped(cell.name)
        draw.text((left + width / 2, bottom + 2), name, INK, font(NAME_SIZE, name), anchor="mt")
    return sheet


def annotated(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
    masks: Sequence[Mask] | None = None,
) -> Image.Image:
    """Return an image with its detections drawn on it; small images are enlarged so that labels are legible.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(D, 4)`` XYXY, pixels of the image.
        classes: ``(D,)`` indices into ``class_names``.
        scores: ``(D,)`` in [0, 1].
        class_names: names of the class indices.
        masks: the ``D`` masks, tinted in their class's colour; None for none.
    """
    height, width = image.shape[:2]
    colors = [class_color(int(index)) for index in classes]
    scale = max(1.0, MIN_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(tinted(image, masks or (), colors)).resize(size, Image.Resampling.BICUBIC)
    placed = np.clip(boxes.reshape(-1, 4) * scale, 0, np.array([size[0] - 1, size[1] - 1] * 2))
    class_names = legible(class_names)
    texts = [f"{class_names[int(c)]} {s:.2f}" for c, s in zip(classes, scores, strict=True)]
    zoom = max(1.0, max(size) / MIN_SIDE * 0.75)
    draw_boxes(ImageDraw.Draw(picture), [tuple(box) for box in placed.tolist()], colors, texts, (0, 0, *size), zoom)
    return picture


def tinted(image: np.ndarray, masks: Sequence[Mask], colors: Sequence[Color]) -> np.ndarray:
    """Return an image ``(H, W, 3)`` uint8 with the pixels of each mask mixed with its colour."""
    mixed = image.astype(np.float32)
    for mask, color in zip(masks, colors, strict=False):
        part = mask.in_part(mixed)
        pixels = mask.pixels
        part[pixels] = 0.55 * part[pixels] + 0.45 * np.array(color, dtype=np.float32)
    return mixed.round().astype(np.uint8)


def class_color(index: int) -> Color:
    """Return the RGB colour of a class index: seven hues, then darker, then lighter ones; they repeat from index 21."""
    hue = np.array(ImageColor.getrgb(HUES[index % len(HUES)]), dtype=np.float64)
    shade = index // len(HUES) % 3
    mixed = (hue, 0.55 * hue, 0.5 * hue + 127.5)[shade].round().astype(int).tolist()
    return mixed[0], mixed[1], mixed[2]


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Return a font of a size in pixels: the default one, or an installed one if a text has other letters."""
    return _face(font_of(text) or _FONT, size)


@lru_cache(maxsize=64)
def _face(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def font_of(text: str) -> str | None:
    """Return the file of a font with all characters of a text, of scores and of counts, or None.

    The default font has precedence over installed ones.
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
        ImageFont.truetype(path, FONT_SIZE)  # fails for bitmap fonts
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def legible(class_names: Sequence[str]) -> list[str]:
    """Replace class names by the number of the class where no font has the name's letters."""
    return [name if font_of(name) else str(number) for number, name in enumerate(class_names)]


def escaped(text: str) -> str:
    """Replace the letters of a text by escapes where no font has them."""
    return text if font_of(text) else text.encode("ascii", "backslashreplace").decode()


def in_rgb(image: np.ndarray) -> np.ndarray:
    """Return an (H, W, C) image with three channels: of any other number the first one in gray."""
    return image if image.shape[2] == 3 else np.repeat(image[:, :, :1], 3, axis=2)


def fit(image: np.ndarray) -> Image.Image:
    """Scale an (H, W, 3) image to the largest size that fits a panel, with its aspect ratio."""
    height, width = image.shape[:2]
    scale = min(PANEL_WIDTH / width, PANEL_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)


def _contrast(color: Color) -> Color:
    """Return black or white, whichever has the higher contrast; the ratio of WCAG 2.1 is at least 4.5."""
    value = np.array(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def draw_boxes(
    draw: ImageDraw.ImageDraw, boxes: list[Box], colors: list[Color], texts: Sequence[str], cell: Box, zoom: float = 1.0
) -> None:
    """Draw boxes, in pixels of the sheet, and over them the labels that are not empty, inside the cell.

    Lines and letters are ``zoom`` times as large as on a sheet.
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
    """Return the position of a label of the lowest cost, near its box and inside the cell.

    Tried are positions above the box, below it, one or two lines further away, and inside. The cost is the covered
    area of boxes, four times that of other labels, and a fraction of the label's own area that grows with distance.
    """
    x0, y0, x1, y1 = box
    above, below = y0 - HALO - 1 - height, y1 + HALO + 1
    best, lowest = box, float("inf")
    heights = [(above - step * height, 0.3 * step) for step in range(3)]
    heights += [(below + step * height, 0.3 * step) for step in range(3)]
    for y, distance in (*sorted(heights, key=lambda pair: pair[1]), (y0, 0.6)):
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
    """Return the area of the intersection of two XYXY boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def draw_found(
    detector: AnyDetector, image: np.ndarray, found: Detections, size: tuple[int, int] | None = None
) -> Image.Image:
    """Draw detections on an image; ``size`` is its width and height where the image given is a reduced one."""
    if size:
        found = scaled(found, image.shape[1] / size[0], image.shape[0] / size[1])
    return annotated(in_rgb(image), found.boxes, found.classes, found.scores, detector.class_names, found.masks)


def coco_results(name: str, found: Detections, detector: AnyDetector, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return detections in an image of this width and height as COCO results, with the class's name, ``category``."""
    sizes = found.boxes[:, 2:] - found.boxes[:, :2]
    results: list[dict[str, Any]] = [
        {"image_id": name, "category_id": number, "bbox": box, "score": score, "category": detector.class_names[number]}
        for number, box, score in zip(
            found.classes.tolist(),
            np.concatenate((found.boxes[:, :2], sizes), axis=1).tolist(),
            found.scores.tolist(),
            strict=True,
        )
    ]
    for result, mask in zip(results, found.masks or (), strict=False):
        result["segmentation"] = mask.rle(size[1], size[0])
    return results
