"""A row of a table as runs of the training commands, and their results beside the paper's figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from relvit_d2.classification.run import list_data
from relvit_d2.config.config_file import COMMANDS
from relvit_d2.data.classification.datasets import is_class_set, list_class_sets
from relvit_d2.data.detection import catalog
from relvit_d2.detection.run import evaluation_sets, training_records
from relvit_d2.experiments.comparison import Runs, difference
from relvit_d2.experiments.published import PaperData, Published, Row, Step
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json

# What the tool sets itself, and how else a user does.
_OWN = {
    "SEED": "choose how many with --seeds",
    "OUTPUT_DIR": "choose the folder with --output",
    "MODEL.WEIGHTS": "each arm starts from its own pre-training",
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": "the last checkpoint of each run is kept",
}

# Keys that concern the machine and the data's place, not what is learnt.
_MACHINE = (
    "MODEL.DEVICE",
    "MODEL.ACTIVATION_CHECKPOINT",
    "MODEL.COMPILE",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.DOWNLOAD",
    "SOLVER.GRAD_ACCUM_STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.PRECISION",
)

# What a shorter schedule has less of.
_SCHEDULE = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")


@dataclass(frozen=True)
class Run:
    """One step of one seed, ready to be run.

    Attributes:
        step: which.
        folder: its ``OUTPUT_DIR``.
        command: name of a command of relvit-d2 and its arguments; run again, it goes on where it stopped.
        config: as the command reads it.
        settings: all that decides what it learns, to know it again.
        keys: config keys that the user gave for all runs.
    """

    step: Step
    folder: Path
    command: list[str]
    config: CfgNode
    settings: dict[str, Any]
    keys: tuple[str, ...] = ()

    def finished(self) -> bool:
        """Whether it was run to its end.

        Raises:
            UserError: if something else was, in the same folder.
        """
        path = self.folder / "finished.json"
        if not path.is_file():
            return False
        there = json.loads(path.read_text(encoding="utf-8"))
        for key, value in self.settings.items():
            if there.get(key) != json.loads(json.dumps(value)):
                raise UserError(
                    f"'{self.folder}' holds a finished run with {key} {there.get(key)}, but now it is {value}: choose "
                    "another --output, or delete that folder"
                )
        return True

    def finish(self) -> None:
        """Note that it was run to its end."""
        write_json(self.folder / "finished.json", self.settings)

    def figure(self, place: Sequence[str]) -> float | None:
        """Return a metric, of a detector on its first test set; None before the run's end or where it is not a number.

        Args:
            place: keys in the part of ``inference/results.json`` that belongs to the test sets; see :class:`Row`.
        """
        if not self.finished():
            return None
        found: Any = json.loads((self.folder / "inference/results.json").read_text(encoding="utf-8"))
        tests = self.config.DATASETS.TEST
        keys = [tests[0]]
        if self.config.TASK == "classification":  # whose sets are measured as one
            keys = [", ".join(tests), "best_on_test" if self.config.TEST.BEST_ON_TEST else "test"]
        for key in (*keys, *place):
            found = found[key]
        return found


def plan(row: Row, seed: int, scale: float, output: Path, opts: list[str]) -> dict[str, Run]:
    """Return the runs of a seed by the step's name, in the order they are run in.

    Args:
        row: what is run.
        seed: the key ``SEED``.
        scale: share of the schedule and of the images, 0..1.
        output: folder of all runs.
        opts: keys and values over every config.

    Raises:
        UserError: for a config that cannot be read, or a key that the runs set themselves.
    """
    if key := next((key for key in opts[::2] if key in _OWN), None):
        raise UserError(f"key {key} is set for every run here: leave it out; {_OWN[key]}")
    own = {key: step.name for arm in row.arms for step in arm.steps for key, _ in step.overrides}
    if key := next((key for key in opts[::2] if key in own), None):
        raise UserError(
            f"key {key} is set by the row itself, for '{own[key]}': leave it out; --scale shortens all schedules"
        )
    runs: dict[str, Run] = {}
    for step in (step for arm in row.arms for step in arm.steps):
        if step.name in runs:
            continue
        keys = [str(part) for pair in step.overrides for part in pair] + opts
        keys += _shorter(load_config(step.config, keys), scale, step.labels)
        keys += ["SOLVER.CHECKPOINT_MAX_TO_KEEP", "1", "SEED", str(seed)]
        folder = output / f"seed_{seed}" / step.name
        places = ["OUTPUT_DIR", str(folder)]
        if step.encoder:
            places += ["MODEL.WEIGHTS", str(runs[step.encoder].folder / "encoder.safetensors")]
        settings = {
            "config": step.config,
            "overrides": dict(zip(keys[::2], keys[1::2], strict=True)),
            "data": str(catalog.dataset_root().resolve()),
        }
        cfg = load_config(step.config, [*keys, *places])
        command = [COMMANDS[cfg.TASK], "--config-file", step.config, "--resume", *keys, *places]
        runs[step.name] = Run(step, folder, command, cfg, settings, tuple(opts[::2]))
    return runs


def _shorter(cfg: CfgNode, scale: float, labels: float) -> list[str]:
    """Return the keys and values that cut the schedule to ``scale`` and the data to that and the share of labels."""
    found: dict[str, object] = {}
    if scale < 1:
        for key in _SCHEDULE:
            section, name = key.split(".")
            if cfg[section][name] > 0:
                found[key] = max(round(cfg[section][name] * scale), 1)
        if "Step" in cfg.SOLVER.LR_SCHEDULER_NAME:
            found["SOLVER.STEPS"] = tuple(max(round(step * scale), 1) for step in cfg.SOLVER.STEPS)
        found["DATASETS.TEST"] = tuple(catalog.subset_name(name, scale) for name in cfg.DATASETS.TEST)
    if scale * labels < 1:
        found["DATASETS.TRAIN"] = tuple(catalog.subset_name(name, scale * labels) for name in cfg.DATASETS.TRAIN)
    return [str(part) for pair in found.items() for part in pair]


class ImageCounts(NamedTuple):
    """Numbers of images of a run.

    Attributes:
        train: trained on.
        test: tested on.
        held_out: of ``DATASETS.TRAIN``, held out to choose the model.
        empty: of ``DATASETS.TRAIN``, left out because they have no object.
        note: what a reader has to know of the data.
    """

    train: int
    test: int
    held_out: int = 0
    empty: int = 0
    note: str = ""


def count_images(cfg: CfgNode) -> ImageCounts:
    """Return how many images a run uses, counted by the code that the run itself reads them with.

    Args:
        cfg: the run's config. Images of a pre-training are listed only: those that cannot be read are counted too.

    Raises:
        UserError: if data are missing or damaged.
    """
    data = cfg.DATASETS
    if cfg.TASK == "classification":
        found = list_data(cfg, training=True)
        parts = [part for part in (found.train, found.validation, found.test) if part]
        note = "; ".join(dict.fromkeys(part.note for part in parts if part.note))
        train, test = (len(part) if part else 0 for part in (found.train, found.test))
        share = data.VALIDATION.endswith("%") and found.validation
        return ImageCounts(train, test, len(share) if share else 0, note=note)
    if cfg.TASK == "detection":
        used, test = len(training_records(cfg)), sum(map(len, evaluation_sets(cfg).values()))
        listed = sum(len(catalog.get_images(name, data.SKIP_MISSING)) for name in data.TRAIN)
        return ImageCounts(used, test, empty=listed - used)

    def count(name: str) -> int:
        if is_class_set(name):
            return len(list_class_sets("DATASETS", [name], data.DOWNLOAD, data.SYNSETS))
        return len(catalog.get_images(name, data.SKIP_MISSING))

    return ImageCounts(sum(map(count, data.TRAIN)), sum(map(count, data.TEST)))


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
    if keys := [key for key in run.keys if key not in _MACHINE]:
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
    for metric, place in row.metrics.items():
        values = {arm.name: [seed[arm.steps[-1].name].figure(place) for seed in seeds] for arm in row.arms}
        done = {name: [x for x in found if x is not None] for name, found in values.items()}
        sums = {name: Runs.of(found) for name, found in done.items() if found}
        published = {arm.name: arm.published.get(metric) for arm in row.arms}
        metrics[metric] = {}
        for arm in row.arms:
            ours, theirs = sums.get(arm.name), published[arm.name]
            judge = not arms[arm.name]["no_verdict"] and len(done[arm.name]) > 1
            metrics[metric][arm.name] = {
                "values": values[arm.name],
                "mean": ours and ours.mean,
                "spread": ours and ours.spread,
                "gain": _compared(ours, sums.get(arm.baseline), scale == 1),
                "published": theirs and theirs.runs.mean,
                "published_spread": theirs and theirs.runs.spread,
                "published_slip": bool(theirs and theirs.slip),
                "published_gain": _gain(theirs, published.get(arm.baseline)),
                "against_published": _compared(ours, theirs.runs if theirs and not theirs.slip else None, judge),
            }
    return {"title": row.title, "scale": scale, "arms": arms, "metrics": metrics, "remarks": row.remarks}


def _gain(of: Published | None, over: Published | None) -> float | None:
    """Return the difference of two published figures; None where one is missing or a printing error."""
    return of.runs.mean - over.runs.mean if of and over and not (of.slip or over.slip) else None


def _compared(ours: Runs | None, other: Runs | None, judge: bool) -> dict[str, Any] | None:
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
