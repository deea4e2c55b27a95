"""Share of the time of a detector's evaluation that is spent outside the model.

``evaluate_overhead`` evaluates the detector of ``configs/custom.yaml``, with random weights, on 1,000 images of 640 x
480 pixels with 20 objects each: reading and resizing images, the model, AP and the files of the results. The ratio is
the time in the model over all; the part outside is ``outside``. Loader processes are not used, so nothing overlaps.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from benchmarks.harness import Row, arguments, print_rows, seconds
from relvit_d2.detection.evaluation import evaluate
from relvit_d2.detection.model import build_detector
from relvit_d2.tasks import load_config
from relvit_d2.utils.randomness import seed_everything

IMAGES, FILES, OBJECTS = 1000, 50, 20
NAME = "evaluated"


def write_images(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write JPEG files of smooth noise and return the records of ``count`` images, several for each file."""
    random = np.random.default_rng(0)
    for number in range(FILES):
        noise = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    records = []
    for number in range(count):
        corners = random.uniform(0, (600, 440), (OBJECTS, 2))
        boxes = np.hstack([corners, corners + random.uniform(8, 40, (OBJECTS, 2))])
        objects = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": index % 3}
            for index, box in enumerate(boxes.tolist())
        ]
        name = str(folder / f"{number % FILES}.jpg")
        records.append({"file_name": name, "image_id": number, "height": 480, "width": 640, "annotations": objects})
    return records


def measure(args: argparse.Namespace) -> Row:
    """Evaluate once and return the row."""
    seed_everything(0, "model")
    with tempfile.TemporaryDirectory() as folder:
        keys = ["MODEL.DEVICE", args.device, "MODEL.ROI_HEADS.NUM_CLASSES", "3", "DATALOADER.NUM_WORKERS", "0"]
        cfg = load_config("configs/custom.yaml", [*keys, "OUTPUT_DIR", f"{folder}/run"])
        records = write_images(Path(folder), IMAGES // 10 if args.quick else IMAGES)
        DatasetCatalog.register(NAME, lambda: records)
        MetadataCatalog.get(NAME).thing_classes = ["a", "b", "c"]
        model = build_detector(cfg).eval()
        inside = []
        forward = model.forward

        def timed(batch: list[dict[str, Any]]) -> Any:
            results: list[Any] = []
            inside.append(seconds(lambda: results.extend(forward(batch)), args.device))
            return results

        model.forward = timed
        whole = seconds(lambda: evaluate(cfg, model, {NAME: records}), args.device)
        found = json.loads(Path(cfg.OUTPUT_DIR, "inference/coco_instances_results.json").read_text(encoding="utf-8"))
    share = sum(inside) / whole
    values = {"images": len(records), "batch": cfg.TEST.BATCH_SIZE, "detections": len(found), "seconds": whole}
    return {"name": "evaluate_overhead", "ratio": share, "outside": 1 - share, **values}


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "evaluation")
    gc.freeze()  # as relvit-d2's commands do
    print_rows([measure(args)], args)


if __name__ == "__main__":
    main()
