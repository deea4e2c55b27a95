"""Classification data sets by name: their location and their reader.

``torchvision`` downloads the sets that it supports (``DATASETS.DOWNLOAD``) and checks their files; the others are
folders with a folder for each class.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, Flowers102

from relvit_d2.data.classification.division import split
from relvit_d2.data.classification.image_folder import LabelledImages, archive_of, concatenate, read_tree
from relvit_d2.data.classification.imagenet100 import synsets
from relvit_d2.data.detection.splits import HELD_OUT, SEED
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.data.subsets import subset, without_seed
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import dataset_root
from relvit_d2.utils.processes import first_process_first
from relvit_d2.utils.registry import Registry

Reader = Callable[[bool, str], LabelledImages]
"""Reads a data set; arguments: whether it may be downloaded, and ``DATASETS.SYNSETS``."""

CLASS_SETS: Registry[Reader] = Registry("classification set")

_JPEG_NOTE = (
    "JPEG copies of CIFAR-10's images, which differ from the official pixels by 5.9 gray levels on average (600 images)"
)


def is_class_set(name: str) -> bool:
    """Whether ``name``, which may be a subset, is a classification set or a path into an archive."""
    base, _ = subset(name)
    return base in CLASS_SETS or bool(_folder_and_part(base)[1]) or archive_of(Path(base).expanduser()) is not None


def get_class_set(
    name: str, download: bool = False, synset_file: str = "", skip_unreadable: bool = True
) -> LabelledImages:
    """Return a set of ``CLASS_SETS``, or a folder of class folders, which may be inside an archive.

    ``NAME[:500]`` and ``NAME[:10%]`` are subsets with equally many images of each class, up to one; ``NAME[:10%@3]`` is
    a random one with seed 3. ``PATH[train]`` and ``PATH[val]`` are the parts of a folder without splits: one image in
    five is in ``val``, duplicates and near-duplicates are in the same part.

    Args:
        download: whether the files may be downloaded.
        synset_file: see :func:`relvit_d2.data.classification.imagenet100.synsets`.
        skip_unreadable: leave out images with unreadable headers, instead of an error.

    Raises:
        UserError: the name is unknown, or the data are missing or damaged.
    """
    return _listed(name, download, synset_file).readable(skip_unreadable).decoded(skip_unreadable)


def _listed(name: str, download: bool, synset_file: str) -> LabelledImages:
    plain, seed = without_seed(name)
    base, select = subset(plain)
    folder, part = _folder_and_part(base)
    if base in CLASS_SETS:
        whole = CLASS_SETS[base](download, synset_file)
    elif "/" in folder or Path(folder).exists():
        path = Path(folder).expanduser()
        whole = read_tree(path, name=base if part else "", note=_JPEG_NOTE if _is_jpeg_cifar(path) else "")
        if part:
            whole = split(whole, 1 / HELD_OUT, SEED)[part == "val"]
    else:
        whole = CLASS_SETS[base](download, synset_file)  # raises, with the nearest name
    order = whole.class_interleaved(seed)
    chosen = select(order.tolist())
    return whole if len(chosen) == len(whole) else whole.take(torch.tensor(chosen))


def _folder_and_part(base: str) -> tuple[str, str]:
    """Split ``PATH[train]`` or ``PATH[val]`` into the path and ``train`` or ``val``; return any other name with ""."""
    match = re.fullmatch(r"(.+)\[(train|val)\]", base)
    return (match[1], match[2]) if match and not Path(base).exists() else (base, "")


def list_class_sets(key: str, names: Sequence[str], download: bool = False, synset_file: str = "") -> LabelledImages:
    """Return the concatenated images of several sets, files not decoded; only the main process downloads.

    Args:
        key: the config key with the names, for the message.
        names, download, synset_file: see :func:`get_class_set`.
    """
    if not names:
        raise UserError(
            f"{key} is empty: set it to a data set, such as ('cifar10_train',), or a folder with a folder per class"
        )
    with first_process_first() if download else nullcontext():
        sets = [_listed(name, download, synset_file) for name in names]
    if len({isinstance(part.images, ImageStack) for part in sets}) > 1:
        sets = [part.decoded() for part in sets]  # pixels and files cannot be concatenated
    return concatenate(sets)


def _checked(what: str, place: Path, download: bool, make: Callable[[], Any]) -> Any:
    """Make one of torchvision's data sets, which compares checksums before it reads; errors as one sentence."""
    if not (place.exists() or download):
        raise UserError(f"{what} is missing: put it at {place} (DETECTRON2_DATASETS), or set DATASETS.DOWNLOAD True")
    try:
        return make()
    except RuntimeError as error:
        raise UserError(
            f"{what} at '{place}' is damaged, a file is missing or its checksum is wrong: delete it and set "
            "DATASETS.DOWNLOAD True"
        ) from error
    except OSError as error:
        raise UserError(f"{what} could not be downloaded to '{place}' ({error}): put it there yourself") from error


