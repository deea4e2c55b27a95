"""Detectron2's checkpointer with atomic writes, digests and safe reading."""

import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from relvit_d2.conversion.checkpoint_file import UNREADABLE, damaged, is_damaged, is_pickle, verify_digest
from relvit_d2.engine.weight_average import SUFFIX
from relvit_d2.utils.digest import content_digest
from relvit_d2.utils.errors import UserError, one_line
from relvit_d2.utils.files import appearing, write_text

# Messages of a RuntimeError by which torch.save reports a full disk.
_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "unexpected pos")
_NUMBERED = re.compile(r"model_([0-9]{7,})\.pth")  # a checkpoint, with its iteration

_PICKLE = "; unpickling can run arbitrary code: if you trust the source, set MODEL.ALLOW_PICKLE True"

logger = logging.getLogger(__name__)


def download(url: str) -> str:
    """Download a file by Detectron2's ``PathManager``, or take it from its cache; return the local path.

    Raises:
        UserError: the file cannot be downloaded.
    """
    try:
        path = PathManager.get_local_path(urlparse(url)._replace(query="").geturl())
    except Exception as error:  # the exceptions depend on the protocol
        reason = one_line(error, 160) or type(error).__name__
        raise UserError(
            f"'{url}' could not be downloaded ({reason}): check the address and the network, or download the file "
            "elsewhere and set MODEL.WEIGHTS to its path"
        ) from error
    if not Path(path).is_file():
        raise UserError(f"'{url}' is not a URL of a file that can be downloaded: correct MODEL.WEIGHTS")
    return path


