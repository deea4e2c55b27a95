"""Search path of config files: the working directory, then the configs of the package."""

from pathlib import Path

from relvit_d2.utils.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed package contains its configs; in a checkout they are beside it.
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""The folder of ``configs/``."""


def has_config(name: str) -> bool:
    """Whether :func:`find_config` finds a config file."""
    return any(path.is_file() for path in (Path(name), ROOT / name))


def find_config(name: str) -> Path:
    """Return the path of a config file; a relative one is resolved in the working directory, then in :data:`ROOT`.

    Raises:
        UserError: the file does not exist.
    """
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    raise UserError(f"config file '{name}' does not exist; the configs of the project are in {ROOT / 'configs'}")
