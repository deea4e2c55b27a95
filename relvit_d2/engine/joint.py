"""Joint training of a task with pretext tasks."""

import logging

from relvit_d2.encoders import Encoder

logger = logging.getLogger(__name__)


def warn_position_leak(encoder: Encoder) -> None:
    """Warn that pretext accuracies are uninformative if the encoder has position information."""
    if encoder.has_position_information:
        logger.warning(
            "joint training does not permute patches, and the encoder has position information, so the pretext tasks "
            "can be solved without the patch contents: their accuracies are not informative"
        )
