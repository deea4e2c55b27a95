"""Fingerprints of images, groups of equal and nearly equal ones, and the splits that keep them together."""

import io
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relvit_d2.data.classification import division
from relvit_d2.data.classification.division import split
from relvit_d2.data.classification.image_folder import LabelledImages, read_tree
from relvit_d2.data.detection import splits
from relvit_d2.data.detection.splits import divide
from relvit_d2.data.images import similarity
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.data.images.folder import list_images
from relvit_d2.data.images.similarity import (
    NEAR,
    Fingerprint,
    difference_hash,
    fingerprint,
    fingerprint_file,
    fingerprints,
    groups_of,
)
from relvit_d2.utils.errors import UserError

SEEDS = st.integers(0, 2**32)


def photo(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def some_prints(seed: int, count: int) -> list[Fingerprint]:
    """Random fingerprints, many of them copies, a few bits away, constant, or in a chain."""
    draw = random.Random(seed)
    prints: list[Fingerprint] = []
    for number in range(count):
        exact, near = number.to_bytes(16, "big"), draw.getrandbits(128)
        if prints and draw.random() < 0.5:
            other = draw.choice(prints)
            exact = other.exact if draw.random() < 0.3 else exact
            for bit in draw.sample(range(128), draw.randint(0, NEAR + 2)):
                near = (other.near or near) ^ (1 << bit)
        prints.append(Fingerprint(exact, None if draw.random() < 0.1 else near))
    return prints


def slow_groups(prints: Sequence[Fingerprint], near: bool) -> set[frozenset[int]]:
    """Compare all pairs and merge sets until nothing changes."""
    groups = [{place} for place in range(len(prints))]
    for first, one in enumerate(prints):
        for second, other in enumerate(prints[:first]):
            close = near and one.near is not None and other.near is not None
            if one.exact == other.exact or (close and bin((one.near or 0) ^ (other.near or 0)).count("1") <= NEAR):
                both = [group for group in groups if first in group or second in group]
                groups = [group for group in groups if group not in both] + [set().union(*both)]
    return set(map(frozenset, groups))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.booleans(), st.sampled_from([3, 2**20]))
def test_groups_equal_comparison_of_all_pairs(seed: int, near: bool, block: int) -> None:
    prints = some_prints(seed, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "BLOCK", block)
        assert set(map(frozenset, groups_of(prints, near))) == slow_groups(prints, near)
    assert groups_of([]) == []


