"""AdamW's parameter groups, gradient clipping and precision."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from timm.models.swin_transformer import WindowAttention
from torch import nn

from relvit_d2.detection.config import add_relvit_config
from relvit_d2.encoders import build_encoder
from relvit_d2.engine.optimizer import build_clipper, build_optimizer
from relvit_d2.engine.precision import choose_precision
from relvit_d2.utils.errors import UserError
from tests.support.training import Regression, config


def test_weight_decay_is_for_matrices_only() -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    model = Regression()
    model.pos_embed = nn.Parameter(torch.zeros(3, 3))
    model.swin = next(m for m in build_encoder("swin_tiny").modules() if isinstance(m, WindowAttention))
    optimizer = build_optimizer(cfg, model)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"net.0.weight", "net.3.weight", "swin.qkv.weight", "swin.proj.weight"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_layer_decay_scales_the_rates_by_depth(tmp_path: Path) -> None:
    """The factor grows from the patch embedding to the last block; it is 1 outside the encoder."""
    encoder = build_encoder("vit_nano", patch_size=4, img_size=32)
    model = nn.Sequential(encoder, nn.Linear(2, 2))
    cfg = config(tmp_path, 1)
    plain = build_optimizer(cfg, model)
    assert all(group["scale"] == 1 for group in plain.param_groups)
    cfg.SOLVER.LAYER_DECAY = 0.5
    optimizer = build_optimizer(cfg, model)
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    factors = {name: scales[id(p)] for name, p in encoder.named_parameters()}
    assert factors["vit.patch_embed.proj.weight"] == factors["vit.pos_embed"] == factors["vit.cls_token"] == 0.5**5
    assert [factors[f"vit.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert factors["vit.norm.weight"] == scales[id(model[1].weight)] == 1
    cfg.SOLVER.LAYER_DECAY = 0.0
    with pytest.raises(UserError, match="LAYER_DECAY"):
        build_optimizer(cfg, model)


def test_clipping_is_by_the_global_norm() -> None:
    cfg = get_cfg()
    add_relvit_config(cfg)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    norm = build_clipper(cfg, model)()
    after = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(after, before / before.norm(), atol=1e-6, rtol=1e-5)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    with pytest.raises(UserError, match="CLIP_TYPE 'value'"):
        build_clipper(cfg, model)


def test_choice_of_the_precision() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu).dtype == torch.float32
    assert choose_precision("bfloat16", cpu).dtype == torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert choose_precision("auto", cpu).dtype == (torch.bfloat16 if native else torch.float32)
    with pytest.raises(UserError, match="'float8' is unknown; give auto, float32, bfloat16 or float16"):
        choose_precision("float8", cpu)
    for name in ("bfloat16", "float16"):
        with choose_precision(name, cpu).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, name)
    with choose_precision("float32", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
