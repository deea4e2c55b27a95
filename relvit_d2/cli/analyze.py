"""Print the cost of a config's model by stage: parameters, operations, memory, speed, and the batch that fits.

Takes a config of any task. One training pass on random images is measured: operations are floating-point
ones of the forward pass (a multiplication and an addition count as two; fused attention included), memory is what the
pass keeps for the backward pass, images/s are those of the forward pass of a stage, and of a whole step without the
optimiser's for the model. No data set is needed.
"""

import argparse
from typing import Any

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

EXAMPLE = "relvit-d2 analyze --config-file configs/demo/streets.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", required=True, help="a config of any task")
    parser.add_argument("--batch", type=int, default=1, help="images of the measured pass (default 1)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")


def run(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        UserError: if the file is not a config of one of the tasks.
    """
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: give at least 1")
    find_config(args.config_file)
    from relvit_d2.analysis.model_cost import cost_table
    from relvit_d2.engine.run_setup import silence_warnings

    silence_warnings()
    print(cost_table(_subject(args.config_file, args.opts), args.batch))


def _subject(config_file: str, opts: list[str]) -> Any:
    """Return the ``Subject`` of a config."""
    from relvit_d2.classification.cost import classifier_subject
    from relvit_d2.config.config_file import adapt_to_machine
    from relvit_d2.detection.cost import detector_subject
    from relvit_d2.pretraining.cost import pretraining_subject
    from relvit_d2.tasks import load_config

    cfg = load_config(config_file, opts)
    adapt_to_machine(cfg)
    subjects = {
        "detection": detector_subject,
        "pretrain": pretraining_subject,
        "classification": classifier_subject,
    }
    return subjects[cfg.TASK](cfg)
