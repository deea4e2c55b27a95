"""Weights into a script's model, with proof that a pre-trained encoder arrived."""

import logging

from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.conversion.converted import TOLERANCE
from relvit_d2.conversion.encoder_file import ENOUGH, MatchReport, feature_difference, load_encoder
from relvit_d2.conversion.timm_hub import is_published
from relvit_d2.encoders import Encoder
from relvit_d2.engine.checkpoint import Checkpointer, download
from relvit_d2.utils.errors import UserError

logger = logging.getLogger(__name__)


def holds_encoder(weights: str) -> bool:
    """Whether ``MODEL.WEIGHTS`` names an ``encoder.safetensors`` or timm's weights, ``timm:NAME``."""
    return weights.endswith(".safetensors") or is_published(weights)


def load_weights(cfg: CfgNode, model: nn.Module, encoder: Encoder, input_format: str) -> None:
    """Load ``MODEL.WEIGHTS``: what :func:`holds_encoder`, a checkpoint of the whole model, or nothing.

    Args:
        cfg: the config.
        model: takes a checkpoint.
        encoder: the part of it that takes an encoder's weights.
        input_format: see :func:`load_proved`.

    Raises:
        UserError: if the file is missing, is of something else, or features differ (:func:`load_proved`).
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        logger.info("MODEL.WEIGHTS is empty: training from scratch")
    elif holds_encoder(weights):
        load_proved(cfg, encoder, weights, input_format)
    else:
        checkpointer = Checkpointer(model, enough=ENOUGH, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        checkpointer.load(weights, checkpointables=[])


def load_proved(cfg: CfgNode, encoder: Encoder, weights: str, input_format: str) -> None:
    """Load ``weights`` into ``encoder``, log what matched, and run both encoders on one image.

    Args:
        cfg: the script's config; its pixel statistics must be those of the weights.
        encoder: what the weights go into.
        weights: see :func:`holds_encoder`.
        input_format: order of the channels that the encoder is fed, such as ``RGB``.

    Raises:
        UserError: if the weights are missing, do not fit or are for other pixels, or the features differ.
    """
    weights = download(weights) if "://" in weights else weights
    report = load_encoder(encoder, weights)
    _check_pixels(cfg, report, input_format)
    logger.info(str(report))
    difference = feature_difference(encoder, weights)
    if not difference <= TOLERANCE:
        raise UserError(
            f"after loading '{weights}' the features differ by {difference:.1e} from those of the encoder it "
            "describes; check that MODEL.ENCODER says what pre-training used"
        )
    if left_out := encoder.lacks(report.metadata["encoder"]):
        logger.warning(f"left out here: {', '.join(left_out)} of '{weights}' (MODEL.ENCODER.POS_EMBED False)")
    note = f" (without the fresh {', '.join(report.fresh)})" if report.fresh else ""
    logger.info(f"features of the pre-trained encoder and of this one agree to {difference:.1e}{note}")


def _check_pixels(cfg: CfgNode, report: MatchReport, input_format: str) -> None:
    """Refuse to feed an encoder pixels of another scale or channel order than it was pre-trained on."""
    for key, ours, name in (
        ("INPUT.FORMAT", input_format, "input_format"),
        ("MODEL.PIXEL_MEAN", list(cfg.MODEL.PIXEL_MEAN), "pixel_mean"),
        ("MODEL.PIXEL_STD", list(cfg.MODEL.PIXEL_STD), "pixel_std"),
    ):
        theirs = report.metadata.get(name, ours)
        if theirs != ours:
            raise UserError(f"'{report.path}' was pre-trained with {key} {theirs}, not {ours}; set {key} to that")
