"""Files of the images that were chosen to be labelled."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from relvit_d2.analysis.embedding import read_features
from relvit_d2.analysis.selection import Chosen, k_centre
from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.data.images.folder import unlabelled_images
from relvit_d2.data.images.similarity import fingerprints, groups_of
from relvit_d2.detection.predictor import load_detector
from relvit_d2.engine.run_setup import silence_warnings
from relvit_d2.report.predictions import Cell, in_rgb
from relvit_d2.report.samples import draw_samples
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import make_folder, write_json, write_text
from relvit_d2.utils.progress import Progress

DOUBTFUL = 0.1  # minimum score of a detection that counts for the uncertainty
MOST_SHOWN = 100  # images on the contact sheet
BATCH = 8  # images in which objects are detected together


def select(features: Path, count: int, labelled: Sequence[str], detector: str, output: Path) -> str:
    """Choose images to label and write ``selected.txt``, ``selected.json`` and ``selected.png``.

    Args:
        features: file of :func:`relvit_d2.analysis.embedding.embed`.
        count: number of images.
        labelled: sources of images that have labels and are in the file (:func:`unlabelled_images`).
        detector: weights of a detector whose uncertainty counts, or empty.
        output: folder to write to.

    Returns:
        A line on the written files.

    Raises:
        UserError: an argument is invalid, or an image cannot be read.
    """
    silence_warnings()
    paths, values = read_features(features)
    images = list(map(Path, paths))
    known = {image.resolve(): index for index, image in enumerate(images)}
    centres: list[int] = []
    for source in labelled:
        for image in unlabelled_images(source):
            if (index := known.get(Path(str(image)).resolve())) is None:
                raise UserError(f"the labelled image '{image}' is not in '{features}': add it with relvit-d2 embed")
            centres.append(index)
    groups = groups_of(fingerprints(images))
    doubt = uncertainties(detector, images) if detector else None
    chosen = k_centre(values, count, centres, groups, doubt)
    if not chosen:
        raise UserError(f"no image of '{features}' is left: all are labelled, or nearly equal to labelled ones")
    make_folder(output)
    write_text(output / "selected.txt", "".join(f"{paths[one.image]}\n" for one in chosen))
    entries = [
        {
            "path": paths[one.image],
            "nearest": None if one.nearest is None else paths[one.nearest],
            "distance": one.distance,
            **({} if doubt is None else {"uncertainty": float(doubt[one.image])}),
            "reason": _reason(one, paths),
        }
        for one in chosen
    ]
    write_json(output / "selected.json", entries)
    shown = chosen[:MOST_SHOWN]
    pixels = PixelFormat()
    cells = [
        Cell(
            in_rgb(pixels.read(image := images[one.image])),
            np.empty((0, 4)),
            np.empty(0, int),
            (),
            f"{image.name}  {one.distance:.2g}",
        )
        for one in shown
    ]
    title = f"{len(shown)} of {len(chosen)} chosen images, with the distance to the nearest one"
    draw_samples(cells, output / "selected.png", title)
    counts = f"{len(chosen)} of {len(paths)} images{' (no others are left)' if len(chosen) < count else ''}"
    return f"written: {output}/selected.txt, selected.json and selected.png; {counts}"


def uncertainties(weights: str, images: Sequence[Path]) -> np.ndarray:
    """Return the uncertainty of a detector about each image, ``(N,)`` in 0..1.

    It is the mean of ``1 - |2 s - 1|`` over the scores ``s`` of the detections above 0.1: 1 if all scores are one half,
    0 if all are certain, or without detections.
    """
    model, found = load_detector(weights, "", [], DOUBTFUL), []
    for start in Progress(range(0, len(images), BATCH), desc="detector", unit="batch"):
        batch = [model.read(image) for image in images[start : start + BATCH]]
        for instances in model.batch(batch):
            scores = instances.scores.numpy()
            found.append(float((1 - np.abs(2 * scores - 1)).mean()) if len(scores) else 0.0)
    return np.array(found)


def _reason(one: Chosen, paths: Sequence[str]) -> str:
    if one.nearest is None:
        return "the image nearest to the mean of all"
    return f"the farthest from all labelled and chosen images; the nearest of them is '{paths[one.nearest]}'"
