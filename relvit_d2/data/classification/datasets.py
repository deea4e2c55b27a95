"""The classification sets by name: where they lie and how they are read.

``torchvision`` downloads what it knows (``DATASETS.DOWNLOAD``) and checks its files; the rest lies in folders, one a
class.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, Flowers102

from relvit_d2.data.classification.division import split
from relvit_d2.data.classification.image_folder import LabelledImages, archive_of, read_tree, together
from relvit_d2.data.classification.imagenet100 import synsets
from relvit_d2.data.detection.catalog import dataset_root, subset, without_seed
from relvit_d2.data.detection.splits import HELD_OUT, SEED
from relvit_d2.data.images.batches import ImageStack
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.registry import Registry

Reader = Callable[[bool, str], LabelledImages]
"""Reads a set: whether it may be downloaded, and ``DATASETS.SYNSETS``."""

CLASS_SETS: Registry[Reader] = Registry("classification set")

_JPEG_NOTE = (
    "JPEG copies of CIFAR-10's images, 5.9 grey levels from the official pixels in the mean (of 600 images compared)"
)


def is_class_set(name: str) -> bool:
    """Whether ``name``, or what it is a subset of, is a classification set or lies in an archive."""
    base, _ = subset(name)
    return base in CLASS_SETS or bool(_part(base)[1]) or archive_of(Path(base).expanduser()) is not None


def get_class_set(name: str, download: bool = False, synset_file: str = "") -> LabelledImages:
    """Return a set of ``CLASS_SETS``, or a tree of classes by its path, which may lead into an archive.

    ``NAME[:500]`` and ``NAME[:10%]`` take that many of its images, and of the classes in turn; ``NAME[:10%@3]`` takes
    those of each class in an order that the seed 3 draws. ``PATH[train]`` and ``PATH[val]`` are the parts of a tree
    that is not divided: one image in five is in the second, equal and nearly equal ones on one side.

    Args:
        name: the name or the path.
        download: whether the files may be downloaded.
        synset_file: see :func:`relvit_d2.data.classification.imagenet100.synsets`.

    Raises:
        UserError: for an unknown name, or missing or damaged data.
    """
    return _listed(name, download, synset_file).decoded()


def _listed(name: str, download: bool, synset_file: str) -> LabelledImages:
    plain, seed = without_seed(name)
    base, some = subset(plain)
    place, part = _part(base)
    if base in CLASS_SETS:
        whole = CLASS_SETS[base](download, synset_file)
    elif "/" in place or Path(place).exists():
        path = Path(place).expanduser()
        whole = read_tree(path, name=base if part else "", note=_JPEG_NOTE if _is_jpeg_cifar(path) else "")
        if part:
            whole = split(whole, 1 / HELD_OUT, SEED)[part == "val"]
    else:
        whole = CLASS_SETS[base](download, synset_file)  # raises, with the nearest name
    order = whole.in_turn(seed)
    chosen = some(order.tolist())
    return whole if len(chosen) == len(whole) else whole.take(torch.tensor(chosen))


def _part(base: str) -> tuple[str, str]:
    """Return a path and ``train`` or ``val`` for ``PATH[train]`` or ``PATH[val]``, else ``base`` and ""."""
    match = re.fullmatch(r"(.+)\[(train|val)\]", base)
    return (match[1], match[2]) if match and not Path(base).exists() else (base, "")


def list_class_sets(key: str, names: Sequence[str], download: bool = False, synset_file: str = "") -> LabelledImages:
    """Return the images of several sets together, those in files not decoded; of several processes one downloads.

    Args:
        key: the config key that names them, for the message.
        names, download, synset_file: see :func:`get_class_set`.

    Raises:
        UserError: if there are none, or as :func:`get_class_set`.
    """
    if not names:
        raise UserError(f"{key} is empty; name a set, such as ('cifar10_train',), or a folder with a folder a class")
    if download and not comm.is_main_process():
        comm.synchronize()
    sets = [_listed(name, download, synset_file) for name in names]
    if download and comm.is_main_process():
        comm.synchronize()
    if len({isinstance(part.images, ImageStack) for part in sets}) > 1:
        sets = [part.decoded() for part in sets]  # pixels and files do not make one sequence
    return together(sets)


def get_class_sets(key: str, names: Sequence[str], download: bool = False, synset_file: str = "") -> LabelledImages:
    """Return the images of several sets together, decoded if they are small; arguments as :func:`list_class_sets`."""
    return list_class_sets(key, names, download, synset_file).decoded()


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
    """Make a set of ``(n, 3, h, w)`` pixels."""
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


def _extracted(what: str, place: str) -> Path:
    """Return a folder under the data root that nothing here downloads."""
    root = dataset_root() / place
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
