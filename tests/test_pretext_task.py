"""Heads and tasks: a walk over the registry, and the object that trainers use."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from relvit_d2.errors import UserError
from relvit_d2.pretext.heads import RelationHead
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.task import PRETEXT_TASKS, PretextTask

GRID, DIM = (3, 4), 20


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", list(PRETEXT_TASKS))
class TestEveryTask:
    def test_scores_and_gradients(self, name: str, smoothing: float) -> None:
        task = PRETEXT_TASKS[name](DIM, GRID, smoothing)
        tokens = torch.randn(2, 12, DIM, requires_grad=True)
        scores = task(tokens, PatchLayout.full(2, GRID))
        assert set(scores) == {"loss", "accuracy"}
        assert scores["loss"].shape == scores["accuracy"].shape == ()
        assert scores["loss"].isfinite() and 0 <= scores["accuracy"] <= 1
        assert not scores["accuracy"].requires_grad
        scores["loss"].backward()
        for parameter in [tokens, *task.parameters()]:
            assert parameter.grad is not None and parameter.grad.any()

    def test_padding_changes_nothing(self, name: str, smoothing: float) -> None:
        """Tokens of a padded batch score as the valid ones alone."""
        task = PRETEXT_TASKS[name](DIM, GRID, smoothing)
        tokens, layout = torch.randn(1, 12, DIM), PatchLayout.full(1, GRID)
        layout.valid[0, 7:] = False
        alone = PatchLayout(GRID, layout.row[:, :7], layout.col[:, :7], layout.valid[:, :7])
        padded, short = task(tokens, layout), task(tokens[:, :7], alone)
        torch.testing.assert_close(padded, short)

    def test_token_order_changes_nothing(self, name: str, smoothing: float) -> None:
        task = PRETEXT_TASKS[name](DIM, GRID, smoothing)
        tokens, layout = torch.randn(2, 12, DIM), PatchLayout.full(2, GRID)
        order = torch.rand(2, 12).argsort(1)
        moved = task(tokens.gather(1, order[:, :, None].expand_as(tokens)), layout.permuted(order))
        torch.testing.assert_close(moved, task(tokens, layout))

    def test_chance_is_a_share(self, name: str, smoothing: float) -> None:
        assert 0 < PRETEXT_TASKS[name].chance(GRID) < 1

    def test_it_can_be_learnt(self, name: str, smoothing: float) -> None:
        """Tokens that tell their own cell bring a fitted head far above chance."""
        task = PRETEXT_TASKS[name](DIM, GRID, smoothing)
        tokens, layout = torch.randn(1, 12, DIM), PatchLayout.full(1, GRID)
        optimizer = torch.optim.Adam(task.parameters(), lr=0.05)
        for _ in range(60):
            scores = task(tokens, layout)
            optimizer.zero_grad()
            scores["loss"].backward()
            optimizer.step()
        assert scores["accuracy"] > 0.9


def test_untrained_losses_are_the_logarithms_of_the_classes() -> None:
    """With all weights zero the scores are uniform: ln 9 for relations, ln N for positions."""
    task = PretextTask(DIM, GRID, {"relation": 1, "position": 1})
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    scores = task(torch.randn(2, 12, DIM), PatchLayout.full(2, GRID))
    assert scores["loss_relation"].item() == pytest.approx(math.log(9))
    assert scores["loss_position"].item() == pytest.approx(math.log(12))


def test_a_permutation_equivariant_encoder_cannot_see_the_permutation() -> None:
    """Self-attention without position embedding: permuting the patches leaves every loss equal."""
    encoder = nn.TransformerEncoderLayer(DIM, 4, 40, dropout=0.0, batch_first=True)
    task = PretextTask(DIM, GRID, {"relation": 1, "position": 1})
    patches, layout = torch.randn(2, 12, DIM), PatchLayout.full(2, GRID)
    order = torch.rand(2, 12).argsort(1)
    moved = task(encoder(patches.gather(1, order[:, :, None].expand_as(patches))), layout.permuted(order))
    torch.testing.assert_close(moved, task(encoder(patches), layout))


def test_weights_scale_the_losses_and_zero_builds_nothing() -> None:
    both = PretextTask(DIM, GRID, {"relation": 2.0, "position": 0.5})
    tokens, layout = torch.randn(2, 12, DIM), PatchLayout.full(2, GRID)
    scores = both(tokens, layout)
    for name, weight in both.weights.items():
        alone = both.tasks[name](tokens, layout)
        torch.testing.assert_close(scores[f"loss_{name}"], weight * alone["loss"])
        torch.testing.assert_close(scores[f"accuracy_{name}"], alone["accuracy"])
    assert both.chance() == {"relation": pytest.approx(1 / 8), "position": pytest.approx(1 / 12)}

    single = PretextTask(DIM, GRID, {"relation": 0, "position": 1})
    assert set(single(tokens, layout)) == {"loss_position", "accuracy_position"}
    assert all(name.startswith("tasks.position.") for name in single.state_dict())


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"relatoin": 1.0}, "relation"), ({"relation": -1.0}, "relation"), ({"relation": 0.0}, "above 0")],
)
def test_impossible_weights_are_told(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PretextTask(DIM, GRID, weights)


@pytest.mark.parametrize(("dim", "parameters"), [(384, 290_304), (768, 1_175_040)])
def test_relation_head_has_the_authors_live_parameters(dim: int, parameters: int) -> None:
    """The authors' counts (435,456 and 1,762,560) less their dead value projections (145,152 and 587,520)."""
    assert sum(p.numel() for p in RelationHead(dim).parameters()) == parameters


def test_tokens_too_narrow_for_nine_maps_are_told() -> None:
    with pytest.raises(UserError, match="width 8"):
        RelationHead(8)


def test_tokens_of_another_grid_are_refused() -> None:
    task = PretextTask(DIM, GRID, {"position": 1})
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        task(torch.randn(1, 12, DIM), PatchLayout.full(1, (4, 3)))
