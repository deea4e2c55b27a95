"""Compositions and rotations of images: boxes, masks and ignore regions follow the pixels of their objects."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import tv_tensors as tv

from relvit_d2.data.detection.composition import COVERED, Sample, copy_paste, erase, mixup, mosaic, rotate
from tests.support.colored_objects import PER_IMAGE, REGION, bare, boxes_of, check, pixels_of, scene

SEEDS = range(12)


def four(seed: int, masks: bool) -> list[Sample]:
    sizes = [(90, 120), (60, 150), (120, 80), (90, 120)]
    return [scene(seed, PER_IMAGE * number, size, masks) for number, size in enumerate(sizes)]


OPERATIONS: dict[str, Callable[[list[Sample]], Sample]] = {
    "mosaic": lambda samples: mosaic(samples, *samples[0].size),
    "copy_paste": lambda samples: copy_paste(samples[0], samples[2]),
    "rotate": lambda samples: rotate(samples[0], 40, [0, 0, 0]),
    "mosaic and copy_paste": lambda samples: copy_paste(mosaic([*samples[:3], samples[2]], 100, 130), samples[3]),
}


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_labels_follow_pixels(name: str, masks: bool) -> None:
    results = set()
    for seed in SEEDS:
        np.random.seed(seed)
        samples = four(seed, masks)
        before = [sample.image.clone() for sample in samples]
        result = OPERATIONS[name](samples)
        check(result, tight=name == "mosaic")  # a box without a mask keeps its size under what is pasted over it
        results.add(str(result.boxes.tolist()))
        assert all(torch.equal(sample.image, image) for sample, image in zip(samples, before, strict=True))
    assert len(results) == len(SEEDS)


def test_objects_that_leave_the_image_are_dropped() -> None:
    lost = 0
    for seed in SEEDS:
        np.random.seed(seed)
        result = mosaic(four(seed, masks=False), 90, 120)
        seen = {number for number in range(REGION) if pixels_of(result.image, number).sum() > 9}
        assert seen <= set(result.classes.tolist())
        lost += 4 * PER_IMAGE - len(result.classes)
    assert lost > 0


@pytest.mark.parametrize("masks", [True, False])
def test_pasted_objects_are_added_and_cover_little(masks: bool) -> None:
    counts = set()
    for seed in SEEDS:
        np.random.seed(seed)
        sample, partner = scene(seed, masks=masks), scene(seed, PER_IMAGE, (100, 90), masks)
        result = copy_paste(sample, partner)
        classes = result.classes.tolist()
        assert classes[:PER_IMAGE] == sample.classes.tolist()
        assert torch.equal(result.regions, sample.regions)
        counts.add(len(classes))
        x0, y0, x1, y1 = partner.boxes[classes[-1] - PER_IMAGE].tolist()  # of the object above all others
        assert pixels_of(result.image, classes[-1]).sum() == (x1 - x0) * (min(y1, 90) - y0)  # the image's height is 90
        for number in range(PER_IMAGE):
            visible, whole = (pixels_of(image, number).sum() for image in (result.image, sample.image))
            assert visible >= (1 - COVERED * (len(classes) - PER_IMAGE)) * whole - 1
    assert len(counts) > 2


def test_copy_paste_without_objects_changes_nothing() -> None:
    sample = scene(0)
    result = copy_paste(sample, bare((50, 40), masks=True))
    assert torch.equal(result.image, sample.image) and torch.equal(result.boxes, sample.boxes)


@pytest.mark.parametrize("size", [(60, 80), (40, 50), (90, 30), (100, 130)])
def test_mixup_is_the_mean_where_images_overlap(size: tuple[int, int]) -> None:
    first = scene(1, size=(60, 80))
    second = bare(size, masks=True)
    everywhere = boxes_of([[0, 0, size[1], size[0]]], size)
    second = Sample(
        tv.Image(torch.full_like(second.image, 255)),
        everywhere,
        torch.tensor([7]),
        tv.Mask(torch.ones(1, *size, dtype=torch.bool)),
        everywhere,
    )
    positions = set()
    for seed in SEEDS:
        np.random.seed(seed)
        result = mixup(first, second)
        assert result.size == first.size and result.classes.tolist() == [*first.classes.tolist(), 7]
        mask = result.masks[-1]  # type: ignore[index]
        assert mask.sum() == min(size[0], 60) * min(size[1], 80)
        mean = ((first.image.int() + 256) // 2).to(torch.uint8)
        assert torch.equal(result.image, torch.where(mask, mean, first.image))
        x0, y0, x1, y1 = result.boxes[-1].int().tolist()
        assert mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)
        assert torch.equal(result.boxes[:-1], first.boxes)
        assert torch.equal(result.masks[:-1], first.masks)  # type: ignore[index,arg-type]
        assert result.regions.tolist() == [*first.regions.tolist(), result.boxes[-1].tolist()]
        positions.add((x0, y0))
    assert len(positions) > 1 or size == (60, 80) or size == (100, 130)


def test_a_rotation_by_no_angle_changes_nothing() -> None:
    sample = scene(3)
    result = rotate(sample, 0, [0, 0, 0])
    assert torch.equal(result.image, sample.image) and torch.equal(result.masks, sample.masks)  # type: ignore[arg-type]
    assert torch.equal(result.boxes, sample.boxes) and torch.equal(result.regions, sample.regions)


def test_the_outside_of_a_rotated_image_has_the_given_value() -> None:
    np.random.seed(0)
    sample = bare((60, 60), masks=False)
    result = rotate(replace(sample, image=tv.Image(sample.image + 200)), 45, [1, 2, 3])
    assert result.image[:, 0, 0].tolist() == [1, 2, 3] and result.image[:, 30, 30].tolist() == [200] * 3


def test_erased_objects_are_dropped_and_others_unchanged() -> None:
    erased = kept = 0
    for seed in range(60):
        np.random.seed(seed)
        sample = scene(seed)
        result = erase(sample, [7, 7, 7])
        classes = result.classes.tolist()
        assert classes == [number for number in range(PER_IMAGE) if pixels_of(result.image, number).any()]
        assert torch.equal(result.boxes, sample.boxes[classes])
        assert torch.equal(result.masks, sample.masks[classes])  # type: ignore[index,arg-type]
        hole = (result.image == 7).all(0)
        assert torch.equal(result.image[:, ~hole], sample.image[:, ~hole])
        rows, columns = (hole.any(dim).nonzero() for dim in (1, 0))
        assert hole.sum() == len(rows) * len(columns)
        assert 0.015 < hole.float().mean() < 0.34
        erased, kept = erased + PER_IMAGE - len(classes), kept + len(classes)
    assert erased > 0 and kept > 0


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 300), (400, 2)])
def test_tiny_and_empty_images(size: tuple[int, int], masks: bool) -> None:
    for seed in range(4):
        np.random.seed(seed)
        samples = [bare(size, masks), bare((3, 200), masks), scene(seed, masks=masks), bare(size, masks)]
        for result in (
            mosaic(samples, *size),
            copy_paste(samples[0], samples[2]),
            mixup(samples[0], samples[2]),
            rotate(samples[0], 30, [0, 0, 0]),
            erase(samples[0], [0, 0, 0]),
        ):
            assert result.size == size and len(result.boxes) == len(result.classes)
            assert result.masks is None or result.masks.shape == (len(result.classes), *size)
        check(mosaic(samples, 50, 60), tight=False)
