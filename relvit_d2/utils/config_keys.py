"""What the packages need to define and check their config keys; works on any CfgNode class and imports none."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from relvit_d2.utils.errors import UserError


def add_groups(cfg: Any, *names: str) -> None:
    """Add the groups of keys that a config lacks, in place.

    Args:
        cfg: a CfgNode.
        names: full names of groups, such as ``MODEL.ENCODER``.
    """
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
        ranges: the least and the greatest allowed value by full key.

    Raises:
        UserError: a value is smaller or larger.
    """
    for key, (least, most) in ranges.items():
        value = get_key(cfg, key)
        if value < least:
            raise UserError(f"{key} {value} is too small: give {least} or more")
        if value > most:
            raise UserError(f"{key} {value} is too large: give {most} or less")
