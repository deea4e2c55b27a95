"""Checks of data sets before training: labels, boxes and anchors (seconds) and all image files (minutes).

Reports consist of JSON values. ``"errors"`` lists what training would fail on, ``"warnings"`` what a user should know:
one message each.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from fvcore.common.config import CfgNode

from relvit_d2.analysis.anchors import anchor_keys, fit_report
from relvit_d2.analysis.pixel_statistics import PixelStatistics, histogram
from relvit_d2.conversion.encoder_file import read_encoder
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import near_misses
from relvit_d2.data.detection.records import BORDER_SLACK, Record
from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.images.seen import SeenImages, fingerprints_of
from relvit_d2.data.images.similarity import pixel_digest
from relvit_d2.data.subsets import subset
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hardware import cores
from relvit_d2.utils.progress import Progress

Report = dict[str, Any]

MOST_OBJECTS = 10_000  # of a training image: Detectron2 compares each with each, 400 MB for so many
LISTED = 5  # maximum number of files that a message lists
# Warn about anchors if other ones reach this much more of the boxes, in data sets of at least so many boxes.
REACH_GAIN, REACH_BOXES = 0.1, 100

logger = logging.getLogger(__name__)


class Boxes(NamedTuple):
    """The boxes of a data set without crowds: ``boxes`` (N, 4) XYXY, ``sizes`` (N, 2) of their images, in pixels."""

    boxes: np.ndarray
    sizes: np.ndarray


def read_sets(names: list[str], labelled: bool, skip_missing: bool) -> tuple[dict[str, list[Any]], list[str]]:
    """Return records and class names; or images and no classes, if labels are not needed or a name is a folder."""
    if not labelled or any(catalog.is_folder(name) for name in names):
        return {name: catalog.get_images(name, skip_missing) for name in names}, []
    classes = {name: list(catalog.get_metadata(name).thing_classes) for name in names}
    for name in names[1:]:
        if classes[name] != classes[names[0]]:
            raise UserError(f"data sets '{names[0]}' and '{name}' have different classes: check them one by one")
    return {name: catalog.get_records(name, skip_missing) for name in names}, classes[names[0]]


def unrecognised_warnings(names: list[str]) -> list[str]:
    """Return a warning for each of ``names`` that is a folder or archive of images without labels."""
    warnings = []
    for name in filter(catalog.is_folder, dict.fromkeys(names)):
        path = Path(subset(name)[0]).expanduser()
        reasons = "".join(f"; {reason}" for reason in (near_misses(path) if path.is_dir() else []))
        warnings.append(f"{name}: no labels were recognised, so it can be used for pre-training only{reasons}")
    return warnings


def check_labels(
    sets: Mapping[str, Sequence[Record]],
    classes: Sequence[str],
    cfg: CfgNode,
    training: Sequence[str] = (),
    tests: Sequence[str] = (),
) -> Report:
    """Check the records without opening a file.

    Args:
        sets: records by name of the data set.
        classes: class names in the order of the category ids.
        training: names of the sets to train on. Anchors are compared with the boxes of the first of them, or of
            ``sets``.
        tests: names of the sets to evaluate on.

    Returns:
        ``sets``: for each set the number of ``images``, ``objects``, ``crowds``, ``difficult`` objects, images
        ``without_objects`` and objects of each of the ``classes``; ``anchors``: see
        :func:`relvit_d2.analysis.anchors.fit_report`; ``errors`` and ``warnings``.
    """
    report: Report = {"sets": {}, "anchors": {}, "errors": [], "warnings": []}
    compared = next(iter([*training, *sets]), None)
    for name, records in sets.items():
        report["sets"][name], valid = _check_set(name, records, classes, cfg, report)
        _check_ids(name, records, report["errors" if name in tests else "warnings"])
        if name in training and (full := [r for r in records if len(r.get("annotations", [])) > MOST_OBJECTS]):
            text = f"images with more than {MOST_OBJECTS:,} objects, whose overlaps do not fit into memory: divide them"
            report["errors"].append(_message(name, text, full))
        if name == compared and valid is not None:
            report["anchors"] = fit_report(*valid, cfg)
            _check_anchors(report)
    if training and not any(report["sets"][name]["objects"] for name in training):
        report["errors"].append(f"{' + '.join(training)}: the images have no objects to train on; label some")
    for first, second in combinations(sets, 2):
        files = {record["file_name"] for record in sets[first]}
        if shared := [r["file_name"] for r in sets[second] if r["file_name"] in files]:
            report["warnings"].append(_message(f"{first} and {second}", "images in both", shared))
    return report


def before_training(
    cfg: CfgNode, records: Sequence[Record], tests: Mapping[str, Sequence[Record]], classes: Sequence[str]
) -> None:
    """Check the labels, log the warnings and raise a :class:`UserError` for the first error."""
    training = " + ".join(cfg.DATASETS.TRAIN)
    # A set in both TRAIN and TEST is listed twice, and reported as shared with itself.
    sets = {f"{training} (training)": records, **tests}
    report = check_labels(sets, classes, cfg, [next(iter(sets))], tuple(tests))
    for name, counts in report["sets"].items():
        logger.info(f"{name}: {counts['images']} images, {counts['objects']} objects of {len(classes)} classes")
    for warning in report["warnings"]:
        logger.warning(warning)
    raise_first_error(report)


def raise_first_error(report: Report) -> None:
    """Raise a :class:`UserError` for the first error of a report, if there is one."""
    if errors := report["errors"]:
        more = f" ({len(errors) - 1} more errors: relvit-d2 check-data lists all)" if len(errors) > 1 else ""
        raise UserError(f"training cannot start: {errors[0]}{more}")


def _check_set(
    name: str, records: Sequence[Record], classes: Sequence[str], cfg: CfgNode, report: Report
) -> tuple[Report, Boxes | None]:
    """Return the counts of a set and its valid boxes, None if one is not a box at all."""
    errors, warnings = report["errors"], report["warnings"]
    owners = [record for record in records for _ in record.get("annotations", [])]
    annotations = [annotation for record in records for annotation in record.get("annotations", [])]
    crowd = np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=bool)
    ids = [annotation["category_id"] for annotation in annotations]
    per_class = Counter(number for number, is_crowd in zip(ids, crowd, strict=True) if not is_crowd)
    counts: Report = {
        "images": len(records),
        "objects": len(annotations) - int(crowd.sum()),
        "crowds": int(crowd.sum()),
        "difficult": sum(bool(annotation.get("difficult")) for annotation in annotations),
        "without_objects": sum(not record.get("annotations") for record in records),
        "classes": {label: per_class.get(index, 0) for index, label in enumerate(classes)},
    }
    valid_ids = [isinstance(number, int | np.integer) and 0 <= number < len(classes) for number in ids]
    if unknown := [record for record, valid in zip(owners, valid_ids, strict=True) if not valid]:
        errors.append(_message(name, f"objects with a category_id outside of 0 to {len(classes) - 1}", unknown))
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if full := [r for r in records if sum(not a.get("iscrowd") for a in r.get("annotations", [])) > limit]:
        text = f"images with more objects than TEST.DETECTIONS_PER_IMAGE {limit}; the rest cannot be detected"
        warnings.append(_message(name, text, full))
    if not counts["objects"]:
        text = "the images have no objects" if records else "there are no images"
        warnings.append(f"{name}: {text}, so AP on this set is NaN")
    elif absent := [label for label, count in counts["classes"].items() if not count]:
        warnings.append(_message(name, "classes without objects", absent))
    boxes = _corners(annotations)
    if boxes is None:
        errors.append(f"{name}: a box is not four numbers with a bbox_mode of XYXY_ABS or XYWH_ABS: correct it")
        return counts, None
    sizes = np.array([(record["width"], record["height"]) for record in owners], dtype=np.float64).reshape(-1, 2)
    low, high = boxes[:, :2], boxes[:, 2:]
    finite = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore"):
        area = (high > low).all(1)
        outside = finite & ((low < -BORDER_SLACK) | (high > sizes + BORDER_SLACK)).any(1)
    border = f"boxes more than {BORDER_SLACK:g} pixel outside of their image, which are clipped"
    for which, text, messages in (
        (~finite, "boxes that are not finite numbers", errors),
        (finite & ~area & ~crowd, "boxes without area, which are not trained on", warnings),
        (outside & ~crowd, border, warnings),
    ):
        if which.any():
            messages.append(_message(name, text, [owners[index] for index in np.flatnonzero(which)]))
    valid = finite & area & ~crowd
    return counts, Boxes(boxes[valid], sizes[valid])


def _corners(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Return all boxes as (N, 4) XYXY, or None if one is not four numbers."""
    if not annotations:
        return np.empty((0, 4))
    try:
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(len(annotations), -1)
    except (ValueError, TypeError):
        return None
    modes = [annotation["bbox_mode"] for annotation in annotations]
    if boxes.shape[1] != 4 or not set(modes) <= {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
        return None
    xywh = np.array([mode == BoxMode.XYWH_ABS for mode in modes])
    boxes[xywh, 2:] += boxes[xywh, :2]
    return boxes


def _check_ids(name: str, records: Sequence[Record], messages: list[str]) -> None:
    repeated = [str(key) for key, count in Counter(record["image_id"] for record in records).items() if count > 1]
    if repeated:
        text = "image ids that several images have, so their detections cannot be distinguished"
        messages.append(_message(name, text, repeated))


def _check_anchors(report: Report) -> None:
    if report["anchors"].get("boxes", 0) < REACH_BOXES:
        return
    current, other = report["anchors"]["anchors"], report["anchors"]["proposal"]
    if other["reach_50"] - current["reach_50"] >= REACH_GAIN:
        report["warnings"].append(
            f"only {current['reach_50']:.0%} of the training boxes have an IoU of 0.5 or more with an anchor; with "
            f"{' '.join(anchor_keys(other))} {other['reach_50']:.0%} would"
        )


def _message(subject: str, text: str, items: Sequence[Any]) -> str:
    """Return a message with the number of ``items`` (names or records) and the first of them."""
    names = list(dict.fromkeys(str(item["file_name"]) if isinstance(item, dict) else str(item) for item in items))
    return f"{subject}: {text} ({len(items)}): {', '.join(names[:LISTED])}" + (", ..." if len(names) > LISTED else "")


class ImageFacts(NamedTuple):
    """Properties of an image file.

    Attributes:
        error: why it cannot be read; ``""`` if it can. The other attributes are empty if it cannot.
        size: width and height in pixels, after EXIF rotation.
        digest: hash of size and pixels, independent of the file format.
        histogram: see :func:`relvit_d2.analysis.pixel_statistics.histogram`.
    """

    path: str
    error: str
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    histogram: np.ndarray = np.zeros((0, 256), dtype=np.int64)


def file_of(item: Record | ImageFile) -> ImageFile | str:
    """Return the file of a record, or the file itself."""
    return item["file_name"] if isinstance(item, dict) else item


def _read_facts(path: ImageFile | str, pixel_format: PixelFormat) -> ImageFacts:
    try:
        pixels = pixel_format.read(path)
    except UserError as error:
        return ImageFacts(str(path), str(error))
    height, width = pixels.shape[:2]
    return ImageFacts(str(path), "", (width, height), pixel_digest(pixels), histogram(pixels))


def check_images(
    sets: Mapping[str, Sequence[Record | ImageFile]],
    cfg: CfgNode,
    strict: bool,
) -> Report:
    """Decode and check every image; show the progress.

    Args:
        sets: records or image files by name of the data set.
        cfg: for the number of channels and the range of values.
        strict: whether an unreadable image stops the training or is skipped.

    Returns:
        ``images``: numbers of images ``read``, ``unreadable`` and of ``one_colour``; ``duplicates``: lists of files
        with equal pixels; ``mean`` and ``std`` of all pixels, 0..255, in the channel order of ``INPUT.FORMAT``;
        ``errors`` and ``warnings``.
    """
    errors: list[str] = []
    warnings: list[str] = []
    files: dict[str, dict[str, Record | None]] = {
        name: {str(file_of(item)): item if isinstance(item, dict) else None for item in items}
        for name, items in sets.items()
    }
    unique = {str(file): file for items in sets.values() for file in map(file_of, items)}
    facts: dict[str, ImageFacts] = {}
    with ThreadPoolExecutor(cores()) as pool:
        read = pool.map(partial(_read_facts, pixel_format=PixelFormat.of(cfg)), unique.values())
        for fact in Progress(read, desc="checking images", total=len(unique), unit="image"):
            facts[fact.path] = fact
    if unreadable := [fact.error for fact in facts.values() if fact.error]:
        messages = errors if strict else warnings
        messages.append(_message(" and ".join(sets), "images that cannot be read", unreadable))
    for name, items in files.items():
        wrong = [
            f"{path} (recorded {record['width']} x {record['height']}, actual {width} x {height})"
            for path, record in items.items()
            for width, height in [facts[path].size]
            if record and not facts[path].error and (record["width"], record["height"]) != (width, height)
        ]
        if wrong:
            line = _message(name, "images whose size differs from the recorded one", wrong)
            errors.append(f"{line}. Correct the labels; if they have no sizes, the image files have changed since")
    readable = [fact for fact in facts.values() if not fact.error]
    flat = [fact.path for fact in readable if (fact.histogram > 0).sum() == len(fact.histogram)]
    if flat:
        warnings.append(_message(" and ".join(sets), "images of one colour", flat))
    return {
        "images": {"read": len(readable), "unreadable": len(unreadable), "one_colour": len(flat)},
        "duplicates": _duplicates(files, readable, warnings),
        "errors": errors,
        "warnings": warnings,
        **_statistics(readable, cfg),
    }


def check_seen(sets: Mapping[str, Sequence[Record | ImageFile]], weights: Path) -> Report:
    """Find the images on which, or on near-duplicates of which, an encoder was trained.

    Args:
        sets: records, or image files, by data set name.
        weights: the ``encoder.safetensors``.

    Returns:
        ``seen``: the files by data set name; ``warnings``: a sentence for each data set with such files.

    Raises:
        UserError: the file cannot be read or has no fingerprints of training images.
    """
    seen = SeenImages.of_metadata(read_encoder(weights)[1])
    if seen is None:
        raise UserError(
            f"'{weights}' has no fingerprints of its training images: give an encoder.safetensors of relvit-d2 "
            "pretrain or classify"
        )
    found: Report = {"seen": {}, "warnings": []}
    for name, items in sets.items():
        files = [Path(file) if isinstance(file := file_of(item), str) else file for item in items]
        shared = [str(files[index]) for index in seen.indices(fingerprints_of(files))]
        found["seen"][name] = shared
        if shared:
            what = f"images on which, or on near-duplicates of which, '{weights}' was trained"
            found["warnings"].append(_message(name, what, shared))
    return found


def _duplicates(
    files: Mapping[str, Mapping[str, Any]], readable: Sequence[ImageFacts], warnings: list[str]
) -> list[list[str]]:
    """Return the groups of files with equal pixels; warn about those within a set and those in two sets."""
    groups: dict[bytes, list[str]] = defaultdict(list)
    for fact in readable:
        groups[fact.digest].append(fact.path)
    by_set = {name: [[path for path in group if path in files[name]] for group in groups.values()] for name in files}
    for name, parts in by_set.items():
        if repeated := [" = ".join(part) for part in parts if len(part) > 1]:
            warnings.append(_message(name, "images with equal pixels", repeated))
    for first, second in combinations(files, 2):
        pairs = zip(by_set[first], by_set[second], strict=True)
        # check_labels reports the files that are in both sets.
        if shared := [f"{a[0]} = {b[0]}" for a, b in pairs if a and b and a[0] != b[0]]:
            warnings.append(_message(f"{first} and {second}", "images with equal pixels in both", shared))
    return [group for group in groups.values() if len(group) > 1]


def _statistics(readable: Sequence[ImageFacts], cfg: CfgNode) -> Report:
    if not readable:
        return {"mean": [], "std": []}
    found = PixelStatistics.of([fact.histogram for fact in readable])
    bgr = cfg.INPUT.get("FORMAT") == "BGR"  # a key of detection; other tasks use RGB
    step = -1 if bgr and PixelFormat.of(cfg).channels == 3 else 1
    return {key: [round(value, 3) for value in getattr(found, key)[::step]] for key in ("mean", "std")}
