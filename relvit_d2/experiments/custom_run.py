"""From a folder of labelled images to a detector: check, recipe, pre-training, training, pictures."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from detectron2.structures import BoxMode
from fvcore.common.config import CfgNode
from tabulate import tabulate  # type: ignore[import-untyped]

from relvit_d2.analysis.anchors import Anchors, proposal, training_boxes
from relvit_d2.analysis.data_checks import check_images, check_labels, raise_first_error
from relvit_d2.analysis.model_cost import step_cost
from relvit_d2.config.config_file import override_words
from relvit_d2.conversion.encoder_file import read_encoder
from relvit_d2.data.detection.catalog import get_metadata
from relvit_d2.data.detection.custom import config_pairs, register_custom
from relvit_d2.detection.cost import detector_subject
from relvit_d2.detection.run import evaluation_sets, training_records
from relvit_d2.engine.config import EPOCH_KEYS
from relvit_d2.engine.run_setup import silence_warnings
from relvit_d2.evaluation.coco import without_mask
from relvit_d2.experiments import recipe
from relvit_d2.experiments.commands import TRIAL_KEYS, Runner, run_trial
from relvit_d2.experiments.recipe import Choices, Data, Machine, Timing
from relvit_d2.tasks import load_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder, write_json, write_text
from relvit_d2.utils.hardware import cores, device_name, free_memory
from relvit_d2.utils.printing import print_text, printable, shell_command

CONFIG, PRETRAINING_CONFIG = "configs/custom.yaml", "configs/ssl/custom.yaml"
SHOWN = 3  # pictures of detections

# Fits any number of levels until the boxes at training size decide.
ONE_ANCHOR = {"MODEL.ANCHOR_GENERATOR.SIZES": recipe.Choice([[32]], "")}

Records = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        data: folder of the custom data set.
        seconds: of everything; None for an hour on a GPU and half an hour on a CPU.
        weights: what the training starts from instead of a pre-training; "" for a pre-training.
        pretrain: whether to pre-train, if there are no ``weights``.
        opts: keys and values in turn, which replace those of the recipe.
        overwrite: replace the runs in the output folder.
    """

    data: str
    seconds: float | None
    weights: str
    pretrain: bool
    opts: tuple[str, ...]
    overwrite: bool = False

    @property
    def given(self) -> dict[str, str]:
        """The user's keys, which include the encoder of the weights."""
        return dict(zip(self.opts[::2], self.opts[1::2], strict=True))

    def with_encoder_of_weights(self) -> "Request":
        """Return the request with the encoder of an ``encoder.safetensors`` as keys, which others may replace."""
        path = Path(self.weights, "encoder.safetensors") if Path(self.weights).is_dir() else Path(self.weights)
        if path.suffix != ".safetensors" or not path.is_file():
            return self
        encoder = read_encoder(path)[1]["encoder"]
        keys = {"MODEL.ENCODER.NAME": encoder["name"], "MODEL.ENCODER.PATCH_SIZE": encoder["patch_size"]}
        return dataclasses.replace(self, opts=(*override_words(keys), *self.opts))


