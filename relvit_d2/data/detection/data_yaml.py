"""What files beside a YOLO data set's labels give: names of classes, key points, and the images of each split.

``data.yaml`` is Ultralytics' description of a data set; ``classes.txt`` and ``obj.names`` hold a class name a line.
"""

import logging
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from relvit_d2.data.detection.records import check_unique, first_few, parse_whole_number
from relvit_d2.data.images.folder import EXTENSIONS
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.paths import normal_form, refuse_links_out

LISTS_OF_NAMES = ("classes.txt", "obj.names")
YAML = (".yaml", ".yml")
DEEPEST = 2  # folders below the root in which a YAML file may be the description
KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MARKS = re.compile(rf"\b(names|kpt_shape|{'|'.join(KEYS)})\b")  # one of them is in every description
NULL = ("", "~", "null", "Null", "NULL")  # YAML's, which the loader leaves as they are written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """A data set's description.

    Attributes:
        names: of the classes by their numbers, in ascending order; {} if no file gives them.
        keypoints: numbers that follow the box on a line of a label file.
        sets: images of each split; {} if no file gives them.
        sources: the files that were read.
    """

    names: dict[int, str] = field(default_factory=dict)
    keypoints: int = 0
    sets: dict[str, list[Path]] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)


def describe(root: Path, files: Sequence[Path]) -> Description:
    """Read the description of a data set.

    Names are searched for from the root downwards, since they may lie beside the labels and an archive may hold all one
    folder deep; in a folder ``data.yaml`` comes first, then the other YAML files, then the lists of names. The YAML
    file that gives the names gives splits and key points too; see :func:`_descriptions` for one without names. Other
    YAML files may be invalid, if some file gives names. Names and numbers are read as they are written: ``no``, ``010``
    and ``12:30`` are texts.

    Args:
        root: the folder of the data set.
        files: all files below it.

    Raises:
        UserError: a file is damaged, two files name different classes or may both be the description, or a split leads
            out of ``root`` or to no image.
    """
    names: dict[int, str] = {}
    named_by: Path | None = None
    naming: dict[Path, dict[str, Any]] = {}
    others: dict[Path, dict[str, Any]] = {}
    sources: list[Path] = []
    faults: list[UserError] = []
    depth_found = None
    candidates = sorted(filter(None, (_candidate(path, root) for path in files)))
    for depth, folder, _, path in candidates:
        if names and depth != depth_found:
            break
        if named_by and named_by.parent == folder:
            continue
        sources.append(path)
        document: dict[str, Any] = {}
        try:
            refuse_links_out([path], root)
            text = _read(path)
            if path.suffix.lower() in YAML:
                if depth and not MARKS.search(text):
                    continue
                document = _load(text, path)
                given = _names(document, path) if document else {}
            else:
                given = _checked(dict(enumerate(filter(None, map(str.strip, text.splitlines())))), path)
        except UserError as error:
            if path.suffix.lower() not in YAML or _is_data_yaml(path):
                raise
            faults.append(error)  # it may have another purpose
            continue
        if document.keys() & {"kpt_shape", *KEYS}:
            (naming if given else others)[path] = document
        if not given:
            continue
        if names and given != names:
            raise UserError(f"{named_by} and {path} name different classes: make them agree, or remove one")
        names, named_by, depth_found = given, path, depth
    for fault in faults:
        if not names:
            raise fault
        logger.warning(f"not read as a description of '{root}': {fault}")
    by_yaml = bool(named_by and named_by.suffix.lower() in YAML)
    documents = naming or _descriptions(others, by_yaml)
    keypoints = {_keypoints(document, path) for path, document in documents.items() if "kpt_shape" in document}
    if len(keypoints) > 1:
        raise UserError(f"{first_few(list(documents))} have different kpt_shape: make them agree")
    index = _Index(root, files)
    sets: dict[str, list[Path]] = {}
    for path, document in documents.items():
        for split, images in index.sets(document, path.parent).items():
            sets.setdefault(split, []).extend(images)
    return Description(names, max(keypoints, default=0), sets, sources)


def _is_data_yaml(path: Path) -> bool:
    return path.stem.lower() == "data" and path.suffix.lower() in YAML


def _descriptions(documents: dict[Path, dict[str, Any]], by_yaml: bool) -> dict[Path, dict[str, Any]]:
    """Return those of the YAML files without names that describe their folders: ``data.yaml``, or else the only one.

    Args:
        documents: files with splits or key points, by their paths.
        by_yaml: whether another YAML file gives the names; then only a ``data.yaml`` counts beside it.

    Raises:
        UserError: two files of one folder may be its description.
    """
    chosen = {path: document for path, document in documents.items() if _is_data_yaml(path)}
    if not chosen and not by_yaml:
        chosen = documents
    folders: dict[Path, Path] = {}
    for path in chosen:
        if (first := folders.setdefault(path.parent, path)) != path:
            raise UserError(
                f"{first} and {path} may both describe the data set: remove one, or call the right one data.yaml"
            )
    return chosen


def _candidate(path: Path, root: Path) -> tuple[int, Path, int, Path] | None:
    """Return what a file that may describe the data set is sorted by, or None for any other."""
    depth = len(path.relative_to(root).parts) - 1
    if path.suffix.lower() in YAML and depth <= DEEPEST:
        return depth, path.parent, 0 if _is_data_yaml(path) else 1, path
    if path.name.lower() in LISTS_OF_NAMES:
        return depth, path.parent, 2 + LISTS_OF_NAMES.index(path.name.lower()), path
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): give UTF-8 text") from error


def _load(text: str, path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(text, yaml.BaseLoader)  # makes texts, lists and mappings only
    except (ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not sound YAML ({' '.join(str(error).split())}): correct it") from error
    return document if isinstance(document, dict) else {}


def _names(document: dict[str, Any], path: Path) -> dict[int, str]:
    given = document.get("names")
    if given in NULL and "names" in document:  # numbers that are not indented are keys of the document itself
        given = {key: value for key, value in document.items() if parse_whole_number(key) is not None}
    if not given:
        return {}
    entries = list(given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else [])
    numbers = [parse_whole_number(key) for key, _ in entries]
    if not entries or not all(
        number is not None and number >= 0 and isinstance(name, str)
        for number, (_, name) in zip(numbers, entries, strict=True)
    ):
        raise UserError(f"{path} has names that are neither a list of classes nor numbers with a name each: correct it")
    check_unique(list(map(str, numbers)), f"the names of {path}")
    return _checked(
        {number: name for number, (_, name) in zip(numbers, entries, strict=True) if number is not None}, path
    )


def _checked(names: dict[int, str], path: Path) -> dict[int, str]:
    if odd := [name for name in names.values() if not name.isprintable() or not name.strip()]:
        raise UserError(f"{path} has a class {odd[0]!r}, which cannot be printed: correct it")
    check_unique(list(names.values()), str(path))
    return dict(sorted(names.items()))


def _keypoints(document: dict[str, Any], path: Path) -> int:
    shape = document["kpt_shape"]
    sizes = [parse_whole_number(size) for size in shape] if isinstance(shape, list) else []
    if len(sizes) != 2 or not sizes[0] or sizes[0] < 1 or sizes[1] not in (2, 3):
        raise UserError(f"kpt_shape in {path} is {str(shape)[:40]!r}: give [number of key points, 2 or 3]")
    return sizes[0] * sizes[1]


class _Index:
    """Looks up the folders and files of a data set by paths that may have been written elsewhere."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._root = root
        self._images = [path for path in files if path.suffix.lower() in EXTENSIONS]
        folders = {folder for path in files for folder in path.parents if folder.is_relative_to(root)}
        self._known = {normal_form(path.relative_to(root).as_posix()): path for path in (*folders, *files)}

    def sets(self, document: dict[str, Any], folder: Path) -> dict[str, list[Path]]:
        """Return the images of the splits that the description in ``folder`` gives."""
        bases = [folder]
        if isinstance(base := document.get("path"), str) and (named := self._find(base, bases)):
            bases = [named, folder]
        found: dict[str, list[Path]] = {}
        for key, split in KEYS.items():
            given = document.get(key)
            for text in given if isinstance(given, list) else [given]:
                if text is None or text in NULL:
                    continue
                if not isinstance(text, str) or not text.isprintable():
                    raise UserError(f"'{key}' in {folder} is {str(text)[:60]!r}: give a path")
                where = f"'{key}: {text}' of the description in {folder}"
                images = self._part(text, where, [*bases, self._root])
                if images:
                    found[split] = list(dict.fromkeys([*found.get(split, []), *images]))
                elif key == "test":
                    logger.warning(f"{where} leads to no image inside '{self._root}': there is no test set")
                else:
                    raise UserError(
                        f"{where} leads to no image inside '{self._root}': correct it, or remove the key so that the "
                        "names of the folders give the splits"
                    )
        return found

    def _part(self, text: str, where: str, bases: Sequence[Path]) -> list[Path]:
        place = self._find(text, bases)
        if place is None:
            return []
        if place.suffix.lower() != ".txt":
            return [image for image in self._images if place in (image, *image.parents)]
        refuse_links_out([place], self._root)
        return [
            self._listed(line.strip(), f"{place} ({where})", [place.parent, *bases])
            for line in _read(place).splitlines()
            if line.strip()
        ]

    def _listed(self, line: str, where: str, bases: Sequence[Path]) -> Path:
        """Return the image that a line of a list names; it may be missing, but lies below the root."""
        path = self._find(line, bases)
        if path is None and not re.match(r"/|\.\.|[A-Za-z]:", posixpath.normpath(line.replace("\\", "/"))):
            path = next(self._candidates(line, bases), None)
        if path is None or not line.isprintable() or path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"{where} names {line!r}, which is not an image inside '{self._root}': correct it")
        return path

    def _find(self, text: str, bases: Sequence[Path]) -> Path | None:
        for place in self._candidates(text, bases):
            if found := self._known.get(normal_form(place.relative_to(self._root).as_posix())):
                return found
        return None

    def _candidates(self, text: str, bases: Sequence[Path]) -> Iterator[Path]:
        """Yield the paths below the root that ``text`` may mean, the likeliest first.

        Data sets move: leading ``..`` are dropped, as Ultralytics does, and so are the first folders of an absolute
        path that leads elsewhere.
        """
        text = text.strip().replace("\\", "/")
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if text.startswith("/") or re.match(r"[A-Za-z]:/", text):
            for root in (os.path.abspath(self._root), os.path.realpath(self._root)):  # noqa: PTH100
                if posixpath.normpath(text).startswith(f"{root}/"):
                    yield self._root / posixpath.relpath(text, root)
            tails = [parts[count:] for count in range(len(parts))]
        else:
            ups = next((count for count, part in enumerate(parts) if part != ".."), len(parts))
            tails = [parts, parts[ups:]]
        for tail in tails:
            for base in bases:
                place = posixpath.normpath(posixpath.join(base.relative_to(self._root).as_posix(), *tail))
                if place.split("/")[0] != "..":
                    yield self._root / place
