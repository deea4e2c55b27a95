"""The data of a comparison: which sets are trained, chosen and tested on, and the labelled subsets of each seed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from relvit_d2.data.classification.datasets import CLASS_SETS, list_class_sets
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import TRAINED_ON, find, named_sets, near_misses, register_own
from relvit_d2.data.detection.splits import split_of
from relvit_d2.utils.errors import UserError, nearest

SPLITS = (*TRAINED_ON, "val", "test")


@dataclass(frozen=True)
class ComparedData:
    """Names of data sets by their role.

    Attributes:
        source: what the user gave.
        task: ``detection`` or ``classification``.
        train: labelled training images; pre-training sees them all, without labels.
        validation: chooses the checkpoint; empty if there are only two sets, and the last model is tested then.
        test: tested on once.
        custom: ``DATASETS.CUSTOM`` for a folder with labels of objects.
    """

    source: str
    task: str
    train: str
    validation: str
    test: str
    custom: dict[str, dict[str, str]] = field(default_factory=dict)


def find_data(source: str) -> ComparedData:
    """Return the sets of a folder with labels of objects, of a folder of class folders, or of registered names.

    ``cifar10`` stands for the registered sets ``cifar10_train`` and ``cifar10_test``. A folder that is not divided is
    divided, equal and nearly equal images on one side.

    Raises:
        UserError: if there are no labels, or no set to train or to test on.
    """
    root = Path(source).expanduser()
    custom: dict[str, dict[str, str]] = {}
    if root.is_dir():
        root = root.resolve()
        if found := find(root):
            custom = named_sets(str(root), *found)
            task, sets = "detection", {keys["SPLIT"]: name for name, keys in custom.items()}
        else:
            task, sets = "classification", _class_folders(root)
    else:
        registered = {"classification": list(CLASS_SETS), "detection": list(catalog.DATASETS)}
        stems = {name.rpartition("_")[0] for names in registered.values() for name in names}
        if source not in stems:
            raise UserError(
                f"--data '{source}' is neither a folder nor the start of the names of registered sets, such as cifar10 "
                f"of cifar10_train and cifar10_test{nearest(source, sorted(stems))}"
            )
        task = next(task for task, names in registered.items() if any(f"{source}_{split}" in names for split in SPLITS))
        sets = {split: f"{source}_{split}" for split in SPLITS if f"{source}_{split}" in registered[task]}
    train = next((sets[split] for split in TRAINED_ON if split in sets), "")
    test = sets.get("test", sets.get("val", ""))
    if not train or not test:
        missing = "test or val" if train else "train"
        raise UserError(f"--data '{source}' has the sets {', '.join(sets)}: add one named {missing}")
    validation = sets["val"] if "val" in sets and sets["val"] != test else ""
    return ComparedData(source, task, train, validation, test, custom)


def _class_folders(root: Path) -> dict[str, str]:
    """Return the trees of classes in a folder by split; of one that is not divided, the parts that it is divided into.

    Raises:
        UserError: if it holds no folders.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    words = {path: split_of(path.name) for path in folders if re.fullmatch("[A-Za-z]+", path.name)}
    sets = {split: str(path) for path, split in words.items() if split}
    if not folders:
        near = "".join(f"; {reason}" for reason in near_misses(root))
        raise UserError(
            f"--data '{root}' holds neither labels of objects (COCO .json, VOC's .xml, YOLO's .txt) nor a folder of "
            f"images for each class: see docs/compare.md{near}"
        )
    whole = sets.get("train", str(root) if not sets else "")
    if len(sets) > 1 or not whole:
        return sets
    return {part: f"{whole}[{part}]" for part in ("train", "val")}


def subset_name(train: str, share: float, seed: int) -> str:
    """Return the name of the labelled images of a seed, ``share`` percent of ``train``."""
    return train if share == 100 else f"{train}[:{share:g}%@{seed}]"


def check_labels(data: ComparedData, cfg: CfgNode, shares: Sequence[float], seeds: int) -> dict[str, int]:
    """Read all labels, and refuse subsets without an example of a class, or that are equal for two seeds.

    Args:
        data: the sets.
        cfg: config of the training that is compared.
        shares: of the labels, percent.
        seeds: how many.

    Returns:
        The number of images of each set, by its name.

    Raises:
        UserError: if labels cannot be read, or for such a subset.
    """
    names = [name for name in (data.train, data.validation, data.test) if name]
    counts, classes = {}, []
    if data.task == "detection":
        register_own({"TRAIN": (data.train,), "TEST": names[1:], "CUSTOM": data.custom})
        records = {name: catalog.get_records(name, cfg.DATASETS.SKIP_MISSING) for name in names}
        counts = {name: len(found) for name, found in records.items()}
        items: list[Any] = records[data.train]
        labels = [catalog.classes_of(record) for record in items]
        classes = catalog.get_metadata(data.train).thing_classes
    else:
        sets = {n: list_class_sets("DATASETS", [n], cfg.DATASETS.DOWNLOAD, cfg.DATASETS.SYNSETS) for n in names}
        counts = {name: len(found) for name, found in sets.items()}
        whole = sets[data.train]
        labels, classes = [{label} for label in whole.labels.tolist()], list(whole.classes)
    all_classes = set().union(*labels)
    if len(all_classes) < 2 and data.task == "classification":
        raise UserError(f"--data '{data.source}' has images of one class only in {data.train}: add others")
    if not all_classes:
        raise UserError(f"--data '{data.source}' has no object in {data.train}: label some")
    for share in shares:
        drawn = []
        for seed in range(seeds):
            plain, _ = catalog.without_seed(name := subset_name(data.train, share, seed))
            if data.task == "detection":
                where = {id(item): place for place, item in enumerate(items)}
                chosen = [where[id(item)] for item in catalog.subset(name)[1](items)]
            else:
                chosen = catalog.subset(plain)[1](whole.in_turn(seed).tolist())
            left = all_classes - set().union(*(labels[place] for place in chosen))
            if left:
                raise UserError(
                    f"--labels {share:g}% are {len(chosen)} of the {len(labels)} images of {data.train}, which leaves "
                    f"the class '{classes[min(left)]}' without an example: give a larger share"
                )
            drawn.append(frozenset(chosen))
        if share < 100 and len(set(drawn)) < seeds:
            raise UserError(
                f"--seeds {seeds}: {len(drawn[0])} of the {len(labels)} images of {data.train} (--labels {share:g}%) "
                f"give only {len(set(drawn))} different subsets for so many seeds: give fewer seeds or another share"
            )
    return counts
