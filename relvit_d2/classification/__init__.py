"""An encoder with a linear head: the model of the classification script, its probes and its table."""