def test_hash_compares_neighboring_means() -> None:
    """Oracle without Pillow: cell means of an image whose size is a multiple of the grid."""
    pixels = np.random.default_rng(0).integers(0, 256, (72, 72, 1), dtype=np.uint8)
    steps = []
    for rows, columns in ((8, 9), (9, 8)):
        means = pixels[..., 0].reshape(rows, 72 // rows, columns, 72 // columns).mean((1, 3))
        steps.append(np.diff(means, axis=1 if columns == 9 else 0).ravel())
    step = np.concatenate(steps)
    found = difference_hash(pixels)
    assert found is not None
    bits = np.array([int(bit) for bit in f"{found:0128b}"])
    clear = abs(step) > 2  # Pillow rounds the means, twice
    assert clear.sum() > 100 and (bits[clear] == (step[clear] > 0)).all()


def test_copies_are_nearly_equal_and_others_are_not(samples: Path) -> None:
    originals = [Image.open(path).convert("RGB") for path in list_images(samples / "coco")]
    hashes = [difference_hash(np.asarray(image)) for image in originals]
    for image, first in zip(originals, hashes, strict=True):
        for size, quality in ((image.size, 50), ((image.width // 2, image.height // 2), 80)):
            content = io.BytesIO()
            image.resize(size).save(content, "JPEG", quality=quality)
            again = difference_hash(np.asarray(Image.open(content)))
            assert first is not None and again is not None and bin(first ^ again).count("1") <= NEAR
    assert len(groups_of([fingerprint(np.asarray(image)) for image in originals])) == len(originals)


def test_images_without_a_hash_are_never_nearly_equal(tmp_path: Path) -> None:
    """Constant, tiny and unreadable images are not grouped."""
    for shade in range(4):
        for copy in ("a", "b"):
            Image.new("RGB", (64, 48), (shade, 0, 0)).save(tmp_path / f"constant {shade} {copy}.png")
            photo(shade, (8, 8)).save(tmp_path / f"tiny {shade} {copy}.png")
            (tmp_path / f"damaged {shade} {copy}.png").write_bytes(b"\x89PNG" + bytes([shade]))
    Image.new("RGB", (48, 64)).save(tmp_path / "constant on end.png")
    files = list_images(tmp_path)
    prints = [fingerprint_file(file) for file in files]
    assert all(one.near is None for one in prints)
    groups = {frozenset(files[place].stem[:-2] for place in group) for group in groups_of(prints)}
    assert sorted(map(len, groups_of(prints))) == [1] + [2] * 12 and all(len(group) == 1 for group in groups)


def test_fingerprint_is_independent_of_lossless_format_depth_and_orientation(tmp_path: Path) -> None:
    image = photo(1)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c.png", exif=exif)
    one, *others = (fingerprint_file(path) for path in list_images(tmp_path))
    assert all(other == one for other in others)
    gray = np.asarray(image.convert("L"))
    deep = gray.astype(np.uint16) * 257
    np.save(tmp_path / "d.npy", deep)
    five = np.repeat(gray[..., None], 5, axis=2)
    np.save(tmp_path / "e.npy", five)
    near = [fingerprint_file(tmp_path / name).near for name in ("d.npy", "e.npy")]
    assert all(x is not None and bin(x ^ (one.near or 0)).count("1") <= NEAR for x in near)


def test_cache_is_updated_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        photo(number).save(folder / f"{number}.png")
    files = list_images(folder)
    read: list[Path] = []

    def counted(file: Path) -> Fingerprint:
        read.append(file)
        return fingerprint_file(file)

    monkeypatch.setattr(similarity, "fingerprint_file", counted)
    first = fingerprints(files)
    assert fingerprints(files[::-1]) == first[::-1] and sorted(read) == files
    photo(9).save(files[1])
    second = fingerprints(files)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True] and read[3:] == [files[1]]
    (path,) = (tmp_path / "cache/relvit_d2/fingerprints").iterdir()
    for damaged in ("", "[]", '{"version": 1, "files": {"a": 3}}', path.read_text()[:90]):
        path.write_text(damaged)
        assert fingerprints(files) == second


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 60))
def test_division_depends_only_on_pixels_and_keeps_groups_together(seed: int, count: int) -> None:
    prints = some_prints(seed, count)
    places = list(range(count))
    val = set(divide(places, "val", prints, "x"))
    assert set(divide(places, "train", prints, "x")) == set(places) - val
    order = random.Random(seed).sample(places, count)
    assert set(divide(order, "val", [prints[place] for place in order], "x")) == val
    for group in slow_groups(prints, near=False):
        assert group <= val or not group & val
    wanted = max(1, count // 5) if count > 1 else 0
    largest = max(map(len, groups_of(prints)), default=0)
    if largest <= wanted:  # then the exact count is possible
        assert wanted / 2 <= len(val) <= 2 * wanted
        assert all(group <= val or not group & val for group in slow_groups(prints, near=True))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(100, 200))
def test_small_groups_are_kept_together_at_the_exact_fraction(seed: int, groups: int) -> None:
    """Of groups of one to three nearly equal images, one image in five is held out, at most two fewer."""
    draw = random.Random(seed)
    prints: list[Fingerprint] = []
    group_of: list[int] = []
    for group in range(groups):
        near = draw.getrandbits(128)
        for copy in range(draw.randint(1, 3)):
            bits = sum(1 << bit for bit in draw.sample(range(128), 3 * (copy > 0)))
            prints.append(Fingerprint(len(prints).to_bytes(16, "big"), near ^ bits))
            group_of.append(group)
    val = set(divide(range(len(prints)), "val", prints, "x"))
    held = {group_of[place] for place in val}
    assert val == {place for place, group in enumerate(group_of) if group in held}
    assert len(prints) // 5 - 2 <= len(val) <= len(prints) // 5


def test_an_added_image_moves_few_others() -> None:
    prints = [Fingerprint(number.to_bytes(16, "big"), None) for number in range(201)]
    places = list(range(201))
    before = set(divide(places[:200], "val", prints[:200], "x"))
    assert len(before) == 40 and len(before ^ set(divide(places, "val", prints, "x"))) <= 2


def test_frames_of_one_video_are_divided_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    splits.warn_once.cache_clear()
    prints = [Fingerprint(number.to_bytes(16, "big"), 2**70 + 2**number) for number in range(50)]
    assert len(divide(prints, "val", prints, "'film'")) == 10
    assert "50 of the 50 images of 'film' are nearly equal" in caplog.text
    same = [prints[0]] * 3
    assert divide(same, "val", same, "'still'") == []
    assert "3 of the 3 images of 'still' are equal: 0 images are held out instead of 1" in caplog.text


def test_class_split_keeps_copies_together() -> None:
    labels = torch.arange(100) % 4
    pixels = np.stack([np.asarray(photo(number // 2, (16, 16))) for number in range(100)])
    pixels[1::2] ^= 1  # nearly equal to the one before
    stack = ImageStack(torch.from_numpy(pixels).permute(0, 3, 1, 2), "x")
    train, held = split(LabelledImages("x", stack, labels, tuple("abcd")), 0.2, seed=0)
    assert len(held) == 20 and len(train) == 80
    seen = {(image >> 1).numpy().tobytes() for image in train.images}
    assert not any((image >> 1).numpy().tobytes() in seen for image in held.images)
    assert (held.labels.bincount(minlength=4) >= 2).all()


def tree(root: Path, seeds: Sequence[int]) -> LabelledImages:
    """Two classes of photos in files."""
    for number, seed in enumerate(seeds):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed, (16, 16)).save(path)
    return read_tree(root)


def pictures(data: LabelledImages) -> list[object]:
    images = data.images
    return [image.numpy().tobytes() for image in images] if isinstance(images, ImageStack) else list(images)


@pytest.mark.parametrize("decoded", [False, True])
def test_only_equal_images_cannot_be_split(tmp_path: Path, decoded: bool) -> None:
    data = tree(tmp_path / "same", [0] * 20)
    with pytest.raises(
        UserError, match=r"VALIDATION 10\.000% holds out 0 of the 20 images .*, because duplicates stay"
    ):
        split(data.decoded() if decoded else data, 0.1, seed=0)


@pytest.mark.parametrize("decoded", [False, True])
def test_split_is_cached_until_its_inputs_change(
    tmp_path: Path, decoded: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    splits.warn_once.cache_clear()
    made = 0

    def counted(*args: Any) -> tuple[set[int], str]:
        nonlocal made
        made += 1
        return splits.hold_out(*args)

    monkeypatch.setattr(division, "hold_out", counted)

    def parts(seeds: Sequence[int], share: float = 0.2, seed: int = 0) -> list[list[object]]:
        data = tree(tmp_path / "images", seeds) if len(seeds) else read_tree(tmp_path / "images")
        return [pictures(part) for part in split(data.decoded() if decoded else data, share, seed)]

    first = parts([number // 2 for number in range(40)])
    assert len(first[1]) == 8 and made == 1
    assert parts(()) == first and made == 1
    assert len(parts((), 0.4)[1]) == 16 and made == 2
    assert parts((), seed=1) != first and made == 3
    (tmp_path / "cache/relvit_d2/held_out").rename(tmp_path / "held_out")
    assert parts(()) == first and made == 4
    (path,) = (tmp_path / "cache/relvit_d2/held_out").iterdir()
    for number, damaged in enumerate(("", "[]", "3", '[["a"], ""]', path.read_text()[:9])):
        path.write_text(damaged)
        assert parts(()) == first and made == 5 + number
    parts([7] * 39 + [8])
    assert made == 10 and "are equal: 1 images are held out instead of 8" in caplog.text
    splits.warn_once.cache_clear()
    caplog.clear()
    parts(())
    assert made == 10 and "are equal: 1 images" in caplog.text  # at every start


def test_images_of_a_large_set_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(division, "MAX_COMPARED", 19)
    data = tree(tmp_path / "images", range(20))
    for file in data.images:
        assert isinstance(file, Path)
        file.write_bytes(b"")
    with caplog.at_level(logging.INFO):
        train, held = split(data, 0.2, seed=0)
    assert held.labels.bincount().tolist() == [2, 2] and len(train) == 16
    assert "has more than 19 images, which are not compared" in caplog.text
    assert not set(train.images) & set(held.images)
