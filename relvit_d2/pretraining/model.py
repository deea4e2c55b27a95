"""The pre-training model: views, encoder and pretext heads."""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from relvit_d2.encoders import Encoder, encoder_from_keys
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.monitor import FeatureStatistics
from relvit_d2.pretext.resampling import random_tokens
from relvit_d2.pretext.task import PretextTask, pooling
from relvit_d2.pretext.views import MegaPatches, ViewConfig, Views
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import Metric, as_scalars

logger = logging.getLogger(__name__)


class PretrainingModel(nn.Module):
    """Maps uint8 images to the losses and metrics of the pretext tasks.

    Args:
        task: the pretext heads.
        views: augmentation on the model's device; its patches correspond to the tokens of the heads.
        keep: fraction of the tokens of a training view, above 0 to 1, that enter the encoder's blocks and the heads:
            a random subset of ceil(keep * N). Evaluation uses all tokens, so that its metrics do not depend on it.
    """

    def __init__(self, encoder: Encoder, task: PretextTask, views: Views, keep: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.task, self.views, self.keep = encoder, task, views, keep

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor | Metric[Any]]:
        """Return the losses and metrics of a batch of :func:`relvit_d2.data.detection.mapper.pad_images`.

        The batch also has the ``keys`` of the images (:meth:`Views.train`).
        """
        pixels, layout = self.make_views(batch)
        kept = None
        if self.training and self.keep < 1:
            cells = math.prod(layout.grid)
            # Rounded, since 0.07 * 100 is slightly more than 7.
            count = math.ceil(round(self.keep * cells, 9)) or 1
            kept = random_tokens(batch["keys"].to(pixels.device, non_blocking=True), cells, count)
            layout = layout.selected(kept)
        return self.task(self.tokens(pixels, kept), layout)

    def tokens(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the tokens of views ``(B, C, h, w)`` for the heads, ``(B, N, dim)`` in row-major order.

        With ``kept``, ``(B, K)`` int64, those of a subset (:meth:`relvit_d2.encoders.Encoder.tokens`).
        """
        if self.task.pool == 1:
            return self.encoder.tokens(pixels, kept)
        return self.task.pooled(self.encoder(pixels)[self.encoder.last])[0]

    def make_views(self, batch: dict[str, Any]) -> tuple[Tensor, PatchLayout]:
        """Return the views of a batch: random in training, fixed in evaluation."""
        images, sizes = batch["images"].to(next(self.parameters()).device, non_blocking=True), batch["sizes"]
        return (self.views.train if self.training else self.views.evaluate)(images, sizes, batch["keys"])


def build_pretraining_model(cfg: CfgNode) -> PretrainingModel:
    """Build the model from the keys ``MODEL.ENCODER`` and ``PRETEXT``, on ``MODEL.DEVICE``."""
    encoder = encoder_from_keys(cfg.MODEL)
    encoder.check_pretext()
    pretext = cfg.PRETEXT
    for key, count in (("CROP_SCALE", 2), ("JITTER", 4)):
        if len(pretext[key]) != count:
            raise UserError(f"PRETEXT.{key} {list(pretext[key])} has {len(pretext[key])} numbers; give {count}")
    stride = encoder.strides[encoder.last] * pooling(pretext)
    if pretext.IMAGE_SIZE % stride:
        below = pretext.IMAGE_SIZE // stride * stride
        raise UserError(
            f"PRETEXT.IMAGE_SIZE {pretext.IMAGE_SIZE} is not a multiple of {stride}, the encoder's stride times "
            f"PRETEXT.POOL: set it to {below} or {below + stride}"
        )
    keep = _kept_tokens(cfg, encoder)
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
        logger.info("PRETEXT.GRAY_PROB and JITTER of saturation and hue have no effect: INPUT.CHANNELS is not 3")
    task = PretextTask.from_keys(encoder.dim, views.config.grid, pretext)
    return PretrainingModel(encoder, task, views, keep).to(cfg.MODEL.DEVICE)


def _kept_tokens(cfg: CfgNode, encoder: Encoder) -> float:
    """Return ``PRETEXT.KEEP``; 1, with a warning, where all tokens are needed."""
    keep: float = cfg.PRETEXT.KEEP
    if not 0 < keep <= 1:
        raise UserError(f"PRETEXT.KEEP {keep} is out of range: give more than 0, at most 1")
    if keep == 1 or (encoder.supports_subsets and cfg.PRETEXT.POOL == 1):
        return keep
    needs_all = f"PRETEXT.POOL {cfg.PRETEXT.POOL}"
    if not encoder.supports_subsets:
        keys = {f"MODEL.ENCODER.{key}": cfg.MODEL.ENCODER[key] for key in ("WINDOW", "REL_POS")}
        given = " and ".join(f"{key} {value}" for key, value in keys.items() if value)
        needs_all = f"encoder '{encoder.name}'{f' with {given}' if given else ''}"
    logger.warning(f"PRETEXT.KEEP {keep} has no effect: {needs_all} needs all tokens")
    return 1.0


def _mega_patches(keys: CfgNode) -> MegaPatches | None:
    return MegaPatches(keys.M, keys.UNIT or None, keys.KEEP_SIZE, keys.SHARED_CUTS) if keys.M else None


def _permutes(setting: str, encoder: Encoder) -> bool:
    """Return whether patches are permuted, for ``PRETEXT.PERMUTE``."""
    if setting not in ("auto", "always", "never"):
        raise UserError(f"PRETEXT.PERMUTE '{setting}' is unknown; give auto, always or never")
    if setting != "auto":
        return setting == "always"
    positions = encoder.has_position_information
    logger.info(
        f"patches are {'' if positions else 'not '}permuted: the encoder has {'' if positions else 'no '}position "
        "information (PRETEXT.PERMUTE auto)"
    )
    return positions


@torch.no_grad()
def evaluate_pretext(model: PretrainingModel, batches: Iterable[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """Evaluate the batches of all processes with fixed views; return ({}, 0) in all processes but the first.

    Returns:
        Means over the images of all losses and metrics; ``feature_std`` and ``feature_rank`` of all tokens
        (:class:`relvit_d2.pretext.monitor.FeatureStatistics`); and the number of images.
    """
    sums: Any = Counter()
    statistics = FeatureStatistics(model.encoder.dim)
    with inference_context(model):
        for batch in batches:
            pixels, layout = model.make_views(batch)
            tokens = model.tokens(pixels)
            statistics.update(tokens)
            for name, value in as_scalars(model.task(tokens, layout)).items():
                sums[name] += float(value) * len(pixels)
            sums["images"] += len(pixels)
    parts = comm.gather((sums, statistics))
    if not parts:
        return {}, 0
    sums, statistics = parts[0]
    for other_sums, other_statistics in parts[1:]:
        sums.update(other_sums)
        statistics += other_statistics
    if not (images := sums.pop("images", 0)):
        return {}, 0
    means = {name: value / images for name, value in sums.items()}
    return means | {"feature_std": statistics.std(), "feature_rank": statistics.rank()}, images


@torch.no_grad()
def image_features(model: PretrainingModel, batches: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the mean token of each unaugmented image, ``(n, dim)`` float32, and its key, ``(n,)``, on the CPU."""
    views = Views(model.views.config.plain())
    features, keys = [torch.empty(0, model.encoder.dim)], [torch.empty(0, dtype=torch.int64)]
    with inference_context(model):
        for batch in batches:
            images = batch["images"].to(next(model.parameters()).device)
            pixels, _ = views.evaluate(images, batch["sizes"], batch["keys"])
            features.append(model.encoder.tokens(pixels).float().mean(1).cpu())
            keys.append(batch["keys"])
    return torch.cat(features), torch.cat(keys)
