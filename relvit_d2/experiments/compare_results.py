"""The results of a comparison: means, paired differences, saved labels, verdict."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from relvit_d2.data.images.seen import SEEN, SeenCount, seen_sentence
from relvit_d2.experiments.commands import iteration_seconds
from relvit_d2.experiments.compare_arms import ComparedArm, Comparison
from relvit_d2.experiments.runs import Run
from relvit_d2.experiments.statistics import RunStatistics, paired_difference, pairs_needed
from relvit_d2.report.comparison import Point, Table, write_comparison

METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "detection": {"AP": ("bbox", "AP"), "AP50": ("bbox", "AP50")},
    "classification": {"top-1": ("top1",)},
}
"""Metrics by task, with their path for :meth:`Run.metric`; the verdict compares the first one."""


def collect(comparison: Comparison, seeds: Sequence[dict[str, Run]]) -> dict[str, Any]:
    """Return the results so far as JSON values for ``results.json``.

    ``metrics`` has for each metric, arm and share in percent the ``values`` of the seeds (None: not finished),
    ``mean``, ``std``, and under ``against`` the differences of :func:`_difference` to the arms of :func:`_others`.
    ``saved`` has for each arm and share the share with which the first arm has the same mean (:func:`labels_for`),
    ``seen`` the number of test images on which the arm's weights were trained, ``seconds`` the training time.
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
    """Return the arms with which an arm is compared: the first one, and the longer one."""
    return [other for i, other in enumerate(comparison.arms) if other != arm and (i == 0 or other.longer)]


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    done = [value for value in values if value is not None]
    found = RunStatistics.of(done) if done else None
    return {"values": list(values), "mean": found and found.mean, "std": found and found.std}


def _difference(ours: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any] | None:
    """Return the mean paired difference, half its 95 % interval, and the number of seeds with which it would be found.

    None if no pair is finished. ``margin`` is None for one pair; ``needed`` is None if the interval excludes zero or
    too many seeds are needed.
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
    """Return the smallest share with which a curve reaches ``value``; None if it does not.

    The curve is interpolated linearly over the logarithm of the share.

    Args:
        value: value of the metric.
        curve: mean of the metric by share.
    """
    points = sorted(curve.items())
    if points[0][1] >= value:
        return points[0][0]
    for (low, start), (high, end) in pairwise(points):
        if start < value <= end:
            fraction = (value - start) / (end - start)
            return math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
    return None


def _saved(rows: Mapping[str, Any], comparison: Comparison) -> dict[str, Any]:
    """Return by arm and share the result of :func:`labels_for` on the curve of the first arm, "more" for None."""
    name, *rest = (arm.name for arm in comparison.arms)
    means = {share: rows[name][f"{share:g}"]["mean"] for share in comparison.shares}
    if len(means) < 2 or None in means.values():
        return {}
    found: dict[str, Any] = {}
    for other in rest:
        shares = {share: rows[other][f"{share:g}"]["mean"] for share in comparison.shares[:-1]}
        reached = {share: labels_for(mean, means) for share, mean in shares.items() if mean is not None}
        # A curve that falls in between can reach the value with fewer labels, which saves none.
        found[other] = {f"{x:g}": share or "more" for x, share in reached.items() if share is None or share > x}
    return found


def _seen(comparison: Comparison, seeds: Sequence[dict[str, Run]], arm: ComparedArm) -> dict[str, int] | None:
    """Return the count of test images on which an arm's weights were trained, the maximum of all runs, if known."""
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
    """Return the mean seconds of the finished pre-trainings and trainings of an arm; None if there are none."""
    found: dict[str, float | None] = {}
    for what, index in (("pretraining", 0), ("training", -1)):
        runs = [comparison.trainings(runs, arm, share)[index] for runs in seeds for share in comparison.shares]
        if what == "pretraining" and not arm.pretraining:
            found[what] = 0.0
            continue
        times = [sum(iteration_seconds(run.folder)) for run in runs if run.finished()]
        found[what] = sum(times) / len(times) if times else None
    return found


def verdict(rows: Mapping[str, Any], metric: str, comparison: Comparison, seeds: int) -> list[str]:
    """Return sentences on the benefit of pre-training and on the differences between the arms.

    Each arm is compared with the first one; an arm with pre-training or weights also with the longer one.
    """
    sentences = [text for arm in comparison.arms[1:] if arm.pretraining for text in _headline(arm, rows, comparison)]
    for arm in comparison.arms[1:]:
        for other in _others(comparison, arm):
            if other == comparison.arms[0] or arm.pretraining or arm.weights:
                sentences += _sentences(arm.name, other.name, rows[arm.name], metric)
    if seeds == 1 and sentences:
        sentences.append("One seed has no interval: the sign of every difference may change with another seed.")
    return sentences


