"""The detection mapper against Detectron2's: draws, boxes and masks bitwise, pixels within one gray level."""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from fvcore.common.config import CfgNode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from relvit_d2.data.detection.catalog import VOC_CLASSES
from relvit_d2.data.detection.mapper import DetectionMapper, ShortestEdge
from relvit_d2.data.detection.voc import load_voc
from relvit_d2.data.images.decode import read_rgb
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError

Record = dict[str, Any]

AUGMENTATIONS: dict[str, tuple[object, ...]] = {
    "reduced": ("INPUT.MIN_SIZE_TRAIN", (224,), "INPUT.MAX_SIZE_TRAIN", 224),
    "choice": ("INPUT.MIN_SIZE_TRAIN", (320, 416, 512), "INPUT.MAX_SIZE_TRAIN", 512),
    "range": ("INPUT.MIN_SIZE_TRAIN", (100, 700), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
    "unresized": ("INPUT.MIN_SIZE_TRAIN", (0,)),
    "vertical": ("INPUT.RANDOM_FLIP", "vertical", "INPUT.MIN_SIZE_TRAIN", (96,)),
    "straight": ("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (96,)),
    "crop": ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative_range", "INPUT.CROP.SIZE", (0.3, 0.4)),
    "pixels": ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (90, 120)),
    "jitter": ("INPUT.LSJ.SIZE", 128, "INPUT.LSJ.SCALE", (0.5, 3.0)),
    "bgr": ("INPUT.FORMAT", "BGR", "INPUT.MIN_SIZE_TRAIN", (96,)),
}


def config(*overrides: object, masks: bool = False) -> CfgNode:
    cfg = load_config("configs/voc_vit_s.yaml", [])
    cfg.merge_from_list(["MODEL.MASK_ON", masks, "INPUT.MAX_SIZE_TRAIN", 800, *overrides])
    return cfg


def theirs(cfg: CfgNode, is_train: bool = True) -> DatasetMapper:
    """Detectron2's mapper; with large-scale jitter, which its config does not have, our list of augmentations."""
    if cfg.INPUT.LSJ.SIZE:
        parts = DetectionMapper.from_config(cfg, is_train)
        return DatasetMapper(**{key: value for key, value in parts.items() if key != "pixels"})
    return DatasetMapper(cfg, is_train)


def assert_same(ours: Record, expected: Record) -> None:
    assert ours.keys() == expected.keys()
    image, truth = ours["image"], expected["image"]
    assert image.dtype == truth.dtype == torch.uint8 and image.shape == truth.shape
    assert image.permute(1, 2, 0).is_contiguous() and image.untyped_storage().nbytes() == image.numel()
    apart = (image.int() - truth.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 0.3
    if "instances" not in expected:
        return
    got, wanted = ours["instances"], expected["instances"]
    assert got.image_size == wanted.image_size
    assert got.get_fields().keys() == wanted.get_fields().keys()
    assert got.gt_boxes.tensor.dtype == wanted.gt_boxes.tensor.dtype
    assert torch.equal(got.gt_boxes.tensor, wanted.gt_boxes.tensor)
    assert got.gt_classes.dtype == wanted.gt_classes.dtype and torch.equal(got.gt_classes, wanted.gt_classes)
    if not wanted.has("gt_masks"):
        return
    if isinstance(wanted.gt_masks, BitMasks):
        assert torch.equal(got.gt_masks.tensor, wanted.gt_masks.tensor)
    else:
        assert isinstance(wanted.gt_masks, PolygonMasks)
        for polygons, others in zip(got.gt_masks.polygons, wanted.gt_masks.polygons, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(polygons, others, strict=True))


def compare(cfg: CfgNode, records: list[Record]) -> None:
    """Both mappers change the generator's state equally and do not change the records."""
    mappers = DetectionMapper(cfg), theirs(cfg)
    before = copy.deepcopy(records)
    found = 0
    for seed, record in enumerate(records):
        results: list[Record] = []
        following: list[float] = []
        for mapper in mappers:
            np.random.seed(seed)
            results.append(mapper(record))
            following.append(np.random.random_sample())
        assert_same(results[0], results[1])
        found += len(results[0]["instances"])
        assert following[0] == following[1]
    assert found > 0
    assert str(records) == str(before)


@pytest.fixture(scope="module")
def voc(samples: Path) -> list[Record]:
    return load_voc(samples / "VOC2007", "trainval", VOC_CLASSES, False)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_custom_augmentations(voc: list[Record]) -> None:
    own = [T.RandomExtent((0.8, 1.2), (0.2, 0.2)), T.RandomFlip()]
    cfg = config()
    for seed, record in enumerate(voc[:4]):
        results = []
        for mapper in (DetectionMapper(cfg, augmentations=own), DatasetMapper(cfg, augmentations=own)):
            np.random.seed(seed)
            results.append(mapper(record))
        assert_same(*results)


@pytest.fixture(scope="module")
def coco(samples: Path) -> list[Record]:
    root = samples / "coco"
    return load_coco_json(str(root / "annotations/instances_train2017.json"), str(root / "train2017"))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_voc_as_detectron2(name: str, voc: list[Record]) -> None:
    compare(config(*AUGMENTATIONS[name]), voc[:6])


@pytest.mark.parametrize("name", ["reduced", "crop", "jitter"])
def test_coco_as_detectron2(name: str, coco: list[Record]) -> None:
    compare(config(*AUGMENTATIONS[name]), coco[:6])


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks_as_detectron2(mask_format: str, coco: list[Record]) -> None:
    # Detectron2 transforms arrays in place; the crowd's RLE must be dropped, another one kept.
    records = copy.deepcopy(coco[:6])
    for record in records:
        for annotation in record["annotations"]:
            if isinstance(annotation["segmentation"], list):
                annotation["segmentation"] = [np.array(p, np.float64) for p in annotation["segmentation"]]
            elif mask_format == "bitmask":
                annotation["iscrowd"] = 0
    compare(config("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MASK_FORMAT", mask_format, masks=True), records)


def test_evaluation_as_detectron2(voc: list[Record]) -> None:
    cfg = config("INPUT.MIN_SIZE_TEST", 224, "INPUT.MAX_SIZE_TEST", 224)
    for record in voc[:3]:
        ours = DetectionMapper(cfg, is_train=False)(record)
        assert_same(ours, theirs(cfg, is_train=False)(record))
        assert "annotations" not in ours


def odd_record(path: Path, size: tuple[int, int]) -> Record:
    objects = [
        {"bbox": [-4.5, 2.25, 30.75, 9.5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 3},
        {"bbox": [5.0, 5.0, 5.0, 9.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0},
        {"bbox": [200.0, 2.0, 210.0, 9.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1},
        {"bbox": [3.3, 2.7, 10.1, 9.9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
        {"bbox": [0.0, 0.0, 20.0, 20.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2, "iscrowd": 1},
    ]
    return {"file_name": str(path), "image_id": 7, "width": size[0], "height": size[1], "annotations": objects}


def test_extreme_boxes_and_no_boxes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(40, 30).save(path)
    record = odd_record(path, (40, 30))
    for name in ("straight", "jitter", "crop", "reduced"):
        compare(config(*AUGMENTATIONS[name]), [record])
        np.random.seed(0)
        instances = DetectionMapper(config(*AUGMENTATIONS[name]))({**record, "annotations": []})["instances"]
        assert instances.gt_boxes.tensor.shape == (0, 4) and instances.gt_classes.dtype == torch.int64


def test_integer_boxes_are_not_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(40, 30).save(path)
    box = {"bbox": [3, 5, 20, 21], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": str(path), "image_id": 7, "width": 40, "height": 30, "annotations": [box]}
    instances = DetectionMapper(config("INPUT.MIN_SIZE_TRAIN", (45,), "INPUT.RANDOM_FLIP", "none"))(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[4.5, 7.5, 30.0, 31.5]]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_orientation_equals_detectron2(tmp_path: Path, form: str, orientation: int) -> None:
    path = tmp_path / "turned"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(37, 22).save(path, form, exif=exif)
    assert np.array_equal(read_rgb(path), read_image(str(path), "RGB"))


JPEGS: dict[str, tuple[str, dict[str, Any]]] = {
    "grey": ("L", {}),
    "cmyk": ("CMYK", {}),
    "rgb coded": ("RGB", {"keep_rgb": True}),
    "progressive": ("RGB", {"progressive": True}),
    "4:4:4": ("RGB", {"subsampling": 0}),
    "4:2:0": ("RGB", {"subsampling": 2, "quality": 30}),
    "restarts": ("RGB", {"restart_marker_blocks": 1}),
    "damaged exif": ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff"}),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_pixels_equal_detectron2(tmp_path: Path, kind: str) -> None:
    mode, options = JPEGS[kind]
    path = tmp_path / "a.jpg"
    noise(45, 31).convert(mode).save(path, **options)
    assert np.array_equal(read_rgb(path), read_image(str(path), "RGB"))


def test_truncated_jpeg_equals_pillow(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(64, 48).save(buffer, "JPEG")
    whole, path = buffer.getvalue(), tmp_path / "cut.jpg"
    outcomes = set()
    for length in [*range(0, len(whole), 199), *range(len(whole) - 4, len(whole) + 1)]:
        path.write_bytes(whole[:length])
        try:
            expected = read_image(str(path), "RGB")
        except OSError:
            outcomes.add("refused")
            with pytest.raises(UserError):
                read_rgb(path)
        else:
            outcomes.add("read")
            assert np.array_equal(read_rgb(path), expected), length
    assert outcomes == {"refused", "read"}


def test_invalid_images_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(40, 30).save(path)
    mapper = DetectionMapper(config())
    with pytest.raises(UserError, match=r"a\.png' has 40 x 30 pixels, but 41 x 30 were recorded"):
        mapper(odd_record(path, (41, 30)))
    for form in ("RGB", "BGR"):
        with pytest.raises(UserError, match=r"absent\.png' does not exist"):
            DetectionMapper(config("INPUT.FORMAT", form))(odd_record(tmp_path / "absent.png", (40, 30)))


@pytest.mark.parametrize("name", ["reduced", "range", "jitter"])
@pytest.mark.parametrize("size", [(2000, 4), (4, 2000), (3000, 1), (1, 1)])
def test_extreme_aspect_ratios_keep_a_pixel_per_side(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    noise(*size).save(tmp_path / "a.png")
    width, height = size
    record = odd_record(tmp_path / "a.png", size)
    record["annotations"] = [
        {"bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    ]
    for is_train in (True, False):
        sizes = ("INPUT.MIN_SIZE_TEST", 224, "INPUT.MAX_SIZE_TEST", 224)
        mapped = DetectionMapper(config(*AUGMENTATIONS[name], *sizes), is_train)(record)
        assert min(mapped["image"].shape) > 0
        if is_train:
            assert mapped["instances"].gt_boxes.area().min() > 0
            assert mapped["instances"].image_size == mapped["image"].shape[1:]


@given(st.tuples(*[st.integers(1, 4000)] * 2), st.integers(1, 900), st.integers(1, 1400))
def test_resizing_equals_detectron2_unless_a_side_would_be_empty(
    size: tuple[int, int], short: int, longest: int
) -> None:
    expected = T.ResizeShortestEdge.get_output_shape(*size, short, longest)
    assert ShortestEdge.get_output_shape(*size, short, longest) == (max(expected[0], 1), max(expected[1], 1))


def test_semantic_segmentation_labels_are_mapped(tmp_path: Path) -> None:
    noise(40, 30).save(tmp_path / "a.png")
    noise(40, 30).convert("L").save(tmp_path / "labels.png")
    record = odd_record(tmp_path / "a.png", (40, 30)) | {"sem_seg_file_name": str(tmp_path / "labels.png")}
    assert DetectionMapper(config("INPUT.MIN_SIZE_TRAIN", (60,)))(record)["sem_seg"].shape == (60, 80)
