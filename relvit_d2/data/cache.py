"""Cache of records, as COCO annotation files that are valid until the source files change.

The files are in the user's cache, never in a data folder. ``info`` contains the digest of the source files; image names
are relative to the root of the data set.
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

VERSION = 3  # version of the readers; files of another version are not used

Labels = tuple[list[str], list[Record], list[str]]  # class names, records, warnings

_logged: set[str] = set()

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the user's cache of this project: ``$XDG_CACHE_HOME/relvit_d2``, or ``~/.cache/relvit_d2``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relvit_d2"


def cached(name: str, root: Path, sources: Iterable[Path], read: Callable[[], Labels]) -> Labels:
    """Return the result of ``read``, from the cache if no source file has changed.

    Records are always converted to the format of the cache and back, so a run and its resumption have the same numbers.
    If the cache cannot be written, the records are read every time.

    Args:
        name: description of the result: format, split and all other options of the reader.
        root: folder of the data set, which contains every image.
        sources: files that are read; the cache depends on their order, names, sizes and times.
        read: returns class names, records with images in ``root``, and warnings, which are logged at every start.
    """
    real = Path(os.path.realpath(root))
    key = hashlib.blake2b(f"{real}\n{name}".encode(errors="surrogateescape"), digest_size=8).hexdigest()
    path = cache_root() / "records" / f"{real.name}_{key}.json"
    digest = _digest(real, sources)
    document = _load(path, digest)
    if document is None:
        classes, records, warnings = read()
        info = {"digest": digest, "root": str(real), "description": name, "warnings": warnings}
        document = {"info": info} | to_coco(classes, records, root)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(document))
        except (OSError, UserError, ValueError) as error:
            logger.info(f"{name} of '{root}' is read again at every start: the cache cannot be written ({error})")
    warnings = document["info"]["warnings"]
    for warning in warnings:
        if warning not in _logged:
            _logged.add(warning)
            logger.warning(warning)
    return *from_coco(document, root), warnings


def remembered(kind: str, key: str, make: Callable[[], tuple[list[int], str]]) -> tuple[list[int], str]:
    """Return the integers and the warning that ``make`` returns, from the cache if they are there.

    If the cache cannot be written, they are computed every time.

    Args:
        kind: folder in the cache.
        key: digest of everything that the result depends on.
        make: returns integers and a text.
    """
    path = cache_root() / kind / f"{key}.json"
    try:
        numbers, note = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(note, str) and all(type(number) is int for number in numbers):
            return list(numbers), note
    except (OSError, ValueError, TypeError):
        pass  # missing or damaged
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(made))
    except (OSError, UserError) as error:
        logger.info(f"the content of {path} is computed again at every start: the cache cannot be written ({error})")
    return made


def to_coco(classes: Sequence[str], records: Sequence[Record], root: Path) -> dict[str, Any]:
    """Return records as the content of a COCO annotation file, with contiguous category ids.

    ``difficult``, which COCO does not have, is an additional key.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        name = Path(record["file_name"]).relative_to(root).as_posix()
        other_keys = _without(record, "file_name", "image_id", "annotations")
        images.append({"id": record["image_id"], "file_name": name, **other_keys})
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            other_keys = _without(annotation, "bbox", "bbox_mode")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    **other_keys,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def from_coco(document: dict[str, Any], root: Path) -> tuple[list[str], list[Record]]:
    """Return the class names and records of a document of :func:`to_coco`, which is modified."""
    records: dict[Any, Record] = {}
    for image in document["images"]:
        key, name = image.pop("id"), str(root / image.pop("file_name"))
        records[key] = {"file_name": name, "image_id": key, **image, "annotations": []}
    for entry in document["annotations"]:
        del entry["id"], entry["area"]
        annotations = records[entry.pop("image_id")]["annotations"]
        x, y, width, height = entry.pop("bbox")
        annotations.append({"bbox": [x, y, x + width, y + height], "bbox_mode": BoxMode.XYXY_ABS, **entry})
    return [category["name"] for category in document["categories"]], list(records.values())


def _without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def _digest(real: Path, sources: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and times of files; missing files are allowed."""
    total = hashlib.blake2b(f"{VERSION}".encode(), digest_size=16)
    for source in sources:
        try:
            state = source.stat()
            known = f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        except OSError:
            known = "missing"
        total.update(f"{source.name}\0{known}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def _load(path: Path, digest: str) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return document if document["info"]["digest"] == digest else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # missing or damaged
