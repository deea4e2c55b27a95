"""Results of a table row: our metrics beside the paper's, as plain values and as a Markdown page."""

from collections.abc import Mapping, Sequence
from typing import Any

from relvit_d2.experiments.runs import ImageCounts, Run
from relvit_d2.experiments.statistics import RunStatistics, difference
from relvit_d2.experiments.table_rows import PaperData, Published, Row

# Keys that concern the machine and the data folder, not what is learned.
_MACHINE_KEYS = (
    "MODEL.DEVICE",
    "MODEL.ACTIVATION_CHECKPOINT",
    "MODEL.COMPILE",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.DOWNLOAD",
    "SOLVER.GRAD_ACCUM_STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.PRECISION",
)


def why_no_verdict(paper: PaperData, run: Run, images: ImageCounts, scale: float) -> str:
    """Return why a run's result cannot be compared with the paper's; empty if data and protocol are the paper's.

    Args:
        paper: the paper's data and protocol.
        run: the one that is measured.
        images: those that it uses.
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
    if count != paper.images[0]:
        out = f", because {images.held_out:,} are held out to choose the model" if images.held_out else ""
        return f"the paper trains on {paper.images[0]:,} images, here it is on {count:,}{out}"
    if images.test != paper.images[1]:
        return f"the paper tests on {paper.images[1]:,} images, here it is on {images.test:,}"
    if images.note:
        return f"the images are {images.note}"
    if paper.best_on_test and not cfg.TEST.BEST_ON_TEST:
        return "the paper reports the best model on the test images, here the test images do not choose the model"
    if keys := [key for key in run.keys if key not in _MACHINE_KEYS]:
        return f"{', '.join(keys)} {'was' if len(keys) == 1 else 'were'} changed"
    return ""


def collect(
    row: Row, seeds: Sequence[dict[str, Run]], images: Mapping[str, ImageCounts], scale: float
) -> dict[str, Any]:
    """Return the results so far, as plain values for ``results.json``.

    Args:
        row: what is run.
        seeds: the runs of each seed.
        images: those of each arm's last run.
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
        sums = {name: RunStatistics.of(found) for name, found in done.items() if found}
        published = {arm.name: arm.published.get(metric) for arm in row.arms}
        metrics[metric] = {}
        for arm in row.arms:
            ours, theirs = sums.get(arm.name), published[arm.name]
            judge = not arms[arm.name]["no_verdict"] and len(done[arm.name]) > 1
            metrics[metric][arm.name] = {
                "values": values[arm.name],
                "mean": ours and ours.mean,
                "spread": ours and ours.std,
                "gain": _compared(ours, sums.get(arm.baseline), scale == 1),
                "published": theirs and theirs.runs.mean,
                "published_spread": theirs and theirs.runs.std,
                "published_slip": bool(theirs and theirs.slip),
                "published_gain": _gain(theirs, published.get(arm.baseline)),
                "against_published": _compared(ours, theirs.runs if theirs and not theirs.slip else None, judge),
            }
    return {"title": row.title, "scale": scale, "arms": arms, "metrics": metrics, "remarks": row.remarks}


def _gain(of: Published | None, over: Published | None) -> float | None:
    """Return the difference of two published figures; None where one is missing or a printing error."""
    return of.runs.mean - over.runs.mean if of and over and not (of.slip or over.slip) else None


def _compared(ours: RunStatistics | None, other: RunStatistics | None, judge: bool) -> dict[str, Any] | None:
    """Return a difference, its margin of noise, and whether it is within that; None where there is nothing to compare.

    Args:
        ours, other: the means.
        judge: whether margin and verdict are given.
    """
    if not ours or not other:
        return None
    found = difference(ours, other)
    if not judge:
        return {"difference": found.value, "margin": None, "within_noise": None}
    return {"difference": found.value, "margin": found.margin, "within_noise": found.within_noise}


def page(results: dict[str, Any]) -> str:
    """Return ``results``, with what the tool adds to :func:`collect`'s, as a page of Markdown."""
    mark = "*" if results["scale"] < 1 else ""
    arms = results["arms"]
    lines = [f"# {results['title']}", ""]
    for metric, rows in results["metrics"].items():
        lines += [
            f"## {metric}, percent",
            "",
            "| arm | ours | over its baseline | published | over its baseline | ours less the published |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, arm in rows.items():
            gain, against = _difference(arm["gain"], mark), _difference(arm["against_published"], mark, published=True)
            published = _number(arm["published"]) + _spread(arm["published_spread"])
            published += " (probably a slip)" if arm["published_slip"] else ""
            lines.append(
                f"| {name} | {_mean(arm, arms[name]['finished'], mark)} | {gain} | {published} | "
                f"{_number(arm['published_gain'], '+')} | {against} |"
            )
        lines.append("")
    for names, words in _by_arms({name: _data(arm["data"]) for name, arm in arms.items()}):
        lines += [f"{names}{words}", ""]
    if results["note"]:
        lines += [f"{results['note'].rstrip('.')}.", ""]
    if not any(arm["published"] is not None for rows in results["metrics"].values() for arm in rows.values()):
        lines += ["The paper has no figures of these arms.", ""]
    for names, words in _by_arms({name: arm["no_verdict"] for name, arm in arms.items() if arm["no_verdict"]}):
        lines += [f"{names}No verdict against the paper: {words}.", ""]
    if results["remarks"]:
        lines += [" ".join(results["remarks"]), ""]
    seeds = results["seeds"]
    if mark:
        lines += [
            f"\\* A rehearsal: schedule and images cut to {results['scale']:.4g} of the config's. No number marked "
            "so measures the method.",
            "",
        ]
    if seeds == 1:
        lines.append("One seed: the result of another one is not known, so no difference is called real or none.")
    else:
        lines.append(
            f"Means and standard deviations over {seeds} seeds. A difference is within noise if seeds alone would make "
            "one as large in more than 5 of 100 cases (Welch's t interval); a published figure of one run is taken to "
            "spread as ours do, a published spread to be of two runs."
        )
    machine = results["machine"]
    lines += [
        "",
        f"Measured on {machine['device']}, {machine['precision']}, torch {machine['torch']}, relvit_d2 "
        f"{machine['version']}: `{results['command']}`",
        "",
    ]
    return "\n".join(lines)


def _by_arms(words: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return each of the different ``words`` of the arms, after the names of its arms unless all arms share it."""
    found: dict[str, list[str]] = {}
    for name, text in words.items():
        found.setdefault(text, []).append(name)
    return [("" if len(found) == 1 else f"{', '.join(names)}: ", text) for text, names in found.items()]


def _data(data: dict[str, Any]) -> str:
    """Return the sentence about an arm's images."""
    images = data["images"]
    more = f", {images['held_out']:,} held out to choose the model" if images["held_out"] else ""
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
    """Return a difference in words.

    Args:
        found: of :func:`_compared`.
        mark: of a rehearsal's numbers.
        published: whether it is one from the paper's figure.
    """
    if not found:
        return ""
    value = f"{found['difference']:+.2f}{mark}"
    if found["within_noise"] is None:
        return f"{value}, no verdict" if published else value
    noise = f"{'within' if found['within_noise'] else 'beyond'} noise"
    return f"{value}, {noise}{' of the published figure' if published else ''} (± {found['margin']:.2f})"
