"""Checks of data sets, anchors and pixel statistics; model cost; comparison of runs."""
