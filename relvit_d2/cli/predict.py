"""Detect objects in images and videos; write annotated images and videos, and detections.json in COCO's format.

The annotated copy of `street/1.jpg` is `OUTPUT/1.png`, that of a video is `OUTPUT/NAME.mp4`. If two inputs have the
same name, the name of the folder or a number is added. Of an animated image only the first frame is used. Videos are
rotated upright and keep their frame times.

`OUTPUT/detections.json` is a list of dicts:
  image_id       path as given; for frames of a video, followed by `#` and the number of the frame
  category_id    class index
  category       class name
  bbox           x, y, width, height in pixels
  score          0..1
  segmentation   mask as RLE, if the detector predicts masks
  time           for frames of a video: seconds since the first frame

Images that cannot be read are skipped, and a damaged video is written up to the damage. These files are listed at the
end, and the exit status is 1.
"""

import argparse
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import print_text

EXAMPLE = """\
relvit-d2 predict --weights output/demo/finetune/model_final.pth --input datasets/streets/test \\
    --output predictions"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", required=True, help="model_*.pth of a detector, or the output folder of its run")
    parser.add_argument("--config-file", default="", help="default: config.yaml in the folder of the weights")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders, patterns or videos")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--threshold", type=float, default=0.5, help="minimum score, 0..1 (default 0.5)")
    parser.add_argument("--batch", type=int, default=4, help="batch size (default 4)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that override the config")


def run(args: argparse.Namespace) -> None:
    """Detect and write; raise a UserError for unreadable inputs after all others are written."""
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: give 0 to 1")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: give at least 1")
    if args.config_file:
        find_config(args.config_file)
    from relvit_d2.report.prediction_files import predict

    written, unreadable = predict(
        args.weights, args.config_file, args.opts, args.input, args.output, args.threshold, args.batch
    )
    if written:
        print_text(written)
    if unreadable:
        raise UserError(unreadable)
