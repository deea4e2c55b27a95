"""The data sets by name: where they lie, how they are read, and their place in Detectron2's catalogs.

A name of Detectron2's own catalog that is not in ``DATASETS`` (a user's registration) is accepted everywhere too.
"""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.utils import comm

from relvit_d2.data.cache import cache_root
from relvit_d2.data.detection.coco import coco_images, load_coco
from relvit_d2.data.detection.kitti import CLASS_SETS, kitti_ids, kitti_images, load_kitti, random_split, sequence_split
from relvit_d2.data.detection.records import Record, existing
from relvit_d2.data.detection.streets import ensure_streets
from relvit_d2.data.detection.svhn import CLASS_NAMES as DIGITS
from relvit_d2.data.detection.svhn import load_svhn, svhn_images
from relvit_d2.data.detection.voc import load_voc, voc_images
from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.folder import is_source, list_images, unlabelled_images
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_text
from relvit_d2.utils.paths import dataset_root, refuse_links_out
from relvit_d2.utils.randomness import subset_order
from relvit_d2.utils.registry import Registry

_SUBSET = re.compile(r"(?P<base>.+)\[:(?P<amount>\d+(?:\.\d+)?)(?P<percent>%?)(?:@(?P<seed>\d+))?\]")


@dataclass(frozen=True)
class DatasetEntry:
    """One data set.

    Attributes:
        classes: names in the order of the category ids.
        records: reads the labelled images (see :mod:`relvit_d2.data.detection.records`); takes whether to leave out
            images that are listed but absent.
        images: lists the images in the records' order without reading a label; takes the same.
        metrics: how it is evaluated: ``"coco"``, ``"voc07"``, ``"kitti"``.
        metadata: what Detectron2's evaluators want to know beside ``thing_classes``.
        own_split: whether this project decides which images it holds (see :func:`keep_splits`).
    """

    classes: tuple[str, ...]
    records: Callable[[bool], list[Record]]
    images: Callable[[bool], list[Path]]
    metrics: tuple[str, ...] = ("coco",)
    metadata: Callable[[], dict[str, Any]] = lambda: {"evaluator_type": "coco"}
    own_split: bool = False


DATASETS: Registry[DatasetEntry] = Registry("data set")

_own: dict[str, DatasetEntry] = {}  # of the user, by name


def register_all() -> None:
    """Put every entry of ``DATASETS`` into Detectron2's catalogs, in place of what has its name there.

    Call it again after ``DETECTRON2_DATASETS`` changed.
    """
    for name in DATASETS:
        _publish(name, DATASETS[name])


def register_own(name: str, entry: DatasetEntry) -> None:
    """Make a data set of the user known for this process, in place of an earlier one of the user's of that name.

    Raises:
        UserError: the name is that of a set of the package, or cannot be told from a subset or a path.
    """
    if name in DATASETS or (name in DatasetCatalog and name not in _own):
        raise UserError(f"'{name}' is a data set already: give yours another name under DATASETS.CUSTOM")
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"'{name}' is no name for a data set: give letters, digits, _ and - under DATASETS.CUSTOM")
    _own[name] = entry
    _publish(name, entry)


def _publish(name: str, entry: DatasetEntry) -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    DatasetCatalog.register(name, partial(entry.records, False))
    MetadataCatalog.get(name).set(**{"thing_classes": list(entry.classes), **entry.metadata()}, metrics=entry.metrics)


def _entry(name: str) -> DatasetEntry | None:
    return DATASETS[name] if name in DATASETS else _own.get(name)


def resolve(name: str) -> str:
    """Return ``name`` once Detectron2's catalogs know it.

    ``NAME[:8]`` is the first 8 records of NAME in the reader's order, ``NAME[:10%]`` the first tenth (rounded down, one
    at least), and ``NAME[:10%@3]`` a tenth that the seed 3 draws (:func:`drawn`); such a set is registered under its
    full name when it is asked for.

    Raises:
        UserError: an unknown name, or a subset of nothing or of more than 100 percent.
    """
    _register_once()
    if name in DatasetCatalog:
        return name
    base, take = subset(name)
    if base not in DatasetCatalog:
        DATASETS[base]  # raises, with the nearest name
    DatasetCatalog.register(name, lambda: take(DatasetCatalog.get(base)))
    # Without json_file, dirname and the like: an evaluator would take the whole set for the truth.
    keep = ("thing_classes", "thing_dataset_id_to_contiguous_id", "thing_colors", "metrics")
    known = MetadataCatalog.get(base).as_dict()
    MetadataCatalog.get(name).set(evaluator_type="coco", **{key: known[key] for key in keep if key in known})
    return name


