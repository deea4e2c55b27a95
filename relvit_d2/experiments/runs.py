"""A list of training runs: planned from steps, executed with resume, read back, and their images counted."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from relvit_d2.classification.run import list_data
from relvit_d2.config.config_file import COMMANDS, override_words
from relvit_d2.data.classification.datasets import is_class_set, list_class_sets
from relvit_d2.data.detection import catalog
from relvit_d2.data.subsets import subset_name
from relvit_d2.detection.evaluation import evaluation_sets
from relvit_d2.detection.run import training_records
from relvit_d2.experiments.commands import run_command
from relvit_d2.experiments.steps import Step
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json

# Keys that a plan sets for every run, and what a user does instead.
_SET_BY_PLAN = {
    "SEED": "choose how many with --seeds",
    "OUTPUT_DIR": "choose the folder with --output",
    "MODEL.WEIGHTS": "each arm starts from its own pre-training",
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": "the last checkpoint of each run is kept",
}

# Keys whose values are multiplied by the scale of a rehearsal.
_SCHEDULE = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")


@dataclass(frozen=True)
class Run:
    """A step with one seed, ready to be executed.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        command: name of a relvit-d2 command and its arguments; executed again, it resumes.
        config: the config that the command loads.
        settings: config file, overrides and data folder; a finished run is reused only if they are equal.
        keys: config keys that the user set for all runs.
    """

    step: Step
    folder: Path
    command: list[str]
    config: CfgNode
    settings: dict[str, Any]
    keys: tuple[str, ...] = ()

    def finished(self) -> bool:
        """Return whether the run is complete.

        Raises:
            UserError: if its folder holds a finished run with other settings.
        """
        path = self.folder / "finished.json"
        if not path.is_file():
            return False
        there, here = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(self.settings))
        for key in here | there:
            if there.get(key) != here.get(key):
                raise UserError(
                    f"'{self.folder}' holds a finished run with {key} {there.get(key)}, but now it is {here.get(key)}: "
                    "choose another --output, or delete that folder"
                )
        return True

    def finish(self) -> None:
        """Mark the run as complete."""
        write_json(self.folder / "finished.json", self.settings)

    def metric(self, path: Sequence[str]) -> float | None:
        """Return a metric, of a detector on its first test set; None for an unfinished run or an undefined value.

        Args:
            path: keys below the test set in ``inference/results.json``, such as ``("bbox", "AP")``; for a classifier
                below ``test`` or ``best_on_test``, such as ``("top1",)``.
        """
        if not self.finished():
            return None
        found: Any = json.loads((self.folder / "inference/results.json").read_text(encoding="utf-8"))
        tests = self.config.DATASETS.TEST
        keys = [tests[0]]
        if self.config.TASK == "classification":  # all its test sets are evaluated as one
            keys = [", ".join(tests), "best_on_test" if self.config.TEST.BEST_ON_TEST else "test"]
        for key in (*keys, *path):
            found = found[key]
        return found


def check_free_keys(keys: Iterable[str], more: Mapping[str, str] | None = None) -> None:
    """Refuse keys that every plan sets itself, and ``more`` of them, each with what to do instead."""
    instead = _SET_BY_PLAN | dict(more or {})
    if key := next((key for key in keys if key in instead), None):
        raise UserError(f"key {key} is set for every run here: leave it out; {instead[key]}")


def plan_runs(steps: Iterable[Step], seed: int, scale: float, output: Path, opts: list[str]) -> dict[str, Run]:
    """Return the runs of one seed by the name of their step, in the order of execution.

    Args:
        steps: a step follows the one whose encoder it loads; repeated names are planned once.
        seed: value of ``SEED``.
        scale: share of the schedule and of the images, 0..1.
        output: folder of all runs.
        opts: keys and values for every config.

    Raises:
        UserError: for a config that cannot be read, or a key that the runs set themselves.
    """
    steps = list(steps)
    check_free_keys(opts[::2])
    fixed = {key: step.name for step in steps for key, _ in step.overrides}
    if key := next((key for key in opts[::2] if key in fixed), None):
        raise UserError(
            f"key {key} is set by the row itself, for '{fixed[key]}': leave it out; --scale shortens all schedules"
        )
    runs: dict[str, Run] = {}
    for step in steps:
        if step.name in runs:
            continue
        keys = override_words(dict(step.overrides)) + opts
        cfg = load_config(step.config, keys)
        keys += _scaled_keys(cfg, scale, step.labels)
        keys += ["SOLVER.CHECKPOINT_MAX_TO_KEEP", "1", "SEED", str(seed)]
        folder = output / f"seed_{seed}" / step.name
        paths = ["OUTPUT_DIR", str(folder)]
        if step.encoder:
            paths += ["MODEL.WEIGHTS", str(runs[step.encoder].folder / "encoder.safetensors")]
        elif step.evaluates:
            paths += ["MODEL.WEIGHTS", str(runs[step.evaluates].folder / "model_best.pth")]
        elif step.weights or cfg.MODEL.WEIGHTS:
            paths += ["MODEL.WEIGHTS", step.weights]
        settings = {
            "config": step.config,
            "overrides": dict(zip(keys[::2], keys[1::2], strict=True)),
            "data": str(catalog.dataset_root().resolve()),
        } | ({"weights": step.weights} if step.weights else {})
        cfg = load_config(step.config, [*keys, *paths])
        flag = "--eval-only" if step.evaluates else "--resume"
        command = [COMMANDS[cfg.TASK], "--config-file", step.config, flag, *keys, *paths]
        runs[step.name] = Run(step, folder, command, cfg, settings, tuple(opts[::2]))
    return runs


def _scaled_keys(cfg: CfgNode, scale: float, labels: float) -> list[str]:
    """Return keys and values that reduce schedule and images to ``scale``, training images to ``scale * labels``."""
    found: dict[str, object] = {}
    if scale < 1:
        found = scaled_schedule(cfg, scale)
        found["DATASETS.TEST"] = tuple(subset_name(name, scale) for name in cfg.DATASETS.TEST)
    if scale * labels < 1:
        found["DATASETS.TRAIN"] = tuple(subset_name(name, scale * labels) for name in cfg.DATASETS.TRAIN)
    return override_words(found)


def scaled_schedule(cfg: CfgNode, scale: float) -> dict[str, Any]:
    """Return keys and values that multiply the length of the schedule by ``scale``."""
    found: dict[str, Any] = {}
    for key in _SCHEDULE:
        section, name = key.split(".")
        if cfg[section][name] >= 1:  # a fraction of the run or a number of epochs stays
            found[key] = max(round(cfg[section][name] * scale), 1)
    if "TEST.EVAL_PERIOD" in found:  # rounded up: there are never more evaluations
        iterations = found["SOLVER.MAX_ITER"]
        found["TEST.EVAL_PERIOD"] = -(-cfg.TEST.EVAL_PERIOD * iterations // cfg.SOLVER.MAX_ITER)
    if "Step" in cfg.SOLVER.LR_SCHEDULER_NAME:
        found["SOLVER.STEPS"] = tuple(max(round(step * scale), 1) if step >= 1 else step for step in cfg.SOLVER.STEPS)
    return found


def run_unfinished(seeds: Sequence[Mapping[str, Run]], after_each: Callable[[], object]) -> None:
    """Execute the runs that are not finished, in order; an interrupted one resumes.

    Args:
        after_each: called after every executed run, to write the results so far.

    Raises:
        UserError: if a run fails, or a folder holds a finished run with other settings.
    """
    planned = [(seed, run) for seed, runs in enumerate(seeds) for run in runs.values()]
    for number, (seed, run) in enumerate(planned, 1):
        if not run.finished():
            title = f"{number}/{len(planned)} {run.step.name}, seed {seed}"
            total = 0 if run.step.evaluates else run.config.SOLVER.MAX_ITER
            run_command(title, run.command, run.folder, total)
            run.finish()
            after_each()


class ImageCounts(NamedTuple):
    """Numbers of images of a run.

    Attributes:
        train: training images.
        test: test images.
        held_out: images of ``DATASETS.TRAIN`` held out to select the model.
        empty: images of ``DATASETS.TRAIN`` left out because they have no object.
        note: remark of the data set's reader about the images.
    """

    train: int
    test: int
    held_out: int = 0
    empty: int = 0
    note: str = ""


def count_images(cfg: CfgNode) -> ImageCounts:
    """Return how many images a run uses, counted by the code that the run itself reads them with.

    Args:
        cfg: config of the run. Images of a pre-training are listed, not decoded: unreadable ones are counted too.

    Raises:
        UserError: if data are missing or damaged, or ``DATASETS.TEST`` is empty.
    """
    data = cfg.DATASETS
    if not data.TEST:
        raise UserError("DATASETS.TEST is empty, so there is nothing to compare; name a data set")
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


def count_images_of_runs(runs: Mapping[str, Run]) -> dict[str, ImageCounts]:
    """Return :func:`count_images` of every run by the name of its step; equal data sets are counted once.

    Called before the first run, so that missing data are reported at once, not hours later.
    """
    counts: dict[tuple[str, str], ImageCounts] = {}
    for run in runs.values():
        key = (run.config.TASK, str(run.config.DATASETS))
        if key not in counts:
            counts[key] = count_images(run.config)
    return {name: counts[run.config.TASK, str(run.config.DATASETS)] for name, run in runs.items()}
