"""Names of subsets: ``NAME[:8]``, ``NAME[:10%]`` and ``NAME[:10%@3]``."""

import os
import re
from collections.abc import Callable
from typing import Any

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.randomness import subset_order

_SUBSET = re.compile(r"(?P<base>.+)\[:(?P<amount>\d+(?:\.\d+)?)(?P<percent>%?)(?:@(?P<seed>\d+))?\]")


def subset(name: str) -> tuple[str, Callable[[list], list]]:
    """Return the name without its ``[:...]`` and a function that selects that subset of a list.

    An existing path with brackets is not a subset.
    """
    match = _SUBSET.fullmatch(name)
    if not match or os.path.exists(os.path.expanduser(name)):  # noqa: PTH110,PTH111  (False for an invalid path)
        return name, list
    amount, percent = float(match["amount"]), bool(match["percent"])
    if amount == 0 or (percent and amount > 100) or not (percent or amount.is_integer()):
        raise UserError(
            f"'{name}' is not a valid subset: write {match['base']}[:8] for the first 8 images, "
            f"{match['base']}[:10%] for the first 10 percent"
        )

    def take(items: list) -> list:
        count = max(1, int(len(items) * amount / 100)) if percent else int(amount)
        return items[:count] if match["seed"] is None else random_subset(items, count, int(match["seed"]))

    return match["base"], take


def without_seed(name: str) -> tuple[str, int | None]:
    """Split ``NAME[:10%@3]`` into ``NAME[:10%]`` and 3; return any other name with None."""
    match = _SUBSET.fullmatch(name)
    if not match or match["seed"] is None:
        return name, None
    return f"{match['base']}[:{match['amount']}{match['percent']}]", int(match["seed"])


def random_subset(items: list, count: int, seed: int) -> list:
    """Return ``count`` random items in their original order.

    With the same seed, a larger subset contains the smaller ones. If the items are records, an image of each class is
    drawn first, in ascending order of the number of images of the class, so every class has an image if ``count``
    permits.

    Args:
        items: records, or items without annotations.
        seed: seed of the order, 0 or more.
    """
    order = subset_order(seed, len(items)).tolist()
    by_class: dict[int, list[int]] = {}  # indices of the images of each class in random order
    for index in order:
        for label in classes_of(items[index]):
            by_class.setdefault(label, []).append(index)
    first: dict[int, None] = {}
    for label in sorted(by_class, key=lambda label: (len(by_class[label]), label)):
        if not first.keys() & set(by_class[label]):
            first[by_class[label][0]] = None
    return [items[index] for index in sorted([*first, *(index for index in order if index not in first)][:count])]


def classes_of(item: Any) -> set[int]:
    """Return the classes of the objects of a record, without crowds and difficult objects; empty if not a record."""
    objects = item.get("annotations", []) if isinstance(item, dict) else []
    return {x["category_id"] for x in objects if not (x.get("iscrowd") or x.get("difficult"))}


def subset_name(name: str, fraction: float) -> str:
    """Return the name of the first ``fraction``, 0..1, of a data set or subset, at least one image."""
    match = _SUBSET.fullmatch(name)
    seed = f"@{match['seed']}" if match and match["seed"] is not None else ""
    if match and not match["percent"]:
        return f"{match['base']}[:{max(int(float(match['amount']) * fraction), 1)}{seed}]"
    base, percent = (match["base"], float(match["amount"])) if match else (name, 100.0)
    return f"{base}[:{f'{percent * fraction:.6f}'.rstrip('0').rstrip('.')}%{seed}]"
