"""Data loading on one core, compared with Detectron2's mapper and image reader on the same images.

``mapper_224`` and ``mapper_512`` are the mappers with the configs ``configs/paper/voc_vit_s_224.yaml`` and
``configs/voc_vit_s.yaml``: decoding, resizing, flipping, boxes. ``loader_S`` is the detection data loader with batches
of 16 and no worker processes. ``reader`` is the image reader of pre-training, compared with Detectron2's
``read_image``. The images are the VOC samples under ``$RELVIT_SAMPLES``, or else JPEGs of smoothed noise with three
boxes each. ``mapper_S_cached`` reads pixels that DATALOADER.CACHE has kept. The ratio is the speed-up in CPU time, of
the fastest round of each side.

``workers_224`` compares this project's loader with torch's ``DataLoader``: the same mapper, images and batches, two
worker processes, from their start to their end. The ratio is the median over rounds, each of which reads with both in
turn, of the ratio of wall-clock times.
"""

import itertools
import logging
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Pair, Row, arguments, print_rows, seconds
from benchmarks.pretrain import draw_images
from relvit_d2.data.detection.catalog import VOC_CLASSES
from relvit_d2.data.detection.mapper import DetectionMapper, ImageReader
from relvit_d2.data.detection.voc import load_voc
from relvit_d2.data.images.pixel_cache import PixelCache
from relvit_d2.data.loader import ordered_batches
from relvit_d2.detection.run import training_batches
from relvit_d2.tasks import load_config

SIZE = (500, 375)  # width and height of most of VOC's images
CONFIGS = {"224": "configs/paper/voc_vit_s_224.yaml", "512": "configs/voc_vit_s.yaml"}
BATCH, WORKERS = 16, 2
SPEEDS = ("images_per_s", "torch_images_per_s")


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, "loading")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    budget = 5.0 if args.quick else 30.0
    with tempfile.TemporaryDirectory() as folder:
        records = images_with_boxes(Path(folder))[: 32 if args.quick else 80]
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
        for side, path in CONFIGS.items():
            cfg = load_config(path, ["MODEL.MASK_ON", "False", "DATALOADER.NUM_WORKERS", "0"])
            theirs = over(records, DatasetMapper(cfg))
            pairs[f"mapper_{side}"] = over(records, DetectionMapper(cfg)), theirs
            cached = DetectionMapper(cfg, pixels=PixelCache(folder=Path(folder), share=2**30))
            pairs[f"mapper_{side}_cached"] = over(records, cached), theirs
            pairs[f"loader_{side}"] = loaders(cfg, records)
        files = [record["file_name"] for record in records]
        pairs["reader"] = over(files, ImageReader(PixelCache(longest=512))), over(files, plain_reader)
        rows = [row(name, *pair, len(records), budget) for name, pair in pairs.items()]
        print_rows([*rows, workers_row(records * 8, 4 * budget)], args)


def images_with_boxes(folder: Path) -> list[dict[str, Any]]:
    """Return the records of VOC's sample images, or of drawn images."""
    if samples := os.environ.get("RELVIT_SAMPLES"):
        splits = ("trainval", "test")
        return [r for split in splits for r in load_voc(Path(samples) / "VOC2007", split, VOC_CLASSES, False)]
    draw_images(folder / "images", SIZE)
    boxes = [[20.0, 30.0, 220.0, 330.0], [100.0, 80.0, 480.0, 300.0], [260.0, 200.0, 300.0, 260.0]]
    objects = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0} for box in boxes]
    return [
        {"file_name": str(path), "image_id": path.stem, "width": SIZE[0], "height": SIZE[1], "annotations": objects}
        for path in sorted((folder / "images").iterdir())
    ]


def over(items: list[Any], function: Callable[[Any], object]) -> Callable[[], object]:
    """Return a function that maps all items with ``function``, with the same random draws every time."""

    def run() -> None:
        np.random.seed(0)
        for item in items:
            function(item)

    return run


def loaders(cfg: CfgNode, records: list[dict[str, Any]]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return functions that read ``len(records)`` images in batches from our loader, and from Detectron2's."""
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH = BATCH
    ours = iter(training_batches(cfg, records, 0))
    mapper = DatasetMapper(cfg)
    theirs = iter(build_detection_train_loader(records, mapper=mapper, total_batch_size=BATCH, num_workers=0))

    def read(batches: Iterator[Any]) -> None:
        for _ in itertools.islice(batches, len(records) // BATCH):
            pass

    return lambda: read(ours), lambda: read(theirs)


def workers_row(records: list[dict[str, Any]], budget: float) -> Row:
    """Read all records by worker processes of our loader and of torch's, alternately for ``budget`` seconds."""
    mapper = DetectionMapper(load_config(CONFIGS["224"], ["MODEL.MASK_ON", "False"]))

    class Mapped(Dataset[Any]):
        def __len__(self) -> int:
            return len(records)

        def __getitem__(self, index: int) -> Any:
            return mapper(records[index])

    ours = ordered_batches(records, mapper, list, BATCH, WORKERS)
    theirs = DataLoader(Mapped(), BATCH, num_workers=WORKERS, collate_fn=list)
    pairs: list[Pair] = []
    start = time.perf_counter()
    while len(pairs) < 5 or time.perf_counter() - start < budget:
        pairs.append(Pair(*(seconds(partial(deque, batches, 0), "cpu") for batches in (ours, theirs))))
    speed = {name: len(records) / median(times) for name, times in zip(SPEEDS, zip(*pairs, strict=True), strict=True)}
    return {"name": "workers_224", "ratio": median(p.ratio for p in pairs), "images": len(records), **speed}


def plain_reader(path: str) -> torch.Tensor:
    """Read an image ``(3, H, W)`` with Detectron2's ``read_image``."""
    return torch.as_tensor(np.ascontiguousarray(read_image(path, "RGB").transpose(2, 0, 1)))


def row(name: str, ours: Callable[[], object], theirs: Callable[[], object], count: int, budget: float) -> Row:
    """Time both alternately for ``budget`` seconds; return the ratio of the fastest rounds."""
    best = Pair(math.inf, math.inf)
    start = time.perf_counter()
    while time.perf_counter() - start < budget:
        best = Pair(*(min(b, seconds(f, "cpu", time.process_time)) for b, f in zip(best, (ours, theirs), strict=True)))
    speed = {"images_per_s": count / best.ours, "detectron2_images_per_s": count / best.theirs}
    return {"name": name, "ratio": best.ratio, "images": count, **speed}


if __name__ == "__main__":
    main()
