"""Classification: an encoder with a linear head, and probes of a frozen encoder."""
