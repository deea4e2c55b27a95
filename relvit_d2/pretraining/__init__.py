"""Self-supervised pre-training: config, model and run."""
