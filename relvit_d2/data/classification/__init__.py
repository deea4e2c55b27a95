"""Classification data sets."""
