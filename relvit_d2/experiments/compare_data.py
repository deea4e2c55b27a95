"""The data of a comparison: training, validation and test set, and the labelled subsets of each seed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from relvit_d2.data.classification.datasets import CLASS_SETS, list_class_sets
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import TRAINING_SPLITS, detect_format, named_sets, near_misses, register_custom
from relvit_d2.data.detection.splits import split_of
from relvit_d2.data.subsets import classes_of, subset, without_seed
from relvit_d2.utils.errors import UserError, nearest

SPLITS = (*TRAINING_SPLITS, "val", "test")


@dataclass(frozen=True)
class ComparedData:
    """The data sets of a comparison, by name.

    Attributes:
        source: the value of ``--data``.
        task: ``detection`` or ``classification``.
        train: the training set; pre-training uses all its images without labels.
        validation: the set on which the checkpoint is selected; empty: the last model is tested.
        test: the test set.
        custom: ``DATASETS.CUSTOM`` of a folder with annotated objects.
    """

    source: str
    task: str
    train: str
    validation: str
    test: str
    custom: dict[str, dict[str, str]] = field(default_factory=dict)


def find_data(source: str) -> ComparedData:
    """Return the data sets of a folder with annotated objects, a folder of class folders, or registered names.

    ``cifar10`` is the prefix of the registered sets ``cifar10_train`` and ``cifar10_test``. A folder without splits is
    divided, with duplicates and near-duplicates in the same part.

    Raises:
        UserError: there are no labels, or there is no training or test set.
    """
    root = Path(source).expanduser()
    custom: dict[str, dict[str, str]] = {}
    if root.is_dir():
        root = root.resolve()
        if found := detect_format(root):
            custom = named_sets(str(root), *found)
            task, sets = "detection", {keys["SPLIT"]: name for name, keys in custom.items()}
        else:
            task, sets = "classification", _class_folders(root)
    else:
        registered = {"classification": list(CLASS_SETS), "detection": list(catalog.DATASETS)}
        prefixes = {name.rpartition("_")[0] for names in registered.values() for name in names}
        if source not in prefixes:
            raise UserError(
                f"--data '{source}' is neither a folder nor the prefix of registered data sets, such as cifar10 of "
                f"cifar10_train and cifar10_test{nearest(source, sorted(prefixes))}"
            )
        task = next(task for task, names in registered.items() if any(f"{source}_{split}" in names for split in SPLITS))
        sets = {split: f"{source}_{split}" for split in SPLITS if f"{source}_{split}" in registered[task]}
    train = next((sets[split] for split in TRAINING_SPLITS if split in sets), "")
    test = sets.get("test", sets.get("val", ""))
    if not train or not test:
        missing = "test or val" if train else "train"
        raise UserError(f"--data '{source}' has the sets {', '.join(sets)}: add a set named {missing}")
    validation = sets["val"] if "val" in sets and sets["val"] != test else ""
    return ComparedData(source, task, train, validation, test, custom)


def _class_folders(root: Path) -> dict[str, str]:
    """Return the names of the training, validation and test set of a folder of class folders, by split."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = {path: split_of(path.name) for path in folders if re.fullmatch("[A-Za-z]+", path.name)}
    sets = {split: str(path) for path, split in splits.items() if split}
    if not folders:
        near = "".join(f"; {reason}" for reason in near_misses(root))
        raise UserError(
            f"--data '{root}' has neither annotated objects (COCO .json, VOC .xml, YOLO .txt) nor a folder of images "
            f"for each class: see docs/compare.md{near}"
        )
    whole = sets.get("train", str(root) if not sets else "")
    if len(sets) > 1 or not whole:
        return sets
    return {part: f"{whole}[{part}]" for part in ("train", "val")}


def labelled_subset(train: str, share: float, seed: int) -> str:
    """Return the name of the labelled subset of a seed, ``share`` percent of ``train``."""
    return train if share == 100 else f"{train}[:{share:g}%@{seed}]"


def check_labels(data: ComparedData, cfg: CfgNode, shares: Sequence[float], seeds: int) -> dict[str, int]:
    """Read all labels; refuse labelled subsets that lack a class or are equal for two seeds.

    Args:
        cfg: config of the training.
        shares: percentages of labelled images.
        seeds: number of seeds.

    Returns:
        The number of images by data set name.

    Raises:
        UserError: labels cannot be read, or a subset is refused.
    """
    names = [name for name in (data.train, data.validation, data.test) if name]
    counts, classes = {}, []
    if data.task == "detection":
        register_custom({"TRAIN": (data.train,), "TEST": names[1:], "CUSTOM": data.custom})
        records = {name: catalog.get_records(name, cfg.DATASETS.SKIP_MISSING) for name in names}
        counts = {name: len(found) for name, found in records.items()}
        items: list[Any] = records[data.train]
        labels = [classes_of(record) for record in items]
        classes = catalog.get_metadata(data.train).thing_classes
    else:
        sets = {n: list_class_sets("DATASETS", [n], cfg.DATASETS.DOWNLOAD, cfg.DATASETS.SYNSETS) for n in names}
        counts = {name: len(found) for name, found in sets.items()}
        whole = sets[data.train]
        labels, classes = [{label} for label in whole.labels.tolist()], list(whole.classes)
    all_classes = set().union(*labels)
    if len(all_classes) < 2 and data.task == "classification":
        raise UserError(
            f"--data '{data.source}' has images of one class only in {data.train}: add images of another class"
        )
    if not all_classes:
        raise UserError(f"--data '{data.source}' has no annotated object in {data.train}: annotate its images")
    for share in shares:
        subsets = []
        for seed in range(seeds):
            plain, _ = without_seed(name := labelled_subset(data.train, share, seed))
            if data.task == "detection":
                index = {id(item): i for i, item in enumerate(items)}
                chosen = [index[id(item)] for item in subset(name)[1](items)]
            else:
                chosen = subset(plain)[1](whole.class_interleaved(seed).tolist())
            absent = all_classes - set().union(*(labels[i] for i in chosen))
            if absent:
                raise UserError(
                    f"--labels {share:g}% selects {len(chosen)} of the {len(labels)} images of {data.train}, which "
                    f"leaves the class '{classes[min(absent)]}' without an example: give a larger share"
                )
            subsets.append(frozenset(chosen))
        if share < 100 and len(set(subsets)) < seeds:
            raise UserError(
                f"--seeds {seeds} with --labels {share:g}%: {len(subsets[0])} of the {len(labels)} images of "
                f"{data.train} give only {len(set(subsets))} different subsets; give fewer seeds or another share"
            )
    return counts
