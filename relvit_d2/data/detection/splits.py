"""Training, validation and test sets, told by names of files and folders, or made."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeVar

T = TypeVar("T")

ALL = "all"  # the one set of a folder that is not divided
SEED = 0  # of the division: never the run's, so that runs with several seeds are tested on the same images
HELD_OUT = 5  # one image in so many is held out

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
    (``train2017``); folders that all have in common do not tell any apart.
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


def divide(items: Sequence[T], split: str, name: Callable[[T], str]) -> list[T]:
    """Return the ``train`` or ``val`` part of what is not divided, in its order.

    One item in ``HELD_OUT`` is held out, those whose names come first when digested with ``SEED``. An image that is
    added later moves few others.
    """
    ranked = sorted(range(len(items)), key=lambda index: _rank(name(items[index])))
    held_out = set(ranked[: max(1, len(items) // HELD_OUT)]) if len(items) > 1 else set()
    return [item for index, item in enumerate(items) if (index in held_out) == (split == "val")]


def offered(sets: Iterable[str]) -> list[str]:
    """Return the splits that a folder with these sets has."""
    names = list(sets)
    return ["train", "val", ALL] if names == [ALL] else names


def _rank(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8, salt=SEED.to_bytes(16, "big")).digest()
