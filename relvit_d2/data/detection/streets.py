"""The data set ``streets``: synthetic house numbers in SVHN's format 1, so that everything runs without a download.

Image ``i`` is a pure function of ``(seed, i)``, independent of the number of images and the order of drawing.
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import h5py
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from relvit_d2.data.detection.svhn import FIELDS, LABELS_FILE
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.progress import Progress
from relvit_d2.utils.randomness import generator

VERSION = 1
"""Version of the drawings: a stored data set of another version is drawn again."""

SIDE = 64
"""Width and height of an image, pixels."""

SPLITS = {"train": (20_220_601, 2000), "test": (20_220_602, 400)}
"""Seed and number of images of each split."""

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmb10",
    "cmss10",
    "cmtt10",
)
"""Font files that come with matplotlib (mpl-data/fonts/ttf)."""

LENGTH_PROBABILITIES = (0.2, 0.3, 0.25, 0.15, 0.1)
"""Probabilities of numbers with 1, 2, 3, 4 and 5 digits."""

HEIGHTS = (10.5, 29.0)
"""Range of a number's height before rotation, pixels. It is reduced where the number would exceed the image."""

MIN_CONTRAST = 0.3
"""Minimum difference of luma (0 to 1) between the number and everything behind it, before blur and noise."""

_FINE = 4  # supersampling factor: smooth edges, boxes to a quarter of a pixel
_GLYPH_SIZE = 160  # font size of the glyphs before the affine transform, supersampled pixels
_MARGIN = 1.5  # pixels between the number and the image's border
_INK = 0.5  # coverage from which a supersampled pixel belongs to a digit
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_DISTRACTORS = "AEHKMNRTVWXY#&+="  # characters that do not resemble a digit


class Number(NamedTuple):
    """A number and its position in the image.

    ``digits`` (K,) int 0..9; ``coverage`` (K, SIDE, SIDE) float 0..1, the alpha mask of each digit; ``boxes`` (K, 4)
    float ``left, top, width, height`` in pixels, tight around the mask.
    """

    digits: np.ndarray
    coverage: np.ndarray
    boxes: np.ndarray


def generate(folder: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Draw images 0 to ``count - 1`` of ``seed`` into ``folder``: ``1.png`` .. and ``digitStruct.mat``.

    The folder is created atomically. An existing one is kept: of two concurrent processes, the first one's is used.

    ``progress`` is called after each image with the number of images drawn so far.
    """
    with _atomic_folder(folder, folder.is_dir) as temporary:
        numbers = []
        for index in range(count):
            image, number = draw_image(seed, index)
            image.save(temporary / f"{index + 1}.png", compress_level=1)
            numbers.append(number)
            if progress:
                progress(index + 1)
        _write_labels(temporary / LABELS_FILE, numbers)


def ensure_streets(root: Path) -> Path:
    """Return ``root/streets`` with the splits ``train`` and ``test``; draw it if it is missing or outdated.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = root / "streets"
    if _stored_version(folder) == VERSION:
        return folder
    try:
        with _atomic_folder(folder, lambda: _stored_version(folder) == VERSION) as temporary:
            total = sum(count for _, count in SPLITS.values())
            with Progress(total=total, desc="drawing streets", unit="image") as bar:
                for split, (seed, count) in SPLITS.items():
                    generate(temporary / split, count, seed, lambda _: bar.update())
            (temporary / "streets.json").write_text(
                json.dumps({"version": VERSION, "splits": SPLITS}) + "\n", encoding="utf-8"
            )
    except OSError as error:
        raise UserError(
            f"the data set streets cannot be written to {folder} ({error}): free space there, or set "
            "DETECTRON2_DATASETS to a writable folder"
        ) from error
    return folder


def draw_image(seed: int, index: int) -> tuple[Image.Image, Number]:
    """Return image ``index`` of ``seed``, RGB and SIDE x SIDE, and the number in it."""
    rng = generator(seed, "street", index)
    number = place_number(rng)
    edge = rng.uniform(0.35, 0.65)
    dark, light = (0.02, edge - MIN_CONTRAST / 2), (edge + MIN_CONTRAST / 2, 0.98)
    behind, ink = (dark, light) if rng.random() < 0.5 else (light, dark)

    canvas = _gradient(rng, behind)
    canvas = _with_clutter(rng, canvas, behind, number)
    coverage = number.coverage.max(axis=0)[:, :, None]
    canvas += coverage * (_color(rng, ink) - canvas)

    image = Image.fromarray(np.uint8(np.rint(255 * canvas)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.8)))
    noise = rng.normal(0.0, rng.uniform(0.0, 9.0), (SIDE, SIDE, 3))
    return Image.fromarray(np.uint8(np.clip(np.rint(np.asarray(image) + noise), 0, 255))), number


