"""Print the parameters, FLOPs, memory and speed of each stage of a config's model, and the time of its schedule.

Takes a config of any task and needs no data set: one training step on random images is measured. FLOPs are those of
the forward pass, fused attention included, a multiply-add counted as two. Memory is that of the activations kept for
the backward pass. Images/s of a stage are those of its forward pass; of the whole model, those of the forward and the
backward pass, without the optimizer step.
"""

import argparse
from typing import TYPE_CHECKING

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

    from relvit_d2.analysis.model_cost import Subject

EXAMPLE = "relvit-d2 analyze --config-file configs/demo/streets.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", required=True, help="a config of any task")
    parser.add_argument("--data", help="folder of a custom data set, in place of DATASETS.TRAIN and TEST")
    parser.add_argument("--batch", type=int, help="images per measured step (default: as in training, at most 16)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: give at least 1")
    find_config(args.config_file)
    from relvit_d2.analysis.model_cost import cost_table
    from relvit_d2.config.config_file import adapt_to_machine
    from relvit_d2.data.detection.custom import config_pairs
    from relvit_d2.engine.run_setup import silence_warnings
    from relvit_d2.tasks import load_config, read_config

    silence_warnings()
    task = read_config(args.config_file, []).TASK
    if args.data and task == "classification":
        raise UserError("--data is the folder of a data set for detection or pre-training: set DATASETS.TRAIN instead")
    cfg = load_config(args.config_file, [*config_pairs(args.data, task), *args.opts])
    adapt_to_machine(cfg)
    print(cost_table(subject_of(cfg), args.batch))


def subject_of(cfg: "CfgNode") -> "Subject":
    """Return the model of a config of any task, to be measured."""
    from relvit_d2.classification.cost import classifier_subject
    from relvit_d2.detection.cost import detector_subject
    from relvit_d2.pretraining.cost import pretraining_subject

    subjects = {"detection": detector_subject, "pretrain": pretraining_subject, "classification": classifier_subject}
    return subjects[cfg.TASK](cfg)
