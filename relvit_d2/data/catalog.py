"""The data sets by name: where they lie, how they are read, and their place in Detectron2's catalogs.

A name of Detectron2's own catalog that is not in ``DATASETS`` (a user's registration) is accepted everywhere too.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES

from relvit_d2.data.folder import list_images
from relvit_d2.data.places import dataset_root, refuse_stray
from relvit_d2.data.records import Record, existing
from relvit_d2.data.streets import ensure_streets
from relvit_d2.data.svhn import CLASS_NAMES as DIGITS
from relvit_d2.data.svhn import load_svhn, svhn_images
from relvit_d2.data.voc import load_voc, voc_images
from relvit_d2.errors import UserError
from relvit_d2.registry import Registry

_SUBSET = re.compile(r"(?P<base>[^\[\]]+)\[:(?P<amount>\d+(?:\.\d+)?)(?P<percent>%?)\]")


@dataclass(frozen=True)
class DatasetEntry:
    """One data set.

    Attributes:
        classes: names in the order of the category ids.
        records: reads the labelled images (see ``relvit_d2.data.records``); takes whether to leave out images that are
            listed but absent.
        images: lists the images in the records' order without reading a label; takes the same.
        metrics: how it is evaluated: ``"coco"``, ``"voc07"``.
        metadata: what Detectron2's evaluators want to know beside ``thing_classes``.
    """

    classes: tuple[str, ...]
    records: Callable[[bool], list[Record]]
    images: Callable[[bool], list[Path]]
    metrics: tuple[str, ...] = ("coco",)
    metadata: Callable[[], dict[str, Any]] = lambda: {"evaluator_type": "coco"}


DATASETS: Registry[DatasetEntry] = Registry("data set")


def register_all() -> None:
    """Put every entry of ``DATASETS`` into Detectron2's catalogs, in place of what has its name there.

    Call it again after ``DETECTRON2_DATASETS`` changed.
    """
    for name in DATASETS:
        entry = DATASETS[name]
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)
        DatasetCatalog.register(name, partial(entry.records, False))
        MetadataCatalog.get(name).set(
            **{"thing_classes": list(entry.classes), **entry.metadata()}, metrics=entry.metrics
        )


def resolve(name: str) -> str:
    """Return ``name`` once Detectron2's catalogs know it.

    ``NAME[:8]`` is the first 8 records of NAME in the reader's order, ``NAME[:10%]`` the first tenth (rounded down, one
    at least); such a set is registered under its full name when it is asked for.

    Raises:
        UserError: an unknown name, or a subset of nothing or of more than 100 percent.
    """
    _register_once()
    if name in DatasetCatalog:
        return name
    base, take = _subset(name)
    if base not in DatasetCatalog:
        DATASETS[base]  # raises, with the nearest name
    DatasetCatalog.register(name, lambda: take(DatasetCatalog.get(base)))
    # Without json_file, dirname and the like: an evaluator would take the whole set for the truth.
    keep = ("thing_classes", "thing_dataset_id_to_contiguous_id", "thing_colors", "metrics")
    known = MetadataCatalog.get(base).as_dict()
    MetadataCatalog.get(name).set(evaluator_type="coco", **{key: known[key] for key in keep if key in known})
    return name


def get_records(name: str, skip_missing: bool = False) -> list[Record]:
    """Return the records of a data set or subset, freshly read (see ``relvit_d2.data.records``).

    Args:
        name: of the data set.
        skip_missing: leave out images that are listed but absent, with a word in the log.

    Raises:
        UserError: an unknown name, or missing or damaged data.
    """
    resolve(name)
    base, take = _subset(name)
    try:
        if base in DATASETS:
            return take(DATASETS[base].records(skip_missing))
        records = DatasetCatalog.get(base)
    except OSError as error:
        raise UserError(
            f"data set '{name}' cannot be read: '{error.filename}' {(error.strerror or 'is missing').lower()}; "
            f"put it there (DETECTRON2_DATASETS is '{dataset_root()}')"
        ) from error
    return take(_existing_records(records, f"data set '{base}'", skip_missing))


def get_images(name: str, skip_missing: bool = False) -> list[Path]:
    """Return the images of a data set, a subset or a folder (its path), without a need for labels.

    The name of a data set goes before a folder of that name; ``./name`` is always a folder. Arguments are those of
    :func:`get_records`.

    Raises:
        UserError: an unknown name, or missing data.
    """
    base, take = _subset(name)
    if is_folder(name):
        return list_images(Path(name))
    resolve(name)
    if base in DATASETS:
        return take(DATASETS[base].images(skip_missing))
    return [Path(record["file_name"]) for record in get_records(name, skip_missing)]


def is_folder(name: str) -> bool:
    """Whether :func:`get_images` takes ``name`` for a folder of images."""
    base, _ = _subset(name)
    return os.sep in name or (base not in DATASETS and base not in DatasetCatalog and Path(name).is_dir())


def _existing_records(records: list[Record], where: str, skip_missing: bool) -> list[Record]:
    found = set(existing([Path(record["file_name"]) for record in records], where, skip_missing))
    return [record for record in records if Path(record["file_name"]) in found]


def get_metadata(name: str) -> Metadata:
    """Return Detectron2's metadata of a data set or subset: ``thing_classes``, ``metrics`` and more.

    Raises:
        UserError: an unknown name.
    """
    return MetadataCatalog.get(resolve(name))


@cache
def _register_once() -> None:
    register_all()


def _subset(name: str) -> tuple[str, Callable[[list], list]]:
    """Return the name without its ``[:...]`` and the function that takes that many from a list."""
    match = _SUBSET.fullmatch(name)
    if not match:
        return name, list
    amount, percent = float(match["amount"]), bool(match["percent"])
    if amount == 0 or (percent and amount > 100) or not (percent or amount.is_integer()):
        raise UserError(
            f"'{name}' is no subset: write {match['base']}[:8] for the first 8 images, "
            f"{match['base']}[:10%] for the first 10 percent"
        )
    if percent:
        return match["base"], lambda items: items[: max(1, int(len(items) * amount / 100))]
    return match["base"], lambda items: items[: int(amount)]


def _find(what: str, *places: str) -> Path:
    """Return the first of ``places`` under the data root that exists."""
    root = dataset_root()
    for place in places:
        if (root / place).exists():
            if (root / place).is_file():
                refuse_stray(root / place)
            return root / place
    value = os.environ.get("DETECTRON2_DATASETS")
    state = f"is '{value}'" if value else f"is not set, so it stands for {root.absolute()}"
    raise UserError(
        f"{what} is missing: put it at {' or '.join(f'$DETECTRON2_DATASETS/{place}' for place in places)} "
        f"(DETECTRON2_DATASETS {state}), or run 'make demo' to try everything without any data"
    )


_VOC_PLACES = ("VOC2007", "VOCdevkit/VOC2007")


def _voc_folder() -> Path:
    return _find("PASCAL VOC 2007", *_VOC_PLACES)


def _voc_metadata(split: str) -> dict[str, Any]:
    # Detectron2's own VOC evaluator opens the annotations itself.
    root = dataset_root()
    folder = next((root / place for place in _VOC_PLACES if (root / place).is_dir()), root / _VOC_PLACES[0])
    return {"evaluator_type": "pascal_voc", "dirname": str(folder), "year": 2007, "split": split}


def _svhn_folder(split: str) -> Path:
    return _find(f"SVHN's format 1, split {split},", f"svhn/{split}")


def _streets_folder(split: str) -> Path:
    return ensure_streets(streets_root()) / split


def streets_root() -> Path:
    """Return the folder that holds ``streets`` or will: the data root, or the user's cache if that is not writable."""
    root = dataset_root()
    if (root / "streets").is_dir() or (
        os.environ.get("DETECTRON2_DATASETS") and root.is_dir() and os.access(root, os.W_OK)
    ):
        return root
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relvit_d2"


