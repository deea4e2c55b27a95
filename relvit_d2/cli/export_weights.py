"""Export an encoder.safetensors as weights of a timm model or of a Detectron2 backbone.

The weights are loaded into the target model, and the features of a random image are compared with those of the
encoder; the file is written only if they agree within a relative tolerance of 1e-4. Prints the code that loads the
file and, for Detectron2, which features are equal.
"""

import argparse
from pathlib import Path

from relvit_d2.utils.printing import print_text

EXAMPLE = "relvit-d2 export-weights output/demo/pretrain/encoder.safetensors --to timm timm.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("encoder", type=Path, help="an encoder.safetensors")
    parser.add_argument("--to", required=True, choices=("timm", "detectron2"), help="library of the target model")
    parser.add_argument("output", type=Path, help="the file to write: .safetensors for timm, .pth for detectron2")


def run(args: argparse.Namespace) -> None:
    """Export the weights."""
    from relvit_d2.conversion.export import export_detectron2, export_timm

    export = {"timm": export_timm, "detectron2": export_detectron2}[args.to]
    print_text(f"{export(args.encoder, args.output)}\nwritten: {args.output}")
