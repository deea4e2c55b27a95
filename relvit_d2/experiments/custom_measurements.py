"""Facts on a custom data set, the machine and given weights, from which the recipe is made."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from fvcore.common.config import CfgNode

from relvit_d2.analysis.anchors import SAMPLE, Anchors, proposal, training_boxes
from relvit_d2.analysis.data_checks import check_images, check_labels, raise_first_error
from relvit_d2.analysis.model_cost import step_cost
from relvit_d2.config.config_file import override_words
from relvit_d2.conversion.encoder_file import read_weights
from relvit_d2.data.detection.catalog import get_metadata
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.detection.cost import detector_subject
from relvit_d2.detection.evaluation import evaluation_sets
from relvit_d2.detection.mean_teacher import unlabelled_images
from relvit_d2.detection.run import training_records
from relvit_d2.encoders import encoder_from_keys, map_strides
from relvit_d2.engine.checkpoint import download
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.weights import holds_encoder
from relvit_d2.evaluation.coco import without_mask
from relvit_d2.experiments import recipe
from relvit_d2.experiments.recipe import Choices, Data, Encoder, Machine
from relvit_d2.pretraining.cost import pretraining_subject
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.hardware import cores, free_memory
from relvit_d2.utils.printing import print_text
from relvit_d2.utils.progress import Progress

CONFIG = "configs/custom.yaml"
PRETRAINING_CONFIG = "configs/ssl/custom.yaml"

# Fits any number of levels until the boxes at training size decide.
ONE_ANCHOR = {"MODEL.ANCHOR_GENERATOR.SIZES": recipe.Choice([[32]], "")}

# Seconds of an iteration with unlabelled images over those of one without, measured: forward and backward pass of the
# student on as many images, and the forward pass of the teacher.
SEMI_STEP = 2.5

Records = list[dict[str, Any]]


def check_data(cfg: CfgNode, output: Path) -> Data:
    """Check labels and images, print warnings, write ``check.json`` and return the facts for the recipe.

    Raises:
        UserError: the first error that training would stop at, also of unlabelled images.
    """
    register_custom(cfg.DATASETS)
    records, tests = training_records(cfg), evaluation_sets(cfg)
    if len(records) < 2:
        raise UserError(
            f"{cfg.DATASETS.TRAIN[0]} has one image with objects, from which no detector can be trained: label more "
            "images"
        )
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
    unlabelled_images(cfg)
    return data_facts(records, sum(map(len, tests.values())), classes)


def data_facts(records: Records, evaluated: int, classes: tuple[str, ...]) -> Data:
    """Return what the recipe takes from training records."""
    sides = np.array([(record["width"], record["height"]) for record in records], dtype=np.float64)
    objects = [[a for a in record["annotations"] if not a.get("iscrowd")] for record in records]
    counts = [len(found) for found in objects]
    labels = np.array([a["category_id"] for found in objects for a in found], dtype=np.int64)
    seen = Counter(number for found in objects for number in {a["category_id"] for a in found})
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
        labels=labels,
        sizes=sides.repeat(counts, axis=0),
        classes={name: seen[number] for number, name in enumerate(classes)},
        masks=not without_mask(records),
        most_objects=max(counts),
    )


def measure_machine(cfg: CfgNode, pairs: Sequence[Any], encoders: Sequence[Encoder], pretraining: bool) -> Machine:
    """Return the machine, with the cost of a training step of each encoder on random images.

    Args:
        cfg: config with the device.
        pairs: keys and values in turn of the data set and of the user; anchors and levels are left out.
        encoders: those to measure.
        pretraining: measure pre-training too.
    """
    device, side = cfg.MODEL.DEVICE, recipe.REFERENCE_SIDE
    costs = {}
    left_out = ("MODEL.ANCHOR_GENERATOR.", "MODEL.PYRAMID.STRIDES", "OUTPUT_DIR")
    shared = {key: value for key, value in zip(pairs[::2], pairs[1::2], strict=True) if not key.startswith(left_out)}
    for encoder in Progress(encoders, desc="measuring encoders", unit="encoder"):
        keys = {
            "MODEL.ENCODER.NAME": encoder.name,
            "MODEL.ENCODER.PATCH_SIZE": encoder.patch,
            "MODEL.ENCODER.IMG_SIZE": -(-side // encoder.patch) * encoder.patch,
            "INPUT.MIN_SIZE_TRAIN": f"({side * 3 // 4},)",
            "INPUT.MAX_SIZE_TRAIN": side,
        }
        windows = {key: choice.value for key, choice in recipe.window_choices(encoder, side * 3 // 4, side).items()}
        if encoder.strides:
            keys |= {key: choice.value for key, choice in ONE_ANCHOR.items()}
            keys["MODEL.PYRAMID.STRIDES"] = list(encoder.strides)
        subject = detector_subject(load_config(CONFIG, override_words(windows | shared | keys)))
        view = _seconds_per_view(cfg, encoder) if pretraining else 0.0
        factors = (SEMI_STEP, 2.0) if cfg.SEMI.UNLABELLED else (1.0, 1.0)
        seconds, activations = step_cost(subject, 2)
        costs[encoder.name] = recipe.Cost(factors[0] * seconds, factors[1] * activations, view)
    precision = choose_precision(cfg.SOLVER.PRECISION, torch.device(device))
    memory = free_memory(device), free_memory("cpu")
    return Machine(device, cores(), *memory, (precision.name, precision.reason), costs)


def _seconds_per_view(cfg: CfgNode, encoder: Encoder) -> float:
    """Return the seconds of a step of the pre-training per view, with device and precision of a config."""
    keys = {key: choice.value for key, choice in recipe.pretraining_views(encoder, cfg.MODEL.DEVICE).items()}
    keys |= {
        "MODEL.ENCODER.NAME": encoder.name,
        "MODEL.ENCODER.PATCH_SIZE": encoder.patch,
        "MODEL.DEVICE": cfg.MODEL.DEVICE,
        "SOLVER.PRECISION": cfg.SOLVER.PRECISION,
    }
    return step_cost(pretraining_subject(load_config(PRETRAINING_CONFIG, override_words(keys))), 16)[0]


def anchor_choices(data: Data, cfg: CfgNode) -> Choices:
    """Return the anchors that fit the boxes at training size: two sizes per level and three ratios.

    All classes have the same weight, however many objects they have, as in AP.
    """
    strides = cfg.MODEL.PYRAMID.STRIDES + ([2 * cfg.MODEL.PYRAMID.STRIDES[-1]] if cfg.MODEL.PYRAMID.TOP_BLOCK else [])
    start = Anchors(
        tuple(strides),
        tuple((3.0 * stride, 4.5 * stride) for stride in strides),
        ((0.5, 1.0, 2.0),) * len(strides),
        cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
    )
    of_class = [np.flatnonzero(data.labels == label) for label in np.unique(data.labels)]
    count = min(max(map(len, of_class)), -(-SAMPLE // len(of_class)))
    drawn = np.concatenate([found[np.arange(count) * len(found) // count] for found in of_class])
    boxes, sizes = training_boxes(data.boxes[drawn], data.sizes[drawn], cfg)
    best = proposal(boxes, sizes, start)
    fit = best.best_ious(boxes, sizes)
    reason = (
        f"k-means of boxes, equal weight of classes: mean best IoU {fit.mean():.2f}, {(fit >= 0.5).mean():.0%} >= 0.5"
    )
    return {
        "MODEL.ANCHOR_GENERATOR.SIZES": recipe.Choice([list(level) for level in best.sizes], reason),
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": recipe.Choice([list(best.ratios[0])], "of the same clusters"),
    }


def weights_choices(cfg: CfgNode, weights: str) -> Choices:
    """Return the keys of the encoder that published or exported weights determine; read them to find errors early.

    Raises:
        UserError: the weights are missing, damaged, or not published under that name.
    """
    if not holds_encoder(weights):
        return {}
    path = download(weights) if "://" in weights else weights
    metadata = read_weights(path, encoder_from_keys(cfg.MODEL))[1]
    reason = f"of {weights}"
    encoder = metadata["encoder"]
    choices = {"MODEL.ENCODER.NAME": recipe.Choice(encoder["name"], reason)}
    if "patch_size" in encoder:
        choices["MODEL.ENCODER.PATCH_SIZE"] = recipe.Choice(encoder["patch_size"], reason)
    if encoder.get("rel_pos"):  # the tables of relative positions depend on the windows
        for name in ("rel_pos", "window", "global_blocks"):
            choices[f"MODEL.ENCODER.{name.upper()}"] = recipe.Choice(encoder[name], reason)
    for key, name in (("MODEL.PIXEL_MEAN", "pixel_mean"), ("MODEL.PIXEL_STD", "pixel_std")):
        if name in metadata:
            choices[key] = recipe.Choice(list(metadata[name]), reason)
    if metadata.get("input_format", cfg.INPUT.FORMAT) != cfg.INPUT.FORMAT:
        choices["INPUT.FORMAT"] = recipe.Choice(metadata["input_format"], reason)
    return choices


def with_strides(encoder: Encoder, cfg: CfgNode, known: Mapping[str, Any]) -> Encoder:
    """Return an encoder with the strides of its maps and, unless one is given, the patch that it has."""
    if encoder.name in {known.name for known in recipe.ENCODERS}:
        return encoder
    keys = cfg.MODEL.clone()
    keys.ENCODER.NAME = encoder.name
    patches = [encoder.patch] if "MODEL.ENCODER.PATCH_SIZE" in known else [16, 14, 8, 4]
    for patch in patches:
        keys.ENCODER.PATCH_SIZE, keys.ENCODER.IMG_SIZE = patch, 14 * patch
        try:
            strides = map_strides(keys)
        except UserError:
            if patch == patches[-1]:
                raise
        else:
            return encoder._replace(patch=patch, strides=tuple(strides) if len(strides) > 1 else ())
    raise AssertionError("one of the patches is the last")
