"""Checkpoints of Detectron2's detectors: features and detections are those of its own models."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from relvit_d2.config.config_file import override_words
from relvit_d2.conversion.detectron2_checkpoint import config_keys, find_detector
from relvit_d2.conversion.detectron2_detector import adapt_checkpoint, renamed
from relvit_d2.detection.model import build_detector
from relvit_d2.encoders.swin import SWIN_SIZES
from relvit_d2.engine.weights import load_trained, load_weights
from relvit_d2.tasks import load_config
from relvit_d2.utils.config_keys import get_key
from relvit_d2.utils.errors import UserError
from tests.support.detectron2_models import SIDE, detectron2_model, encoder_keys, fields


def config(tensors: dict[str, Tensor], *overrides: Any) -> CfgNode:
    found = find_detector("file", tensors)
    assert found is not None
    keys = config_keys(found) | {"MODEL.ROI_HEADS.NUM_CLASSES": found.classes, "MODEL.DEVICE": "cpu"}
    return load_config("configs/base/detection.yaml", [*override_words(keys), *map(str, overrides)])


def ours(theirs: nn.Module, *overrides: Any) -> Any:
    """Return this package's detector with the tensors of Detectron2's."""
    checkpoint = {"model": theirs.state_dict()}
    cfg = config(checkpoint["model"], *overrides)
    model = build_detector(cfg).eval()
    report = adapt_checkpoint("file", checkpoint, model.state_dict(), partial(get_key, cfg), None)
    assert "loaded" in report
    model.load_state_dict(checkpoint["model"])
    return model


def check_equal(mine: Any, theirs: Any, sizes: list[tuple[int, int]]) -> None:
    images = [torch.randint(0, 256, (3, *size)).to(torch.uint8) for size in sizes]
    inputs = [{"image": image, "height": 2 * image.shape[1], "width": 2 * image.shape[2]} for image in images]
    with torch.no_grad():
        batches = [model.preprocess_image(inputs).tensor for model in (mine, theirs)]
        torch.testing.assert_close(*batches)
        levels = [model.backbone(batch) for model, batch in zip((mine, theirs), batches, strict=True)]
        assert levels[0].keys() == levels[1].keys()
        for name, expected in levels[1].items():
            assert ((levels[0][name] - expected).abs().max() / expected.abs().max()).item() < 1e-4, name
        found, expected = (model(inputs) for model in (mine, theirs))
    check_instances(found, expected)


def check_instances(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        values, wanted = fields(one["instances"]), fields(other["instances"])
        assert len(values["scores"]) and values.keys() == wanted.keys()
        # A pixel whose probability is one half is on either side.
        if "masks" in values:
            assert (values.pop("masks") != wanted.pop("masks")).float().mean() < 1e-5
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-3)


def loaded(
    path: Path, model: nn.Module, cfg: CfgNode, names: list[str] | None, log: pytest.LogCaptureFixture
) -> dict[str, Tensor]:
    """Load a checkpoint as MODEL.WEIGHTS; return the state of the detector."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(path)
    with log.at_level("INFO"):
        load_weights(cfg, model, model.backbone.encoder, cfg.INPUT.FORMAT, names)  # type: ignore[arg-type,union-attr]
    return model.state_dict()


LAYERS = {"roi_heads.box_predictor.cls_score": 1, "roi_heads.box_predictor.bbox_pred": 4}
LAYERS |= {"roi_heads.mask_head.predictor": 1}


def test_layers_of_other_classes_are_new_except_for_classes_of_the_same_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = detectron2_model(encoder_keys(), classes=3)
    before = theirs.state_dict()
    cfg = config(before, "MODEL.ROI_HEADS.NUM_CLASSES", 4)
    torch.save({"model": before}, tmp_path / "a.pth")
    torch.save({"model": before, "class_names": ["cat", "dog", "cow"]}, tmp_path / "b.pth")
    new = build_detector(cfg)
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    state = loaded(tmp_path / "a.pth", new, cfg, ["tree", "cow", "cat", "bird"], caplog)
    assert re.search(r"new +6: roi_heads.box_predictor.bbox_pred, .*, roi_heads.mask_head.predictor\n", caplog.text)
    assert all(torch.equal(state[f"{layer}.weight"], fresh[f"{layer}.weight"]) for layer in LAYERS)
    assert torch.equal(state["roi_heads.box_head.fc1.weight"], before["roi_heads.box_head.fc1.weight"])
    state = loaded(tmp_path / "b.pth", build_detector(cfg), cfg, ["tree", "cow", "cat", "bird"], caplog)
    assert "classes of the same name keep their values: cow, cat" in caplog.text
    for layer, rows in LAYERS.items():
        for part in ("weight", "bias"):
            found, old = (x[f"{layer}.{part}"].unflatten(0, (-1, rows)) for x in (state, before))
            assert torch.equal(found[1:3], old[[2, 0]]) and not torch.equal(found[0], old[0])
    scores = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(state[scores][-1], before[scores][-1])  # the background


