"""Compare training from scratch, from relational pre-training and from published weights on your data.

Arms: scratch; scratch-longer (as many seconds as pre-training and training together); joint (pretext losses added to
the training); pretrained; pretrained-mega (on mega-patches); timm:NAME (published weights); a file of weights; the last
two with +pretrained (pre-training continued from them). The first arm is the baseline. The labelled images of a share
depend on the seed and are the same for all arms. First a few iterations are measured and the time of each arm is
printed. To resume a comparison, or to add seeds, arms or shares, run the command again. The output folder contains
results.md, results.json and report.html, which are updated after each run.
"""

import argparse
import re
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

EXAMPLE = """\
relvit-d2 compare --data path/to/folder --arms scratch scratch-longer pretrained --labels 10% 100% --seeds 3 --hours 8
relvit-d2 compare --data cifar10 --labels 2% 10% --seeds 5 --pretrain-opt SOLVER.MAX_ITER 5000"""

_KEY = r"([A-Z][A-Z0-9_]*\.)+[A-Z0-9_]+|SEED|OUTPUT_DIR"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    default = ["scratch", "scratch-longer", "pretrained"]
    parser.add_argument(
        "--data",
        required=True,
        help="folder with annotated objects (COCO, VOC, YOLO) or with a folder of images for each class, or prefix of "
        "registered sets: cifar10 of cifar10_train and cifar10_test",
    )
    parser.add_argument("--arms", nargs="+", default=default, metavar="ARM", help=f"default: {' '.join(default)}")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=["100%"],
        metavar="SHARE",
        help="percentages of labelled images, such as 10%% 25%% 100%% (default 100%%)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each arm and share (default 3)")
    parser.add_argument("--hours", type=float, help="shorten all schedules by one factor to this time in total")
    parser.add_argument("--output", type=Path, help="folder of all runs (default output/compare/NAME)")
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="config of the training (default: configs/custom.yaml or configs/cls/custom.yaml)",
    )
    parser.add_argument(
        "--pretrain-config",
        default="",
        metavar="FILE",
        help="config of the pre-training (default: configs/ssl/custom.yaml)",
    )
    parser.add_argument(
        "--pretrain-opt",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="override of the pre-training's config; can be repeated",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the training's config")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments; KEY VALUE pairs at the end are not values of the option before them."""
    keys = [i for i, word in enumerate(argv) if re.fullmatch(_KEY, word)]
    first = next((i for i in keys if not argv[max(i - 1, 0)].startswith("--")), len(argv))
    args = parser.parse_args(argv[:first])
    args.opts += argv[first:]
    return args


def run(args: argparse.Namespace) -> None:
    """Run the comparison.

    Raises:
        UserError: an argument is invalid, data or weights are missing, or a run fails.
    """
    shares = [_share(word) for word in args.labels]
    for option, values in (("--arms", args.arms), ("--labels", shares)):
        if len(set(values)) < len(values):
            raise UserError(f"{option} {' '.join(map(str, values))}: give each value once")
    if len(args.arms) < 2:
        raise UserError(f"--arms {args.arms[0]} is one arm: give two or more to compare")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} is not positive: give at least 1")
    if args.hours is not None and not args.hours > 0:
        raise UserError(f"--hours {args.hours:g} is not positive: give more than 0")
    for file in filter(None, (args.config_file, args.pretrain_config)):
        find_config(file)
    from relvit_d2.engine.provenance import command_line
    from relvit_d2.experiments.compare import compare
    from relvit_d2.utils.printing import print_text

    results = compare(
        args.data,
        args.arms,
        shares,
        args.seeds,
        args.hours,
        args.output,
        args.config_file,
        args.opts,
        args.pretrain_config,
        [word for pair in args.pretrain_opt for word in pair],
        command_line(),
    )
    print_text(f"\n{results}")


def _share(word: str) -> float:
    """Parse a share of the labels in percent."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", word)
    if not match or not 0 < float(match[1]) <= 100:
        raise UserError(f"--labels {word} is not a percentage above 0 and up to 100: give shares such as 10%")
    return float(match[1])
