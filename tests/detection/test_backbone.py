"""The backbone with Detectron2's interface: padding, levels, gradients, errors, independence of the batch."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, BoxMode, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch.utils._pytree import tree_leaves
from torchvision.io import write_png

from relvit_d2.detection import backbone
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.detection.evaluation import evaluate
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.run import training_records
from relvit_d2.encoders import ENCODERS, build_encoder
from relvit_d2.encoders.vit import ViT
from relvit_d2.report.runs import read_runs
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.detectors import fitting, tiny_config


def image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(height * width)).float()


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("sizes", [[(225, 301), (200, 300)], [(33, 47)], [(64, 64)]])
def test_the_padded_batch_and_the_maps_cover_every_pixel(name: str, sizes: list[tuple[int, int]]) -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    cfg.merge_from_list([*fitting(name, (4, 2, 1, 0.5)), "MODEL.PYRAMID.OUT_CHANNELS", 16])
    strides, levels = cfg.MODEL.PYRAMID.STRIDES, cfg.MODEL.RPN.IN_FEATURES
    net = backbone.build_encoder_pyramid_backbone(cfg, None).eval()
    batch = ImageList.from_tensors(
        [image(*size) for size in sizes], net.size_divisibility, padding_constraints=net.padding_constraints
    )
    height, width = batch.tensor.shape[-2:]
    assert net.size_divisibility == strides[-1]
    assert height % strides[-1] == width % strides[-1] == 0
    assert height >= max(h for h, _ in sizes)
    assert width >= max(w for _, w in sizes)
    with torch.no_grad():
        maps = net(batch.tensor)
    assert list(maps) == [*levels, f"p{strides[-1].bit_length()}"]
    for level, shape in net.output_shape().items():
        expected = (-(-height // shape.stride), -(-width // shape.stride))
        assert maps[level].shape == (len(sizes), shape.channels, *expected)


def test_the_last_pixels_of_an_odd_image_reach_the_features() -> None:
    """Detectron2's own pyramid does not pad (a misspelt key) and would cut these pixels off."""
    model = build_detector(tiny_config()).eval()
    first = image(45, 51)
    second = first.clone()
    second[:, -1, -1] = 255 - second[:, -1, -1]
    with torch.no_grad():
        maps = [model.backbone(model.preprocess_image([{"image": i}]).tensor)["p2"] for i in (first, second)]
    assert (maps[0] - maps[1]).abs().max() > 1e-4


def records(sizes: list[tuple[int, int]]) -> list[dict[str, object]]:
    batch = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 16.0, 24.0], [20.0, 8.0, 30.0, 30.0]]))
        instances.gt_classes = torch.tensor([1, 2])
        batch.append({"image": image(height, width), "instances": instances, "height": height, "width": width})
    return batch


def test_every_parameter_has_a_gradient_and_odd_sizes_are_predicted() -> None:
    torch.manual_seed(0)
    model = build_detector(tiny_config())
    with EventStorage():
        losses = model(records([(47, 61), (64, 33)]))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        outputs = model(records([(47, 61), (64, 33)]))
    for output, (height, width) in zip(outputs, [(47, 61), (64, 33)], strict=True):
        boxes = output["instances"].pred_boxes.tensor
        assert output["instances"].image_size == (height, width)
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()


