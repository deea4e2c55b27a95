"""Detection in images and videos: annotated copies and COCO results are written."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.data.images.folder import EXTENSIONS, list_images, matching_files
from relvit_d2.data.images.strips import open_strips
from relvit_d2.detection.detections import AnyDetector, Detections
from relvit_d2.detection.tiles import Tiling, detect_in_tiles
from relvit_d2.report.label_files import LabelFiles
from relvit_d2.report.predictions import coco_results, draw_found
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing, make_folder, write_text
from relvit_d2.utils.progress import Progress

MAX_NAMED = 10  # unreadable inputs in the error message
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


def predict(
    load: Callable[[], AnyDetector],
    inputs: Sequence[str],
    output: Path,
    size: int,
    tiles: tuple[str, float] | None = None,
    every: int = 1,
    label_format: str | None = None,
) -> tuple[str, str]:
    """Detect objects in images and videos and write annotated copies and ``detections.json``.

    Args:
        load: loads the detector, once the inputs are found.
        inputs: paths of images, folders and videos, patterns, and numbers of cameras.
        output: folder to write to.
        size: images, or tiles of an image, per batch.
        tiles: size and overlap of tiles for images, see :meth:`Tiling.of`.
        every: of videos only each frame whose number is a multiple of it.
        label_format: also write the detections as labels, a key of :data:`relvit_d2.report.label_files.WRITERS`.

    Returns:
        A line on the written files and a sentence on the inputs that could not be read, each empty if there are none.

    Raises:
        UserError: for an input that does not exist, for labels of videos, and what ``load`` raises.
    """
    files = list(dict.fromkeys(file for word in inputs for file in input_files(word)))
    images, videos = ([file for file in files if is_video(file) == kind] for kind in (False, True))
    if label_format and videos:
        raise UserError(
            f"--save-labels is for images, and '{videos[0]}' is a video: save its frames as images, or leave it out"
        )
    labels = LabelFiles(label_format, output, images) if label_format else None
    detector = load()
    if videos:
        from relvit_d2.report.prediction_videos import annotate_video  # needs PyAV, which is optional

    make_folder(output)
    results: list[dict[str, Any]] = []
    made: Counter[str] = Counter()
    errors: list[str] = []
    outputs = dict(zip(files, output_names(files), strict=True))
    detected = partial(_in_tiles, tiling=Tiling.of(*tiles, detector.training)) if tiles else _in_images
    for file, image, found, image_size in detected(detector, images, size, errors):
        with appearing(output / outputs[file]) as part:
            draw_found(detector, image, found, image_size).save(part, format="PNG")
        results += coco_results(str(file), found, detector, image_size)
        made["picture"] += 1
        if labels:
            labels.add(file, image_size, found)
    for file in videos:
        try:
            rows, failure = annotate_video(file, output / outputs[file], detector, size, every)
        except UnreadableImageError as error:
            errors.append(str(error))
            continue
        results += rows
        made["video"] += 1
        errors += [failure] if failure else []
    written = unreadable = ""
    if made:
        write_text(output / "detections.json", json.dumps(results))
        counts = " and ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in made.items())
        written = f"written: {output}/detections.json, {counts}; {len(results)} detections"
    if labels and made:
        labels.write(detector.class_names)
        written += f"; labels in {labels.folder}, to be copied into '{labels.root}'"
    if errors:
        more = f"; and {len(errors) - MAX_NAMED} more" if len(errors) > MAX_NAMED else ""
        unreadable = f"{len(errors)} of {len(files)} inputs could not be read: {'; '.join(errors[:MAX_NAMED])}{more}"
    return written, unreadable


def _in_images(
    detector: AnyDetector, files: Sequence[Path], size: int, errors: list[str]
) -> Iterator[tuple[Path, np.ndarray, Detections, tuple[int, int]]]:
    """Yield file, pixels, detections and ``(width, height)`` of each image; append errors of unreadable ones."""
    for start in Progress(range(0, len(files), size), desc="images", unit="batch", disable=not files):
        batch = {}
        for file in files[start : start + size]:
            try:
                batch[file] = detector.read(file)
            except UserError as error:
                errors.append(str(error))
        for (file, image), found in zip(batch.items(), detector.detect([*batch.values()]), strict=True):
            yield file, image, found, image.shape[1::-1]


def _in_tiles(
    detector: AnyDetector, files: Sequence[Path], size: int, errors: list[str], tiling: Tiling
) -> Iterator[tuple[Path, np.ndarray, Detections, tuple[int, int]]]:
    """Like :func:`_in_images`, in tiles; the pixels are those of the reduced image."""
    for file in Progress(files, desc="images", unit="image", disable=not files):
        try:
            image = open_strips(file, detector.pixels)
            found = detect_in_tiles(detector, image, tiling, size)
        except UserError as error:
            errors.append(str(error))
            continue
        yield file, image.overview, found, (image.width, image.height)


def input_files(word: str) -> list[Path]:
    """Return the images and videos of one ``--input``: a path, a pattern, or the number of a camera.

    A camera is a path without an extension.

    Raises:
        UserError: if there are none.
    """
    path = Path(word)
    if re.fullmatch("[0-9]+", word) and not path.exists():
        return [path]
    if path.is_dir():
        return list_images(path, EXTENSIONS | VIDEOS)
    files = matching_files(path, EXTENSIONS | VIDEOS)
    if not files:
        raise UserError(f"--input '{word}' is not an existing image, folder, pattern or video; correct the path")
    return files


def is_video(file: Path) -> bool:
    """Whether a result of :func:`input_files` is a video or a camera."""
    return not file.suffix or file.suffix.lower() in VIDEOS


def output_names(files: Sequence[Path]) -> list[str]:
    """Return a unique file name for the annotated copy of each file."""
    stems = Counter(file.stem for file in files)
    names: dict[str, None] = {}
    for file in files:
        stem = file.stem if stems[file.stem] == 1 else "_".join(file.with_suffix("").parts).strip("/_.")
        ending = "mp4" if is_video(file) else "png"
        name, number = f"{stem}.{ending}", 1
        while name in names:
            number += 1
            name = f"{stem}_{number}.{ending}"
        names[name] = None
    return list(names)