def test_layers_of_the_same_classes_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = detectron2_model(encoder_keys(), classes=3)
    before = theirs.state_dict()
    cfg = config(before)
    for names in (None, ["a", "b", "c"]):
        torch.save({"model": before, **({"class_names": names} if names else {})}, tmp_path / "a.pth")
        state = loaded(tmp_path / "a.pth", build_detector(cfg), cfg, ["a", "b", "c"], caplog)
        assert all(torch.equal(state[f"{layer}.weight"], before[f"{layer}.weight"]) for layer in LAYERS)
        assert re.search(r"new +0\n", caplog.text)


def test_evaluation_needs_the_classes_of_the_checkpoint(tmp_path: Path) -> None:
    before = detectron2_model(encoder_keys(), classes=3).state_dict()
    torch.save({"model": before}, tmp_path / "a.pth")
    cfg = config(before)
    model = build_detector(cfg)
    load_trained(cfg, model, tmp_path / "a.pth")
    state, scores, block = model.state_dict(), "roi_heads.box_predictor.cls_score.weight", "blocks.1.mlp.fc1.bias"
    assert torch.equal(state[scores], before[scores])
    assert torch.equal(state[f"backbone.net.encoder.vit.{block}"], before[f"backbone.net.{block}"])
    cfg = config(before, "MODEL.ROI_HEADS.NUM_CLASSES", 4)
    with pytest.raises(UserError, match="fits only"):
        load_trained(cfg, build_detector(cfg), tmp_path / "a.pth")


def test_a_detector_without_masks_is_loaded() -> None:
    tensors = detectron2_model(encoder_keys()).state_dict()
    checkpoint = {"model": {name: value for name, value in tensors.items() if "mask_head" not in name}}
    cfg = config(checkpoint["model"])
    model = build_detector(cfg)
    adapt_checkpoint("file", checkpoint, model.state_dict(), partial(get_key, cfg), None)
    model.load_state_dict(checkpoint["model"])
    assert not cfg.MODEL.MASK_ON


def test_a_config_of_another_architecture_is_refused_with_the_keys_to_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = detectron2_model(encoder_keys()).state_dict()
    torch.save({"model": tensors}, tmp_path / "a.pth")
    cfg = config(tensors, "MODEL.ENCODER.NAME", "vit_nano", "MODEL.ROI_BOX_HEAD.NUM_CONV", 2)
    with pytest.raises(UserError, match=r"ENCODER.NAME vitdet:nano, MODEL.ROI_BOX_HEAD.NUM_CONV 4\): set them, or let"):
        loaded(tmp_path / "a.pth", build_detector(cfg), cfg, [], caplog)


def test_padding_to_no_multiple_of_the_coarsest_stride_is_refused() -> None:
    cfg = config(detectron2_model(encoder_keys()).state_dict(), "MODEL.PYRAMID.SIZE_DIVISIBILITY", 100)
    with pytest.raises(UserError, match=r"SIZE_DIVISIBILITY 100 is not a multiple of the coarsest stride .* 32: give"):
        build_detector(cfg)


def test_unsupported_vitdets_are_refused() -> None:
    tensors = detectron2_model(encoder_keys()).state_dict()
    relative = {name: value for name, value in tensors.items() if "rel_pos" in name}
    block = "backbone.net.blocks"
    moved = {name: tensors[name.replace("blocks.0", "blocks.1")] for name in relative if "blocks.0" in name}
    moved |= {name: tensors[name.replace("blocks.1", "blocks.0")] for name in relative if "blocks.1" in name}
    cases = {
        "relative positions of 0 of them": {name: v for name, v in tensors.items() if name not in relative},
        r"blocks \[0, 3\] of 4, which are not evenly spaced": tensors | moved,
        "width 128 with 4 blocks of 8 heads": tensors | {name: value[:, :16] for name, value in relative.items()},
        "without residual": tensors | {f"{block}.1.residual.conv1.weight": torch.zeros(1)},
        "incomplete ViTDet": {name: v for name, v in tensors.items() if "fc1" not in name},
    }
    for message, changed in cases.items():
        found = find_detector("file", changed)
        assert found is not None
        with pytest.raises(UserError, match=message):
            config_keys(found)
    with pytest.raises(UserError, match=r"'backbone\.net\.pos_embed' is not a tensor of numbers"):
        find_detector("file", tensors | {"backbone.net.pos_embed": "text"})
    assert find_detector("file", {"backbone.bottom_up.stem.conv1.weight": torch.zeros(1)}) is None


PROPOSALS = ("MODEL.RPN.POST_NMS_TOPK_TEST", 30)


def test_features_and_detections_are_those_of_detectron2() -> None:
    theirs = detectron2_model(encoder_keys())
    check_equal(ours(theirs, *PROPOSALS), theirs, [(SIDE, 90), (77, SIDE)])


def test_positions_are_resized_as_in_detectron2s_forward_pass() -> None:
    theirs: Any = detectron2_model(encoder_keys())
    theirs.backbone._square_pad = side = 192
    sizes = ("MODEL.ENCODER.IMG_SIZE", side, "MODEL.PYRAMID.SIZE_DIVISIBILITY", side, "INPUT.MAX_SIZE_TEST", side)
    check_equal(ours(theirs, *PROPOSALS, *sizes), theirs, [(side, 100)])


