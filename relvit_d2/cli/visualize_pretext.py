"""Draw the input of the pretext tasks and the predictions of a pre-trained model.

One row per image: the image; the input of the encoder (crop, colours, mega-patches and permutation as in the run's
config); the image reassembled from the predicted positions; the true and the predicted relations of all patches to the
middle one.
"""

import argparse
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import check_target

EXAMPLE = """\
relvit-d2 visualize-pretext --weights output/demo/pretrain/model_final.pth --images datasets/streets/test \\
    --output pretext.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", required=True, type=Path, help="model_*.pth of a pre-training run (with heads)")
    parser.add_argument("--images", required=True, type=Path, help="a folder of images")
    parser.add_argument("--output", required=True, type=Path, help="the PNG file to write")
    parser.add_argument("--config-file", type=Path, help="default: config.yaml in the folder of the weights")
    parser.add_argument("--count", type=int, default=6, help="number of images, spread over the folder (default 6)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")


def run(args: argparse.Namespace) -> None:
    """Write the file."""
    if args.count < 1:
        raise UserError(f"--count {args.count}: give at least 1")
    check_target(args.output)
    if args.config_file:
        find_config(str(args.config_file))
    import torch

    from relvit_d2.data.images.folder import list_images
    from relvit_d2.engine.weights import load_trained, run_config
    from relvit_d2.pretraining.config import PRETRAINING
    from relvit_d2.pretraining.model import build_pretraining_model
    from relvit_d2.report.pretext import draw_pretext, rows_of_files

    files = list_images(args.images)
    cfg = run_config(args.weights, args.config_file or "", args.opts, PRETRAINING)
    model = build_pretraining_model(cfg)
    load_trained(cfg, model, args.weights)
    rows = rows_of_files(cfg, model, files, args.count)
    folder = args.weights if args.weights.is_dir() else args.weights.parent
    draw_pretext(rows, args.output, f"pretext tasks: inputs and predictions of {folder.name}")
    placed, right = (torch.tensor([getattr(row, name) for row in rows]).mean() for name in ("placed", "right"))
    print(f"written: {args.output} ({len(rows)} images; correct: {placed:.0%} of positions, {right:.0%} of relations)")
