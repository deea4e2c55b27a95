"""Train, fine-tune or evaluate a classifier, or probe a frozen encoder."""

from functools import partial

from relvit_d2.cli.training import add_training_arguments, run_training

EXAMPLE = "relvit-d2 classify --config-file configs/cls/cifar10_vit_s4.yaml"

add_arguments = partial(add_training_arguments, task="classification")
run = partial(run_training, example=EXAMPLE)
