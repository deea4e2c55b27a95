"""Semi-supervised training of a detector on images without labels, with a mean teacher.

Y.-C. Liu et al., "Unbiased Teacher for Semi-Supervised Object Detection", 2021 (arXiv:2102.09480). The teacher is the
moving average of the student's weights. After iterations on labelled images only, each iteration has as many unlabelled
images as labelled ones. The teacher's confident detections in a weakly augmented image (geometry of the training: size,
crop, flip) are the pseudo-labels of the same image with changed colours and an erased rectangle, on which the student
is trained. Scores do not measure the accuracy of a box, so only the classification losses of RPN and box head are
trained on pseudo-labels, and no masks (section 3.3).

Background inside of uncertain detections is not trained on. M. Xu et al., "End-to-End Semi-Supervised Object Detection
with Soft Teacher", 2021 (arXiv:2106.09018, section 3.2), weight background by the teacher's score of it instead.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from detectron2.data.detection_utils import filter_empty_instances
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.common.config import CfgNode

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.augmentation import AugmentedMapper
from relvit_d2.data.detection.config import COLORS
from relvit_d2.data.detection.custom import held_out_sets, register_custom
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.detection.regions import InstancesWithIgnoreRegions
from relvit_d2.data.images import folder
from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.seen import exclude_images
from relvit_d2.data.loader import Batches, EndlessOrder
from relvit_d2.engine.config import resolve_epochs
from relvit_d2.engine.weight_average import WeightAverage
from relvit_d2.utils.batch_source import BatchSource
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.loader_workers import loader_workers
from relvit_d2.utils.metrics import Metric
from relvit_d2.utils.randomness import sequence

Batch = list[dict[str, Any]]

WEAK = "weak_image"  # key of the teacher's input; only unlabelled images have it
STRONG = {"BRIGHTNESS": 0.4, "CONTRAST": 0.4, "SATURATION": 0.4, "HUE": 0.1, "ERASING": 0.7}
"""Minimum values of ``INPUT.AUGMENT`` for the student's images: colour jitter and erasing of the paper (appendix)."""
TRAINED = ("loss_rpn_cls", "loss_cls")  # losses of pseudo-labels


def unlabelled_images(cfg: CfgNode) -> list[ImageFile]:
    """Return the images of ``SEMI.UNLABELLED`` without those of validation and test sets; [] if the key is not set.

    Images that are equal or nearly equal to one of ``DATASETS.TEST``, or of another validation or test split under
    ``DATASETS.CUSTOM``, are left out, and their number is logged.

    Raises:
        UserError: the folder does not exist, or none of its images can be used.
    """
    name, data = cfg.SEMI.UNLABELLED, cfg.DATASETS
    if not name:
        return []
    found = folder.readable(folder.unlabelled_images(name), data.SKIP_UNREADABLE)
    tests = held_out_sets(data)
    others = [test for test in tests if test not in data.TEST]
    register_custom({"TRAIN": (), "TEST": others, "CUSTOM": data.CUSTOM}, labels=False)
    for test in tests:
        images = catalog.get_images(test, data.SKIP_MISSING)
        found = list(exclude_images(found, name, images, test, "SEMI.UNLABELLED"))
    return found


def first_iteration(cfg: CfgNode, images: int) -> int:
    """Return the first iteration with unlabelled images in a training on ``images`` labelled images.

    Raises:
        UserError: the run ends before.
    """
    given, total = cfg.SEMI.BURN_IN, resolve_epochs(cfg, images).SOLVER.MAX_ITER
    first = round(given * total) if given < 1 else round(given)
    if first >= total:
        raise UserError(
            f"SEMI.BURN_IN {given:g} leaves none of the {total} iterations for unlabelled images: lower it, or raise "
            "SOLVER.MAX_ITER"
        )
    return first


class UnlabelledMapper:
    """Maps an image file to the inputs of student (``image``) and teacher (``WEAK``), both ``(C, H, W)`` uint8."""

    def __init__(self, cfg: CfgNode) -> None:
        self._weak = DetectionMapper(cfg, is_train=True)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.MASK_ON = False
        given, channels = dict(cfg.INPUT.AUGMENT), cfg.INPUT.CHANNELS
        for key in given:
            possible = channels == 3 or (channels == 1 and key in COLORS[:2]) or key not in COLORS
            cfg.INPUT.AUGMENT[key] = max(given[key], STRONG[key]) if key in STRONG and possible else 0.0
        self._strong = AugmentedMapper(cfg, dict, ())

    def __call__(self, image: ImageFile) -> dict[str, Any]:
        """Map one image; raise an ``UnreadableImageError`` if it cannot be read."""
        mapped = self._weak({"file_name": image, "annotations": []})
        return {"image": self._strong(mapped)["image"], WEAK: mapped["image"]}


