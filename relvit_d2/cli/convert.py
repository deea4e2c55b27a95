"""Convert weights of other projects into an encoder.safetensors, which all trainings load by MODEL.WEIGHTS.

Prints what was found and dropped. Runs the source's own definition of the model and the encoder on one random image,
and writes nothing unless their features agree to 1e-4. Nothing in a file is executed.
"""

import argparse
from pathlib import Path

from relvit_d2.conversion import KINDS
from relvit_d2.utils.files import check_target

EXAMPLE = "relvit-d2 convert dinov2_vits14_pretrain.pth --to encoder.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", type=Path, help="a .safetensors, .pth, .pt, .bin or .ckpt file")
    parser.add_argument("--to", required=True, type=Path, help="the encoder.safetensors to write")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="default: detected by the names of tensors")


def run(args: argparse.Namespace) -> None:
    """Convert.

    Raises:
        UserError: if the source is not an encoder that exists here, or the features differ.
    """
    check_target(args.to, ".safetensors")
    from relvit_d2.conversion.checkpoint_file import find_encoder
    from relvit_d2.conversion.convert import convert
    from relvit_d2.conversion.encoder_file import save_encoder

    converted = convert(find_encoder(args.source), args.kind)
    info = {"source": f"{converted.kind}: {args.source.name}", **converted.pixels}
    save_encoder(converted.encoder, args.to, info)
    print(converted)
    print(f"written: {args.to}")
