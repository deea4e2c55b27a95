"""A row of a table as runs of the scripts, and what came of them beside what was published."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from relvit_d2.data import catalog
from relvit_d2.data.classes import about_class_set, is_class_set
from relvit_d2.engine.config_file import load_config
from relvit_d2.errors import UserError
from relvit_d2.files import write_json
from relvit_d2.report.comparison import Difference, Runs, difference
from relvit_d2.report.published import ROOT, Row, Step

# What the tool sets itself, and how else a user does.
_OWN = {
    "SEED": "choose how many with --seeds",
    "OUTPUT_DIR": "choose the folder with --output",
    "MODEL.WEIGHTS": "each arm starts from its own pre-training",
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": "the last checkpoint of each run is kept",
}

# What a shorter schedule has less of.
_SCHEDULE = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")


@dataclass(frozen=True)
class Run:
    """One step of one seed, ready to be run.

    Attributes:
        step: which.
        folder: its ``OUTPUT_DIR``.
        command: the script and its arguments; run again, it goes on where it stopped.
        config: as the script will see it.
        settings: all that decides what it learns, to know it again.
    """

    step: Step
    folder: Path
    command: list[str]
    config: CfgNode
    settings: dict[str, Any]

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
        """Return what it measured, a detector on its first test set; None before its end or where that is no number."""
        if not self.finished():
            return None
        found: Any = json.loads((self.folder / "inference/results.json").read_text(encoding="utf-8"))
        tests = self.config.DATASETS.TEST
        # A classifier's sets are measured as one.
        for key in (", ".join(tests) if self.step.script == "train_cls.py" else tests[0], *place):
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
    runs: dict[str, Run] = {}
    for step in (step for arm in row.arms for step in arm.steps):
        if step.name in runs:
            continue
        keys = [str(part) for pair in step.overrides for part in pair] + opts
        keys += _shorter(load_config(str(ROOT / step.config), keys, step.script), scale, step.labels)
        keys += ["SOLVER.CHECKPOINT_MAX_TO_KEEP", "1", "SEED", str(seed)]
        folder = output / f"seed_{seed}" / step.name
        places = ["OUTPUT_DIR", str(folder)]
        if step.encoder:
            places += ["MODEL.WEIGHTS", str(runs[step.encoder].folder / "encoder.safetensors")]
        config = str(ROOT / step.config)
        command = [step.script, "--config-file", config, "--resume", *keys, *places]
        settings = {
            "config": step.config,
            "overrides": dict(zip(keys[::2], keys[1::2], strict=True)),
            "data": str(catalog.dataset_root().resolve()),
        }
        runs[step.name] = Run(step, folder, command, load_config(config, [*keys, *places], step.script), settings)
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
        found["DATASETS.TEST"] = tuple(catalog.part_of(name, scale) for name in cfg.DATASETS.TEST)
    if scale * labels < 1:
        found["DATASETS.TRAIN"] = tuple(catalog.part_of(name, scale * labels) for name in cfg.DATASETS.TRAIN)
    return [str(part) for pair in found.items() for part in pair]


def count_images(cfg: CfgNode) -> tuple[int, int]:
    """Return how many images a config names for training and for tests.

    Raises:
        UserError: if there are none of a name.
    """
    data = cfg.DATASETS

    def count(name: str) -> int:
        if is_class_set(name):
            return about_class_set(name, data.DOWNLOAD, data.SYNSETS)[0]
        return len(catalog.get_images(name, data.SKIP_MISSING))

    return sum(map(count, data.TRAIN)), sum(map(count, data.TEST))


def data_note(cfg: CfgNode) -> str:
    """Return what has to be said of the classification sets that a config names, or nothing."""
    data = cfg.DATASETS
    names = [name for name in (*data.TRAIN, *data.TEST) if is_class_set(name)]
    return "; ".join(dict.fromkeys(filter(None, (about_class_set(n, data.DOWNLOAD, data.SYNSETS)[1] for n in names))))


def collect(row: Row, seeds: Sequence[dict[str, Run]], images: tuple[int, int], scale: float) -> dict[str, Any]:
    """Return what is known so far, as plain values for ``results.json``.

    Args:
        row: what is run.
        seeds: the runs of each seed.
        images: trained and tested on, before ``scale`` and a share of labels.
        scale: share of the schedule and of the images, 0..1.
    """
    same = scale == 1 and row.images == images
    figures = {arm.name: [seed[arm.steps[-1].name].figure(row.place) for seed in seeds] for arm in row.arms}
    done = {name: [x for x in values if x is not None] for name, values in figures.items()}
    sums = {name: Runs.of(values) for name, values in done.items() if values}
    published = {arm.name: arm.published for arm in row.arms}
    arms = {}
    for arm in row.arms:
        ours = sums.get(arm.name)
        arms[arm.name] = {
            "values": figures[arm.name],
            "finished": sum(seed[arm.steps[-1].name].finished() for seed in seeds),
            "mean": ours and ours.mean,
            "spread": ours and ours.spread,
            "gain": _compared(ours, sums.get(arm.baseline), scale == 1),
            "baseline": arm.baseline,
            "published": arm.published and arm.published.mean,
            "published_gain": _gain(arm.published, published.get(arm.baseline)),
            "against_published": _compared(ours, arm.published, same),
        }
    results = {"title": row.title, "metric": row.metric, "scale": scale, "arms": arms}
    pretrained = [arm for arm in row.arms if arm.pretrained]
    if row.best and all(len(done[arm.name]) == len(seeds) for arm in pretrained):
        arm = max(pretrained, key=lambda arm: sums[arm.name].mean)
        results["best"] = {
            "arm": arm.name,
            "published": row.best.mean,
            "published_gain": _gain(row.best, published.get(arm.baseline)),
            "against_published": _compared(sums[arm.name], row.best, same),
        }
    return results


def _gain(of: Runs | None, over: Runs | None) -> float | None:
    return of.mean - over.mean if of and over else None


def _compared(ours: Runs | None, other: Runs | None, judge: bool = True) -> dict[str, Any] | None:
    """Return a difference, what noise may make of it, and whether it is within that; None where nothing is told."""
    if not ours or not other:
        return None
    found: Difference = difference(ours, other)
    if not judge:
        return {"difference": found.value, "margin": None, "within_noise": None}
    return {"difference": found.value, "margin": found.margin, "within_noise": found.within_noise}


def page(results: dict[str, Any]) -> str:
    """Return ``results``, with what the tool tells beside :func:`collect`'s, as a page of Markdown."""
    mark = "*" if results["scale"] < 1 else ""
    metric = results["metric"]
    lines = [
        f"# {results['title']}: {metric}, percent",
        "",
        f"| arm | {metric} | over its baseline | published | over its baseline | ours less the published |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, arm in results["arms"].items():
        gain = _told(arm["gain"], mark, results)
        lines.append(
            f"| {name} | {_mean(arm, mark)} | {gain} | {_number(arm['published'])} | "
            f"{_number(arm['published_gain'], '+')} | {_told(arm['against_published'], mark, results, other=True)} |"
        )
    if best := results.get("best"):
        lines.append(
            f"| best pre-trained, {best['arm']} | | | {_number(best['published'])} | "
            f"{_number(best['published_gain'], '+')} | {_told(best['against_published'], mark, results, other=True)} |"
        )
    data = results["data"]
    ours, theirs = data["images"], data["published_images"]
    words = [f"Trained on {data['train']}, {ours[0]:,} images, tested on {data['test']}, {ours[1]:,}."]
    if all(arm["published"] is None for arm in results["arms"].values()):
        words.append("Nothing was published of these arms.")
    elif not theirs:
        words.append("What the paper used is not known here.")
    elif list(theirs) != list(ours):
        words.append(
            f"The paper used {theirs[0]:,} and {theirs[1]:,}: these are other data, so its figures stand beside ours "
            "without a judgement."
        )
    if data["note"]:
        words.append(f"{data['note'].rstrip('.')}.")
    lines += ["", " ".join(words), ""]
    seeds = results["seeds"]
    if mark:
        lines += [
            f"\\* A rehearsal: schedule and images cut to {results['scale']:.4g} of the config's. No number marked "
            "so measures the method.",
            "",
        ]
    if seeds == 1:
        lines.append("One seed: what another one would give is not known, so no difference is called real or none.")
    else:
        lines.append(
            f"Means and standard deviations over {seeds} seeds. A difference is within noise if seeds alone would make "
            "one as large in more than 5 of 100 cases (Welch's t interval); a published figure of one run is taken to "
            "spread as ours do."
        )
    if results.get("best"):
        lines.append("The best of several arms is chosen by its test figure, here as in the paper.")
    machine = results["machine"]
    lines += [
        "",
        f"Measured on {machine['device']}, {machine['precision']}, torch {machine['torch']}, relvit_d2 "
        f"{machine['version']}: `{results['command']}`",
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.2f}"


def _mean(arm: dict[str, Any], mark: str) -> str:
    done = sum(value is not None for value in arm["values"])
    if not done:
        return "none found" if arm["finished"] else "not run yet"
    spread = "" if arm["spread"] is None else f" ± {arm['spread']:.2f}"
    count = "" if done == len(arm["values"]) else f" ({done} of {len(arm['values'])})"
    return f"{arm['mean']:.2f}{mark}{spread}{count}"


def _told(found: dict[str, Any] | None, mark: str, results: dict[str, Any], other: bool = False) -> str:
    """Return a difference in words; ``other``: to what was published."""
    if not found:
        return ""
    value = f"{found['difference']:+.2f}{mark}"
    if found["within_noise"] is None:
        same = list(results["data"]["published_images"] or []) == list(results["data"]["images"])
        return f"{value}, other data" if other and not same else value
    return f"{value}, {'within' if found['within_noise'] else 'beyond'} noise (± {found['margin']:.2f})"
