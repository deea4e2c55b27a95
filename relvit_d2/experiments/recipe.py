"""Config values for a custom data set, each chosen by a stated rule from the data, the machine and the time.

The rules are pure functions: equal data, machine, time and given keys give equal recipes. Given keys replace the
values of the rules, and the rules of other keys take them into account.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from relvit_d2.encoders.vit import SIZES
from relvit_d2.engine.config import EPOCH_KEYS
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.loader_workers import default_workers

SIDES = (128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Longer sides of training images to choose from, pixels."""

PATCHES = 2  # patches along an object that the smallest tenth of the objects gets at least
SMALL_OBJECT = 32  # pixels beyond which smaller objects need no larger images
EPOCHS = 30  # of the training images; the model is chosen so that the time is enough for at least these
MIN_IMAGES, MAX_IMAGES = 6_000, 40_000  # limits of the number of images that EPOCHS stands for
LARGER = 40_000  # training images from which larger encoders are chosen; 11,000 are too few (docs/benchmarks.md)
UPDATES = 800  # iterations that the batch is chosen for
PRETRAINING = 0.3  # share of the time
MIN_PRETRAINING = 500  # iterations; with fewer, the time is better spent on training (docs/benchmarks.md)
USABLE_MEMORY = 0.5  # share of the free memory that the activations of a batch may fill
WINDOWED = 400  # patches of an image from which attention is in windows
WINDOWS = range(8, 15)  # sides of windows to choose from, patches
RARE = 0.25  # a class in fewer images than this share of the median class's is rare
CACHED = 0.25  # share of the main memory that decoded images may take


class Encoder(NamedTuple):
    """An encoder that the recipe can choose.

    Attributes:
        name: a registered encoder.
        patch: side of a patch, pixels.
        rate: learning rate of AdamW for a batch of 16 images; smaller encoders train with larger rates.
        strides: of its maps, pixels, if it has several.
    """

    name: str
    patch: int
    rate: float
    strides: tuple[int, ...] = ()


ENCODERS = (Encoder("vit_small", 16, 2e-4), Encoder("vit_tiny", 16, 5e-4), Encoder("vit_nano", 8, 1.4e-3))
"""The strongest first."""


@dataclass(frozen=True)
class Data:
    """What the recipe takes from a data set.

    Attributes:
        images: number of training images.
        evaluated: number of images of the validation set; 0 without one.
        longer, shorter: medians of the longer and the shorter sides of the images, pixels.
        boxes: (N, 4) XYXY, pixels.
        labels: (N,) index of the class of each box.
        sizes: (N, 2) width and height of the image of each box, pixels.
        classes: names and numbers of training images of the classes.
        masks: whether every object has a mask.
        most_objects: objects of the fullest image.
    """

    images: int
    evaluated: int
    longer: float
    shorter: float
    boxes: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    classes: Mapping[str, int]
    masks: bool
    most_objects: int

    def small_object(self, side: int) -> float:
        """Return the 10th percentile of the objects' sides if the longer sides of the images are ``side`` pixels.

        All classes have the same weight in it, however many objects they have, as in AP.
        """
        return self._small_fraction * side

    @cached_property
    def _small_fraction(self) -> float:
        areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)
        sides = np.sqrt(areas) / self.sizes.max(1)
        weights = 1 / np.bincount(self.labels)[self.labels]
        order = sides.argsort()
        share = weights[order].cumsum() / weights.sum()
        return float(sides[order][share.searchsorted(0.1)])


class Cost(NamedTuple):
    """Measured cost of a training step.

    Attributes:
        seconds: per image of :data:`REFERENCE_SIDE` pixels.
        memory: bytes of activations per such image.
        view: seconds of the pre-training per view.
    """

    seconds: float
    memory: float
    view: float


REFERENCE_SIDE = 192  # longer side of the images that costs are measured with, pixels


@dataclass(frozen=True)
class Machine:
    """What the recipe takes from the machine.

    Attributes:
        device: ``MODEL.DEVICE``.
        cores: processor cores.
        memory: free bytes, of the GPU if there is one.
        main_memory: free bytes of the main memory.
        precision: of the forward pass, and why.
        costs: of each of :func:`candidates` by its name.
    """

    device: str
    cores: int
    memory: float
    main_memory: float
    precision: tuple[str, str]
    costs: Mapping[str, Cost]


class Choice(NamedTuple):
    """The value of a config key and why it has it."""

    value: Any
    reason: str


Choices = dict[str, Choice]
Given = Mapping[str, Any]  # values of the user by key


