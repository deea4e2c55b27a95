"""Start-up time of the command line, compared with the import of torch.

``startup_help`` is the time of ``python -c "import torch, torchvision"`` over that of ``python -m relvit_d2 --help``,
which imports the arguments of every command. Each runs in a new process, alternately, after one warm-up run.
"""

import subprocess
import sys

from benchmarks.harness import arguments, in_turn, print_rows


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "startup")

    def start(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    pair = in_turn(
        lambda: start("-m", "relvit_d2", "--help"),
        lambda: start("-c", "import torch, torchvision"),
        "cpu",
        10.0 if args.quick else 60.0,
    )
    row = {"name": "startup_help", "ratio": pair.ratio, "help_s": pair.ours, "import_s": pair.theirs}
    print_rows([row], args)


if __name__ == "__main__":
    main()
