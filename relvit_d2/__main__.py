"""``python -m relvit_d2``, the same as the command ``relvit-d2``."""

import sys

from relvit_d2.cli import main

if __name__ == "__main__":
    sys.exit(main())
