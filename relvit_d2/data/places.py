"""Where data lie, and files that are links to somewhere else."""

import os
from pathlib import Path

from relvit_d2.errors import UserError


def dataset_root() -> Path:
    """Return ``$DETECTRON2_DATASETS``, or ``datasets`` in the working directory as Detectron2 does."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def refuse_stray(path: Path) -> None:
    """Refuse a file that is a link out of both the folder that it is in and the data root.

    What came with a data set must not make a run read other files of this machine. A folder that is a link is its
    user's own arrangement, another disk say.

    Raises:
        UserError: it is such a link.
    """
    if not path.is_symlink():
        return
    target = os.path.realpath(path)
    if not any(target.startswith(os.path.realpath(home) + os.sep) for home in (path.parent, dataset_root())):
        raise UserError(f"'{path}' is a link out of the data, to '{target}': put the file itself there")
