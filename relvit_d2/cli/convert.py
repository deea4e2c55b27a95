"""Convert weights of another project into an encoder.safetensors, which every task loads with MODEL.WEIGHTS.

Lists the converted and the dropped tensors. The features of a random image are compared with those of the original
model; the file is written only if they agree within a relative tolerance of 1e-4. No code in the source file is run.
"""

import argparse
from pathlib import Path

from relvit_d2.conversion import KINDS
from relvit_d2.utils.files import check_target
from relvit_d2.utils.printing import print_text

EXAMPLE = "relvit-d2 convert dinov2_vits14_pretrain.pth --to encoder.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", type=Path, help="a .safetensors, .pth, .pt, .bin or .ckpt file")
    parser.add_argument("--to", required=True, type=Path, help="the encoder.safetensors to write")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="default: detected from the names of the tensors")


def run(args: argparse.Namespace) -> None:
    """Convert the file."""
    check_target(args.to, ".safetensors")
    from relvit_d2.conversion.checkpoint_file import find_encoder
    from relvit_d2.conversion.convert import convert
    from relvit_d2.conversion.encoder_file import save_encoder

    converted = convert(find_encoder(args.source), args.kind)
    info = {"source": f"{converted.kind}: {args.source.name}", **converted.pixels}
    save_encoder(converted.encoder, args.to, info)
    print_text(f"{converted}\nwritten: {args.to}")
