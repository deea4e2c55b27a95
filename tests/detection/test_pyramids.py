"""Every pyramid on every encoder, and every fine-tuning key of encoders."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from timm.layers import DropPath
from torch import nn

from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, save_encoder
from relvit_d2.detection.backbone import PYRAMIDS, build_encoder_pyramid_backbone
from relvit_d2.detection.config import add_relvit_config
from relvit_d2.encoders import ENCODERS, build_encoder
from relvit_d2.engine.optimizer import build_optimizer
from relvit_d2.experiments.table_rows import tables
from relvit_d2.pretraining.model import build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import as_scalars

# The larger ViTs share the code of the smallest.
ONE_OF_A_KIND = [
    pytest.param(name, marks=pytest.mark.slow if name in ("vit_tiny", "vit_small", "vit_base") else ())
    for name in ENCODERS
]
SEVERAL = {"swin_tiny": [4, 8, 16, 32]}  # encoders with maps of several strides
# Prefixes of the parameter names of the patch embedding and the first block.
FIRST = {
    "vit_nano": ("vit.patch_embed.", "vit.pos_embed", "vit.cls_token", "vit.blocks.0."),
    "swin_tiny": ("swin.patch_embed.", "swin.layers.0.blocks.0."),
    "t2t_vit_14": ("tokens_to_token.", "cls_token", "blocks.0."),
}


@cache
def patch_and_stride(name: str) -> tuple[int, int]:
    """The default patch size of the encoder and the stride of its last map, pixels."""
    encoder = build_encoder(name)
    return encoder.arguments["patch_size"], encoder.strides[encoder.last]


def config(name: str, pyramid: str, strides: list[int], *overrides: object) -> CfgNode:
    cfg = get_cfg()
    add_relvit_config(cfg)
    levels = [f"p{stride.bit_length() - 1}" for stride in strides]
    encoder = ["MODEL.ENCODER.NAME", name, "MODEL.ENCODER.PATCH_SIZE", patch_and_stride(name)[0]]
    keys = ["MODEL.PYRAMID.NAME", pyramid, "MODEL.PYRAMID.STRIDES", strides, "MODEL.PYRAMID.OUT_CHANNELS", 8]
    heads = ["MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels, "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*encoder, "MODEL.ENCODER.IMG_SIZE", 64, *keys, *heads, *overrides])
    return cfg


@pytest.mark.parametrize("kind", PYRAMIDS)
@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_every_pyramid_is_built_on_every_encoder_that_has_its_maps(name: str, kind: str) -> None:
    torch.manual_seed(0)
    stride = patch_and_stride(name)[1]
    strides = SEVERAL[name] if kind == "fpn" and name in SEVERAL else [stride // 2, stride, 2 * stride]
    cfg = config(name, kind, strides)
    if (kind == "fpn") != (name in SEVERAL) and kind != "simple":
        with pytest.raises(UserError, match=r"MODEL.PYRAMID.NAME (simple or multitap|fpn)"):
            build_encoder_pyramid_backbone(cfg, None)
        return
    net = build_encoder_pyramid_backbone(cfg, None)
    levels = net(torch.randn(1, 3, 64, 128))
    assert list(levels) == [f"p{s.bit_length() - 1}" for s in (*strides, 2 * strides[-1])]
    for level, s in zip(levels.values(), (*strides, 2 * strides[-1]), strict=True):
        assert level.shape == (1, 8, -(-64 // s), -(-128 // s)) and level.dtype == torch.float32
    sum((level * torch.randn_like(level)).sum() for level in levels.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_auto_selects_fpn_for_maps_of_several_strides(name: str) -> None:
    stride = patch_and_stride(name)[1]
    chosen = "fpn" if name in SEVERAL else "simple"
    strides = SEVERAL.get(name, [stride, 2 * stride])
    with torch.device("meta"):
        auto, named = (build_encoder_pyramid_backbone(config(name, kind, strides), None) for kind in ("auto", chosen))
    assert {n: p.shape for n, p in auto.named_parameters()} == {n: p.shape for n, p in named.named_parameters()}


@pytest.mark.parametrize("name", FIRST)
def test_first_blocks_are_frozen_and_deeper_ones_have_larger_rates(name: str) -> None:
    keys = ("MODEL.BACKBONE.FREEZE_AT", 2, "SOLVER.LAYER_DECAY", 0.5)
    cfg = config(name, "simple", [patch_and_stride(name)[1]], *keys)
    with torch.device("meta"):
        net = build_encoder_pyramid_backbone(cfg, None)
    names = {id(p): n.removeprefix("net.encoder.") for n, p in net.named_parameters()}
    frozen = {names[id(p)] for p in net.parameters() if not p.requires_grad}
    assert frozen == {n for n in names.values() if n.startswith(FIRST[name])} and len(frozen) > 10
    groups = build_optimizer(cfg, net).param_groups
    scales = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values()) - frozen
    depth = net.encoder.depth
    assert sorted(set(scales.values())) == [0.5**height for height in range(depth - 1, -1, -1)]
    rates = [scale for parameter, scale in scales.items() if parameter.endswith("mlp.fc1.weight")]
    assert rates == [0.5**height for height in range(depth - 1, 0, -1)]
    assert all(scale == 1 for n, scale in scales.items() if "simfp" in n)


def test_training_from_scratch_has_one_rate_and_freezes_nothing() -> None:
    for path in Path("configs").glob("*.yaml"):
        cfg = load_config(str(path), ["MODEL.WEIGHTS", ""])
        assert (cfg.SOLVER.LAYER_DECAY, cfg.MODEL.BACKBONE.FREEZE_AT) == (1.0, 0), cfg.OUTPUT_DIR


def drop_rates(model: nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize("more", [[], ["MODEL.ENCODER.DROP_PATH", "0.3"]], ids=["as_it_is", "overridden"])
@pytest.mark.parametrize("row", ["vit_s", "swin_t", "t2t_vit_14"])
def test_drop_path_is_that_of_the_config_in_each_mode(row: str, more: list[str]) -> None:
    pretraining = load_config(f"configs/ssl/voc_{row}.yaml", [*more, "MODEL.DEVICE", "meta"])
    modes: tuple[list[str], ...] = ([], ["MODEL.WEIGHTS", ""], ["MODEL.WEIGHTS", "", "MODEL.RELVIT.JOINT", "True"])
    detectors = [load_config(f"configs/paper/voc_{row}_224.yaml", mode + more) for mode in modes]
    with torch.device("meta"):
        models = [build_pretraining_model(pretraining)]
        models += [build_encoder_pyramid_backbone(cfg, None) for cfg in detectors]
    for cfg, model in zip([pretraining, *detectors], models, strict=True):
        rates = drop_rates(model) or [0.0]  # a rate of 0 adds no module
        assert rates == sorted(rates) and rates[-1] == pytest.approx(cfg.MODEL.ENCODER.DROP_PATH)


def test_only_rows_of_t2t_have_no_drop_path() -> None:
    """The authors' T2T ignores their flag; the other encoders have 0.1."""
    for path in [*Path("configs").glob("*_*.yaml"), *Path("configs/paper").glob("*.yaml")]:
        expected = 0.0 if "t2t" in path.name else 0.1
        assert expected == load_config(str(path), []).MODEL.ENCODER.DROP_PATH, path


