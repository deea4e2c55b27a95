"""Where data lie, and files that are links to somewhere else."""

import os
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from relvit_d2.utils.errors import UserError


def dataset_root() -> Path:
    """Return ``$DETECTRON2_DATASETS``, or ``datasets`` in the working directory as Detectron2 does."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def normal_form(name: str) -> str:
    """Return a name in Unicode's composed form, in which ``é`` is one character.

    macOS decomposes names of files that annotation files hold composed, so both forms are the same name.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def names_on_disk(paths: Iterable[Path], root: Path) -> list[Path]:
    """Return ``paths``, which lie below ``root``, spelled as the files on the disk are.

    A name that a folder lacks is replaced by one with the same :func:`normal_form`; an absent file keeps its path.
    """

    @cache
    def listing(folder: Path) -> dict[str, str]:
        try:
            names = os.listdir(folder)  # noqa: PTH208
        except OSError:
            return {}
        return {normal_form(name): name for name in names} | {name: name for name in names}

    @cache
    def spelled(folder: Path) -> Path:
        return folder if folder == root else entry(folder)

    def entry(path: Path) -> Path:
        parent, names = spelled(path.parent), listing(spelled(path.parent))
        return parent / (names.get(path.name) or names.get(normal_form(path.name)) or path.name)

    return [path if str(path.relative_to(root)).isascii() else entry(path) for path in paths]


def child(folder: Path, *names: str) -> Path:
    """Return ``folder / names[0] / ...``, each with the capitals that it has on the disk, if it is there."""
    for name in names:
        if not (folder / name).exists():
            try:
                spellings = sorted(x for x in os.listdir(folder) if x.lower() == name.lower())  # noqa: PTH208
            except OSError:
                spellings = []
            name = spellings[0] if spellings else name
        folder = folder / name
    return folder


def refuse_links_out(paths: Iterable[Path], root: Path | None = None) -> None:
    """Refuse files that are links out of the data: what came with a data set must not make a run read other files.

    Args:
        paths: the files.
        root: a folder that nothing may lead out of, through a folder that is a link neither. None, for the sets of the
            catalog: a folder may be a link, to another disk say, and a file in it one to elsewhere in that folder or
            in the data root.

    Raises:
        UserError: one is such a link; it names the first.
    """

    def check(path: Path, *homes: Path) -> None:
        target = os.path.realpath(path)
        if not any(os.path.commonpath([home, target]) == home for home in map(os.path.realpath, homes)):
            what = "folder" if Path(target).is_dir() else "file"
            raise UserError(f"'{path}' leads out of the data, to '{target}': put the {what} itself there")

    names: dict[Path, list[str]] = {}
    for path in paths:
        names.setdefault(path.parent, []).append(path.name)
    for folder, inside in names.items():
        if root:
            check(folder, root)
        try:  # one listing: asking for each of 100,000 files takes minutes on a network disk
            with os.scandir(folder) as entries:
                links = {entry.name for entry in entries if entry.is_symlink()}
        except OSError:
            links = {name for name in inside if (folder / name).is_symlink()}
        for name in inside:
            if name in links:
                check(folder / name, *([root] if root else [folder, dataset_root()]))