def get_records(name: str, skip_missing: bool = False) -> list[Record]:
    """Return the records of a data set or subset, freshly read (see ``relvit_d2.data.detection.records``).

    Args:
        name: of the data set.
        skip_missing: leave out images that are listed but absent, with a word in the log.

    Raises:
        UserError: an unknown name, or missing or damaged data.
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
    return take(_existing_records(records, f"data set '{base}'", skip_missing))


def get_images(name: str, skip_missing: bool = False) -> list[ImageFile]:
    """Return the images of a data set, or of what :func:`relvit_d2.data.images.folder.unlabelled_images` takes.

    No label is needed. The name of a data set goes before a folder of that name; ``./name`` is always a folder.
    ``[:8]`` and the like take a part of either. Arguments are those of :func:`get_records`.

    Raises:
        UserError: an unknown name, or missing data.
    """
    base, take = subset(name)
    if is_folder(name):
        return take(unlabelled_images(base))
    resolve(name)
    if (entry := _entry(base)) and without_seed(name)[1] is None:  # a drawn subset depends on the labels
        return take(entry.images(skip_missing))
    return [Path(record["file_name"]) for record in get_records(name, skip_missing)]


def is_folder(name: str) -> bool:
    """Whether :func:`get_images` takes ``name`` for a folder, or what else images come from, not for a data set."""
    base, _ = subset(name)
    known = base in DATASETS or base in _own or base in DatasetCatalog
    return (Path(name).is_dir() and (os.sep in name or not known)) or os.sep in base or (not known and is_source(base))


def _existing_records(records: list[Record], where: str, skip_missing: bool) -> list[Record]:
    found = set(existing([Path(record["file_name"]) for record in records], where, skip_missing))
    return [record for record in records if Path(record["file_name"]) in found]


def get_metadata(name: str) -> Metadata:
    """Return Detectron2's metadata of a data set or subset: ``thing_classes``, ``metrics`` and more.

    Raises:
        UserError: an unknown name.
    """
    return MetadataCatalog.get(resolve(name))


def keep_splits(names: Iterable[str], output: Path) -> None:
    """Write which images make up those of the data sets whose split is this project's.

    One id a line goes into ``splits/<name>.txt`` in ``output`` and, where that can be written, in the user's cache.

    Args:
        names: data sets and subsets (of which the whole set is told); others, and folders, are passed over.
        output: the run's folder.

    Raises:
        UserError: if the data are missing or ``output`` cannot be written.
    """
    bases = {base for name in names for base in [subset(name)[0]] if base in DATASETS and DATASETS[base].own_split}
    for base in sorted(bases) if comm.is_main_process() else ():
        ids = "".join(f"{Path(str(path)).stem}\n" for path in get_images(base))
        (output / "splits").mkdir(parents=True, exist_ok=True)
        write_text(output / "splits" / f"{base}.txt", ids)
        with suppress(OSError, UserError):
            (cache_root() / "splits").mkdir(parents=True, exist_ok=True)
            write_text(cache_root() / "splits" / f"{base}.txt", ids)


@cache
def _register_once() -> None:
    register_all()


def subset(name: str) -> tuple[str, Callable[[list], list]]:
    """Return the name without its ``[:...]`` and the function that takes that many from a list.

    A path that exists is a name as it is, brackets or not.
    """
    match = _SUBSET.fullmatch(name)
    if not match or os.path.exists(os.path.expanduser(name)):  # noqa: PTH110,PTH111  (False for what is not a path)
        return name, list
    amount, percent = float(match["amount"]), bool(match["percent"])
    if amount == 0 or (percent and amount > 100) or not (percent or amount.is_integer()):
        raise UserError(
            f"'{name}' is no subset: write {match['base']}[:8] for the first 8 images, "
            f"{match['base']}[:10%] for the first 10 percent"
        )

    def take(items: list) -> list:
        count = max(1, int(len(items) * amount / 100)) if percent else int(amount)
        return items[:count] if match["seed"] is None else drawn(items, count, int(match["seed"]))

    return match["base"], take


def without_seed(name: str) -> tuple[str, int | None]:
    """Return ``NAME[:10%]`` and 3 for ``NAME[:10%@3]``, and any other name with None."""
    match = _SUBSET.fullmatch(name)
    if not match or match["seed"] is None:
        return name, None
    return f"{match['base']}[:{match['amount']}{match['percent']}]", int(match["seed"])


def drawn(items: list, count: int, seed: int) -> list:
    """Return ``count`` of the items, which ``seed`` draws, in their order.

    A larger count adds to those of a smaller one. Of records the first ones drawn are images of each class, of that
    with the fewest images first, so that every class has an image if the count allows.

    Args:
        items: records, or anything else.
        count: how many.
        seed: at least 0.
    """
    order = subset_order(seed, len(items)).tolist()
    holders: dict[int, list[int]] = {}  # by class, in the drawn order
    for index in order:
        for label in classes_of(items[index]):
            holders.setdefault(label, []).append(index)
    first: dict[int, None] = {}
    for label in sorted(holders, key=lambda label: (len(holders[label]), label)):
        if not first.keys() & set(holders[label]):
            first[holders[label][0]] = None
    return [items[index] for index in sorted([*first, *(index for index in order if index not in first)][:count])]


def classes_of(item: Any) -> set[int]:
    """Return the classes of a record's objects, crowds and difficult objects not counted; none of anything else."""
    things = item.get("annotations", []) if isinstance(item, dict) else []
    return {thing["category_id"] for thing in things if not (thing.get("iscrowd") or thing.get("difficult"))}


