"""Images without labels from folders, glob patterns, text lists and archives."""

import glob
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from relvit_d2.data.images.archive import ImageFile, is_archive, list_members
from relvit_d2.data.images.decode import UnreadableImageError, image_size
from relvit_d2.data.images.file_cache import read_changed
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import check_printable, names_on_disk
from relvit_d2.utils.printing import first_few

EXTENSIONS = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Extensions of image files, in lower case; of an animation the first frame is used."""
LIST = ".txt"
VERSION = 1  # of the sizes in the cache
THREADS = 8  # that read headers, which mostly wait for the disk

logger = logging.getLogger(__name__)


def is_image(name: str, extensions: Collection[str] = EXTENSIONS) -> bool:
    """Whether the name of a file has the extension of an image, or another one of ``extensions``."""
    return os.path.splitext(name)[1].lower() in extensions  # noqa: PTH122


def is_image_source(name: str) -> bool:
    """Whether ``name`` is an existing source for :func:`unlabelled_images`."""
    path = Path(name).expanduser()
    return path.is_dir() or _is_pattern(name) or (path.is_file() and (path.suffix.lower() == LIST or is_archive(path)))


def unlabelled_images(name: str) -> list[ImageFile]:
    """Return the images of a folder, a pattern with ``*``, a text list (one path per line), a zip or a tar.

    Folders and patterns are sorted by path; a list keeps its order, and its paths are relative to its folder. Existing
    parts of a pattern, such as a folder with ``[`` in its name, are taken literally.

    Raises:
        UserError: the source is missing, damaged or contains no image.
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
        raise UserError(f"'{name}' contains no image ({', '.join(sorted(EXTENSIONS))}): correct the path")
    return found


def list_images(folder: Path, extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """Return the images, or files with other extensions, in ``folder`` and its sub-folders, sorted by path.

    Hidden files and folders are left out (``._photo.jpg`` of macOS archives is not an image). Links to folders are not
    followed, with a warning.

    Raises:
        UserError: the folder is missing or contains no image.
    """
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist: correct the path")
    found: list[str] = []
    try:
        images = _images(files_below(folder, found), extensions)
    except OSError as error:
        raise UserError(
            f"the folder '{error.filename}' cannot be read ({error.strerror}): check its permissions"
        ) from error
    check_printable(found)
    links = list(map(Path, found))
    not_followed = f"links to folders are not followed: {first_few(links)}" if links else ""
    if not images:
        raise UserError(
            f"the folder {folder} contains no image ({', '.join(sorted(extensions))}): correct the path"
            + (f"; {not_followed}" if links else "")
        )
    if links:
        logger.warning(not_followed)
    return images


def matching_files(pattern: Path, extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """Return the images, or files with other extensions, that match a pattern, sorted by path.

    Existing parts of the pattern, such as a folder with ``[`` in its name, are taken literally.
    """
    found = glob.glob(_escape_existing_parts(pattern), recursive=True)  # noqa: PTH207  (takes absolute patterns)
    return sorted(_images(filter(os.path.isfile, found), extensions))


def linked_folders(folder: Path) -> list[Path]:
    """Return the links to folders below ``folder``, which are not followed, sorted by path."""
    links: list[str] = []
    for _ in files_below(folder, links):
        pass
    check_printable(links)
    return list(map(Path, links))


def readable(images: Sequence[ImageFile], skip: bool = True) -> list[ImageFile]:
    """Return the images whose headers can be read, in their order; a warning names the others.

    Raises:
        UserError: none can be read, or without ``skip`` one cannot.
    """

    headers = _headers(images)
    bad = [image for image, header in zip(images, headers, strict=True) if isinstance(header, Exception)]
    if bad:
        reason = next(header for header in headers if isinstance(header, Exception))
        if not skip:
            raise reason
        if len(bad) == len(images):
            raise UserError(f"none of the {len(images)} images can be read: {reason}")
        logger.warning(
            f"{len(bad)} of {len(images)} images cannot be read and are left out: {first_few(bad)} ({reason})"
        )
    return [image for image, header in zip(images, headers, strict=True) if not isinstance(header, Exception)]


def image_sizes(images: Sequence[ImageFile]) -> list[tuple[int, int]]:
    """Return :func:`relvit_d2.data.images.decode.image_size` of each image, (0, 0) where it cannot be read."""
    return [(0, 0) if isinstance(header, Exception) else (header[0], header[1]) for header in _headers(images)]


def _headers(images: Sequence[ImageFile]) -> list[Any]:
    """Return width and height of each image, or an ``UnreadableImageError``; unchanged files are not read again."""

    def read(image: ImageFile) -> Sequence[int] | UnreadableImageError:
        try:
            return image_size(image)
        except UnreadableImageError as error:
            return error

    return read_changed("headers", VERSION, images, read, THREADS, "checked: their headers are read once")


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _escape_existing_parts(pattern: Path) -> str:
    """Return a pattern for :func:`glob.glob` with its leading existing parts escaped."""
    start = Path(pattern.anchor)
    parts = pattern.relative_to(start).parts
    count = 0
    while count < len(parts) and os.path.exists(start / parts[count]):  # noqa: PTH110  (False without permission)
        start /= parts[count]
        count += 1
    return os.path.join(glob.escape(str(start)), *parts[count:])  # noqa: PTH118


def files_below(folder: str | Path, links: list[str]) -> Iterator[str]:
    """Yield the files below a folder, without hidden ones, in the order of sorted paths.

    Links to folders are not followed, since they may form a cycle; they are appended to ``links``.
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=attrgetter("name")):
            if entry.name[0] == ".":
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path, links)
            elif entry.is_file():
                yield entry.path
            elif entry.is_symlink() and entry.is_dir():
                links.append(entry.path)


def _images(paths: Iterable[str], extensions: Collection[str] = EXTENSIONS) -> list[Path]:
    """Return the images among paths of files, in their order."""
    images = [path for path in paths if is_image(path, extensions)]
    check_printable(images)
    return list(map(Path, images))


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the image list '{path}' cannot be read ({type(error).__name__}): replace it by UTF-8 text"
        ) from error
    images = [path.parent / Path(line.strip()).expanduser() for line in lines if line.strip()]
    if not images:
        raise UserError(f"the image list '{path}' is empty: write one path per line")
    for image in images:
        if not str(image).isprintable() or image.suffix.lower() not in EXTENSIONS:
            raise UserError(
                f"the image list '{path}' names {str(image)!r}, which is not an image "
                f"({', '.join(sorted(EXTENSIONS))}): correct it"
            )
    on_disk: dict[Path, Path] = {}
    for anchor in {image.anchor for image in images}:
        same_root = [image for image in images if image.anchor == anchor]
        on_disk |= zip(same_root, names_on_disk(same_root, Path(anchor)), strict=True)
    return [on_disk[image] for image in images]
