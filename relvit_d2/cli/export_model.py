"""Export a detector's backbone, encoder and pyramid, as a program that runs without this package.

Input `images` are normalised pixels (B, C, H, W), float32, in the order and with the mean and spread that the command
prints; outputs are the levels p2, p3, ... in float32. H and W are multiples of the pyramid's coarsest stride, as in the
detector's own batches. The program of a ViT takes any B, H and W, that of a windowed one beyond its window; that of T2T
any H and W with B = 1 (it takes minutes to make); that of a Swin one image of --size. Before the file appears, the
program is run (onnxruntime on the ONNX file, torch.export's own loader on the other) on three sizes, a Swin's on three
images, and must agree with the model to 1e-4 of each level's largest value.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

EXAMPLE = "relvit-d2 export-model --config-file configs/demo/streets.yaml --weights '' --to onnx --output backbone.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", required=True, help="a detection config")
    parser.add_argument(
        "--weights", help="model_*.pth of a detector, an encoder.safetensors, or '' for none; default: MODEL.WEIGHTS"
    )
    parser.add_argument("--to", required=True, choices=("torch-export", "onnx"), help="the program's format")
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="pixels of a Swin's image; default: INPUT.MAX_SIZE_TEST"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")


def run(args: argparse.Namespace) -> None:
    """Export.

    Raises:
        UserError: if a package is missing, the file cannot be written, the size does not fit, or the program does not
            agree with the model.
    """
    if args.to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if find_spec(package) is None:
                raise UserError(f"--to onnx needs the package {package}: run pip install 'relvit_d2[onnx]'")
    if not args.output.parent.is_dir():
        raise UserError(f"--output '{args.output}': the folder '{args.output.parent}' does not exist; make it first")
    find_config(args.config_file)
    from relvit_d2.detection.export import export
    from relvit_d2.tasks import load_config

    cfg = load_config(args.config_file, args.opts, "detection")
    cfg.MODEL.DEVICE = "cpu"
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    print(export(cfg, args.to, args.output, args.size))
