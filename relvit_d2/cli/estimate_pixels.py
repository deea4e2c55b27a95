"""Print the pixel mean and standard deviation of a set of images, in the form of config keys.

For images that are not 8-bit RGB, INPUT.CHANNELS and INPUT.MAX_VALUE are printed too, detected from fifty images.
"""

import argparse

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import print_text

EXAMPLE = "relvit-d2 estimate-pixels datasets/streets/train/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("images", help="a data set, folder, pattern, text list, zip or tar, as for pre-training")
    parser.add_argument("--channels", type=int, default=0, help="INPUT.CHANNELS (default: detected)")
    parser.add_argument("--max-value", type=int, default=0, help="INPUT.MAX_VALUE (default: the largest value found)")
    parser.add_argument("--most", type=int, default=1000, help="maximum number of images to read (default 1000)")


def run(args: argparse.Namespace) -> None:
    """Print the keys."""
    if args.most < 1 or args.channels < 0 or args.max_value < 0:
        raise UserError("--most, --channels and --max-value are counts: give at least 1")
    from relvit_d2.analysis.pixel_statistics import pixel_format, pixel_statistics
    from relvit_d2.data.detection.catalog import get_images
    from relvit_d2.data.images.decode import PixelFormat

    images = get_images(args.images)
    detected = pixel_format(images)
    pixels = PixelFormat(args.channels or detected.channels, args.max_value or detected.max_value)
    found = pixel_statistics(images, pixels, args.most)
    print_text(f"# {found.images} of {len(images)} images of {args.images}")
    if pixels != PixelFormat():
        print_text(f"INPUT:\n  CHANNELS: {pixels.channels}\n  MAX_VALUE: {pixels.max_value:.0f}")
    print_text(found.config_lines())
