"""Mutations of any file: bytes, names, folders, links."""

import os
import random
import shutil
from pathlib import Path


def flip(path: Path, draw: random.Random, outside: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8) if data else 0):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random, outside: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randint(0, len(data))])


def stir(path: Path, draw: random.Random, outside: Path) -> None:
    data = path.read_bytes()
    first, last = sorted(draw.randint(0, len(data)) for _ in range(2))
    path.write_bytes(
        data[:first] + draw.choice((b"", draw.randbytes(9), data[first:last] * 2, b"\0" * 50)) + data[last:]
    )


def empty(path: Path, draw: random.Random, outside: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()


def folder_instead(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def link_out(path: Path, draw: random.Random, outside: Path) -> None:
    """A link to a valid file outside the root."""
    target = outside / f"linked{path.suffix}"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target if draw.random() < 0.5 else os.path.relpath(target, path.parent))


def link_to_itself(path: Path, draw: random.Random, outside: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def foreign_name(path: Path, draw: random.Random, outside: Path) -> None:
    """A second file whose name is not UTF-8."""
    shutil.copy(path, os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe" + os.fsencode(path.suffix)))


def neighbour(path: Path, draw: random.Random, outside: Path) -> None:
    """The content of another file."""
    others = sorted(other for other in path.parent.parent.rglob("*") if other.is_file())
    path.write_bytes(draw.choice(others).read_bytes() if others else b"")


def other_form(path: Path, draw: random.Random, outside: Path) -> None:
    """Another case, an accented letter in either normal form, or brackets in the name."""
    forms = (path.name.upper(), path.name.title(), f"e\u0301{path.name}", f"\u00e9{path.name}")
    path.rename(path.with_name(draw.choice((*forms, f"[{path.stem}]{path.suffix}"))))


def other_folder(path: Path, draw: random.Random, outside: Path) -> None:
    """The same change of the folder's name."""
    other_form(path.parent, draw, outside)


def link_folder(path: Path, draw: random.Random, outside: Path) -> None:
    """A link instead of the file's folder, to a folder outside the root or beside it."""
    folder = path.parent
    target = (outside if draw.random() < 0.7 else folder.parent) / f"moved {draw.randint(0, 9)}"
    folder.rename(target)
    folder.symlink_to(target if draw.random() < 0.5 else os.path.relpath(target, folder.parent))


def deeper(path: Path, draw: random.Random, outside: Path) -> None:
    """The file's folder below another one, which may have the name of a split."""
    folder = path.parent
    folder.rename(folder.with_name("moving"))
    folder.mkdir()
    folder.with_name("moving").rename(folder / draw.choice(("test_site", "val", "train", "x", "images", "labels")))
