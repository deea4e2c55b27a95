"""The classification model: augmentation, encoder and linear head; in joint training the pretext heads too."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from timm.data.mixup import Mixup
from torch import Tensor, nn

from relvit_d2.classification.augmentation import Augmentation, AugmentationConfig
from relvit_d2.encoders import Encoder, encoder_from_keys
from relvit_d2.pretext.task import PretextTask, pooling
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import Metric

POOLS = ("cls", "mean")


class Classifier(nn.Module):
    """An encoder and a linear head.

    Args:
        pool: input of the head. ``cls``: the class token, or the mean of the patch tokens if the encoder has no class
            token (like the authors' code, models/relvit.py:218-227). ``mean``: always the mean of the patch tokens.

    Raises:
        UserError: if ``pool`` has another value.
    """

    def __init__(self, encoder: Encoder, classes: int, pool: str = "cls") -> None:
        super().__init__()
        if pool not in POOLS:
            raise UserError(f"MODEL.CLASSIFIER.POOL '{pool}' is unknown; give {' or '.join(POOLS)}")
        self.encoder, self.head, self.pool = encoder, nn.Linear(encoder.dim, classes), pool
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalised images ``(B, 3, H, W)`` to float32 scores ``(B, classes)`` and tokens ``(B, N, dim)``."""
        pooled, tokens = self.encoder.pooled_features(pixels)
        if self.pool == "mean":
            pooled = tokens.mean(1)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.float()), tokens


class ClassificationModel(nn.Module):
    """Maps uint8 images and labels to losses and metrics.

    Args:
        network: the trained part.
        augmentation: maps images to the encoder's input.
        pretext: the tasks of joint training, on the encoder's grid.
        mix: timm's mixup and cutmix; None: neither.
    """

    def __init__(
        self,
        network: Classifier,
        augmentation: Augmentation,
        pretext: PretextTask | None = None,
        mix: Mixup | None = None,
    ) -> None:
        super().__init__()
        self.network, self.augmentation, self.pretext, self.mix = network, augmentation, pretext, mix

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor | Metric[Any]]:
        """Map a batch of :class:`relvit_d2.data.images.batches.TrainingBatches` to losses and metrics.

        They are ``loss_class``, the accuracy ``class`` on the unmixed labels, and those of the pretext tasks.
        """
        images = batch["images"].to(self.device, non_blocking=True)
        pixels = self.augmentation.train(images, batch["sizes"], batch["keys"])
        labels = target = batch["labels"].to(self.device, non_blocking=True)
        if self.mix:
            pixels, target = self.mix(pixels, labels)
        scores, tokens = self.network(pixels)
        outputs: dict[str, Tensor | Metric[Any]] = {
            "loss_class": F.cross_entropy(scores, target),
            "class": Metric((scores.argmax(1) == labels).float().mean()),
        }
        if self.pretext:
            last = tokens.mT.unflatten(2, self.network.encoder.grid(*pixels.shape[2:]))
            tokens, layout = self.pretext.pooled(last)
            outputs |= self.pretext(tokens, layout)
        return outputs

    @torch.no_grad()
    def evaluated(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return scores and tokens of a batch with fixed views."""
        images = batch["images"].to(self.device, non_blocking=True)
        return self.network(self.augmentation.evaluate(images, batch["sizes"]))

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.head.weight.device

    @property
    def encoder(self) -> Encoder:
        """The encoder of the network."""
        return self.network.encoder


def build_classifier(cfg: CfgNode, classes: int) -> ClassificationModel:
    """Build the model for ``classes`` classes on ``MODEL.DEVICE``."""
    view = cfg.INPUT.VIEW
    if len(view.SCALE) != 2 or not 0 < view.SCALE[0] <= view.SCALE[1] <= 1:
        raise UserError(
            f"INPUT.VIEW.SCALE {list(view.SCALE)} is not a range of fractions; give two numbers, such as [0.08, 1]"
        )
    augmentation = Augmentation(
        AugmentationConfig(
            size=view.SIZE,
            crop=view.CROP,
            pad=view.PAD,
            scale=tuple(view.SCALE),
            flip=view.FLIP,
            centre=view.CENTRE,
            randaugment=view.RANDAUGMENT,
            magnitude=view.MAGNITUDE,
            mean=tuple(value / 255 for value in cfg.MODEL.PIXEL_MEAN),
            std=tuple(value / 255 for value in cfg.MODEL.PIXEL_STD),
        )
    )
    network = Classifier(encoder_from_keys(cfg.MODEL), classes, cfg.MODEL.CLASSIFIER.POOL)
    pretext = None
    if cfg.MODEL.RELVIT.JOINT:
        network.encoder.check_pretext()
        network.encoder.warn_position_leak()
        rows, cols = (-(-side // pooling(cfg.PRETEXT)) for side in network.encoder.grid(view.SIZE, view.SIZE))
        pretext = PretextTask.from_keys(network.encoder.dim, (rows, cols), cfg.PRETEXT)
    return ClassificationModel(network, augmentation, pretext, _mix(cfg, classes)).to(cfg.MODEL.DEVICE)


def _mix(cfg: CfgNode, classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix, which use NumPy's global generator, seeded before each iteration."""
    mixup, cutmix = cfg.INPUT.VIEW.MIXUP, cfg.INPUT.VIEW.CUTMIX
    if min(mixup, cutmix) < 0:
        raise UserError(f"INPUT.VIEW.MIXUP {mixup} and CUTMIX {cutmix}: give 0 for none, or more")
    if not (mixup or cutmix):
        return None
    count = cfg.SOLVER.IMS_PER_BATCH // (comm.get_world_size() * cfg.SOLVER.GRAD_ACCUM_STEPS)
    if count % 2:
        raise UserError(
            f"INPUT.VIEW.MIXUP and CUTMIX need an even number of images per process and accumulation step, but with "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} it is {count}: change the batch size"
        )
    return Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=classes)
