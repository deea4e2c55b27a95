"""Tensors out of files that other projects wrote, without running anything that is in them."""

import pickle
import pickletools
import re
import struct
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from relvit_d2.utils.errors import UserError

# Tensors that every encoder's file has, by the end of their names: what stands before is the place of the encoder.
_ANCHORS = ("patch_embed.proj.weight", "tokens_to_token.project.weight")


# What the readers raise for a file that is damaged or of something else.
_UNREADABLE = (
    SafetensorError,
    OSError,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


_LEGACY_PICKLES = 5  # that torch.save wrote before the values until torch 1.6


class _Inert(dict[Any, Any]):
    """What stands for an object of any foreign class; it takes what the pickle gives it and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass
class Found:
    """An encoder's tensors in a file.

    Attributes:
        path: the file.
        tensors: by their names without what stands before all of them.
        place: what stood before, such as ``teacher.module.backbone.``.
        beside: names of the file's other tensors, in full.
        others: places of further encoders, which are not read.
    """

    path: str
    tensors: dict[str, Tensor]
    place: str
    beside: list[str]
    others: list[str]


def read_file(path: Path) -> dict[str, Any]:
    """Read a file of safetensors or of ``torch.save`` as nested dictionaries.

    Objects of classes that torch does not hold for safe, such as arguments and callbacks beside the tensors, are not
    made; something inert stands for them.

    Raises:
        UserError: if there is no such file, or nothing can be read from it that way.
    """
    if not path.is_file():
        raise UserError(f"weights file '{path}' does not exist; give a .safetensors, .pth, .pt, .bin or .ckpt file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        foreign: list[Any] = [(_Inert, name) for name in _foreign_classes(path)]
        with torch.serialization.safe_globals(foreign):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if is_damaged(path):
            raise UserError(damaged(path)) from error
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"'{path}' is no file of tensors that can be read without running what is in it ({reason}); save its "
            "state_dict() anew with torch.save or safetensors where the file comes from"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}, no tensors by name; save a state_dict()")
    return content


def is_damaged(path: Path) -> bool:
    """Return whether a file that could not be read is an incomplete or damaged one of ``torch.save`` or safetensors.

    An intact pickle of classes that torch does not know is not damaged, nor is a file of another kind.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if head and b"PK".startswith(head[:2]):  # of torch.save: a zip archive, whose directory is at the end
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is not None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
            return True
    if not head or (head[8:] == b"{" and path.suffix == ".safetensors"):
        return True
    if not head.startswith(b"\x80"):
        return False
    try:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                if file.peek(1):
                    deque(pickletools.genops(file), maxlen=0)
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # the pickles are whole
        return False
    except Exception:  # whatever a damaged file leads to
        return True
    return False


def is_pickle(path: Path) -> bool:
    """Return whether a file begins as a pickle or as an archive of ``torch.save``."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


def damaged(path: Path) -> str:
    """Return the sentence on a file for which :func:`is_damaged` is true."""
    return f"'{path}' is incomplete or damaged ({path.stat().st_size:,} bytes): copy or download it again"


def _foreign_classes(path: Path) -> list[str]:
    """Name what a file of ``torch.save`` would import beyond torch's own; none for the format before torch 1.6."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:
        return []


def find_encoder(path: Path) -> Found:
    """Find the encoder's tensors, however deep they lie in a file.

    Of several encoders a teacher or moving average is taken, which is what is evaluated, and a student last.

    Raises:
        UserError: if there are no tensors of an encoder; see :func:`read_file` too.
    """
    tensors = dict(_flat(read_file(path)))
    places = [name[: -len(anchor)] for name in tensors for anchor in _ANCHORS if re.search(rf"(^|\.){anchor}$", name)]
    if not places:
        first = ", ".join(list(tensors)[:3]) or "none"
        raise UserError(
            f"'{path}' holds no tensor *patch_embed.proj.weight or *tokens_to_token.project.weight (tensors: {first}): "
            "it is no ViT, Swin or T2T-ViT; give another file"
        )

    def rank(place: str) -> int:
        words = re.split(r"[._]", place)
        return 0 if {"teacher", "ema"} & {*words} else 2 if "student" in words else 1

    place, *others = sorted(places, key=rank)
    inside = {name.removeprefix(place): tensors[name] for name in tensors if name.startswith(place)}
    beside = [name for name in tensors if not name.startswith(place)]
    return Found(str(path), inside, place, beside, others)


def _flat(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
