"""Training, validation and test sets: those that names of files and folders give, and those that are made here."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

from relvit_d2.data.images.similarity import Fingerprint, groups_of

T = TypeVar("T")

ALL = "all"  # the one set of a folder that is not divided
SEED = 0  # of the division: never the run's, so that runs with several seeds are tested on the same images
HELD_OUT = 5  # one image in so many is held out

logger = logging.getLogger(__name__)

_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "trainval",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> str | None:
    """Return ``train``, ``trainval``, ``val`` or ``test`` if a name says so: ``instances_val2017.json`` says val."""
    words = re.findall("[a-z]+", name.lower())
    return next((_WORDS[word] for word in reversed(words) if word in _WORDS), None)


def splits_of_folders(folders: Sequence[Sequence[str]]) -> list[str | None]:
    """Return the split that each of ``folders``, given by their names from the data set's root on, is in.

    Of the names that are a split (``train``, ``Valid``) the outermost decides, or else of those that hold one
    (``train2017``). Folders that all have in common decide nothing.
    """
    common = len(os.path.commonprefix([list(folder) for folder in set(map(tuple, folders))]))

    @cache
    def split(names: tuple[str, ...]) -> str | None:
        exact = (_WORDS.get(name.lower()) for name in names)
        return next(filter(None, (*exact, *map(split_of, names))), None)

    return [split(tuple(folder[common:])) for folder in folders]


def one_or_split(sets: dict[str, T]) -> dict[str, T]:
    """Return the sets, a single one as ``all``: there is nothing that it would be divided from."""
    return {ALL: next(iter(sets.values()))} if len(sets) == 1 else sets


def divide(items: Sequence[T], split: str, prints: Sequence[Fingerprint], where: str) -> list[T]:
    """Return the ``train`` or ``val`` part of what is not divided, in its order.

    One item in ``HELD_OUT`` is held out. Digests of the pixels with ``SEED`` choose them, so that neither names nor
    order matter, and an image that is added later moves few others. See :func:`hold_out`.

    Args:
        items: images or records.
        split: ``train`` or ``val``.
        prints: the fingerprint of each item.
        where: the data set, for the log.
    """

    def rank(group: Sequence[int]) -> bytes:
        digests = (hashlib.blake2b(prints[i].exact, digest_size=8, salt=SEED.to_bytes(16, "big")) for i in group)
        return min(digest.digest() for digest in digests)

    count = max(1, len(items) // HELD_OUT) if len(items) > 1 else 0
    held, warning = hold_out(prints, count, rank, where)
    if warning:
        warn(warning)
    return [item for index, item in enumerate(items) if (index in held) == (split == "val")]


def hold_out(
    prints: Sequence[Fingerprint], count: int, rank: Callable[[list[int]], Any], where: str
) -> tuple[set[int], str]:
    """Return the places of about ``count`` images to hold out, equal and nearly equal ones all or none, and a warning.

    The groups of :func:`relvit_d2.data.images.similarity.groups_of` are taken in order of rank, except those that
    exceed what is left of ``count``. Where that yields less than half of ``count``, the smallest group is added if the
    sum is at most twice ``count``; where it is not, as when all images are frames of one video, only equal images are
    kept on one side, and the warning, which is "" otherwise, describes it.

    Args:
        prints: the fingerprint of each image.
        count: images to hold out.
        rank: what groups are sorted by; it must differ from group to group.
        where: the data set, for the log.
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
                f"nearly equal images are in both parts of it, {count} held out; divide them yourself if they are "
                "frames of videos"
                if near
                else f"{len(held)} images are held out instead of {count}, since equal ones stay together; remove the "
                "copies, or divide them yourself"
            )
        )
    return held, warning


@cache  # once a run: the parts are asked for one by one
def warn(warning: str) -> None:
    """Log a warning of :func:`hold_out`."""
    logger.warning(warning)


def offered(sets: Iterable[str]) -> list[str]:
    """Return the splits that a folder with these sets has."""
    names = list(sets)
    return ["train", "val", ALL] if names == [ALL] else names
