"""The results of a comparison: means, paired differences, labels saved, the verdict in words."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from relvit_d2.data.images.seen import SEEN, SeenCount, seen_sentence
from relvit_d2.experiments.compare_arms import ComparedArm, Comparison
from relvit_d2.experiments.compare_budget import iteration_seconds
from relvit_d2.experiments.runs import Run
from relvit_d2.experiments.statistics import RunStatistics, paired_difference, pairs_needed
from relvit_d2.report.comparison import Point, Table, write_comparison

METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "detection": {"AP": ("bbox", "AP"), "AP50": ("bbox", "AP50")},
    "classification": {"top-1": ("top1",)},
}
"""Metrics by task, the first of which the verdict is about, with their places for :meth:`Run.metric`."""


def collect(comparison: Comparison, seeds: Sequence[dict[str, Run]]) -> dict[str, Any]:
    """Return the results so far, plain values for ``results.json``.

    ``metrics`` holds for each metric, arm and label share in percent ``values``, one a seed, None where the run is not
    finished, ``mean``, ``std``, and under ``against`` the differences of :func:`_difference` to the arms that others
    are compared with. ``saved`` holds for each arm and share the share with which the first arm reaches the same, see
    :func:`labels_for`; ``seen`` how many test images the arm's weights were trained on; ``seconds`` the training time.
    """
    metrics: dict[str, Any] = {}
    for metric, path in METRICS[comparison.data.task].items():
        values = {
            arm: {
                share: [comparison.tested(runs, arm, share).metric(path) for runs in seeds]
                for share in comparison.shares
            }
            for arm in comparison.arms
        }
        metrics[metric] = {
            arm.name: {
                f"{share:g}": _summary(found)
                | {
                    "against": {
                        other.name: _difference(found, values[other][share]) for other in _others(comparison, arm)
                    }
                }
                for share, found in row.items()
            }
            for arm, row in values.items()
        }
    first = next(iter(metrics))
    return {
        "task": comparison.data.task,
        "data": {role: getattr(comparison.data, role) for role in ("train", "validation", "test")},
        "shares": list(comparison.shares),
        "seeds": len(seeds),
        "metrics": metrics,
        "saved": _saved(metrics[first], comparison),
        "seen": {arm.name: seen for arm in comparison.arms if (seen := _seen(comparison, seeds, arm))},
        "seconds": {arm.name: _seconds(comparison, seeds, arm) for arm in comparison.arms},
        "verdict": verdict(metrics[first], first, comparison, len(seeds)),
    }


def _others(comparison: Comparison, arm: ComparedArm) -> list[ComparedArm]:
    """Return the arms that an arm is compared with: the first one, and the longer one."""
    return [other for place, other in enumerate(comparison.arms) if other != arm and (place == 0 or other.longer)]


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    done = [value for value in values if value is not None]
    found = RunStatistics.of(done) if done else None
    return {"values": list(values), "mean": found and found.mean, "std": found and found.std}


def _difference(ours: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any] | None:
    """Return the mean difference over the seeds that both have, half its 95 % interval, and the seeds that are needed.

    None where no seed is finished. ``margin`` is None of one seed; ``needed`` is None where the interval excludes zero,
    or no number of seeds would do.
    """
    pairs = [(a, b) for a, b in zip(ours, other, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second)
    needed = None
    if found.within_noise:
        std = RunStatistics.of([a - b for a, b in pairs]).std
        needed = pairs_needed(found.value, std) if std else None
    return {"value": found.value, "margin": found.margin, "pairs": len(pairs), "needed": needed}


def labels_for(value: float, curve: Mapping[float, float]) -> float | None:
    """Return the share of the labels with which a curve first reaches ``value``; None if it does not.

    Between two shares the curve is a straight line over the logarithm of the share.

    Args:
        value: of the metric.
        curve: mean of the metric by share.
    """
    points = sorted(curve.items())
    if points[0][1] >= value:
        return points[0][0]
    for (low, start), (high, end) in pairwise(points):
        if start < value <= end:
            part = (value - start) / (end - start)
            return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    return None


def _saved(rows: Mapping[str, Any], comparison: Comparison) -> dict[str, Any]:
    """Return by arm and share the share of :func:`labels_for` of the first arm's curve, "more" beyond its end."""
    name, *rest = (arm.name for arm in comparison.arms)
    means = {share: rows[name][f"{share:g}"]["mean"] for share in comparison.shares}
    if len(means) < 2 or None in means.values():
        return {}
    found: dict[str, Any] = {}
    for other in rest:
        shares = {share: rows[other][f"{share:g}"]["mean"] for share in comparison.shares[:-1]}
        reached = {share: labels_for(mean, means) for share, mean in shares.items() if mean is not None}
        # A curve that falls somewhere reaches a value with fewer labels too: that saves none.
        found[other] = {f"{x:g}": share or "more" for x, share in reached.items() if share is None or share > x}
    return found


