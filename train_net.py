"""Train or evaluate a Mask R-CNN with a vision transformer as its backbone.

The same as ``relvit-d2 train``.
"""

import sys

from relvit_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
