"""Train or evaluate a Mask R-CNN with a vision transformer as its backbone."""

from functools import partial

from relvit_d2.cli.training import add_training_arguments, run_training

EXAMPLE = "relvit-d2 train --config-file configs/demo/streets.yaml"

add_arguments = partial(add_training_arguments, task="detection")
run = partial(run_training, example=EXAMPLE)
