"""Write the features of images from a pre-trained encoder to a parquet file.

A row for each image: `path`, and `features`, the class token of the encoder or the mean of its tokens. An interrupted
command continues where it stopped. Images that cannot be read are left out and listed at the end, and the exit status
is 1. relvit-d2 select chooses images to label from the file.
"""

import argparse
from pathlib import Path

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import check_target
from relvit_d2.utils.printing import print_text

EXAMPLE = "relvit-d2 embed --weights output/ssl/voc_vit_s --input photos --output features.parquet"
SHOWN = 10  # unreadable images in the error message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--weights", type=Path, required=True, help="encoder.safetensors, or the folder of its run")
    parser.add_argument("--input", nargs="+", required=True, help="folders, patterns or lists of images")
    parser.add_argument("--output", type=Path, default=Path("features.parquet"), help="file (default features.parquet)")
    parser.add_argument("--size", type=int, default=0, help="longer side in pixels (default: that of the pre-training)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (default 32)")


def run(args: argparse.Namespace) -> None:
    """Write the file; raise a UserError for unreadable images after all others are written."""
    if args.size < 0 or args.batch < 1:
        raise UserError(f"--size {args.size} --batch {args.batch}: give a size of at least 0 and a batch of at least 1")
    check_target(args.output, ".parquet")
    from relvit_d2.analysis.embedding import embed
    from relvit_d2.analysis.features import load_encoder
    from relvit_d2.data.images.folder import unlabelled_images
    from relvit_d2.utils.hardware import default_device

    found = dict.fromkeys(image for source in args.input for image in unlabelled_images(source))
    images = [image for image in found if isinstance(image, Path)]
    if len(images) < len(found):
        raise UserError("images in archives have no path that other programs could read: unpack the archive")
    encoder = load_encoder(args.weights, default_device())
    errors = embed(encoder, args.weights, images, args.output, args.size, args.batch)
    print_text(f"written: {args.output}, {len(images) - len(errors)} images")
    if errors:
        more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        raise UserError(f"{len(errors)} of {len(images)} images could not be read: {'; '.join(errors[:SHOWN])}{more}")