def check_space(folder: Path, needed: float, least: float | None = None) -> None:
    """Check that the disk of ``folder`` has ``needed`` bytes for the checkpoints of a run that is about to start.

    Args:
        folder: an existing folder.
        needed: bytes of all checkpoints of the run.
        least: bytes with which a warning suffices, since space may become free during the run; None: ``needed``.

    Raises:
        UserError: it has fewer.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = (
            f"the checkpoints in '{folder}' need {needed / 2**20:,.0f} MiB, but {free / 2**20:,.0f} MiB are free: "
            "free space, choose another OUTPUT_DIR, or keep fewer with SOLVER.CHECKPOINT_MAX_TO_KEEP"
        )
        if least is None or free < least:
            raise UserError(message)
        logger.warning(message)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes; files hold tensors and plain values only.

    A file is written under a temporary name in the same folder, flushed to disk and renamed, and then the pointer
    ``last_checkpoint`` in the same way. If the process is killed, the previous checkpoint is intact. The entry
    ``digest`` of a file is the :func:`relvit_d2.utils.digest.content_digest` of the others and is verified on loading.

    Args:
        model, save_dir, checkpointables: as Detectron2's.
        min_match: required fraction of the model's values that a checkpoint provides, 0..1.
        allow_pickle: read pickles, which can run arbitrary code.

    Attributes:
        validate: called with the content of a file before it is loaded; raises to refuse it.
    """

    validate: Callable[[dict[str, Any]], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        min_match: float = 1.0,
        allow_pickle: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._min_match, self._allow_pickle = min_match, allow_pickle

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``NAME.pth`` and point ``last_checkpoint`` to it.

        Raises:
            UserError: the file cannot be written; the previous one is unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        self._write(f"{name}.pth", self.state() | kwargs)
        self.tag_last_checkpoint(f"{name}.pth")

    def state(self) -> dict[str, Any]:
        """Return the weights as ``model``, and the state of each checkpointable by its name."""
        return {"model": self.model.state_dict()} | {key: obj.state_dict() for key, obj in self.checkpointables.items()}

    def save_best(self, state: Mapping[str, Any], **kwargs: Any) -> None:
        """Write the weights in ``state`` as ``model_best.pth``, and their moving average, if any, in the same way.

        ``last_checkpoint`` is unchanged.

        Args:
            state: as of :meth:`state`, or the content of a checkpoint.
            kwargs: further entries of the files.
        """
        self._write("model_best.pth", {"model": state["model"]} | kwargs)
        if "ema" in state:
            self.save_average("model_best", state, **kwargs)

    def save_average(self, name: str, state: Mapping[str, Any], **kwargs: Any) -> None:
        """Write the moving average in ``state`` as the weights in ``NAME_ema.pth``; see :meth:`save_best`."""
        self._write(f"{name}{SUFFIX}.pth", {"model": state["ema"]["model"]} | kwargs)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        path = Path(self.save_dir) / name
        data["digest"] = content_digest(data)
        try:
            with appearing(path) as part:
                torch.save(data, part)
        except RuntimeError as error:
            if not any(message in str(error) for message in _WRITE_ERRORS):
                raise
            free = shutil.disk_usage(path.parent).free / 2**20
            raise UserError(
                f"checkpoint '{path}' could not be written with {free:.0f} MiB of free disk space; the previous one is "
                "unchanged: free space or choose another OUTPUT_DIR, then continue with --resume"
            ) from error
        self.logger.info(f"Saved checkpoint {path}")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point ``last_checkpoint`` to a file in the same folder."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """Return the path of the file that ``last_checkpoint`` names, which may be missing; "" without a pointer.

        Raises:
            UserError: the pointer cannot be read or leads out of its folder.
        """
        if not self.has_checkpoint():
            return ""
        pointer = Path(self.save_dir) / "last_checkpoint"
        try:
            name = pointer.read_text(encoding="utf-8", errors="replace").strip().replace("\0", "?")
        except OSError as error:
            raise UserError(f"'{pointer}' cannot be read ({error.strerror}): remove it") from error
        if Path(name).name != name or name == "..":
            raise UserError(
                f"'{pointer}' contains '{name[:80]}', not the name of a file in its folder: correct it, or remove it "
                "to resume from the newest checkpoint"
            )
        return os.path.join(self.save_dir, name)  # noqa: PTH118  (the folder itself for an empty pointer)

    def newest_intact(self, run: str | None) -> str:
        """Return the path of a run's newest intact checkpoint and log the damaged ones that were passed over.

        It is that of ``last_checkpoint`` or, if this is damaged or missing, the one of the highest iteration before it.

        Args:
            run: entry ``run`` of the checkpoints; others are ignored unless ``last_checkpoint`` names them. None: any.

        Returns:
            "" if the folder has no checkpoint of the run.

        Raises:
            UserError: all are damaged, or ``last_checkpoint`` leads out of the folder.
        """
        folder, pointed, problems = Path(self.save_dir), self.get_checkpoint_file(), list[str]()
        if pointed and self.read_intact(pointed, problems):
            return pointed
        newest = _NUMBERED.fullmatch(Path(pointed).name)
        limit = int(newest[1]) if newest else math.inf
        files = {str(path): int(m[1]) for path in folder.glob("*.pth") if (m := _NUMBERED.fullmatch(path.name))}
        final = str(folder / "model_final.pth")  # of an earlier iteration, if MAX_ITER was raised
        if final != pointed and Path(final).exists() and (content := self.read_intact(final, problems)):
            files[final] = content.get("iteration", -1)
        for path in sorted(files, key=lambda path: files[path], reverse=True):
            if path == pointed or files[path] > limit:
                continue
            if (content := self.read_intact(path, problems)) and run in (None, content.get("run")):
                for problem in problems:
                    self.logger.warning(f"passed over: {problem}")
                self.logger.warning(f"'{path}' is the newest intact checkpoint: the run continues from it")
                return path
        if problems:
            raise UserError(
                f"OUTPUT_DIR '{folder}' has no intact checkpoint ({'; '.join(problems[:2])}): restore one from a copy, "
                "or start again without --resume"
            )
        return ""

    def read_intact(self, path: str, problems: list[str]) -> dict[str, Any] | None:
        """Return the content of a checkpoint; if it cannot be read, add a message to ``problems`` and return None."""
        self._parsed_url_during_load: Any = urlparse("")  # Detectron2 requires it
        try:
            return self._load_file(path)
        except UserError as error:
            problems.append(str(error))
            return None
        finally:
            self._parsed_url_during_load = None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; arguments and result as Detectron2's.

        Raises:
            UserError: the file is missing, cannot be downloaded, is not a checkpoint, or does not fit the model or the
                optimiser.
        """
        if path and "://" in path:
            download(path)  # into the cache that Detectron2 reads
        elif path and not os.path.isfile(path):  # noqa: PTH113  (False for a name that is too long)
            raise UserError(
                f"checkpoint '{path}' does not exist; check MODEL.WEIGHTS, or last_checkpoint when resuming"
            )
        try:
            return super().load(path, *args, **kwargs)
        except ValueError as error:  # from the optimiser
            raise UserError(f"'{path}' was written with another configuration: {error}") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 does not reset it after an exception

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")) and not self._allow_pickle:
            raise UserError(f"'{filename}' is a pickle{_PICKLE}")
        unreadable = (
            f"'{filename}' is not a readable checkpoint of tensors and plain values; give a model_*.pth or an "
            "encoder.safetensors"
        )
        try:
            content = super()._load_file(filename)
        except (*UNREADABLE, AttributeError) as error:
            if isinstance(error, OSError) and error.filename:  # without a name, the content is damaged
                raise UserError(f"checkpoint '{filename}' cannot be read ({error.strerror})") from error
            if is_damaged(Path(filename)):
                raise UserError(f"{damaged(Path(filename))}, or give an earlier checkpoint") from error
            needs_code = isinstance(error, pickle.UnpicklingError) and is_pickle(Path(filename))
            raise UserError(unreadable + _PICKLE * (needs_code and not self._allow_pickle)) from error
        if not (isinstance(content, dict) and isinstance(content["model"], dict)):
            raise UserError(unreadable)
        return content

    def _torch_load(self, f: str) -> dict[str, Any]:
        content = torch.load(f, map_location="cpu", weights_only=not self._allow_pickle)
        if not verify_digest(content, Path(f)):
            self.logger.info(f"'{f}' has no digest: changed values are not detected")
        return content

    def _load_model(self, checkpoint: Any) -> Any:
        if self.validate is not None:
            self.validate(checkpoint)
        incompatible = super()._load_model(checkpoint)
        state = self.model.state_dict()
        # Some tensors of another shape are listed as missing too.
        unmatched = list(dict.fromkeys([*incompatible.missing_keys, *(n for n, *_ in incompatible.incorrect_shapes)]))
        total = sum(value.numel() for value in state.values())
        matched = 1 - sum(state[name].numel() for name in unmatched) / max(total, 1)
        if matched < self._min_match:
            shapes = [
                f"{name} {list(saved)}, here {list(current)}" for name, saved, current in incompatible.incorrect_shapes
            ]
            first = "; ".join((shapes or unmatched)[:2])
            raise UserError(
                f"the checkpoint fits only {matched:.1%} of the model's values ({first}); "
                "give a checkpoint of this model, or set the keys of its training"
            )
        return incompatible
