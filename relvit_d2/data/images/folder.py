"""Images without labels: folders, patterns, lists, archives."""

import glob
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relvit_d2.data.detection.records import check_printable, first_few
from relvit_d2.data.images.archive import ImageFile, is_archive, list_members
from relvit_d2.data.images.decode import UnreadableImageError, check_header
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import names_on_disk

EXTENSIONS = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Suffixes of files that count as images, in small letters; of an animation the first frame does."""
LIST = ".txt"
THREADS = 8  # that look at headers: most of the time goes by until a disk answers

logger = logging.getLogger(__name__)


def is_source(name: str) -> bool:
    """Whether ``name`` is that of images without labels that are there: see :func:`unlabelled_images`."""
    path = Path(name).expanduser()
    return path.is_dir() or _is_pattern(name) or (path.is_file() and (path.suffix.lower() == LIST or is_archive(path)))


def unlabelled_images(name: str) -> list[ImageFile]:
    """Return the images of a folder, of a pattern with ``*``, of a text list (one path a line) or of a zip or tar.

    Folders and patterns are sorted by path; a list keeps its order, and its relative paths start where it lies. A part
    of a pattern that exists as it is written, such as a folder with ``[`` in its name, is not taken as a pattern.

    Raises:
        UserError: the source is missing, damaged or holds no image.
    """
    path = Path(name).expanduser()
    if _is_pattern(name) and not path.exists():
        found: list[ImageFile] = list(matching_files(path))
    elif path.suffix.lower() == LIST and path.is_file():
        return list(_listed(path))
    elif is_archive(path) and not path.is_dir():
        found = list(list_members(path, sorted(EXTENSIONS)))
    else:
        return list(list_images(path))
    if not found:
        raise UserError(f"'{name}' holds no image with one of {', '.join(sorted(EXTENSIONS))}")
    return found


def list_images(folder: Path, extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """Return the images under ``folder``, or other files by their suffixes, sub-folders included, sorted by path.

    Hidden files and folders are left out (``._photo.jpg`` of macOS archives is no image). Links to folders are not
    followed; the log names them.

    Raises:
        UserError: the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist: correct the path")
    found: list[str] = []
    try:
        images = _images(files_below(str(folder), found), extensions)
    except OSError as error:
        raise UserError(
            f"the folder '{error.filename}' cannot be read ({error.strerror}): see who may read it"
        ) from error
    check_printable(found)
    links = sorted(map(Path, found))
    not_followed = f"links to folders are not followed: {first_few(links)}" if links else ""
    if not images:
        raise UserError(
            f"the folder {folder} holds no image with one of {', '.join(sorted(extensions))}"
            + (f"; {not_followed}" if links else "")
        )
    if links:
        logger.warning(not_followed)
    return images


def matching_files(pattern: Path, extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """Return the images, or other files by their suffixes, that a pattern names, sorted by path.

    A part of it that exists as it is written, such as a folder with ``[`` in its name, stands for itself.
    """
    found = glob.glob(_literal_where_it_exists(pattern), recursive=True)  # noqa: PTH207  (takes absolute patterns)
    return _images(filter(os.path.isfile, found), extensions)


def linked_folders(folder: Path) -> list[Path]:
    """Return the links to folders below ``folder``, which are not followed, sorted by path."""
    links: list[str] = []
    for _ in files_below(str(folder), links):
        pass
    check_printable(links)
    return sorted(map(Path, links))


def readable(images: Sequence[ImageFile]) -> list[ImageFile]:
    """Return the images whose headers can be read, in their order; the others are counted and named in the log.

    Raises:
        UserError: not one can be read.
    """

    def fault(image: ImageFile) -> UnreadableImageError | None:
        try:
            check_header(image)
        except UnreadableImageError as error:
            return error
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        faults = list(pool.map(fault, images))
    bad = [image for image, error in zip(images, faults, strict=True) if error]
    if bad:
        reason = next(error for error in faults if error)
        if len(bad) == len(images):
            raise UserError(f"not one of the {len(images)} images can be read: {reason}")
        logger.warning(
            f"{len(bad)} of {len(images)} images cannot be read and are left out: {first_few(bad)} ({reason})"
        )
    return [image for image, error in zip(images, faults, strict=True) if not error]


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _literal_where_it_exists(pattern: Path) -> str:
    """Return a pattern for :func:`glob.glob` in which those first parts that exist stand for themselves."""
    start = Path(pattern.anchor)
    parts = pattern.relative_to(start).parts
    count = 0
    while count < len(parts) and os.path.exists(start / parts[count]):  # noqa: PTH110  (False where it may not look)
        start /= parts[count]
        count += 1
    return os.path.join(glob.escape(str(start)), *parts[count:])  # noqa: PTH118


def files_below(folder: str, links: list[str]) -> Iterator[str]:
    """Yield the files below a folder, without hidden ones.

    Links to folders are not followed, since they may lead back; they are appended to ``links``.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path, links)
            elif entry.is_file():
                yield entry.path
            elif entry.is_symlink() and entry.is_dir():
                links.append(entry.path)


def _images(paths: Iterable[str], extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """Return the images among paths of files, sorted as paths are: folder by folder."""
    images = [path for path in paths if os.path.splitext(path)[1].lower() in extensions]  # noqa: PTH122
    check_printable(images)
    return sorted(map(Path, images))


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the image list '{path}' cannot be read ({type(error).__name__}): give UTF-8 text") from error
    images = [path.parent / Path(line.strip()).expanduser() for line in lines if line.strip()]
    if not images:
        raise UserError(f"the image list '{path}' is empty: write one path a line")
    for image in images:
        if not str(image).isprintable() or image.suffix.lower() not in EXTENSIONS:
            raise UserError(
                f"the image list '{path}' names {str(image)!r}, which is no image with one of "
                f"{', '.join(sorted(EXTENSIONS))}"
            )
    spelled: dict[Path, Path] = {}
    for anchor in {image.anchor for image in images}:
        of_one_root = [image for image in images if image.anchor == anchor]
        spelled |= zip(of_one_root, names_on_disk(of_one_root, Path(anchor)), strict=True)
    return [spelled[image] for image in images]
