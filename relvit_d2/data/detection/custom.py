"""A user's own data without code: what lies in a folder is told by looking, its sets become data sets by name."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.coco import CocoFolder, without_categories
from relvit_d2.data.detection.records import Record, first_few
from relvit_d2.data.detection.splits import ALL, HELD_OUT, divide, offered
from relvit_d2.data.detection.voc import VocFolder
from relvit_d2.data.detection.yolo import YoloFolder
from relvit_d2.data.images.folder import is_source, linked_folders
from relvit_d2.data.images.similarity import fingerprints
from relvit_d2.utils.errors import UserError, nearest
from relvit_d2.utils.paths import refuse_links_out

TRAINED_ON = ("train", "trainval")
KEYS = ("ROOT", "FORMAT", "SPLIT", "CLASSES", "JSON", "IMAGES")

logger = logging.getLogger(__name__)


class LabelledFolder(Protocol):
    """What a format makes of a folder; see its members in ``coco.py``, ``voc.py`` and ``yolo.py``.

    ``metrics`` is how its sets are evaluated; ``sets`` are by the name of the split, one called all where a folder is
    not divided.
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
}
"""How a folder is looked at, in the order in which that is tried."""


def find(root: Path, form: str = "") -> tuple[str, LabelledFolder] | None:
    """Return the format of a folder, and the folder in it, or None if nothing in it is labelled.

    Args:
        root: the folder.
        form: a name in ``FORMATS``; "" tries them all.

    Raises:
        UserError: the folder is missing, a folder in it is a link to elsewhere, or labels in it are damaged.
    """
    if not root.is_dir():
        raise UserError(f"the data folder '{root}' does not exist: correct the path")
    if form and form not in FORMATS:
        raise UserError(f"FORMAT '{form}' is unknown; give {', '.join(FORMATS)}, or '' to look")
    try:
        refuse_links_out(linked_folders(root), root)
        for name in [form] if form else FORMATS:
            if found := FORMATS[name](root):
                return name, found
    except OSError as error:
        raise UserError(f"'{error.filename or root}' cannot be read ({error.strerror}): see who may read it") from error
    return None


def look(root: Path, form: str = "") -> tuple[str, LabelledFolder]:
    """Return what :func:`find` does.

    Raises:
        UserError: the folder is missing, or nothing in it is in that format, or in any.
    """
    if found := find(root, form):
        return found
    signs = {"coco": "COCO .json", "voc": "VOC's .xml files", "yolo": "YOLO's .txt labels of images"}
    missing = signs[form] if form else ", ".join(signs.values())
    near = "".join(f"; {reason}" for reason in near_misses(root))
    raise UserError(
        f"'{root}' holds no labels that can be read ({missing}): correct the path, see docs/own_data.md{near}"
    )


def near_misses(root: Path) -> list[str]:
    """Return what may be the labels of a folder in which :func:`find` finds none, and why they are not read."""
    reasons = []
    if files := without_categories(root):
        reasons.append(
            f"{first_few(files)} has images and annotations but no categories: list id and name of each class"
        )
    if links := linked_folders(root):
        reasons.append(
            f"links to folders are not followed, such as {first_few(links)}: put the folders themselves there"
        )
    return reasons


def _whole(form: str) -> Callable[[Path], list[Record]]:
    def read(root: Path) -> list[Record]:
        folder = look(root, form)[1]
        classes = folder.classes()
        return [record for split in folder.sets for record in folder.records(split, classes, False)]

    return read


READERS: dict[str, Callable[[Path], list[Record]]] = {form: _whole(form) for form in FORMATS}
"""Every set of a folder, one after the other, by format."""


def named_sets(data: str, form: str, folder: LabelledFolder) -> dict[str, dict[str, str]]:
    """Return what ``DATASETS.CUSTOM`` says of the sets of a folder, by the names that they get; see :func:`find`."""
    stem = re.sub(r"\W+", "_", Path(data).expanduser().resolve().name).lower().strip("_") or "own"
    splits = [split for split in offered(folder.sets) if split != ALL]
    if any(f"{stem}_{split}" in catalog.DATASETS for split in splits):
        stem = f"own_{stem}"
    return {f"{stem}_{split}": {"ROOT": data, "FORMAT": form, "SPLIT": split} for split in splits}


def config_pairs(data: str | None, task: str) -> list[Any]:
    """Return the config's keys and values, in turn, that ``--data`` stands for.

    A folder with labels becomes the sets NAME_train and so on under ``DATASETS.CUSTOM``, NAME being its own. Training
    takes ``train``, evaluation ``val``, or ``test`` where there is no ``val``. For the task ``pretrain`` anything else
    that holds images is allowed too.

    Raises:
        UserError: there is nothing that can be read.
    """
    if not data:
        return []
    root = Path(data).expanduser()
    try:
        form, folder = look(root)
    except UserError:
        if task != "pretrain" or not is_source(data):
            raise
        return ["DATASETS.TRAIN", (f"{root}/" if root.is_dir() else data,), "DATASETS.TEST", ()]
    custom = named_sets(data, form, folder)
    splits = {keys["SPLIT"]: name for name, keys in custom.items()}
    train = next((splits[split] for split in TRAINED_ON if split in splits), None)
    if not train:
        raise UserError(
            f"'{root}' has the sets {', '.join(splits)}, of which none is for training: name one train, or say which "
            "under DATASETS.CUSTOM"
        )
    test = next((splits[split] for split in ("val", "test") if split in splits), None)
    return [
        *("DATASETS.CUSTOM", custom),
        *("DATASETS.TRAIN", (train,)),
        *("DATASETS.TEST", (test,) if test else ()),
    ]


