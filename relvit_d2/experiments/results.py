"""Results of a table row: our metrics beside the paper's, as plain values and as a Markdown page."""

from collections.abc import Mapping, Sequence
from typing import Any

from relvit_d2.experiments.runs import ImageCounts, Run
from relvit_d2.experiments.statistics import RunStatistics, difference
from relvit_d2.experiments.table_rows import PaperData, Published, Row

# Keys that concern the machine and the data folder, not the trained model.
_MACHINE_KEYS = (
    "MODEL.DEVICE",
    "MODEL.ACTIVATION_CHECKPOINT",
    "MODEL.COMPILE",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.CACHE",
    "DATALOADER.CACHE_LIMIT_GB",
    "DATASETS.DOWNLOAD",
    "DATASETS.HASH_CONTENTS",
    "SOLVER.GRAD_ACCUM_STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.PRECISION",
)


def why_no_verdict(paper: PaperData, run: Run, images: ImageCounts, scale: float) -> str:
    """Return why a run's result cannot be compared with the paper's; empty if data and protocol are the paper's.

    Args:
        paper: the paper's data and protocol.
        run: the evaluated run.
        images: its numbers of images.
        scale: share of the schedule and of the images, 0..1.
    """
    cfg = run.config
    train, test = (", ".join(names) for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    count = images.train + images.empty
    if scale < 1:
        return f"schedule and images are cut to {scale:.4g} of the paper's"
    if paper.doubt:
        return paper.doubt
    if test != paper.test:
        return f"the paper's figure is on the images of {paper.test}, ours on those of {test}"
    if train != paper.train:
        return f"the paper trains on {paper.train}, here it is {train}"
    if count != paper.train_images:
        out = f", because {images.held_out:,} are held out to select the model" if images.held_out else ""
        return f"the paper trains on {paper.train_images:,} images, here it is on {count:,}{out}"
    if images.test != paper.test_images:
        return f"the paper tests on {paper.test_images:,} images, here it is on {images.test:,}"
    if images.note:
        return f"the images are {images.note}"
    if paper.best_on_test and not cfg.TEST.BEST_ON_TEST:
        return "the paper reports the best model on the test images, here the test images do not select the model"
    if keys := [key for key in run.keys if key not in _MACHINE_KEYS]:
        return f"{', '.join(keys)} {'was' if len(keys) == 1 else 'were'} changed"
    return ""


def collect(
    row: Row, seeds: Sequence[dict[str, Run]], images: Mapping[str, ImageCounts], scale: float
) -> dict[str, Any]:
    """Return the results so far, as plain values for ``results.json``.

    Args:
        seeds: the runs of each seed by the name of their step.
        images: numbers of images of each arm's last run.
        scale: share of the schedule and of the images, 0..1.
    """
    arms: dict[str, Any] = {}
    for arm in row.arms:
        runs = [seed[arm.steps[-1].name] for seed in seeds]
        data = runs[0].config.DATASETS
        counts = images[arm.name]
        arms[arm.name] = {
            "baseline": arm.baseline,
            "finished": sum(run.finished() for run in runs),
            "data": {"train": ", ".join(data.TRAIN), "test": ", ".join(data.TEST), "images": counts._asdict()},
            "no_verdict": why_no_verdict(row.paper, runs[0], counts, scale) if row.paper and arm.published else "",
        }
    metrics: dict[str, Any] = {}
    for metric, path in row.metrics.items():
        values = {arm.name: [seed[arm.steps[-1].name].metric(path) for seed in seeds] for arm in row.arms}
        done = {name: [x for x in found if x is not None] for name, found in values.items()}
        stats = {name: RunStatistics.of(found) for name, found in done.items() if found}
        published = {arm.name: arm.published.get(metric) for arm in row.arms}
        metrics[metric] = {}
        for arm in row.arms:
            ours, theirs = stats.get(arm.name), published[arm.name]
            verdict = not arms[arm.name]["no_verdict"] and len(done[arm.name]) > 1
            metrics[metric][arm.name] = {
                "values": values[arm.name],
                "mean": ours and ours.mean,
                "spread": ours and ours.std,
                "gain": _comparison(ours, stats.get(arm.baseline), scale == 1),
                "published": theirs and theirs.runs.mean,
                "published_spread": theirs and theirs.runs.std,
                "published_misprint": bool(theirs and theirs.misprint),
                "published_gain": _gain(theirs, published.get(arm.baseline)),
                "against_published": _comparison(
                    ours, theirs.runs if theirs and not theirs.misprint else None, verdict
                ),
            }
    return {"title": row.title, "scale": scale, "arms": arms, "metrics": metrics, "remarks": row.remarks}


def _gain(arm: Published | None, baseline: Published | None) -> float | None:
    """Return the difference of two published figures; None if one is missing or a misprint."""
    return arm.runs.mean - baseline.runs.mean if arm and baseline and not (arm.misprint or baseline.misprint) else None


def _comparison(first: RunStatistics | None, second: RunStatistics | None, verdict: bool) -> dict[str, Any] | None:
    """Return the difference of two means, with margin and ``within_noise`` if ``verdict``; None if one is missing."""
    if not first or not second:
        return None
    found = difference(first, second)
    margin, within = (found.margin, found.within_noise) if verdict else (None, None)
    return {"difference": found.value, "margin": margin, "within_noise": within}


def page(results: dict[str, Any]) -> str:
    """Return the content of ``results.json`` as a Markdown page."""
    mark = "*" if results["scale"] < 1 else ""
    arms = results["arms"]
    lines = [f"# {results['title']}", ""]
    for metric, rows in results["metrics"].items():
        lines += [
            f"## {metric}, percent",
            "",
            "| arm | ours | over its baseline | published | over its baseline | ours - published |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, arm in rows.items():
            gain, against = _difference(arm["gain"], mark), _difference(arm["against_published"], mark, published=True)
            published = _number(arm["published"]) + _spread(arm["published_spread"])
            published += " (probably a misprint)" if arm["published_misprint"] else ""
            lines.append(
                f"| {name} | {_mean(arm, arms[name]['finished'], mark)} | {gain} | {published} | "
                f"{_number(arm['published_gain'], '+')} | {against} |"
            )
        lines.append("")
    for names, text in _by_arms({name: _data(arm["data"]) for name, arm in arms.items()}):
        lines += [f"{names}{text}", ""]
    if results["note"]:
        lines += [f"{results['note'].rstrip('.')}.", ""]
    if not any(arm["published"] is not None for rows in results["metrics"].values() for arm in rows.values()):
        lines += ["The paper has no figures of these arms.", ""]
    for names, text in _by_arms({name: arm["no_verdict"] for name, arm in arms.items() if arm["no_verdict"]}):
        lines += [f"{names}No verdict against the paper: {text}.", ""]
    if results["remarks"]:
        lines += [" ".join(results["remarks"]), ""]
    seeds = results["seeds"]
    if mark:
        lines += [
            f"\\* A rehearsal: schedule and images cut to {results['scale']:.4g} of the config's. Marked numbers do "
            "not measure the method.",
            "",
        ]
    if seeds == 1:
        lines.append("One seed: the variation between seeds is unknown, so no difference gets a verdict.")
    else:
        lines.append(
            f"Means and standard deviations over {seeds} seeds. A difference is within noise if Welch's t interval at "
            "95 % contains zero. A published figure of one run is assumed to have our standard deviation; a published "
            "standard deviation is assumed to be of two runs."
        )
    machine = results["machine"]
    lines += [
        "",
        f"Measured on {machine['device']}, {machine['precision']}, torch {machine['torch']}, relvit_d2 "
        f"{machine['version']}: `{results['command']}`",
        "",
    ]
    return "\n".join(lines)


def _by_arms(sentences: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return each distinct sentence with the names of its arms as a prefix; no prefix if all arms share it."""
    found: dict[str, list[str]] = {}
    for name, text in sentences.items():
        found.setdefault(text, []).append(name)
    return [("" if len(found) == 1 else f"{', '.join(names)}: ", text) for text, names in found.items()]


def _data(data: dict[str, Any]) -> str:
    """Return the sentence about an arm's images."""
    images = data["images"]
    more = f", {images['held_out']:,} held out to select the model" if images["held_out"] else ""
    more += f", {images['empty']:,} left out without an object" if images["empty"] else ""
    return (
        f"Training images: {images['train']:,} of {data['train']}{more}; "
        f"test images: {images['test']:,} of {data['test']}."
    )


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.2f}"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def _mean(arm: dict[str, Any], finished: int, mark: str) -> str:
    done = sum(value is not None for value in arm["values"])
    if not done:
        return "none found" if finished else "not run yet"
    count = "" if done == len(arm["values"]) else f" ({done} of {len(arm['values'])})"
    return f"{arm['mean']:.2f}{mark}{_spread(arm['spread'])}{count}"


def _difference(found: dict[str, Any] | None, mark: str, published: bool = False) -> str:
    """Return the text of a :func:`_comparison`; ``published``: with a figure of the paper."""
    if not found:
        return ""
    value = f"{found['difference']:+.2f}{mark}"
    if found["within_noise"] is None:
        return f"{value}, no verdict" if published else value
    noise = f"{'within' if found['within_noise'] else 'beyond'} noise"
    return f"{value}, {noise}{' of the published figure' if published else ''} (± {found['margin']:.2f})"
