"""Pre-train an encoder on unlabelled images by predicting the spatial relations of their patches.

The same as ``relvit-d2 pretrain``.
"""

import sys

from relvit_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
