"""Data sets by name: their location, their reader, and their registration in Detectron2's catalogs.

Names that a user registered in Detectron2's catalog are accepted everywhere too.
"""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.utils import comm

from relvit_d2.data.detection.coco import coco_images, load_coco
from relvit_d2.data.detection.kitti import CLASS_SETS, kitti_ids, kitti_images, load_kitti, random_split, sequence_split
from relvit_d2.data.detection.records import Record, existing_images
from relvit_d2.data.detection.streets import ensure_streets
from relvit_d2.data.detection.svhn import CLASS_NAMES as DIGITS
from relvit_d2.data.detection.svhn import load_svhn, svhn_images
from relvit_d2.data.detection.voc import load_voc, voc_images
from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.decode import image_size
from relvit_d2.data.images.folder import is_image_source, list_images, readable, unlabelled_images
from relvit_d2.data.subsets import subset, without_seed
from relvit_d2.data.user_cache import cache_root
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.files import write_text
from relvit_d2.utils.paths import DataRoot, dataset_root
from relvit_d2.utils.registry import Registry


@dataclass(frozen=True)
class DatasetEntry:
    """One data set.

    Attributes:
        classes: names in the order of the category ids.
        records: reads the labelled images (see :mod:`relvit_d2.data.detection.records`); its argument is whether to
            leave out images that are listed but missing.
        images: lists the images in the records' order without reading a label; same argument.
        metrics: the evaluators: ``"coco"``, ``"voc07"``, ``"kitti"``.
        metadata: for Detectron2's evaluators, beside ``thing_classes``.
        project_split: whether this project defines the split (see :func:`save_splits`).
    """

    classes: tuple[str, ...]
    records: Callable[[bool], list[Record]]
    images: Callable[[bool], list[Path]]
    metrics: tuple[str, ...] = ("coco",)
    metadata: Callable[[], dict[str, Any]] = lambda: {"evaluator_type": "coco"}
    project_split: bool = False


DATASETS: Registry[DatasetEntry] = Registry("data set")

_custom: dict[str, DatasetEntry] = {}


def register_all() -> None:
    """Register every entry of ``DATASETS`` in Detectron2's catalogs, replacing entries of the same name.

    Call it again after a change of ``DETECTRON2_DATASETS``.
    """
    for name in DATASETS:
        _register(name, DATASETS[name])


def register_custom(name: str, entry: DatasetEntry) -> None:
    """Register a custom data set for this process, replacing an earlier custom one of the same name.

    Raises:
        UserError: the name is that of another data set, or is not valid.
    """
    if name in DATASETS or (name in DatasetCatalog and name not in _custom):
        raise UserError(f"'{name}' is a data set already: use another name under DATASETS.CUSTOM")
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"'{name}' is not a valid data set name: use letters, digits, _ and - under DATASETS.CUSTOM")
    _custom[name] = entry
    _register(name, entry)


def _register(name: str, entry: DatasetEntry) -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        for known in [known for known in catalog if known == name or known.startswith(f"{name}[:")]:  # and its subsets
            catalog.remove(known)
    DatasetCatalog.register(name, partial(_strict_records, entry))
    MetadataCatalog.get(name).set(**{"thing_classes": list(entry.classes), **entry.metadata()}, metrics=entry.metrics)


def _strict_records(entry: DatasetEntry) -> list[Record]:
    """Return all records, as Detectron2 expects; raise an ``UnreadableImageError`` for the first one without a size."""
    records = entry.records(False)
    for record in records:
        if not record["width"]:
            image_size(record["file_name"])
    return records


def _entry(name: str) -> DatasetEntry | None:
    return DATASETS[name] if name in DATASETS else _custom.get(name)


def resolve(name: str) -> str:
    """Return ``name`` after registering it in Detectron2's catalogs if necessary.

    ``NAME[:8]`` is the first 8 records of NAME in the reader's order, ``NAME[:10%]`` the first tenth (rounded down, at
    least one), ``NAME[:10%@3]`` a random tenth with seed 3 (:func:`random_subset`); such a subset is registered under
    its full name on request.

    Raises:
        UserError: the name is unknown, or the subset is empty or more than 100 percent.
    """
    _register_once()
    if name in DatasetCatalog:
        return name
    base, take = subset(name)
    if base not in DatasetCatalog:
        known = [*DATASETS, *_custom]
        # The name of a custom set and a public set may have the split in common, and nothing else.
        like = [name for name in known if get_close_matches(base.split("_")[0], [name.split("_")[0]], cutoff=0.65)]
        raise UserError(
            f"unknown data set '{base}'{nearest(base, like)}; known are {', '.join(known)}; for a folder of your own, "
            "give --data FOLDER or define the set under DATASETS.CUSTOM"
        )
    DatasetCatalog.register(name, lambda: take(DatasetCatalog.get(base)))
    # Without json_file, dirname and the like: an evaluator would use the ground truth of the whole set.
    keep = ("thing_classes", "thing_dataset_id_to_contiguous_id", "thing_colors", "metrics")
    known = MetadataCatalog.get(base).as_dict()
    MetadataCatalog.get(name).set(evaluator_type="coco", **{key: known[key] for key in keep if key in known})
    return name


