"""Draw the input of pre-training and the model's predictions, image by image.

Columns: the image; the encoder's input (crop, colours, mega-patches, permutation, as the run was configured); the image
assembled from the predicted positions; and the relations of all patches to the one in the middle, true and predicted.
"""

import argparse
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

EXAMPLE = """\
relvit-d2 visualize-pretext --weights output/demo/pretrain/model_final.pth --images datasets/streets/test \\
    --output pretext.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", required=True, type=Path, help="model_*.pth of a pre-training, heads included")
    parser.add_argument("--images", required=True, type=Path, help="a folder of images")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    parser.add_argument("--config-file", type=Path, help="default: the config.yaml beside the weights")
    parser.add_argument("--count", type=int, default=6, help="images to draw, spread over the folder (default 6)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")


def run(args: argparse.Namespace) -> None:
    """Draw.

    Raises:
        UserError: for weights without heads, a folder without images, or a file that cannot be written.
    """
    if args.count < 1:
        raise UserError(f"--count {args.count}: give at least 1")
    if not args.output.parent.is_dir():
        raise UserError(f"--output '{args.output}': the folder '{args.output.parent}' does not exist; make it first")
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
    draw_pretext(rows, args.output, f"pre-training's questions and the answers of {args.weights.parent.name}")
    placed, right = (torch.tensor([getattr(row, name) for row in rows]).mean() for name in ("placed", "right"))
    print(
        f"written: {args.output} ({len(rows)} images; {placed:.0%} of patches in place, {right:.0%} of relations right)"
    )