def _headline(arm: ComparedArm, rows: Mapping[str, Any], comparison: Comparison) -> list[str]:
    """Return a sentence with the shares for which an arm beats all arms with which it is compared, beyond noise.

    None while no pair of runs is finished.
    """
    others = [other.name for other in _others(comparison, arm)]
    found = {share: [cell["against"][name] for name in others] for share, cell in rows[arm.name].items()}
    if not any(all(differences) for differences in found.values()):
        return []
    won = [share for share, differences in found.items() if all(map(_beats, differences))]
    if won:
        return [f"{arm.name} beats {' and '.join(others)} beyond noise with {', '.join(won)} % of the labels."]
    return [f"{arm.name} does not beat {' and '.join(others)} beyond noise with any share of the labels."]


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
            kind = f"the difference of {arm} to {other} in {metric} is within noise:"
            text += f" (a difference of this size needs about {found['needed']} seeds)" if found["needed"] else ""
        groups.setdefault(kind, []).append(text)
    return [f"{kind[0].upper()}{kind[1:]} {'; '.join(texts)}." for kind, texts in groups.items()]


def saved_sentences(results: Mapping[str, Any], first: str) -> list[str]:
    """Return sentences on the labels that arms save compared with the ``first`` one."""
    sentences = []
    for arm, saved in results["saved"].items():
        for share, reached in saved.items():
            whole = max(results["shares"])
            if reached == "more":
                sentences.append(f"{arm} with {share} % of the labels is better than {first} with {whole:g} %.")
            else:
                sentences.append(f"{arm} with {share} % of the labels is as good as {first} with {reached:.3g} %.")
    return sentences


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Write the results as an HTML page with curves over the share of the labels."""
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
    """Return half the 95 % interval of the mean of the values that are not None; None for fewer than two."""
    done = [value for value in values if value is not None]
    return paired_difference(done, [0.0] * len(done)).margin if done else None


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Return the sentences on differences, saved labels and seen test images."""
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
    chosen = f"The checkpoint is selected on {data['validation']}" if data["validation"] else "The last model is tested"
    schedules = f"All schedules are those of the configs times {results['scale']:.3g}"
    if results["longer"] > 1:
        schedules += (
            f"; that of scratch-longer is further multiplied by {results['longer']:.3g}, so that it takes as many "
            "seconds as pre-training and training together"
        )
    return [
        f"Trained on {data['train']}; pre-training uses all its images without labels. {chosen}. Differences are "
        "means over seeds, between runs with the same labelled images, ± half a 95 % interval (paired t). Seconds are "
        "those of the iterations, the mean over the runs.",
        f"{schedules}.",
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
    """Return a sentence for each arm with a count of test images on which its weights were trained."""
    test = results["data"]["test"]
    counts = {arm: SeenCount(**count) for arm, count in results["seen"].items()}
    return [f"{arm}: {seen_sentence(test, *count)}." for arm, count in counts.items()]


def _compared_with(rows: Mapping[str, Any]) -> list[str]:
    others = {other for row in rows.values() for cell in row.values() for other in cell["against"]}
    return [arm for arm in rows if arm in others]


def heads_of(rows: Mapping[str, Any]) -> list[str]:
    """Return the column heads of :func:`cells_of`."""
    return ["labels", "arm", "mean", "std", "seeds", *(f"minus {other}" for other in _compared_with(rows))]


def cells_of(rows: Mapping[str, Any], shares: Sequence[float]) -> list[list[str]]:
    """Return the rows of the table of a metric: share, arm, mean, standard deviation, seeds, differences."""
    table = []
    for share in shares:
        for arm, row in rows.items():
            cell = row[f"{share:g}"]
            done = sum(value is not None for value in cell["values"])
            numbers = ["" if cell[key] is None else f"{cell[key]:.2f}" for key in ("mean", "std")]
            differences = [_formatted(cell["against"].get(other)) for other in _compared_with(rows)]
            table.append([f"{share:g} %", arm, *numbers, str(done), *differences])
    return table


def _formatted(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    return f"{found['value']:+.2f}" + (f" ± {found['margin']:.2f}" if found["margin"] is not None else "")