class MixedBatches:
    """The batches of labelled images, from the iteration ``first`` on with as many unlabelled images.

    Args:
        make_labelled: maps the first iteration to the batches of labelled images.
        unlabelled: image files.
        first: first iteration with unlabelled images.
        start: first iteration.
    """

    def __init__(
        self,
        cfg: CfgNode,
        make_labelled: Callable[[int], BatchSource],
        unlabelled: Sequence[ImageFile],
        first: int,
        start: int,
    ) -> None:
        solver, self._first, self._start = cfg.SOLVER, first, start
        self._labelled, self._parts = make_labelled(start), solver.GRAD_ACCUM_STEPS
        seed = int(sequence(cfg.SEED, "unlabelled").generate_state(1)[0])  # other draws than for labelled images
        processes = comm.get_rank(), comm.get_world_size()
        order = EndlessOrder(
            len(unlabelled), solver.IMS_PER_BATCH, seed, max(start, first), *processes, parts=self._parts
        )
        workers, timeout = loader_workers(cfg), cfg.DATALOADER.TIMEOUT
        mapper, skip = UnlabelledMapper(cfg), cfg.DATASETS.SKIP_UNREADABLE
        self._unlabelled = Batches(unlabelled, mapper, list, order, seed, workers, timeout, skip)

    def __iter__(self) -> Generator[Batch, None, None]:
        with closing(iter(self._labelled)) as labelled, closing(iter(self._unlabelled)) as unlabelled:
            for part, batch in enumerate(labelled, self._start * self._parts):
                yield batch + next(unlabelled) if part >= self._first * self._parts else batch

    @property
    def replaced(self) -> list[str]:
        """Files of the unreadable images so far."""
        return self._labelled.replaced + self._unlabelled.replaced

    def names(self, iteration: int) -> list[Any]:
        """Return names of the images of an iteration, for messages."""
        unlabelled = self._unlabelled.names(iteration) if iteration >= self._first else []
        return self._labelled.names(iteration) + unlabelled


class Teacher:
    """Labels the unlabelled images of a batch, and computes the student's losses on them.

    Args:
        student: a :class:`relvit_d2.detection.rcnn.RelViTRCNN`.
        average: moving average of its weights.
    """

    def __init__(self, cfg: CfgNode, student: GeneralizedRCNN, average: WeightAverage) -> None:
        self._threshold, self._weight = cfg.SEMI.THRESHOLD, cfg.SEMI.WEIGHT
        self._student, self._average = student, average

    def label(self, batch: Batch) -> tuple[Batch, Batch]:
        """Return the labelled images of a batch, and the unlabelled ones with pseudo-labels as ``instances``."""
        unlabelled = [entry for entry in batch if WEAK in entry]
        found = self._detect([{"image": entry[WEAK]} for entry in unlabelled]) if unlabelled else []
        labels = [pseudo_labels(detections, self._threshold) for detections in found]
        with_labels = [entry | {"instances": objects} for entry, objects in zip(unlabelled, labels, strict=True)]
        return [entry for entry in batch if WEAK not in entry], with_labels

    @torch.no_grad()
    def _detect(self, batch: Batch) -> list[Instances]:
        """Return the teacher's detections, in pixels of the network's input."""
        model = self._student
        with self._average.applied(), _evaluating(model):
            images = model.preprocess_image(batch)
            features = model.features(images)
            proposals, _ = model.proposal_generator(images, features, None)
            return model.roi_heads._forward_box(features, proposals)  # without masks

    def losses(self, batch: Batch) -> dict[str, Any]:
        """Return the weighted losses on images with pseudo-labels, and the number of these labels per image."""
        model = self._student
        images = model.preprocess_image(batch)
        objects = [entry["instances"] for entry in batch]
        features = model.features(images)
        with get_event_storage().name_scope("pseudo"):  # of what Detectron2's heads log
            proposals, losses = model.proposal_generator(images, features, objects)
            sampled = model.roi_heads.label_and_sample_proposals(proposals, objects)
            losses |= model.roi_heads._forward_box(features, sampled)
        mean = torch.tensor(sum(map(len, objects)) / len(objects))
        weighted = {f"{name}_pseudo": self._weight * losses[name] for name in TRAINED}
        return weighted | {"pseudo_labels": Metric(mean, kind="count")}


@contextmanager
def _evaluating(model: GeneralizedRCNN) -> Generator[None, None, None]:
    """Set a training model to evaluation within the block."""
    model.eval()
    try:
        yield
    finally:
        model.train()
        torch.clear_autocast_cache()  # which has the weights of the teacher in lower precision


def pseudo_labels(detections: Instances, threshold: float) -> InstancesWithIgnoreRegions:
    """Return the detections with a score above ``threshold`` as objects, ``gt_boxes`` and ``gt_classes``.

    The boxes of the others are ignore regions: they may be objects or not. Without that, the objects that a teacher
    finds without confidence, in a short training most of them, would be learned as background.
    """
    confident = detections.scores > threshold
    kept = detections[confident]
    objects = Instances(kept.image_size, gt_boxes=kept.pred_boxes, gt_classes=kept.pred_classes)
    return InstancesWithIgnoreRegions(filter_empty_instances(objects), detections[~confident].pred_boxes)
