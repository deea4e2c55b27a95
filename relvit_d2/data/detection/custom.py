"""Custom data sets: the format of a folder is detected, and its splits are registered as data sets by name."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.coco import CocoFolder, without_categories
from relvit_d2.data.detection.huggingface import HUGGING_FACE
from relvit_d2.data.detection.label_programs import CVAT, LABEL_STUDIO, LABELME, TABLE
from relvit_d2.data.detection.records import Record, files_with, folders_below
from relvit_d2.data.detection.splits import ALL, HELD_OUT, available_splits, divide
from relvit_d2.data.detection.voc import VocFolder
from relvit_d2.data.detection.yolo import YoloFolder
from relvit_d2.data.images.folder import is_image_source, linked_folders, list_images
from relvit_d2.data.images.similarity import fingerprints
from relvit_d2.data.subsets import subset
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.paths import DataRoot
from relvit_d2.utils.printing import first_few

TRAINING_SPLITS = ("train", "trainval")
KEYS = ("ROOT", "FORMAT", "SPLIT", "CLASSES", "JSON", "IMAGES")

logger = logging.getLogger(__name__)

_opened: "dict[tuple[Path, str], tuple[str, LabelledFolder]]" = {}  # by folder and FORMAT, until sets are registered


class LabelledFolder(Protocol):
    """A folder in one of ``FORMATS``.

    ``metrics`` are the evaluators of its sets; ``sets`` are by split, a single one named ``all`` if the folder is not
    divided.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def sets(self) -> Mapping[str, Any]: ...  # noqa: D102

    def classes(self) -> tuple[str, ...]: ...  # noqa: D102

    def records(self, split: str, classes: Sequence[str], skip_missing: bool) -> list[Record]: ...  # noqa: D102

    def images(self, split: str, skip_missing: bool) -> list[Path]: ...  # noqa: D102


FORMATS: dict[str, Callable[[Path], LabelledFolder | None]] = {
    "coco": CocoFolder.find,
    "voc": VocFolder.find,
    "yolo": YoloFolder.find,
    "labelme": LABELME.open,
    "cvat": CVAT.open,
    "labelstudio": LABEL_STUDIO.open,
    "csv": TABLE.open,
    "huggingface": HUGGING_FACE.open,
}
"""Detects and opens a folder in each format, in the order in which they are tried."""

SIGNS = {
    **{"coco": "COCO .json", "voc": "VOC .xml files", "yolo": "YOLO .txt labels of images"},
    **{"labelme": "LabelMe .json", "cvat": "CVAT .xml", "labelstudio": "Label Studio .json"},
    **{"csv": ".csv with the columns filename, class, xmin, ymin, xmax, ymax"},
    **{"huggingface": "Hugging Face metadata or parquet files with bbox"},
}
"""The labels of each format, for messages."""


def detect_format(root: Path, form: str = "") -> tuple[str, LabelledFolder] | None:
    """Return the format of a folder and the opened folder, or None if it contains no labels.

    ``form`` is a name in ``FORMATS``; "" tries all.

    Raises:
        UserError: the folder is missing, a folder in it is a link out of it, or its labels are damaged.
    """
    _check_exists(root)
    if form and form not in FORMATS:
        raise UserError(f"FORMAT '{form}' is unknown: use {', '.join(FORMATS)}, or '' to detect it")
    try:
        DataRoot(root).check_links(linked_folders(root))
        for name in [form] if form else FORMATS:
            if found := FORMATS[name](root):
                _opened[root, form] = _opened[root, name] = name, found
                return name, found
    except OSError as error:
        raise UserError(
            f"'{error.filename or root}' cannot be read ({error.strerror}): check its permissions"
        ) from error
    return None


def open_folder(root: Path, form: str = "") -> tuple[str, LabelledFolder]:
    """Return the result of :func:`detect_format`.

    Raises:
        UserError: the folder is missing, or contains no labels in that format or in any.
    """
    if found := detect_format(root, form):
        return found
    missing = SIGNS[form] if form else ", ".join(SIGNS.values())
    near = "".join(f"; {reason}" for reason in near_misses(root))
    raise UserError(
        f"'{root}' contains no labels that can be read ({missing}): correct the path, see docs/custom_data.md{near}"
    )