def candidates(given: Given) -> list[Encoder]:
    """Return the encoders to choose from, the strongest first; a given one is the only one."""
    name, patch = given.get("MODEL.ENCODER.NAME"), given.get("MODEL.ENCODER.PATCH_SIZE")
    found = [encoder for encoder in ENCODERS if name in (None, encoder.name)]
    found = found or [Encoder(name, 16, ENCODERS[0].rate)]  # type: ignore[arg-type]
    return [encoder._replace(patch=patch or encoder.patch) for encoder in found]


def choose_model(
    data: Data, machine: Machine, seconds: float, given: Given, encoders: Sequence[Encoder] = ENCODERS
) -> tuple[Encoder, Choices]:
    """Choose encoder, image size, levels, batch and what follows from the data alone.

    Args:
        data: the data set.
        machine: the machine, with costs of ``encoders``.
        seconds: for the training.
        given: keys of the user.
        encoders: those to choose from, the strongest first.

    Returns:
        The encoder, and the keys of the detector but for anchors and schedule.

    Raises:
        UserError: the memory is too small for a single image.
    """
    images = int(np.clip(EPOCHS * data.images, MIN_IMAGES, MAX_IMAGES))
    encoder, side, why = _encoder_and_side(data, machine, seconds, images, given, encoders)
    shorter = max(round(side * data.shorter / data.longer), 1)
    small = data.small_object(side)
    planned = seconds / _seconds(machine, encoder, side)
    fits = _fits(machine, encoder, side)
    batch = given.get("SOLVER.IMS_PER_BATCH") or int(np.clip(2 ** round(np.log2(max(planned / UPDATES, 1))), 4, 16))
    parts = next(parts for parts in range(1, batch + 1) if batch % parts == 0 and batch // parts <= fits)
    flip, why_flip = _flip(data.classes)
    reference = Choice(16, "batch that BASE_LR is for; other batches scale it")
    if "SOLVER.BASE_LR" in given:
        reference = Choice(0, "a given learning rate is not scaled with the batch")
    choices = {
        "MODEL.ENCODER.NAME": Choice(encoder.name, why),
        "MODEL.ENCODER.PATCH_SIZE": Choice(encoder.patch, f"of {encoder.name}"),
        "MODEL.ENCODER.IMG_SIZE": Choice(
            -(-side // encoder.patch) * encoder.patch, "image side of the position embedding"
        ),
        "INPUT.MIN_SIZE_TRAIN": Choice((shorter,), f"shorter side; the longer one is {side} px, as in most images"),
        "INPUT.MAX_SIZE_TRAIN": Choice(
            side, f"longer side; a tenth of the objects are then at most {small:.0f} px large"
        ),
        "INPUT.MIN_SIZE_TEST": Choice(shorter, "as in training"),
        "INPUT.MAX_SIZE_TEST": Choice(side, "as in training"),
        "INPUT.RANDOM_FLIP": Choice(flip, why_flip),
        "MODEL.MASK_ON": Choice(
            data.masks, "every object has a mask" if data.masks else "there are objects without a mask"
        ),
        **window_choices(encoder, shorter, side),
        "MODEL.PYRAMID.STRIDES": _levels(encoder, small),
        "SOLVER.IMS_PER_BATCH": Choice(batch, f"a power of 2 from 4 to 16, for about {UPDATES} iterations"),
        "SOLVER.REFERENCE_BATCH": reference,
        "SOLVER.GRAD_ACCUM_STEPS": Choice(parts, f"{fits} images fit into half of the free memory"),
        "SOLVER.BASE_LR": Choice(encoder.rate, f"for {encoder.name} and 16 images"),
        "SOLVER.PRECISION": Choice(*machine.precision),
        **_regions(data, given),
        **_loader(data, machine),
        **_sampler(data),
    }
    return encoder, choices


def choose_pretraining(
    data: Data, machine: Machine, seconds: float, given: Given, encoders: Sequence[Encoder] = ENCODERS
) -> Choice:
    """Return whether the time, of pre-training and training, is enough for a pre-training that is worth it."""
    encoder, _ = choose_model(data, machine, seconds * (1 - PRETRAINING), given, encoders)
    batch = pretraining_views(encoder, machine.device)["SOLVER.IMS_PER_BATCH"].value
    count = int(PRETRAINING * seconds / (machine.costs[encoder.name].view * batch))
    enough = count >= MIN_PRETRAINING
    limit = f"{'at least' if enough else 'fewer than'} the {MIN_PRETRAINING:,} that are needed"
    return Choice(enough, f"{PRETRAINING:.0%} of the time is enough for about {count:,} iterations, {limit}")


def pretraining_views(encoder: Encoder, device: str) -> Choices:
    """Choose size and number of the views of the pre-training."""
    on_gpu = device.startswith("cuda")
    count = 14 if on_gpu else 8
    side = max(encoder.strides, default=encoder.patch) * count
    return {
        "MODEL.ENCODER.IMG_SIZE": Choice(side, "grid of the position embedding"),
        "PRETEXT.IMAGE_SIZE": Choice(side, f"{count} x {count} patches"),
        "SOLVER.IMS_PER_BATCH": Choice(256 if on_gpu else 64, "256 on a GPU, 64 on a CPU"),
    }


def _pixels(side: int) -> float:
    return (side / REFERENCE_SIDE) ** 2


def _seconds(machine: Machine, encoder: Encoder, side: int) -> float:
    return machine.costs[encoder.name].seconds * _pixels(side)


def _fits(machine: Machine, encoder: Encoder, side: int) -> int:
    """Return the number of images whose activations fit into the memory."""
    return int(USABLE_MEMORY * machine.memory / (machine.costs[encoder.name].memory * _pixels(side)))


def _sides(data: Data, given: Given) -> list[int]:
    """Return the longer sides to choose from, ascending; a given one is the only one."""
    longest, shorter = given.get("INPUT.MAX_SIZE_TRAIN"), given.get("INPUT.MIN_SIZE_TRAIN")
    found = [longest] if longest else []
    found += [round(max(shorter) * data.longer / data.shorter)] if shorter else []
    return [min(found)] if found else [side for side in SIDES if side <= max(data.longer, SIDES[0])]


def _encoder_and_side(
    data: Data, machine: Machine, seconds: float, seen: int, given: Given, encoders: Sequence[Encoder]
) -> tuple[Encoder, int, str]:
    """Return the strongest encoder that resolves small objects and trains on enough images, an image side, and why."""
    sides, least = _sides(data, given), seen
    for encoder in encoders:
        seen = least if encoder == encoders[-1] else LARGER
        fitting = [side for side in sides if _fits(machine, encoder, side)]
        resolved = [side for side in sides if data.small_object(side) >= PATCHES * encoder.patch] or sides[-1:]
        affordable = [side for side in fitting if _seconds(machine, encoder, side) * seen <= seconds]
        if both := [side for side in affordable if side in resolved]:
            side = next((side for side in both if data.small_object(side) >= SMALL_OBJECT), both[-1])
            why = f"the time is enough for {seen:,} training images of {side} px"
            why += f"; larger encoders need {LARGER:,}" if encoder != encoders[0] else ""
            return encoder, side, why
    if not fitting:
        needed = machine.costs[encoder.name].memory * _pixels(sides[0]) / USABLE_MEMORY
        raise UserError(
            f"the memory is too small for any batch: an image of {sides[0]} px needs {needed / 2**20:,.0f} MiB with "
            f"{encoder.name}, but {machine.memory / 2**20:,.0f} MiB are free; close other programs or give a smaller "
            "INPUT.MAX_SIZE_TRAIN"
        )
    if not affordable:
        return encoder, fitting[0], f"the fastest; the time is short even for images of {fitting[0]} px"
    side, limit = affordable[-1], "memory" if affordable[-1] == fitting[-1] else "time"
    return encoder, side, f"the fastest; small objects need {resolved[0]} px, but the {limit} allows {side} px"


def window_choices(encoder: Encoder, height: int, width: int) -> Choices:
    """Choose the attention windows that need the least padding, for the ViTs of this package; nothing for others."""
    if encoder.name not in SIZES:
        return {}
    rows, cols = -(-height // encoder.patch), -(-width // encoder.patch)
    depth = SIZES[encoder.name][1]
    if rows * cols < WINDOWED:
        return {
            "MODEL.ENCODER.WINDOW": Choice(0, f"global attention: {rows} x {cols} patches are fewer than {WINDOWED}")
        }
    side = min(reversed(WINDOWS), key=lambda side: -(-rows // side) * -(-cols // side) * side**2)
    why = f"of {WINDOWS[0]} to {WINDOWS[-1]}, the side that pads {rows} x {cols} patches least"
    return {
        "MODEL.ENCODER.WINDOW": Choice(side, why),
        "MODEL.ENCODER.GLOBAL_BLOCKS": Choice(max(depth // 3, 1), f"a third of the {depth} blocks"),
    }


def _levels(encoder: Encoder, small: float) -> Choice:
    """Choose the strides of the pyramid for small objects of so many pixels."""
    if encoder.strides:
        return Choice(list(encoder.strides), f"of the maps of {encoder.name}")
    finest = next((stride for stride in (8, 4) if 2 * stride <= small), 4)
    strides = [2**power for power in range(2, 7) if finest <= 2**power <= 2 * encoder.patch]
    return Choice(strides, f"from {finest} px (8, or 4 for objects under 16 px) to twice the patch")


def _regions(data: Data, given: Given) -> Choices:
    """Choose the numbers of anchors and regions of an image that are trained on, proposed and detected."""
    fullest, mean = data.most_objects, len(data.boxes) / data.images
    detected, twice = (int(np.clip(100 * np.ceil(count / 100), 100, 1000)) for count in (fullest, 2 * fullest))
    proposed = max(twice, given.get("TEST.DETECTIONS_PER_IMAGE", 0))
    objects = f"the {fullest} objects of the fullest image, in hundreds up to 1,000"
    choices = {"TEST.DETECTIONS_PER_IMAGE": Choice(detected, f"at least {objects}")}
    for part in ("TRAIN", "TEST"):
        after, before = f"MODEL.RPN.POST_NMS_TOPK_{part}", f"MODEL.RPN.PRE_NMS_TOPK_{part}"
        choices[after] = Choice(proposed, f"at least twice {objects}")
        choices[before] = Choice(2 * given.get(after, proposed), "of each level, twice the proposals")
    for key, factor, least in (("MODEL.RPN", 4, 64), ("MODEL.ROI_HEADS", 2, 32)):
        number = int(np.clip(2 ** np.ceil(np.log2(factor * mean)), least, 256))
        reason = f"a power of 2 from {least} to 256, for {factor} times the mean of {mean:.1f} objects"
        choices[f"{key}.BATCH_SIZE_PER_IMAGE"] = Choice(number, reason)
    return choices


def _flip(classes: Iterable[str]) -> tuple[str, str]:
    for name in classes:
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
        if found := sorted(words & {"left", "right", "digit", "letter", "character", "text"}):
            return "none", f"the class name '{name}' contains {found[0]}"
    if all(len(name) == 1 or name.isdecimal() for name in classes):
        return "none", "the classes are letters or numbers"
    return "horizontal", "no class name contains left, right, digit, letter, character or text"


def _sampler(data: Data) -> Choices:
    """Choose how often images of rare classes are repeated."""
    shares = np.array([count / data.images for count in data.classes.values() if count])
    threshold = round(RARE * float(np.median(shares)), 4)
    name = min((name for name, count in data.classes.items() if count), key=lambda name: data.classes[name])
    rare = shares.min() < threshold
    seen = f"'{name}', the rarest class, is in {data.classes[name]} of {data.images} images"
    return {
        "DATALOADER.SAMPLER_TRAIN": Choice("RepeatFactorTrainingSampler" if rare else "TrainingSampler", seen),
        "DATALOADER.REPEAT_THRESHOLD": Choice(threshold, f"{RARE:g} of the median class's share of images: rare below")
        if rare
        else Choice(0.0, f"no class has less than {RARE:g} of the median class's share of images"),
    }


def _loader(data: Data, machine: Machine) -> Choices:
    on_gpu = machine.device.startswith("cuda")
    reason = "at most 8" if on_gpu else "a quarter of them but at least 1, since the model needs the others"
    decoded = 3 * data.images * data.longer * data.shorter
    fits = decoded <= CACHED * machine.main_memory
    size = f"{decoded / 2**30:.1f} GiB of decoded images are {'below' if fits else 'above'} {CACHED:g} of the memory"
    return {
        "DATALOADER.NUM_WORKERS": Choice(
            default_workers(machine.device, machine.cores), f"{machine.cores} cores, {reason}"
        ),
        "DATALOADER.CACHE": Choice("ram" if fits else "off", size),
    }


def with_given(choices: Choices, given: Given) -> Choices:
    """Return the choices with the user's values, whose reason is "given".

    A given number of epochs replaces the choice of the number of iterations.
    """
    replaced = {iterations for epochs, iterations in EPOCH_KEYS.items() if given.get(epochs)}
    kept = {key: choice for key, choice in choices.items() if key not in replaced}
    return kept | {key: Choice(value, "given") for key, value in given.items()}


def pretraining_choices(data: Data, encoder: Encoder, machine: Machine) -> Choices:
    """Choose views and batch of the pre-training."""
    return {
        "MODEL.ENCODER.NAME": Choice(encoder.name, "the detector's"),
        "MODEL.ENCODER.PATCH_SIZE": Choice(encoder.patch, "the detector's"),
        **pretraining_views(encoder, machine.device),
        "SOLVER.REFERENCE_BATCH": Choice(64, "batch of the learning rate"),
        "SOLVER.BASE_LR": Choice(encoder.rate, f"of {encoder.name}"),
        "SOLVER.PRECISION": Choice(*machine.precision),
        **_loader(data, machine),
    }
