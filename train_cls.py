"""Train, fine-tune or evaluate a classifier, or probe a frozen encoder.

The same as ``relvit-d2 classify``.
"""

import sys

from relvit_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["classify", *sys.argv[1:]]))
