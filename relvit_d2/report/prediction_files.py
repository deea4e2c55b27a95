"""Detection in images and videos: annotated copies and COCO results are written."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import TRAINING_SPLITS, named_sets, open_folder, register_custom
from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.data.images.folder import EXTENSIONS, list_images, matching_files
from relvit_d2.data.subsets import subset
from relvit_d2.detection.config import DETECTION
from relvit_d2.detection.predictor import load_detector
from relvit_d2.engine.run_setup import silence_warnings
from relvit_d2.engine.weights import run_config
from relvit_d2.report.predictions import coco_results, draw_instances
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing, make_folder, write_text
from relvit_d2.utils.progress import Progress

MAX_NAMED = 10  # unreadable inputs in the error message
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


def predict(
    weights: str, config_file: str, opts: list[str], inputs: Sequence[str], output: Path, threshold: float, size: int
) -> tuple[str, str]:
    """Detect objects in images and videos and write annotated copies and ``detections.json``.

    Args:
        weights, config_file, opts: see :func:`relvit_d2.detection.predictor.load_detector`.
        inputs: paths of images, folders and videos, and patterns.
        output: folder to write to.
        threshold: minimum score of a detection, 0..1.
        size: images per batch.

    Returns:
        A line on the written files and a sentence on the inputs that could not be read, each empty if there are none.

    Raises:
        UserError: for an input that does not exist, or weights without a detector.
    """
    silence_warnings()
    files = list(dict.fromkeys(file for word in inputs for file in input_files(word)))
    detector = load_detector(weights, config_file, opts, threshold)
    if any(file.suffix.lower() in VIDEOS for file in files):
        from relvit_d2.report.prediction_videos import annotate_video  # needs PyAV, which is optional

    make_folder(output)
    results: list[dict[str, Any]] = []
    made: Counter[str] = Counter()
    errors: list[str] = []
    images = [file for file in files if file.suffix.lower() not in VIDEOS]
    outputs = dict(zip(files, output_names(files), strict=True))
    for start in Progress(range(0, len(images), size), desc="images", unit="batch", disable=not images):
        batch = {}
        for file in images[start : start + size]:
            try:
                batch[file] = detector.read(file)
            except UserError as error:
                errors.append(str(error))
        for (file, image), instances in zip(batch.items(), detector.batch([*batch.values()]), strict=True):
            with appearing(output / outputs[file]) as part:
                draw_instances(detector, image, instances).save(part, format="PNG")
            results += coco_results(str(file), instances, detector)
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


def split_images(weights: str, config_file: str, opts: list[str], data: str | None, split: str) -> list[str]:
    """Return the images of a split of a data set.

    Args:
        weights, config_file, opts: see :func:`relvit_d2.detection.predictor.load_detector`.
        data: folder of a custom data set; None: that of the training, or its ``DATASETS.TRAIN`` and ``TEST``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        UserError: the data set does not have the split.
    """
    keys: Any = {}
    if not data:
        keys = run_config(weights, config_file, opts, DETECTION).DATASETS
        trained = keys.CUSTOM.get(subset(keys.TRAIN[0])[0], {}) if keys.TRAIN else {}
        data = trained.get("ROOT") if trained.get("SPLIT") else None
    if data:
        form, folder = open_folder(Path(data).expanduser())
        custom = named_sets(data, form, folder)
        wanted = TRAINING_SPLITS if split == "train" else (split,)
        names = tuple(name for name, entry in custom.items() if entry["SPLIT"] in wanted)[:1]
        if not names:
            splits = ", ".join(entry["SPLIT"] for entry in custom.values())
            raise UserError(f"'{data}' has no split {split}: give --split with one of {splits}")
        keys = {"TRAIN": names, "TEST": (), "CUSTOM": custom}
    else:
        names = tuple(keys.TRAIN if split == "train" else keys.TEST)
        if not names:
            raise UserError(f"the config of '{weights}' names no data set for the split {split}: give --data FOLDER")
    register_custom(keys, labels=False)
    return [str(image) for name in names for image in catalog.get_images(name)]


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
