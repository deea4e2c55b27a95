"""An encoder with the pretext heads: the model of the pre-training script."""
