"""Print the mean and deviation of the pixels of images, as lines of a config file.

INPUT.CHANNELS and INPUT.MAX_VALUE, detected from fifty images, are printed too for images of one channel, of several,
or of more than eight bits.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from relvit_d2.analysis.pixel_statistics import LOOKED_AT, pixel_format, pixel_statistics  # noqa: E402
from relvit_d2.data.detection.catalog import get_images  # noqa: E402
from relvit_d2.data.images.decode import PixelFormat  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402


def main() -> int:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/estimate_pixels.py datasets/streets/train/",
    )
    parser.add_argument("images", help="a data set, folder, pattern, text list, zip or tar, as for pre-training")
    parser.add_argument("--channels", type=int, default=0, help="INPUT.CHANNELS; told by looking where it is left out")
    parser.add_argument(
        "--max-value", type=int, default=0, help="INPUT.MAX_VALUE; the largest value seen where it is left out"
    )
    parser.add_argument("--most", type=int, default=LOOKED_AT, help=f"images to read, at most (default {LOOKED_AT})")
    args = parser.parse_args()
    return guard(lambda: estimate(args))


def estimate(args: argparse.Namespace) -> None:
    """Print the lines.

    Raises:
        UserError: there are no images that can be read.
    """
    if args.most < 1 or args.channels < 0 or args.max_value < 0:
        raise UserError("--most, --channels and --max-value are counts: give at least 1")
    images = get_images(args.images)
    seen = pixel_format(images)
    pixels = PixelFormat(args.channels or seen.channels, args.max_value or seen.max_value)
    found = pixel_statistics(images, pixels, args.most)
    print(f"# {found.images} of {len(images)} images of {args.images}")
    if pixels != PixelFormat():
        print(f"INPUT:\n  CHANNELS: {pixels.channels}\n  MAX_VALUE: {pixels.max_value:.0f}")
    print(found.config_lines())


if __name__ == "__main__":
    sys.exit(main())
