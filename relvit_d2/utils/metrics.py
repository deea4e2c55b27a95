"""Metrics with chance levels, and their names as scalars.

A metric T of kind ``accuracy`` is logged to ``metrics.json``, TensorBoard and ``results.json`` as the scalars
``accuracy_T`` and ``chance_T``, with the prefix ``NAME/`` for a test set. Only this module builds and parses the names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

FORMATS = {"accuracy": ".1%", "error": ".3f", "count": ".1f"}

T = TypeVar("T")


@dataclass(frozen=True)
class Metric(Generic[T]):
    """A metric, as a float, a scalar tensor, a scalar's name or the history of a run.

    Attributes:
        value: its value.
        chance: chance level, the value of the best constant prediction; None if unknown.
        kind: ``accuracy`` (0..1, higher is better), ``error`` (lower is better) or ``count`` (a mean number).
    """

    value: T
    chance: T | None = None
    kind: str = "accuracy"

    def __str__(self) -> str:
        form = FORMATS[self.kind]
        chance = "" if self.chance is None else f" (chance {self.chance:{form}})"
        return f"{self.value:{form}}{chance}"


def as_scalars(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Convert metrics to scalars by name; other entries are unchanged."""
    scalars = {}
    for name, output in outputs.items():
        if isinstance(output, Metric):
            scalars[f"{output.kind}_{name}"] = output.value
            if output.chance is not None:
                scalars[f"chance_{name}"] = output.chance
        else:
            scalars[name] = output
    return scalars


def from_scalars(scalars: Mapping[str, T]) -> dict[str, Metric[T]]:
    """Return the metrics among scalars: ``accuracy_T`` as ``T``, ``NAME/accuracy_T`` as ``NAME/T``.

    Scalars have any type; from ``{name: name}`` a metric contains the names of its two scalars.
    """
    metrics: dict[str, Metric[T]] = {}
    for name, value in scalars.items():
        head, slash, last = name.rpartition("/")
        kind, _, task = last.partition("_")
        if kind in FORMATS and task:
            metrics[f"{head}{slash}{task}"] = Metric(value, scalars.get(f"{head}{slash}chance_{task}"), kind)
    return metrics


class Row(NamedTuple):
    """A row of ``metrics.json``."""

    iteration: int
    scalars: dict[str, float]


def parse_row(line: bytes) -> Row | None:
    """Return a line of ``metrics.json``, or None if it is not a JSON object of numbers with an ``iteration``."""
    try:
        row = json.loads(line.decode("utf-8"))
        iteration = row.pop("iteration")
        if type(iteration) is int and iteration >= 0 and not any(isinstance(v, str | bool) for v in row.values()):
            return Row(iteration, {name: float(value) for name, value in row.items()})
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    return None


def less_is_better(name: str) -> bool:
    """Whether lower values of the scalar ``name`` are better: a loss or an error."""
    return "loss" in name or any(metric.kind == "error" for metric in from_scalars({name: None}).values())