@pytest.mark.parametrize("positions", [True, False], ids=["resized", "fresh"])
@pytest.mark.parametrize("name", [kind for kind in ONE_OF_A_KIND if kind.values[0] not in SEVERAL])
def test_positions_of_another_grid_are_resized_and_absent_ones_fresh(
    name: str, positions: bool, tmp_path: Path
) -> None:
    """MODEL.ENCODER.IMG_SIZE and POS_EMBED; a Swin has no parameters for either."""
    path = tmp_path / "encoder.safetensors"
    save_encoder(build_encoder(name, img_size=32, pos_embed=positions), path, {})
    target = build_encoder(name, img_size=64, pos_embed=True)
    report = load_encoder_weights(target, path)
    learnt = ["vit.pos_embed"] if name.startswith("vit") else []
    assert report.resized == (learnt if positions else [])
    assert report.fresh == ([] if positions else learnt or ["sinusoid"])
    assert report.share == 1.0 and not report.missing + report.unexpected
    assert feature_difference(target, path) < 1e-5


@pytest.mark.parametrize("mega", [False, True], ids=["plain", "mega"])
@pytest.mark.parametrize("row", ["swin_t", "t2t_vit_14"])
def test_encoders_with_positions_pretrain_on_7_x_7_permuted_mega_patches(row: str, mega: bool) -> None:
    """Views keep 224 pixels, and the layout has the index of each of the 49 mega-patches."""
    arm = next(arm for arm in tables()["table2"][row].arms if arm.name == ("mega" if mega else "upstream"))
    keys = [str(part) for pair in arm.steps[0].overrides for part in pair]
    model = build_pretraining_model(load_config(arm.steps[0].config, [*keys, "MODEL.DEVICE", "cpu"]))
    images = torch.randint(0, 256, (1, 3, 230, 240), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"images": images, "sizes": torch.tensor([[230, 240]]), "keys": torch.tensor([1])}
    pixels, layout = model.make_views(batch)
    assert pixels.shape == (1, 3, 224, 224) and layout.grid == model.task.grid == (7, 7)
    order = (7 * layout.row + layout.col)[0]
    assert torch.equal(order.sort().values, torch.arange(49)) and not torch.equal(order, torch.arange(49))
    with torch.no_grad():
        tokens = model.tokens(pixels)
        losses = model.task(tokens, layout)
    assert tokens.shape == (1, 49, model.encoder.dim)
    assert all(math.isfinite(value) for value in as_scalars(losses).values())
