"""Blockwise pair losses, compared with the dense form, and their invariants."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.plain import pair_loss_plain
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.pair_loss import Bearing, PairKind, Relation, SquaredError, pair_loss
from relvit_d2.pretext.targets import pair_angle, pair_distance
from relvit_d2.utils.hashing import hashed_uniform

KINDS = [Relation(), Relation(0.1), SquaredError(pair_distance), SquaredError(pair_angle), Bearing()]
NAMES = ["relation", "smoothed", "distance", "angle", "bearing"]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


def problem(
    kind: PairKind = Relation(),  # noqa: B008
    batch: int = 3,
    grid: tuple[int, int] = (3, 5),
    width: int = 4,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, PatchLayout]:
    """Random queries and keys of a shuffled layout; image 1 has padding, the last image a single token."""
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1]
    q, k = torch.randn(2, batch, kind.maps, tokens, width, generator=generator, dtype=dtype) * 2
    layout = PatchLayout.full(batch, grid)
    layout.valid[1, -4:] = False
    layout.valid[batch - 1, 1:] = False
    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    return q.requires_grad_(), k.requires_grad_(), layout.selected(order)


@every_kind
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("block", [None, 1, 4, 15, 99])
def test_blocks_give_the_dense_loss_and_gradients(block: int | None, dropout: float, kind: PairKind) -> None:
    q, k, layout = problem(kind)
    torch.manual_seed(3)
    loss, accuracy = pair_loss(q, k, layout, kind, dropout, block)
    torch.manual_seed(3)
    plain_loss, plain_accuracy = pair_loss_plain(q, k, layout, kind, dropout)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(accuracy, plain_accuracy)
    grads = torch.autograd.grad(3 * loss, (q, k))
    for ours, plain in zip(grads, torch.autograd.grad(3 * plain_loss, (q, k)), strict=True):
        torch.testing.assert_close(ours, plain)


def test_several_images_per_block_and_several_blocks_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets of two images and of a third of one; neither divides five images."""
    q, k, layout = problem(batch=5)
    expected = torch.autograd.grad(pair_loss_plain(q, k, layout, Relation())[0], (q, k))
    for images in (2, 1 / 3):
        budget = {"cpu": int(images * 9 * 15 * 15 * 4)}
        monkeypatch.setattr("relvit_d2.pretext.pair_loss.BLOCK_BYTES", {**budget, "cuda": 1})
        grads = torch.autograd.grad(pair_loss(q, k, layout, Relation())[0], (q, k))
        torch.testing.assert_close(grads, expected)


@every_kind
def test_gradcheck(kind: PairKind) -> None:
    q, k, layout = problem(kind, batch=2, grid=(2, 3), width=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: pair_loss(q, k, layout, kind, block=4)[0], (q, k))


@every_kind
def test_dropout_omits_its_fraction_of_the_pairs(kind: PairKind) -> None:
    """The loss is the mean of the kept pairs; these are uniform over rows and columns."""
    q, k, layout = problem(kind, batch=2, grid=(20, 20))
    layout.valid[:] = True
    torch.manual_seed(0)
    loss, measure = pair_loss(q, k, layout, kind, 0.75)
    whole, all_measure = pair_loss(q, k, layout, kind)
    assert loss != whole and measure == all_measure
    assert loss.item() == pytest.approx(whole.item(), rel=0.05)
    torch.manual_seed(0)
    keep = _kept_pairs(2, 400, 0.75)
    assert keep.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / keep.numel()))
    rows, cols = keep.double().mean(2), keep.double().mean(1)
    spread = math.sqrt(0.25 * 0.75 / 400)
    assert rows.std().item() == pytest.approx(spread, rel=0.15) and cols.std().item() == pytest.approx(spread, rel=0.15)


def _kept_pairs(batch: int, tokens: int, dropout: float) -> Tensor:
    seed, index = torch.randint(2**31, ()), torch.arange(tokens)
    return hashed_uniform(seed, torch.arange(batch)[:, None, None], index[:, None], index) >= dropout


