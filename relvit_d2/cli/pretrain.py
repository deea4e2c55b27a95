"""Pre-train an encoder on unlabelled images by predicting the spatial relations of their patches."""

from functools import partial

from relvit_d2.cli.training import add_training_arguments, run_training

EXAMPLE = "relvit-d2 pretrain --config-file configs/demo/ssl_streets.yaml"

add_arguments = partial(add_training_arguments, task="pretrain")
run = partial(run_training, example=EXAMPLE)
