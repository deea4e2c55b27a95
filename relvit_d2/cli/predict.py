"""Detect objects in images and videos; write annotated pictures and one COCO-results JSON.

For `street/1.jpg` the picture is `OUTPUT/1.png`, for a video `OUTPUT/NAME.mp4`; where several inputs would have one
name, the folders or a number make them differ. `OUTPUT/detections.json` lists dicts of
`image_id` (the path as given; of a video's frames with `#` and the frame's number), `category_id` (the class's index),
`category`, `bbox` (x, y, width, height in pixels), `score`, where the detector has masks `segmentation` (RLE), and of a
video's frame `time` (seconds since the first frame). Videos are turned upright, and their frames keep their times.
Of an animated image the first frame is taken.
An image that cannot be read is left out, a video is written up to where it is damaged; both are named at the end, and
the exit status is 1.
"""

import argparse
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

EXAMPLE = """\
relvit-d2 predict --weights output/demo/finetune/model_final.pth --input datasets/streets/test \\
    --output predictions"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", required=True, help="model_*.pth of a detector, or the folder of its training")
    parser.add_argument("--config-file", default="", help="default: the config.yaml beside the weights")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders, patterns, videos")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score that counts, 0..1 (default 0.5)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default 4)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs over the config")


def run(args: argparse.Namespace) -> None:
    """Detect and write.

    Raises:
        UserError: for an input that is missing, weights that hold no detector, or a number out of range; for inputs
            that cannot be read, after all others are written.
    """
    if not 0 <= args.threshold <= 1 or args.batch < 1:
        raise UserError(f"--threshold {args.threshold} --batch {args.batch}: give 0 to 1, and at least 1")
    if args.config_file:
        find_config(args.config_file)
    from relvit_d2.report.prediction_files import predict

    written, unreadable = predict(
        args.weights, args.config_file, args.opts, args.input, args.output, args.threshold, args.batch
    )
    if written:
        print(written)
    if unreadable:
        raise UserError(unreadable)
