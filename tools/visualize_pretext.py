"""Draw what pre-training asks of a model and what it answers, image by image.

The image; what the encoder sees of it (crop, colours, mega-patches, permutation, as the run was configured); the
picture that the position head puts together again; and where all patches lie, seen from the one in the middle: true,
and as the relation head says.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from relvit_d2.data.images.folder import list_images  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.engine.weights import load_trained, run_config  # noqa: E402
from relvit_d2.pretraining.config import PRETRAINING  # noqa: E402
from relvit_d2.pretraining.model import build_pretraining_model  # noqa: E402
from relvit_d2.report.pretext import draw_pretext, rows_of_files  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402


def main() -> int:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/visualize_pretext.py --weights output/demo/pretrain/model_final.pth "
        "--images datasets/streets/test --output pretext.png",
    )
    parser.add_argument("--weights", required=True, type=Path, help="model_*.pth of pretrain_ssl.py, heads included")
    parser.add_argument("--images", required=True, type=Path, help="a folder of images")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    parser.add_argument("--config-file", type=Path, help="default: the config.yaml beside the weights")
    parser.add_argument("--count", type=int, default=6, help="images to draw, spread over the folder (default 6)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")
    args = parser.parse_args()
    return guard(lambda: draw(args))


def draw(args: argparse.Namespace) -> None:
    """Draw the picture.

    Raises:
        UserError: for weights without heads, a folder without images, or a place that cannot be written to.
    """
    if args.count < 1:
        raise UserError(f"--count {args.count}: give at least 1")
    if not args.output.parent.is_dir():
        raise UserError(f"--output '{args.output}': the folder '{args.output.parent}' does not exist; make it first")
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


if __name__ == "__main__":
    sys.exit(main())
