"""Config values for a custom data set, each chosen by a stated rule from the data, the machine and the time.

The rules are pure functions: equal data, machine and time give equal recipes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from relvit_d2.utils.loader_workers import default_workers

SIDES = (128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Longer sides of training images to choose from, pixels."""

PATCHES = 2  # patches along an object that the smallest tenth of the objects gets at least
SMALL_OBJECT = 32  # pixels beyond which smaller objects need no larger images
EPOCHS = 20  # of the training images, as few as a model is chosen for
MIN_IMAGES, MAX_IMAGES = 4_000, 40_000  # limits of the number of images that EPOCHS stands for
UPDATES = 800  # iterations that the batch is chosen for
PRETRAINING = 0.3  # share of the time
USABLE_MEMORY = 0.5  # share of the free memory that the activations of a batch may fill
EVALUATIONS = 5  # during the training
MARGIN = 0.95  # share of the time that is planned


class Encoder(NamedTuple):
    """An encoder that the recipe can choose.

    Attributes:
        name: a registered encoder.
        patch: side of a patch, pixels.
        rate: learning rate of AdamW for a batch of 16 images; smaller encoders train with larger rates.
    """

    name: str
    patch: int
    rate: float


ENCODERS = (Encoder("vit_small", 16, 2e-4), Encoder("vit_tiny", 16, 5e-4), Encoder("vit_nano", 8, 1e-3))
"""The strongest first."""


@dataclass(frozen=True)
class Data:
    """What the recipe takes from a data set.

    Attributes:
        images: number of training images.
        evaluated: number of images of the validation set; 0 without one.
        longer, shorter: medians of the longer and the shorter sides of the images, pixels.
        boxes: (N, 4) XYXY, pixels.
        sizes: (N, 2) width and height of the image of each box, pixels.
        classes: their names.
        masks: whether every object has a mask.
        most_objects: objects of the fullest image.
    """

    images: int
    evaluated: int
    longer: float
    shorter: float
    boxes: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    masks: bool
    most_objects: int

    def small_object(self, side: int) -> float:
        """Return the 10th percentile of the objects' sides if the longer sides of the images are ``side`` pixels."""
        areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)
        return float(np.percentile(np.sqrt(areas) / self.sizes.max(1), 10)) * side


class Cost(NamedTuple):
    """Measured cost of a training step.

    Attributes:
        seconds: per image of :data:`REFERENCE_SIDE` pixels.
        memory: bytes of activations per such image.
    """

    seconds: float
    memory: float


REFERENCE_SIDE = 192  # longer side of the images that costs are measured with, pixels


@dataclass(frozen=True)
class Machine:
    """What the recipe takes from the machine.

    Attributes:
        device: ``MODEL.DEVICE``.
        cores: processor cores.
        memory: free bytes, of the GPU if there is one.
        costs: of each encoder by its name.
    """

    device: str
    cores: int
    memory: float
    costs: Mapping[str, Cost]


class Choice(NamedTuple):
    """The value of a config key and why it has it."""

    value: Any
    reason: str


Choices = dict[str, Choice]


