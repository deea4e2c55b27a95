"""Where config files are found: the current folder first, then the configs that come with the package."""

from pathlib import Path

from relvit_d2.utils.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed package has its configs inside, a checkout beside it.
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""Folder that holds ``configs/``."""


def has_config(name: str) -> bool:
    """Return whether :func:`find_config` finds a config file."""
    return any(path.is_file() for path in (Path(name), ROOT / name))


def find_config(name: str) -> Path:
    """Return the path of a config file.

    Args:
        name: path of the file. A relative one, such as ``configs/voc_vit_s.yaml``, is resolved in the current folder,
            then in :data:`ROOT`.

    Raises:
        UserError: if neither has it.
    """
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    raise UserError(
        f"config file '{name}' does not exist; the ones that come with the project are in {ROOT / 'configs'}"
    )
