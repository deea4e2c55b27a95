"""Fingerprints of the images that an encoder was trained on, which identify test images among them.

They are one JSON value under ``KEY`` in the metadata of ``encoder.safetensors`` and in checkpoints: about 43 bytes an
image.
"""

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relvit_d2.data.images.batches import Images, ImageStack
from relvit_d2.data.images.similarity import LIMIT, NEAR, VERSION, Fingerprint, fingerprint, fingerprints
from relvit_d2.utils.errors import UserError

KEY = "seen_images"
SEEN = "seen_in_pretraining"  # key of a SeenCount beside the results of a test set

logger = logging.getLogger(__name__)


class SeenCount(NamedTuple):
    """How many of a set's images an encoder was trained on, or on nearly equal ones.

    Attributes:
        seen: number of those images.
        images: number of images of the set.
    """

    seen: int
    images: int


def fingerprints_of(images: Images, name: str) -> list[Fingerprint]:
    """Return the fingerprints of decoded images, or of image files with the cache's help; ``name`` is their set's."""
    if isinstance(images, ImageStack):
        return [fingerprint(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in images]
    return fingerprints(images, Path(name))


@dataclass(frozen=True)
class SeenImages:
    """The images that an encoder was trained on.

    Attributes:
        exact: ``(n, 16)`` uint8, different digests of pixels.
        near: ``(m, 2)`` uint64, different difference hashes.
    """

    exact: np.ndarray
    near: np.ndarray

    @classmethod
    def of(cls, prints: Iterable[Fingerprint]) -> "SeenImages":
        """Collect fingerprints."""
        prints = list(prints)
        exact = np.frombuffer(b"".join({one.exact: None for one in prints}), np.uint8).reshape(-1, 16)
        return cls(exact, _hashes([near for near in {one.near: None for one in prints} if near is not None]))

    @classmethod
    def of_metadata(cls, entries: Mapping[str, Any]) -> "SeenImages | None":
        """Return what :meth:`metadata` wrote, from the entries of an encoder file or a checkpoint; None without it.

        Raises:
            UserError: if it is damaged.
        """
        value = entries.get(KEY)
        if value is None or (isinstance(value, dict) and value.get("version") != VERSION):
            return None
        try:
            exact, near = (base64.b64decode(value[key], validate=True) for key in ("exact", "near"))
            return cls(np.frombuffer(exact, np.uint8).reshape(-1, 16), np.frombuffer(near, "<u8").reshape(-1, 2))
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"the fingerprints of training images in the weights are damaged ({error}): write the file anew"
            ) from error

    def metadata(self) -> dict[str, Any]:
        """Return the fingerprints as JSON values, by ``KEY``."""
        parts = {"exact": self.exact, "near": self.near.astype("<u8")}
        return {KEY: {"version": VERSION} | {key: base64.b64encode(x.tobytes()).decode() for key, x in parts.items()}}

    def __or__(self, other: "SeenImages | None") -> "SeenImages":
        """Return the images of both."""
        if other is None:
            return self
        return SeenImages(*(np.unique(np.concatenate(pair), axis=0) for pair in zip(self, other, strict=True)))

    def __iter__(self) -> Any:
        return iter((self.exact, self.near))

    def places(self, prints: Sequence[Fingerprint]) -> list[int]:
        """Return the places of the images that are equal, or nearly equal, to one that was seen.

        As in :func:`relvit_d2.data.images.similarity.groups_of`, only hashes that share a band of 16 bits are compared.
        """
        known = set(map(bytes, self.exact))
        found = {place for place, one in enumerate(prints) if one.exact in known}
        rest = [(place, one.near) for place, one in enumerate(prints) if place not in found and one.near is not None]
        ours = _hashes([near for _, near in rest])
        for own, theirs in zip(ours.view(np.uint16).T, self.near.view(np.uint16).T, strict=True):
            order = theirs.argsort(kind="stable")
            firsts = np.searchsorted(theirs, own, "left", sorter=order)
            ends = np.searchsorted(theirs, own, "right", sorter=order)
            for row in np.flatnonzero(firsts < ends):
                others = self.near[order[firsts[row] : ends[row]]]
                if (np.bitwise_count(others ^ ours[row]).sum(1) <= NEAR).any():
                    found.add(rest[row][0])
        return sorted(found)


def _hashes(values: Sequence[int]) -> np.ndarray:
    return np.frombuffer(b"".join(value.to_bytes(16, "little") for value in values), "<u8").reshape(-1, 2)


def trained_on(sets: Mapping[str, Images], before: SeenImages | None = None) -> dict[str, Any]:
    """Return the metadata on the images of a training, and on those that its encoder had seen ``before``.

    Empty for more than ``LIMIT`` images, whose decoding would take hours.

    Args:
        sets: training images by the name of their set.
        before: of the weights that the training started from.
    """
    count = sum(map(len, sets.values()))
    if count > LIMIT:
        logger.warning(
            f"{count:,} training images are more than {LIMIT:,}: the encoder gets no fingerprints of them, so that "
            "evaluations cannot report test images among them"
        )
        return {}
    return (
        SeenImages.of(one for name, images in sets.items() for one in fingerprints_of(images, name)) | before
    ).metadata()


def seen_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return that of the entries that came with weights which describes the images they were trained on."""
    return {KEY: entries[KEY]} if KEY in entries else {}


def count_seen(entries: Mapping[str, Any], sets: Mapping[str, Images]) -> dict[str, SeenCount]:
    """Count the images of each set that weights were trained on, and log the counts.

    Args:
        entries: metadata of the weights' file. Without fingerprints in them nothing is known, and nothing returned.
        sets: test images by the name of their set.
    """
    counts: dict[str, SeenCount] = {}
    seen = SeenImages.of_metadata(entries)
    if seen is None:
        if entries:
            logger.info("the weights have no fingerprints of their training images: test images may be among them")
        return counts
    for name, images in sets.items():
        counts[name] = count = SeenCount(len(seen.places(fingerprints_of(images, name))), len(images))
        log = logger.warning if count.seen else logger.info
        log(seen_sentence(name, *count))
    return counts


def seen_sentence(name: str, seen: int, images: int) -> str:
    """Return a sentence on how many images of a test set were trained on."""
    verb = "was" if seen == 1 else "were"
    return f"{seen} of {images} images of {name} {verb} seen in pre-training, equal or nearly equal"
