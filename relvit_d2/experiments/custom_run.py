"""From a folder of labelled images to a detector: check, recipe, pre-training, training, pictures."""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from fvcore.common.config import CfgNode
from tabulate import tabulate  # type: ignore[import-untyped]

from relvit_d2.config.config_file import override_words
from relvit_d2.conversion.checkpoint_file import read_file
from relvit_d2.data.detection.custom import config_pairs, held_out_sets
from relvit_d2.detection.evaluation import evaluation_sets
from relvit_d2.detection.mean_teacher import first_iteration
from relvit_d2.detection.run import training_records
from relvit_d2.engine.checkpoint import check_space
from relvit_d2.engine.loggers import check_loggers
from relvit_d2.engine.run_lock import run_lock
from relvit_d2.engine.run_setup import move_earlier_run, silence_warnings
from relvit_d2.engine.weights import best_or_last
from relvit_d2.experiments import recipe
from relvit_d2.experiments.commands import TRIAL_KEYS, Runner, run_trial
from relvit_d2.experiments.custom_measurements import (
    CONFIG,
    ONE_ANCHOR,
    PRETRAINING_CONFIG,
    SEMI_STEP,
    anchor_choices,
    check_data,
    measure_machine,
    weights_choices,
    with_strides,
)
from relvit_d2.experiments.recipe import Choices, Data, Machine
from relvit_d2.experiments.recipe_schedule import Timing, choose_schedules
from relvit_d2.report.detections import analyze_detections
from relvit_d2.tasks import load_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder, write_text
from relvit_d2.utils.hardware import device_name
from relvit_d2.utils.printing import print_text, printable, shell_command

SHOWN = 3  # pictures of detections

# Keys of the user that hold for the pre-training too.
SHARED = (
    *("MODEL.DEVICE", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "DATASETS.TEST"),
    *("SEED", "DATALOADER.NUM_WORKERS", "SOLVER.PRECISION", "LOGGERS"),
)
CHECKPOINTS = 5  # of a run at the same time: two numbered ones, one being written, the last and the best


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        data: folder of the custom data set.
        seconds: of everything; None for an hour on a GPU and half an hour on a CPU.
        weights: what the training starts from instead of a pre-training; "" for a pre-training.
        pretrain: whether to pre-train if there are no ``weights``; None: if the time allows.
        opts: keys and values in turn, which replace those of the recipe.
        overwrite: replace the runs in the output folder.
    """

    data: str
    seconds: float | None
    weights: str
    pretrain: bool | None
    opts: tuple[str, ...]
    overwrite: bool = False

    @property
    def given(self) -> dict[str, str]:
        """The user's keys."""
        return dict(zip(self.opts[::2], self.opts[1::2], strict=True))