def _coco_metadata(split: str) -> dict[str, Any]:
    root = dataset_root() / "coco"
    return {
        **_get_builtin_metadata("coco"),
        "evaluator_type": "coco",
        "json_file": str(root / "annotations" / f"instances_{split}2017.json"),
        "image_root": str(root / f"{split}2017"),
    }


def _coco_records(split: str, skip_missing: bool) -> list[Record]:
    place = f"coco/annotations/instances_{split}2017.json"
    json_file = _find(f"COCO 2017's {Path(place).name}", place)
    try:
        records = load_coco_json(str(json_file), str(dataset_root() / f"coco/{split}2017"), f"coco_2017_{split}")
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{json_file} is damaged or no COCO annotation file ({error!r}): restore it") from error
    return _existing_records(records, str(json_file), skip_missing)


def _coco_images(split: str, skip_missing: bool) -> list[Path]:
    folder = _find(f"COCO 2017's image folder {split}2017", f"coco/{split}2017")
    json_file = dataset_root() / f"coco/annotations/instances_{split}2017.json"
    if not json_file.is_file():
        return list_images(folder)
    try:
        images = json.loads(json_file.read_text())["images"]
        listed = [folder / image["file_name"] for image in sorted(images, key=lambda image: image["id"])]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{json_file} is damaged or no COCO annotation file ({error!r}): restore it") from error
    return existing(listed, str(json_file), skip_missing)


def _voc_entry(split: str) -> DatasetEntry:
    return DatasetEntry(
        classes=tuple(VOC_CLASSES),
        records=lambda skip_missing: load_voc(_voc_folder(), split, VOC_CLASSES, skip_missing),
        images=lambda skip_missing: voc_images(_voc_folder(), split, skip_missing),
        metrics=("coco", "voc07"),
        metadata=partial(_voc_metadata, split),
    )


def _coco_entry(split: str) -> DatasetEntry:
    return DatasetEntry(
        classes=tuple(_get_builtin_metadata("coco")["thing_classes"]),
        records=partial(_coco_records, split),
        images=partial(_coco_images, split),
        metadata=partial(_coco_metadata, split),
    )


def _digits_entry(folder: Callable[[], Path]) -> DatasetEntry:
    return DatasetEntry(
        classes=DIGITS,
        records=lambda skip_missing: load_svhn(folder(), skip_missing),
        images=lambda skip_missing: svhn_images(folder()),
    )


for _split in ("trainval", "train", "val", "test"):
    DATASETS.add(f"voc_2007_{_split}", _voc_entry(_split))
for _split in ("train", "val"):
    DATASETS.add(f"coco_2017_{_split}", _coco_entry(_split))
for _split in ("train", "test", "extra"):
    DATASETS.add(f"svhn_{_split}", _digits_entry(partial(_svhn_folder, _split)))
for _split in ("train", "test"):
    DATASETS.add(f"streets_{_split}", _digits_entry(partial(_streets_folder, _split)))
