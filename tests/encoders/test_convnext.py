"""ConvNeXt, compared with timm's features."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from relvit_d2.classification.model import build_classifier
from relvit_d2.conversion.checkpoint_file import FoundEncoder
from relvit_d2.conversion.convert import convnext
from relvit_d2.conversion.converted import verify
from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, save_encoder
from relvit_d2.conversion.export import to_detectron2, to_timm
from relvit_d2.detection.model import build_detector
from relvit_d2.encoders import build_encoder
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.detectors import fitting, tiny_config
from tests.support.scripts import command, fails

NAME = "timm:test_convnext"
KEYS = ("MODEL.ENCODER.NAME", NAME, "MODEL.ENCODER.PATCH_SIZE", "4")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def scattered(model: Any) -> Any:
    """Change all parameters, so that no scale is 1 or nearly 0."""
    for value in model.parameters():
        value.data.add_(0.1 * torch.randn_like(value))
    return model.eval()


def found(model: Any) -> FoundEncoder:
    return FoundEncoder("test", dict(model.state_dict()))


# The second has a norm before pooling, the third an overlapping stem, the fourth global response normalisation.
@pytest.mark.parametrize("name", ["test_convnext", "convnext_tiny_hnf", "convnext_atto_ols", "test_convnext3"])
def test_maps_of_converted_weights_equal_timms(name: str) -> None:
    model = scattered(timm.create_model(name, num_classes=3))
    converted = convnext(found(model), name)
    verify(converted, name)
    assert converted.encoder.name == f"timm:{name}" and {"head.fc.weight", "head.fc.bias"} == {*converted.dropped}
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(images, norm=True, intermediates_only=True)
        if name != "convnext_tiny_hnf":
            expected[-1] = model.head.norm(expected[-1])
        for level, theirs in zip(converted.encoder(images).values(), expected, strict=True):
            torch.testing.assert_close(level, theirs, rtol=1e-4, atol=1e-4)
        pooled, _ = converted.encoder.pooled_features(images)
        torch.testing.assert_close(pooled, expected[-1].mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_a_wrong_conversion_is_refused() -> None:
    model = scattered(timm.create_model("test_convnext"))
    converted = convnext(found(model), "test_convnext")
    converted.encoder.get_parameter("norm.weight").data.mul_(1.01)
    with pytest.raises(UserError, match="differ from those of the original"):
        verify(converted, "test")


def test_padding_does_not_extend_the_maps() -> None:
    encoder, image = build_encoder(NAME).eval(), torch.randn(1, 3, 37, 70)
    whole = torch.nn.functional.pad(image, (0, 26, 0, 27))
    with torch.no_grad():
        for level, padded in zip(encoder(image).values(), encoder(whole).values(), strict=True):
            assert torch.equal(level, padded[..., : level.shape[2], : level.shape[3]])


def test_gray_images_load_colour_weights(tmp_path: Path) -> None:
    save_encoder(scattered(build_encoder(NAME)), tmp_path / "encoder.safetensors", {})
    gray = build_encoder(NAME, in_chans=1)
    report = load_encoder_weights(gray, tmp_path / "encoder.safetensors")
    assert report.resized == ["net.stem.0.weight"] and report.share == 1
    assert feature_difference(gray, tmp_path / "encoder.safetensors") < 1e-5


def test_layers_of_the_learning_rate() -> None:
    encoder = build_encoder(NAME)
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert encoder.depth == 9 and depths["net.stem.0.weight"] == 0 and depths["norm.weight"] == 10
    blocks = [name for name in depths if name.endswith("mlp.fc1.weight") or name.endswith("mlp.fc1.bias")]
    assert [depths[name] for name in blocks] == [number for number in range(1, 10) for _ in range(2)]
    assert depths["net.stages.1.downsample.1.weight"] == depths["net.stages.1.blocks.0.conv_dw.weight"]


def test_every_parameter_of_a_detector_is_trained() -> None:
    model = build_detector(tiny_config(*fitting(NAME, (2, 1)), "MODEL.PYRAMID.NAME", "fpn")).train()
    image: Tensor = torch.randn(1, 3, 64, 64)
    sum((level * torch.randn_like(level)).sum() for level in model.backbone(image).values()).backward()
    assert [name for name, p in model.backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_pretext_tasks_and_other_options_are_refused(root: Path, tmp_path: Path) -> None:
    refused = "'timm:test_convnext' does not support the pretext tasks, only detection and classification"
    error = fails(root, *command("pretrain_ssl.py", tmp_path / "out", *KEYS))
    assert refused in error and not list((tmp_path / "out").glob("*.pth"))
    with pytest.raises(UserError, match=refused):
        build_pretraining_model(load_config("configs/demo/ssl_streets.yaml", [*KEYS], "pretrain"))
    with pytest.raises(UserError, match=refused):
        build_detector(tiny_config(*fitting(NAME, (2, 1)), "MODEL.RELVIT.JOINT", True))
    joint = load_config("configs/cls/cifar10_vit_s4.yaml", [*KEYS, "MODEL.RELVIT.JOINT", "True"], "classification")
    with pytest.raises(UserError, match=refused):
        build_classifier(joint, 3)
    with pytest.raises(UserError, match="PATCH_SIZE 16 is not supported by a ConvNeXt; set it to 4"):
        build_encoder(NAME, patch_size=16)
    with pytest.raises(UserError, match=r"weights of encoder 'timm:test_convnext' cannot be exported"):
        to_timm(build_encoder(NAME))
    with pytest.raises(UserError, match="Detectron2 has no backbone like encoder"):
        to_detectron2(build_encoder(NAME))
