"""Weights into a detector, with proof that they arrived."""

import logging

from detectron2.modeling import GeneralizedRCNN
from fvcore.common.config import CfgNode

from relvit_d2.encoders.weights import ENOUGH
from relvit_d2.engine.checkpoint import Checkpointer
from relvit_d2.engine.encoder_weights import holds_encoder, load_proved

logger = logging.getLogger(__name__)


def load_weights(cfg: CfgNode, model: GeneralizedRCNN) -> None:
    """Load ``MODEL.WEIGHTS``: an ``encoder.safetensors``, timm's ``timm:NAME``, a detector's checkpoint, or nothing.

    Raises:
        UserError: if the file is missing, is of something else, or features differ (:func:`load_proved`).
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        logger.info("MODEL.WEIGHTS is empty: training from scratch")
    elif holds_encoder(weights):
        load_proved(cfg, model.backbone.encoder, weights, cfg.INPUT.FORMAT)
    else:
        checkpointer = Checkpointer(model, enough=ENOUGH, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        checkpointer.load(weights, checkpointables=[])
