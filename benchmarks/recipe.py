"""AP of the recipe of ``relvit-d2 train --data`` beside that of a hand-made config in the same time.

    python -m benchmarks.recipe path/to/folder --hours 0.5
    python -m benchmarks.recipe path/to/folder --kind large --hours 0.5
    python -m benchmarks.recipe path/to/folder --kind small --hours 0.5

The folder is a custom data set with a training and a validation set (docs/custom_data.md). ``large`` and ``small`` make
another one from it: crops around the largest object of each image, and mosaics of 3 x 3 reduced images. The hand-made
configs suit the blood cells of BCCD and sets made from photographs; they train from scratch, for as many iterations as
the time allows. Nothing else may run on the machine.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image
from tabulate import tabulate  # type: ignore[import-untyped]

from relvit_d2.config.config_file import override_words
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.custom import config_pairs, register_custom
from relvit_d2.data.images.decode import read_rgb
from relvit_d2.experiments.commands import TRIAL_KEYS, run_command, run_trial
from relvit_d2.tasks import load_config

CONFIG = "configs/custom.yaml"
SIDE = 640  # longest side of the images that are made, pixels
GRID = 3  # images along a side of a mosaic

# What a careful user would set: objects of 20 px or more, anchors around the sizes of the objects at that size.
HAND: dict[str, dict[str, Any]] = {
    "given": {  # BCCD: platelets of 40, red cells of 100 and white cells of 200 px in images of 640 x 480
        "INPUT.MIN_SIZE_TRAIN": (240,),
        "INPUT.MAX_SIZE_TRAIN": 320,
        "INPUT.MIN_SIZE_TEST": 240,
        "INPUT.MAX_SIZE_TEST": 320,
        "MODEL.ENCODER.IMG_SIZE": 320,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[20, 32, 48], [64, 96, 128]],
        "SOLVER.BASE_LR": 7e-4,
    },
    "large": {
        "INPUT.MIN_SIZE_TRAIN": (144,),
        "INPUT.MAX_SIZE_TRAIN": 192,
        "INPUT.MIN_SIZE_TEST": 144,
        "INPUT.MAX_SIZE_TEST": 192,
        "MODEL.PYRAMID.STRIDES": [8, 16],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[48, 72], [96, 128]],
        "SOLVER.BASE_LR": 7e-4,
    },
    "small": {
        "INPUT.MIN_SIZE_TRAIN": (320,),
        "INPUT.MAX_SIZE_TRAIN": 384,
        "INPUT.MIN_SIZE_TEST": 320,
        "INPUT.MAX_SIZE_TEST": 384,
        "MODEL.ENCODER.IMG_SIZE": 384,
        "MODEL.PYRAMID.STRIDES": [4, 8, 16],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[10, 16], [24, 36], [56, 80]],
        "SOLVER.BASE_LR": 7e-4,
        "TEST.DETECTIONS_PER_IMAGE": 200,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 200,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 200,
    },
}


def read_splits(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return the records of the training and the validation set with XYXY boxes, and the class names."""
    cfg = load_config(CONFIG, config_pairs(str(folder), "detection"))
    register_custom(cfg.DATASETS)
    names = dict(zip(("train", "val"), (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), strict=True))
    return {split: catalog.get_records(name) for split, name in names.items()}, list(
        catalog.get_metadata(names["train"]).thing_classes
    )


