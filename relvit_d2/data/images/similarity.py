"""Fingerprints of images, to find equal and nearly equal ones independent of their names and formats.

Two images are equal if their pixels are. They are nearly equal if their difference hashes differ in at most ``NEAR`` of
128 bits, such as a photo saved in another size or quality, or successive frames of a video.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from relvit_d2.data.images.archive import ImageFile, Member
from relvit_d2.data.images.decode import PixelFormat, channels_and_max_value
from relvit_d2.data.images.file_cache import read_changed
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hardware import cores

VERSION = 1  # of the fingerprints; cached ones of another version are not used

LONGEST = 512
"""Maximum of the longer side in pixels; larger images are reduced first. A JPEG of more than twice that is decoded at a
reduced size, which is several times as fast."""

NEAR = 7
"""Maximum number of different bits in hashes of nearly equal images. Of copies of 80 VOC photos in another quality or
half the size, 99 % differ in at most 7 bits; any two of the photos differ in at least 37."""

MAX_COMPARED = 200_000  # maximum number of images that are decoded to find duplicates, which takes minutes
GRID = 8  # rows and columns of the hash
MIN_BITS = 4  # minimum number of zeros and of ones in a hash that distinguishes images
BLOCK = 2**20  # pairs of hashes that are compared at once


class Fingerprint(NamedTuple):
    """Fingerprint of an image.

    Attributes:
        exact: 16 bytes, the digest of the pixels, after reduction to ``LONGEST``.
        near: the difference hash of 128 bits, or None for a constant image, one with a side below 9 pixels, or one with
            hardly any edges; such an image can be equal to others, but not nearly equal.
    """

    exact: bytes
    near: int | None


def pixel_digest(pixels: np.ndarray) -> bytes:
    """Return 16 bytes that depend on the size and the values of ``pixels``, ``(H, W, C)`` uint8."""
    digest = hashlib.blake2b(f"{pixels.shape[1]}x{pixels.shape[0]}:".encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.digest()


def difference_hash(pixels: np.ndarray) -> int | None:
    """Return the difference hash of an image, 128 bits, or None if it would not distinguish images.

    The image is averaged to 8 rows of 9 gray values; a bit is 1 where a value exceeds its left neighbor. 64 more bits
    compare 9 rows of 8 values with the row above (N. Krawetz, "Kind of Like That", 2013; both directions as in B.
    Hoyt's dhash). ``pixels`` are ``(H, W, C)`` uint8.
    """
    if min(pixels.shape[:2]) <= GRID:
        return None
    if pixels.shape[2] in (1, 3):
        gray = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("L")
    else:
        gray = Image.fromarray(pixels.mean(2).astype(np.uint8))
    rows = np.asarray(gray.resize((GRID + 1, GRID), Image.Resampling.BOX))
    columns = np.asarray(gray.resize((GRID, GRID + 1), Image.Resampling.BOX))
    bits = np.concatenate([(rows[:, 1:] > rows[:, :-1]).ravel(), (columns[1:] > columns[:-1]).ravel()])
    if not MIN_BITS <= int(bits.sum()) <= bits.size - MIN_BITS:
        return None
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def fingerprint(pixels: np.ndarray) -> Fingerprint:
    """Return the fingerprint of decoded pixels, ``(H, W, C)`` uint8, not larger than ``LONGEST``."""
    return Fingerprint(pixel_digest(pixels), difference_hash(pixels))


def fingerprint_file(image: ImageFile | str) -> Fingerprint:
    """Return the fingerprint of an image file.

    Grayscale images are treated as RGB with equal channels, and images of more than 8 bits are scaled by their maximum.
    A file that cannot be decoded is only equal to files with the same bytes.
    """
    try:
        channels, max_value = channels_and_max_value(image)
        return fingerprint(PixelFormat(3 if channels in (1, 3) else channels, max_value).read(image, LONGEST))
    except UserError:
        try:
            content = image.open().read() if isinstance(image, Member) else Path(image).read_bytes()
        except OSError:
            content = str(image).encode(errors="surrogateescape")
        return Fingerprint(hashlib.blake2b(content, digest_size=16).digest(), None)


def fingerprints(images: Sequence[ImageFile]) -> list[Fingerprint]:
    """Return the fingerprints of image files, decoding only those that have changed since an earlier call."""

    def read(image: ImageFile) -> list[Any]:
        found = fingerprint_file(image)
        return [found.exact.hex(), found.near]

    found = read_changed("fingerprints", VERSION, images, read, cores(), "decoded once to find equal ones")
    return [Fingerprint(bytes.fromhex(exact), near) for exact, near in found]


def groups_of(prints: Sequence[Fingerprint], near: bool = True) -> list[list[int]]:
    """Return the indices of all images in groups of equal images, with ``near`` of nearly equal ones too.

    Groups are the connected components of the relation. Hashes that differ in at most ``NEAR`` bits agree in at least
    one of their ``NEAR + 1`` bands of 16 bits, so only hashes with a common band are compared.
    """
    parents = list(range(len(prints)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(first: int, second: int) -> None:
        first, second = sorted((root(first), root(second)))
        parents[second] = first

    firsts: dict[bytes | int, int] = {}
    for index, one in enumerate(prints):
        join(firsts.setdefault(one.exact, index), index)
        if near and one.near is not None:
            join(firsts.setdefault(one.near, index), index)
    distinct = [(key, index) for key, index in firsts.items() if isinstance(key, int)]
    hashes = np.frombuffer(b"".join(key.to_bytes(16, "big") for key, _ in distinct), np.uint64).reshape(-1, 2)
    for band in hashes.view(np.uint16).T:
        order = band.argsort(kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            if len(rows) < 2:
                continue
            left, right = hashes[rows].T
            labels = np.array([root(distinct[row][1]) for row in rows])
            step = max(1, BLOCK // len(rows))
            for start in range(0, len(rows), step):
                if (labels == labels[0]).all():
                    break
                part = slice(start, start + step)
                differ = np.bitwise_count(left[part, None] ^ left) + np.bitwise_count(right[part, None] ^ right)
                joins = (differ <= NEAR) & (labels[part, None] != labels)
                for first, second in np.argwhere(joins) + (start, 0):
                    if labels[first] != labels[second]:
                        join(labels[first], labels[second])
                        labels[labels == labels[second]] = labels[first]
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(len(prints)):
        groups[root(index)].append(index)
    return list(groups.values())
