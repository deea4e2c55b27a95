"""Export a detector as one ONNX file: image in; boxes, scores, classes and masks out.

The file contains resizing to the test size, normalisation, network, non-maximum suppression, and as metadata class
names and settings. ONNX Runtime alone runs it: `relvit-d2 predict --model`, docs/examples/onnx_detect.py.

  image     uint8 (height, width, channels), RGB, any size
  boxes     float32 (N, 4): x0, y0, x1, y1 in pixels of the image
  scores    float32 (N,), in descending order
  classes   int64 (N,)
  masks     float32 (N, M, M), with a mask head: probabilities on a grid that covers the box

The file and the model detect objects in 8 images of different sizes. The file is written only if the detections above
a score of 0.05 are the same one to one: boxes within 0.5 pixels, scores within 0.001, IoU of masks above 0.99. Both see
the pixels that the file resizes; those of the model differ in at most 5 % of the values, by 1 or 2 grey levels.

--int8 DIR writes a second file, OUTPUT with `_int8` added to its name, whose layers compute in 8 bits. Half of the
images of DIR calibrate it; in the others its detections are compared with those of the first file.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import check_target
from relvit_d2.utils.printing import print_text

EXAMPLE = "relvit-d2 export-model --weights output/demo/finetune --to onnx --output detector.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", required=True, help="model_*.pth of a detector, or the output folder of its run")
    parser.add_argument("--config-file", default="", help="default: config.yaml in the folder of the weights")
    parser.add_argument("--to", choices=("onnx",), default="onnx", help="format of the file")
    parser.add_argument("--output", required=True, type=Path, help="the file to write, *.onnx")
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of images to compare the detections in; default: the data sets of the training, else drawn images",
    )
    parser.add_argument("--int8", type=Path, metavar="DIR", help="also write an int8 model; at least 8 images")
    parser.add_argument(
        "--min-agreement",
        type=float,
        default=0.9,
        help="with --int8: minimum F1 of its detections, with those of the float32 model as truth (default 0.9)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")


def run(args: argparse.Namespace) -> None:
    """Export the detector."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"--to onnx needs the package {package}: run pip install 'relvit_d2[onnx]'")
    check_target(args.output, ".onnx")
    if not 0 <= args.min_agreement <= 1:
        raise UserError(f"--min-agreement {args.min_agreement}: give 0 to 1")
    if args.config_file:
        find_config(args.config_file)
    from relvit_d2.detection.export import export
    from relvit_d2.detection.quantization import calibration_files, quantize
    from relvit_d2.engine.run_setup import silence_warnings

    silence_warnings()
    files = calibration_files(args.int8) if args.int8 else []
    print_text(export(args.weights, args.config_file, args.opts, args.output, args.images or args.int8))
    if files:
        target = args.output.with_stem(f"{args.output.stem}_int8")
        print_text(quantize(args.output, target, files, args.min_agreement))
