"""Fingerprints of an encoder's training images, by which test images among them are found.

They are stored as one JSON value, with about 43 bytes per image, under ``KEY`` in the metadata of
``encoder.safetensors`` and of checkpoints.
"""

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.utils import comm

from relvit_d2.data.images.batches import Images, ImageStack, take
from relvit_d2.data.images.similarity import MAX_COMPARED, NEAR, VERSION, Fingerprint, fingerprint, fingerprints
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.processes import first_process_first

KEY = "seen_images"
SEEN = "seen_in_pretraining"  # key of a SeenCount in the results on a test set

logger = logging.getLogger(__name__)


class SeenCount(NamedTuple):
    """Number of images of a data set on which, or on near-duplicates of which, an encoder was trained, and of all."""

    seen: int
    images: int


def fingerprints_of(images: Images) -> list[Fingerprint]:
    """Return the fingerprints of images; those of files are cached."""
    if isinstance(images, ImageStack):
        return [fingerprint(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in images]
    return fingerprints(images)


@dataclass(frozen=True)
class SeenImages:
    """Fingerprints of the training images of an encoder.

    Attributes:
        exact: ``(n, 16)`` uint8, distinct digests of the pixels.
        near: ``(m, 2)`` uint64, distinct difference hashes.
    """

    exact: np.ndarray
    near: np.ndarray

    @classmethod
    def of(cls, prints: Iterable[Fingerprint]) -> "SeenImages":
        """Build the object from the fingerprints of single images."""
        prints = list(prints)
        exact = np.frombuffer(b"".join({one.exact: None for one in prints}), np.uint8).reshape(-1, 16)
        return cls(exact, _hashes([near for near in {one.near: None for one in prints} if near is not None]))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> "SeenImages | None":
        """Return the fingerprints in the metadata of an encoder file or a checkpoint; None if there are none.

        Raises:
            UserError: the fingerprints are damaged.
        """
        value = metadata.get(KEY)
        if value is None or (isinstance(value, dict) and value.get("version") != VERSION):
            return None
        try:
            exact, near = (base64.b64decode(value[key], validate=True) for key in ("exact", "near"))
            return cls(np.frombuffer(exact, np.uint8).reshape(-1, 16), np.frombuffer(near, "<u8").reshape(-1, 2))
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"the fingerprints of training images in the weights are damaged ({error}): create the file again"
            ) from error

    def metadata(self) -> dict[str, Any]:
        """Return the fingerprints as a JSON value under ``KEY``."""
        parts = {"exact": self.exact, "near": self.near.astype("<u8")}
        return {KEY: {"version": VERSION} | {key: base64.b64encode(x.tobytes()).decode() for key, x in parts.items()}}

    def __or__(self, other: "SeenImages | None") -> "SeenImages":
        """Return the union."""
        if other is None:
            return self
        return SeenImages(*(np.unique(np.concatenate(pair), axis=0) for pair in zip(self, other, strict=True)))

    def __iter__(self) -> Any:
        return iter((self.exact, self.near))

    def indices(self, prints: Sequence[Fingerprint]) -> list[int]:
        """Return the indices of the images that are duplicates or near-duplicates of training images, ascending.

        As in :func:`relvit_d2.data.images.similarity.groups_of`, only hashes that share a band of 16 bits are compared.
        """
        known = set(map(bytes, self.exact))
        found = {index for index, one in enumerate(prints) if one.exact in known}
        rest = [(index, one.near) for index, one in enumerate(prints) if index not in found and one.near is not None]
        hashes = _hashes([near for _, near in rest])
        for band, seen in zip(hashes.view(np.uint16).T, self.near.view(np.uint16).T, strict=True):
            order = seen.argsort(kind="stable")
            starts = np.searchsorted(seen, band, "left", sorter=order)
            ends = np.searchsorted(seen, band, "right", sorter=order)
            for row in np.flatnonzero(starts < ends):
                candidates = self.near[order[starts[row] : ends[row]]]
                if (np.bitwise_count(candidates ^ hashes[row]).sum(1) <= NEAR).any():
                    found.add(rest[row][0])
        return sorted(found)


def _hashes(values: Sequence[int]) -> np.ndarray:
    return np.frombuffer(b"".join(value.to_bytes(16, "little") for value in values), "<u8").reshape(-1, 2)


def exclude_images(files: Images, name: str, excluded: Images, excluded_name: str, keys: str) -> Images:
    """Return the training images without duplicates and near-duplicates of excluded images, whose number is logged.

    Args:
        files: training images.
        name: name of their data set.
        excluded: images to keep out of training.
        excluded_name: name of their data set.
        keys: the config keys to change if no image remains.

    Raises:
        UserError: no image remains.
    """
    found = None
    with first_process_first() as is_first:
        if is_first:
            seen = SeenImages.of(fingerprints_of(excluded))
            found = seen.indices(fingerprints_of(files))
    removed = torch.tensor(comm.all_gather(found)[0], dtype=torch.int64)
    remaining = torch.ones(len(files), dtype=torch.bool)
    remaining[removed] = False
    logger.info(
        f"{len(removed)} of {len(files)} images of {name} are left out: duplicates or near-duplicates of images of "
        f"{excluded_name}"
    )
    if not remaining.any():
        raise UserError(
            f"every image of {name} is a duplicate or near-duplicate of one of {excluded_name}: set another {keys}"
        )
    return take(files, remaining.nonzero()[:, 0])


def training_metadata(sets: Mapping[str, Images], before: SeenImages | None = None) -> dict[str, Any]:
    """Return the fingerprints of the training images, and those of earlier training, as metadata.

    Empty for more than ``MAX_COMPARED`` images, which would take hours to decode.
    """
    count = sum(map(len, sets.values()))
    if count > MAX_COMPARED:
        logger.warning(
            f"the encoder is written without fingerprints of its training images, which are more than {MAX_COMPARED:,} "
            f"({count:,}): evaluations cannot report test images among them"
        )
        return {}
    seen = SeenImages.of(one for images in sets.values() for one in fingerprints_of(images))
    return (seen | before).metadata()


def seen_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the metadata of weights that has the fingerprints of training images."""
    return {KEY: metadata[KEY]} if KEY in metadata else {}


def count_seen(metadata: Mapping[str, Any], sets: Mapping[str, Images]) -> dict[str, SeenCount]:
    """Count and log the images of each data set on which weights were trained; empty without fingerprints in them."""
    counts: dict[str, SeenCount] = {}
    seen = SeenImages.of_metadata(metadata)
    if seen is None:
        if metadata:
            logger.info("the weights have no fingerprints of their training images: test images may be among them")
        return counts
    for name, images in sets.items():
        counts[name] = count = SeenCount(len(seen.indices(fingerprints_of(images))), len(images))
        log = logger.warning if count.seen else logger.info
        log(seen_sentence(name, *count))
    return counts


def seen_sentence(name: str, seen: int, images: int) -> str:
    """Return a sentence on the number of test images that were seen in pre-training."""
    verb = "was" if seen == 1 else "were"
    return f"{seen} of {images} images of {name} {verb} seen in pre-training (duplicates or near-duplicates)"
