"""Labels of detections: our readers and those of other packages read the same images, boxes, classes and masks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from scipy import ndimage

from relvit_d2.cli.predict import LABEL_FORMATS
from relvit_d2.data.detection.custom import open_folder
from relvit_d2.detection.detections import Detections, Mask
from relvit_d2.report.label_files import WRITERS, LabelFiles
from relvit_d2.utils.errors import NotWrittenError, UserError
from tests.support.custom_data import read_all

CLASSES = ["no", "traffic light", "Ünit=3", "<&>'\"", "010", "never found"]
TOLERANCE = {"coco": 1e-4, "labelme": 1e-4, "yolo": 1e-3, "cvat": 0.006, "voc": 0.5}
"""Pixels that a coordinate may change by: VOC has whole pixels, CVAT hundredths, YOLO millionths of the side."""
WHOLE = {"coco", "labelme"}  # formats with all parts of a mask
NAMES = ("a.png", "deep er/b.c.jpg", "deep er/ä.png", "other/a.png", "other/empty.png")
Found = dict[Path, Detections]


def detections(seed: int, height: int, width: int, masks: bool) -> Detections:
    """Random detections inside an image, two at its border; each mask is two ellipses in the box."""
    draw = np.random.default_rng(seed)
    count = 0 if seed == len(NAMES) - 1 else 6
    start = draw.uniform(0, 0.5, (count, 2)) * (width, height)
    boxes = np.concatenate((start, start + draw.uniform(0.2, 0.45, (count, 2)) * (width, height)), 1)
    if count:
        boxes[0], boxes[1, 2:] = (0, 0, width, height), (width, height)
    pixels = np.zeros((count, height, width), bool)
    y, x = np.mgrid[:height, :width] + 0.5
    for mask, (x0, y0, x1, y1) in zip(pixels, boxes, strict=True):
        for left, right in ((0.0, 0.6), (0.7, 1.0)):
            across = ((x - x0) / (x1 - x0) - (left + right) / 2) / (right - left) * 2
            mask |= across**2 + (2 * (y - y0) / (y1 - y0) - 1) ** 2 < 1
    scores = np.sort(draw.uniform(0.5, 1, count))[::-1]
    classes = draw.integers(0, len(CLASSES) - 1, count)
    encoded = [Mask.of(mask) for mask in pixels] if masks else None
    return Detections(boxes.astype(np.float32), scores.astype(np.float32), classes, encoded)


def write(form: str, folder: Path, masks: bool, names: tuple[str, ...] = NAMES) -> tuple[Found, LabelFiles]:
    """Write images and the labels of their detections, and copy the labels into the folder of the images."""
    found: Found = {}
    for seed, name in enumerate(names):
        height, width = 160 + 7 * seed, 200 - 5 * seed
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        found[path] = detections(seed, height, width, masks)
    labels = LabelFiles(form, folder / "out", list(found))
    for path, detected in found.items():
        labels.add(path, Image.open(path).size, detected)
    (folder / "out").mkdir()
    labels.write(CLASSES)
    assert labels.root == folder / "images" and [*(folder / "out").iterdir()] == [labels.folder]
    shutil.copytree(labels.folder, labels.root, dirs_exist_ok=True)
    return found, labels


def filled(mask: np.ndarray, form: str) -> np.ndarray:
    """The part of a mask that a format stores: without holes, of some formats only the largest part."""
    parts, count = ndimage.label(mask)
    kept = range(1, count + 1) if form in WHOLE else [int(np.bincount(parts.ravel())[1:].argmax()) + 1]
    return np.any([ndimage.binary_fill_holes(parts == number) for number in kept], 0)


def extent(mask: np.ndarray) -> list[int]:
    rows, cols = np.nonzero(mask)
    return [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("form", LABEL_FORMATS)
def test_our_readers_read_the_detections(tmp_path: Path, form: str, masks: bool) -> None:
    found, labels = write(form, tmp_path, masks)
    detected, folder = open_folder(labels.root)
    classes = folder.classes()
    assert detected == form
    assert classes == tuple(CLASSES) if form in ("coco", "yolo") else set(classes) <= set(CLASSES)
    records = {Path(record["file_name"]): record for record in read_all(labels.root, form)}
    assert records.keys() == found.keys()
    for path, record in records.items():
        expected, annotations = found[path], record["annotations"]
        assert (record["width"], record["height"]) == Image.open(path).size
        assert [classes[a["category_id"]] for a in annotations] == [CLASSES[i] for i in expected.classes]
        assert all(("segmentation" in a) == (masks and form != "voc") for a in annotations)
        for number, annotation in enumerate(annotations):
            box, tolerance = expected.boxes[number], TOLERANCE[form]
            if expected.masks is not None and form != "voc":
                mask = filled(expected.masks[number].whole(record["height"], record["width"]), form)
                shape = mask.shape
                again = rle.decode(rle.merge(rle.frPyObjects(annotation["segmentation"], *shape))) > 0
                assert np.count_nonzero(again & mask) > 0.85 * np.count_nonzero(again | mask)
                if form != "coco":  # which has the box beside the mask
                    box = np.array(extent(mask))
            np.testing.assert_allclose(annotation["bbox"], box, atol=tolerance)
    assert not records[labels.root / NAMES[-1]]["annotations"]


@pytest.mark.parametrize("form", LABEL_FORMATS)
def test_another_reader_reads_the_same_boxes(tmp_path: Path, form: str) -> None:
    globox = pytest.importorskip("globox", reason="the package globox is not installed")
    found, labels = write(form, tmp_path, False, ("a.png", "b.png", "c d.png"))
    folder = labels.folder
    if form == "yolo":
        names = (folder / "classes.txt").read_text().splitlines()
        (folder / "classes.txt").unlink()
        read = globox.AnnotationSet.from_yolo_v5(folder, image_folder=labels.root, image_extension=".png")
        read.map_labels({str(number): name for number, name in enumerate(names)})
    else:
        read = {
            "coco": lambda: globox.AnnotationSet.from_coco(folder / "annotations.json"),
            "voc": lambda: globox.AnnotationSet.from_pascal_voc(folder),
            "labelme": lambda: globox.AnnotationSet.from_labelme(folder),
            "cvat": lambda: globox.AnnotationSet.from_cvat(folder / "annotations.xml"),
        }[form]()
    assert sorted(read.image_ids) == sorted(path.name for path in found)
    for path, expected in found.items():
        image = read[path.name]
        assert image.image_size == Image.open(path).size
        assert [box.label for box in image.boxes] == [CLASSES[i] for i in expected.classes]
        boxes = np.array([box.ltrb for box in image.boxes]) - ([1, 1, 0, 0] if form == "voc" else 0)
        np.testing.assert_allclose(boxes, expected.boxes, atol=TOLERANCE[form])


def test_pycocotools_reads_the_masks(tmp_path: Path) -> None:
    found, labels = write("coco", tmp_path, True)
    truth = COCO(str(labels.folder / "annotations.json"))
    for image in truth.loadImgs(truth.getImgIds()):
        expected = found[labels.root / image["file_name"]]
        annotations = truth.imgToAnns[image["id"]]
        assert expected.masks is not None and len(annotations) == len(expected.masks)
        for annotation, mask in zip(annotations, expected.masks, strict=True):
            pixels = filled(mask.whole(image["height"], image["width"]), "coco")
            again = truth.annToMask(annotation) > 0
            assert np.count_nonzero(again ^ pixels) < 0.15 * np.count_nonzero(pixels)
            assert annotation["area"] == pytest.approx(np.count_nonzero(pixels), rel=0.1)


@pytest.mark.parametrize("form", LABEL_FORMATS)
def test_extreme_boxes_and_empty_masks_are_kept(tmp_path: Path, form: str) -> None:
    """Boxes of less than a pixel, at all borders, of an image of 2 x 3 pixels; a mask without a pixel."""
    path = tmp_path / "images/a.png"
    path.parent.mkdir()
    Image.new("RGB", (2, 3)).save(path)
    boxes = np.array([(0, 0, 2, 3), (1.9, 2.9, 2, 3), (0, 0, 0.1, 0.1), (0.4, 1.2, 0.6, 1.4)], np.float32)
    masks = [Mask.of(np.zeros((3, 2), bool))] * 4
    for number, given in enumerate((None, masks)):
        labels = LabelFiles(form, tmp_path / f"out{number}", [path])
        labels.add(path, (2, 3), Detections(boxes, np.ones(4), np.arange(4), given))
        (tmp_path / f"out{number}").mkdir()
        labels.write(CLASSES)
        shutil.copytree(labels.folder, path.parent, dirs_exist_ok=True)
        (record,) = read_all(path.parent, form)
        read = np.array([annotation["bbox"] for annotation in record["annotations"]])
        np.testing.assert_allclose(read, boxes, atol=2 if form == "voc" else TOLERANCE[form])


def test_every_format_has_a_writer() -> None:
    assert tuple(WRITERS) == LABEL_FORMATS


def test_labels_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    def files(*names: str) -> list[Path]:
        return [tmp_path / name for name in names]

    for form in ("yolo", "voc", "labelme"):
        with pytest.raises(UserError, match=r"x/a.png' and '.*/x/a.jpg' would be the same: rename one"):
            LabelFiles(form, tmp_path, files("x/a.png", "a.png", "x/a.jpg"))
    with pytest.raises(UserError, match=r"classes.png' would be the list of classes"):
        LabelFiles("yolo", tmp_path, files("classes.png", "b.png"))
    for form in ("coco", "cvat"):
        LabelFiles(form, tmp_path, files("x/a.png", "x/a.jpg", "classes.png"))
        with pytest.raises(UserError, match="would be the same: rename one"):
            LabelFiles(form, tmp_path, files("x/a.png", "x/../x/a.png"))
    (tmp_path / "labels_coco").mkdir()
    with pytest.raises(UserError, match=r"labels_coco' exists and may contain corrected labels"):
        LabelFiles("coco", tmp_path, files("a.png"))


def test_nothing_is_left_of_labels_that_cannot_be_written(tmp_path: Path) -> None:
    """A class name that is not valid text fails in the middle of writing, a missing folder at once."""
    path = tmp_path / "a.png"
    labels = LabelFiles("yolo", tmp_path, [path])
    labels.add(path, (4, 4), Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), None))
    with pytest.raises(UnicodeEncodeError):
        labels.write(["\ud800"])
    assert not [*tmp_path.iterdir()]
    labels.folder = tmp_path / "absent/labels_yolo"
    with pytest.raises(NotWrittenError, match="labels_yolo' could not be written"):
        labels.write(CLASSES)


def test_images_of_several_folders_have_paths_from_their_common_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x/y")
    files = [Path("../../a.png"), Path("b.png"), tmp_path / "x/c.png"]
    labels = LabelFiles("coco", Path(), files)
    for file in files:
        found = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), None)
        labels.add(file, (4, 4), found)
    labels.write(CLASSES)
    document = json.loads((tmp_path / "x/y/labels_coco/annotations.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["a.png", "x/y/b.png", "x/c.png"]
    assert labels.root == tmp_path
