"""The model of classification: what is seen of a batch, the encoder, a linear head; the pretext heads in joint mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from relvit_d2.classification.augmentation import Augmentation, AugmentationConfig
from relvit_d2.encoders import Encoder, encoder_from_keys
from relvit_d2.engine.joint import warn_position_leak
from relvit_d2.pretext.task import PretextTask, pooling
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import Metric

POOLS = ("cls", "mean")


class Classifier(nn.Module):
    """An encoder and a linear head.

    Args:
        encoder: what the head reads.
        classes: how many there are.
        pool: what the head reads. ``cls``: the class token, or the mean of the patch tokens if the encoder has no class
            token (like the authors' code, models/relvit.py:218-227). ``mean``: always the mean of the patch tokens.

    Raises:
        UserError: for another ``pool``.
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
        summary, tokens = self.encoder.pooled_features(pixels)
        if self.pool == "mean":
            summary = tokens.mean(1)
        with torch.autocast(summary.device.type, enabled=False):
            return self.head(summary.float()), tokens


class ClassificationModel(nn.Module):
    """uint8 images and labels to losses and accuracies.

    Args:
        network: what is trained.
        augmentation: on the device of the images.
        pretext: the tasks of joint training, told over the encoder's own grid.
        mix: timm's mixup and cutmix: pixels and labels to mixed ones; None for none.
        decay: of the mean of the network's weights that evaluation looks at; 0 for the weights themselves.
    """

    def __init__(
        self,
        network: Classifier,
        augmentation: Augmentation,
        pretext: PretextTask | None = None,
        mix: Mixup | None = None,
        decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.augmentation, self.pretext, self.mix = network, augmentation, pretext, mix
        self.average = ModelEmaV3(network, decay).requires_grad_(False) if decay else None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor | Metric[Any]]:
        """Take a training batch of :class:`relvit_d2.data.images.batches.TrainingBatches`; return losses and metrics.

        ``loss_class`` and the accuracy ``class`` (of the unmixed labels), in joint mode those of the pretext tasks.
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

    def evaluated(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the scores and tokens of a batch with fixed views, by the mean of the weights if there is one."""
        images = batch["images"].to(self.device, non_blocking=True)
        network = self.network if self.average is None else self.average.module
        return network(self.augmentation.evaluate(images, batch["sizes"]))

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return self.network.head.weight.device

    @property
    def encoder(self) -> Encoder:
        """The encoder that is evaluated and exported."""
        network = self.network if self.average is None else self.average.module
        return network.encoder  # type: ignore[return-value]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to evaluation, without gradients, inside the block."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def follow(self) -> None:
        """Take one step of the mean of the weights towards the weights, if there is a mean."""
        if self.average is not None:
            self.average.update(self.network)

    def restart_average(self) -> None:
        """Let the mean of the weights, if there is one, be the weights."""
        if self.average is not None:
            self.average.module.load_state_dict(self.network.state_dict())


def build_classifier(cfg: CfgNode, classes: int) -> ClassificationModel:
    """Build the model of ``classes`` classes on ``MODEL.DEVICE``.

    Raises:
        UserError: for keys that contradict each other or are out of range.
    """
    view, decay = cfg.INPUT.VIEW, cfg.SOLVER.EMA
    if not 0 <= decay < 1:
        raise UserError(f"SOLVER.EMA {decay} is no decay: give 0 for none, or less than 1, such as 0.9999")
    if len(view.SCALE) != 2 or not 0 < view.SCALE[0] <= view.SCALE[1] <= 1:
        raise UserError(
            f"INPUT.VIEW.SCALE {list(view.SCALE)} is no range of shares; give two numbers, such as [0.08, 1]"
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
        warn_position_leak(network.encoder)
        rows, cols = (-(-side // pooling(cfg.PRETEXT)) for side in network.encoder.grid(view.SIZE, view.SIZE))
        pretext = PretextTask.from_keys(network.encoder.dim, (rows, cols), cfg.PRETEXT)
    model = ClassificationModel(network, augmentation, pretext, _mix(cfg, classes), decay)
    return model.to(cfg.MODEL.DEVICE)


def _mix(cfg: CfgNode, classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix, which draw from NumPy's global generator, seeded at each iteration's start."""
    mixup, cutmix = cfg.INPUT.VIEW.MIXUP, cfg.INPUT.VIEW.CUTMIX
    if min(mixup, cutmix) < 0:
        raise UserError(f"INPUT.VIEW.MIXUP {mixup} and CUTMIX {cutmix}: give 0 for none, or more")
    if not (mixup or cutmix):
        return None
    share = cfg.SOLVER.IMS_PER_BATCH // (comm.get_world_size() * cfg.SOLVER.GRAD_ACCUM_STEPS)
    if share % 2:
        raise UserError(
            f"INPUT.VIEW.MIXUP and CUTMIX mix images in pairs, but {share} of SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH} come at a time: choose an even number"
        )
    return Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=classes)
