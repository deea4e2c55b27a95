"""Heads, every registered task, and the weighted sum of tasks."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from relvit_d2.pretext.heads import PairHead
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.task import PRETEXT_TASKS, LossConfig, PositionTask, PretextTask
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.metrics import as_scalars

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
        task = PRETEXT_TASKS[name](DIM, GRID, LossConfig(smoothing))
        tokens = torch.randn(2, 12, DIM, requires_grad=True)
        loss, measure = task(tokens, PatchLayout.full(2, GRID))
        assert loss.shape == measure.shape == ()
        assert loss.isfinite() and 0 <= measure <= (1 if task.measure == "accuracy" else math.inf)
        assert not measure.requires_grad
        loss.backward()
        for parameter in [tokens, *task.parameters()]:
            assert parameter.grad is not None and parameter.grad.any()

    def test_padding_is_ignored(self, name: str, smoothing: float) -> None:
        """A padded batch has the loss of its valid tokens."""
        task = PRETEXT_TASKS[name](DIM, GRID, LossConfig(smoothing))
        tokens, layout = torch.randn(1, 12, DIM), PatchLayout.full(1, GRID)
        layout.valid[0, 7:] = False
        alone = layout.selected(torch.arange(7)[None])
        padded, short = task(tokens, layout), task(tokens[:, :7], alone)
        torch.testing.assert_close(padded, short)

    def test_the_order_of_tokens_is_irrelevant(self, name: str, smoothing: float) -> None:
        task = PRETEXT_TASKS[name](DIM, GRID, LossConfig(smoothing))
        tokens, layout = torch.randn(2, 12, DIM), PatchLayout.full(2, GRID)
        order = torch.rand(2, 12).argsort(1)
        moved = task(tokens.gather(1, order[:, :, None].expand_as(tokens)), layout.selected(order))
        torch.testing.assert_close(moved, task(tokens, layout))

    def test_chance_is_between_0_and_1(self, name: str, smoothing: float) -> None:
        assert 0 < PRETEXT_TASKS[name](DIM, GRID, LossConfig(smoothing)).chance(GRID) < 1

    def test_it_is_learnable(self, name: str, smoothing: float) -> None:
        """A head fitted to tokens that determine their cells is far better than chance."""
        task = PRETEXT_TASKS[name](DIM, GRID, LossConfig(smoothing))
        tokens, layout = torch.randn(1, 12, DIM), PatchLayout.full(1, GRID)
        optimizer = torch.optim.Adam(task.parameters(), lr=0.05)
        for _ in range(200):
            loss, measure = task(tokens, layout)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert measure > 0.9 if task.measure == "accuracy" else measure < task.chance(GRID) / 4

    def test_no_constant_prediction_beats_chance(self, name: str, smoothing: float) -> None:
        """With constant tokens a fitted head predicts a constant."""
        task = PRETEXT_TASKS[name](DIM, GRID, LossConfig(smoothing))
        tokens, layout = torch.ones(1, 12, DIM), PatchLayout.full(1, GRID)
        optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
        for _ in range(150):
            loss, measure = task(tokens, layout)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Corner classes are equally frequent, so rounding decides which one is predicted, or none in a tie.
        assert (
            measure <= task.chance(GRID) + 1e-6 if task.measure == "accuracy" else measure >= task.chance(GRID) - 1e-4
        )
        if name in ("distance", "angle"):
            assert measure.item() == pytest.approx(task.chance(GRID), rel=0.01)


def test_losses_of_uniform_scores_are_the_logarithms_of_the_classes() -> None:
    """With all weights zero the scores are uniform: ln 9 for relations, ln N for positions."""
    task = PretextTask(DIM, GRID, {"relation": 1, "position": 1})
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    scores = task(torch.randn(2, 12, DIM), PatchLayout.full(2, GRID))
    assert scores["loss_relation"].item() == pytest.approx(math.log(9))
    assert scores["loss_position"].item() == pytest.approx(math.log(12))


def test_losses_of_a_permutation_equivariant_encoder_ignore_the_permutation() -> None:
    """Self-attention without position embedding: permuting the patches leaves every loss equal."""
    encoder = nn.TransformerEncoderLayer(DIM, 4, 40, dropout=0.0, batch_first=True)
    task = PretextTask(DIM, GRID, {"relation": 1, "position": 1})
    patches, layout = torch.randn(2, 12, DIM), PatchLayout.full(2, GRID)
    order = torch.rand(2, 12).argsort(1)
    moved = task(encoder(patches.gather(1, order[:, :, None].expand_as(patches))), layout.selected(order))
    torch.testing.assert_close(as_scalars(moved), as_scalars(task(encoder(patches), layout)))


def test_weights_scale_the_losses_and_tasks_of_weight_zero_are_not_built() -> None:
    both = PretextTask(DIM, GRID, {"relation": 2.0, "position": 0.5})
    tokens, layout = torch.randn(2, 12, DIM), PatchLayout.full(2, GRID)
    scores = both(tokens, layout)
    for name, weight in both.weights.items():
        alone = both.tasks[name](tokens, layout)
        torch.testing.assert_close(scores[f"loss_{name}"], weight * alone[0])
        torch.testing.assert_close(scores[name].value, alone[1])
        assert scores[name].chance == PRETEXT_TASKS[name](DIM, GRID).chance(GRID)
    assert scores["relation"].chance == pytest.approx(1 / 8) and scores["position"].chance == pytest.approx(1 / 12)

    single = PretextTask(DIM, GRID, {"relation": 0, "position": 1})
    assert set(as_scalars(single(tokens, layout))) == {"loss_position", "accuracy_position", "chance_position"}
    assert all(name.startswith("tasks.position.") for name in single.state_dict())


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"relatoin": 1.0}, "relation"), ({"relation": -1.0}, "relation"), ({"relation": 0.0}, "above 0")],
)
def test_invalid_weights_are_rejected(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PretextTask(DIM, GRID, weights)


@pytest.mark.parametrize(("dim", "parameters"), [(384, 290_304), (768, 1_175_040)])
def test_relation_head_has_the_authors_trained_parameters(dim: int, parameters: int) -> None:
    """The authors' counts (435,456 and 1,762,560) without the unused value projections (145,152 and 587,520)."""
    assert sum(p.numel() for p in PairHead(dim, 9).parameters()) == parameters


