"""Detectron2 checkpoints that appear whole or not at all."""

import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from relvit_d2.conversion.checkpoint_file import damaged, is_damaged, is_pickle
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import appearing, write_text

# How torch.save reports a full disk, among all that a RuntimeError can be.
_NOT_WRITTEN = ("PytorchStreamWriter", "inline_container", "unexpected pos")
# What torch.load raises for a file of something else.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
)

_PICKLE = "; reading a pickle can run any code in it: if you trust where it comes from, set MODEL.ALLOW_PICKLE True"


def download(url: str) -> str:
    """Download a file at a URL that Detectron2 knows unless it is in its cache; return the local path.

    Raises:
        UserError: if it cannot be downloaded.
    """
    try:
        path = PathManager.get_local_path(urlparse(url)._replace(query="").geturl())
    except Exception as error:  # each protocol has exceptions of its own
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"'{url}' could not be downloaded ({reason}): check the address and the network, or download the file "
            "elsewhere and set MODEL.WEIGHTS to its path"
        ) from error
    if not Path(path).is_file():
        raise UserError(f"'{url}' is not a URL of a file that can be downloaded: correct MODEL.WEIGHTS")
    return path


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes and files that hold tensors and plain values only.

    A file is written under a temporary name in the same folder, flushed to the disk and renamed; then the
    pointer ``last_checkpoint`` the same way. A process killed at any moment leaves the previous checkpoint.

    Args:
        model: as Detectron2's.
        save_dir: folder of the checkpoints.
        enough: share of the model's values that a checkpoint must fit, 0..1; the rest is logged and stays as it is.
        allow_pickle: read files that are pickles, whose reading can run any code.
        checkpointables: as Detectron2's.

    Attributes:
        accept: called with the content of a file before anything is loaded from it; raises to refuse it.
    """

    accept: Callable[[dict[str, Any]], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        enough: float = 1.0,
        allow_pickle: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._enough, self._allow_pickle = enough, allow_pickle

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``NAME.pth`` and point ``last_checkpoint`` to it.

        Raises:
            UserError: if the file cannot be written; what was there before is untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        self._write(f"{name}.pth", data | kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_best(self, **kwargs: Any) -> None:
        """Write ``model_best.pth``, the weights without the optimiser; ``last_checkpoint`` stays.

        Raises:
            UserError: as :meth:`save`.
        """
        self._write("model_best.pth", {"model": self.model.state_dict(), **kwargs})

    def _write(self, name: str, data: dict[str, Any]) -> None:
        path = Path(self.save_dir) / name
        try:
            with appearing(path) as part:
                torch.save(data, part)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NOT_WRITTEN):
                raise
            free = shutil.disk_usage(path.parent).free / 2**20
            raise UserError(
                f"checkpoint '{path}' could not be written with {free:.0f} MiB free there; the previous one is "
                "untouched: free space or choose another OUTPUT_DIR, then go on with --resume"
            ) from error
        self.logger.info(f"Saved checkpoint {path}")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point ``last_checkpoint`` to a file of the same folder."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; arguments and result as Detectron2's.

        Raises:
            UserError: if the file is missing, cannot be downloaded, is not a checkpoint, or does not fit the model or
                the optimiser.
        """
        if path and "://" in path:
            download(path)  # into the cache, from which Detectron2 takes it
        elif path and not Path(path).is_file():
            raise UserError(
                f"checkpoint '{path}' is no file that exists; check MODEL.WEIGHTS, or last_checkpoint when resuming"
            )
        try:
            return super().load(path, *args, **kwargs)
        except ValueError as error:  # how an optimiser refuses the state of another
            raise UserError(f"'{path}' was written with another configuration: {error}") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 keeps it after a failure, and refuses the next file

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")) and not self._allow_pickle:
            raise UserError(f"'{filename}' is a pickle{_PICKLE}")
        unreadable = (
            f"'{filename}' is not a readable checkpoint of tensors and plain values; give a model_*.pth or an "
            "encoder.safetensors"
        )
        try:
            content = super()._load_file(filename)
        except _UNREADABLE as error:
            if is_damaged(Path(filename)):
                raise UserError(f"{damaged(Path(filename))}, or give an earlier checkpoint") from error
            needs_code = isinstance(error, pickle.UnpicklingError) and is_pickle(Path(filename))
            raise UserError(unreadable + _PICKLE * (needs_code and not self._allow_pickle)) from error
        if not (isinstance(content, dict) and isinstance(content["model"], dict)):
            raise UserError(unreadable)
        return content

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=not self._allow_pickle)

    def _load_model(self, checkpoint: Any) -> Any:
        if self.accept is not None:
            self.accept(checkpoint)
        incompatible = super()._load_model(checkpoint)
        own = self.model.state_dict()
        # What has another shape is listed as missing too.
        poor = list(dict.fromkeys([*incompatible.missing_keys, *(n for n, *_ in incompatible.incorrect_shapes)]))
        total = sum(value.numel() for value in own.values())
        share = 1 - sum(own[name].numel() for name in poor) / max(total, 1)
        if share < self._enough:
            shapes = [
                f"{name} {list(theirs)}, here {list(ours)}" for name, theirs, ours in incompatible.incorrect_shapes
            ]
            first = "; ".join((shapes or poor)[:2])
            raise UserError(
                f"the checkpoint fits only {share:.1%} of the model's values ({first}); "
                "give one of this very model, or set the keys that it was trained with"
            )
        return incompatible
