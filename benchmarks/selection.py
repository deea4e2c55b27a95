"""AP of detectors trained on images of ``relvit-d2 select`` beside that of detectors trained on random ones.

    python -m benchmarks.selection path/to/folder --weights output/pretrain --count 20 --seeds 5

The folder is a custom data set with a training and a validation set (docs/custom_data.md), from which the images are
taken as if they had no labels. All detectors start from the same encoder and train for the same number of iterations.
An interrupted command continues where it stopped.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from benchmarks.recipe import CONFIG, ap_of, read_splits
from relvit_d2.cli import main as command
from relvit_d2.evaluation.coco import coco_ground_truth
from relvit_d2.experiments.commands import run_command
from relvit_d2.experiments.statistics import RunStatistics, paired_difference

KEYS = ["TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "0"]


def write_set(splits: dict[str, list[dict[str, Any]]], classes: list[str], output: Path) -> None:
    """Write records in COCO format, with copies of their images."""
    for split, records in splits.items():
        images = output / split
        images.mkdir(parents=True, exist_ok=True)
        truth = coco_ground_truth(records, classes, ignore_difficult=False)
        for image in truth["images"]:
            path = Path(image["file_name"]).resolve()
            image["file_name"] = path.name
            shutil.copyfile(path, images / path.name)
        (images / "_annotations.coco.json").write_text(json.dumps(truth), encoding="utf-8")


def chosen_images(images: list[str], weights: Path, count: int, output: Path) -> set[str]:
    """Return the images that ``relvit-d2 embed`` and ``select`` choose."""
    listed, features = output / "images.txt", output / "features.parquet"
    listed.write_text("\n".join(images), encoding="utf-8")
    for words in (
        ["embed", "--weights", str(weights), "--input", str(listed), "--output", str(features)],
        ["select", "--features", str(features), "--count", str(count), "--output", str(output / "selection")],
    ):
        if command(words):
            raise SystemExit(1)
    return set((output / "selection/selected.txt").read_text(encoding="utf-8").splitlines())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a custom data set")
    parser.add_argument("--weights", type=Path, required=True, help="encoder.safetensors of the training images")
    parser.add_argument("--count", type=int, default=20, help="labelled images (default 20)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--iterations", type=int, default=600, help="of each detector (default 600)")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_selection"), help="folder")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs that override the config")
    return parser


def main() -> None:
    """Train all detectors and print their AP."""
    args = build_parser().parse_intermixed_args()
    args.output.mkdir(parents=True, exist_ok=True)
    splits, classes = read_splits(args.data)
    images = [str(record["file_name"]) for record in splits["train"]]
    selected = chosen_images(images, args.weights, args.count, args.output)
    results: dict[str, list[float]] = {"selected": [], "random": []}
    for seed in range(args.seeds):
        drawn = set(random.Random(seed).sample(images, args.count))
        for name, labelled in (("selected", selected), ("random", drawn)):
            folder = args.output / f"{name}_{seed}"
            write_set(
                {"train": [r for r in splits["train"] if str(r["file_name"]) in labelled], "val": splits["val"]},
                classes,
                folder / "data",
            )
            words = ["train", "--config-file", CONFIG, "--data", str(folder / "data"), "--resume", "SEED", str(seed)]
            words += ["MODEL.WEIGHTS", str(args.weights), "SOLVER.MAX_ITER", str(args.iterations), *KEYS]
            words += ["OUTPUT_DIR", str(folder / "run"), *args.opts]
            if not (folder / "run/inference/results.json").exists():
                run_command(f"{name}, seed {seed}", words, folder / "run", args.iterations, folder / "console.txt")
            results[name].append(ap_of(folder / "run"))
    rows = [(name, RunStatistics.of(values).mean, *values) for name, values in results.items()]
    print(tabulate(rows, ("images", "mean AP", *(f"seed {seed}" for seed in range(args.seeds))), floatfmt=".1f"))
    found = paired_difference(results["selected"], results["random"])
    print(f"selected - random: {found.value:+.2f} +- {found.margin or float('nan'):.2f} (95 % interval)")


if __name__ == "__main__":
    main()
