"""Results that take long to compute, as JSON files in the user's cache."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_text

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the user's cache of this project: ``$XDG_CACHE_HOME/relvit_d2``, or ``~/.cache/relvit_d2``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relvit_d2"


def load(path: Path) -> Any:
    """Return the JSON value of a file in the cache, None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store(path: Path, value: Any, what: str) -> None:
    """Write a JSON value into the cache; if it cannot be written, log that ``what`` is computed at every start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(value))
    except (OSError, UserError, ValueError) as error:
        logger.info(f"{what} are computed again at every start: the cache cannot be written ({error})")