def test_tokens_too_narrow_for_nine_maps_are_rejected() -> None:
    with pytest.raises(UserError, match="width 8"):
        PairHead(8, 9)


@pytest.mark.parametrize(("smoothing", "dropout"), [(-0.1, 0), (1.5, 0), (0, -0.1), (0, 1)])
def test_loss_settings_out_of_range_are_rejected(smoothing: float, dropout: float) -> None:
    with pytest.raises(UserError, match=r"LABEL_SMOOTHING|PAIR_DROPOUT"):
        LossConfig(smoothing, dropout)


def test_pair_dropout_is_for_training_only() -> None:
    task = PretextTask(DIM, GRID, {"relation": 1}, LossConfig(pair_dropout=0.5))
    tokens, layout = torch.randn(2, 12, DIM), PatchLayout.full(2, GRID)
    whole = PretextTask(DIM, GRID, {"relation": 1})
    whole.load_state_dict(task.state_dict())
    first, second = (task(tokens, layout)["loss_relation"] for _ in range(2))
    assert first != second
    assert task.eval()(tokens, layout) == whole(tokens, layout)


def test_positions_of_another_grid_map_to_the_grid_of_the_task() -> None:
    task = PretextTask(DIM, (2, 2), {"position": 1})
    tokens, layout = torch.randn(1, 12, DIM), PatchLayout.full(1, GRID)
    position = task.tasks["position"]
    assert isinstance(position, PositionTask)
    scores = position.head(tokens)[0]
    cells = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3])
    expected = nn.functional.cross_entropy(scores, cells)
    torch.testing.assert_close(task(tokens, layout)["loss_position"], expected)


@pytest.mark.parametrize("grid", [(14, 14), (7, 5), (1, 2)])
def test_pooled_tokens_equal_avg_pool2d_without_padding(grid: tuple[int, int]) -> None:
    task = PretextTask(DIM, GRID, {"relation": 1.0}, pool=2)
    last = torch.randn(2, DIM, *grid)
    tokens, layout = task.pooled(last)
    expected = nn.functional.avg_pool2d(last, 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(tokens, expected.flatten(2).mT)
    assert layout.grid == expected.shape[2:] and layout.valid.all()


def test_pooled_tokens_do_not_depend_on_padding() -> None:
    task = PretextTask(DIM, GRID, {"relation": 1.0}, pool=2)
    last, extents = torch.randn(2, DIM, 9, 8), torch.tensor([[9, 8], [5, 4]])
    tokens, layout = task.pooled(last, extents)
    (alone,), _ = task.pooled(last[1:, :, :5, :4])
    torch.testing.assert_close(tokens[1][layout.valid[1]], alone)
    assert layout.extent.tolist() == [[5, 4], [3, 2]]


@pytest.mark.parametrize("name", list(PRETEXT_TASKS))
def test_heads_have_the_authors_initialisation(name: str) -> None:
    """nn.Linear's default: uniform within 1 / sqrt(dim) (models/relvit.py:66-81,134-149)."""
    dim = 256
    for parameter in PRETEXT_TASKS[name](dim, (8, 8)).parameters():
        assert parameter.abs().max() <= dim**-0.5
        assert parameter.std().item() == pytest.approx((3 * dim) ** -0.5, rel=0.15 if parameter.ndim == 1 else 0.02)
