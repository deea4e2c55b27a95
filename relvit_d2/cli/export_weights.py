"""Export an encoder.safetensors as weights of a timm model or of one of Detectron2's backbones.

Loads them there, strictly, compares the features of one random image with the encoder's, and writes nothing unless
they agree to 1e-4. Prints the call that builds the model and, for Detectron2, what stays equal.
"""

import argparse
from pathlib import Path

EXAMPLE = "relvit-d2 export-weights output/demo/pretrain/encoder.safetensors --to timm timm.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("encoder", type=Path, help="an encoder.safetensors")
    parser.add_argument("--to", required=True, choices=("timm", "detectron2"), help="the library that loads the file")
    parser.add_argument("output", type=Path, help="the file: .safetensors for timm, .pth for detectron2")


def run(args: argparse.Namespace) -> None:
    """Export."""
    from relvit_d2.conversion.export import export_detectron2, export_timm

    export = {"timm": export_timm, "detectron2": export_detectron2}[args.to]
    print(export(args.encoder, args.output))
    print(f"written: {args.output}")
