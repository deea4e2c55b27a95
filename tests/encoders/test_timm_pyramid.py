"""Models of timm with maps of several strides, compared with timm's features."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from relvit_d2.classification.model import build_classifier
from relvit_d2.conversion.checkpoint_file import FoundEncoder
from relvit_d2.conversion.convert import timm_pyramid
from relvit_d2.conversion.converted import TOLERANCE, relative_difference, verify
from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, read_encoder, save_encoder
from relvit_d2.conversion.export import to_detectron2, to_timm
from relvit_d2.detection.model import build_detector
from relvit_d2.encoders import build_encoder
from relvit_d2.encoders.timm_pyramid import PYRAMIDS
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from tests.support.detectors import fitting, tiny_config
from tests.support.scripts import command, fails, run

NAME = "timm:test_convnext"
KEYS = ("MODEL.ENCODER.NAME", NAME, "MODEL.ENCODER.PATCH_SIZE", "4")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def scattered(model: Any) -> Any:
    """Change all parameters and statistics, so that no scale is 1 or nearly 0."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            value.data.mul_(1 + torch.rand_like(value))
        elif value.is_floating_point():
            value.data.add_(0.1 * torch.randn_like(value))
    return model.eval()


def found(model: Any) -> FoundEncoder:
    return FoundEncoder("test", dict(model.state_dict()))


# The second has a norm before pooling, the third an overlapping stem, the fourth global response normalisation; the
# others have batch norm, EfficientNet and MobileNet layers between the last map and the classifier, RegNet none.
@pytest.mark.parametrize(
    "name",
    [
        *("test_convnext", "convnext_tiny_hnf", "convnext_atto_ols", "test_convnext3"),
        *("test_resnet", "test_efficientnet", "mobilenetv3_small_050", "regnetx_002", "resnetv2_18"),
    ],
)
def test_maps_of_converted_weights_equal_timms(name: str) -> None:
    model = scattered(timm.create_model(name, num_classes=3))
    converted = timm_pyramid(found(model), name)
    verify(converted, name)
    classifier = model.default_cfg["classifier"]
    assert converted.encoder.name == f"timm:{name}" and f"{classifier}.weight" in converted.dropped
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(images, norm=True, intermediates_only=True)[-4:]
        if name.endswith(("convnext", "atto_ols", "convnext3")):
            expected[-1] = model.head.norm(expected[-1])
        for level, theirs in zip(converted.encoder(images).values(), expected, strict=True):
            assert relative_difference(level, theirs) <= TOLERANCE
        pooled, _ = converted.encoder.pooled_features(images)
        assert relative_difference(pooled, expected[-1].mean((2, 3))) <= TOLERANCE


def test_a_wrong_conversion_is_refused() -> None:
    model = scattered(timm.create_model("test_convnext"))
    converted = timm_pyramid(found(model), "test_convnext")
    converted.encoder.get_parameter("norm.weight").data.mul_(1.01)
    with pytest.raises(UserError, match="differ from those of the original"):
        verify(converted, "test")


def test_padding_does_not_extend_the_maps() -> None:
    encoder, image = build_encoder(NAME).eval(), torch.randn(1, 3, 37, 70)
    whole = torch.nn.functional.pad(image, (0, 26, 0, 27))
    with torch.no_grad():
        for level, padded in zip(encoder(image).values(), encoder(whole).values(), strict=True):
            assert torch.equal(level, padded[..., : level.shape[2], : level.shape[3]])


# The smallest model of each of timm's modules.
@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(PYRAMIDS))
def test_every_supported_module_has_four_maps_of_any_image(module: str) -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in models_of(module)}
    encoder = build_encoder(f"timm:{min(sizes, key=sizes.__getitem__)}").eval()
    images = torch.randn(2, 3, 50, 70)
    maps = encoder(images)
    assert list(encoder.strides.values()) == [4, 8, 16, 32]
    for name, stride in encoder.strides.items():
        assert maps[name].shape == (2, encoder.channels[name], -(-50 // stride), -(-70 // stride))
        torch.testing.assert_close(maps[name][:1], encoder(images[:1])[name], rtol=1e-4, atol=1e-4)
    assert {encoder.depth_of(name) for name, _ in encoder.named_parameters()} <= {*range(encoder.depth + 2)}
    sum(level.sum() for level in maps.values()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def models_of(module: str) -> list[str]:
    return [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__ == module]


def test_batch_norm_is_frozen_and_needs_weights(root: Path, tmp_path: Path) -> None:
    words = (*fitting("timm:test_resnet", (2, 1)), "SOLVER.MAX_ITER", 1)
    error = fails(root, *command("train_net.py", tmp_path / "out", *words))
    assert "'timm:test_resnet' has frozen batch norm, which needs the statistics of trained weights: set MODEL" in error
    save_encoder(scattered(build_encoder("timm:test_resnet")), tmp_path / "encoder.safetensors", {})
    run(root, *command("train_net.py", tmp_path / "out", *words, "MODEL.WEIGHTS", tmp_path / "encoder.safetensors"))
    before = read_encoder(tmp_path)[0]
    after = torch.load(tmp_path / "out/model_final.pth", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[f"backbone.net.encoder.{name}"])}
    assert "net.layer4.0.conv1.weight" in changed and "net.layer4.0.bn1.running_var" in before
    assert not any(".bn1." in name for name in changed)


def test_a_model_without_drop_path_is_reported() -> None:
    with pytest.raises(UserError, match=r"DROP_PATH 0.1: encoder 'timm:hrnet_w18_small' has no drop path; set it to 0"):
        build_encoder("timm:hrnet_w18_small", drop_path=0.1)


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
    with pytest.raises(UserError, match=r"PATCH_SIZE 16 is not supported by encoder .*; set it to 4"):
        build_encoder(NAME, patch_size=16)
    with pytest.raises(UserError, match=r"weights of encoder 'timm:test_convnext' cannot be exported"):
        to_timm(build_encoder(NAME))
    with pytest.raises(UserError, match="Detectron2 has no backbone like encoder"):
        to_detectron2(build_encoder(NAME))