def near_misses(root: Path) -> list[str]:
    """Return what may be the labels of a folder without readable labels, and why they are ignored."""
    reasons = []
    if files := without_categories(root):
        reasons.append(
            f"{first_few(files)} has images and annotations but no categories: list id and name of each class"
        )
    if tables := [path for folder in folders_below(root) for path in files_with(folder, ".csv")]:
        reasons.append(f"{first_few(tables)} lacks one of these columns or is not UTF-8 text")
    if links := linked_folders(root):
        reasons.append(f"links to folders are not followed ({first_few(links)}): put the folders themselves there")
    if not _has_images(root):
        reasons.append("it contains no images either: put them beside their labels")
    return reasons


def _has_images(root: Path) -> bool:
    try:
        return bool(list_images(root))
    except UserError:
        return False


def named_sets(data: str, form: str, folder: LabelledFolder) -> dict[str, dict[str, str]]:
    """Return the entries of ``DATASETS.CUSTOM`` for the sets of a folder, by name; see :func:`detect_format`."""
    stem = re.sub(r"\W+", "_", Path(data).expanduser().resolve().name).lower().strip("_") or "custom"
    splits = [split for split in available_splits(folder.sets) if split != ALL]
    if any(f"{stem}_{split}" in catalog.DATASETS for split in splits):
        stem = f"custom_{stem}"
    return {f"{stem}_{split}": {"ROOT": data, "FORMAT": form, "SPLIT": split} for split in splits}


def config_pairs(data: str | None, task: str) -> list[Any]:
    """Return the config's keys and values, alternating, for the option ``--data``.

    A folder NAME with labels becomes the sets NAME_train, NAME_val, ... under ``DATASETS.CUSTOM``. Training uses
    ``train``, evaluation ``val``, or ``test`` if there is no ``val``. The task ``pretrain`` accepts any other source of
    images too.

    Raises:
        UserError: no labels (or images) can be read.
    """
    if not data:
        return []
    root = Path(data).expanduser()
    try:
        form, folder = open_folder(root)
    except UserError as error:
        if not is_image_source(data):
            raise
        if task != "pretrain" and _has_images(root):
            raise UserError(f"{error}; relvit-d2 pretrain --data takes images without labels") from error
        if task != "pretrain":
            raise
        return ["DATASETS.TRAIN", (f"{root}/" if root.is_dir() else data,), "DATASETS.TEST", ()]
    custom = named_sets(data, form, folder)
    splits = {keys["SPLIT"]: name for name, keys in custom.items()}
    if ALL in folder.sets and len(folder.sets) > 1:
        logger.warning(f"images of '{root}' that are in none of the sets {', '.join(splits)} are left out")
    train = next((splits[split] for split in TRAINING_SPLITS if split in splits), None)
    if not train:
        raise UserError(
            f"'{root}' has the sets {', '.join(splits)}, of which none is for training: rename one to train, or select "
            "one under DATASETS.CUSTOM"
        )
    test = next((splits[split] for split in ("val", "test") if split in splits), None)
    return [
        *("DATASETS.CUSTOM", custom),
        *("DATASETS.TRAIN", (train,)),
        *("DATASETS.TEST", (test,) if test else ()),
    ]


