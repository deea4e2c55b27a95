"""Export the backbone of a detector (encoder and pyramid) with torch.export or as ONNX.

The exported model runs without this package. Its input `images` (B, C, H, W) is float32, normalised with the mean and
standard deviation that the command prints. Its outputs are the pyramid levels p2, p3, ... in float32. H and W must be
multiples of the coarsest stride of the pyramid.

Supported input sizes:
  ViT                            any B, H and W; with attention in windows, H and W larger than a window
  T2T-ViT                        any H and W, B = 1; the export takes minutes
  Swin                           the size given with --size, B = 1

The exported model is run on three inputs and compared with the original one. The file is written only if they agree
within 1e-4 of the largest value of each level.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import check_target
from relvit_d2.utils.printing import print_text

EXAMPLE = "relvit-d2 export-model --config-file configs/demo/streets.yaml --weights '' --to onnx --output backbone.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", required=True, help="a detection config")
    parser.add_argument(
        "--weights",
        help="model_*.pth of a detector, an encoder.safetensors, or '' for random weights; default: MODEL.WEIGHTS",
    )
    parser.add_argument("--to", required=True, choices=("torch-export", "onnx"), help="format of the file")
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="Swin: input size, pixels; default: INPUT.MAX_SIZE_TEST"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")


def run(args: argparse.Namespace) -> None:
    """Export the backbone."""
    if args.to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if find_spec(package) is None:
                raise UserError(f"--to onnx needs the package {package}: run pip install 'relvit_d2[onnx]'")
    check_target(args.output)
    find_config(args.config_file)
    from relvit_d2.detection.export import export
    from relvit_d2.tasks import load_config

    cfg = load_config(args.config_file, args.opts, "detection")
    cfg.MODEL.DEVICE = "cpu"
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    print_text(export(cfg, args.to, args.output, args.size))
