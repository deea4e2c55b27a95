"""Detector configs: values that Detectron2 would fail on, and errors while a detector is built."""

import argparse

import pytest

from benchmarks.detector import PAIRS, VIT, config
from relvit_d2.detection.backbone import SimplePyramid
from relvit_d2.detection.model import build_detector
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError

LEVELS = r"MODEL.RPN.IN_FEATURES has 2 levels \['p2', 'p3'\]: give one list for each level, or one for all"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES [[8],[16],[32]]", f"SIZES has 3 lists, but {LEVELS}"),
        ("MODEL.ANCHOR_GENERATOR.SIZES []", f"SIZES has 0 lists, but {LEVELS}"),
        ("MODEL.ANCHOR_GENERATOR.SIZES [[],[]]", "SIZES .* must be lists of one or more positive numbers"),
        ("MODEL.ANCHOR_GENERATOR.SIZES [[32,64],[64]]", r"give \[4, 2\] anchors per cell"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[1],[1],[1]]", f"ASPECT_RATIOS has 3 lists, but {LEVELS}"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[-1]]", "ASPECT_RATIOS .* positive numbers"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET 1.5", "OFFSET 1.5 is too large: give 1 or less"),
        ("MODEL.ANCHOR_GENERATOR.NAME RotatedAnchorGenerator", "rotated boxes.* set DefaultAnchorGenerator"),
        ("MODEL.RPN.IN_FEATURES ['p2']", r"SIZES has 2 lists, but MODEL.RPN.IN_FEATURES has 1 levels \['p2'\]"),
        ("MODEL.RPN.IN_FEATURES []", "MODEL.RPN.IN_FEATURES is empty"),
        ("MODEL.RPN.IOU_THRESHOLDS [0.3]", r"IOU_THRESHOLDS \[0.3\] and IOU_LABELS \[0, -1, 1\] do not match"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS (1,1)", "MODEL.RPN.BBOX_REG_WEIGHTS .* must be four numbers"),
        ("MODEL.RPN.HEAD_NAME StandardRPNHeda", "'StandardRPNHeda' is not registered .* 'StandardRPNHead'"),
        ("MODEL.ROI_HEADS.IN_FEATURES []", "MODEL.ROI_HEADS.IN_FEATURES is empty"),
        ("MODEL.ROI_HEADS.IN_FEATURES ['p3','p2']", "must be consecutive levels, finest first"),
        ("MODEL.ROI_HEADS.IOU_LABELS [0]", "MODEL.ROI_HEADS.IOU_THRESHOLDS .* do not match"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE ROI", "is not supported; give ROIAlignV2, ROIAlign, ROIPool"),
        ("MODEL.PYRAMID.STRIDES [8.5]", r"MODEL.PYRAMID.STRIDES \[8.5\] are not powers of two"),
        ("MODEL.PYRAMID.STRIDES [-8,0]", r"MODEL.PYRAMID.STRIDES \[-8, 0\] are not powers of two"),
        ("MODEL.PYRAMID.NORM BatchNorm", "MODEL.PYRAMID.NORM 'BatchNorm' is not supported"),
        (
            "MODEL.PYRAMID.NORM SyncBN",
            "'SyncBN' is not supported: it needs batch statistics, .*; give '', LN, GN, FrozenBN",
        ),
        ("MODEL.PYRAMID.NORM BN", "MODEL.PYRAMID.NORM 'BN' is not supported: it needs batch statistics"),
        ("MODEL.PYRAMID.NORM naiveSyncBN", "'naiveSyncBN' is not supported: it needs"),
        ("MODEL.PYRAMID.NORM nnSyncBN", "'nnSyncBN' is not supported: it needs"),
        ("MODEL.ROI_HEADS.NAME CascadeROIHeads", "several box heads, which are not supported: set StandardROIHeads"),
        ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS True", "USE_FED_LOSS has no effect here"),
        ("MODEL.KEYPOINT_ON True", "KEYPOINT_ON has no effect here; .* keypoints are not supported"),
        ("MODEL.DEVICE gpu", "MODEL.DEVICE 'gpu' is not a device of torch; set cpu, cuda or mps"),
        ("INPUT.MIN_SIZE_TRAIN ()", r"INPUT.MIN_SIZE_TRAIN \(\) must be one or more sides"),
        ("INPUT.MIN_SIZE_TRAIN (0,)", r"INPUT.MIN_SIZE_TRAIN \(0,\) must be one or more sides"),
        ("INPUT.MIN_SIZE_TRAIN (9,8) INPUT.MIN_SIZE_TRAIN_SAMPLING range", r"\(9, 8\) is not a range"),
        ("INPUT.MAX_SIZE_TRAIN 0", "INPUT.MAX_SIZE_TRAIN 0 is too small: give 1 or more"),
        ("INPUT.MAX_SIZE_TEST 0", "INPUT.MAX_SIZE_TEST 0 is too small"),
        ("INPUT.MIN_SIZE_TEST -1", "INPUT.MIN_SIZE_TEST -1 is too small: give 0 or more"),
        ("INPUT.RANDOM_FLIP yes", "INPUT.RANDOM_FLIP 'yes' is not supported; give horizontal, vertical, none"),
        ("INPUT.CROP.SIZE [1.5,1]", r"INPUT.CROP.SIZE \[1.5, 1\] does not match CROP.TYPE relative"),
        ("INPUT.LSJ.SCALE [2.0,0.1]", r"INPUT.LSJ.SCALE \[2.0, 0.1\] is not a range"),
        ("INPUT.AUGMENT.MIXUP 1.5", "INPUT.AUGMENT.MIXUP 1.5 is too large: give 1 or less"),
        ("INPUT.AUGMENT.ROTATION -3", "INPUT.AUGMENT.ROTATION -3.0 is too small: give 0 or more"),
        ("INPUT.AUGMENT.HUE 0.6", "INPUT.AUGMENT.HUE 0.6 is too large: give 0.5 or less"),
        (
            "INPUT.CHANNELS 1 MODEL.PIXEL_MEAN [1.0] MODEL.PIXEL_STD [1.0] INPUT.AUGMENT.SATURATION 0.1",
            "INPUT.AUGMENT.SATURATION needs images of 3 channels, but INPUT.CHANNELS is 1: set .* 0",
        ),
        (
            "INPUT.CHANNELS 2 MODEL.PIXEL_MEAN [1.0,1.0] MODEL.PIXEL_STD [1.0,1.0] INPUT.AUGMENT.CONTRAST 0.1",
            "INPUT.AUGMENT.CONTRAST needs images of 1 or 3 channels, but INPUT.CHANNELS is 2",
        ),
        ("SOLVER.BASE_LR -1", "SOLVER.BASE_LR -1.0 is too small"),
    ],
)
def test_values_that_detectron2_would_fail_on_are_refused(overrides: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("configs/demo/streets.yaml", overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "MODEL.ANCHOR_GENERATOR.SIZES [[32,64]]",
        "MODEL.ANCHOR_GENERATOR.SIZES [32,64]",
        "MODEL.ANCHOR_GENERATOR.SIZES [[32,64],[64]] MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[1],[1,2]]",
        "MODEL.RPN.IN_FEATURES ['p2'] MODEL.ANCHOR_GENERATOR.SIZES [[32]]",
        "MODEL.ROI_HEADS.IN_FEATURES ['p3']",
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlign MODEL.PYRAMID.NORM GN MODEL.RPN.BBOX_REG_LOSS_TYPE giou",
    ],
)
def test_values_that_are_accepted_build_a_detector(overrides: str) -> None:
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", "MODEL.PYRAMID.OUT_CHANNELS", "32"]
    build_detector(load_config("configs/demo/streets.yaml", [*overrides.split(), *more]))


