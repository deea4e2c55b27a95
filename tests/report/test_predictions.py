"""The contact sheet of truth beside detections, looked at pixel by pixel."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from relvit_d2.report.predictions import (
    Color,
    DetectionRow,
    _contrast,
    _face,
    _file_with,
    _overlap,
    _place_label,
    annotated,
    class_color,
    draw_detections,
    escaped,
    legible,
)

GREY = (128, 128, 128)
DIGITS = [str(digit) for digit in range(10)]


def grey_row(
    height: int,
    width: int,
    truth: Sequence[tuple[Sequence[float], int]],
    found: Sequence[tuple[Sequence[float], int, float]],
) -> DetectionRow:
    return DetectionRow(
        np.full((height, width, 3), 128, np.uint8),
        np.array([box for box, _ in truth]).reshape(-1, 4),
        np.array([label for _, label in truth], dtype=int),
        np.array([box for box, _, _ in found]).reshape(-1, 4),
        np.array([label for _, label, _ in found], dtype=int),
        np.array([score for *_, score in found]),
    )


def sheet_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.verify()
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def grey_panel(half: np.ndarray) -> tuple[int, int, int, int]:
    """Where the grey image lies in one half of a sheet of one pair: x0, y0, x1, y1, ends excluded."""
    ys, xs = np.nonzero((half == GREY).all(axis=-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def where_color(half: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    ys, xs = np.nonzero((half == class_color(index)).all(axis=-1))
    return xs, ys


def halves(sheet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = sheet.shape[1] // 2
    return sheet[:, :middle], sheet[:, middle:]


def test_boxes_lie_where_they_should_in_the_colour_of_their_class(tmp_path: Path) -> None:
    truth_box, found_box = [16, 24, 32, 48], [20, 20, 40, 44]
    row = grey_row(64, 64, [(truth_box, 3)], [(found_box, 8, 0.5)])
    draw_detections([row], DIGITS, tmp_path / "sheet.png")
    for half, box, index, other in zip(
        halves(sheet_of(tmp_path / "sheet.png")), (truth_box, found_box), (3, 8), (8, 3), strict=True
    ):
        left, top, right, bottom = grey_panel(half)
        assert (right - left, bottom - top) == (256, 256)  # 64 pixels drawn four times as large
        x0, y0, x1, y1 = (4 * v for v in box)
        for x, y in ((x0, (y0 + y1) // 2), (x1, (y0 + y1) // 2), ((x0 + x1) // 2, y1)):
            assert tuple(half[top + y, left + x]) == class_color(index)
        assert tuple(half[top + (y0 + y1) // 2, left + (x0 + x1) // 2]) == GREY
        xs, ys = where_color(half, index)
        assert xs.min() >= left + x0 - 1 and ys.max() == top + y1  # the label is above the box, nothing is below
        assert ys.min() < top + y0 - 10
        assert len(where_color(half, other)[0]) == 0


def test_no_detections_leave_the_image_bare(tmp_path: Path) -> None:
    draw_detections([grey_row(64, 64, [([8, 8, 30, 30], 1)], [])], DIGITS, tmp_path / "sheet.png")
    truth, found = halves(sheet_of(tmp_path / "sheet.png"))
    left, top, right, bottom = grey_panel(found)
    assert (found[top:bottom, left:right] == 128).all()
    assert len(where_color(truth, 1)[0]) > 0


@pytest.mark.parametrize("box", [[0, 0, 1, 1], [63, 63, 64, 64], [30, 30, 30, 30], [-9, -9, 99, 99]])
def test_the_smallest_and_the_greatest_boxes_are_drawn_inside_the_image(tmp_path: Path, box: list[int]) -> None:
    draw_detections([grey_row(64, 64, [], [(box, 0, 1.0)])], DIGITS, tmp_path / "sheet.png")
    draw_detections([grey_row(64, 64, [], [])], DIGITS, tmp_path / "bare.png")
    found, bare = (halves(sheet_of(tmp_path / name))[1] for name in ("sheet.png", "bare.png"))
    left, top, right, bottom = grey_panel(bare)
    changed = (found != bare).any(axis=-1)
    changed[:top] = changed[bottom:] = False  # labels may stand above and below the image
    _, xs = np.nonzero(changed)
    assert xs.min() >= left - 1 and xs.max() < right + 1  # the rim of a box at the edge is one pixel wide
    x, y = (min(max(4 * edge, 0), 255) for edge in box[:2])
    assert tuple(found[top + y, left + x]) == class_color(0)


@pytest.mark.parametrize(
    ("height", "width", "panel"),
    [(64, 64, (256, 256)), (500, 375, (192, 256)), (375, 500, (341, 256)), (375, 1242, (448, 135))],
)
def test_every_shape_of_image_fits_its_panel(tmp_path: Path, height: int, width: int, panel: tuple[int, int]) -> None:
    row = grey_row(height, width, [], [])
    draw_detections([row], DIGITS, tmp_path / "sheet.png")
    for half in halves(sheet_of(tmp_path / "sheet.png")):
        left, top, right, bottom = grey_panel(half)
        assert (right - left, bottom - top) == panel


@pytest.mark.parametrize(("count", "side", "width"), [(1, (64, 64), 554), (12, (64, 64), 1670)])
def test_width_of_the_sheet(tmp_path: Path, count: int, side: tuple[int, int], width: int) -> None:
    # A pair is two panels of 256 with 10 between them; pairs stand 36 apart within a border of 16;
    # three pairs take 3 * 522 + 2 * 36 + 2 * 16 = 1670.
    draw_detections([grey_row(*side, [], [])] * count, DIGITS, tmp_path / "sheet.png")
    assert sheet_of(tmp_path / "sheet.png").shape[1] == width


def test_twenty_one_classes_and_mixed_shapes(tmp_path: Path) -> None:
    names = [f"class{index}" for index in range(21)]
    rows = [
        grey_row(
            *shape,
            [([5 * i, 10, 5 * i + 4, 60], i) for i in range(21)],
            [([5 * i, 30, 5 * i + 4, 80], i, 0.5) for i in range(21)],
        )
        for shape in ((200, 120), (120, 200), (300, 300))
    ]
    draw_detections(rows, names, tmp_path / "sheet.png", title="many classes")
    sheet = sheet_of(tmp_path / "sheet.png")
    assert all(len(where_color(sheet, index)[0]) > 0 for index in range(21))


def test_equal_arguments_give_equal_files_and_nothing_else(tmp_path: Path) -> None:
    row = grey_row(48, 64, [([1, 2, 30, 40], 4)], [([3, 2, 30, 38], 4, 0.987)])
    for name in ("a.png", "b.png"):
        draw_detections([row, row], DIGITS, tmp_path / name, title="twice")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_score_is_written(tmp_path: Path) -> None:
    for name, score in (("a.png", 0.12), ("b.png", 0.98), ("c.png", 0.981)):
        draw_detections([grey_row(64, 64, [], [([20, 20, 40, 40], 4, score)])], DIGITS, tmp_path / name, title="t")
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a != b
    assert b == c  # two decimals


def test_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_detections([], DIGITS, tmp_path / "sheet.png")


def test_labels_of_neighbouring_digits_do_not_cover_each_other() -> None:
    cell = (0.0, 0.0, 256.0, 300.0)
    boxes = [(20.0 + 42 * i, 100.0, 60.0 + 42 * i, 170.0) for i in range(5)]
    assert all(a[2] < b[0] for a, b in pairwise(boxes))
    labels: list[tuple[float, float, float, float]] = []
    for box in boxes:
        labels.append(_place_label(box, 58, 18, cell, boxes, labels))
    assert all(_overlap(a, b) == 0 for a, b in combinations(labels, 2))
    assert all(_overlap(label, box) == 0 for label in labels for box in boxes)
    assert all(_overlap(label, cell) == pytest.approx(58 * 18) for label in labels)


def luminance(color: Color) -> float:
    """Relative luminance of WCAG 2.1."""
    parts = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_class_colours_are_distinct_and_legible_under_their_text() -> None:
    colors = [class_color(index) for index in range(21)]
    assert len(set(colors)) == 21
    assert class_color(21) == class_color(0)
    for first, second in combinations(colors[:10], 2):  # the ten digits
        assert np.abs(np.subtract(first, second)).max() >= 48
    for color in colors:
        dark, light = sorted((luminance(color), luminance(_contrast(color))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG's level AA


def test_names_that_no_font_can_show_become_numbers() -> None:
    nowhere = "\u0378"  # an unassigned character
    assert legible(["Käfer", nowhere, "Жук"]) == ["Käfer", "1", "Жук"]
    assert escaped(f"a{nowhere}.png") == "a\\u0378.png"
    image, box = np.full((60, 80, 3), 128, np.uint8), np.array([[10.0, 30, 50, 50]])
    drawn = [annotated(image, box, np.array([1]), np.array([0.5]), ["a", name]) for name in (nowhere, "1")]
    assert (np.asarray(drawn[0]) == np.asarray(drawn[1])).all()


def test_labels_of_one_class_share_a_font_whatever_their_scores() -> None:
    image, box = np.full((60, 80, 3), 128, np.uint8), np.array([[10.0, 30, 50, 50]])
    annotated(image, box, np.array([0]), np.array([0.5]), ["kept"])
    searched, opened = _file_with.cache_info().misses, _face.cache_info().misses
    for score in np.linspace(0, 1, 30):
        annotated(image, box, np.array([0]), np.array([score]), ["kept"])
    assert (_file_with.cache_info().misses, _face.cache_info().misses) == (searched, opened)


def test_letters_are_taken_from_an_installed_font(tmp_path: Path) -> None:
    """A font with one Chinese letter, a full square, put where a user's fonts are."""
    pen = TTGlyphPen(None)
    for step, point in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    letters = {ord(letter): "square" for letter in "猫 0123456789.\u00d7*+!?"}
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap(letters)
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    (tmp_path / "fonts").mkdir()
    builder.save(tmp_path / "fonts/Squares.ttf")
    code = (
        "from relvit_d2.report.predictions import font, font_of, legible\n"
        "print(legible(['猫', '\u0378']) == ['猫', '1'], font_of('Käfer').endswith('DejaVuSans.ttf'))\n"
        "print(font(10, '猫').getbbox('猫')[2] > 0)"
    )
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path), "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3
