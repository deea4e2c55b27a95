"""Checks of data before training, anchors and pixel statistics."""
