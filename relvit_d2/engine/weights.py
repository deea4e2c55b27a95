"""Weights into a model with an encoder in it, with proof that they arrived."""

import logging
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.encoders import Encoder
from relvit_d2.encoders.weights import ENOUGH, MatchReport, feature_difference, load_encoder
from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.errors import UserError

# Two float32 passes over the same weights differ only where kernels sum in another order.
TOLERANCE = 1e-4

logger = logging.getLogger(__name__)


def load_weights(cfg: CfgNode, model: nn.Module, encoder: Encoder, what: str) -> None:
    """Load ``MODEL.WEIGHTS``: an ``encoder.safetensors``, a checkpoint of the whole model, or nothing.

    After an encoder file was loaded, the encoder of the file and the model's are run on one image
    and must give equal features.

    Args:
        cfg: the config.
        model: takes a checkpoint.
        encoder: the part of it that takes an encoder file.
        what: the name of that part, for the log.

    Raises:
        UserError: if the file is missing, is of something else, or the features differ.
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        logger.info("MODEL.WEIGHTS is empty: training from scratch")
    elif weights.endswith(".safetensors"):
        path = Path(weights)
        report = load_encoder(encoder, path)
        _check_pixels(cfg, report)
        logger.info(str(report))
        difference = feature_difference(encoder, path)
        if not difference <= TOLERANCE:
            raise UserError(
                f"after loading '{weights}' the features differ by {difference:.1e} from those of the encoder it "
                "describes; check that MODEL.ENCODER says what pre-training used"
            )
        note = f" (without the fresh {', '.join(report.fresh)})" if report.fresh else ""
        logger.info(f"features of the pre-trained encoder and of {what} agree to {difference:.1e}{note}")
    else:
        checkpointer = Checkpointer(model, enough=ENOUGH, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        checkpointer.load(weights, checkpointables=[])


def _check_pixels(cfg: CfgNode, report: MatchReport) -> None:
    """Refuse to feed an encoder pixels of another scale or channel order than it was pre-trained on."""
    for key, ours, name in (
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, "input_format"),
        ("MODEL.PIXEL_MEAN", list(cfg.MODEL.PIXEL_MEAN), "pixel_mean"),
        ("MODEL.PIXEL_STD", list(cfg.MODEL.PIXEL_STD), "pixel_std"),
    ):
        theirs = report.metadata.get(name, ours)
        if theirs != ours:
            raise UserError(f"'{report.path}' was pre-trained with {key} {theirs}, not {ours}; set {key} to that")
