"""Data sets of the Hugging Face Hub on the disk: image folders with a metadata file, and parquet files with images.

``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` have ``file_name`` for each image; other parquet files
contain the images. Boxes are ``[x, y, width, height]`` in pixels in ``bbox``, and classes in one of ``CLASSES``, both
in the column ``objects`` or columns themselves (Hugging Face, datasets, "Create an image dataset").
"""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from relvit_d2.data.detection.converted import LabelFormat, LabelledImage
from relvit_d2.data.detection.records import files_with, folders_below
from relvit_d2.data.images.folder import EXTENSIONS, files_below
from relvit_d2.data.user_cache import cache_root
from relvit_d2.utils.errors import UserError, resource_error
from relvit_d2.utils.processes import first_process_first

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CLASSES = ("category", "categories", "category_id", "label", "labels", "class", "classes")
ROWS = 64  # of a parquet file that are in memory


def _candidates(root: Path) -> list[Path]:
    """Return the metadata files below a folder, and its parquet files if it has no image."""
    files = [path for folder in folders_below(root) for path in (*map(folder.joinpath, METADATA),) if path.is_file()]
    if any(Path(name).suffix.lower() in EXTENSIONS for name in files_below(str(root), [])):
        return files
    parquet = (path for folder in folders_below(root) for path in files_with(folder, ".parquet"))
    return list(dict.fromkeys((*files, *parquet)))


def _has_boxes(path: Path) -> bool:
    if path.suffix.lower() == ".parquet":
        return any("bbox" in str(column) for column in _parquet(path).schema_arrow)
    with path.open("rb") as file:
        line = file.readline()
    return b"bbox" in line or (path.suffix == ".csv" and b"objects" in line)


def _images(path: Path) -> Iterator[LabelledImage]:
    names = _class_names(path)
    for number, (row, image) in enumerate(_rows(path), start=1):
        objects = list(_objects(row, f"{path}, row {number}", names))
        yield LabelledImage(path, [] if image else [row["file_name"]], None, objects, path=image)


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """Yield the rows of a file, and the images of those that contain one."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":  # lists are JSON
            for number, row in enumerate(csv.DictReader(file), start=1):
                where = f"{path}, row {number}"
                yield {k: _json(v, k, where) if k in ("objects", "bbox", *CLASSES) else v for k, v in row.items()}, None
        else:
            yield from ((json.loads(line), None) for line in file if line.strip())


def _json(text: str | None, column: str, where: str) -> Any:
    if text is None:
        raise UserError(f"{where} has no value in the column {column}: complete the row")
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise UserError(f"{where} has {text!r} in the column {column}: write it as JSON") from error


def _objects(row: dict[str, Any], where: str, class_names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the annotations of a row: ``objects`` is a list of objects, or has a list for each attribute."""
    objects = row.get("objects", row)
    if objects is None:
        return
    if isinstance(objects, list):
        boxes = [entry["bbox"] for entry in objects]
        names = [entry[key] for entry in objects for key in [next(filter(entry.__contains__, CLASSES), None)] if key]
    else:
        boxes = objects["bbox"] or []
        names = next((objects[key] for key in CLASSES if objects.get(key) is not None), [])
    if len(boxes) != len(names):
        raise UserError(f"{where} has {len(boxes)} boxes and {len(names)} classes: make them agree")
    for number, (box, name) in enumerate(zip(boxes, names, strict=True), start=1):
        place = f"{where}, object {number}"
        if class_names and isinstance(name, int):
            if not 0 <= name < len(class_names):
                raise UserError(
                    f"{place} has the class {name}, but only 0 to {len(class_names) - 1} have a name: name it or "
                    "correct it"
                )
            name = class_names[name]
        yield {"category_id": name, "where": place, "bbox": box}


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: run pip install 'relvit_d2[formats]'") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise UserError(f"{path} is not a valid parquet file ({error}): restore it") from error


def _class_names(path: Path) -> tuple[str, ...]:
    """Return the names of the class numbers in a parquet file, () if it has none."""
    if path.suffix.lower() != ".parquet":
        return ()
    metadata = _parquet(path).schema_arrow.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    nodes = [features.get("objects", features)]
    for node in nodes:  # which grows
        if isinstance(node, dict) and node.get("_type") == "ClassLabel":
            return tuple(map(str, node["names"]))
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return ()


def _parquet_rows(path: Path) -> Iterator[tuple[dict[str, Any], Path | None]]:
    import pyarrow

    file = _parquet(path)
    images = {
        column.name
        for column in file.schema_arrow
        if pyarrow.types.is_binary(column.type)
        or (pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0)
    }
    others = [name for name in file.schema_arrow.names if name not in images]
    try:
        extracted = _extracted(path, file, min(images)) if images else {}
        for number, row in enumerate(_batches(file, others)):
            yield row, extracted.get(number)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a valid parquet file ({error}): restore it") from error


def _batches(file: Any, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(ROWS, columns=list(columns)):
        yield from batch.to_pylist()


def _extracted(path: Path, file: Any, column: str) -> dict[int, Path]:
    """Return the images of a parquet file by row; they are written to the user's cache once."""
    state = path.stat()
    key = f"{os.path.realpath(path)} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    folder = cache_root() / "parquet" / f"{path.stem}_{digest}"
    with first_process_first():
        if not folder.is_dir():
            _extract(path, file, column, folder)
    return {int(image.stem): image for image in folder.iterdir()}


def _extract(path: Path, file: Any, column: str, folder: Path) -> None:
    """Write the images of a parquet file into a new folder."""
    part, changed = None, path.stat().st_mtime_ns
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(suffix=".part", dir=folder.parent))
        for number, row in enumerate(_batches(file, [column])):
            image = row[column] if isinstance(row[column], dict) else {"bytes": row[column]}
            if image["bytes"] is None:
                raise UserError(f"{path}, row {number + 1} has no image in the column {column}: remove the row")
            suffix = Path(str(image.get("path"))).suffix.lower()
            suffix = suffix if suffix in EXTENSIONS - {".npy"} else ".png"  # decoded by its content
            target = part / f"{number:07}{suffix}"
            target.write_bytes(image["bytes"])
            os.utime(target, ns=(changed, changed))  # a resumed run compares it, also after the cache was cleared
        part.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another run was faster
            reason = f"the images of {path} cannot be written to '{folder.parent}' ({error.strerror}): free space"
            raise resource_error(error) or UserError(reason) from error
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)


HUGGING_FACE = LabelFormat("Hugging Face", _candidates, _has_boxes, _images, _class_names)
