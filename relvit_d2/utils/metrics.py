"""Metrics with their level of chance, and the names of both among scalars.

A metric T of kind ``accuracy`` is written to ``metrics.json``, TensorBoard and ``results.json`` as ``accuracy_T`` and
``chance_T``, where it is measured on a data set after ``NAME/``. Only this module builds and reads these names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

FORMATS = {"accuracy": ".1%", "error": ".3f"}

T = TypeVar("T")


@dataclass(frozen=True)
class Metric(Generic[T]):
    """A measured value, such as a float, a scalar tensor or the history of a run.

    Attributes:
        value: what was measured.
        chance: the same measure of the best constant answer; None where it is unknown.
        kind: ``accuracy``, 0..1, or ``error``, of which less is better.
    """

    value: T
    chance: T | None = None
    kind: str = "accuracy"

    def __str__(self) -> str:
        form = FORMATS[self.kind]
        chance = "" if self.chance is None else f" (chance {self.chance:{form}})"
        return f"{self.value:{form}}{chance}"


def as_scalars(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of metrics and their chances under their scalars' names, and all other entries as they are."""
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
    """Return the metrics among scalars by their own names: ``accuracy_T`` as ``T``, ``NAME/accuracy_T`` as ``NAME/T``.

    The scalars' values may be anything; of ``{name: name}`` a metric holds the names of its two scalars.
    """
    metrics: dict[str, Metric[T]] = {}
    for name, value in scalars.items():
        head, slash, last = name.rpartition("/")
        kind, _, task = last.partition("_")
        if kind in FORMATS and task:
            metrics[f"{head}{slash}{task}"] = Metric(value, scalars.get(f"{head}{slash}chance_{task}"), kind)
    return metrics


def less_is_better(name: str) -> bool:
    """Whether the least value of a scalar of this name is the best one: of a loss or an error."""
    return "loss" in name or any(metric.kind == "error" for metric in from_scalars({name: None}).values())