def train_custom(request: Request, dry_run: bool, run: Runner) -> None:
    """Check the data, print the recipe and run it.

    Args:
        request: of the user.
        dry_run: only write and print the recipe.
        run: runs a command.

    Raises:
        UserError: the data have an error, the time is too short, the output folder is in use, or a run fails.
    """
    started = time.monotonic()
    silence_warnings()
    pairs = config_pairs(request.data, "detection")
    cfg = load_config(CONFIG, [*pairs, *request.opts], "detection")
    check_loggers(cfg.LOGGERS)
    given = {key: get_key(cfg, key) for key in request.given}
    if "MODEL.WEIGHTS" in given:
        request = dataclasses.replace(request, weights=cfg.MODEL.WEIGHTS, pretrain=False)
    elif request.weights:
        request = dataclasses.replace(request, pretrain=False)
    name = Path(request.data).expanduser().resolve().name
    output = Path(cfg.OUTPUT_DIR) if "OUTPUT_DIR" in given else Path("output") / name
    if not request.overwrite:
        _check_unused(output)
    pinned = weights_choices(cfg, request.weights)
    known = {key: choice.value for key, choice in pinned.items()} | given
    make_folder(output)
    data = check_data(cfg, output)
    seconds = request.seconds or (3600.0 if cfg.MODEL.DEVICE.startswith("cuda") else 1800.0)
    encoders = [with_strides(encoder, cfg, known) for encoder in recipe.candidates(known)]
    undecided = request.pretrain is None
    machine = measure_machine(cfg, [*pairs, *request.opts], encoders, undecided)
    no_pretraining = ""
    if undecided:
        enough, reason = recipe.choose_pretraining(data, machine, seconds, known, encoders)
        request, no_pretraining = dataclasses.replace(request, pretrain=enough), "" if enough else reason
    share = recipe.PRETRAINING if request.pretrain else 0.0
    encoder, choices = recipe.choose_model(data, machine, seconds * (1 - share), known, encoders)
    choices |= pinned
    files = Files(request, given, pairs, output, recipe.pretraining_choices(data, encoder, machine), run)
    choices |= anchor_choices(data, files.detector(choices | ONE_ANCHOR))
    timing = files.measure(choices)
    batch = known.get("SOLVER.IMS_PER_BATCH", choices["SOLVER.IMS_PER_BATCH"].value)
    left = seconds - (time.monotonic() - started)
    schedules = choose_schedules(data, timing, left, given, batch)
    choices |= schedules.training
    if cfg.SEMI.UNLABELLED:
        first_iteration(files.detector(choices), data.images)  # checks SEMI.BURN_IN
    files.write(choices, schedules.pretraining)
    expected = seconds - left + schedules.seconds
    print_text(files.describe(choices, schedules.pretraining, no_pretraining, data, machine, expected))
    if expected > 1.1 * seconds:
        print_text(f"warning: the given schedule needs more than the {seconds / 60:.0f} min of --hours")
    if dry_run:
        return
    # Both at once: a detector of the earlier run must not be continued after an interruption of the pre-training.
    for folder in (output / "pretraining", output / "detector"):
        if folder.exists():
            with run_lock(folder):
                move_earlier_run(folder)
    if files.pretrains:
        files.pretrain()
        left, planned = seconds - (time.monotonic() - started), choices["SOLVER.MAX_ITER"].value
        again = choose_schedules(data, timing._replace(pretraining=0.0, view=0.0), left, given, batch, planned)
        files.write(choices | again.training, schedules.pretraining)
        expected = seconds - left + again.seconds
        count = again.training["SOLVER.MAX_ITER"].value
        print_text(f"training: {count} iterations in the time that is left, instead of the planned {planned}")
    files.train(data)
    print_text(f"{time.monotonic() - started:.0f} s of the planned {expected:.0f} s")


def _check_unused(output: Path) -> None:
    if not any((output / name).exists() for name in ("pretraining", "detector")):
        return
    configs = {"pretrain": output / "pretraining.yaml", "train": output / "recipe.yaml"}
    if not (output / "pretraining").exists() or (output / "pretraining/encoder.safetensors").exists():
        del configs["pretrain"]
    commands = [
        shell_command(["relvit-d2", command, "--config-file", str(path), "--resume"])
        for command, path in configs.items()
    ]
    raise UserError(
        f"'{output}' holds a run: continue it with {' and then '.join(commands)}, replace it with --overwrite, or "
        "choose another OUTPUT_DIR"
    )


