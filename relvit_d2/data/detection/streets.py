"""`streets`: synthetic street numbers, drawn here, stored in SVHN's format 1 and read by SVHN's reader.

They let everything run without a download. Image ``i`` of a seed is a pure function of ``(seed, i)``: more images, or
another order of drawing, change none that is there.
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
from tqdm import tqdm

from relvit_d2.data.detection.svhn import FIELDS, LABELS_FILE
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.randomness import generator

VERSION = 1
"""Of the drawings: a stored set with another number is drawn anew."""

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
"""Files that matplotlib ships (mpl-data/fonts/ttf)."""

LENGTH_ODDS = (0.2, 0.3, 0.25, 0.15, 0.1)
"""Of numbers with 1, 2, 3, 4 and 5 digits."""

HEIGHTS = (10.5, 29.0)
"""Range of a number's height before it is turned, pixels. What does not fit into the image is drawn smaller."""

MIN_CONTRAST = 0.3
"""Between the luma of the number and that of anything behind it, of 1; before blur and noise."""

_FINE = 4  # glyphs are drawn this much larger and averaged down: smooth edges, boxes to a quarter of a pixel
_GLYPH_SIZE = 160  # font size of the glyphs that are warped into place, finer pixels
_MARGIN = 1.5  # pixels kept free between the number and the image's border
_INK = 0.5  # coverage from which a finer pixel belongs to a digit
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_SHAPES = "AEHKMNRTVWXY#&+="  # signs that are no digit and cannot be taken for one


class Number(NamedTuple):
    """A number in its place.

    ``digits`` (K,) int 0..9; ``coverage`` (K, SIDE, SIDE) float 0..1, the ink of each digit; ``boxes`` (K, 4) float
    ``left, top, width, height`` in pixels, tight around the ink.
    """

    digits: np.ndarray
    coverage: np.ndarray
    boxes: np.ndarray


def generate(folder: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Draw images 0 to ``count - 1`` of ``seed`` into ``folder``: ``1.png`` .. and ``digitStruct.mat``.

    The folder appears whole or not at all. One that is there by then stays as it is: of two processes at work at
    once the first wins, and both end with the same files.

    Args:
        folder: to make; its parents are made too.
        count: number of images.
        seed: non-negative.
        progress: called after each image with the number of images drawn so far.

    Raises:
        OSError: the folder cannot be written.
    """
    with _appears_whole(folder, folder.is_dir) as workplace:
        numbers = []
        for index in range(count):
            image, number = draw_image(seed, index)
            image.save(workplace / f"{index + 1}.png", compress_level=1)
            numbers.append(number)
            if progress:
                progress(index + 1)
        _write_labels(workplace / LABELS_FILE, numbers)


def ensure_streets(root: Path) -> Path:
    """Return ``root/streets`` with the splits ``train`` and ``test`` in it, drawn first where they are missing.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = root / "streets"
    if _stored_version(folder) == VERSION:
        return folder
    try:
        with _appears_whole(folder, lambda: _stored_version(folder) == VERSION) as workplace:
            total = sum(count for _, count in SPLITS.values())
            with tqdm(total=total, desc="drawing streets", unit="image", mininterval=0.5) as bar:
                for split, (seed, count) in SPLITS.items():
                    generate(workplace / split, count, seed, lambda _: bar.update())
            (workplace / "streets.json").write_text(
                json.dumps({"version": VERSION, "splits": SPLITS}) + "\n", encoding="utf-8"
            )
    except OSError as error:
        raise UserError(
            f"the data set streets cannot be written to {folder} ({error}): free some space there, or set "
            "DETECTRON2_DATASETS to a folder that can be written"
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
    canvas += coverage * (_colour(rng, ink) - canvas)

    image = Image.fromarray(np.uint8(np.rint(255 * canvas)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.8)))
    noise = rng.normal(0.0, rng.uniform(0.0, 9.0), (SIDE, SIDE, 3))
    return Image.fromarray(np.uint8(np.clip(np.rint(np.asarray(image) + noise), 0, 255))), number


def place_number(rng: np.random.Generator) -> Number:
    """Draw a number's digits, font, size, slant and place."""
    digits = rng.integers(0, 10, rng.choice(len(LENGTH_ODDS), p=LENGTH_ODDS) + 1)
    font = _font(FONTS[rng.integers(len(FONTS))], _GLYPH_SIZE)
    spacing = rng.uniform(0.0, 0.08) * _GLYPH_SIZE
    glyphs, corners = _line_of_glyphs(font, digits, spacing)

    angle, shear = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    warp = turn @ np.array([[1.0, shear], [0.0, 1.0]])
    outline = corners.reshape(-1, 2) @ warp.T
    low, high = outline.min(axis=0), outline.max(axis=0)
    room = SIDE - 2 * _MARGIN
    scale = min(rng.uniform(*HEIGHTS) / min(mask.height for mask in glyphs), room / (high - low).max())
    warp, low, high = scale * warp, scale * low, scale * high
    shift = _MARGIN - low + rng.random(2) * (room - (high - low))

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
    # The basic layout is the same whether or not Pillow was built with Raqm.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _line_of_glyphs(
    font: ImageFont.FreeTypeFont, digits: Sequence[int] | np.ndarray, spacing: float
) -> tuple[list[Image.Image], np.ndarray]:
    """Return each digit's ink as a tight mask, and the (K, 4, 2) corners of the masks set on one line."""
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
    # Pillow wants, for each finer pixel of the result, the place in the mask: the inverse map.
    inverse = np.linalg.inv(warp * _FINE)
    offset = -inverse @ (origin * _FINE)
    rows = np.column_stack([inverse, offset]).ravel()
    fine = (SIDE * _FINE, SIDE * _FINE)
    return np.asarray(mask.transform(fine, Image.Transform.AFFINE, tuple(rows), Image.Resampling.BILINEAR)) / 255.0