def _seen(comparison: Comparison, seeds: Sequence[dict[str, Run]], arm: ComparedArm) -> dict[str, int] | None:
    """Return how many test images an arm's weights were trained on, the most of all runs; None if it is not known."""
    counts = []
    for runs in seeds:
        for share in comparison.shares:
            run = comparison.tested(runs, arm, share)
            if run.finished():
                document = json.loads((run.folder / "inference/results.json").read_text(encoding="utf-8"))
                counts.append(document[", ".join(run.config.DATASETS.TEST)].get(SEEN))
    known = [count for count in counts if count]
    return max(known, key=lambda count: count["seen"]) if known else None


def _seconds(comparison: Comparison, seeds: Sequence[dict[str, Run]], arm: ComparedArm) -> dict[str, float | None]:
    """Return the mean seconds of pre-training and of training of an arm's finished runs; None of none."""
    found: dict[str, float | None] = {}
    for what, place in (("pretraining", 0), ("training", -1)):
        runs = [comparison.trainings(runs, arm, share)[place] for runs in seeds for share in comparison.shares]
        if what == "pretraining" and not arm.pretraining:
            found[what] = 0.0
            continue
        times = [sum(iteration_seconds(run.folder)) for run in runs if run.finished()]
        found[what] = sum(times) / len(times) if times else None
    return found


def verdict(rows: Mapping[str, Any], metric: str, comparison: Comparison, seeds: int) -> list[str]:
    """Return a sentence on whether pre-training pays, and sentences on the differences of the arms.

    Each arm is compared with the first one, and one with pre-training or weights with the longer one too.
    """
    sentences = [_headline(arm, rows, comparison) for arm in comparison.arms[1:] if arm.pretraining]
    for arm in comparison.arms[1:]:
        for other in _others(comparison, arm):
            if other == comparison.arms[0] or arm.pretraining or arm.weights:
                sentences += _sentences(arm.name, other.name, rows[arm.name], metric)
    if seeds == 1 and sentences:
        sentences.append("One seed has no interval: another one may turn every difference around.")
    return sentences


def _headline(arm: ComparedArm, rows: Mapping[str, Any], comparison: Comparison) -> str:
    """Return whether an arm beats all that it is compared with, beyond noise, and with which shares of the labels."""
    others = [other.name for other in _others(comparison, arm)]
    won = [share for share, cell in rows[arm.name].items() if all(_beats(cell["against"][name]) for name in others)]
    if won:
        return f"{arm.name} pays with {', '.join(won)} % of the labels: it beats {' and '.join(others)} beyond noise."
    return f"It is not shown that {arm.name} pays: with no share of the labels it beats {' and '.join(others)}."


def _beats(found: Mapping[str, Any] | None) -> bool:
    return bool(found and found["margin"] is not None and found["value"] > found["margin"])


