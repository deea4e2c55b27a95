"""Records that were read once, kept as a COCO annotation file until their source changes.

The file lies in the user's cache, never in a data folder. Its ``info`` holds the digest of the source; names of images
are relative to the data set's root.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from relvit_d2.data.detection.records import Record
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_text

VERSION = 2  # of the readers: a higher one makes older files stale

Labels = tuple[list[str], list[Record], list[str]]  # names of the classes, records, what the log is to say of them

_told: set[str] = set()

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the user's cache of this project: ``$XDG_CACHE_HOME/relvit_d2``, or ``~/.cache/relvit_d2``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relvit_d2"


def cached(name: str, root: Path, sources: Iterable[Path], read: Callable[[], Labels]) -> Labels:
    """Return what ``read`` returns, from the cache if no source has changed since.

    Whether from the cache or read, the records are those of the cache's format: a run and its resumption see the same
    numbers. Where the cache cannot be written, the records are read every time.

    Args:
        name: what is read from ``root``: format, split and all else that decides.
        root: folder of the data set, above every image.
        sources: files that the records are made of; their sizes and times decide, and their order.
        read: returns names of classes, records whose images lie in ``root``, and notes, which the log has at every
            start.
    """
    real = Path(os.path.realpath(root))
    key = hashlib.blake2b(f"{real}\n{name}".encode(errors="surrogateescape"), digest_size=8).hexdigest()
    path = cache_root() / "records" / f"{real.name}_{key}.json"
    digest = _digest(real, sources)
    document = _load(path, digest)
    if document is None:
        classes, records, notes = read()
        info = {"digest": digest, "root": str(real), "description": name, "notes": notes}
        document = {"info": info} | to_coco(classes, records, root)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(document))
        except (OSError, UserError, ValueError) as error:
            logger.info(f"{name} of '{root}' is read anew at every start: the cache cannot be written ({error})")
    notes = document["info"]["notes"]
    for note in notes:
        if note not in _told:
            _told.add(note)
            logger.warning(note)
    return *from_coco(document, root), notes


def remembered(kind: str, key: str, make: Callable[[], tuple[list[int], str]]) -> tuple[list[int], str]:
    """Return the numbers and the note that ``make`` returns, from the cache if they were made before.

    Where the cache cannot be written, they are made every time.

    Args:
        kind: the folder in the cache.
        key: a digest of all that decides the result.
        make: returns whole numbers and a text.
    """
    path = cache_root() / kind / f"{key}.json"
    try:
        numbers, note = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(note, str) and all(type(number) is int for number in numbers):
            return list(numbers), note
    except (OSError, ValueError, TypeError):
        pass  # absent, or damaged
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(made))
    except (OSError, UserError) as error:
        logger.info(f"what belongs into {path} is made anew at every start: the cache cannot be written ({error})")
    return made


def to_coco(classes: Sequence[str], records: Sequence[Record], root: Path) -> dict[str, Any]:
    """Return records as a COCO annotation file's content; category ids are the contiguous ones.

    ``difficult``, which COCO does not know, is kept beside COCO's keys.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        name = Path(record["file_name"]).relative_to(root).as_posix()
        own = _without(record, "file_name", "image_id", "annotations")
        images.append({"id": record["image_id"], "file_name": name, **own})
        for thing in record["annotations"]:
            x0, y0, x1, y1 = thing["bbox"]
            own = _without(thing, "bbox", "bbox_mode")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    **own,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def from_coco(document: dict[str, Any], root: Path) -> tuple[list[str], list[Record]]:
    """Return the classes and records of what :func:`to_coco` made, which is used up."""
    records: dict[Any, Record] = {}
    for image in document["images"]:
        key, name = image.pop("id"), str(root / image.pop("file_name"))
        records[key] = {"file_name": name, "image_id": key, **image, "annotations": []}
    for entry in document["annotations"]:
        del entry["id"], entry["area"]
        things = records[entry.pop("image_id")]["annotations"]
        x, y, width, height = entry.pop("bbox")
        things.append({"bbox": [x, y, x + width, y + height], "bbox_mode": BoxMode.XYXY_ABS, **entry})
    return [category["name"] for category in document["categories"]], list(records.values())


def _without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def _digest(real: Path, sources: Iterable[Path]) -> str:
    """Digest names, sizes and times; a file that is absent counts as such."""
    total = hashlib.blake2b(f"{VERSION}".encode(), digest_size=16)
    for source in sources:
        try:
            state = source.stat()
            known = f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        except OSError:
            known = "absent"
        total.update(f"{source.name}\0{known}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def _load(path: Path, digest: str) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return document if document["info"]["digest"] == digest else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # absent, or cut short by whatever
