"""Results of reading image files, kept in the user's cache until the files change."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from relvit_d2.data.images.archive import ImageFile, Member
from relvit_d2.data.user_cache import cache_root, load, store

CHUNK = 64  # images; a task for each image takes longer than reading a header

logger = logging.getLogger(__name__)


def file_state(image: ImageFile) -> str:
    """Return path, size and times of a file as text; for a member of an archive, those of the archive."""
    return f"{image}\0{size_and_times(image)}"


def size_and_times(image: ImageFile) -> str:
    """Return size and times of a file as text, ``absent`` if there is none; for a member, those of its archive."""
    try:
        state = os.stat(image.archive if isinstance(image, Member) else image)  # noqa: PTH116  (half the time)
        return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
    except OSError:
        return "absent"


def read_changed(
    kind: str, version: int, images: Sequence[ImageFile], read: Callable[[ImageFile], Any], threads: int, verb: str
) -> list[Any]:
    """Return ``read(image)`` of each image, reading only files that are new or have changed since an earlier call.

    The results are in one file for each ``kind`` and folder that contains all the images. If the cache cannot be
    written, every image is read each time.

    Args:
        kind: folder in the user's cache.
        version: of the results; those of another version are not used.
        images: the files.
        read: returns a list in JSON, or an exception, which is not stored.
        threads: number of threads that read.
        verb: past participle of what ``read`` does, for the log.
    """
    if not images:
        return []
    names = [os.path.split(str(image)) for image in images]
    real = {folder: os.path.realpath(folder) for folder in {folder for folder, _ in names}}
    root = os.path.commonpath(real.values())
    below = {folder: os.path.relpath(target, root) for folder, target in real.items()}
    keys = [f"{below[folder]}/{name}" for folder, name in names]
    states = list(map(size_and_times, images))
    path = cache_root() / kind / f"{hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()}.json"
    known = _load(path, version)
    new = [index for index, key in enumerate(keys) if known.get(key, ("",))[0] != states[index]]
    errors: dict[int, Exception] = {}
    if new:
        logger.info(f"{len(new)} images in '{root}' are {verb}")
        chunks = [new[start : start + CHUNK] for start in range(0, len(new), CHUNK)]
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(lambda chunk: [read(images[index]) for index in chunk], chunks)
            for index, result in zip(new, chain.from_iterable(parts), strict=True):
                if isinstance(result, Exception):
                    errors[index] = result
                else:
                    known[keys[index]] = [states[index], *result]
        if len(errors) < len(new):
            store(path, {"version": version, "root": root, "files": known}, f"the results for '{root}'")
    return [errors.get(index) or known[key][1:] for index, key in enumerate(keys)]


def _load(path: Path, version: int) -> dict[str, list[Any]]:
    """Return state and result of each file in a cache file; {} if it is missing, damaged or of another version."""
    match load(path):
        case {"version": known, "files": dict(files)} if known == version:
            return files if all(isinstance(entry, list) and entry for entry in files.values()) else {}
    return {}
