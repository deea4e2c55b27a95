"""Detectron2 checkpoints that appear whole or not at all."""

import pickle
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from relvit_d2.errors import UserError
from relvit_d2.files import appearing, write_text


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes and files that hold tensors and plain values only.

    A file is written under a temporary name in the same folder, flushed to the disk and renamed; then the
    pointer ``last_checkpoint`` the same way. A process killed at any moment leaves the previous checkpoint.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``NAME.pth`` and point ``last_checkpoint`` to it.

        Raises:
            UserError: if the file cannot be written; what was there before is untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data |= kwargs
        path = Path(self.save_dir) / f"{name}.pth"
        try:
            with appearing(path) as part:
                torch.save(data, part)
            self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"checkpoint '{path}' could not be written ({error}); the previous one is untouched: "
                "free space or choose another OUTPUT_DIR, then go on with --resume"
            ) from error
        self.logger.info(f"Saved checkpoint {path}")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point ``last_checkpoint`` to a file of the same folder."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; arguments and result as Detectron2's.

        Raises:
            UserError: if the file is missing or is not a checkpoint, or none of its tensors fit the model.
        """
        if path and "://" not in path and not Path(path).is_file():
            raise UserError(f"weights file '{path}' does not exist; check MODEL.WEIGHTS")
        try:
            return super().load(path, *args, **kwargs)
        except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, AttributeError, TypeError) as error:
            self._parsed_url_during_load = None
            first = str(error).split("\n", 1)[0]
            raise UserError(
                f"'{path}' is not a readable checkpoint ({first}); give a model_*.pth or an encoder.safetensors"
            ) from error

    def _load_model(self, checkpoint: Any) -> Any:
        own = set(self.model.state_dict())
        given = {name.removeprefix("module.") for name in checkpoint["model"]}
        if not own & given:
            raise UserError(
                "no tensor of the weights file has the name of a tensor of this model; "
                "give a checkpoint of the same kind of model (MODEL.WEIGHTS)"
            )
        return super()._load_model(checkpoint)