def config_pairs_of_inputs(inputs: list[str]) -> list[Any]:
    """Return the config's keys and values, alternating, for data set names and folders; see :func:`config_pairs`.

    Raises:
        UserError: the sets of two folders have the same name.
    """
    custom: dict[str, dict[str, str]] = {}
    train: list[str] = []
    test: list[str] = []
    for name in inputs:
        root = Path(name).expanduser()
        found = detect_format(root) if root.is_dir() and catalog.is_folder(name) else None
        sets = named_sets(name, *found) if found else {}
        if "train" in (splits := [keys["SPLIT"] for keys in sets.values()]) and "trainval" in splits:
            sets = {split: keys for split, keys in sets.items() if keys["SPLIT"] != "trainval"}  # train and val again
        if common := custom.keys() & sets.keys():
            first = custom[min(common)]["ROOT"]
            raise UserError(f"'{first}' and '{name}' both contain the set {min(common)}: check them one by one")
        custom |= sets
        train += [split for split, keys in sets.items() if keys["SPLIT"] in TRAINING_SPLITS] if found else [name]
        test += [split for split, keys in sets.items() if keys["SPLIT"] not in TRAINING_SPLITS]
    return ["DATASETS.CUSTOM", custom, "DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test)]


def held_out_sets(keys: Mapping[str, Any]) -> list[str]:
    """Return ``TEST`` of the config node ``DATASETS``, and the other validation and test sets in ``CUSTOM``."""
    others = [name for name, entry in keys["CUSTOM"].items() if entry.get("SPLIT") in ("val", "test")]
    return list(dict.fromkeys((*keys["TEST"], *others)))


def register_custom(keys: Mapping[str, Any], labels: bool = True) -> None:
    """Register the sets of ``CUSTOM`` that ``TRAIN``, ``TEST`` or ``EXCLUDE`` contains.

    Args:
        keys: the config node ``DATASETS``; ``CUSTOM`` contains for each name ``ROOT``, and optionally ``FORMAT``,
            ``SPLIT``, ``CLASSES``, and for COCO ``JSON`` and ``IMAGES``.
        labels: whether the classes are needed, which requires reading the labels.

    Raises:
        UserError: a key is unknown or missing, or the labels cannot be read.
    """
    used = {subset(name)[0] for name in (*keys["TRAIN"], *keys["TEST"], *keys.get("EXCLUDE", ()))}
    try:
        _register_used(keys["CUSTOM"], used, labels)
    finally:
        _opened.clear()  # their files may change until the next call


def _register_used(custom: Mapping[str, Any], used: set[str], labels: bool) -> None:
    for name, entry in custom.items():
        where = f"DATASETS.CUSTOM.{name}"
        if not isinstance(entry, Mapping):
            raise UserError(f"{where} is {entry!r}: set ROOT: path/to/folder, and optionally {', '.join(KEYS[1:])}")
        for key, value in entry.items():
            if key not in KEYS:
                raise UserError(f"{where} has the unknown key '{key}': use {', '.join(KEYS)}{nearest(key, KEYS)}")
            if not isinstance(value, list | tuple if key == "CLASSES" else str):
                raise UserError(f"{where}.{key} is {value!r}: set it to {'a list' if key == 'CLASSES' else 'text'}")
        if not entry.get("ROOT"):
            raise UserError(f"{where} has no ROOT: set it to the folder of the data set")
        if name in used:
            _register(name, where, entry, labels)


def _register(name: str, where: str, keys: Mapping[str, Any], labels: bool) -> None:
    root = Path(keys["ROOT"]).expanduser()
    form, folder = _folder(root, where, keys)
    split = keys.get("SPLIT") or ALL
    splits = available_splits(folder.sets)
    if split not in splits:
        raise UserError(f"{where}.SPLIT '{split}' is not in '{root}', which has {', '.join(splits)}: use one of them")
    divided = split not in folder.sets
    stored = ALL if divided else split
    given = tuple(map(str, keys.get("CLASSES", ())))
    classes = given or (folder.classes() if labels else ())
    if labels and not classes:
        raise UserError(f"'{root}' has no objects, so no classes: label some, or set {where}.CLASSES")

    def part(items: list[Any], files: list[Path]) -> list[Any]:
        return divide(items, split, fingerprints(files), f"'{root}'") if divided else items

    def records(skip_missing: bool) -> list[Record]:
        stored_records = folder.records(stored, classes, skip_missing)
        return part(stored_records, [Path(record["file_name"]) for record in stored_records])

    def images(skip_missing: bool) -> list[Path]:
        files = folder.images(stored, skip_missing)
        return part(files, files)

    logger.info(
        f"data set '{name}': split {split} of '{root}', format {form}"
        + (f", divided by the digests of the images' pixels, one in {HELD_OUT} held out" if divided else "")
        + (f", classes {', '.join(classes)}" if labels else "")
    )
    catalog.register_custom(name, catalog.DatasetEntry(classes, records, images, folder.metrics))


def _folder(root: Path, where: str, keys: Mapping[str, Any]) -> tuple[str, LabelledFolder]:
    json_file, images = keys.get("JSON", ""), keys.get("IMAGES", "")
    if not json_file and not images:
        form = keys.get("FORMAT", "")
        return _opened.get((root, form)) or open_folder(root, form)
    if keys.get("FORMAT", "coco") not in ("", "coco"):
        raise UserError(
            f"{where} has JSON or IMAGES, which require FORMAT coco, and FORMAT {keys['FORMAT']}: remove one"
        )
    _check_exists(root)
    folder = CocoFolder.find(root, json_file, images)
    if not folder:
        raise UserError(f"'{root}' contains no COCO .json: set {where}.JSON")
    return "coco", folder


def _check_exists(root: Path) -> None:
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"the data folder '{root}' {problem}: correct the path")