def _colour(rng: np.random.Generator, luma_range: tuple[float, float]) -> np.ndarray:
    """Return a random RGB colour, (3,) of 0..1, whose luma lies in ``luma_range``."""
    luma = rng.uniform(*luma_range)
    colour = rng.random(3)
    given = colour @ _LUMA
    if given >= luma:
        return colour * (luma / given)
    return colour + (1 - colour) * ((luma - given) / (1 - given))


def _gradient(rng: np.random.Generator, luma_range: tuple[float, float]) -> np.ndarray:
    """Return (SIDE, SIDE, 3): one colour turning into another, the lighter one above.

    Streets are lit from the sky. It gives the images what photographs have and pre-training lives on: places differ.
    """
    angle = rng.normal(np.pi / 2, 0.35)
    ramp = np.linspace(-1, 1, SIDE)
    along = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    share = ((along - along.min()) / np.ptp(along))[:, :, None]
    below, above = sorted((_colour(rng, luma_range), _colour(rng, luma_range)), key=_LUMA.dot)
    return (1 - share) * above + share * below


def _with_clutter(
    rng: np.random.Generator, canvas: np.ndarray, luma_range: tuple[float, float], number: Number
) -> np.ndarray:
    """Draw lines, rectangles and signs on ``canvas``; all stay on the background's side of the contrast.

    Signs keep clear of the number, the rest runs behind it.
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
            draw.text((x0, y0), _SHAPES[rng.integers(len(_SHAPES))], font=font, fill=255)
            if _touches(layer.getbbox(), number.boxes):
                continue
        alpha = np.asarray(layer)[:, :, None] / 255 * rng.uniform(0.3, 0.9)
        canvas = canvas + alpha * (_colour(rng, luma_range) - canvas)
    return canvas


def _touches(box: tuple[int, int, int, int] | None, boxes: np.ndarray) -> bool:
    """Whether ``box`` (corners) comes within two pixels of any of ``boxes`` (left, top, width, height)."""
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
def _appears_whole(folder: Path, is_done: Callable[[], bool]) -> Iterator[Path]:
    """Give a fresh folder beside ``folder`` to fill, and rename it to ``folder`` when the block ends without fault.

    If another process did the job meanwhile (``is_done``), its folder stays; any other ``folder`` makes way.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        workplace = temporary / "new"
        workplace.mkdir()
        yield workplace
        if not is_done():
            if folder.exists():
                _rename(folder, temporary / "old")
            _rename(workplace, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    """Rename a folder; that another process was faster (target there, or source gone) is no fault."""
    try:
        os.rename(source, target)  # noqa: PTH104
    except FileNotFoundError:
        if source.exists():
            raise
    except OSError:
        if not target.is_dir():
            raise
