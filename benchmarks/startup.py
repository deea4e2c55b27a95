"""Start-up time of the command line and of trainings, compared with the import of torch.

``startup_help`` is the time of ``python -c "import torch, torchvision"`` over that of ``python -m relvit_d2 --help``,
which imports the arguments of every command. Each runs in a new process, alternately, after one warm-up run.

``startup_pretrain`` and ``startup_train`` are (import + one iteration) / (time from the command to the end of the first
iteration), for 50,000 images of 32 px and for 5,000 of 160 x 120 px with labels in YOLO format (a tenth of them with
``--quick``). The aim is 0.67. The rows ``..._again`` are for a second start on the same images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row, arguments, in_turn, print_rows
from benchmarks.pretrain import draw_images

IMPORT = ("-c", "import torch, torchvision")
KEYS = ("SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "0", "DATASETS.TEST", "()")
CONFIGS = {"pretrain": "configs/ssl/cifar10_vit_s4.yaml", "train": "configs/custom.yaml"}
SIZES = {"pretrain": ((32, 32), 50_000), "train": ((160, 120), 5_000)}  # width and height, number of images


def start(*words: str) -> None:
    """Run Python with arguments."""
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def write_images(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write a JPEG ``count`` times, with other bytes behind its end each time, and a box for each image."""
    draw_images(folder / "images/train", size, 1)
    (folder / "labels/train").mkdir(parents=True)
    content = (folder / "images/train/0000.jpg").read_bytes()
    (folder / "images/train/0000.jpg").unlink()
    for number in range(count):
        (folder / f"images/train/{number}.jpg").write_bytes(content + str(number).encode())
        (folder / f"labels/train/{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n", encoding="utf-8")
    (folder / "data.yaml").write_text("train: images/train\nnames: [object]\n", encoding="utf-8")


def seconds_to_first_iteration(command: str, data: Path, output: Path) -> tuple[float, float]:
    """Return the seconds from the command to the end of the first iteration, and those of the last one."""
    words = [command, "--config-file", CONFIGS[command], "--data", str(data), *KEYS, "OUTPUT_DIR", str(output)]
    metrics = output / "metrics.json"
    before = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "relvit_d2", *words], stdout=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.read_bytes().count(b"\n")) and process.poll() is None:
        time.sleep(0.01)
    took = time.perf_counter() - before
    if process.wait():
        raise RuntimeError(f"relvit-d2 {command} failed")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return took, rows[-1]["time"]


def trainings(imported: float, args: argparse.Namespace) -> Iterator[Row]:
    """Measure the first and the second start of each training."""
    for command, (size, count) in SIZES.items():
        count //= 10 if args.quick else 1
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder) / "data", size, count)
            for again in ("", "_again"):
                data = Path(folder) / "data"
                took, iteration = seconds_to_first_iteration(command, data, Path(folder) / f"run{again}")
                values = {"images": count, "start_s": took, "import_s": imported, "iteration_s": iteration}
                yield {"name": f"startup_{command}{again}", "ratio": (imported + iteration) / took, **values}


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "startup")
    budget = 10.0 if args.quick else 60.0
    pair = in_turn(lambda: start("-m", "relvit_d2", "--help"), lambda: start(*IMPORT), "cpu", budget)
    row = {"name": "startup_help", "ratio": pair.ratio, "help_s": pair.ours, "import_s": pair.theirs}
    print_rows([row, *trainings(pair.theirs, args)], args)


if __name__ == "__main__":
    main()
