"""What joint training says, whatever it is joined with."""

import logging

from relvit_d2.encoders import Encoder

logger = logging.getLogger(__name__)


def warn_position_leak(encoder: Encoder) -> None:
    """Warn that accuracies say little where images are seen as they are by an encoder that carries positions."""
    if encoder.has_position_information:
        logger.warning(
            "joint training sees images as they are and the encoder carries positions, so its pretext tasks can be "
            "solved without a look at the patches: their accuracies say little"
        )