def _sentences(arm: str, other: str, row: Mapping[str, Any], metric: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for share, cell in row.items():
        found = cell["against"][other]
        if found is None:
            continue
        value, margin = found["value"], found["margin"]
        text = f"{value:+.2f}" + (f" ± {margin:.2f}" if margin is not None else "") + f" with {share} % of the labels"
        if margin is None:
            kind = f"{arm} differs from {other} in {metric} by"
        elif abs(value) > margin:  # the interval excludes zero
            kind = f"{arm} {'beats' if value > 0 else 'is worse than'} {other} in {metric}, by"
        else:
            kind = f"no difference of {arm} to {other} in {metric} is shown:"
            text += f" (about {found['needed']} seeds would show one of that size)" if found["needed"] else ""
        groups.setdefault(kind, []).append(text)
    return [f"{kind[0].upper()}{kind[1:]} {'; '.join(texts)}." for kind, texts in groups.items()]


def saved_sentences(results: Mapping[str, Any], first: str) -> list[str]:
    """Return sentences on the labels that arms save over the ``first`` one."""
    sentences = []
    for arm, saved in results["saved"].items():
        for share, reached in saved.items():
            whole = max(results["shares"])
            what = (
                f"more than {first} with {whole:g} %"
                if reached == "more"
                else f"what {first} needs {reached:.0f} % for"
            )
            sentences.append(f"{arm} with {share} % of the labels reaches {what}.")
    return sentences


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the results as an HTML page with a curve over the share of the labels."""
    curves = {
        metric: {
            arm: [
                Point(share, cell["mean"], mean_margin(cell["values"]))
                for share in results["shares"]
                if (cell := row[f"{share:g}"])["mean"] is not None
            ]
            for arm, row in rows.items()
        }
        for metric, rows in results["metrics"].items()
    }
    test = results["data"]["test"]
    tables: list[Table] = [
        (f"{metric} on {test}, percent", heads_of(rows), cells_of(rows, results["shares"]))
        for metric, rows in results["metrics"].items()
    ]
    tables.append(("Seconds of a run", SECONDS, seconds_rows(results)))
    title = f"{' against '.join(results['seconds'])} on {results['data']['train']}"
    write_comparison(title, sentences(results), curves, tables, notes(results), path)


def mean_margin(values: Sequence[float | None]) -> float | None:
    """Return half the 95 % interval of the mean of the values that are there; None of fewer than two."""
    done = [value for value in values if value is not None]
    return paired_difference(done, [0.0] * len(done)).margin if done else None


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Return the verdict, the labels that are saved, and the test images that were seen."""
    first = next(iter(results["seconds"]))
    return [*results["verdict"], *saved_sentences(results, first), *seen_sentences(results)]


SECONDS = ["arm", "pre-training", "training"]


def seconds_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table with the columns :data:`SECONDS`."""
    return [
        [arm, *("" if value is None else f"{value:.0f}" for value in found.values())]
        for arm, found in results["seconds"].items()
    ]


def notes(results: Mapping[str, Any]) -> list[str]:
    """Return paragraphs on data, protocol, machine and command."""
    data, machine = results["data"], results["machine"]
    chosen = f"The checkpoint is chosen on {data['validation']}" if data["validation"] else "The last model is tested"
    return [
        f"Trained on {data['train']}; pre-training sees all its images, without labels. {chosen}. Differences are "
        "means over seeds of runs with the same labelled images, ± half a 95 % interval (paired t). Seconds are those "
        "of the iterations, a mean over the runs.",
        f"All schedules are {results['scale']:.3g} of the configs'; the longer one is {results['longer']:.3g} times "
        "the training's, so that it takes the seconds of pre-training and training together.",
        f"Measured on {machine['device']}, {machine['precision']}, torch {machine['torch']}, relvit_d2 "
        f"{machine['version']}: {results['command']}",
    ]


def page(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"# {' against '.join(results['seconds'])}", "", *(f"- {text}" for text in sentences(results)), ""]
    for metric, rows in results["metrics"].items():
        lines += [f"## {metric} on {results['data']['test']}, percent", ""]
        lines += [*_markdown(heads_of(rows), cells_of(rows, results["shares"])), ""]
    lines += ["## Seconds of a run", "", *_markdown(SECONDS, seconds_rows(results))]
    return "\n".join([*lines, *(f"\n{note}" for note in notes(results)), ""])


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = f"|{'---|'}{'---:|' * (len(heads) - 1)}"
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def seen_sentences(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each arm of which it is known how many test images its weights were trained on."""
    test = results["data"]["test"]
    counts = {arm: SeenCount(**count) for arm, count in results["seen"].items()}
    return [f"{arm}: {seen_sentence(test, *count)}." for arm, count in counts.items()]


def _compared_with(rows: Mapping[str, Any]) -> list[str]:
    others = {other for row in rows.values() for cell in row.values() for other in cell["against"]}
    return [arm for arm in rows if arm in others]


def heads_of(rows: Mapping[str, Any]) -> list[str]:
    """Return the heads of the columns of :func:`cells_of`."""
    return ["labels", "arm", "mean", "std", "seeds", *(f"less {other}" for other in _compared_with(rows))]


def cells_of(rows: Mapping[str, Any], shares: Sequence[float]) -> list[list[str]]:
    """Return the cells of the table of a metric: share, arm, mean, spread, seeds, differences."""
    table = []
    for share in shares:
        for arm, row in rows.items():
            cell = row[f"{share:g}"]
            done = sum(value is not None for value in cell["values"])
            numbers = ["" if cell[key] is None else f"{cell[key]:.2f}" for key in ("mean", "std")]
            differences = [_words(cell["against"].get(other)) for other in _compared_with(rows)]
            table.append([f"{share:g} %", arm, *numbers, str(done), *differences])
    return table


def _words(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    return f"{found['value']:+.2f}" + (f" ± {found['margin']:.2f}" if found["margin"] is not None else "")
