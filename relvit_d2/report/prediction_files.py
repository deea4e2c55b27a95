"""Detection in images and videos: annotated copies and COCO results are written."""

import json
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
) -> tuple[str, str]:
    """Detect objects in images and videos and write annotated copies and ``detections.json``.

    Args:
        load: loads the detector, once the inputs are found.
        inputs: paths of images, folders and videos, and patterns.
        output: folder to write to.
        size: images, or tiles of an image, per batch.
        tiles: size and overlap of tiles for images, see :meth:`Tiling.of`.

    Returns:
        A line on the written files and a sentence on the inputs that could not be read, each empty if there are none.

    Raises:
        UserError: for an input that does not exist, and what ``load`` raises.
    """
    files = list(dict.fromkeys(file for word in inputs for file in input_files(word)))
    detector = load()
    if any(file.suffix.lower() in VIDEOS for file in files):
        from relvit_d2.report.prediction_videos import annotate_video  # needs PyAV, which is optional

    make_folder(output)
    results: list[dict[str, Any]] = []
    made: Counter[str] = Counter()
    errors: list[str] = []
    images = [file for file in files if file.suffix.lower() not in VIDEOS]
    outputs = dict(zip(files, output_names(files), strict=True))
    detected = partial(_in_tiles, tiling=Tiling.of(*tiles, detector.training)) if tiles else _in_images
    for file, image, found, image_size in detected(detector, images, size, errors):
        with appearing(output / outputs[file]) as part:
            draw_found(detector, image, found, image_size).save(part, format="PNG")
        results += coco_results(str(file), found, detector, image_size)
        made["picture"] += 1
    for file in files:
        if file.suffix.lower() in VIDEOS:
            try:
                rows, failure = annotate_video(file, output / outputs[file], detector, size)
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
    """Return the images and videos of one ``--input``, a path or a pattern.

    Raises:
        UserError: if there are none.
    """
    path = Path(word)
    if path.is_dir():
        return list_images(path, EXTENSIONS | VIDEOS)
    files = matching_files(path, EXTENSIONS | VIDEOS)
    if not files:
        raise UserError(f"--input '{word}' is not an existing image, folder, pattern or video; correct the path")
    return files


def output_names(files: Sequence[Path]) -> list[str]:
    """Return a unique file name for the annotated copy of each file."""
    stems = Counter(file.stem for file in files)
    names: dict[str, None] = {}
    for file in files:
        stem = file.stem if stems[file.stem] == 1 else "_".join(file.with_suffix("").parts).strip("/_.")
        ending = "mp4" if file.suffix.lower() in VIDEOS else "png"
        name, number = f"{stem}.{ending}", 1
        while name in names:
            number += 1
            name = f"{stem}_{number}.{ending}"
        names[name] = None
    return list(names)