def test_tta_without_augmentation_equals_plain_evaluation() -> None:
    """Detections and masks."""
    keys = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    cfg = tiny_config(*keys, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.MAX_SIZE", 96, "TEST.AUG.FLIP", False)
    torch.manual_seed(0)
    model = build_detector(cfg).eval()
    batch = [{"image": image(h, w).byte(), "height": h, "width": w} for h, w in ((64, 80), (90, 64))]
    with torch.no_grad():
        plain = [out["instances"] for out in model(batch)]
        augmented = [out["instances"] for out in GeneralizedRCNNWithTTA(cfg, model)(batch)]
        cfg.TEST.AUG.FLIP, cfg.TEST.AUG.MIN_SIZES = True, (48, 64)
        flipped = [out["instances"] for out in GeneralizedRCNNWithTTA(cfg, model)(batch)]
    for expected, found, other in zip(plain, augmented, flipped, strict=True):
        assert len(expected) == len(found) > 5 and found.image_size == expected.image_size == other.image_size
        assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
        assert torch.allclose(found.scores, expected.scores, atol=1e-5)
        assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3
        assert len(other) > 5 and other.pred_masks.shape[1:] == other.image_size
        assert not torch.allclose(other.scores[:5], expected.scores[:5], atol=1e-5)


def test_masks_are_trained_if_the_data_have_them() -> None:
    model = build_detector(tiny_config("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1))
    batch = records([(47, 61)])
    polygons = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()] for box in batch[0]["instances"].gt_boxes.tensor]  # type: ignore[attr-defined]
    batch[0]["instances"].gt_masks = PolygonMasks(polygons)  # type: ignore[attr-defined]
    with EventStorage():
        assert model(batch)["loss_mask"].isfinite()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.PYRAMID.STRIDES", [4, 16]], r"MODEL.PYRAMID.STRIDES \[4, 16\].*each twice"),
        (["MODEL.PYRAMID.STRIDES", [16, 32]], "MODEL.PYRAMID.STRIDES"),
        (["MODEL.RPN.IN_FEATURES", ["p2", "p6"]], r"MODEL.RPN.IN_FEATURES names \['p6'\]"),
        (["MODEL.ENCODER.NAME", "vit_nanno"], "did you mean 'vit_nano'"),
    ],
)
def test_invalid_keys_are_reported(overrides: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(tiny_config(*overrides))


def test_difficult_objects_are_trained_on_unless_disabled(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    names = ["DATASETS.TRAIN", ("voc_2007_trainval", "voc_2007_test"), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False]
    with_difficult = training_records(tiny_config(*names))
    without = training_records(tiny_config(*names, "DATASETS.TRAIN_DIFFICULT", False))
    assert sum(len(r["annotations"]) for r in with_difficult) == 333
    assert sum(len(r["annotations"]) for r in without) == 333 - 112
    # Images with only difficult objects count as images without objects.
    filtered = training_records(tiny_config(*names[:2], "DATASETS.TRAIN_DIFFICULT", False))
    assert len(filtered) == sum(bool(r["annotations"]) for r in without)


def test_scores_and_offsets_are_float32_under_autocast() -> None:
    model = build_detector(tiny_config()).eval()
    seen: list[torch.Tensor] = []
    rpn, box = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    for head in (rpn, box):
        head.register_forward_hook(lambda module, inputs, outputs: seen.extend(tree_leaves(outputs)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(records([(47, 61)]))
    assert len(seen) == 6  # scores and offsets of two levels, then of the boxes
    for values in seen:
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())


TAPPED = ("MODEL.PYRAMID.NAME", "multitap", "MODEL.PYRAMID.STRIDES", "[2,4,8]", "MODEL.PYRAMID.TOP_BLOCK", True)


def test_an_fpn_on_several_blocks_of_a_vit() -> None:
    levels = ("MODEL.RPN.IN_FEATURES", "['p1','p2','p3','p4']", "MODEL.ROI_HEADS.IN_FEATURES", "['p1','p2','p3']")
    sizes = ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[8],[16],[16]]")
    model = build_detector(tiny_config(*TAPPED, *levels, *sizes))
    net = model.backbone
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 32, 48))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    taps = net.encoder(torch.randn(1, 3, 32, 48))
    assert list(taps) == ["b1", "b2", "s4"] and {t.shape[2:] for t in taps.values()} == {(8, 12)}