def get_records(name: str, skip_missing: bool = False) -> list[Record]:
    """Return the records of a data set or subset, newly read (see ``relvit_d2.data.detection.records``).

    With ``skip_missing``, images that are listed but missing are left out with a warning.

    Raises:
        UserError: the name is unknown, or the data are missing or damaged.
    """
    resolve(name)
    base, take = subset(name)
    try:
        if entry := _entry(base):
            return take(entry.records(skip_missing))
        records = DatasetCatalog.get(base)
    except OSError as error:
        raise UserError(
            f"data set '{name}' cannot be read: '{error.filename}' {(error.strerror or 'is missing').lower()}; "
            f"put it there (DETECTRON2_DATASETS is '{dataset_root()}')"
        ) from error
    paths = [Path(record["file_name"]) for record in records]
    found = set(existing_images(paths, f"data set '{base}'", skip_missing, DataRoot()))
    return take([record for record, path in zip(records, paths, strict=True) if path in found])


def readable_records(records: list[Record], skip: bool) -> list[Record]:
    """Return the records whose images have readable headers; see :func:`relvit_d2.data.images.folder.readable`."""
    kept = set(map(str, readable([Path(record["file_name"]) for record in records], skip)))
    return [record for record in records if str(Path(record["file_name"])) in kept]


def get_images(name: str, skip_missing: bool = False) -> list[ImageFile]:
    """Return the images of a data set, or of a source for :func:`relvit_d2.data.images.folder.unlabelled_images`.

    No label is needed. The name of a data set takes precedence over a folder of that name; ``./name`` is always a
    folder. ``[:8]`` and the like select a subset of either. Arguments are those of :func:`get_records`.

    Raises:
        UserError: the name is unknown, or the data are missing.
    """
    base, take = subset(name)
    if is_folder(name):
        return take(unlabelled_images(base))
    resolve(name)
    if (entry := _entry(base)) and without_seed(name)[1] is None:  # a random subset depends on the labels
        return take(entry.images(skip_missing))
    return [Path(record["file_name"]) for record in get_records(name, skip_missing)]


def is_folder(name: str) -> bool:
    """Whether :func:`get_images` reads ``name`` as a folder or another source of images, not as a data set."""
    base, _ = subset(name)
    known = base in DATASETS or base in _custom or base in DatasetCatalog
    return (
        (Path(name).is_dir() and (os.sep in name or not known))
        or os.sep in base
        or (not known and is_image_source(base))
    )


def get_metadata(name: str) -> Metadata:
    """Return Detectron2's metadata of a data set or subset: ``thing_classes``, ``metrics`` and more."""
    return MetadataCatalog.get(resolve(name))


def save_splits(names: Iterable[str], output: Path) -> None:
    """Write the image ids of those data sets whose split this project defines.

    They are written to ``splits/<name>.txt`` in ``output``, one per line, and in the user's cache if possible.
    For a subset, the ids of the whole set are written; folders are ignored.

    Raises:
        UserError: the data are missing or ``output`` cannot be written.
    """
    bases = {base for name in names for base in [subset(name)[0]] if base in DATASETS and DATASETS[base].project_split}
    for base in sorted(bases) if comm.is_main_process() else ():
        ids = "".join(f"{Path(str(path)).stem}\n" for path in get_images(base))
        _write_ids(output, base, ids)
        with suppress(OSError, UserError):
            _write_ids(cache_root(), base, ids)


def _write_ids(folder: Path, name: str, ids: str) -> None:
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    write_text(folder / "splits" / f"{name}.txt", ids)


_register_once = cache(register_all)


def _find(what: str, *locations: str) -> Path:
    """Return the first of ``locations`` under the data root that exists."""
    root = dataset_root()
    for path in (root / location for location in locations):
        if path.exists():
            if path.is_file():
                DataRoot().check_links([path])
            return path
    value = os.environ.get("DETECTRON2_DATASETS")
    state = f"is '{value}'" if value else f"is not set and defaults to {root.absolute()}"
    raise UserError(
        f"{what} is missing: put it at {' or '.join(f'$DETECTRON2_DATASETS/{x}' for x in locations)} "
        f"(DETECTRON2_DATASETS {state}), or run 'make demo' for an example without any download"
    )


