"""The augmentation of training samples: draws are a function of the seed, labels follow the pixels, all off is off."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from PIL import Image
from pycocotools import mask as coco_mask

from relvit_d2.data.detection.augmentation import AugmentedMapper
from relvit_d2.data.detection.composition import Sample
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.detection.records import Record
from relvit_d2.data.images.decode import UnreadableImageError
from relvit_d2.data.loader import Batches, EndlessOrder
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.run import resolve_config, training_batches
from tests.support.colored_objects import PER_IMAGE, check, scene
from tests.support.detectors import tiny_config
from tests.support.runs import equal, rows
from tests.support.scripts import command, run

ALL = {"MOSAIC": 0.5, "COPY_PASTE": 0.5, "MIXUP": 0.5, "ROTATION": 15, "ERASING": 0.5}
COLORS = {"BRIGHTNESS": 0.4, "CONTRAST": 0.4, "SATURATION": 0.4, "HUE": 0.1}


def config(keys: dict[str, float], *overrides: object) -> CfgNode:
    pairs = [part for key, value in keys.items() for part in (f"INPUT.AUGMENT.{key}", float(value))]
    return tiny_config("INPUT.MIN_SIZE_TRAIN", (40, 64), "INPUT.MAX_SIZE_TRAIN", 96, *pairs, *overrides)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Images of noise: with objects and an ignore region, without objects, and a tiny one."""
    folder, draw = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    records: list[Record] = []
    for number, (width, height) in enumerate([(90, 60), (60, 80), (70, 70), (50, 40), (1, 3)]):
        path = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        objects = []
        for kind in range(number % 4):
            x, y = draw.uniform(0, width / 2), draw.uniform(0, height / 2)
            box = [x, y, x + width / 3, y + height / 3]
            mask = [[box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]]
            objects.append(
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": kind, "iscrowd": int(kind == 2)}
                | {"segmentation": mask}
            )
        size = {"width": width, "height": height}
        records.append({"file_name": str(path), "image_id": number, **size, "annotations": objects})
    return records


def as_rle(record: Record) -> Record:
    """The record with encoded masks instead of polygons."""
    size = record["height"], record["width"]
    return record | {
        "annotations": [
            a | {"segmentation": coco_mask.frPyObjects(a["segmentation"], *size)[0]} for a in record["annotations"]
        ]
    }