def place_number(rng: np.random.Generator) -> Number:
    """Draw a number's digits, font, size, rotation, shear and position at random."""
    digits = rng.integers(0, 10, rng.choice(len(LENGTH_PROBABILITIES), p=LENGTH_PROBABILITIES) + 1)
    font = _font(FONTS[rng.integers(len(FONTS))], _GLYPH_SIZE)
    spacing = rng.uniform(0.0, 0.08) * _GLYPH_SIZE
    glyphs, corners = _line_of_glyphs(font, digits, spacing)

    angle, shear = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    warp = turn @ np.array([[1.0, shear], [0.0, 1.0]])
    outline = corners.reshape(-1, 2) @ warp.T
    low, high = outline.min(axis=0), outline.max(axis=0)
    available = SIDE - 2 * _MARGIN
    scale = min(rng.uniform(*HEIGHTS) / min(mask.height for mask in glyphs), available / (high - low).max())
    warp, low, high = scale * warp, scale * low, scale * high
    shift = _MARGIN - low + rng.random(2) * (available - (high - low))

    coverage = np.empty((len(digits), SIDE, SIDE))
    boxes = np.empty((len(digits), 4))
    for k, (mask, corner) in enumerate(zip(glyphs, corners[:, 0], strict=True)):
        fine = _warped(mask, warp, warp @ corner + shift)
        columns, rows = (np.flatnonzero((fine >= _INK).any(axis=axis)) for axis in (0, 1))
        left, top = columns[0], rows[0]
        boxes[k] = np.array([left, top, columns[-1] + 1 - left, rows[-1] + 1 - top]) / _FINE
        coverage[k] = fine.reshape(SIDE, _FINE, SIDE, _FINE).mean(axis=(1, 3))
    return Number(digits, coverage, boxes)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # The basic layout does not depend on whether Pillow was built with Raqm.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _line_of_glyphs(
    font: ImageFont.FreeTypeFont, digits: Sequence[int] | np.ndarray, spacing: float
) -> tuple[list[Image.Image], np.ndarray]:
    """Return a tight mask of each digit, and the (K, 4, 2) corners of the masks when set on one line."""
    masks, corners = [], []
    pen = 0.0
    for digit in digits:
        left, top, right, bottom = font.getbbox(str(digit))
        mask = Image.new("L", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(mask).text((-left, -top), str(digit), font=font, fill=255)
        masks.append(mask)
        corners.append([(pen + x, y) for y in (top, bottom) for x in (left, right)])
        pen += font.getlength(str(digit)) + spacing
    return masks, np.array(corners)


def _warped(mask: Image.Image, warp: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return ``mask`` with its corner at ``origin`` (pixels), warped: (SIDE * _FINE, SIDE * _FINE) float 0..1."""
    # Pillow requires the inverse map, from output to input pixels.
    inverse = np.linalg.inv(warp * _FINE)
    offset = -inverse @ (origin * _FINE)
    rows = np.column_stack([inverse, offset]).ravel()
    fine = (SIDE * _FINE, SIDE * _FINE)
    return np.asarray(mask.transform(fine, Image.Transform.AFFINE, tuple(rows), Image.Resampling.BILINEAR)) / 255.0


def _color(rng: np.random.Generator, luma_range: tuple[float, float]) -> np.ndarray:
    """Return a random RGB color, (3,) of 0..1, with a luma in ``luma_range``."""
    luma = rng.uniform(*luma_range)
    color = rng.random(3)
    current = color @ _LUMA
    if current >= luma:
        return color * (luma / current)
    return color + (1 - color) * ((luma - current) / (1 - current))


def _gradient(rng: np.random.Generator, luma_range: tuple[float, float]) -> np.ndarray:
    """Return a gradient of two colors (SIDE, SIDE, 3), the lighter one at the top, as in photographs.

    Positions in the image can be distinguished by it, which position pretext tasks require.
    """
    angle = rng.normal(np.pi / 2, 0.35)
    ramp = np.linspace(-1, 1, SIDE)
    along = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    weight = ((along - along.min()) / np.ptp(along))[:, :, None]
    below, above = sorted((_color(rng, luma_range), _color(rng, luma_range)), key=_LUMA.dot)
    return (1 - weight) * above + weight * below


def _with_clutter(
    rng: np.random.Generator, canvas: np.ndarray, luma_range: tuple[float, float], number: Number
) -> np.ndarray:
    """Draw lines, rectangles and letters with a luma in ``luma_range``.

    Lines and rectangles may be behind the number; letters do not overlap it.
    """
    for _ in range(rng.integers(0, 6)):
        layer = Image.new("L", (SIDE, SIDE))
        draw = ImageDraw.Draw(layer)
        kind = rng.integers(3)
        (x0, x1), (y0, y1) = np.sort(rng.integers(-8, SIDE + 8, (2, 2)), axis=1).tolist()
        if kind == 0:
            ends = (x0, y0, x1, y1) if rng.random() < 0.5 else (x0, y1, x1, y0)
            draw.line(ends, fill=255, width=int(rng.integers(1, 4)))
        elif kind == 1:
            draw.rectangle((x0, y0, x1, y1), fill=255 if rng.random() < 0.5 else 0, outline=255)
        else:
            font = _font(FONTS[rng.integers(len(FONTS))], int(rng.integers(10, 22)))
            draw.text((x0, y0), _DISTRACTORS[rng.integers(len(_DISTRACTORS))], font=font, fill=255)
            if _touches(layer.getbbox(), number.boxes):
                continue
        alpha = np.asarray(layer)[:, :, None] / 255 * rng.uniform(0.3, 0.9)
        canvas = canvas + alpha * (_color(rng, luma_range) - canvas)
    return canvas


def _touches(box: tuple[int, int, int, int] | None, boxes: np.ndarray) -> bool:
    """Whether ``box`` (corners) is within two pixels of any of ``boxes`` (left, top, width, height)."""
    if box is None:
        return False
    low, high = boxes[:, :2] - 2, boxes[:, :2] + boxes[:, 2:] + 2
    return bool(((low < box[2:]) & (high > box[:2])).all(axis=1).any())


def _write_labels(path: Path, numbers: Sequence[Number]) -> None:
    """Write ``digitStruct.mat`` as :mod:`relvit_d2.data.detection.svhn` reads it; image ``i`` is ``{i + 1}.png``."""
    with h5py.File(path, "w") as file:
        store = file.create_group("#refs#")
        key = map(str, itertools.count())

        def reference(value: np.ndarray) -> h5py.Reference:
            return store.create_dataset(next(key), data=value).ref

        def column(values: Sequence[h5py.Reference]) -> np.ndarray:
            return np.array(values, dtype=h5py.ref_dtype).reshape(-1, 1)

        names, boxes = [], []
        for index, number in enumerate(numbers):
            names.append(reference(np.frombuffer(f"{index + 1}.png".encode("utf-16-le"), np.uint16)[:, None]))
            group = store.create_group(next(key))
            boxes.append(group.ref)
            labels = np.where(number.digits == 0, 10, number.digits)
            for field, values in zip(FIELDS, (*number.boxes.T, labels), strict=True):
                cells = np.asarray(values, dtype=np.float64).reshape(-1, 1, 1)
                data = cells[0] if len(cells) == 1 else column([reference(cell) for cell in cells])
                group.create_dataset(field, data=data)
        struct = file.create_group("digitStruct")
        struct.create_dataset("name", data=column(names))
        struct.create_dataset("bbox", data=column(boxes))


def _stored_version(folder: Path) -> int | None:
    try:
        return json.loads((folder / "streets.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _atomic_folder(folder: Path, is_done: Callable[[], bool]) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``folder`` when the block ends without an exception.

    If another process created ``folder`` meanwhile (``is_done``), that one is kept; any other ``folder`` is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary = parent / "new"
        temporary.mkdir()
        yield temporary
        if not is_done():
            if folder.exists():
                _rename(folder, parent / "old")
            _rename(temporary, folder)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    """Rename a folder unless another process was faster: then the target exists or the source does not."""
    try:
        os.rename(source, target)  # noqa: PTH104
    except FileNotFoundError:
        if source.exists():
            raise
    except OSError:
        if not target.is_dir():
            raise
