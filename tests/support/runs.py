"""Comparison of the results of runs."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def rows(output: Path) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.json`` without measured times."""
    clocks = ("time", "data_time", "eta_seconds")
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]
