"""The blockwise relation loss against the dense form, and its laws."""

import math

import pytest
import torch
from torch import Tensor

from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.relation_loss import relation_loss, relation_loss_plain


def problem(
    batch: int = 3, grid: tuple[int, int] = (3, 5), width: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, PatchLayout]:
    """Random queries and keys of a shuffled layout; image 1 has padding, and the last only one token."""
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1]
    q, k = torch.randn(2, batch, 9, tokens, width, generator=generator, dtype=dtype) * 2
    layout = PatchLayout.full(batch, grid)
    layout.valid[1, -4:] = False
    layout.valid[batch - 1, 1:] = False
    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    return q.requires_grad_(), k.requires_grad_(), layout.permuted(order)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("block", [None, 1, 4, 15, 99])
def test_blocks_give_the_dense_loss_and_gradients(block: int | None, smoothing: float) -> None:
    q, k, layout = problem()
    loss, accuracy = relation_loss(q, k, layout, block, smoothing)
    plain_loss, plain_accuracy = relation_loss_plain(q, k, layout, smoothing)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(accuracy, plain_accuracy)
    grads = torch.autograd.grad(3 * loss, (q, k))
    for ours, plain in zip(grads, torch.autograd.grad(3 * plain_loss, (q, k)), strict=True):
        torch.testing.assert_close(ours, plain)


def test_many_images_a_block_and_many_blocks_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of two images, then of a third of one, walks both loops; five images divide by neither."""
    q, k, layout = problem(batch=5)
    expected = torch.autograd.grad(relation_loss_plain(q, k, layout)[0], (q, k))
    for images in (2, 1 / 3):
        budget = {"cpu": int(images * 9 * 15 * 15 * 4)}
        monkeypatch.setattr("relvit_d2.pretext.relation_loss.BLOCK_BYTES", {**budget, "cuda": 1})
        grads = torch.autograd.grad(relation_loss(q, k, layout)[0], (q, k))
        torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradcheck(smoothing: float) -> None:
    q, k, layout = problem(batch=2, grid=(2, 3), width=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: relation_loss(q, k, layout, 4, smoothing)[0], (q, k))


def test_large_scores_stay_exact() -> None:
    q, k, layout = problem()
    loss, _ = relation_loss(q * 100, k * 100, layout)
    exact, _ = relation_loss_plain(q.double() * 100, k.double() * 100, layout)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_autocast_and_half_inputs_sum_in_float32() -> None:
    q, k, layout = problem()
    q16, k16 = (x.detach().bfloat16().requires_grad_() for x in (q, k))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = relation_loss(q16, k16, layout, 4)
    expected, _ = relation_loss_plain(q16.float(), k16.float(), layout)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, (q16, k16))
    torch.testing.assert_close(torch.autograd.grad(loss, (q16, k16)), wanted, rtol=0.01, atol=1e-6)


def test_padding_is_never_read() -> None:
    q, k, layout = problem()
    junk_q, junk_k = q.detach().clone(), k.detach().clone()
    gone = ~layout.valid[:, None, :, None].expand_as(q)
    junk_q[gone], junk_k[gone] = math.nan, math.inf
    junk_q.requires_grad_(), junk_k.requires_grad_()
    loss, accuracy = relation_loss(junk_q, junk_k, layout)
    clean = relation_loss(q, k, layout)
    assert (loss, accuracy) == clean
    for junk, grad in zip(
        torch.autograd.grad(loss, (junk_q, junk_k)), torch.autograd.grad(clean[0], (q, k)), strict=True
    ):
        assert torch.equal(junk, grad)
        assert not junk[gone].any()


def test_no_valid_token_is_a_loss_of_zero() -> None:
    q, k, layout = problem()
    layout.valid[:] = False
    loss, accuracy = relation_loss(q, k, layout)
    assert loss == accuracy == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (q, k)))


def test_uniform_scores_lose_ln_9_and_hit_nothing() -> None:
    q, k, layout = problem()
    loss, accuracy = relation_loss(q * 0, k, layout)
    assert loss.item() == pytest.approx(math.log(9))
    assert accuracy == 0


def test_true_scores_are_all_hit() -> None:
    """Scores built by hand from coordinates: 3*sgn(dr)*a + sgn(dc)*b is largest for the class (a, b)."""
    layout = PatchLayout.full(2, (2, 2))
    row, col = layout.row.float() - 0.5, layout.col.float() - 0.5
    # On a 2x2 grid sgn(dr) = r_i - r_j; class (a, b) scores 2*a*dr + 2*b*dc - a*a - b*b.
    q, k = [], []
    for cls in range(9):
        a, b = cls // 3 - 1, cls % 3 - 1
        one = torch.ones_like(row)
        q.append(torch.stack((2 * a * row + 2 * b * col - a * a - b * b, one), 2))
        k.append(torch.stack((one, -2 * a * row - 2 * b * col), 2))
    _, accuracy = relation_loss(torch.stack(q, 1), torch.stack(k, 1), layout)
    assert accuracy == 1


def test_shuffling_tokens_leaves_the_loss_alone() -> None:
    q, k, layout = problem()
    order = torch.rand(layout.row.shape).argsort(1)
    index = order[:, None, :, None].expand_as(q)
    moved, _ = relation_loss(q.gather(2, index), k.gather(2, index), layout.permuted(order))
    torch.testing.assert_close(moved, relation_loss(q, k, layout)[0])


def test_nothing_of_the_square_of_the_tokens_is_saved() -> None:
    """The tensors kept for the backward pass are counted while the graph is built."""
    q, k, layout = problem(batch=2, grid=(20, 20))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        relation_loss(q, k, layout)
    assert 0 < sum(saved) <= q.numel() + k.numel() + 2


def test_no_gradient_is_formed_where_none_is_wanted() -> None:
    q, k, layout = problem()
    with torch.no_grad():
        loss, accuracy = relation_loss(q, k, layout)
    assert not loss.requires_grad
    assert (loss, accuracy) == relation_loss(q, k, layout)


def test_inside_torch_compile() -> None:
    """Traced by dynamo and differentiated by AOTAutograd, without the code generator."""
    q, k, layout = problem()

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return relation_loss(q, k, layout, 8)[0]

    compiled = torch.compile(loss, backend="aot_eager")(q, k)
    torch.testing.assert_close(compiled, loss(q, k))
    torch.testing.assert_close(torch.autograd.grad(compiled, (q, k)), torch.autograd.grad(loss(q, k), (q, k)))
