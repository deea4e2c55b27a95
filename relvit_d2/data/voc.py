"""PASCAL VOC: ``Annotations/*.xml``, ``JPEGImages/*.jpg`` and the lists of ``ImageSets/Main``."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import ElementTree
from detectron2.structures import BoxMode

from relvit_d2.data.places import refuse_stray
from relvit_d2.data.records import Record, check_unique, checked_box, checked_name, existing
from relvit_d2.errors import UserError, nearest

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(root: Path, split: str, class_names: Sequence[str], skip_missing: bool = False) -> list[Record]:
    """Read one split, in the order of its list.

    Boxes follow Detectron2: the file counts pixels from 1 and includes both ends, so 1 is taken from the minima
    and the maxima stay. Objects marked difficult are kept, with ``"difficult": 1``. Only an ``<object>`` that is a
    direct child of the root counts, and only its own ``<bndbox>``: ``<part>`` has boxes of its own.

    Args:
        root: the folder that holds ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: name of a list in ``ImageSets/Main``, without ``.txt``.
        class_names: in the order of the category ids.
        skip_missing: see :func:`relvit_d2.data.records.existing`.

    Returns:
        One record an image (see ``relvit_d2.data.records``); ``image_id`` is the name without its ending.

    Raises:
        UserError: a file is missing or damaged, a class is unknown, a box is wrong; the message names the file.
    """
    category_ids = {name: index for index, name in enumerate(class_names)}
    return [
        _read_annotation(root / "Annotations" / f"{image.stem}.xml", image, category_ids)
        for image in voc_images(root, split, skip_missing)
    ]


def voc_images(root: Path, split: str, skip_missing: bool = False) -> list[Path]:
    """Return the images of one split in the order of its list; no annotation is touched.

    A line of the list is an id, or an id and a flag as in the lists of single classes; blank lines are skipped
    and Windows line ends are accepted.

    Raises:
        UserError: the list is missing, empty, holds an id twice or none that is a file name, or an image is missing.
    """
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    refuse_stray(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the image list {path} cannot be read ({type(error).__name__}): restore it") from error
    ids = [checked_name(line.split()[0], f"the image list {path}") for line in lines if line.strip()]
    if not ids:
        raise UserError(f"the image list {path} is empty: restore it")
    check_unique(ids, f"the image list {path}")
    return existing([root / "JPEGImages" / f"{image_id}.jpg" for image_id in ids], str(path), skip_missing)


def _read_annotation(path: Path, image: Path, category_ids: dict[str, int]) -> Record:
    refuse_stray(path)
    try:
        tree = ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise UserError(f"the annotation {path} is missing: restore it") from error
    # defusedxml's refusals are ValueErrors; an unknown text encoding is a LookupError.
    except (ParseError, OSError, ValueError, LookupError) as error:
        raise UserError(f"the annotation {path} is not sound XML ({error}): restore it") from error
    width, height = (_size(tree, side, path) for side in ("width", "height"))
    return {
        "file_name": str(image),
        "image_id": image.stem,
        "height": height,
        "width": width,
        "annotations": [
            _read_object(element, number, width, height, path, category_ids)
            for number, element in enumerate(tree.findall("object"), start=1)
        ],
    }


def _read_object(
    element: Element, number: int, width: int, height: int, path: Path, category_ids: dict[str, int]
) -> Record:
    where = f"{path}, object {number}"
    name = _text(element, "name", where)
    if name not in category_ids:
        known = list(category_ids)
        raise UserError(
            f"{where} is of the class '{name}', which is not one of {', '.join(known)}{nearest(name, known)}"
        )
    box = element.find("bndbox")
    if box is None:
        raise UserError(f"{where} has no <bndbox>: add it or remove the object")
    where = f"{where} ({name})"
    difficult = element.findtext("difficult", default="0").strip()
    if difficult not in ("0", "1"):
        raise UserError(f"{where} has <difficult> {difficult!r}: it must be 0 or 1")
    return {
        "bbox": checked_box([_number(box, corner, where) for corner in CORNERS], width, height, where, first_pixel=1),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category_ids[name],
        "iscrowd": 0,
        "difficult": int(difficult),
    }


def _text(element: Element, tag: str, where: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise UserError(f"{where} has no <{tag}>: add it")
    return text


def _number(element: Element, tag: str, where: str) -> float:
    text = _text(element, tag, where)
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{where} has <{tag}> {text!r}, which is not a number: correct it") from error


def _size(tree: Element, side: str, path: Path) -> int:
    value = _number(tree, f"size/{side}", str(path))
    if not (value >= 1 and value.is_integer()):
        raise UserError(f"{path} has <size/{side}> {value:g}: it must be a whole number of pixels")
    return int(value)