_VOC_FOLDERS = ("VOC2007", "VOCdevkit/VOC2007")


def _voc_metadata(split: str) -> dict[str, Any]:
    # Detectron2's VOC evaluator opens the annotations itself.
    root = dataset_root()
    folder = next((root / x for x in _VOC_FOLDERS if (root / x).is_dir()), root / _VOC_FOLDERS[0])
    return {"evaluator_type": "pascal_voc", "dirname": str(folder), "year": 2007, "split": split}


def _svhn_folder(split: str) -> Path:
    return _find(f"SVHN's format 1, split {split},", f"svhn/{split}")


def _streets_folder(split: str) -> Path:
    return ensure_streets(streets_root()) / split


def streets_root() -> Path:
    """Return the folder for ``streets``: the data root, or the user's cache if the data root is not writable."""
    root = dataset_root()
    if (root / "streets").is_dir() or (
        os.environ.get("DETECTRON2_DATASETS") and root.is_dir() and os.access(root, os.W_OK)
    ):
        return root
    return cache_root()


def _kitti_folder() -> Path:
    return _find("KITTI's object detection set", "kitti/training", "kitti/object/training")


def _kitti_split(split: str, by_sequence: bool) -> list[str]:
    folder = _kitti_folder()
    ids = kitti_ids(folder)
    if not by_sequence:
        return random_split(ids)[split]
    parent = folder.parent.relative_to(dataset_root())
    mapping = _find(
        "the official mapping of KITTI's images to drives (devkit_object.zip: train_mapping.txt and train_rand.txt)",
        *(f"{parent}/{kit}mapping" for kit in ("", "devkit/", "devkit_object/")),
    )
    return sequence_split(ids, mapping)[split]


def _coco_metadata(split: str) -> dict[str, Any]:
    root = dataset_root() / "coco"
    return {
        **_get_builtin_metadata("coco"),
        "evaluator_type": "coco",
        "json_file": str(root / "annotations" / f"instances_{split}2017.json"),
        "image_root": str(root / f"{split}2017"),
    }


def _coco_records(split: str, skip_missing: bool) -> list[Record]:
    json_file = _find(f"COCO 2017's instances_{split}2017.json", f"coco/annotations/instances_{split}2017.json")
    return load_coco(json_file, dataset_root() / f"coco/{split}2017", skip_missing)


def _coco_images(split: str, skip_missing: bool) -> list[Path]:
    folder = _find(f"COCO 2017's image folder {split}2017", f"coco/{split}2017")
    json_file = dataset_root() / f"coco/annotations/instances_{split}2017.json"
    return coco_images(json_file, folder, skip_missing) if json_file.is_file() else list_images(folder)


def _voc_entry(split: str) -> DatasetEntry:
    return DatasetEntry(
        classes=tuple(VOC_CLASSES),
        records=lambda skip_missing: load_voc(
            _find("PASCAL VOC 2007", *_VOC_FOLDERS), split, VOC_CLASSES, skip_missing
        ),
        images=lambda skip_missing: voc_images(_find("PASCAL VOC 2007", *_VOC_FOLDERS), split, skip_missing),
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


def _kitti_entry(split: str, by_sequence: bool, classes: int) -> DatasetEntry:
    return DatasetEntry(
        classes=CLASS_SETS[classes],
        records=lambda _: load_kitti(_kitti_folder(), _kitti_split(split, by_sequence), CLASS_SETS[classes]),
        images=lambda _: kitti_images(_kitti_folder(), _kitti_split(split, by_sequence)),
        metrics=("coco", "kitti"),
        project_split=True,
    )


for _split in ("trainval", "train", "val", "test"):
    DATASETS.add(f"voc_2007_{_split}", _voc_entry(_split))
for _split in ("train", "val"):
    DATASETS.add(f"coco_2017_{_split}", _coco_entry(_split))
for _split in ("train", "test", "extra"):
    DATASETS.add(f"svhn_{_split}", _digits_entry(partial(_svhn_folder, _split)))
for _split in ("train", "test"):
    DATASETS.add(f"streets_{_split}", _digits_entry(partial(_streets_folder, _split)))
for _split, _kind, _count in product(("train", "val"), ("", "_sequences"), CLASS_SETS):
    _name = f"kitti_{_split}{_kind}" + ("" if _count == 7 else f"_{_count}")
    DATASETS.add(_name, _kitti_entry(_split, bool(_kind), _count))
