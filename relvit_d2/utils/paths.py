"""Paths of data sets: the data root, spelling on the disk, and links that lead out of a data set."""

import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from relvit_d2.utils.errors import UserError


def dataset_root() -> Path:
    """Return ``$DETECTRON2_DATASETS``, or ``datasets`` in the working directory as Detectron2 does."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def normal_form(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which ``é`` is one character.

    macOS stores file names decomposed while annotation files contain them composed.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def relative_names(paths: Sequence[Path], root: Path) -> list[str]:
    """Return ``paths``, which lie below ``root``, relative to it; a tenth of the time of ``Path.relative_to``."""
    start = len(str(root / "_")) - 1
    return [str(path)[start:] for path in paths]


def names_on_disk(paths: Iterable[Path], root: Path) -> list[Path]:
    """Return ``paths``, which lie below ``root``, in the Unicode form of the files on the disk.

    The path of a missing file is returned unchanged.
    """

    @cache
    def listing(folder: Path) -> dict[str, str]:
        try:
            names = os.listdir(folder)  # noqa: PTH208
        except OSError:
            return {}
        return {normal_form(name): name for name in names} | {name: name for name in names}

    @cache
    def folder_on_disk(folder: Path) -> Path:
        return folder if folder == root else on_disk(folder)

    def on_disk(path: Path) -> Path:
        parent = folder_on_disk(path.parent)
        names = listing(parent)
        return parent / (names.get(path.name) or names.get(normal_form(path.name)) or path.name)

    return [path if str(path.relative_to(root)).isascii() else on_disk(path) for path in paths]


def match_case(folder: Path, *names: str) -> Path:
    """Return ``folder / names[0] / ...``, each name in the case that it has on the disk, if it exists."""
    for name in names:
        if not (folder / name).exists():
            try:
                spellings = sorted(x for x in os.listdir(folder) if x.lower() == name.lower())  # noqa: PTH208
            except OSError:
                spellings = []
            name = spellings[0] if spellings else name
        folder = folder / name
    return folder


class DataRoot:
    """The folder that all files of a data set must lie in: a downloaded data set must not make a run read other files.

    Make one for each reading: it lists every folder once.

    Args:
        folder: nothing below it may lead out of it. None, for data sets of the catalog: a folder may be a link (to
            another disk), and a file may be a link to elsewhere in its folder or in :func:`dataset_root`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._links = cache(self._list_links)

    def resolve(self, name: Any, where: str, base: Path | None = None) -> Path:
        """Return the path that a file of the data set names, below ``base`` or else the root; sub-folders are allowed.

        Raises:
            UserError: it is not text, is absolute, or contains ``..`` or unprintable characters.
        """
        base = base or self._folder or dataset_root()
        text = name.replace("\\", "/") if isinstance(name, str) else ""
        parts = [part for part in text.split("/") if part != "."]
        if not (text and parts) or not text.isprintable() or ":" in parts[0] or {"", ".."} & set(parts):
            raise UserError(f"{where} names {name!r}, which is not a path inside '{base}': correct it")
        return base.joinpath(*parts)

    def check_links(self, paths: Iterable[Path]) -> None:
        """Raise a ``UserError`` for the first of ``paths`` that leads out of the data set."""
        for path in paths:
            folder, name = os.path.split(path)
            links = self._links(folder)
            if path.is_symlink() if links is None else name in links:
                _check_target(path, *([self._folder] if self._folder else [path.parent, dataset_root()]))

    def read_text(self, path: Path, encoding: str = "utf-8-sig") -> str:
        """Return the text of a file.

        Raises:
            UserError: it leads out of the data set, is missing, or is not in the encoding.
        """
        self.check_links([path])
        try:
            return path.read_text(encoding=encoding)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: restore it") from error
        except (OSError, UnicodeDecodeError) as error:
            kind = encoding.removesuffix("-sig").upper()
            raise UserError(f"{path} cannot be read ({type(error).__name__}): replace it by {kind} text") from error

    def _list_links(self, folder: str) -> set[str] | None:
        if self._folder:
            _check_target(Path(folder), self._folder)
        try:  # one listing: a query for each of 100,000 files takes minutes on a network disk
            with os.scandir(folder or ".") as entries:
                return {entry.name for entry in entries if entry.is_symlink()}
        except OSError:
            return None


def _check_target(path: Path, *allowed: Path) -> None:
    target = os.path.realpath(path)
    if not any(os.path.commonpath([folder, target]) == folder for folder in map(os.path.realpath, allowed)):
        what = "folder" if Path(target).is_dir() else "file"
        raise UserError(f"'{path}' leads out of the data set, to '{target}': put the {what} itself there")


def check_printable(paths: Iterable[str | Path]) -> None:
    """Raise a ``UserError`` for the first of ``paths`` with characters that cannot be printed."""
    for path in paths:
        if not str(path).isprintable():
            locale = "" if sys.getfilesystemencoding() == "utf-8" else ", or set the environment variable PYTHONUTF8=1"
            raise UserError(f"the name of the file {os.fsencode(path)!r} cannot be printed: rename it{locale}")