def objects_of(record: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
    """Return the boxes (N, 4) XYXY and the classes of a record."""
    objects = [a for a in record["annotations"] if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4), [a["category_id"] for a in objects]


def crop(record: dict[str, Any]) -> tuple[Image.Image, np.ndarray, list[int]] | None:
    """Return the surroundings of the largest object, and the objects of which half or more is inside."""
    boxes, classes = objects_of(record)
    if not len(boxes):
        return None
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    low, high = boxes[areas.argmax(), :2], boxes[areas.argmax(), 2:]
    margin = 0.25 * (high - low)
    window = np.concatenate([low - margin, high + margin]).clip(0, [record["width"], record["height"]] * 2).round()
    image = Image.fromarray(read_rgb(record["file_name"])).crop(tuple(window.tolist()))
    inside = boxes.clip(np.tile(window[:2], 2), np.tile(window[2:], 2)) - np.tile(window[:2], 2)
    kept = (inside[:, 2:] - inside[:, :2]).prod(1) >= np.maximum(0.5 * areas, 0.05 * areas.max())
    return image, inside[kept], [number for number, keep in zip(classes, kept, strict=True) if keep]


def mosaic(
    records: list[dict[str, Any]], grid: int, cell: tuple[int, int]
) -> tuple[Image.Image, np.ndarray, list[int]]:
    """Return ``grid`` x ``grid`` images, each resized to width and height ``cell``, as one, and their objects."""
    image, boxes, classes = Image.new("RGB", (cell[0] * grid, cell[1] * grid)), [], []
    for position, record in enumerate(records):
        corner = np.array([position % grid * cell[0], position // grid * cell[1]])
        image.paste(Image.fromarray(read_rgb(record["file_name"])).resize(cell), tuple(corner.tolist()))
        found, labels = objects_of(record)
        scale = np.array(cell) / [record["width"], record["height"]]
        boxes.append(found * np.tile(scale, 2) + np.tile(corner, 2))
        classes += labels
    return image, np.concatenate(boxes), classes


def make_set(source: Path, kind: str, output: Path) -> Path:
    """Make the data set ``kind`` from that in ``source``, in YOLO format, and return its folder."""
    splits, names = read_splits(source)
    for split, records in splits.items():
        if kind == "large":
            made = [found for record in records if (found := crop(record))]
        else:
            rng = np.random.default_rng(0)
            count = max(len(records) // GRID, 1)
            drawn = [[records[i] for i in rng.choice(len(records), GRID * GRID)] for _ in range(count)]
            made = [mosaic(chosen, GRID, (SIDE // GRID,) * 2) for chosen in drawn]
        write_split(made, output, split, SIDE)
    keys = {"train": "images/train", "val": "images/val", "names": names}
    (output / "data.yaml").write_text(json.dumps(keys), encoding="utf-8")
    return output


def write_split(made: list[tuple[Image.Image, np.ndarray, list[int]]], output: Path, split: str, longest: int) -> None:
    """Write images, reduced to ``longest`` pixels, boxes and classes as a split in YOLO format."""
    images, labels = (output / part / split for part in ("images", "labels"))
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for number, (image, boxes, classes) in enumerate(made):
        size = np.array(image.size)
        image.thumbnail((longest, longest))
        image.save(images / f"{number:05}.jpg", quality=92)
        middles, sides = (boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size
        text = "".join(
            f"{label} {' '.join(f'{value:.6f}' for value in row)}\n"
            for label, row in zip(classes, np.hstack([middles, sides]), strict=True)
        )
        (labels / f"{number:05}.txt").write_text(text, encoding="utf-8")


def ap_of(folder: Path) -> float:
    """Return the box AP that a training left, percent."""
    results = json.loads((folder / "inference/results.json").read_text(encoding="utf-8"))
    return next(iter(results.values()))["bbox"]["AP"] or 0.0


def train_by_hand(data: Path, kind: str, seconds: float, output: Path) -> float:
    """Train the hand-made config for ``seconds``, measurement included, and return its AP."""
    started = time.monotonic()
    shared = ["train", "--config-file", CONFIG, "--data", str(data)]
    trial = override_words(HAND[kind] | TRIAL_KEYS | {"DATASETS.TEST": (), "OUTPUT_DIR": output / "trial"})
    measured = run_trial("measuring", [*shared, *trial], output / "trial", run_command, output / "trial.txt")
    left = 0.95 * (seconds - (time.monotonic() - started)) - 2 * measured.rest
    iterations = max(int(left / measured.iteration), 20)
    schedule = {"SOLVER.MAX_ITER": iterations, "SOLVER.WARMUP_ITERS": iterations // 20, "TEST.EVAL_PERIOD": 0}
    words = override_words(HAND[kind] | schedule | {"OUTPUT_DIR": output / "hand"})
    run_command("hand-made", [*shared, *words], output / "hand", iterations)
    return ap_of(output / "hand")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a custom data set")
    parser.add_argument("--kind", choices=tuple(HAND), default="given", help="the set itself, or one made from it")
    parser.add_argument("--hours", type=float, default=0.5, help="time of each training (default 0.5)")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_recipe"), help="a new folder")
    parser.add_argument("--only-data", action="store_true", help="make the data set and stop")
    return parser


def main() -> None:
    """Train both and print their AP and its ratio."""
    args = build_parser().parse_args()
    args.output.mkdir(parents=True)
    data = args.data if args.kind == "given" else make_set(args.data, args.kind, args.output / args.kind)
    if args.only_data:
        return
    seconds, rows = 3600 * args.hours, []
    started = time.monotonic()
    words = ["train", "--data", str(data), "--hours", str(args.hours), "OUTPUT_DIR", str(args.output / "recipe")]
    run_command("recipe", words, args.output / "recipe_log", 0)
    rows.append(("recipe", ap_of(args.output / "recipe/detector"), time.monotonic() - started))
    started = time.monotonic()
    rows.append(("hand-made", train_by_hand(data, args.kind, seconds, args.output), time.monotonic() - started))
    print(tabulate(rows, ("config", "AP", "seconds"), floatfmt=".1f"))
    print(f"recipe / hand-made: {rows[0][1] / max(rows[1][1], 1e-9):.2f}")


if __name__ == "__main__":
    main()