def test_the_first_stage_of_a_cascade_is_loaded() -> None:
    theirs: Any = detectron2_model(encoder_keys(), cascade=True)
    mine = ours(theirs, *PROPOSALS)
    inputs = [{"image": torch.randint(0, 256, (3, SIDE, 96)).to(torch.uint8), "height": SIDE, "width": 96}]
    heads = theirs.roi_heads
    with torch.no_grad():
        images = theirs.preprocess_image(inputs)
        features = theirs.backbone(images.tensor)
        proposals, _ = theirs.proposal_generator(images, features, None)
        stage = heads._run_stage([features[name] for name in heads.box_in_features], proposals, 0)
        instances, _ = heads.box_predictor[0].inference(stage, proposals)
        expected = theirs._postprocess(heads.forward_with_given_boxes(features, instances), inputs, images.image_sizes)
        check_instances(mine(inputs), expected)


PUBLISHED = ("base", "large", "huge")


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("size", PUBLISHED)
def test_every_published_vitdet_has_a_config_and_loads_completely(
    size: str, cascade: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes only; the values of large models are compared in slow tests."""
    check_names(encoder_keys(size, 1024, window=14, blocks=4), cascade, monkeypatch)


def check_names(keys: dict[str, Any], cascade: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))  # Detectron2 reads its values
    with torch.device("meta"):
        tensors = detectron2_model(keys, 80, cascade, small=False).state_dict()
        found = find_detector("file", tensors)
        assert found is not None
        derived = config_keys(found)
        cfg = config(tensors, "MODEL.DEVICE", "meta")
        model = build_detector(cfg)
        current = model.state_dict()
        loaded, _ = renamed(found, current)
    assert keys.items() <= derived.items()
    assert {name: v.shape for name, v in loaded.items()} == {name: v.shape for name, v in current.items()}
    assert cascade == cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG
    assert cascade == any(".box_head.2." in name for name in found.left_out)


SWIN_SIDE = 256  # Detectron2's Swin differs on maps that are not larger than a window


def swin_keys(size: str, norm: str = "LN", side: int = SWIN_SIDE) -> dict[str, Any]:
    name = "swin_tiny" if size == "tiny" else f"swin:{size}"
    pyramid = {"MODEL.PYRAMID.NORM": norm, "MODEL.PYRAMID.SIZE_DIVISIBILITY": side}
    return {"MODEL.ENCODER.NAME": name, **pyramid}


SWIN = ("MODEL.PYRAMID.SIZE_DIVISIBILITY", SWIN_SIDE, "INPUT.MAX_SIZE_TEST", SWIN_SIDE)


@pytest.mark.parametrize("norm", ["LN", pytest.param("", marks=pytest.mark.slow)])
def test_swin_on_fpn_has_the_features_and_detections_of_detectron2(norm: str) -> None:
    theirs = detectron2_model(swin_keys("tiny", norm), by=0.02)
    check_equal(ours(theirs, *PROPOSALS, *SWIN), theirs, [(SWIN_SIDE, 170), (100, SWIN_SIDE)])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_large_swins_have_the_features_and_detections_of_detectron2(size: str) -> None:
    theirs = detectron2_model(swin_keys(size), 80, by=0.01, spread=0.5)
    check_equal(ours(theirs, *PROPOSALS, *SWIN), theirs, [(SWIN_SIDE, 170)])


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("size", SWIN_SIZES)
def test_every_swin_has_a_config_and_loads_completely(
    size: str, cascade: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_names(swin_keys(size, side=1024), cascade, monkeypatch)


def test_unsupported_swins_are_refused() -> None:
    prefix, table = "backbone.bottom_up.", "attn.relative_position_bias_table"
    blocks = {f"{prefix}layers.{stage}.blocks.0.{table}": torch.zeros(169, 3 << stage) for stage in range(4)}
    for changed, message in {
        (): r"width 96 with \(1, 1, 1, 1\) blocks and windows of \{7\}; supported are the sizes tiny, small",
        (f"{prefix}layers.3.blocks.0.{table}",): "incomplete R-CNN on Swin",
    }.items():
        tensors = {name: value for name, value in blocks.items() if name not in changed}
        found = find_detector("file", tensors | {f"{prefix}patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)})
        assert found is not None
        with pytest.raises(UserError, match=message):
            config_keys(found)


@pytest.mark.slow
@pytest.mark.parametrize("size", PUBLISHED)
def test_large_vitdets_have_the_features_and_detections_of_detectron2(size: str) -> None:
    """Images of 256 pixels, so that windows and grid differ; Detectron2's published models read 1,024."""
    theirs: Any = detectron2_model(encoder_keys(size, 256, window=14, blocks=4), 80, small=False, by=0.005, spread=0.1)
    theirs.proposal_generator.post_nms_topk = {False: 100, True: 100}
    check_equal(ours(theirs, "MODEL.RPN.POST_NMS_TOPK_TEST", 100), theirs, [(256, 200)])
