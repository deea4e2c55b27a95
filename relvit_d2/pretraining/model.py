"""The model of pre-training: views of a batch, the encoder, the pretext heads."""

from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from relvit_d2.encoders import Encoder, encoder_from_keys
from relvit_d2.encoders.weights import save_encoder
from relvit_d2.errors import UserError
from relvit_d2.pretext.task import PretextTask
from relvit_d2.pretext.views import ViewConfig, Views


class PretrainingModel(nn.Module):
    """uint8 images to the losses and accuracies of the pretext tasks.

    Args:
        encoder: what is trained and kept.
        task: the heads, trained and dropped.
        views: augmentation, on the device of the model.
    """

    def __init__(self, encoder: Encoder, task: PretextTask, views: Views) -> None:
        super().__init__()
        self.encoder, self.task, self.views = encoder, task, views

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Take a batch of :func:`relvit_d2.data.mapper.pad_images`; return scalars.

        In training the views are random, and the batch holds their ``generator`` and its ``share`` of the whole batch
        too (see :meth:`Views.train`). In evaluation they are fixed. Beside each ``accuracy_T`` stands ``chance_T``, the
        accuracy of the best constant answer.
        """
        device = next(self.parameters()).device
        images, sizes = batch["images"].to(device, non_blocking=True), batch["sizes"]
        with torch.no_grad():
            if self.training:
                pixels, layout = self.views.train(images, sizes, batch["generator"], batch["share"])
            else:
                pixels, layout = self.views.evaluate(images, sizes)
        outputs = self.task(self.encoder.tokens(pixels), layout)
        chances = {f"chance_{name}": torch.tensor(value) for name, value in self.task.chance().items()}
        return outputs | chances


def build_pretraining_model(cfg: CfgNode) -> PretrainingModel:
    """Build the model from the keys ``MODEL.ENCODER`` and ``PRETEXT``, on ``MODEL.DEVICE``.

    Raises:
        UserError: if the view's side is no multiple of the encoder's last stride.
    """
    encoder = encoder_from_keys(cfg.MODEL.ENCODER)
    pretext = cfg.PRETEXT
    for key, count in (("CROP_SCALE", 2), ("JITTER", 4)):
        if len(pretext[key]) != count:
            raise UserError(f"PRETEXT.{key} {list(pretext[key])} has {len(pretext[key])} numbers; give {count}")
    stride = encoder.strides[encoder.last]
    if pretext.IMAGE_SIZE % stride:
        below = pretext.IMAGE_SIZE // stride * stride
        raise UserError(
            f"PRETEXT.IMAGE_SIZE {pretext.IMAGE_SIZE} is no multiple of the encoder's stride {stride}; "
            f"the nearest ones are {below} and {below + stride}"
        )
    weights = {name.lower(): weight for name, weight in pretext.WEIGHTS.items()}
    grid = encoder.grid(pretext.IMAGE_SIZE, pretext.IMAGE_SIZE)
    task = PretextTask(encoder.dim, grid, weights, pretext.LABEL_SMOOTHING)
    views = Views(
        ViewConfig(
            size=pretext.IMAGE_SIZE,
            patch_size=stride,
            crop_scale=tuple(pretext.CROP_SCALE),
            flip=pretext.FLIP,
            patch_crop=pretext.PATCH_CROP,
            jitter=tuple(pretext.JITTER),
            jitter_prob=pretext.JITTER_PROB,
            gray_prob=pretext.GRAY_PROB,
            permute=pretext.PERMUTE,
            mean=tuple(value / 255 for value in cfg.MODEL.PIXEL_MEAN),
            std=tuple(value / 255 for value in cfg.MODEL.PIXEL_STD),
        )
    )
    return PretrainingModel(encoder, task, views).to(cfg.MODEL.DEVICE)


@torch.no_grad()
def evaluate_pretext(model: PretrainingModel, batches: Any) -> dict[str, float]:
    """Return the mean of every loss, accuracy and chance level over the batches of all processes, with fixed views.

    Empty in all processes but the first.
    """
    was_training = model.training
    model.eval()
    total = {"images": 0.0}
    for batch in batches:
        size = len(batch["sizes"])
        total["images"] += size
        for name, value in model(batch).items():
            total[name] = total.get(name, 0.0) + value.item() * size
    model.train(was_training)
    parts = comm.gather(total)
    whole = {name: sum(part.get(name, 0.0) for part in parts) for part in parts for name in part}
    count = whole.pop("images", 0.0)
    return {name: value / count for name, value in whole.items()}


def export_encoder(cfg: CfgNode, model: PretrainingModel, iterations: int, results: dict[str, float]) -> Path:
    """Write ``encoder.safetensors`` into ``OUTPUT_DIR`` and return its path.

    Args:
        cfg: the run's config.
        model: whose encoder is written.
        iterations: how many it was trained for.
        results: held-out figures.
    """
    path = Path(cfg.OUTPUT_DIR) / "encoder.safetensors"
    info = {
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "input_format": "RGB",
        "patch": model.encoder.strides[model.encoder.last],
        "image_size": cfg.PRETEXT.IMAGE_SIZE,
        "iteration": iterations,
        "data": list(cfg.DATASETS.TRAIN),
        "pretext": _plain(cfg.PRETEXT),
        "results": results,
    }
    save_encoder(model.encoder, path, info)
    return path


def _plain(node: CfgNode) -> dict[str, Any]:
    """Return a config node as plain dictionaries and values."""
    return {key: _plain(value) if isinstance(value, CfgNode) else value for key, value in node.items()}