def part_of(name: str, share: float) -> str:
    """Return the name of the first ``share``, 0..1, of a data set or subset, one image at least."""
    match = _SUBSET.fullmatch(name)
    seed = f"@{match['seed']}" if match and match["seed"] is not None else ""
    if match and not match["percent"]:
        return f"{match['base']}[:{max(int(float(match['amount']) * share), 1)}{seed}]"
    base, percent = (match["base"], float(match["amount"])) if match else (name, 100.0)
    return f"{base}[:{f'{percent * share:.6f}'.rstrip('0').rstrip('.')}%{seed}]"


def _find(what: str, *places: str) -> Path:
    """Return the first of ``places`` under the data root that exists."""
    root = dataset_root()
    for place in places:
        if (root / place).exists():
            if (root / place).is_file():
                refuse_links_out([root / place])
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
    return cache_root()


def _kitti_folder() -> Path:
    return _find("KITTI's object detection set", "kitti/training", "kitti/object/training")


def _kitti_split(split: str, by_sequence: bool) -> list[str]:
    folder = _kitti_folder()
    ids = kitti_ids(folder)
    if not by_sequence:
        return random_split(ids)[split]
    place = folder.parent.relative_to(dataset_root())
    mapping = _find(
        "the official mapping of KITTI's images to drives (devkit_object.zip: train_mapping.txt and train_rand.txt)",
        *(f"{place}/{kit}mapping" for kit in ("", "devkit/", "devkit_object/")),
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
    place = f"coco/annotations/instances_{split}2017.json"
    json_file = _find(f"COCO 2017's {Path(place).name}", place)
    return load_coco(json_file, dataset_root() / f"coco/{split}2017", skip_missing)


def _coco_images(split: str, skip_missing: bool) -> list[Path]:
    folder = _find(f"COCO 2017's image folder {split}2017", f"coco/{split}2017")
    json_file = dataset_root() / f"coco/annotations/instances_{split}2017.json"
    return coco_images(json_file, folder, skip_missing) if json_file.is_file() else list_images(folder)


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


def _kitti_entry(split: str, by_sequence: bool, classes: int) -> DatasetEntry:
    return DatasetEntry(
        classes=CLASS_SETS[classes],
        records=lambda _: load_kitti(_kitti_folder(), _kitti_split(split, by_sequence), CLASS_SETS[classes]),
        images=lambda _: kitti_images(_kitti_folder(), _kitti_split(split, by_sequence)),
        metrics=("coco", "kitti"),
        own_split=True,
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
