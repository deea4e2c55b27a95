"""The model of pre-training: views of a batch, the encoder, the pretext heads."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from relvit_d2.encoders import Encoder, encoder_from_keys
from relvit_d2.engine import weights
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.monitor import FeatureStatistics
from relvit_d2.pretext.task import PretextTask, pooling
from relvit_d2.pretext.views import MegaPatches, ViewConfig, Views
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import Metric, as_scalars

logger = logging.getLogger(__name__)


class PretrainingModel(nn.Module):
    """uint8 images to the losses and accuracies of the pretext tasks.

    Args:
        encoder: what is trained and kept.
        task: the heads, trained and dropped.
        views: augmentation, on the device of the model; its patches are those of the tokens that the heads read.
    """

    def __init__(self, encoder: Encoder, task: PretextTask, views: Views) -> None:
        super().__init__()
        self.encoder, self.task, self.views = encoder, task, views

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor | Metric[Any]]:
        """Take a batch of :func:`relvit_d2.data.detection.mapper.pad_images`; return losses and metrics.

        The batch holds the images' ``keys`` too, from which the views are hashed: random ones in training
        (:meth:`Views.train`), fixed ones in evaluation.
        """
        pixels, layout = self.look(batch)
        return self.task(self.tokens(pixels), layout)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return what the heads read of views ``(B, C, h, w)``: ``(B, N, dim)``, row by row."""
        if self.task.pool == 1:
            return self.encoder.tokens(pixels)
        return self.task.pooled(self.encoder(pixels)[self.encoder.last])[0]

    def look(self, batch: dict[str, Any]) -> tuple[Tensor, PatchLayout]:
        """Return the views of a batch: see :meth:`forward`."""
        images, sizes = batch["images"].to(next(self.parameters()).device, non_blocking=True), batch["sizes"]
        return (self.views.train if self.training else self.views.evaluate)(images, sizes, batch["keys"])


def build_pretraining_model(cfg: CfgNode) -> PretrainingModel:
    """Build the model from the keys ``MODEL.ENCODER`` and ``PRETEXT``, on ``MODEL.DEVICE``.

    Raises:
        UserError: if the view's side is no multiple of the encoder's last stride.
    """
    encoder = encoder_from_keys(cfg.MODEL)
    pretext = cfg.PRETEXT
    for key, count in (("CROP_SCALE", 2), ("JITTER", 4)):
        if len(pretext[key]) != count:
            raise UserError(f"PRETEXT.{key} {list(pretext[key])} has {len(pretext[key])} numbers; give {count}")
    stride = encoder.strides[encoder.last] * pooling(pretext)
    if pretext.IMAGE_SIZE % stride:
        below = pretext.IMAGE_SIZE // stride * stride
        raise UserError(
            f"PRETEXT.IMAGE_SIZE {pretext.IMAGE_SIZE} is no multiple of {stride}, the encoder's stride times "
            f"PRETEXT.POOL; the nearest ones are {below} and {below + stride}"
        )
    views = Views(
        ViewConfig(
            size=pretext.IMAGE_SIZE,
            patch_size=stride,
            mega=_mega_patches(pretext.MEGA),
            crop_kind=pretext.CROP,
            pad=pretext.PAD,
            pad_mode=pretext.PAD_MODE,
            crop_scale=tuple(pretext.CROP_SCALE),
            flip=pretext.FLIP,
            patch_crop=pretext.PATCH_CROP,
            jitter=tuple(pretext.JITTER),
            jitter_prob=pretext.JITTER_PROB,
            gray_prob=pretext.GRAY_PROB,
            noise_prob=pretext.NOISE_PROB,
            noise_std=pretext.NOISE_STD,
            permute=_permutes(pretext.PERMUTE, encoder),
            mean=tuple(value / 255 for value in cfg.MODEL.PIXEL_MEAN),
            std=tuple(value / 255 for value in cfg.MODEL.PIXEL_STD),
        )
    )
    if cfg.INPUT.CHANNELS != 3 and (any(pretext.JITTER[2:]) or pretext.GRAY_PROB):
        logger.info("saturation, hue and gray, which are RGB's, are left alone: INPUT.CHANNELS is not 3")
    task = PretextTask.from_keys(encoder.dim, views.config.grid, pretext)
    return PretrainingModel(encoder, task, views).to(cfg.MODEL.DEVICE)


def _mega_patches(keys: CfgNode) -> MegaPatches | None:
    return MegaPatches(keys.M, keys.UNIT or None, keys.KEEP_SIZE, keys.SHARED_CUTS) if keys.M else None


def _permutes(asked: str, encoder: Encoder) -> bool:
    """Decide ``PRETEXT.PERMUTE``, and say so where it was left open."""
    if asked not in ("auto", "always", "never"):
        raise UserError(f"PRETEXT.PERMUTE '{asked}' is unknown; give auto, always or never")
    if asked != "auto":
        return asked == "always"
    why = "the encoder carries positions" if encoder.has_position_information else "the encoder carries no positions"
    logger.info(
        f"patches are {'' if encoder.has_position_information else 'not '}permuted: {why} (PRETEXT.PERMUTE auto)"
    )
    return encoder.has_position_information


@torch.no_grad()
def evaluate_pretext(model: PretrainingModel, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return scalars of the batches of all processes, with fixed views; empty in all processes but the first.

    The means over the images of all losses and metrics, and of all tokens ``feature_std`` and ``feature_rank``
    (:class:`relvit_d2.pretext.monitor.FeatureStatistics`).
    """
    was_training = model.training
    model.eval()
    sums: Any = Counter()
    statistics = FeatureStatistics(model.encoder.dim)
    for batch in batches:
        pixels, layout = model.look(batch)
        tokens = model.tokens(pixels)
        statistics.update(tokens)
        for name, value in as_scalars(model.task(tokens, layout)).items():
            sums[name] += float(value) * len(pixels)
        sums["images"] += len(pixels)
    model.train(was_training)
    parts = comm.gather((sums, statistics))
    if not parts:
        return {}
    sums, statistics = parts[0]
    for more, others in parts[1:]:
        sums.update(more)
        statistics += others
    images = sums.pop("images")
    means = {name: value / images for name, value in sums.items()}
    return means | {"feature_std": statistics.std(), "feature_rank": statistics.rank()}


@torch.no_grad()
def image_features(model: PretrainingModel, batches: Iterable[dict[str, Any]]) -> Tensor:
    """Return the mean token of each image, ``(n, dim)`` float32 on the CPU, of whole images as they are."""
    was_training = model.training
    model.eval()
    whole = Views(model.views.config.plain())
    features = [torch.empty(0, model.encoder.dim)]
    for batch in batches:
        images = batch["images"].to(next(model.parameters()).device)
        pixels, _ = whole.evaluate(images, batch["sizes"], batch["keys"])
        features.append(model.encoder.tokens(pixels).float().mean(1).cpu())
    model.train(was_training)
    return torch.cat(features)


def export_encoder(
    cfg: CfgNode, model: PretrainingModel, iterations: int, results: dict[str, Any], **more: Any
) -> Path:
    """Write the model's encoder: see :func:`relvit_d2.engine.weights.export_encoder`."""
    size = cfg.PRETEXT.IMAGE_SIZE
    return weights.export_encoder(cfg, model.encoder, size, iterations, results, pretext=cfg.PRETEXT, **more)