def flat(mapped: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of a mapped record."""
    instances = mapped["instances"]
    tensors = [mapped["image"], instances.gt_boxes.tensor, instances.gt_classes]
    if hasattr(instances, "regions"):
        tensors.append(instances.regions.tensor)
    return [*tensors, instances.gt_masks.tensor] if instances.has("gt_masks") else tensors


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = zip(flat(one), flat(other), strict=True)
    return all(type(a) is type(b) and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def batches(cfg: CfgNode, records: list[Record], start: int, workers: int, rank: int = 0, world: int = 1) -> Batches:
    order = EndlessOrder(len(records), 4, cfg.SEED, start, rank, world)
    mapper = AugmentedMapper(cfg, DetectionMapper(cfg), records)
    return Batches(records, mapper, list, order, cfg.SEED, workers)


def all_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) > 0 and all(map(same, one, other))


def drawn(cfg: CfgNode, records: list[Record], iterations: int, **options: int) -> list[dict[str, Any]]:
    found = batches(cfg, records, **({"start": 0, "workers": 0} | options))
    return [mapped for _, batch in zip(range(iterations), found, strict=False) for mapped in batch]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("jitter", [0, 64])
def test_samples_are_a_function_of_the_seed(masks: bool, jitter: int, records: list[Record]) -> None:
    cfg = config(ALL | COLORS, "MODEL.MASK_ON", masks, "INPUT.MASK_FORMAT", "bitmask", "INPUT.LSJ.SIZE", jitter)
    records = [as_rle(record) for record in records]  # Detectron2 needs shapely to crop polygons
    expected = drawn(cfg, records, 6)
    assert any(hasattr(mapped["instances"], "regions") for mapped in expected)
    assert any(mapped["instances"].has("gt_masks") for mapped in expected) == masks
    for mapped in expected:
        height, width = mapped["image"].shape[1:]
        assert mapped["instances"].image_size == (height, width) and mapped["image"].dtype == torch.uint8
    resumed = drawn(cfg, records, 3, start=3)
    parts = [drawn(cfg, records, 6, rank=rank, world=2) for rank in range(2)]
    shared = [mapped for i in range(0, 12, 2) for part in parts for mapped in part[i : i + 2]]
    assert all_same(expected[12 : 12 + len(resumed)], resumed) and all_same(expected[: len(shared)], shared)
    if masks and not jitter:
        assert all_same(expected, drawn(cfg, records, 6, workers=2))


@pytest.mark.parametrize("jitter", [0, 96])
@pytest.mark.parametrize(("order", "keys"), [("RGB", {"MOSAIC": 0.5, "COPY_PASTE": 0.5}), ("BGR", {"ROTATION": 20})])
def test_labels_of_mapped_samples_follow_pixels(
    jitter: int, order: str, keys: dict[str, float], tmp_path: Path
) -> None:
    """At several sizes and with large-scale jitter. A rotation would mix the colours of touching objects."""
    colored = []
    for number in range(4):
        sample = scene(number, PER_IMAGE * number)
        Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(path := tmp_path / f"{number}.png")
        labelled = [*zip(sample.boxes.tolist(), sample.classes.tolist(), strict=True), (sample.regions[0].tolist(), 0)]
        objects = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": kind, "iscrowd": int(index == PER_IMAGE)}
            for index, (box, kind) in enumerate(labelled)
        ]
        colored.append({"file_name": str(path), "image_id": number, "height": 90, "width": 120, "annotations": objects})
    black = ("MODEL.PIXEL_MEAN", (0.0, 0.0, 0.0), "INPUT.FORMAT", order, "INPUT.LSJ.SIZE", jitter)
    cfg = config(keys, *black, "INPUT.MIN_SIZE_TRAIN", (80, 130), "INPUT.MAX_SIZE_TRAIN", 160)
    for mapped in drawn(cfg, colored, 6):
        mapped["image"] = mapped["image"].flip(0) if order == "BGR" else mapped["image"]
        check(Sample.of(mapped, with_masks=False), tight=False)


def test_samples_do_not_depend_on_torch_and_do_not_change_its_generator(records: list[Record]) -> None:
    cfg = config(ALL | COLORS)
    expected = drawn(cfg, records, 2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert all_same(expected, drawn(cfg, records, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_off_is_the_mapper(records: list[Record]) -> None:
    cfg = resolve_config(config({}, "MODEL.MASK_ON", True), records)
    assert cfg.INPUT.MASK_FORMAT == "polygon"
    mapper = DetectionMapper(cfg)
    order = EndlessOrder(len(records), cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, 0)
    plain = Batches(records, mapper, list, order, cfg.SEED, 0)
    for one, other, _ in zip(plain, training_batches(cfg, records, 0), range(3), strict=False):
        for mapped, unchanged in zip(one, other, strict=True):
            assert torch.equal(mapped["image"], unchanged["image"])
            assert str(mapped["instances"]) == str(unchanged["instances"])
    np.random.seed(0)
    expected = mapper(records[3])
    np.random.seed(0)
    assert str(AugmentedMapper(cfg, mapper, records)(records[3])) == str(expected)


@pytest.mark.parametrize("key", [*ALL, *COLORS])
def test_each_key_changes_samples_and_colours_only_pixels(key: str, records: list[Record]) -> None:
    strength = 1.0 if key in ("MOSAIC", "COPY_PASTE", "MIXUP", "ERASING") else (ALL | COLORS)[key]
    resolved = resolve_config(config({key: strength}, "MODEL.MASK_ON", True), records)
    assert ("polygon" if key in COLORS else "bitmask") == resolved.INPUT.MASK_FORMAT
    cfg = config({key: strength})
    samples, plain = (next(iter(training_batches(c, records, 0))) for c in (cfg, config({})))
    assert not all(a["image"].equal(b["image"]) for a, b in zip(samples, plain, strict=True))
    if key in COLORS:
        assert all(str(a["instances"]) == str(b["instances"]) for a, b in zip(samples, plain, strict=True))


def test_colors_of_gray_images(tmp_path: Path) -> None:
    """Saturation and hue leave gray as it is; brightness and contrast change it within their ranges."""
    path = tmp_path / "gray.png"
    Image.new("RGB", (40, 30), (100, 100, 100)).save(path)
    record = {"file_name": str(path), "image_id": 0, "width": 40, "height": 30, "annotations": []}

    def values(keys: dict[str, float]) -> set[int]:
        mapper = AugmentedMapper(cfg := config(keys), DetectionMapper(cfg), [record])
        images = [mapper(record)["image"] for _ in range(40)]
        return {value for image in images for value in image.unique().tolist()}

    assert values({"SATURATION": 1, "HUE": 0.5, "CONTRAST": 1}) <= {98, 99, 100, 101, 102}  # rounded to gray
    bright = values({"BRIGHTNESS": 0.2})
    assert min(bright) >= 80 and max(bright) <= 120 and len(bright) > 10


def test_colors_do_not_depend_on_the_order_of_channels(records: list[Record]) -> None:
    results = []
    for order in ("RGB", "BGR"):
        cfg = config(COLORS, "INPUT.FORMAT", order)
        results.append([mapped["image"] for mapped in drawn(cfg, records, 2)])
    assert all(torch.equal(rgb, bgr.flip(0)) for rgb, bgr in zip(*results, strict=True))


def test_unreadable_images_to_compose_are_replaced(records: list[Record]) -> None:
    missing = [{**records[0], "file_name": "absent.png"}, records[1]]
    for skips in (True, False):
        cfg = config({"MIXUP": 1}, "DATASETS.SKIP_UNREADABLE", skips)
        mapper = AugmentedMapper(cfg, DetectionMapper(cfg), missing)
        count = len(records[1]["annotations"])
        np.random.seed(0)
        if skips:
            assert all(len(mapper(records[1])["instances"]) == 2 * count for _ in range(8))
        else:
            with pytest.raises(UnreadableImageError, match=r"absent\.png"):
                [mapper(records[1]) for _ in range(8)]


def test_a_mask_detector_trains_on_the_samples(records: list[Record]) -> None:
    cfg = resolve_config(config(ALL | COLORS, "MODEL.MASK_ON", True, "SOLVER.IMS_PER_BATCH", 4), records)
    model = build_detector(cfg)
    for batch, _ in zip(training_batches(cfg, records, 0), range(2), strict=False):
        with EventStorage():
            losses = model(batch)
        assert "loss_mask" in losses and all(loss.isfinite() for loss in losses.values())


@pytest.mark.slow
def test_a_killed_run_resumes_exactly_with_other_workers(root: Path, tmp_path: Path) -> None:
    keys = [part for key, value in (ALL | COLORS).items() for part in (f"INPUT.AUGMENT.{key}", value)]
    keys += ["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(root, *command("train_net.py", whole, *keys, "DATALOADER.NUM_WORKERS", 0))
    killed = command("train_net.py", broken, *keys, "DATALOADER.NUM_WORKERS", 2)
    run(root, *killed, status=-signal.SIGKILL, fault="step:5")
    run(root, *command("train_net.py", broken, *keys, "DATALOADER.NUM_WORKERS", 1, flags=("--resume",)))
    first, second = (torch.load(output / "model_final.pth", weights_only=True) for output in (whole, broken))
    assert equal(first["model"], second["model"]) and equal(first["optimizer"], second["optimizer"])
    assert rows(whole) == rows(broken)
