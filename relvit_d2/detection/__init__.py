"""Detection: an encoder as the backbone of a Detectron2 detector."""
