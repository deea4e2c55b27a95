"""What is wrong with a data set, before hours are spent on it: labels, boxes and anchors in seconds, images in minutes.

A report is plain data that JSON can hold. What training would fail on is under ``"faults"``, what a user should know
under ``"warnings"``: sentences, most serious first.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from fvcore.common.config import CfgNode

from relvit_d2.analysis.anchors import fit_report
from relvit_d2.analysis.pixel_statistics import PixelStatistics, histogram
from relvit_d2.conversion.encoder_file import read_encoder
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import near_misses
from relvit_d2.data.detection.records import BORDER_SLACK, Record
from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.images.seen import SeenImages, fingerprints_of
from relvit_d2.data.images.similarity import pixel_digest
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hardware import cores

Report = dict[str, Any]

NAMED = 5
"""Most files that one sentence names."""

REACH_GAIN, REACH_BOXES = 0.1, 100
"""Other anchors are worth a warning if they reach this share of the boxes more, of so many boxes at least."""

logger = logging.getLogger(__name__)


class Boxes(NamedTuple):
    """All boxes of some records that are no crowd: ``boxes`` (N, 4) XYXY, ``sizes`` (N, 2), both in pixels."""

    boxes: np.ndarray
    sizes: np.ndarray


def read_sets(names: list[str], labelled: bool, skip_missing: bool) -> tuple[dict[str, list[Any]], list[str]]:
    """Return records and their classes, or images and no class where labels do not matter or a name is a folder."""
    if not labelled or any(catalog.is_folder(name) for name in names):
        return {name: catalog.get_images(name, skip_missing) for name in names}, []
    classes = {name: list(catalog.get_metadata(name).thing_classes) for name in names}
    for name in names[1:]:
        if classes[name] != classes[names[0]]:
            raise UserError(f"data sets '{names[0]}' and '{name}' have different classes: check them one by one")
    return {name: catalog.get_records(name, skip_missing) for name in names}, classes[names[0]]


def not_recognised(names: list[str]) -> list[str]:
    """Return a warning for each of ``names`` that is a source of images without labels."""
    warnings = []
    for name in filter(catalog.is_folder, dict.fromkeys(names)):
        path = Path(catalog.subset(name)[0]).expanduser()
        near = "".join(f"; {reason}" for reason in (near_misses(path) if path.is_dir() else []))
        warnings.append(f"{name}: no labels were recognised, so it serves for pre-training only{near}")
    return warnings


def check_labels(
    sets: Mapping[str, Sequence[Record]],
    classes: Sequence[str],
    cfg: CfgNode,
    training: Sequence[str] = (),
    tests: Sequence[str] = (),
) -> Report:
    """Check what the records say; no file is opened.

    Args:
        sets: records by the name of their set.
        classes: names in the order of the category ids.
        cfg: for the training size, the anchors and the limit of detections.
        training: sets that are trained on. The anchors are compared with the boxes of the first, or without any with
            those of the first of ``sets``.
        tests: sets that are evaluated on.

    Returns:
        ``sets``: for each set the number of ``images``, ``objects``, ``crowds``, ``difficult`` objects, images
        ``without_objects`` and objects of each of the ``classes``; ``anchors``: see
        :func:`relvit_d2.analysis.anchors.fit_report`; ``faults`` and ``warnings``.
    """
    report: Report = {"sets": {}, "anchors": {}, "faults": [], "warnings": []}
    compared = next(iter([*training, *sets]), None)
    for name, records in sets.items():
        report["sets"][name], sound = _check_set(name, records, classes, cfg, report)
        _check_ids(name, records, report["faults" if name in tests else "warnings"])
        if name == compared and sound is not None:
            report["anchors"] = fit_report(*sound, cfg)
            _judge_anchors(report)
    if training and not any(report["sets"][name]["objects"] for name in training):
        report["faults"].append(f"{' + '.join(training)}: no image has an object to train on: label some")
    for first, second in combinations(sets, 2):
        files = {record["file_name"] for record in sets[first]}
        if shared := [r["file_name"] for r in sets[second] if r["file_name"] in files]:
            report["warnings"].append(_line(f"{first} and {second}", "images in both", shared))
    return report


def before_training(
    cfg: CfgNode, records: Sequence[Record], tests: Mapping[str, Sequence[Record]], classes: Sequence[str]
) -> None:
    """Check the labels, put what a user should know into the log, and refuse what training would fail on.

    Args:
        cfg: of the run.
        records: to train on.
        tests: records by the name of the set, to evaluate on.
        classes: names in the order of the category ids.

    Raises:
        UserError: the first fault.
    """
    training = " + ".join(cfg.DATASETS.TRAIN)
    # A set that is trained and evaluated on is there twice, and overlaps with itself.
    sets = {f"{training} (training)": records, **tests}
    report = check_labels(sets, classes, cfg, [next(iter(sets))], tuple(tests))
    for name, facts in report["sets"].items():
        logger.info(f"{name}: {facts['images']} images, {facts['objects']} objects of {len(classes)} classes")
    for warning in report["warnings"]:
        logger.warning(warning)
    refuse(report)


def refuse(report: Report) -> None:
    """Raise a :class:`UserError` for the first fault of a report, if it has one."""
    if faults := report["faults"]:
        more = f" ({len(faults) - 1} more faults: relvit-d2 check-data lists all)" if len(faults) > 1 else ""
        raise UserError(f"training may not start: {faults[0]}{more}")


def _check_set(
    name: str, records: Sequence[Record], classes: Sequence[str], cfg: CfgNode, report: Report
) -> tuple[Report, Boxes | None]:
    """Return the facts of a set, and its sound boxes unless some are no boxes at all."""
    faults, warnings = report["faults"], report["warnings"]
    owners = [record for record in records for _ in record.get("annotations", [])]
    objects = [thing for record in records for thing in record.get("annotations", [])]
    crowd = np.array([bool(thing.get("iscrowd")) for thing in objects], dtype=bool)
    counts = Counter(thing["category_id"] for thing, many in zip(objects, crowd, strict=True) if not many)
    facts: Report = {
        "images": len(records),
        "objects": len(objects) - int(crowd.sum()),
        "crowds": int(crowd.sum()),
        "difficult": sum(bool(thing.get("difficult")) for thing in objects),
        "without_objects": sum(not record.get("annotations") for record in records),
        "classes": {label: counts.get(index, 0) for index, label in enumerate(classes)},
    }
    unknown = [
        record
        for record, thing in zip(owners, objects, strict=True)
        if not (isinstance(thing["category_id"], int | np.integer) and 0 <= thing["category_id"] < len(classes))
    ]
    if unknown:
        faults.append(_line(name, f"objects with a category_id that is none of 0 to {len(classes) - 1}", unknown))
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    full = [r for r in records if sum(not a.get("iscrowd") for a in r.get("annotations", [])) > limit]
    if full:
        what = f"images with more objects than TEST.DETECTIONS_PER_IMAGE {limit}; those beyond it cannot be found"
        warnings.append(_line(name, what, full))
    if not facts["objects"]:
        what = "not one object in its images" if records else "no image"
        warnings.append(f"{name}: {what}, so that an evaluation on it finds nothing and its AP is NaN")
    elif absent := [label for label, count in facts["classes"].items() if not count]:
        warnings.append(_line(name, "classes without an object", absent))
    boxes = _corners(objects)
    if boxes is None:
        faults.append(f"{name}: a box is not four numbers with a bbox_mode of XYXY_ABS or XYWH_ABS: correct it")
        return facts, None
    sizes = np.array([(record["width"], record["height"]) for record in owners], dtype=np.float64).reshape(-1, 2)
    low, high = boxes[:, :2], boxes[:, 2:]
    finite = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore"):
        area = (high > low).all(1)
        outside = finite & ((low < -BORDER_SLACK) | (high > sizes + BORDER_SLACK)).any(1)
    for which, what, said in (
        (~finite, "boxes that are not finite numbers", faults),
        (finite & ~area & ~crowd, "boxes without area, which are not trained on", warnings),
        (
            outside & ~crowd,
            f"boxes that leave their image by more than {BORDER_SLACK:g} pixel, which are clipped",
            warnings,
        ),
    ):
        if which.any():
            said.append(_line(name, what, [owners[index] for index in np.flatnonzero(which)]))
    sound = finite & area & ~crowd
    return facts, Boxes(boxes[sound], sizes[sound])


def _corners(objects: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Return all boxes as (N, 4) XYXY, or None if one is not four numbers."""
    if not objects:
        return np.empty((0, 4))
    try:
        boxes = np.array([thing["bbox"] for thing in objects], dtype=np.float64).reshape(len(objects), -1)
    except (ValueError, TypeError):
        return None
    modes = {thing["bbox_mode"] for thing in objects}
    if boxes.shape[1] != 4 or not modes <= {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
        return None
    lengths = np.array([thing["bbox_mode"] == BoxMode.XYWH_ABS for thing in objects])
    boxes[lengths, 2:] += boxes[lengths, :2]
    return boxes


def _check_ids(name: str, records: Sequence[Record], said: list[str]) -> None:
    twice = [str(key) for key, count in Counter(record["image_id"] for record in records).items() if count > 1]
    if twice:
        said.append(_line(name, "image ids that come more than once, so that detections get mixed up", twice))


def _judge_anchors(report: Report) -> None:
    if report["anchors"].get("boxes", 0) < REACH_BOXES:
        return
    given, other = report["anchors"]["anchors"], report["anchors"]["proposal"]
    if other["reach_50"] - given["reach_50"] >= REACH_GAIN:
        report["warnings"].append(
            f"the anchors overlap {given['reach_50']:.0%} of the training boxes by half or more; "
            f"MODEL.ANCHOR_GENERATOR.SIZES {other['SIZES']} ASPECT_RATIOS {other['ASPECT_RATIOS']} "
            f"would {other['reach_50']:.0%}"
        )


def _line(where: str, what: str, items: Sequence[Any]) -> str:
    """Return a sentence with the number of ``items``, names or records, and the first of them."""
    names = list(dict.fromkeys(str(item["file_name"]) if isinstance(item, dict) else str(item) for item in items))
    return f"{where}: {what} ({len(items)}): {', '.join(names[:NAMED])}" + (", ..." if len(names) > NAMED else "")


class ImageFacts(NamedTuple):
    """What is in one image file.

    Attributes:
        path: of the file.
        fault: why it cannot be read, or ``""``; the rest is empty then.
        size: width and height in pixels, upright.
        digest: of size and pixels, so that a copy in another format without loss is a copy.
        histogram: see :func:`relvit_d2.analysis.pixel_statistics.histogram`.
    """

    path: str
    fault: str
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    histogram: np.ndarray = np.zeros((0, 256), dtype=np.int64)


def file_of(item: Record | ImageFile) -> ImageFile | str:
    """Return the file of a record, or the file itself."""
    return item["file_name"] if isinstance(item, dict) else item


def look_at(path: ImageFile | str, wanted: PixelFormat) -> ImageFacts:
    """Decode one image."""
    try:
        pixels = wanted.read(path)
    except UserError as error:
        return ImageFacts(str(path), str(error))
    height, width = pixels.shape[:2]
    return ImageFacts(str(path), "", (width, height), pixel_digest(pixels), histogram(pixels))


def check_images(
    sets: Mapping[str, Sequence[Record | ImageFile]],
    cfg: CfgNode,
    labelled: bool,
    progress: Callable[[], object] | None = None,
) -> Report:
    """Decode every image and check it.

    Args:
        sets: records, or image files, by the name of their set.
        cfg: for the channels and the range of values that are wanted.
        labelled: whether an image that cannot be read stops the training, as in detection, or is left out.
        progress: called after each image.

    Returns:
        ``images``: how many were read, are ``unreadable``, of ``one_colour``; ``duplicates``: lists of files with equal
        pixels; ``mean`` and ``std`` of all pixels in 0..255, in the channel order of ``INPUT.FORMAT``; ``faults`` and
        ``warnings``.
    """
    report: Report = {"faults": [], "warnings": []}
    files: dict[str, dict[str, Record | None]] = {
        name: {str(file_of(item)): item if isinstance(item, dict) else None for item in items}
        for name, items in sets.items()
    }
    every = {str(file): file for items in sets.values() for file in map(file_of, items)}
    look = partial(look_at, wanted=PixelFormat.of(cfg))
    facts: dict[str, ImageFacts] = {}
    with ThreadPoolExecutor(cores()) as pool:
        for fact in pool.map(look, every.values()):
            facts[fact.path] = fact
            if progress:
                progress()
    faults, warnings = report["faults"], report["warnings"]
    unreadable = [fact for fact in facts.values() if fact.fault]
    if unreadable:
        said = faults if labelled else warnings
        said.append(_line(" and ".join(sets), "images that cannot be read", [fact.fault for fact in unreadable]))
    for name, items in files.items():
        wrong = [
            f"{path} (recorded {record['width']} x {record['height']}, has {width} x {height})"
            for path, record in items.items()
            for width, height in [facts[path].size]
            if record and not facts[path].fault and (record["width"], record["height"]) != (width, height)
        ]
        if wrong:
            line = _line(name, "images whose size is not the recorded one", wrong)
            faults.append(f"{line}. Correct the label; if it has no size, the image changed after it was read")
    readable = [fact for fact in facts.values() if not fact.fault]
    flat = [fact.path for fact in readable if (fact.histogram > 0).sum() == len(fact.histogram)]
    if flat:
        warnings.append(_line(" and ".join(sets), "images of one colour", flat))
    report["images"] = {"read": len(readable), "unreadable": len(unreadable), "one_colour": len(flat)}
    report["duplicates"] = _duplicates(files, facts, warnings)
    report |= _statistics(readable, cfg)
    return report


def check_seen(sets: Mapping[str, Sequence[Record | ImageFile]], weights: Path) -> Report:
    """Find the images that an encoder was trained on, or on nearly equal ones.

    Args:
        sets: records, or image files, by the name of their set.
        weights: its ``encoder.safetensors``.

    Returns:
        ``seen``: the files by the name of their set; ``warnings``: a sentence for each set that has some.

    Raises:
        UserError: if the file cannot be read or has no fingerprints of its training images.
    """
    seen = SeenImages.of_metadata(read_encoder(weights)[1])
    if seen is None:
        raise UserError(
            f"'{weights}' has no fingerprints of the images it was trained on, which an encoder.safetensors that "
            "relvit-d2 pretrain or classify writes has: give another"
        )
    found: Report = {"seen": {}, "warnings": []}
    for name, items in sets.items():
        files = [Path(file) if isinstance(file := file_of(item), str) else file for item in items]
        shared = [str(files[place]) for place in seen.places(fingerprints_of(files, name))]
        found["seen"][name] = shared
        if shared:
            what = f"images that '{weights}' was trained on, or on nearly equal ones"
            found["warnings"].append(_line(name, what, shared))
    return found


def _duplicates(
    files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, ImageFacts], warnings: list[str]
) -> list[list[str]]:
    """Return the groups of files with equal pixels; warn of those within a set and of those in two."""
    groups: dict[bytes, list[str]] = defaultdict(list)
    for fact in facts.values():
        if not fact.fault:
            groups[fact.digest].append(fact.path)
    for name, items in files.items():
        inside = [pair for group in groups.values() if len(pair := [path for path in group if path in items]) > 1]
        if inside:
            warnings.append(_line(name, "images that are the same, by their pixels", list(map(" = ".join, inside))))
    for first, second in combinations(files, 2):
        shared = [
            f"{ours[0]} = {theirs[0]}"
            for group in groups.values()
            if (ours := [path for path in group if path in files[first]])
            and (theirs := [path for path in group if path in files[second]])
        ]
        if shared:
            warnings.append(_line(f"{first} and {second}", "images in both, by their pixels", shared))
    return [group for group in groups.values() if len(group) > 1]


def _statistics(readable: Sequence[ImageFacts], cfg: CfgNode) -> Report:
    if not readable:
        return {"mean": [], "std": []}
    found = PixelStatistics.of([fact.histogram for fact in readable])
    bgr = cfg.INPUT.get("FORMAT") == "BGR"  # a key of detection; other tasks have RGB
    step = -1 if bgr and PixelFormat.of(cfg).channels == 3 else 1
    return {
        key: [round(value, 3) for value in values[::step]] for key, values in (("mean", found.mean), ("std", found.std))
    }