def choose_model(data: Data, machine: Machine, seconds: float, given: Mapping[str, Any]) -> tuple[Encoder, Choices]:
    """Choose encoder, image size, levels, batch and what follows from the data alone.

    Args:
        data: the data set.
        machine: the machine, with costs of :data:`ENCODERS`.
        seconds: for pre-training and training.
        given: keys of the user, which the choice of encoder and image size respects.

    Returns:
        The encoder, and the keys of the detector but for anchors and schedule.
    """
    images = int(np.clip(EPOCHS * data.images, MIN_IMAGES, MAX_IMAGES))
    encoder, side, why = _encoder_and_side(data, machine, seconds * (1 - PRETRAINING) / images, given)
    ratio = data.shorter / data.longer
    shorter = max(round(side * ratio), 1)
    small = data.small_object(side)
    finest = next((stride for stride in (8, 4) if 2 * stride <= small), 4)
    strides = [2**power for power in range(2, 7) if finest <= 2**power <= 2 * encoder.patch]
    planned = seconds * (1 - PRETRAINING) / _seconds(machine, encoder, side)
    fits = int(USABLE_MEMORY * machine.memory / (machine.costs[encoder.name].memory * _pixels(side)))
    batch = int(np.clip(2 ** round(np.log2(max(planned / UPDATES, 1))), 4, 16))
    parts = next((parts for parts in (1, 2, 4, 8, 16) if batch % parts == 0 and batch // parts <= max(fits, 1)), batch)
    flip, why_flip = _flip(data.classes)
    limit = int(np.clip(100 * np.ceil(data.most_objects / 100), 100, 1000))
    choices = {
        "MODEL.ENCODER.NAME": Choice(encoder.name, why),
        "MODEL.ENCODER.PATCH_SIZE": Choice(encoder.patch, f"of {encoder.name}"),
        "MODEL.ENCODER.IMG_SIZE": Choice(-(-side // encoder.patch) * encoder.patch, "grid of the position embedding"),
        "INPUT.MIN_SIZE_TRAIN": Choice((shorter,), f"shorter side of images of {side} px, in the data's proportion"),
        "INPUT.MAX_SIZE_TRAIN": Choice(side, f"the smallest tenth of the objects has {small:.0f} px or less then"),
        "INPUT.MIN_SIZE_TEST": Choice(shorter, "as in training"),
        "INPUT.MAX_SIZE_TEST": Choice(side, "as in training"),
        "INPUT.RANDOM_FLIP": Choice(flip, why_flip),
        "MODEL.MASK_ON": Choice(
            data.masks, "every object has a mask" if data.masks else "there are objects without a mask"
        ),
        "MODEL.PYRAMID.STRIDES": Choice(strides, f"from {finest} px, half of a small object, to twice the patch"),
        "SOLVER.IMS_PER_BATCH": Choice(
            batch, f"4 to 16 images; more than 4 if the time allows over {UPDATES} iterations"
        ),
        "SOLVER.REFERENCE_BATCH": Choice(16, "batch of the learning rate"),
        "SOLVER.GRAD_ACCUM_STEPS": Choice(parts, f"{fits} images fit into half of the free memory"),
        "SOLVER.BASE_LR": Choice(encoder.rate, f"of {encoder.name} for 16 images, scaled with the batch"),
        "TEST.DETECTIONS_PER_IMAGE": Choice(limit, f"the fullest image has {data.most_objects} objects"),
        "DATALOADER.NUM_WORKERS": Choice(*_workers(machine)),
    }
    return encoder, choices


def _pixels(side: int) -> float:
    return (side / REFERENCE_SIDE) ** 2


def _seconds(machine: Machine, encoder: Encoder, side: int) -> float:
    return machine.costs[encoder.name].seconds * _pixels(side)


def _encoder_and_side(
    data: Data, machine: Machine, seconds: float, given: Mapping[str, Any]
) -> tuple[Encoder, int, str]:
    """Return the strongest encoder that resolves small objects in at most ``seconds`` per image, and the image side."""
    sides = [side for side in SIDES if side <= max(data.longer, SIDES[0])]
    encoders = [e for e in ENCODERS if given.get("MODEL.ENCODER.NAME", e.name) == e.name] or list(ENCODERS)
    for encoder in encoders:
        resolved = [side for side in sides if data.small_object(side) >= PATCHES * encoder.patch] or sides[-1:]
        affordable = [side for side in resolved if _seconds(machine, encoder, side) <= seconds]
        if affordable:
            side = next((side for side in affordable if data.small_object(side) >= SMALL_OBJECT), affordable[-1])
            return encoder, side, f"the strongest of {len(ENCODERS)} that sees {EPOCHS} epochs of {side} px in the time"
    affordable = [side for side in sides if _seconds(machine, encoder, side) <= seconds]
    side = affordable[-1] if affordable else sides[0]
    return encoder, side, f"the fastest; small objects need {resolved[0]} px, but the time allows {side} px"


def _flip(classes: tuple[str, ...]) -> tuple[str, str]:
    sided = [name for name in classes if {"left", "right"} & set(re.split(r"[^a-z]+", name.lower()))]
    if sided:
        return "none", f"the class name '{sided[0]}' contains left or right"
    if all(len(name) == 1 for name in classes):
        return "none", "the classes are single characters"
    return "horizontal", "no class name contains left or right"


def _workers(machine: Machine) -> tuple[int, str]:
    on_gpu = machine.device.startswith("cuda")
    reason = "at most 8" if on_gpu else "a quarter of them, since the model needs the others"
    return default_workers(machine.device, machine.cores), f"{machine.cores} cores, {reason}"


class Timing(NamedTuple):
    """Measured seconds of a few iterations of pre-training and training.

    Attributes:
        pretraining, training: seconds per iteration; 0 for no pre-training.
        start: seconds of the start and the end of a command.
        image: seconds of the evaluation of an image.
    """

    pretraining: float
    training: float
    start: float
    image: float


def choose_schedules(data: Data, timing: Timing, seconds: float, least: int = 20) -> tuple[Choices, Choices]:
    """Choose the schedules of pre-training and training.

    Args:
        data: the data set.
        timing: measured on this machine with the chosen model.
        seconds: for everything that is still to be done.
        least: iterations of the training at least.

    Returns:
        The keys of the pre-training, empty without one, and those of the training.

    Raises:
        ValueError: the time is too short for ``least`` iterations.
    """
    commands = 2 if timing.pretraining else 1
    rest = MARGIN * seconds - (commands + 1) * timing.start - EVALUATIONS * data.evaluated * timing.image
    before = PRETRAINING * rest if timing.pretraining else 0.0
    iterations = int((rest - before) / timing.training)
    if iterations < least:
        raise ValueError(f"{max(iterations, 0)} iterations")
    period = max(iterations // EVALUATIONS, 1)
    training: Choices = {
        "SOLVER.MAX_ITER": Choice(
            iterations, f"{timing.training:.2g} s each; fills the time left by pre-training, evaluation and starts"
        ),
        "SOLVER.WARMUP_ITERS": Choice(iterations // 20, "a twentieth of the iterations"),
        "SOLVER.CHECKPOINT_PERIOD": Choice(period, f"{EVALUATIONS} checkpoints"),
        "SOLVER.CHECKPOINT_MAX_TO_KEEP": Choice(2, "one to resume, one in case it is damaged"),
        "TEST.EVAL_PERIOD": Choice(period if data.evaluated else 0, f"{EVALUATIONS} evaluations"),
        "TEST.BEST_METRIC": Choice("bbox/AP" if data.evaluated else "", "the best of them is kept"),
    }
    if not timing.pretraining:
        return {}, training
    count = max(int(before / timing.pretraining), 2)
    pretraining: Choices = {
        "SOLVER.MAX_ITER": Choice(
            count, f"{PRETRAINING:.0%} of the time for iterations, {timing.pretraining:.2g} s each"
        ),
        "SOLVER.WARMUP_ITERS": Choice(count // 10, "a tenth of the iterations"),
        "SOLVER.CHECKPOINT_PERIOD": Choice(max(count // 4, 1), "four checkpoints"),
        "SOLVER.CHECKPOINT_MAX_TO_KEEP": Choice(2, "one to resume, one in case it is damaged"),
    }
    return pretraining, training


def with_given(choices: Choices, given: Mapping[str, Any]) -> Choices:
    """Return the choices with the user's values, whose reason is "given"."""
    return choices | {key: Choice(value, "given") for key, value in given.items()}


def pretraining_choices(encoder: Encoder, machine: Machine) -> Choices:
    """Choose views and batch of the pre-training."""
    on_gpu = machine.device.startswith("cuda")
    side = encoder.patch * (14 if on_gpu else 8)
    batch = 256 if on_gpu else 64
    return {
        "MODEL.ENCODER.NAME": Choice(encoder.name, "the detector's"),
        "MODEL.ENCODER.PATCH_SIZE": Choice(encoder.patch, "the detector's"),
        "MODEL.ENCODER.IMG_SIZE": Choice(side, "grid of the position embedding"),
        "PRETEXT.IMAGE_SIZE": Choice(side, f"{side // encoder.patch} x {side // encoder.patch} patches"),
        "SOLVER.IMS_PER_BATCH": Choice(batch, "256 on a GPU, 64 on a CPU"),
        "SOLVER.REFERENCE_BATCH": Choice(64, "batch of the learning rate"),
        "SOLVER.BASE_LR": Choice(encoder.rate, f"of {encoder.name}"),
    }
