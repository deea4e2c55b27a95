"""T2T-ViT: soft splits, performers and positions, compared with simple or published formulas."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import Attention, DropPath
from torch import Tensor, nn
from torch.export import Dim, export

from relvit_d2.conversion.encoder_file import feature_difference, load_encoder_weights, save_encoder
from relvit_d2.encoders import build_encoder
from relvit_d2.encoders.t2t import T2T, Performer, sinusoid, soft_split
from relvit_d2.utils.errors import UserError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def encoder() -> T2T:
    built = build_encoder("t2t_vit_14").eval()
    assert isinstance(built, T2T)
    return built


def shallow(depth: int = 2, **arguments: object) -> T2T:
    """Return an encoder with the first ``depth`` blocks."""
    built = build_encoder("t2t_vit_14", **arguments)
    assert isinstance(built, T2T)
    built.blocks = nn.Sequential(*list(built.blocks)[:depth])
    return built


def count(tensors: object) -> int:
    return sum(t.numel() for t in tensors)  # type: ignore[attr-defined]


def test_numbers_of_parameters_are_the_authors(encoder: T2T) -> None:
    assert count(p for p in encoder.parameters() if p.requires_grad) == count(encoder.parameters()) == 21_080_806
    assert count(encoder.tokens_to_token.parameters()) == 387_430
    assert count(encoder.blocks.parameters()) == 20_692_224
    assert {n: b.shape for n, b in encoder.named_buffers()} == {
        f"tokens_to_token.attention{i}.w": (32, 64) for i in (1, 2)
    }
    assert count(encoder.state_dict().values()) == 21_080_806 + 4_096


def test_constants(encoder: T2T) -> None:
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.scale for m in encoder.modules() if isinstance(m, Attention)} == {64**-0.5}
    performers = [m for m in encoder.modules() if isinstance(m, Performer)]
    assert [d.p for m in performers for d in m.modules() if isinstance(d, nn.Dropout)] == [0.1] * 4
    rates = [m.drop_prob for m in build_encoder("t2t_vit_14", drop_path=0.13).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([depth / 100 for depth in range(1, 14) for _ in range(2)])


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 4, 2), (3, 2, 1)])
def test_soft_splits_are_overlapping_windows(kernel: int, stride: int, padding: int) -> None:
    maps = torch.randn(2, 3, 16, 8)
    tokens = soft_split(maps, kernel, stride, padding)
    cols = 8 // stride
    assert tokens.shape == (2, 16 // stride * cols, 3 * kernel * kernel)
    for n in range(tokens.shape[1]):
        top, left = n // cols * stride - padding, n % cols * stride - padding
        for c in range(3):
            for y in range(kernel):
                for x in range(kernel):
                    inside = 0 <= top + y < 16 and 0 <= left + x < 8
                    expected = maps[:, c, top + y, left + x] if inside else torch.zeros(2)
                    assert torch.equal(tokens[:, n, (c * kernel + y) * kernel + x], expected)


def dense_attention(performer: Performer, keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
    """Attention with all pairs of weights, as logarithms in float64 to avoid underflow and overflow."""
    w = performer.w.double()

    def exponent(x: Tensor) -> Tensor:
        return x.double() @ w.T - x.double().square().sum(-1, keepdim=True) / 2

    pairs = (exponent(queries)[:, :, None] + exponent(keys)[:, None]).logsumexp(-1) - math.log(len(w))
    total = torch.logaddexp(pairs.logsumexp(2), torch.tensor(1e-8, dtype=torch.float64).log())
    return (pairs - total[:, :, None]).exp() @ values.double()


def test_a_performer_equals_the_dense_form() -> None:
    performer = Performer(12, 64).eval()
    with torch.no_grad():
        performer.kqv.weight.mul_(2)
    x = torch.randn(2, 29, 12, dtype=torch.float64)
    performer.double()
    with torch.no_grad():
        keys, queries, values = performer.kqv(performer.norm1(x)).split(64, dim=2)
        y = values + performer.proj(dense_attention(performer, keys, queries, values))
        torch.testing.assert_close(performer(x), y + performer.mlp(performer.norm2(y)), atol=1e-10, rtol=1e-10)


def test_a_performer_equals_the_published_formula() -> None:
    performer = Performer(5, 8)
    keys, queries, values = torch.randn(3, 1, 7, 8)
    m = 4

    def feature(x: Tensor, i: int) -> float:
        return math.exp(sum(float(performer.w[i, j] * x[j]) for j in range(8)) - float(x @ x) / 2) / math.sqrt(m)

    found = performer.attend(keys, queries, values)[0]
    for t in range(7):
        weights = [sum(feature(queries[0, t], i) * feature(keys[0, s], i) for i in range(m)) for s in range(7)]
        expected = sum(weight * values[0, s] for s, weight in enumerate(weights)) / (sum(weights) + 1e-8)
        torch.testing.assert_close(found[t], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.03, 1, 5, 30, 1000])
def test_performers_are_exact_for_activations_of_any_size(scale: float) -> None:
    performer = Performer(147, 64)
    tokens = (torch.randn(3, 1, 50, 64) / 8 * scale).requires_grad_()
    found = performer.attend(*tokens)
    found.sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    assert performer.features(tokens).max() <= math.exp(16) / math.sqrt(32)
    torch.testing.assert_close(
        found.double() / scale, dense_attention(performer, *tokens) / scale, atol=1e-5, rtol=1e-4
    )


def test_random_features_are_orthogonal_and_estimate_the_gaussian_kernel() -> None:
    performer = Performer(8, 64)
    torch.testing.assert_close(performer.w @ performer.w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)
    q, k = torch.randn(2, 1, 1, 64) / 8
    draws = [(p.features(q) * p.features(k)).sum() for p in (Performer(8, 64) for _ in range(200))]
    assert torch.stack(draws).mean().item() == pytest.approx(math.exp(-(q - k).square().sum().item() / 4), rel=0.05)


def test_the_performer_computes_in_float32_under_autocast() -> None:
    performer = Performer(8, 64)
    tokens = torch.randn(3, 1, 50, 64) / 4
    with torch.autocast("cpu", torch.bfloat16):
        inside = performer.attend(*tokens)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, performer.attend(*tokens))


def test_values_of_the_sinusoid() -> None:
    table = sinusoid(197, 384)
    assert table.shape == (197, 384)
    for position in (0, 1, 100, 196):
        for pair in (0, 1, 77, 191):
            turned = complex(math.e) ** (1j * position * math.exp(-pair / 192 * math.log(10_000)))
            assert table[position, 2 * pair].item() == pytest.approx(turned.imag, abs=1e-12)
            assert table[position, 2 * pair + 1].item() == pytest.approx(turned.real, abs=1e-12)
    torch.testing.assert_close(sinusoid(5000, 384)[:197], table, atol=0, rtol=0)  # independent of the length


def test_the_sinusoid_is_added_if_pos_embed_is_set(encoder: T2T) -> None:
    seen: list[Tensor] = []
    hook = encoder.pos_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        encoder.tokens(image)
        encoder.positions = False
        encoder.tokens(image)
        encoder.positions = True
    hook.remove()
    torch.testing.assert_close(seen[0] - seen[1], sinusoid(197, 384).float()[None], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[1][0, 0], encoder.cls_token[0, 0], atol=0, rtol=0)
    assert build_encoder(
        "t2t_vit_14", pos_embed=False
    ).has_position_information  # by the zero padding of the soft splits


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 250), (96, 32)])
def test_images_are_padded_with_zeros_on_the_right_and_below(encoder: T2T, size: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size)
    rows, cols = -(-size[0] // 16), -(-size[1] // 16)
    padded = torch.zeros(1, 3, 16 * rows, 16 * cols)
    padded[..., : size[0], : size[1]] = image
    with torch.no_grad():
        found = encoder(image)["s16"]
        assert found.shape == (1, 384, rows, cols)
        assert torch.equal(found, encoder(padded)["s16"])


def test_a_token_depends_on_its_patch() -> None:
    """Without blocks a pixel affects the tokens around its patch only; rows and columns are not swapped."""
    encoder = shallow(depth=0).eval()
    image = torch.randn(1, 3, 96, 192)
    other = image.clone()
    other[..., 40, 168] += 3  # row 2 of 6, column 10 of 12
    with torch.no_grad():
        change = (encoder(image)["s16"] - encoder(other)["s16"]).abs().mean((0, 1))
    assert divmod(int(change.argmax()), 12) == (2, 10)


def test_images_of_a_batch_are_independent_and_evaluation_is_deterministic(encoder: T2T) -> None:
    images, order = torch.randn(3, 3, 48, 32), torch.tensor([2, 0, 1])
    with torch.no_grad():
        tokens = encoder.tokens(images)
        torch.testing.assert_close(encoder.tokens(images[order]), tokens[order], atol=1e-5, rtol=1e-5)
        assert torch.equal(encoder.tokens(images), tokens)
        assert not torch.equal(shallow().train().tokens(images), shallow().train().tokens(images))


def test_bfloat16_autocast_is_close(encoder: T2T) -> None:
    images = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        exact = encoder.tokens(images)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = encoder.tokens(images)
    assert (coarse - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


@pytest.mark.slow
def test_exported_and_compiled_encoders_accept_other_sizes() -> None:
    encoder = shallow().eval()
    rows, cols = Dim("rows", min=2, max=64), Dim("cols", min=2, max=64)
    example = (torch.randn(2, 3, 64, 96),)
    exported = export(encoder, example, dynamic_shapes=({2: 16 * rows, 3: 16 * cols},)).module()
    compiled = shallow().eval()
    compiled.load_state_dict(encoder.state_dict())
    compiled.compile_passes()
    with torch.no_grad():
        for size in ((64, 96), (112, 32), (48, 48)):
            images = torch.randn(2, 3, *size)
            expected = encoder.tokens(images)
            found = exported(images)["s16"].flatten(2).transpose(1, 2)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(compiled.tokens(images), expected, atol=1e-5, rtol=1e-5)


def test_weights_without_the_sinusoid_are_verified_without_it(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    source, target = (build_encoder("t2t_vit_14", img_size=32, pos_embed=on) for on in (False, True))
    save_encoder(source, path, {})
    report = load_encoder_weights(target, path)
    assert (report.share, report.fresh, report.missing, report.unexpected) == (1.0, ["sinusoid"], [], [])
    assert feature_difference(target, path) == 0.0
    assert isinstance(target, T2T) and target.positions


def test_another_patch_size_is_rejected() -> None:
    with pytest.raises(UserError, match=r"MODEL.ENCODER.PATCH_SIZE 8.*set it to 16"):
        build_encoder("t2t_vit_14", patch_size=8)


# In a new process, since the peak memory of a process never falls.
MEASURE = """
import torch
from relvit_d2.encoders import build_encoder
from relvit_d2.utils.hardware import peak_memory
torch.set_num_threads(1)
encoder = build_encoder("t2t_vit_14").eval()
with torch.no_grad():
    encoder(torch.randn(1, 3, 32, 32))
    before = peak_memory("cpu")
    encoder(torch.randn(1, 3, 1024, 1024))
print(peak_memory("cpu") - before)
"""


@pytest.mark.slow
def test_memory_for_a_large_image_is_linear_in_the_tokens() -> None:
    """65,536 tokens in the first performer: all pairs would need 16 GiB; the limit is 1 GiB."""
    output = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout
    assert float(output) < 1, output
