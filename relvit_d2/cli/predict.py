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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import print_text

if TYPE_CHECKING:
    from relvit_d2.detection.detections import AnyDetector

_GROUPS = ("DATALOADER.", "DATASETS.", "INPUT.", "MODEL.", "SOLVER.", "TEST.")  # of keys of a detector

EXAMPLE = """\
relvit-d2 predict --weights output/demo/finetune/model_final.pth --input datasets/streets/test \\
    --output predictions
relvit-d2 predict --model detector.onnx --input datasets/streets/test --output predictions
relvit-d2 predict --weights output/custom/finetune --split val --confidence-threshold 0.3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", default="", help="model_*.pth of a detector, or the output folder of its run")
    parser.add_argument("--model", help="instead of --weights: an ONNX file of relvit-d2 export-model; needs no torch")
    parser.add_argument("--config-file", default="", help="default: config.yaml in the folder of the weights")
    parser.add_argument("--input", nargs="+", default=[], help="images, folders, patterns or videos")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="instead of --input: images of this split of a data set"
    )
    parser.add_argument("--data", help="with --split: folder of a custom data set (default: that of the training)")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument(
        "--threshold", "--confidence-threshold", type=float, default=0.5, help="minimum score, 0..1 (default 0.5)"
    )
    parser.add_argument("--batch", type=int, default=4, help="batch size (default 4)")
    parser.add_argument(
        "--tiles", help="detect in large images tile by tile: auto, or SIZE or WIDTHxHEIGHT in pixels of the image"
    )
    parser.add_argument(
        "--overlap", type=float, default=0.2, help="minimum overlap of tiles, a fraction of a tile (default 0.2)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")
    parser.add_argument("--opts", dest="more", nargs=argparse.REMAINDER, default=[], help="the same")


def run(args: argparse.Namespace) -> None:
    """Detect and write; raise a UserError for unreadable inputs after all others are written."""
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: give 0 to 1")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: give at least 1")
    inputs, opts = split_overrides(args.input)
    if bool(inputs) == bool(args.split):
        raise UserError("nothing to detect in, or twice: give either --input or --split")
    if args.data and not args.split:
        raise UserError("--data needs --split, which selects the images: give train, val or test, or --input")
    if bool(args.weights) == bool(args.model):
        raise UserError("give either --weights or --model")
    opts += [*args.opts, *args.more]
    if args.model and (args.split or args.config_file or opts):
        raise UserError("--model has its config in the file: give --input, without --split, --config-file and keys")
    if args.config_file:
        find_config(args.config_file)
    load = _load_onnx if args.model else _load_weights
    if args.split:
        from relvit_d2.report.split_images import split_images

        inputs = split_images(args.weights, args.config_file, opts, args.data, args.split)
    from relvit_d2.report.prediction_files import predict

    tiles = (args.tiles, args.overlap) if args.tiles else None
    written, unreadable = predict(partial(load, args, opts), inputs, args.output, args.batch, tiles)
    if written:
        print_text(written)
    if unreadable:
        raise UserError(unreadable)


def _load_onnx(args: argparse.Namespace, _: list[str]) -> "AnyDetector":
    from relvit_d2.detection.onnx_detector import OnnxDetector

    return OnnxDetector(args.model, args.threshold)


def _load_weights(args: argparse.Namespace, opts: list[str]) -> "AnyDetector":
    from relvit_d2.detection.predictor import load_detector
    from relvit_d2.engine.run_setup import silence_warnings

    silence_warnings()
    return load_detector(args.weights, args.config_file, opts, args.threshold)


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Split the words after ``--input`` into inputs and the ``KEY VALUE`` pairs that follow them."""
    keys = (index for index, word in enumerate(words) if word.startswith(_GROUPS) and not Path(word).exists())
    first = next(keys, len(words))
    return words[:first], words[first:]
