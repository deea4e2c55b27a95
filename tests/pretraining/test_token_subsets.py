"""``PRETEXT.KEEP``: a random subset of the tokens of a training view enters the encoder."""

import itertools
import math
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from torch import Tensor

from relvit_d2.encoders import build_encoder
from relvit_d2.encoders.plain import PlainEncoder
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.resampling import random_tokens
from relvit_d2.pretext.targets import (
    PairFunction,
    all_pairs,
    pair_angle,
    pair_bearing,
    pair_deviation,
    pair_distance,
    pair_relation,
    positions,
    relation_frequencies,
)
from relvit_d2.pretext.task import PRETEXT_TASKS
from relvit_d2.pretraining.model import PretrainingModel, build_pretraining_model
from relvit_d2.tasks import load_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import as_scalars
from tests.support.runs import equal, rows
from tests.support.scripts import command, run

GRID, DIM, KEPT = (3, 5), 20, 6
SUBSETS = ["vit_nano", "t2t_vit_14", "timm:test_vit", "timm:vit_tiny_patch16_dinov3_qkvb"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def config(*overrides: object) -> CfgNode:
    pairs = ("MODEL.DEVICE", "cpu", "DATASETS.TEST", "()", *overrides)
    return load_config("configs/demo/ssl_streets.yaml", [*map(str, pairs)], "pretrain")


def model_of(*overrides: object) -> PretrainingModel:
    torch.manual_seed(0)
    return build_pretraining_model(config(*overrides))


def batch() -> dict[str, Tensor]:
    images = torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {"images": images, "sizes": torch.tensor([[40, 40]] * 3), "keys": torch.arange(3)}


def gradients(model: PretrainingModel) -> dict[str, Tensor]:
    losses = [value for name, value in as_scalars(model(batch())).items() if name.startswith("loss")]
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def subset(images: int = 3) -> Tensor:
    return random_tokens(torch.arange(images), math.prod(GRID), KEPT)


@cache
def plain(name: str) -> PlainEncoder:
    encoder = build_encoder(name, img_size=64).eval()
    assert isinstance(encoder, PlainEncoder)
    return encoder


def test_the_subset_of_all_tokens_is_the_default_bitwise() -> None:
    """63.9 of 64 tokens are rounded up to all."""
    whole, kept = model_of(), model_of("PRETEXT.KEEP", 0.999)
    assert equal(as_scalars(whole(batch())), as_scalars(kept(batch())))
    assert equal(gradients(whole), gradients(kept))


@pytest.mark.parametrize(("keep", "tokens"), [(0.5, 32), (0.25, 16), (0.26, 17), (0.01, 1), (1e-12, 1)])
def test_the_blocks_process_the_fraction_and_the_class_token(keep: float, tokens: int) -> None:
    model = model_of("PRETEXT.KEEP", keep)
    assert isinstance(model.encoder, PlainEncoder)
    seen: list[int] = []
    model.encoder.sequence_blocks[0].register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    assert all(torch.as_tensor(value).isfinite() for value in as_scalars(model(batch())).values())
    model.eval()(batch())
    assert seen == [tokens + 1, 65]


def test_evaluation_uses_all_tokens() -> None:
    whole, kept = (model_of("PRETEXT.KEEP", keep).eval() for keep in (1.0, 0.25))
    assert equal(as_scalars(whole(batch())), as_scalars(kept(batch())))


def test_the_subset_of_an_image_depends_on_its_key_alone() -> None:
    """Subsets have no repeated token and are uniform: each token is kept equally often."""
    keys = torch.arange(4000)
    drawn = random_tokens(keys, 15, 6)
    assert (drawn.diff(dim=1) > 0).all() and drawn.min() == 0 and drawn.max() == 14
    assert torch.equal(drawn[1234:1236], random_tokens(keys[1234:1236], 15, 6))
    counts = drawn.flatten().bincount(minlength=15) / len(keys)
    assert counts.numpy() == pytest.approx(0.4, abs=5 * math.sqrt(0.4 * 0.6 / len(keys)))


@pytest.mark.parametrize("name", SUBSETS)
def test_tokens_of_a_subset_follow_its_order(name: str) -> None:
    encoder, images, kept = plain(name), torch.randn(2, 3, 48, 80), subset(2)
    order = torch.rand(2, KEPT).argsort(1)
    with torch.no_grad():
        everything = torch.arange(math.prod(GRID)).expand(2, -1)
        assert torch.equal(encoder.tokens(images, everything), encoder.tokens(images))
        tokens, moved = encoder.tokens(images, kept), encoder.tokens(images, kept.gather(1, order))
    assert tokens.shape == (2, KEPT, encoder.dim)
    expected = tokens.gather(1, order[:, :, None].expand_as(tokens))
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_a_subset_are_those_of_an_image_of_its_patches() -> None:
    """Without position embedding, a row of the kept patches is an image with the same tokens."""
    encoder = build_encoder("vit_nano", img_size=80, pos_embed=False).eval()
    images, kept = torch.randn(2, 3, 48, 80), subset(2)
    patches = images.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)
    rows = [image[:, index] for image, index in zip(patches, kept, strict=True)]
    small = torch.stack(rows).permute(0, 1, 3, 2, 4).flatten(3)
    with torch.no_grad():
        torch.testing.assert_close(encoder.tokens(images, kept), encoder.tokens(small), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_nano", "timm:test_vit"])
def test_dropped_patches_have_no_effect(name: str) -> None:
    encoder, images, kept = plain(name), torch.randn(1, 3, 48, 80), subset(1)
    keeps = torch.zeros(15, dtype=torch.bool).index_fill(0, kept[0], True).view(GRID)
    inside = keeps.repeat_interleave(16, 0).repeat_interleave(16, 1)
    other = torch.where(inside, images, torch.randn_like(images))
    with torch.no_grad():
        assert torch.equal(encoder.tokens(other, kept), encoder.tokens(images, kept))
        assert not torch.allclose(encoder.tokens(other), encoder.tokens(images), atol=1e-3)


def test_targets_of_a_subset_are_selected_from_those_of_all_tokens() -> None:
    layout, kept, image = PatchLayout.full(3, GRID), subset()[:, :4], torch.arange(3)[:, None]
    assert layout.selected(kept).row.max() < GRID[0] - 1  # the kept tokens do not span the grid
    for function in (pair_relation, pair_distance, pair_angle, pair_bearing):
        selected = all_pairs(function, layout)[image[:, :, None], kept[:, :, None], kept[:, None]]
        torch.testing.assert_close(all_pairs(function, layout.selected(kept)), selected, rtol=0, atol=1e-6)
    for grid in (None, (2, 2), GRID):
        assert torch.equal(positions(layout.selected(kept), grid), positions(layout, grid)[image, kept])


@pytest.mark.parametrize("name", list(PRETEXT_TASKS))
def test_losses_of_a_subset_are_those_of_all_tokens_without_the_others(name: str) -> None:
    """The same rows and columns of all pairs remain if the other tokens are marked as padding."""
    task = PRETEXT_TASKS[name](DIM, GRID)
    tokens, layout, kept = torch.randn(3, 15, DIM), PatchLayout.full(3, GRID), subset()
    masked = replace(layout, valid=torch.zeros_like(layout.valid).scatter(1, kept, True))
    selected = tokens.gather(1, kept[:, :, None].expand(-1, -1, DIM))
    found = task(selected, layout.selected(kept))
    torch.testing.assert_close(found, task(tokens, masked))
    order = torch.rand(3, KEPT).argsort(1)
    moved = selected.gather(1, order[:, :, None].expand_as(selected))
    torch.testing.assert_close(task(moved, layout.selected(kept.gather(1, order))), found)


@pytest.mark.parametrize("grid", [(2, 3), (1, 4), (3, 3), (1, 1)])
def test_chance_levels_are_means_over_all_subsets(grid: tuple[int, int]) -> None:
    cells = math.prod(grid)
    relations = all_pairs(pair_relation, PatchLayout.full(1, grid))[0]
    for tokens in range(1, cells + 1):
        subsets = torch.tensor([*itertools.combinations(range(cells), tokens)])
        pairs = subsets[:, :, None], subsets[:, None]
        counted = relations[pairs].flatten().bincount(minlength=9) / subsets.shape[0] / tokens**2
        assert relation_frequencies(grid, tokens) == pytest.approx(counted.tolist(), abs=1e-6)
        functions: tuple[PairFunction, ...] = (pair_distance, pair_angle)
        for function in functions:
            values = all_pairs(function, PatchLayout.full(1, grid))[0].double()[pairs]
            assert pair_deviation(function, grid, tokens) == pytest.approx(values.std(correction=0).item(), abs=1e-6)


def test_chance_levels_of_training_are_those_of_the_subset() -> None:
    model = model_of("PRETEXT.KEEP", 0.05, "PRETEXT.WEIGHTS.DISTANCE", 1.0)  # 4 of 64 tokens
    training, evaluation = model(batch()), model.eval()(batch())
    assert training["relation"].chance == 0.25 and evaluation["relation"].chance == max(relation_frequencies((8, 8)))
    assert training["distance"].chance == pair_deviation(pair_distance, (8, 8), 4)
    assert training["position"].chance == evaluation["position"].chance == 1 / 64


def test_mega_patches_and_pieces_of_a_batch_work_with_subsets() -> None:
    model = model_of("PRETEXT.KEEP", 0.3, "PRETEXT.MEGA.M", 5)
    whole = batch()
    losses = model(whole)["loss_position"]
    single = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(3)]
    torch.testing.assert_close(torch.stack([model(one)["loss_position"] for one in single]).mean(), losses)


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_a_fraction_out_of_range_is_rejected(keep: float) -> None:
    with pytest.raises(UserError, match=rf"PRETEXT\.KEEP {keep} is out of range: give more than 0, at most 1"):
        model_of("PRETEXT.KEEP", keep)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("PRETEXT.POOL", 2), "PRETEXT.POOL 2"),
        (("MODEL.ENCODER.NAME", "swin_tiny"), "encoder 'swin_tiny'"),
        (
            ("MODEL.ENCODER.WINDOW", 2, "MODEL.ENCODER.GLOBAL_BLOCKS", 1),
            "encoder 'vit_nano' with MODEL.ENCODER.WINDOW 2",
        ),
        (("MODEL.ENCODER.REL_POS", True), "encoder 'vit_nano' with MODEL.ENCODER.REL_POS True"),
    ],
)
def test_where_all_tokens_are_needed_all_are_kept(
    overrides: tuple[object, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert model_of("PRETEXT.KEEP", 0.5, *overrides).keep == 1
    assert f"PRETEXT.KEEP 0.5 has no effect: {reason} needs all tokens" in caplog.text


def test_joint_training_has_no_subsets() -> None:
    with pytest.raises(UserError, match=r"PRETEXT\.KEEP belongs to the task pretrain"):
        load_config("configs/demo/streets.yaml", ["PRETEXT.KEEP", "0.5"], "detection")


def test_a_killed_run_resumes_exactly(root: Path, tmp_path: Path) -> None:
    keep: tuple[object, ...] = ("PRETEXT.KEEP", 0.3, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 4)
    keep += ("SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS")
    one, other = tmp_path / "one", tmp_path / "other"
    run(root, *command("pretrain_ssl.py", one, *keep, 0))
    run(root, *command("pretrain_ssl.py", other, *keep, 0), status=-signal.SIGKILL, fault="step:3")
    run(root, *command("pretrain_ssl.py", other, *keep, 1, flags=("--resume",)))
    assert len(rows(one)) == 4 and rows(one) == rows(other)
    first, second = (torch.load(output / "model_final.pth", weights_only=True) for output in (one, other))
    assert equal(first["model"], second["model"]) and equal(first["optimizer"], second["optimizer"])


@pytest.mark.slow
def test_training_does_not_depend_on_the_number_of_processes(root: Path, tmp_path: Path) -> None:
    keep = ("PRETEXT.KEEP", 0.3, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3)
    run(root, *command("pretrain_ssl.py", tmp_path / "one", *keep))
    run(root, *command("pretrain_ssl.py", tmp_path / "two", *keep, flags=("--num-gpus", 2)))
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