def train_custom(request: Request, dry_run: bool, run: Runner) -> None:
    """Check the data, print the recipe and run it.

    Args:
        request: of the user.
        dry_run: only print the recipe.
        run: runs a command.

    Raises:
        UserError: the data have an error, the time is too short, the output folder is in use, or a run fails.
    """
    started = time.monotonic()
    silence_warnings()
    request = request.with_encoder_of_weights()
    pairs = config_pairs(request.data, "detection")
    cfg = load_config(CONFIG, [*pairs, *request.opts], "detection")
    name = Path(request.data).expanduser().resolve().name
    output = Path(cfg.OUTPUT_DIR) if "OUTPUT_DIR" in request.given else Path("output") / name
    if not request.overwrite:
        _check_unused(output)
    make_folder(output)
    data = check_data(cfg, output)
    seconds = request.seconds or (3600.0 if cfg.MODEL.DEVICE.startswith("cuda") else 1800.0)
    machine = measure_machine(cfg, pairs)
    encoder, choices = recipe.choose_model(data, machine, seconds, request.given)
    files = Files(request, pairs, output, recipe.pretraining_choices(encoder, machine), run)
    choices |= anchor_choices(data, files.detector(choices | ONE_ANCHOR))
    timing = files.measure(choices, data)
    try:
        before, schedule = recipe.choose_schedules(data, timing, seconds - (time.monotonic() - started))
    except ValueError as error:
        raise UserError(
            f"--hours {seconds / 3600:g} is too short: {error} of {timing.training:.2g} s fit in; give more time"
        ) from error
    replaced = {iterations for epochs, iterations in EPOCH_KEYS.items() if epochs in request.given}
    choices |= {key: choice for key, choice in schedule.items() if key not in replaced}
    files.write(choices, before)
    print_text(files.describe(choices, before, data, machine, seconds))
    if dry_run:
        return
    (output / "pretraining/encoder.safetensors").unlink(missing_ok=True)  # by which a finished pre-training is known
    files.run(data)
    print_text(f"{time.monotonic() - started:.0f} s of the planned {seconds:.0f} s")


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


def check_data(cfg: CfgNode, output: Path) -> Data:
    """Check labels and images, print warnings, write ``check.json`` and return the facts for the recipe.

    Raises:
        UserError: the first error that training would stop at.
    """
    register_custom(cfg.DATASETS)
    records, tests = training_records(cfg), evaluation_sets(cfg)
    classes = tuple(get_metadata(cfg.DATASETS.TRAIN[0]).thing_classes)
    sets = {cfg.DATASETS.TRAIN[0]: records, **tests}
    report = check_labels(sets, classes, cfg, cfg.DATASETS.TRAIN, tuple(tests))
    images = check_images(sets, cfg, strict=not cfg.DATASETS.SKIP_UNREADABLE)
    for key in ("errors", "warnings"):
        report[key] = report[key] + images[key]
    write_json(output / "check.json", report)
    for warning in report["warnings"]:
        if "anchors" not in warning:  # the recipe chooses them
            print_text(f"warning: {warning}")
    raise_first_error(report)
    return data_facts(records, sum(map(len, tests.values())), classes)


def data_facts(records: Records, evaluated: int, classes: tuple[str, ...]) -> Data:
    """Return what the recipe takes from training records."""
    sides = np.array([(record["width"], record["height"]) for record in records], dtype=np.float64)
    objects = [[a for a in record["annotations"] if not a.get("iscrowd")] for record in records]
    counts = [len(found) for found in objects]
    boxes = np.array([a["bbox"] for found in objects for a in found], dtype=np.float64).reshape(-1, 4)
    modes = np.array([a["bbox_mode"] for found in objects for a in found])
    with_size = modes == BoxMode.XYWH_ABS
    boxes[with_size, 2:] += boxes[with_size, :2]
    return Data(
        images=len(records),
        evaluated=evaluated,
        longer=float(np.median(sides.max(1))),
        shorter=float(np.median(sides.min(1))),
        boxes=boxes,
        sizes=sides.repeat(counts, axis=0),
        classes=classes,
        masks=not without_mask(records),
        most_objects=max(counts),
    )


def measure_machine(cfg: CfgNode, pairs: Sequence[Any]) -> Machine:
    """Return the machine, with the cost of a training step of each encoder on random images."""
    device, side = cfg.MODEL.DEVICE, recipe.REFERENCE_SIDE
    costs = {}
    for encoder in recipe.ENCODERS:
        keys = {
            "MODEL.ENCODER.NAME": encoder.name,
            "MODEL.ENCODER.PATCH_SIZE": encoder.patch,
            "MODEL.DEVICE": device,
            "MODEL.ENCODER.IMG_SIZE": side,
            "INPUT.MIN_SIZE_TRAIN": f"({side * 3 // 4},)",
            "INPUT.MAX_SIZE_TRAIN": side,
        }
        subject = detector_subject(load_config(CONFIG, [*pairs, *override_words(keys)]))
        costs[encoder.name] = recipe.Cost(*step_cost(subject, 2))
    return Machine(device, cores(), free_memory(device), costs)


