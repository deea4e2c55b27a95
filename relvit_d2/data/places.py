"""Where data lie, and files that are links to somewhere else."""

import os
from collections.abc import Iterable
from pathlib import Path

from relvit_d2.errors import UserError


def dataset_root() -> Path:
    """Return ``$DETECTRON2_DATASETS``, or ``datasets`` in the working directory as Detectron2 does."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


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
            raise UserError(f"'{path}' leads out of the data, to '{target}': put the file itself there")

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
