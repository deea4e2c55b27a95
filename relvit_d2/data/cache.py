"""Cache of the records of data sets."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from relvit_d2.data.detection.records import Record
from relvit_d2.data.images.decode import size_if_readable
from relvit_d2.data.images.file_cache import size_and_times
from relvit_d2.data.user_cache import cache_root, load, store

VERSION = 4  # version of the readers; files of another version are not used

Labels = tuple[list[str], list[Record], list[str]]  # class names, records, warnings

_logged: set[str] = set()

logger = logging.getLogger(__name__)


def cached(name: str, root: Path, sources: Iterable[Path], read: Callable[[], Labels]) -> Labels:
    """Return the result of ``read``, from the cache if no source file has changed.

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
    document = load(path)
    if not isinstance(document, dict) or document.get("digest") != digest or _is_readable_again(document, root):
        classes, records, warnings = read()
        records = [{**r, "file_name": Path(r["file_name"]).relative_to(root).as_posix()} for r in records]
        info = {"digest": digest, "root": str(real), "description": name}
        document = info | {"classes": classes, "records": records, "warnings": warnings}
        store(path, document, f"the records of '{root}' ({name})")
    for warning in document["warnings"]:
        if warning not in _logged:
            _logged.add(warning)
            logger.warning(warning)
    for record in document["records"]:
        record["file_name"] = str(root / record["file_name"])
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode(annotation["bbox_mode"])
    return document["classes"], document["records"], document["warnings"]


def _is_readable_again(document: dict[str, Any], root: Path) -> bool:
    """Whether an image that could not be read, as while a network disk failed, can be read now."""
    unreadable = [record["file_name"] for record in document["records"] if not record["width"]]
    return any(size_if_readable(root / name)[0] for name in unreadable)


def _digest(real: Path, sources: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and times of files; missing files are allowed."""
    total = hashlib.blake2b(f"{VERSION}".encode(), digest_size=16)
    for source in sources:
        total.update(f"{source.name}\0{size_and_times(source)}\n".encode(errors="surrogateescape"))
    return total.hexdigest()
