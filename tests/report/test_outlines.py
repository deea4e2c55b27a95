"""Outlines of masks: rasterised again they are the mask, with the parts and the extent of the mask."""

import numpy as np
import pytest
from pycocotools import mask as rle
from scipy import ndimage

from relvit_d2.report.outlines import outlines, signed_area


def blobs(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A mask of a few smooth parts, often with holes and parts in holes, some at the border."""
    noise = np.random.default_rng(seed).normal(size=(height, width))
    return ndimage.gaussian_filter(noise, 1 + seed % 4) > 0.02


def raster(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    return rle.decode(rle.merge(rle.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *shape))) > 0


@pytest.mark.parametrize("seed", range(8))
def test_the_outlines_enclose_the_mask(seed: int) -> None:
    mask = blobs(seed)
    polygons = outlines(mask)
    assert len(polygons) == ndimage.label(mask)[1] > 1
    areas = [signed_area(polygon) for polygon in polygons]
    assert areas[0] == pytest.approx(max(areas), rel=0.1) and min(areas) > 0
    filled = ndimage.binary_fill_holes(mask, np.ones((3, 3)))  # parts of the mask touch at edges, background at corners
    found = raster(polygons, mask.shape)  # only pixels at the outline differ
    assert not (found & ~ndimage.binary_dilation(filled)).any()
    assert not (ndimage.binary_erosion(filled) & ~found).any()


@pytest.mark.parametrize("seed", range(8))
def test_the_extent_of_the_outlines_is_that_of_the_mask(seed: int) -> None:
    mask = blobs(seed)
    rows, cols = np.nonzero(mask)
    points = np.concatenate(outlines(mask))
    extent = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
    assert (*points.min(0), *points.max(0)) == extent


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (2, 2), (5, 9)])
def test_small_rectangles_have_an_area_and_their_extent(height: int, width: int) -> None:
    mask = np.zeros((12, 20), bool)
    mask[3 : 3 + height, 4 : 4 + width] = True
    (polygon,) = outlines(mask)
    assert len(polygon) >= 3 and signed_area(polygon) > 0
    assert [*polygon.min(0), *polygon.max(0)] == [4, 3, 4 + width, 3 + height]


def test_few_points_remain() -> None:
    y, x = np.mgrid[:200, :200]
    (circle,) = outlines(np.hypot(x - 100, y - 100) < 80)
    assert 8 < len(circle) < 40 and signed_area(circle) == pytest.approx(np.pi * 80**2, rel=0.02)
    (square,) = outlines((abs(x - 100) < 50) & (abs(y - 100) < 50))
    assert len(square) <= 8
    assert outlines(np.zeros((9, 9), bool)) == []
