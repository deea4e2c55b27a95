"""Comparison of the losses of two runs, iteration by iteration."""

import math
from dataclasses import dataclass
from pathlib import Path

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import parse_row

Losses = dict[int, dict[str, float]]
"""Iteration to loss name to value."""


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison of two runs.

    Attributes:
        steps: number of iterations in both runs.
        names: names of the losses in both runs, sorted.
        largest: largest relative difference of these losses.
        differences: one line per difference; empty if the runs are equal.
    """

    steps: int
    names: list[str]
    largest: float
    differences: list[str]


def read_losses(run: Path) -> Losses:
    """Read the losses of a run from its output folder or its ``metrics.json``; lines without losses are skipped."""
    path = run / "metrics.json" if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(
            f"'{path}' cannot be read ({reason}); give the output folder of a run or its metrics.json"
        ) from error
    losses: Losses = {}
    for number, line in enumerate(lines, 1):
        row = parse_row(line.encode())
        scalars = row.scalars if row else {}
        values = {name: x for name, x in scalars.items() if name.startswith("loss") or name == "total_loss"}
        if row is None or not all(map(math.isfinite, values.values())):
            raise UserError(
                f"'{path}' line {number} is not a JSON object with an 'iteration' and finite losses; if the run was "
                "killed while writing, continue it with --resume"
            )
        if values:
            losses.setdefault(row.iteration, {}).update(values)
    if not losses:
        raise UserError(f"'{path}' contains no losses; give the output folder of a training run")
    return losses


def compare(a: Losses, b: Losses, tolerance: float = 0.0) -> Comparison:
    """Compare two runs; a loss differs if ``|x - y| > tolerance * max(|x|, |y|)``."""
    lines = [
        f"only {run} has step{'s' * (len(steps) > 1)} {', '.join(map(str, sorted(steps)))}"
        for run, steps in (("A", a.keys() - b.keys()), ("B", b.keys() - a.keys()))
        if steps
    ]
    alone: dict[str, int] = {}
    apart: list[tuple[float, int, str]] = []
    names: set[str] = set()
    common = sorted(a.keys() & b.keys())
    for step in common:
        for run, extra in (("A", a[step].keys() - b[step].keys()), ("B", b[step].keys() - a[step].keys())):
            for name in sorted(extra):
                alone.setdefault(f"only {run} has {name}", step)
        shared = a[step].keys() & b[step].keys()
        names |= shared
        apart += [(_relative(a[step][name], b[step][name]), step, name) for name in sorted(shared)]
    lines += [f"{text}, first at step {step}" for text, step in alone.items()]
    largest, at, worst = max(apart, default=(0.0, 0, ""))
    if largest > tolerance:
        first = next(step for difference, step, _ in apart if difference > tolerance)
        lines += [
            f"first difference at step {step}: {name} {a[step][name]!r} in A, {b[step][name]!r} in B"
            for difference, step, name in apart
            if step == first and difference > tolerance
        ]
        lines.append(f"largest relative difference: {largest:.3g} ({worst} at step {at})")
    return Comparison(len(common), sorted(names), largest, lines)


def _relative(x: float, y: float) -> float:
    return 0.0 if x == y else abs(x - y) / max(abs(x), abs(y))
