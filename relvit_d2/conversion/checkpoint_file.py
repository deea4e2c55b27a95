"""Reading tensors from files of other projects without executing code in them."""

import pickle
import pickletools
import re
import struct
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from relvit_d2.utils.digest import content_digest
from relvit_d2.utils.errors import UserError, one_line

# Every encoder has one of these tensors; the part of the name before it is the prefix of the encoder.
_ANCHORS = ("patch_embed.proj.weight", "tokens_to_token.project.weight")


# Raised by torch and safetensors for damaged files and for other kinds of files.
UNREADABLE = (
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


_LEGACY_PICKLES = 5  # number of pickles before the values in the format of torch.save before torch 1.6


class _Inert(dict[Any, Any]):
    """Placeholder for an object of any unknown class; ignores the pickled state."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass
class FoundEncoder:
    """The tensors of an encoder in a file.

    Attributes:
        tensors: tensors by name without the prefix.
        prefix: common prefix of the names, such as ``teacher.module.backbone.``.
        other_tensors: full names of the other tensors in the file.
        other_prefixes: prefixes of further encoders, which are not read.
    """

    path: str
    tensors: dict[str, Tensor]
    prefix: str = ""
    other_tensors: list[str] = field(default_factory=list)
    other_prefixes: list[str] = field(default_factory=list)


def read_file(path: Path) -> dict[str, Any]:
    """Read a file of safetensors or of ``torch.save`` as nested dictionaries.

    Objects of classes that torch does not consider safe (arguments, callbacks, ...) are replaced by placeholders.

    Raises:
        UserError: if the file is missing, damaged, or cannot be read without executing code.
    """
    if not path.is_file():
        raise UserError(f"weights file '{path}' does not exist; give a .safetensors, .pth, .pt, .bin or .ckpt file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        foreign: list[Any] = [(_Inert, name) for name in _foreign_classes(path)]
        with torch.serialization.safe_globals(foreign):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if is_damaged(path):
            raise UserError(damaged(path)) from error
        reason = one_line(error, 120)
        raise UserError(
            f"'{path}' cannot be read without executing code in it ({reason}); save the model's state_dict() with "
            "torch.save or safetensors"
        ) from error
    verify_digest(content, path)
    if not isinstance(content, dict):
        raise UserError(
            f"'{path}' contains a {type(content).__name__}, not a dictionary of tensors; save a state_dict()"
        )
    return content


def verify_digest(content: Any, path: Path) -> bool:
    """Compare the content of a checkpoint with its entry ``digest``, which is removed; return whether it had one.

    Raises:
        UserError: they differ.
    """
    digest = content.pop("digest", None) if isinstance(content, dict) else None
    if isinstance(digest, str) and digest != content_digest(content):
        raise UserError(damaged(path))
    return isinstance(digest, str)


def is_damaged(path: Path) -> bool:
    """Return whether an unreadable file is an incomplete or damaged file of ``torch.save`` or safetensors.

    Intact pickles of unknown classes and files of other kinds are not damaged.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if head and b"PK".startswith(head[:2]):  # torch.save: a zip archive, with its directory at the end
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
    except pickle.UnpicklingError:  # the pickles are complete
        return False
    except Exception:  # any error can result from damage
        return True
    return False


def is_pickle(path: Path) -> bool:
    """Return whether a file starts like a pickle or an archive of ``torch.save``."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


def damaged(path: Path) -> str:
    """Return the error message for a file that :func:`is_damaged`."""
    return f"'{path}' is incomplete or damaged ({path.stat().st_size:,} bytes): copy or download it again"


def _foreign_classes(path: Path) -> list[str]:
    """Return the classes outside of torch that a file of ``torch.save`` needs; none for the format before torch 1.6."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:
        return []


def find_encoder(path: Path) -> FoundEncoder:
    """Find the tensors of an encoder at any depth of a file.

    Among several encoders, a teacher or moving average is preferred, and a student is the last choice.

    Raises:
        UserError: if there is no encoder, or for the reasons of :func:`read_file`.
    """
    tensors = dict(_flat(read_file(path)))
    prefixes = [name[: -len(anchor)] for name in tensors for anchor in _ANCHORS if re.search(rf"(^|\.){anchor}$", name)]
    if not prefixes:
        first = ", ".join(list(tensors)[:3]) or "none"
        raise UserError(
            f"'{path}' contains no ViT, Swin or T2T-ViT: no tensor *patch_embed.proj.weight or "
            f"*tokens_to_token.project.weight (first tensors: {first}); give another file"
        )

    def rank(prefix: str) -> int:
        parts = re.split(r"[._]", prefix)
        return 0 if {"teacher", "ema"} & {*parts} else 2 if "student" in parts else 1

    prefix, *others = sorted(prefixes, key=rank)
    inside = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    return FoundEncoder(str(path), inside, prefix, [name for name in tensors if not name.startswith(prefix)], others)


def _flat(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
