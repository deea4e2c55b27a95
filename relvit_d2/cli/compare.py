"""Compare ways to train on your data: from scratch, pre-trained, from published weights; with seeds and intervals.

Arms: scratch; scratch-longer, as many seconds as pre-training and training together; joint, the pretext losses added to
the training; pretrained; pretrained-mega, on mega-patches; timm:NAME, published weights; a file of weights; and either
with +pretrained, pre-training continued from them. The first arm is the one that the others are compared with. The
labelled images of a share differ from seed to seed and are the same for all arms. A few iterations are measured first,
and the time of each arm is printed. A comparison that was cut off goes on where it stopped: give the same command, also
with more seeds, arms or shares. results.md, results.json and report.html in the output folder hold the results so far.
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
        help="folder with labels of objects (COCO, VOC, YOLO) or with a folder of images for each class, or the start "
        "of names of registered sets: cifar10 of cifar10_train and cifar10_test",
    )
    parser.add_argument("--arms", nargs="+", default=default, metavar="ARM", help=f"default: {' '.join(default)}")
    parser.add_argument("--labels", nargs="+", default=["100%"], metavar="SHARE", help="such as 10%% 25%% 100%%")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm and share (default 3)")
    parser.add_argument("--hours", type=float, help="shorten all schedules alike so that it takes so long")
    parser.add_argument("--output", type=Path, help="folder of all runs (default output/compare/NAME)")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="config of the training (default: a small one)"
    )
    parser.add_argument("--pretrain-config", default="", metavar="FILE", help="config of the pre-training (the same)")
    parser.add_argument(
        "--pretrain-opt",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="over the config of the pre-training; may be given again",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="at the end: over the config of the training")


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse the arguments; KEY VALUE pairs at the end are none of the option before them."""
    places = [place for place, word in enumerate(words) if re.fullmatch(_KEY, word)]
    first = next((place for place in places if not words[max(place - 1, 0)].startswith("--")), len(words))
    args = parser.parse_args(words[:first])
    args.opts += words[first:]
    return args


def run(args: argparse.Namespace) -> None:
    """Run the comparison.

    Raises:
        UserError: if an argument is unfit, data or weights are missing, or a run fails.
    """
    shares = [_share(word) for word in args.labels]
    for what, given in (("--arms", args.arms), ("--labels", shares)):
        if len(set(given)) < len(given):
            raise UserError(f"{what} {' '.join(map(str, given))}: give each once")
    if len(args.arms) < 2:
        raise UserError(f"--arms {args.arms[0]} is one arm: give two or more to compare")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: give at least 1")
    if args.hours is not None and not args.hours > 0:
        raise UserError(f"--hours {args.hours:g}: give more than 0")
    for file in filter(None, (args.config_file, args.pretrain_config)):
        find_config(file)
    from relvit_d2.engine.provenance import command_line
    from relvit_d2.experiments.compare import compare

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
    print(f"\n{results}")


def _share(word: str) -> float:
    """Return a share of the labels in percent."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", word)
    if not match or not 0 < float(match[1]) <= 100:
        raise UserError(f"--labels {word}: give shares above 0 and up to 100 percent, such as 10%")
    return float(match[1])