@dataclasses.dataclass(frozen=True)
class Files:
    """The configs and runs of a request in its output folder.

    Attributes:
        request: of the user.
        given: the values of the user's keys.
        pairs: keys of the data set.
        output: folder of all runs.
        model: keys of the pre-training but for its schedule.
        run_command: runs a command.
    """

    request: Request
    given: Mapping[str, Any]
    pairs: list[Any]
    output: Path
    model: Choices
    run_command: Runner

    @property
    def pretrains(self) -> bool:
        """Whether there is a pre-training."""
        return bool(self.request.pretrain)

    def detector(self, choices: Choices) -> CfgNode:
        """Return the config of the training."""
        keys = {key: choice.value for key, choice in self._with_given(choices).items() if key not in self.given}
        keys["MODEL.WEIGHTS"] = self._weights()
        words = [*self.pairs, *override_words(keys), *self.request.opts, *self._output_keys("detector")]
        return load_config(CONFIG, words)

    def _with_given(self, choices: Choices) -> Choices:
        return recipe.with_given(choices, {key: value for key, value in self.given.items() if key != "OUTPUT_DIR"})

    def _weights(self) -> str:
        return str(self.output / "pretraining/encoder.safetensors") if self.pretrains else self.request.weights

    def _output_keys(self, folder: str) -> list[str]:
        return ["OUTPUT_DIR", str(self.output / folder)]

    def pretraining(self, choices: Choices) -> CfgNode:
        """Return the config of the pre-training, which has the data, encoder and device of the training.

        It has the unlabelled images too, without those of validation and test sets.
        """
        given = self.request.given
        keys: dict[str, Any] = {key: choice.value for key, choice in {**self.model, **choices}.items()}
        keys |= {key: given[key] for key in SHARED if key in given}
        pairs = config_pairs(self.request.data, "pretrain")
        cfg = load_config(PRETRAINING_CONFIG, [*pairs, *override_words(keys), *self._output_keys("pretraining")])
        if unlabelled := self.given.get("SEMI.UNLABELLED"):
            # A folder is known by its slash.
            cfg.DATASETS.TRAIN += (f"{unlabelled}/" if Path(unlabelled).is_dir() else unlabelled,)
            cfg.DATASETS.EXCLUDE = tuple(held_out_sets(cfg.DATASETS))
        return cfg

    def measure(self, choices: Choices) -> Timing:
        """Run a few iterations of each command in the folder ``trial``, which is removed, and return their times.

        Raises:
            UserError: a command fails, or the disk has no space for the checkpoints of the runs.
        """
        trial = dataclasses.replace(self, output=self.output / "trial")
        try:
            return self._measure(trial, choices)
        except UserError as error:  # names the folders that the user will see
            raise UserError(str(error).replace(str(trial.output), str(self.output))) from error
        finally:
            shutil.rmtree(trial.output, ignore_errors=True)

    def _measure(self, trial: "Files", choices: Choices) -> Timing:
        seconds = [0.0, 0.0]
        start = needed = 0.0
        runs = {"pretrain": trial.pretraining({})} if self.pretrains else {}
        runs["train"] = trial.detector(choices)
        short = TRIAL_KEYS | {"TEST.EVAL_PERIOD": 0, "TEST.BEST_METRIC": "", "TEST.PATIENCE": 0}
        for command, cfg in runs.items():
            folder = Path(cfg.OUTPUT_DIR)
            make_folder(folder)
            cfg.DATASETS.TEST = ()
            mean = 1.0  # time of an iteration of the run, in those of the trial, which all have unlabelled images
            if command == "train" and cfg.SEMI.UNLABELLED:
                alone = cfg.SEMI.BURN_IN if cfg.SEMI.BURN_IN < 1 else 0.0
                mean, cfg.SEMI.BURN_IN = 1 - alone * (1 - 1 / SEMI_STEP), 0.0
            if self.pretrains:
                cfg.MODEL.WEIGHTS = ""  # a pre-training that takes long is stopped before it writes the encoder
            cfg.merge_from_list([part for pair in short.items() for part in pair])  # whatever schedule the user gave
            write_text(folder / "trial.yaml", cfg.dump())
            words = [command, "--config-file", str(folder / "trial.yaml")]
            console = self.output / f"measuring_{command}.txt"  # outlives the trial if it fails
            found = run_trial(f"measuring {command}", words, folder, self.run_command, console)
            console.unlink(missing_ok=True)
            seconds[command == "train"], start = mean * found.iteration, max(start, found.rest)
            needed += CHECKPOINTS * max(file.stat().st_size for file in folder.glob("model_*.pth"))
        check_space(self.output, needed)
        image, view = (
            seconds[command == "train"] / runs[command].SOLVER.IMS_PER_BATCH / 2 if command in runs else 0.0
            for command in ("train", "pretrain")
        )
        return Timing(seconds[0], seconds[1], start, image, view)

    def write(self, choices: Choices, before: Choices) -> None:
        """Write ``recipe.yaml``, and ``pretraining.yaml``, each value with its reason."""
        sets = ("DATASETS.CUSTOM", "DATASETS.TRAIN", "DATASETS.TEST")
        shared = dict.fromkeys(sets, recipe.Choice(None, "the data set"))
        shared |= {"OUTPUT_DIR": recipe.Choice(None, "folder of the run"), "SEED": recipe.Choice(None, "of every draw")}
        shared |= {"MODEL.DEVICE": recipe.Choice(None, "the device that was measured")}
        start = "the pre-training" if self.pretrains else "--weights" if self.request.weights else "from scratch"
        detector = {"MODEL.WEIGHTS": recipe.Choice(None, start), **shared, **self._with_given(choices)}
        write_text(self.output / "recipe.yaml", recipe_yaml(CONFIG, self.detector(choices), detector))
        if self.pretrains:
            given = {key: recipe.Choice(None, "given") for key in SHARED if key in self.given}
            keys = {**shared, **self.model, **before, **given}
            keys["DATASETS.EXCLUDE"] = recipe.Choice(None, "images that pre-training must not see")
            text = recipe_yaml(PRETRAINING_CONFIG, self.pretraining(before), keys)
            write_text(self.output / "pretraining.yaml", text)

    def describe(
        self, choices: Choices, before: Choices, no_pretraining: str, data: Data, machine: Machine, seconds: float
    ) -> str:
        """Return the recipe as a table; ``no_pretraining`` is the reason if the recipe chose none."""
        cfg = self.detector(choices)
        rows = [(key, str(get_key(cfg, key)), choice.reason) for key, choice in self._with_given(choices).items()]
        if before:
            count, why = before["SOLVER.MAX_ITER"]
            rows.append(("pre-training", f"{count} iterations", why))
        elif no_pretraining:
            rows.append(("pre-training", "none", no_pretraining))
        lines = [
            f"{data.images} training images, {data.evaluated} validation images, {len(data.boxes)} objects of "
            f"{len(data.classes)} classes; {device_name(machine.device)}",
            tabulate(rows, ("key", "value", "reason"), disable_numparse=True),
            f"planned time: {seconds / 60:.1f} min; written: {self.output}/recipe.yaml",
        ]
        return "\n\n".join(lines)

    def pretrain(self) -> None:
        """Run the pre-training."""
        self._run("pretrain", "pretraining", "pretraining.yaml")

    def _run(self, command: str, folder: str, config: str) -> None:
        path = self.output / config
        total = load_config(str(path), []).SOLVER.MAX_ITER
        flag = "--overwrite" if self.request.overwrite else "--resume"
        self.run_command(command, [command, "--config-file", str(path), flag], self.output / folder, total)

    def train(self, data: Data) -> None:
        """Run the training and draw detections."""
        self._run("train", "detector", "recipe.yaml")
        detector, pictures = self.output / "detector", self.output / "predictions"
        cfg = load_config(str(self.output / "recipe.yaml"), [])
        records = next(iter(evaluation_sets(cfg).values()), None) or training_records(cfg)
        step = max(len(records) // SHOWN, 1)
        shown = [record["file_name"] for record in records[::step][:SHOWN]]
        weights = best_or_last(detector)
        words = ["predict", "--weights", weights, "--input", *shown, "--output", str(pictures)]
        self.run_command("predict", words, self.output / "predict", 0)
        results = detector / "inference/results.json"
        for name, found in json.loads(results.read_text(encoding="utf-8")).items() if data.evaluated else ():
            for task in ("bbox", "segm") if "segm" in found else ("bbox",):
                values = (found[task][key] for key in ("AP", "AP50"))
                ap, ap50 = (math.nan if value is None else value for value in values)  # without objects
                print_text(f"{task} AP on {name} after the last iteration: {ap:.1f}, AP50 {ap50:.1f}")
            analysis = analyze_detections(detector / "inference", name, cfg.TEST.DETECTIONS_PER_IMAGE)
            if analysis and analysis.interval:
                low, high = analysis.interval
                print_text(f"95 % interval of bbox AP by the {analysis.count} images: {low:.1f} to {high:.1f}")
        if weights.endswith(".pth"):
            saved = read_file(Path(weights))
            print_text(f"best model: {saved['metric']} {saved['value']:.1f} after iteration {saved['iteration'] + 1}")
        following = shell_command(["relvit-d2", "predict", "--weights", weights, "--input", "IMAGES"])
        print_text(f"report: {detector}/report.html\npictures: {pictures}\nnext: {following}")


def recipe_yaml(base: str, cfg: CfgNode, choices: Choices) -> str:
    """Return a config file over ``base`` with the values that ``cfg`` has for the keys, each with its reason."""
    lines = [f"_BASE_: {json.dumps(str(find_config(base).resolve()))}"]
    before: list[str] = []
    for key in sorted(choices, key=lambda key: ("." in key, key)):
        *groups, leaf = key.split(".")
        shared = len(os.path.commonprefix([groups, before]))
        lines += [f"{'  ' * depth}{groups[depth]}:" for depth in range(shared, len(groups))]
        before = groups
        value = get_key(cfg, key)
        plain = yaml.safe_load(value.dump()) if isinstance(value, CfgNode) else value
        plain = list(plain) if isinstance(plain, tuple) else plain
        text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n")
        lines.append(f"{'  ' * len(groups)}{leaf}: {text.strip()}  # {printable(choices[key].reason)}")
    return "\n".join(lines) + "\n"