def config_words(words: list[str]) -> list[Any]:
    """Return the config's keys and values, in turn, for names and folders; a folder with labels becomes its sets.

    Raises:
        UserError: if two folders' sets would have one name.
    """
    custom: dict[str, dict[str, str]] = {}
    train: list[str] = []
    test: list[str] = []
    for word in words:
        root = Path(word).expanduser()
        found = find(root) if root.is_dir() and catalog.is_folder(word) else None
        sets = named_sets(word, *found) if found else {}
        if twice := custom.keys() & sets.keys():
            first = custom[min(twice)]["ROOT"]
            raise UserError(f"'{first}' and '{word}' both hold the set {min(twice)}: check them one by one")
        custom |= sets
        train += [name for name, keys in sets.items() if keys["SPLIT"] in TRAINED_ON] if found else [word]
        test += [name for name, keys in sets.items() if keys["SPLIT"] not in TRAINED_ON]
    return ["DATASETS.CUSTOM", custom, "DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test)]


def register_own(keys: Mapping[str, Any], labels: bool = True) -> None:
    """Make the sets of ``CUSTOM`` that ``TRAIN``, ``TEST`` or ``EXCLUDE`` names known by their names.

    Args:
        keys: the config node ``DATASETS``; ``CUSTOM`` holds for each name ``ROOT``, and where wanted ``FORMAT``,
            ``SPLIT``, ``CLASSES``, and for COCO ``JSON`` and ``IMAGES``.
        labels: whether the classes are wanted, which takes reading the labels.

    Raises:
        UserError: a key is unknown or missing, or there is nothing that can be read.
    """
    wanted = [*keys["TRAIN"], *keys["TEST"], *keys.get("EXCLUDE", ())]
    for name, own in keys["CUSTOM"].items():
        where = f"DATASETS.CUSTOM.{name}"
        if not isinstance(own, Mapping):
            raise UserError(f"{where} is {own!r}: give ROOT: path/to/folder, and where wanted {', '.join(KEYS[1:])}")
        for key, value in own.items():
            if key not in KEYS:
                raise UserError(f"{where} has the key '{key}'; known are {', '.join(KEYS)}{nearest(key, KEYS)}")
            if not isinstance(value, list | tuple if key == "CLASSES" else str):
                raise UserError(f"{where}.{key} is {value!r}: give {'a list' if key == 'CLASSES' else 'text'}")
        if not own.get("ROOT"):
            raise UserError(f"{where} has no ROOT: give the folder of the data set")
        if any(name == catalog.subset(full)[0] for full in wanted):
            _register(name, where, own, labels)


def _register(name: str, where: str, keys: Mapping[str, Any], labels: bool) -> None:
    root = Path(keys["ROOT"]).expanduser()
    form, folder = _folder(root, where, keys)
    split = keys.get("SPLIT") or ALL
    if split not in offered(folder.sets):
        raise UserError(
            f"{where}.SPLIT '{split}' is not in '{root}', which has {', '.join(offered(folder.sets))}: give one of them"
        )
    whole = split not in folder.sets
    stored = ALL if whole else split
    given = tuple(map(str, keys.get("CLASSES", ())))
    classes = given or (folder.classes() if labels else ())
    if labels and not classes:
        raise UserError(f"'{root}' has no objects, so no classes: label some, or name them under {where}.CLASSES")

    def part(items: list[Any], file: Callable[[Any], Path]) -> list[Any]:
        if not whole:
            return items
        return divide(items, split, fingerprints([file(item) for item in items], root), f"'{root}'")

    def records(skip_missing: bool) -> list[Record]:
        return part(folder.records(stored, classes, skip_missing), lambda record: Path(record["file_name"]))

    def images(skip_missing: bool) -> list[Path]:
        return part(folder.images(stored, skip_missing), Path)

    logger.info(
        f"data set '{name}': split {split} of '{root}', format {form}"
        + (f", divided by the digests of the images' pixels, one in {HELD_OUT} held out" if whole else "")
        + (f", classes {', '.join(classes)}" if labels else "")
    )
    catalog.register_own(name, catalog.DatasetEntry(classes, records, images, folder.metrics))


def _folder(root: Path, where: str, keys: Mapping[str, Any]) -> tuple[str, LabelledFolder]:
    json_file, images = keys.get("JSON", ""), keys.get("IMAGES", "")
    if not json_file and not images:
        return look(root, keys.get("FORMAT", ""))
    if keys.get("FORMAT", "coco") not in ("", "coco"):
        raise UserError(f"{where} has JSON or IMAGES, which are COCO's, and FORMAT {keys['FORMAT']}: leave one out")
    if not root.is_dir():
        raise UserError(f"the data folder '{root}' does not exist: correct the path")
    folder = CocoFolder.find(root, json_file, images)
    if not folder:
        raise UserError(f"'{root}' holds no COCO .json: name it under {where}.JSON")
    return "coco", folder