def test_a_block_map_is_the_output_of_its_block_after_the_norm() -> None:
    encoder = build_encoder("vit_nano", patch_size=4, img_size=32).eval()
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = encoder(images)["s4"]
        encoder.select_blocks(2)
        maps = encoder(images)
        half = build_encoder("vit_nano", patch_size=4, img_size=32).eval()
        half.load_state_dict(encoder.state_dict())
        assert isinstance(half, ViT)
        del half.vit.blocks[2:]
        torch.testing.assert_close(maps["b2"], half(images)["s4"])
    torch.testing.assert_close(maps["s4"], plain)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.PYRAMID.NAME", "fnp"), "simple, fpn, multitap"),
        (("MODEL.PYRAMID.NAME", "fpn"), "must be among the strides .* for MODEL.PYRAMID.NAME fpn"),
        (("MODEL.PYRAMID.NAME", "multitap", "MODEL.PYRAMID.STRIDES", "[32,64]"), "do not fit"),
    ],
)
def test_impossible_pyramids_are_reported(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(tiny_config(*overrides))


def test_the_first_blocks_can_be_frozen() -> None:
    net = build_detector(tiny_config("MODEL.BACKBONE.FREEZE_AT", 2)).backbone
    frozen = {name for name, p in net.encoder.named_parameters() if not p.requires_grad}
    first = ("vit.patch_embed", "vit.pos_embed", "vit.cls_token", "vit.blocks.0.")
    assert frozen == {name for name, _ in net.encoder.named_parameters() if name.startswith(first)}
    with pytest.raises(UserError, match="up to 5"):
        build_detector(tiny_config("MODEL.BACKBONE.FREEZE_AT", 6))


def scatter(model: torch.nn.Module) -> None:
    """Randomise the weights, so that positions and objectness have an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


SIZES = [(40, 100), (97, 33), (64, 128), (33, 47)]  # wide, tall, the largest, the smallest; not multiples of a patch


def mixed_batch_config(name: str, pyramid: str, *overrides: object) -> CfgNode:
    scales = (4, 2, 1) if pyramid == "fpn" else (2, 1, 0.5)
    few = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 300, "MODEL.RPN.POST_NMS_TOPK_TEST", 200, "TEST.DETECTIONS_PER_IMAGE", 50]
    anchors = ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64]]]
    keys = [*fitting(name, scales), "MODEL.PYRAMID.NAME", pyramid, "MODEL.PYRAMID.TOP_BLOCK", True, *few, *anchors]
    cfg = tiny_config(*keys, "MODEL.ENCODER.IMG_SIZE", 64, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *overrides)
    last = cfg.MODEL.PYRAMID.STRIDES[-1].bit_length()
    cfg.MODEL.RPN.IN_FEATURES = [*cfg.MODEL.RPN.IN_FEATURES, f"p{last}"]
    return cfg


CASES = [
    pytest.param(name, pyramid, keys, marks=pytest.mark.slow if name in ("vit_tiny", "vit_base", "vit_small") else ())
    for name in ENCODERS
    for pyramid in (("simple", "fpn") if name == "swin_tiny" else ("simple", "multitap"))
    for keys in [(), *[("MODEL.ENCODER.WINDOW", 3, "MODEL.ENCODER.GLOBAL_BLOCKS", 1)] * name.startswith("vit")]
]
CASES += [pytest.param(name, "fpn", ()) for name in ("timm:test_convnext", "timm:test_resnet")]
CASES += [
    pytest.param(name, "simple", keys, marks=pytest.mark.slow)
    for name in ("timm:vit_tiny_patch16_dinov3_qkvb", "timm:eva02_tiny_patch14_224")
    for keys in ((), ("MODEL.ENCODER.WINDOW", 3, "MODEL.ENCODER.GLOBAL_BLOCKS", 1))
]


@pytest.mark.parametrize(("name", "pyramid", "keys"), CASES)
def test_results_of_an_image_do_not_depend_on_larger_images_in_the_batch(
    name: str, pyramid: str, keys: tuple[object, ...]
) -> None:
    """Features inside its padded size, proposals and detections."""
    torch.manual_seed(0)
    model = build_detector(mixed_batch_config(name, pyramid, *keys)).eval()
    scatter(model)
    batch = records(SIZES)
    with torch.no_grad():
        images = model.preprocess_image(batch)
        levels = model.features(images)
        proposals, _ = model.proposal_generator(images, levels, None)
        found = model(batch)
        for number, entry in enumerate(batch):
            own = model.preprocess_image([entry])
            own_levels = model.features(own)
            for level, expected in own_levels.items():
                rows, cols = expected.shape[2:]
                torch.testing.assert_close(
                    levels[level][number : number + 1, :, :rows, :cols], expected, rtol=1e-4, atol=1e-4
                )
            (own_proposals,), _ = model.proposal_generator(own, own_levels, None)
            assert len(own_proposals) > 20
            boxes = own_proposals.proposal_boxes.tensor
            torch.testing.assert_close(proposals[number].proposal_boxes.tensor, boxes, rtol=1e-4, atol=1e-3)
            alone, beside = model([entry])[0]["instances"], found[number]["instances"]
            assert len(alone) == len(beside) > 5
            torch.testing.assert_close(beside.scores, alone.scores, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(beside.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
            assert torch.equal(beside.pred_classes, alone.pred_classes)


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """Detections of images of several sizes in batches of one and of four."""
    data, found = [], []
    for number, (height, width) in enumerate([(64, 96), (96, 64), (64, 64), (80, 60)]):
        path = tmp_path / f"{number}.png"
        write_png(image(height, width).to(torch.uint8), str(path))
        truth = {"bbox": [4.0, 4.0, 20.0, 30.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
        size = {"height": height, "width": width, "file_name": str(path)}
        data.append({"image_id": number, "annotations": [truth], **size})
    for batch in (1, 4):
        torch.manual_seed(0)
        output = tmp_path / str(batch)
        few = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10]
        cfg = tiny_config("TEST.BATCH_SIZE", batch, "OUTPUT_DIR", str(output), *few)
        model = build_detector(cfg)
        scatter(model)
        output.mkdir()
        (output / "config.yaml").write_text("TEST: {DETECTIONS_PER_IMAGE: 300}\n")  # left by an earlier training
        assert read_runs([output])[0].detection_limit == 300
        evaluate(cfg, model, {"svhn_test": data})
        assert read_runs([output])[0].detection_limit == 10
        found.append(json.loads((output / "inference/coco_instances_results.json").read_text()))
    one, four = found
    assert len(one) == len(four) == 40
    for mine, other in zip(one, four, strict=True):
        assert mine["image_id"] == other["image_id"] and mine["category_id"] == other["category_id"]
        assert [*mine["bbox"], mine["score"]] == pytest.approx([*other["bbox"], other["score"]], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_levels_that_are_left_empty_follow_the_encoder(name: str) -> None:
    """Every encoder gets a pyramid that can be built, and heads that read all of its levels."""
    patch = build_encoder(name).arguments["patch_size"]
    keys = ["MODEL.ENCODER.NAME", name, "MODEL.ENCODER.PATCH_SIZE", str(patch), "MODEL.ENCODER.IMG_SIZE", "224"]
    cfg = load_config(
        "configs/voc_vit_s.yaml", [*keys, "MODEL.DEVICE", "cpu", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    )
    built = backbone.build_encoder_pyramid_backbone(cfg, ShapeSpec(channels=3))
    assert list(built.output_shape()) == cfg.MODEL.RPN.IN_FEATURES
    assert cfg.MODEL.RPN.IN_FEATURES[:-1] == cfg.MODEL.ROI_HEADS.IN_FEATURES
    assert [shape.stride for shape in built.output_shape().values()][:-1] == cfg.MODEL.PYRAMID.STRIDES
    assert 4 in cfg.MODEL.PYRAMID.STRIDES


def test_a_changed_patch_size_changes_the_levels() -> None:
    keys = ["MODEL.ENCODER.PATCH_SIZE", "8", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    assert load_config("configs/voc_vit_s.yaml", keys).MODEL.PYRAMID.STRIDES == [4, 8, 16]
    given = load_config("configs/voc_vit_s.yaml", [*keys, "MODEL.PYRAMID.STRIDES", "[8,16]"])
    assert given.MODEL.RPN.IN_FEATURES == ["p3", "p4", "p5"]
