"""Classification data sets as a folder, zip or tar with a folder of images for each class."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from relvit_d2.data.detection.mapper import ImageReader
from relvit_d2.data.images.archive import list_members
from relvit_d2.data.images.batches import Images, ImageStack, joined, take
from relvit_d2.data.images.decode import UnreadableImageError, image_size
from relvit_d2.data.images.folder import EXTENSIONS, list_images, readable
from relvit_d2.data.images.pixel_cache import PixelCache
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.randomness import subset_order

IN_MEMORY = 2**31  # bytes of decoded pixels up to which images of one size are kept decoded


@dataclass(frozen=True)
class LabelledImages:
    """Images with a class each.

    Attributes:
        name: for messages.
        images: a stack, or files for :class:`relvit_d2.data.detection.mapper.ImageReader`.
        labels: ``(n,)`` int64, indices into ``classes``.
        classes: their names.
        note: remark to print beside its results, or "".

    Raises:
        UserError: there is no image, or a label is out of range.
    """

    name: str
    images: Images
    labels: Tensor
    classes: tuple[str, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.labels) or len(self.labels) != len(self.images):
            raise UserError(
                f"data set '{self.name}' has {len(self.images)} images and {len(self.labels)} labels: correct it"
            )
        wrong = ((self.labels < 0) | (self.labels >= len(self.classes))).nonzero()
        if len(wrong):
            index = int(wrong[0])
            raise UserError(
                f"image {index} of data set '{self.name}' has the label {int(self.labels[index])}, out of range for "
                f"its {len(self.classes)} classes: correct the label"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "LabelledImages":
        """Return the images with the indices ``index``, ``(n,)`` int64."""
        return LabelledImages(self.name, take(self.images, index), self.labels[index], self.classes, self.note)

    def readable(self, skip: bool = True) -> "LabelledImages":
        """Return the images whose headers can be read; see :func:`relvit_d2.data.images.folder.readable`."""
        if isinstance(self.images, ImageStack):
            return self
        kept = {str(image) for image in readable(self.images, skip)}
        return self.take(torch.tensor([index for index, image in enumerate(self.images) if str(image) in kept]))

    def decoded(self, skip: bool = True) -> "LabelledImages":
        """Return the images as a stack if they have one size and at most ``IN_MEMORY`` bytes, else unchanged.

        They are unchanged, too, if one is unreadable: what reads them then replaces it or leaves it out.

        Raises:
            UserError: without ``skip``, an image is unreadable.
        """
        try:
            stack = _decoded(self.images, self.name)
        except UnreadableImageError:
            if not skip:
                raise
            stack = None
        return LabelledImages(self.name, stack, self.labels, self.classes, self.note) if stack else self

    def class_interleaved(self, seed: int | None = None) -> Tensor:
        """Return image indices, ``(n,)`` int64: the first of each class, then the second of each, and so on.

        Args:
            seed: seed of a random order within each class; None: the order of the data set.
        """
        order = torch.arange(len(self)) if seed is None else torch.from_numpy(subset_order(seed, len(self)))
        labels = self.labels[order]
        return order[(rank_in_class(labels) * len(self.classes) + labels).argsort()]


def _decoded(files: Images, name: str) -> ImageStack | None:
    """Return images of one size and of at most ``IN_MEMORY`` bytes as a stack, None for others."""
    if isinstance(files, ImageStack):
        return files
    width, height = image_size(files[0])
    if 3 * height * width * len(files) > IN_MEMORY:
        return None
    read, stack = ImageReader(PixelCache()), torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    for target, file in zip(stack, files, strict=True):
        pixels = read(file)
        if pixels.shape != target.shape:
            return None
        target.copy_(pixels)
    return ImageStack(stack, name)


def rank_in_class(labels: Tensor) -> Tensor:
    """Return the number of images of the same class before each image; ``(n,)`` int64 both."""
    order, counts = labels.argsort(stable=True), labels.bincount()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[labels[order]]
    return rank


def concatenate(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Concatenate data sets.

    Raises:
        UserError: their classes differ.
    """
    first = parts[0]
    for part in parts[1:]:
        check_same_classes(first, part)
    name, note = (
        ", ".join(dict.fromkeys(filter(None, x))) for x in zip(*((p.name, p.note) for p in parts), strict=True)
    )
    images = joined([part.images for part in parts])
    return LabelledImages(name, images, torch.cat([part.labels for part in parts]), first.classes, note)


def check_same_classes(one: LabelledImages, other: LabelledImages) -> None:
    """Raise a ``UserError`` if the classes of two data sets differ."""
    if one.classes == other.classes:
        return
    unmatched = sorted(set(one.classes) ^ set(other.classes))
    which = f", '{unmatched[0]}' is only in one of them" if unmatched else " in another order"
    raise UserError(f"data sets '{one.name}' and '{other.name}' have different classes{which}: make them agree")


def archive_of(path: Path) -> tuple[Path, PurePosixPath] | None:
    """Split a path into an archive, ``a/b.tar.gz/train``, into the archive and the path inside; None for others."""
    for archive in (path, *path.parents):
        if archive.is_file():
            return archive, PurePosixPath(path.relative_to(archive).as_posix())
    return None


def read_tree(path: Path, classes: Sequence[str] | None = None, name: str = "", note: str = "") -> LabelledImages:
    """Read a folder, zip or tar (compressed or not) with a folder of images for each class.

    Args:
        path: the parent of the class folders, which may be inside an archive: ``cifar.tar.gz/train``.
        classes: the class folders to read, in the order of their labels; None for all, in order of name.
        name: for messages; default: the path.
        note: see :class:`LabelledImages`.

    Raises:
        UserError: there are fewer than two classes, a class has no image, or the archive is damaged.
    """
    archive = archive_of(path)
    files = _list_archive(*archive) if archive else _list_folder(path, classes)
    if len(files) < 2:
        raise UserError(f"'{path}' contains no class folders: use a folder with a folder of images for each class")
    known = tuple(classes or sorted(files))
    for folder in known:
        if not files.get(folder):
            raise UserError(f"'{path}' has no image of the class '{folder}': add some, or remove the folder")
    images = [file for folder in known for file in files[folder]]
    labels = torch.repeat_interleave(torch.arange(len(known)), torch.tensor([len(files[folder]) for folder in known]))
    return LabelledImages(name or str(path), images, labels, known, note)


def _list_folder(path: Path, classes: Sequence[str] | None) -> dict[str, list[Any]]:
    if not path.is_dir():
        raise UserError(f"the folder '{path}' does not exist: use a folder with a folder of images for each class")
    folders = [path / name for name in classes] if classes else sorted(p for p in path.iterdir() if p.is_dir())
    return {folder.name: list(list_images(folder)) for folder in folders if not folder.name.startswith(".")}


def _list_archive(archive: Path, inside: PurePosixPath) -> dict[str, list[Any]]:
    files: defaultdict[str, list[Any]] = defaultdict(list)
    for member in list_members(archive, sorted(EXTENSIONS), folders=True):
        path = PurePosixPath(member.name)
        parts = path.relative_to(inside).parts if path.is_relative_to(inside) else ()
        if parts and member.name.endswith("/"):
            files[parts[0]] += []
        elif len(parts) > 1:
            files[parts[0]].append(member)
    return dict(files)
