"""Definition and checks of config keys, for any CfgNode class."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from relvit_d2.utils.errors import UserError


def add_groups(cfg: Any, *names: str) -> None:
    """Add missing groups of keys, such as ``MODEL.ENCODER``, to a CfgNode, in place."""
    for name in names:
        node = cfg
        for part in name.split("."):
            if part not in node:
                node[part] = type(cfg)()
            node = node[part]


def get_key(cfg: Any, key: str) -> Any:
    """Return the value of a key by its full name, such as ``SOLVER.MAX_ITER``."""
    return reduce(getattr, key.split("."), cfg)


def check_ranges(cfg: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check the values of keys.

    Args:
        cfg: a CfgNode.
        ranges: minimum and maximum by full key.

    Raises:
        UserError: a value is out of range.
    """
    for key, (minimum, maximum) in ranges.items():
        value = get_key(cfg, key)
        if not value >= minimum:  # NaN too
            raise UserError(f"{key} {value} is too small: give {minimum} or more")
        if value > maximum:
            raise UserError(f"{key} {value} is too large: give {maximum} or less")