def test_what_detectron2_refuses_while_building_is_one_sentence() -> None:
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.NUM_FC", "0"]
    cfg = load_config("configs/demo/streets.yaml", more)
    with pytest.raises(UserError, match=r"cannot build this detector \(AssertionError: assert .*\): correct the keys"):
        build_detector(cfg)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "build_resnet_backbone",
            r"IN_FEATURES names \['p2', 'p3'\], but build_resnet_backbone has the levels \['res4'\]",
        ),
        ("build_retinanet_resnet_fpn_backbone", r"cannot build MODEL.BACKBONE.NAME '.*' \(KeyError: 'res5'\)"),
        (
            "build_resnet_backbone MODEL.RELVIT.JOINT True",
            "JOINT needs an encoder, which .* does not have: set build_encoder_",
        ),
    ],
)
def test_another_backbone_has_to_fit(overrides: str, words: str) -> None:
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME"]
    levels = ["MODEL.RPN.IN_FEATURES", "['p2','p3']", "MODEL.ROI_HEADS.IN_FEATURES", "['p2','p3']"]
    cfg = load_config("configs/demo/streets.yaml", [*levels, *more, *overrides.split()])
    with pytest.raises(UserError, match=words):
        build_detector(cfg)


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError])
def test_a_defect_while_building_is_not_put_on_the_config(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise kind("defect")

    monkeypatch.setattr(SimplePyramid, "__init__", fail)
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu"]
    with pytest.raises(kind, match="defect"):
        build_detector(load_config("configs/demo/streets.yaml", more))


@pytest.mark.parametrize("name", PAIRS)
def test_the_detectors_of_the_benchmark_have_the_same_levels(name: str) -> None:
    args, (keys, backbone) = argparse.Namespace(device="cpu"), PAIRS[name]
    ours, theirs = config(keys, None, args).MODEL, config(VIT, backbone, args).MODEL
    for part in ("RPN", "ROI_HEADS"):
        assert ours[part].IN_FEATURES == theirs[part].IN_FEATURES
    assert backbone == theirs.BACKBONE.NAME