def _stack(name: str, pixels: np.ndarray, labels: Any, classes: Sequence[str]) -> LabelledImages:
    """Create a data set from ``(n, 3, h, w)`` pixels."""
    return LabelledImages(
        name, ImageStack(torch.from_numpy(np.ascontiguousarray(pixels)), name), _labels(labels), tuple(classes)
    )


def _labels(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values).astype(np.int64).reshape(-1))


def _is_jpeg_cifar(path: Path) -> bool:
    found = archive_of(path)
    return found is not None and found[0].name == "cifar10_jpg.tar.gz"


def _cifar(kind: type[CIFAR10], split: str, download: bool, _: str) -> LabelledImages:
    root, name = dataset_root(), f"{kind.__name__.lower()}_{split}"
    place, copies = root / kind.base_folder, root / "cifar10_jpg.tar.gz"
    if kind is CIFAR10 and copies.is_file() and not place.exists() and not download:
        return read_tree(copies / split, name=name, note=_JPEG_NOTE)
    found = _checked(kind.__name__, place, download, lambda: kind(str(root), split == "train", download=download))
    return _stack(name, found.data.transpose(0, 3, 1, 2), found.targets, found.classes)


def _svhn(split: str, download: bool, _: str) -> LabelledImages:
    root = dataset_root() / "svhn"
    place = root / f"{split}_32x32.mat"
    found = _checked("SVHN's cropped digits", place, download, lambda: SVHN(str(root), split, download=download))
    return _stack(f"svhn_digits_{split}", found.data, found.labels, [str(i) for i in range(10)])


def _flowers(split: str, download: bool, _: str) -> LabelledImages:
    root, name = dataset_root(), f"flower102_{split}"
    place = root / "flowers-102"
    found = _checked("Flower-102", place, download, lambda: Flowers102(str(root), split, download=download))
    return LabelledImages(name, found._image_files, _labels(found._labels), tuple(str(i) for i in range(1, 103)))


def _tiny(split: str, download: bool, _: str) -> LabelledImages:
    root, name = _extracted("Tiny-ImageNet", "tiny-imagenet-200"), f"tiny_imagenet_{split}"
    classes = (root / "wnids.txt").read_text(encoding="utf-8").split()
    if split == "train":
        return read_tree(root / "train", classes, name)
    rows = [
        line.split("\t")[:2]
        for line in (root / "val/val_annotations.txt").read_text(encoding="utf-8").splitlines()
        if line
    ]
    number = {synset: label for label, synset in enumerate(classes)}
    labels = torch.tensor([number.get(synset, -1) for _, synset in rows])
    return LabelledImages(name, [root / "val/images" / file for file, _ in rows], labels, tuple(classes))


def _imagenet(split: str, hundred: bool, download: bool, synset_file: str) -> LabelledImages:
    root = _extracted("ImageNet", "imagenet")
    name = f"imagenet{'100' if hundred else ''}_{split}"
    return read_tree(root / split, synsets(synset_file) if hundred else None, name)


def _extracted(what: str, name: str) -> Path:
    """Return a folder under the data root that cannot be downloaded automatically."""
    root = dataset_root() / name
    if not root.is_dir():
        raise UserError(f"{what} is missing: put it, extracted, at {root} (DETECTRON2_DATASETS)")
    return root


for _split in ("train", "test"):
    CLASS_SETS.add(f"cifar10_{_split}", partial(_cifar, CIFAR10, _split))
    CLASS_SETS.add(f"cifar100_{_split}", partial(_cifar, CIFAR100, _split))
for _split in ("train", "test", "extra"):
    CLASS_SETS.add(f"svhn_digits_{_split}", partial(_svhn, _split))
for _split in ("train", "val", "test"):
    CLASS_SETS.add(f"flower102_{_split}", partial(_flowers, _split))
for _split in ("train", "val"):
    CLASS_SETS.add(f"tiny_imagenet_{_split}", partial(_tiny, _split))
    CLASS_SETS.add(f"imagenet100_{_split}", partial(_imagenet, _split, True))
    CLASS_SETS.add(f"imagenet_{_split}", partial(_imagenet, _split, False))
