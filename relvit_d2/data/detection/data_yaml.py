"""Description of a YOLO data set: names of classes, key points, and the images of each split.

``data.yaml`` is Ultralytics' description file; ``classes.txt`` and ``obj.names`` contain one class name per line.
"""

import logging
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped]

from relvit_d2.data.detection.records import check_unique, parse_integer
from relvit_d2.data.images.folder import is_image
from relvit_d2.utils.errors import UserError, one_line
from relvit_d2.utils.paths import DataRoot, normal_form
from relvit_d2.utils.printing import first_few

NAME_LISTS = ("classes.txt", "obj.names")
YAML = (".yaml", ".yml")
MAX_DEPTH = 2  # folders below the root in which a YAML file may be the description
KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ANY_KEY = re.compile(rf"\b(names|kpt_shape|{'|'.join(KEYS)})\b")  # every description contains one of them
NULL = ("", "~", "null", "Null", "NULL")  # YAML's, which BaseLoader returns as text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """Description of a data set.

    Attributes:
        names: class names by class number, in ascending order; {} if no file gives them.
        keypoints: count of numbers that follow the box on a line of a label file.
        sets: images of each split, relative to the folder of the data set; {} if no file gives them.
        sources: the files that were read.
    """

    names: dict[int, str] = field(default_factory=dict)
    keypoints: int = 0
    sets: dict[str, list[str]] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)


def read_description(root: Path, files: Sequence[str]) -> Description:
    """Read the description of a data set.

    Class names are searched for from the root downwards, since the file may be beside the labels and an archive may
    contain the data set in a folder; within a folder ``data.yaml`` comes first, then the other YAML files, then the
    lists of names. The YAML file with the names gives splits and key points too; see :func:`_unnamed_descriptions` for
    YAML files without names. Other YAML files may be invalid if some file gives names. Names and numbers are read as
    text: ``no``, ``010`` and ``12:30`` are names.

    Args:
        root: the folder of the data set.
        files: all files below it, relative to it.

    Raises:
        UserError: a file is damaged, two files name different classes or may both be the description, or a split
            contains no image or one outside ``root``.
    """
    names: dict[int, str] = {}
    names_file: Path | None = None
    with_names: dict[Path, dict[str, Any]] = {}
    without_names: dict[Path, dict[str, Any]] = {}
    sources: list[Path] = []
    errors: list[UserError] = []
    names_depth = None
    candidates = [root / name for name in files if name.lower().endswith((*YAML, *NAME_LISTS))]
    for depth, folder, _, path in sorted(filter(None, (_sort_key(path, root) for path in candidates))):
        if names and depth != names_depth:
            break
        if names_file and names_file.parent == folder:
            continue
        sources.append(path)
        document: dict[str, Any] = {}
        try:
            text = DataRoot(root).read_text(path)
            if path.suffix.lower() in YAML:
                if depth and not ANY_KEY.search(text):
                    continue
                document = _parse(text, path)
                given = _names(document, path) if document else {}
            else:
                given = _checked_names(dict(enumerate(filter(None, map(str.strip, text.splitlines())))), path)
        except UserError as error:
            if path.suffix.lower() not in YAML or _is_data_yaml(path):
                raise
            errors.append(error)  # it may have another purpose
            continue
        if document.keys() & {"kpt_shape", *KEYS}:
            (with_names if given else without_names)[path] = document
        if not given:
            continue
        if names and given != names:
            raise UserError(f"{names_file} and {path} name different classes: make them agree, or remove one")
        names, names_file, names_depth = given, path, depth
    if errors and not names:
        raise errors[0]
    for skipped in errors:
        logger.warning(f"not read as a description of '{root}': {skipped}")
    yaml_has_names = bool(names_file and names_file.suffix.lower() in YAML)
    documents = with_names or _unnamed_descriptions(without_names, yaml_has_names)
    keypoints = {_keypoints(document, path) for path, document in documents.items() if "kpt_shape" in document}
    if len(keypoints) > 1:
        raise UserError(f"{first_few(list(documents))} have different kpt_shape: make them agree")
    index = _FileIndex(root, files if documents else ())
    sets: dict[str, list[str]] = {}
    for path, document in documents.items():
        for split, images in index.sets(document, path.parent).items():
            sets.setdefault(split, []).extend(images)
    return Description(names, max(keypoints, default=0), sets, sources)


def _is_data_yaml(path: Path) -> bool:
    return path.stem.lower() == "data" and path.suffix.lower() in YAML


def _unnamed_descriptions(documents: dict[Path, dict[str, Any]], yaml_has_names: bool) -> dict[Path, dict[str, Any]]:
    """Return the YAML files without names that describe their folders: ``data.yaml``, or else the only one.

    If another YAML file gives the names, only a ``data.yaml`` is used beside it.
    """
    chosen = {path: document for path, document in documents.items() if _is_data_yaml(path)}
    if not chosen and not yaml_has_names:
        chosen = documents
    folders: dict[Path, Path] = {}
    for path in chosen:
        if (first := folders.setdefault(path.parent, path)) != path:
            raise UserError(
                f"{first} and {path} may both describe the data set: remove one, or rename the right one to data.yaml"
            )
    return chosen


def _sort_key(path: Path, root: Path) -> tuple[int, Path, int, Path] | None:
    """Return the position of a possible description in the search order, or None for any other file."""
    depth = len(path.relative_to(root).parts) - 1
    if path.suffix.lower() in YAML and depth <= MAX_DEPTH:
        return depth, path.parent, 0 if _is_data_yaml(path) else 1, path
    if path.name.lower() in NAME_LISTS:
        return depth, path.parent, 2 + NAME_LISTS.index(path.name.lower()), path
    return None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(text, yaml.BaseLoader)  # creates only text, lists and mappings
    except (ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML ({one_line(error)}): correct it") from error
    return document if isinstance(document, dict) else {}


def _names(document: dict[str, Any], path: Path) -> dict[int, str]:
    given = document.get("names")
    if given in NULL and "names" in document:  # numbers that are not indented are keys of the document itself
        given = {key: value for key, value in document.items() if parse_integer(key) is not None}
    if not given:
        return {}
    entries = list(given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else [])
    names = {parse_integer(key): name for key, name in entries}
    if not entries or not all(n is not None and n >= 0 and isinstance(name, str) for n, name in names.items()):
        raise UserError(f"{path} has names that are neither a list of classes nor a name for each number: correct it")
    check_unique([str(parse_integer(key)) for key, _ in entries], f"the names of {path}")
    return _checked_names({number: name for number, name in names.items() if number is not None}, path)


def _checked_names(names: dict[int, str], path: Path) -> dict[int, str]:
    if invalid := [name for name in names.values() if not name.isprintable() or not name.strip()]:
        raise UserError(f"{path} has a class {invalid[0]!r}, which cannot be printed: correct it")
    check_unique(list(names.values()), str(path))
    return dict(sorted(names.items()))


def _keypoints(document: dict[str, Any], path: Path) -> int:
    shape = document["kpt_shape"]
    sizes = [parse_integer(size) for size in shape] if isinstance(shape, list) else []
    if len(sizes) != 2 or not sizes[0] or sizes[0] < 1 or sizes[1] not in (2, 3):
        raise UserError(f"kpt_shape in {path} is {str(shape)[:40]!r}: set it to [number of key points, 2 or 3]")
    return sizes[0] * sizes[1]


class _FileIndex:
    """Finds the folders and files of a data set by paths that may have been written on another machine.

    All paths are relative to ``root``, which is ``.``.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self._root = root
        self._images = [name for name in files if is_image(name)]
        parents = map(PurePosixPath, {posixpath.dirname(name) for name in files})
        folders = {str(folder) for path in parents for folder in (path, *path.parents)}
        self._known = {normal_form(name): name for name in (*folders, *files)}

    def sets(self, document: dict[str, Any], folder: Path) -> dict[str, list[str]]:
        """Return the images of the splits in the description of ``folder``."""
        bases = [folder.relative_to(self._root).as_posix()]
        if isinstance(base := document.get("path"), str) and (found := self._find(base, bases)):
            bases = [found, *bases]
        sets: dict[str, list[str]] = {}
        for key, split in KEYS.items():
            given = document.get(key)
            for text in given if isinstance(given, list) else [given]:
                if text is None or text in NULL:
                    continue
                if not isinstance(text, str) or not text.isprintable():
                    raise UserError(f"'{key}' in {folder} is {str(text)[:60]!r}: set it to a path")
                where = f"'{key}: {text}' of the description in {folder}"
                images = self._images_at(text, where, [*bases, "."])
                if images:
                    sets[split] = list(dict.fromkeys([*sets.get(split, []), *images]))
                elif key == "test":
                    logger.warning(f"{where} leads to no image inside '{self._root}': there is no test set")
                else:
                    raise UserError(
                        f"{where} leads to no image inside '{self._root}': correct it, or remove the key so that the "
                        "splits are taken from the names of the folders"
                    )
        return sets

    def _images_at(self, text: str, where: str, bases: Sequence[str]) -> list[str]:
        found = self._find(text, bases)
        if found is None:
            return []
        if not found.lower().endswith(".txt"):
            return [image for image in self._images if found in (".", image) or image.startswith(f"{found}/")]
        path, bases = self._root / found, [posixpath.dirname(found), *bases]
        return [
            self._listed_image(line.strip(), f"{path} ({where})", bases)
            for line in DataRoot(self._root).read_text(path).splitlines()
            if line.strip()
        ]

    def _listed_image(self, line: str, where: str, bases: Sequence[str]) -> str:
        """Return the image that a line of a list names; it is below the root, but may be missing."""
        name = self._find(line, bases)
        if name is None and not re.match(r"/|\.\.|[A-Za-z]:", posixpath.normpath(line.replace("\\", "/"))):
            name = next(self._candidates(line, bases), None)
        if name is None or not line.isprintable() or not is_image(name):
            raise UserError(f"{where} names {line!r}, which is not an image inside '{self._root}': correct it")
        return name

    def _find(self, text: str, bases: Sequence[str]) -> str | None:
        names = map(normal_form, self._candidates(text, bases))
        return next((self._known[name] for name in names if name in self._known), None)

    def _candidates(self, text: str, bases: Sequence[str]) -> Iterator[str]:
        """Yield the paths that ``text`` may refer to, the most likely first.

        Data sets are moved: leading ``..`` are dropped, as Ultralytics does, and so are the first folders of an
        absolute path outside the root.
        """
        text = text.strip().replace("\\", "/")
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if text.startswith("/") or re.match(r"[A-Za-z]:/", text):
            for root in (os.path.abspath(self._root), os.path.realpath(self._root)):  # noqa: PTH100
                if posixpath.normpath(text).startswith(f"{root}/"):
                    yield posixpath.relpath(text, root)
            tails = [parts[count:] for count in range(len(parts))]
        else:
            ups = next((count for count, part in enumerate(parts) if part != ".."), len(parts))
            tails = [parts, parts[ups:]]
        for tail in tails:
            for base in bases:
                path = posixpath.normpath(posixpath.join(base, *tail))
                if path.split("/")[0] != "..":
                    yield path