def anchor_choices(data: Data, cfg: CfgNode) -> Choices:
    """Return the anchors that fit the boxes at training size: two sizes per level and three ratios."""
    strides = cfg.MODEL.PYRAMID.STRIDES + ([2 * cfg.MODEL.PYRAMID.STRIDES[-1]] if cfg.MODEL.PYRAMID.TOP_BLOCK else [])
    start = Anchors(
        tuple(strides),
        tuple((3.0 * stride, 4.5 * stride) for stride in strides),
        ((0.5, 1.0, 2.0),) * len(strides),
        cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
    )
    boxes, sizes = training_boxes(data.boxes, data.sizes, cfg)
    best = proposal(boxes, sizes, start)
    fit = best.best_ious(boxes, sizes)
    reason = f"k-means of the boxes: mean best IoU {fit.mean():.2f}, {(fit >= 0.5).mean():.0%} of them above 0.5"
    return {
        "MODEL.ANCHOR_GENERATOR.SIZES": recipe.Choice([list(level) for level in best.sizes], reason),
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": recipe.Choice([list(best.ratios[0])], "of the same clusters"),
    }


@dataclasses.dataclass(frozen=True)
class Files:
    """The configs and runs of a request in its output folder.

    Attributes:
        request: of the user.
        pairs: keys of the data set.
        output: folder of all runs.
        model: keys of the pre-training but for its schedule.
        run_command: runs a command.
    """

    request: Request
    pairs: list[Any]
    output: Path
    model: Choices
    run_command: Runner

    @property
    def pretrains(self) -> bool:
        """Whether there is a pre-training."""
        return self.request.pretrain and not self.request.weights

    def detector(self, choices: Choices) -> CfgNode:
        """Return the config of the training."""
        keys = {key: choice.value for key, choice in choices.items()}
        keys["MODEL.WEIGHTS"] = self._weights()
        words = [*self.pairs, *override_words(keys), *self.request.opts, *self._output_keys("detector")]
        return load_config(CONFIG, words)

    def _weights(self) -> str:
        return str(self.output / "pretraining/encoder.safetensors") if self.pretrains else self.request.weights

    def _output_keys(self, folder: str) -> list[str]:
        return ["OUTPUT_DIR", str(self.output / folder)]

    def pretraining(self, choices: Choices) -> CfgNode:
        """Return the config of the pre-training, which has the data, encoder and device of the training."""
        given = self.request.given
        keys: dict[str, Any] = {"DATASETS.TEST": "()"}
        keys |= {key: choice.value for key, choice in {**self.model, **choices}.items()}
        keys |= {key: given[key] for key in ("MODEL.DEVICE", "SEED", "DATALOADER.NUM_WORKERS") if key in given}
        pairs = config_pairs(self.request.data, "pretrain")
        return load_config(PRETRAINING_CONFIG, [*pairs, *override_words(keys), *self._output_keys("pretraining")])

    def measure(self, choices: Choices, data: Data) -> Timing:
        """Run a few iterations of each command in the folder ``trial`` and return their times."""
        trial = Files(self.request, self.pairs, self.output / "trial", self.model, self.run_command)
        seconds = [0.0, 0.0]
        start = 0.0
        runs = {"pretrain": trial.pretraining({})} if self.pretrains else {}
        runs["train"] = trial.detector(choices)
        short = TRIAL_KEYS | {"TEST.EVAL_PERIOD": 0, "TEST.BEST_METRIC": "", "TEST.PATIENCE": 0}
        for command, cfg in runs.items():
            folder = Path(cfg.OUTPUT_DIR)
            make_folder(folder)
            cfg.DATASETS.TEST = ()
            cfg.merge_from_list([part for pair in short.items() for part in pair])  # whatever schedule the user gave
            write_text(folder / "trial.yaml", cfg.dump())
            words = [command, "--config-file", str(folder / "trial.yaml")]
            seconds[command == "train"], rest = run_trial(f"measuring {command}", words, folder, self.run_command)
            start = max(start, rest)
        shutil.rmtree(trial.output)
        batch = runs["train"].SOLVER.IMS_PER_BATCH
        return Timing(seconds[0], seconds[1], start, seconds[1] / batch / 2)

    def write(self, choices: Choices, before: Choices) -> None:
        """Write ``recipe.yaml``, and ``pretraining.yaml``, each value with its reason."""
        given = recipe.with_given(choices, self.request.given)
        sets = ("DATASETS.CUSTOM", "DATASETS.TRAIN", "DATASETS.TEST")
        shared = dict.fromkeys(sets, recipe.Choice(None, "the data set"))
        shared |= {"OUTPUT_DIR": recipe.Choice(None, "folder of the run"), "SEED": recipe.Choice(None, "of every draw")}
        shared |= {"MODEL.DEVICE": recipe.Choice(None, "the device that was measured")}
        detector = {"MODEL.WEIGHTS": recipe.Choice(None, "start of the training"), **shared, **given}
        write_text(self.output / "recipe.yaml", recipe_yaml(CONFIG, self.detector(choices), detector))
        if self.pretrains:
            text = recipe_yaml(PRETRAINING_CONFIG, self.pretraining(before), {**shared, **self.model, **before})
            write_text(self.output / "pretraining.yaml", text)

    def describe(self, choices: Choices, before: Choices, data: Data, machine: Machine, seconds: float) -> str:
        """Return the recipe as a table."""
        cfg = self.detector(choices)
        rows = [
            (key, str(get_key(cfg, key)), choice.reason)
            for key, choice in recipe.with_given(choices, self.request.given).items()
            if key != "OUTPUT_DIR"
        ]
        if before:
            count, why = before["SOLVER.MAX_ITER"]
            rows.append(("pre-training", f"{count} iterations", why))
        lines = [
            f"{data.images} training images, {data.evaluated} validation images, {len(data.boxes)} objects of "
            f"{len(data.classes)} classes; {device_name(machine.device)}",
            tabulate(rows, ("key", "value", "reason"), disable_numparse=True),
            f"planned time: {seconds / 60:.0f} min; written: {self.output}/recipe.yaml",
        ]
        return "\n\n".join(lines)

    def run(self, data: Data) -> None:
        """Run pre-training and training, and draw detections."""
        steps = [("pretrain", "pretraining", "pretraining.yaml")] if self.pretrains else []
        for command, folder, config in [*steps, ("train", "detector", "recipe.yaml")]:
            path = self.output / config
            total = load_config(str(path), []).SOLVER.MAX_ITER
            flag = "--overwrite" if self.request.overwrite else "--resume"
            self.run_command(command, [command, "--config-file", str(path), flag], self.output / folder, total)
        detector, pictures = self.output / "detector", self.output / "predictions"
        cfg = load_config(str(self.output / "recipe.yaml"), [])
        records = next(iter(evaluation_sets(cfg).values()), None) or training_records(cfg)
        step = max(len(records) // SHOWN, 1)
        shown = [record["file_name"] for record in records[::step][:SHOWN]]
        words = ["predict", "--weights", str(detector), "--input", *shown, "--output", str(pictures)]
        self.run_command("predict", words, self.output / "predict", 0)
        results = detector / "inference/results.json"
        for name, found in json.loads(results.read_text(encoding="utf-8")).items() if data.evaluated else ():
            print_text(f"AP on {name}: {found['bbox']['AP'] or 0:.1f}, AP50 {found['bbox']['AP50'] or 0:.1f}")
        following = shell_command(["relvit-d2", "predict", "--weights", str(detector), "--input", "IMAGES"])
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
