"""Detect objects in images and videos; write annotated images and videos, and detections.json in COCO's format.

The annotated copy of `street/1.jpg` is `OUTPUT/1.png`, that of a video is `OUTPUT/NAME.mp4`. If two inputs have the
same name, the name of the folder or a number is added. Of an animated image only the first frame is used. Videos are
rotated upright and keep their frame times. A number as input is a camera, which is read until Ctrl-C.

`--save-labels FORMAT` also writes the detections as labels to correct, to the folder `OUTPUT/labels_FORMAT`; copy its
content into the folder of the images.

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
from typing import TYPE_CHECKING

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import print_text

if TYPE_CHECKING:
    from relvit_d2.detection.detections import AnyDetector

LABEL_FORMATS = ("coco", "yolo", "voc", "labelme", "cvat")
_GROUPS = ("DATALOADER.", "DATASETS.", "INPUT.", "MODEL.", "SOLVER.", "TEST.")  # of keys of a detector

EXAMPLE = """\
relvit-d2 predict --weights output/demo/finetune/model_final.pth --input datasets/streets/test \\
    --output predictions
relvit-d2 predict --model detector.onnx --input datasets/streets/test --output predictions
relvit-d2 predict --weights output/custom/finetune --split val --threshold 0.5 RBC=0.3
relvit-d2 predict --model detector.onnx --input photos --output predictions --save-labels yolo
relvit-d2 predict --model detector.onnx --input clip.mp4 --every 10"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", default="", help="model_*.pth of a detector, or the output folder of its run")
    parser.add_argument("--model", help="instead of --weights: an ONNX file of relvit-d2 export-model; needs no torch")
    parser.add_argument("--config-file", default="", help="default: config.yaml in the folder of the weights")
    parser.add_argument(
        "--input", nargs="+", default=[], help="images, folders, patterns, videos, or the number of a camera, such as 0"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="instead of --input: images of this split of a data set"
    )
    parser.add_argument("--data", help="with --split: folder of a custom data set (default: that of the training)")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument(
        *("--threshold", "--confidence-threshold"),
        nargs="+",
        default=[],
        metavar=("SCORE", "CLASS=SCORE"),
        help="minimum score, 0..1 (default 0.5), and that of single classes, such as 0.5 RBC=0.7",
    )
    parser.add_argument("--batch", type=int, default=4, help="batch size (default 4)")
    parser.add_argument(
        "--tiles", help="detect in large images tile by tile: auto, or SIZE or WIDTHxHEIGHT in pixels of the image"
    )
    parser.add_argument(
        "--overlap", type=float, default=0.2, help="minimum overlap of tiles, a fraction of a tile (default 0.2)"
    )
    parser.add_argument("--every", type=int, default=1, help="of videos only each N-th frame (default 1)")
    parser.add_argument(
        "--save-labels", choices=LABEL_FORMATS, help="also write the detections in images as labels in this format"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")
    parser.add_argument("--opts", dest="more", nargs=argparse.REMAINDER, default=[], help="the same")


def run(args: argparse.Namespace) -> None:
    """Detect and write; raise a UserError for unreadable inputs after all others are written."""
    from relvit_d2.detection.thresholds import ClassThresholds, parse_thresholds

    for name in ("batch", "every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give at least 1")
    words, opts = split_overrides(args.threshold)
    threshold, by_class = parse_thresholds(words)
    inputs, more = split_overrides(args.input)
    if bool(inputs) == bool(args.split):
        raise UserError("nothing to detect in, or twice: give either --input or --split")
    if args.data and not args.split:
        raise UserError("--data needs --split, which selects the images: give train, val or test, or --input")
    if bool(args.weights) == bool(args.model):
        raise UserError("give either --weights or --model")
    opts += [*more, *args.opts, *args.more]
    if args.model and (args.split or args.config_file or opts):
        raise UserError("--model has its config in the file: give --input, without --split, --config-file and keys")
    if args.config_file:
        find_config(args.config_file)
    if args.split:
        from relvit_d2.report.split_images import split_images

        inputs = split_images(args.weights, args.config_file, opts, args.data, args.split)
    from relvit_d2.report.prediction_files import predict

    def load() -> "AnyDetector":
        loaded = (_load_onnx if args.model else _load_weights)(args, opts, min([threshold, *by_class.values()]))
        return ClassThresholds(loaded, threshold, by_class) if by_class else loaded

    tiles = (args.tiles, args.overlap) if args.tiles else None
    written, unreadable = predict(load, inputs, args.output, args.batch, tiles, args.every, args.save_labels)
    if written:
        print_text(written)
    if unreadable:
        raise UserError(unreadable)


def _load_onnx(args: argparse.Namespace, _: list[str], threshold: float) -> "AnyDetector":
    from relvit_d2.detection.onnx_detector import OnnxDetector

    return OnnxDetector(args.model, threshold)


def _load_weights(args: argparse.Namespace, opts: list[str], threshold: float) -> "AnyDetector":
    from relvit_d2.detection.predictor import load_detector
    from relvit_d2.engine.run_setup import silence_warnings

    silence_warnings()
    return load_detector(args.weights, args.config_file, opts, threshold)


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Split the words after ``--input`` into inputs and the ``KEY VALUE`` pairs that follow them."""
    keys = (index for index, word in enumerate(words) if word.startswith(_GROUPS) and not Path(word).exists())
    first = next(keys, len(words))
    return words[:first], words[first:]