def test_large_scores_stay_exact() -> None:
    q, k, layout = problem()
    loss, _ = pair_loss(q * 100, k * 100, layout, Relation())
    exact, _ = pair_loss_plain(q.double() * 100, k.double() * 100, layout, Relation())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_autocast_and_half_inputs_sum_in_float32() -> None:
    q, k, layout = problem()
    q16, k16 = (x.detach().bfloat16().requires_grad_() for x in (q, k))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = pair_loss(q16, k16, layout, Relation(), block=4)
    expected, _ = pair_loss_plain(q16.float(), k16.float(), layout, Relation())
    torch.testing.assert_close(loss, expected)
    expected_grads = torch.autograd.grad(expected, (q16, k16))
    torch.testing.assert_close(torch.autograd.grad(loss, (q16, k16)), expected_grads, rtol=0.01, atol=1e-6)


@every_kind
def test_padding_is_ignored(kind: PairKind) -> None:
    q, k, layout = problem(kind)
    junk_q, junk_k = q.detach().clone(), k.detach().clone()
    padding = ~layout.valid[:, None, :, None].expand_as(q)
    junk_q[padding], junk_k[padding] = math.nan, math.inf
    junk_q.requires_grad_(), junk_k.requires_grad_()
    loss, accuracy = pair_loss(junk_q, junk_k, layout, kind)
    clean = pair_loss(q, k, layout, kind)
    assert (loss, accuracy) == clean
    for junk, grad in zip(
        torch.autograd.grad(loss, (junk_q, junk_k)), torch.autograd.grad(clean[0], (q, k)), strict=True
    ):
        assert torch.equal(junk, grad)
        assert not junk[padding].any()


@every_kind
def test_the_loss_without_valid_tokens_is_zero(kind: PairKind) -> None:
    q, k, layout = problem(kind)
    layout.valid[:] = False
    loss, accuracy = pair_loss(q, k, layout, kind)
    assert loss == accuracy == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (q, k)))


def test_uniform_scores_have_loss_ln_9_and_accuracy_0() -> None:
    q, k, layout = problem()
    loss, accuracy = pair_loss(q * 0, k, layout, Relation())
    assert loss.item() == pytest.approx(math.log(9))
    assert accuracy == 0


def test_correct_scores_have_accuracy_1() -> None:
    """Scores computed from coordinates, largest for the class of the pair."""
    layout = PatchLayout.full(2, (2, 2))
    row, col = layout.row.float() - 0.5, layout.col.float() - 0.5
    # On a 2x2 grid sgn(dr) = r_i - r_j; class (a, b) scores 2*a*dr + 2*b*dc - a*a - b*b.
    q, k = [], []
    for cls in range(9):
        a, b = cls // 3 - 1, cls % 3 - 1
        one = torch.ones_like(row)
        q.append(torch.stack((2 * a * row + 2 * b * col - a * a - b * b, one), 2))
        k.append(torch.stack((one, -2 * a * row - 2 * b * col), 2))
    _, accuracy = pair_loss(torch.stack(q, 1), torch.stack(k, 1), layout, Relation())
    assert accuracy == 1


@every_kind
def test_the_loss_is_invariant_to_the_order_of_tokens(kind: PairKind) -> None:
    q, k, layout = problem(kind)
    order = torch.rand(layout.row.shape).argsort(1)
    index = order[:, None, :, None].expand_as(q)
    moved, _ = pair_loss(q.gather(2, index), k.gather(2, index), layout.selected(order), kind)
    torch.testing.assert_close(moved, pair_loss(q, k, layout, kind)[0])


@every_kind
def test_memory_for_the_backward_pass_is_linear_in_the_tokens(kind: PairKind) -> None:
    """Counts the tensors that autograd saves."""
    q, k, layout = problem(kind, batch=2, grid=(20, 20))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pair_loss(q, k, layout, kind)
    assert 0 < sum(saved) <= q.numel() + k.numel() + 2


@every_kind
def test_no_gradient_is_computed_under_no_grad(kind: PairKind) -> None:
    q, k, layout = problem(kind)
    with torch.no_grad():
        loss, accuracy = pair_loss(q, k, layout, kind)
    assert not loss.requires_grad
    assert (loss, accuracy) == pair_loss(q, k, layout, kind)


@every_kind
def test_inside_torch_compile(kind: PairKind) -> None:
    """With the backend aot_eager, which needs no code generator."""
    q, k, layout = problem(kind)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return pair_loss(q, k, layout, kind, 0.0, 8)[0]

    compiled = torch.compile(loss, backend="aot_eager")(q, k)
    torch.testing.assert_close(compiled, loss(q, k))
    torch.testing.assert_close(torch.autograd.grad(compiled, (q, k)), torch.autograd.grad(loss(q, k), (q, k)))
