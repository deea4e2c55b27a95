"""AP of a detector on large images, with and without tiles.

    python -m benchmarks.tiles path/to/folder --detector output/DATA/detector

The folder is the custom data set of the detector's training. Its validation images are joined to mosaics of 4 x 4
images in their size. The detector detects in them like in any image, which reduces them to its test size, and in tiles
of the size of the training images.
"""

import argparse
import json
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped]

from benchmarks.recipe import mosaic, read_splits, write_split
from relvit_d2.experiments.commands import run_command

GRID = 4  # images along a side of a mosaic
DETECTIONS = 1000  # in a mosaic, which has 16 times as many objects as an image


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the custom data set of the training")
    parser.add_argument("--detector", type=Path, required=True, help="folder of its run")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_tiles"), help="a new folder")
    return parser


def main() -> None:
    """Make the mosaics, evaluate and print AP."""
    args = build_parser().parse_args()
    splits, names = read_splits(args.data)
    records, count = splits["val"], GRID * GRID
    cell = records[0]["width"], records[0]["height"]
    made = [mosaic(records[first : first + count], GRID, cell) for first in range(0, len(records) - count + 1, count)]
    data = args.output / "data"
    for split in ("train", "val"):
        write_split(made, data, split, GRID * max(cell))
    keys = {"train": "images/train", "val": "images/val", "names": names}
    (data / "data.yaml").write_text(json.dumps(keys), encoding="utf-8")
    weights = args.detector / "model_best.pth"
    words = ["train", "--config-file", str(args.detector / "config.yaml"), "--data", str(data), "--eval-only"]
    words += ["MODEL.WEIGHTS", str(weights if weights.is_file() else args.detector), "TEST.TILES", "auto"]
    words += ["TEST.DETECTIONS_PER_IMAGE", str(DETECTIONS), "OUTPUT_DIR", str(args.output / "run")]
    run_command("evaluating", words, args.output / "run", 0)
    (results,) = json.loads((args.output / "run/inference/results.json").read_text(encoding="utf-8")).values()
    rows = [
        (name, results[task]["AP"], results[task]["AP50"]) for name, task in (("no", "bbox"), ("yes", "bbox_tiles"))
    ]
    print(tabulate(rows, ("tiles", "AP", "AP50"), floatfmt=".1f"))


if __name__ == "__main__":
    main()
