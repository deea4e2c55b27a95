"""Training, validation and test sets: taken from names of files and folders, or divided automatically."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

from relvit_d2.data.images.similarity import Fingerprint, groups_of

T = TypeVar("T")

ALL = "all"  # the only set of a folder without splits
SEED = 0  # of the division; not the run's seed, so that runs with several seeds are evaluated on the same images
HELD_OUT = 5  # one image in this many is held out

logger = logging.getLogger(__name__)

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    "trainval": "trainval",
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(name: str) -> str | None:
    """Return the split that a name contains, ``train``, ``trainval``, ``val`` or ``test``: val for ``val2017.json``."""
    words = re.findall("[a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


def splits_of_folders(folders: Sequence[Sequence[str]]) -> list[str | None]:
    """Return the split of each folder, given by the names of the folders on the path from the data set's root.

    The outermost name that is a split (``train``, ``Valid``) determines it, or else the outermost name that contains
    one (``train2017``). Leading folders that all paths have in common are ignored.
    """
    common = len(os.path.commonprefix([list(folder) for folder in set(map(tuple, folders))]))

    @cache
    def split(names: tuple[str, ...]) -> str | None:
        exact = (_SPLIT_WORDS.get(name.lower()) for name in names)
        return next(filter(None, (*exact, *map(split_of, names))), None)

    return [split(tuple(folder[common:])) for folder in folders]


def merge_single_split(sets: dict[str, T]) -> dict[str, T]:
    """Return the sets; a single one is named ``all``, since a folder with one split is not divided.

    Test images keep their name: they must not be trained on.
    """
    return {ALL: next(iter(sets.values()))} if len(sets) == 1 and "test" not in sets else sets


def divide(items: Sequence[T], split: str, prints: Sequence[Fingerprint], where: str) -> list[T]:
    """Return the ``train`` or ``val`` part of an undivided set, in its order.

    One item in ``HELD_OUT`` is held out (see :func:`hold_out`). They are chosen by digests of the pixels with ``SEED``,
    so that neither names nor order matter, and an image that is added later moves few others. ``prints`` are the
    fingerprints of the items, ``where`` is the data set, for the log.
    """

    def rank(group: Sequence[int]) -> bytes:
        digests = (hashlib.blake2b(prints[i].exact, digest_size=8, salt=SEED.to_bytes(16, "big")) for i in group)
        return min(digest.digest() for digest in digests)

    count = max(1, len(items) // HELD_OUT) if len(items) > 1 else 0
    held, warning = hold_out(prints, count, rank, where)
    if warning:
        warn_once(warning)
    return [item for index, item in enumerate(items) if (index in held) == (split == "val")]


def hold_out(
    prints: Sequence[Fingerprint], count: int, rank: Callable[[list[int]], Any], where: str
) -> tuple[set[int], str]:
    """Return the indices of about ``count`` images to hold out, and a warning or "".

    Groups of equal and nearly equal images (:func:`relvit_d2.data.images.similarity.groups_of`) are held out whole, in
    order of rank, skipping those that exceed the remaining count. If that yields less than half of ``count``, the
    smallest group is added unless the sum exceeds twice ``count``. If that is not enough either, as for the frames of
    one video, only groups of equal images are kept together, and the warning describes it.

    Args:
        prints: the fingerprint of each image.
        rank: sort key of the groups, different for each.
        where: the data set, for the warning.
    """
    held: set[int] = set()
    warning = ""
    for near in (True, False):
        groups = sorted(groups_of(prints, near), key=rank)
        held = set()
        for group in groups:
            if len(held) + len(group) <= count:
                held.update(group)
        rest = [group for group in groups if group[0] not in held]
        if 2 * len(held) < count and len(rest) > 1 and len(smallest := min(rest, key=len)) + len(held) <= 2 * count:
            held.update(smallest)
        if 2 * len(held) >= count:
            break
        warning = (
            f"{max(map(len, groups))} of the {len(prints)} images of {where} are {'nearly ' if near else ''}equal: "
            + (
                f"both parts contain nearly equal images, {count} images are held out; divide the data set yourself if "
                "they are frames of videos"
                if near
                else f"{len(held)} images are held out instead of {count}, since equal images stay together; remove "
                "the copies, or divide the data set yourself"
            )
        )
    return held, warning


@cache  # once per run: the parts are requested one by one
def warn_once(warning: str) -> None:
    """Log a warning that does not depend on the part that is requested."""
    logger.warning(warning)


def available_splits(sets: Iterable[str]) -> list[str]:
    """Return the splits that can be requested of a folder with these sets."""
    names = list(sets)
    return ["train", "val", ALL] if names == [ALL] else names
