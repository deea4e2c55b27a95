"""Views, compared with torchvision's operations on each image and patch, and their invariants."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as F
from torch import Tensor
from torchvision.io import read_image
from torchvision.transforms import RandomCrop

from benchmarks.plain import plain_patches
from relvit_d2.pretext import resampling
from relvit_d2.pretext import views as module
from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.resampling import random_flips, random_pad_corners, resample
from relvit_d2.pretext.views import (
    MegaPatches,
    PatchDraws,
    ViewConfig,
    Views,
    augment_patches,
    draw_cuts,
    draw_patches,
    permute_patches,
)
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.randomness import image_keys

PLAIN = ViewConfig(24, 8, patch_crop=None, jitter_prob=0, gray_prob=0, mean=(0, 0, 0), std=(1, 1, 1))
FULL = ViewConfig((16, 24), 8, permute=True, mean=(0, 0, 0), std=(1, 1, 1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys_of(count: int, seed: int = 0) -> Tensor:
    return image_keys(seed, "views", torch.arange(count))


def batch_of(count: int, height: int = 30, width: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise images with gray and black rows, whose hue is undefined."""
    images = torch.randint(0, 256, (count, 3, height, width), generator=seeded(seed), dtype=torch.uint8)
    images[:, :, :8] = images[:, :1, :8]
    images[:, :, 8:12] = 0
    return images, torch.tensor([[height, width]]).repeat(count, 1)


@pytest.mark.parametrize("large", [1, 10**6], ids=["one by one", "together"])
def test_resample_equals_torchvisions_resized_crop(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enlarged and reduced, flipped and not, down to a box of one pixel, in channels-last memory format."""
    monkeypatch.setattr(resampling, "LARGE", large)
    images = batch_of(5, 50, 60)[0].to(memory_format=torch.channels_last)
    boxes = torch.tensor([[0, 0, 50, 60], [7, 3, 9, 50], [10, 20, 40, 11], [49, 59, 1, 1], [5, 6, 16, 24]])
    flip = torch.tensor([False, True, False, True, True])
    views = resample(images, boxes, flip, (16, 24))
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = F.resized_crop(images[b] / 255, top, left, height, width, [16, 24], antialias=True)
        torch.testing.assert_close(views[:, b], F.hflip(crop) if flip[b] else crop, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("large", [1, 10**6], ids=["one by one", "together"])
def test_padded_crops_equal_torchvisions_random_crop(large: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``RandomCrop`` uses the corners that the views draw; its result is flipped like the views."""
    monkeypatch.setattr(resampling, "LARGE", large)
    images, sizes = batch_of(40, 24, 24)
    views, _ = Views(replace(PLAIN, crop_kind="pad", pad_mode=mode)).train(images, sizes, keys_of(40))
    corners, flips = random_pad_corners(keys_of(40), 4), random_flips(keys_of(40), 0.5)
    assert flips.any() and not flips.all()
    assert (corners == 0).any(0).all() and (corners == 8).any(0).all()
    for image, view, corner, flip in zip(images, views, corners.tolist(), flips, strict=True):
        crop = RandomCrop(24, padding=4, padding_mode=mode)
        monkeypatch.setattr(crop, "get_params", lambda image, size, corner=corner: (*corner, *size))
        expected = crop(image / 255)
        torch.testing.assert_close(view, F.hflip(expected) if flip else expected, rtol=0, atol=1e-6)


def test_a_padded_crop_is_taken_from_the_resized_centre() -> None:
    images, sizes = batch_of(6, 40, 60)
    config = replace(PLAIN, crop_kind="pad", pad=3, flip=0.0)
    resized = F.resize(F.center_crop(images, [40, 40]).float() / 255, [24, 24], antialias=True)
    corners = random_pad_corners(keys_of(6), 3)
    views, _ = Views(config).train(images, sizes, keys_of(6))
    for image, view, (top, left) in zip(resized, views, corners.tolist(), strict=True):
        expected = F.crop(F.pad(image, [3]), top, left, 24, 24)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)


def test_mega_patches_of_a_padded_crop() -> None:
    images, sizes = batch_of(6, 24, 24)
    config = replace(PLAIN, crop_kind="pad", flip=0.0)
    cut = replace(config, mega=MegaPatches(2))
    padded, _ = Views(config).train(images, sizes, keys_of(6))
    views, _ = Views(cut).train(images, sizes, keys_of(6))
    cuts = draw_cuts(cut, keys_of(6))
    assert cuts is not None
    rows, cols = cuts
    for b, view in enumerate(views):
        for i in range(2):
            for j in range(2):
                piece = padded[b, :, rows[b, i] : rows[b, i + 1], cols[b, j] : cols[b, j + 1]]
                expected = F.resize(piece, [8, 8], antialias=True)
                torch.testing.assert_close(view[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8], expected, rtol=0, atol=1e-5)


def test_flips_have_their_probability() -> None:
    images, sizes = batch_of(400, 8, 8)
    never = replace(PLAIN, size=8, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.0)
    straight, _ = Views(never).train(images, sizes, keys_of(400))
    always, _ = Views(replace(never, flip=1.0)).train(images, sizes, keys_of(400))
    torch.testing.assert_close(straight, images / 255)
    torch.testing.assert_close(always, straight.flip(3))
    half, _ = Views(replace(never, flip=0.5)).train(images, sizes, keys_of(400))
    flipped = (half - straight).abs().amax((1, 2, 3)) > 1e-3
    assert 160 < flipped.sum() < 240


def loop_over_patches(view: Tensor, config: ViewConfig, draws: PatchDraws) -> Tensor:
    """Augment the patches one after the other with torchvision's functions."""
    images = [plain_patches(view[:, b], config, PatchDraws(*(x[b] for x in draws))) for b in range(view.shape[1])]
    return torch.stack(images, 1)


@pytest.mark.parametrize(
    "config",
    [
        ViewConfig((16, 24), 4, permute=True),
        ViewConfig((16, 24), 8),
        ViewConfig(32, 16, permute=True),
        ViewConfig(32, 8, patch_crop=2.0, jitter=(0.9, 0.8, 1.5, 0.5), jitter_prob=1.0),
        ViewConfig(32, 8, patch_crop=None),
        ViewConfig(32, 8, jitter_prob=0, permute=True),
        ViewConfig(32, 8, gray_prob=0),
        ViewConfig(32, 8, noise_prob=0.5, permute=True),
    ],
    ids=str,
)
def test_patches_equal_a_loop_over_torchvision(config: ViewConfig) -> None:
    view = torch.rand(3, 4, *config.shape, generator=seeded())
    draws = draw_patches(config, keys_of(4))
    expected = loop_over_patches(view, config, draws)
    torch.testing.assert_close(augment_patches(view, config, draws), expected, rtol=0, atol=3e-5)


MEGA = [
    ViewConfig(48, 8, MegaPatches(3)),
    ViewConfig(48, 8, MegaPatches(4, shared_cuts=True)),
    ViewConfig(48, 8, MegaPatches(6)),
    ViewConfig(48, 8, MegaPatches(1)),
    ViewConfig((32, 48), 8, MegaPatches(3, unit=2)),
    ViewConfig((32, 48), 8, MegaPatches(4, unit=4, keep_size=True)),
    ViewConfig(48, 8, MegaPatches(5, unit=1, keep_size=True)),
]


def drawn_cuts(config: ViewConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Return the cuts that the views draw."""
    cuts = draw_cuts(config, keys_of(batch))
    assert cuts is not None
    return cuts


@pytest.mark.parametrize("config", MEGA, ids=str)
@pytest.mark.parametrize("large", [1, 10**6], ids=["one by one", "together"])
def test_mega_patches_equal_a_loop_over_torchvision(
    large: int, config: ViewConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop and resize the image, cut it, resize each piece and join them."""
    monkeypatch.setattr(resampling, "LARGE", large)
    images, _ = batch_of(4, 60, 70)
    boxes = torch.tensor([[0, 0, 60, 70], [3, 5, 20, 30], [10, 0, 50, 40], [1, 2, 48, 48]])
    flip, mega = torch.tensor([False, True, False, True]), config.mega
    assert mega is not None
    cuts = drawn_cuts(config, 4)
    views = resample(images, boxes, flip, config.crop, cuts, config.shape)
    edges = [[round(i * side / mega.bands) for i in range(mega.bands + 1)] for side in config.shape]
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = F.resized_crop(images[b] / 255, top, left, height, width, list(config.crop), antialias=True)
        crop = F.hflip(crop) if flip[b] else crop
        expected = torch.zeros(3, *config.shape)
        for i in range(mega.bands):
            for j in range(mega.bands):
                (y, y_end), (x, x_end) = cuts[0][b, i : i + 2].tolist(), cuts[1][b, j : j + 2].tolist()
                (v, v_end), (u, u_end) = edges[0][i : i + 2], edges[1][j : j + 2]
                piece = F.resize(crop[:, y:y_end, x:x_end], [v_end - v, u_end - u], antialias=True)
                expected[:, v:v_end, u:u_end] = piece
        torch.testing.assert_close(views[:, b], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", MEGA, ids=str)
def test_cuts_are_multiples_of_the_unit_and_reach_all_of_them(config: ViewConfig) -> None:
    rows, cols = drawn_cuts(config, 600)
    assert config.mega is not None
    for cuts, side in zip((rows, cols), config.crop, strict=True):
        assert (cuts[:, 0] == 0).all() and (cuts[:, -1] == side).all()
        assert (cuts.diff(dim=1) >= config.cut_unit).all() and not (cuts % config.cut_unit).any()
        inner = cuts[:, 1:-1].unique().tolist()
        every = list(range(config.cut_unit, side, config.cut_unit))
        assert inner == (every if config.mega.bands > 1 else [])
    if 1 < config.mega.bands < config.crop[0] // config.cut_unit:
        assert torch.equal(rows, cols) == config.mega.shared_cuts


def test_all_choices_of_cuts_are_equally_frequent() -> None:
    """C(6, 2) = 15 ways to cut seven units into three bands."""
    rows, _ = drawn_cuts(ViewConfig(56, 8, MegaPatches(3)), 15_000)
    _, counts = rows.unique(dim=0, return_counts=True)
    assert len(counts) == 15
    assert (counts - 1000).abs().max() < 5 * (1000 * 14 / 15) ** 0.5


@pytest.mark.parametrize("config", MEGA, ids=str)
def test_views_with_mega_patches_have_an_unpermuted_layout(config: ViewConfig) -> None:
    images, sizes = batch_of(3)
    for views, layout in (
        Views(config).train(images, sizes, keys_of(3)),
        Views(config).evaluate(images, sizes, torch.arange(3)),
    ):
        assert views.shape[2:] == config.shape
        assert layout.grid == (config.shape[0] // 8, config.shape[1] // 8)
        assert torch.equal(layout.row, PatchLayout.full(3, layout.grid).row)


def test_an_evaluation_view_depends_on_image_and_key_only() -> None:
    config = replace(FULL, size=48, mega=MegaPatches(4, 4, keep_size=True))
    images, sizes = batch_of(4)
    keys = torch.tensor([5, 9, 5, 6])
    images[2] = images[0]
    together, layout = Views(config).evaluate(images, sizes, keys)
    assert torch.equal(together[0], together[2]) and torch.equal(layout.row[0], layout.row[2])
    assert not torch.equal(layout.row[0], layout.row[1])
    for i in range(4):
        alone, its_layout = Views(config).evaluate(images[i : i + 1], sizes[i : i + 1], keys[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
        assert torch.equal(its_layout.row[0], layout.row[i])
    straight, _ = Views(replace(config, permute=False)).evaluate(images, sizes, keys)
    torch.testing.assert_close(unshuffled(together, layout, 8), straight)
    same_image, _ = Views(config).evaluate(images[:1].expand(2, -1, -1, -1), sizes[:2], torch.tensor([1, 2]))
    assert not torch.equal(same_image[0], same_image[1])


def test_permute_patches_equals_the_permutation_of_augmented_views() -> None:
    view = torch.rand(2, 3, 16, 24, generator=seeded())
    slot = torch.rand(2, 6, generator=seeded()).argsort(1)
    plain = replace(FULL, patch_crop=None, jitter_prob=0, gray_prob=0)
    draws = draw_patches(plain, keys_of(2))._replace(slot=slot)
    assert torch.equal(
        permute_patches(view, 8, slot).transpose(0, 1), augment_patches(view.transpose(0, 1), plain, draws)
    )


def test_patches_of_a_photograph_equal_a_loop(samples: Path) -> None:
    photo = read_image(str(sorted((samples / "VOC2007/JPEGImages").glob("*.jpg"))[0]))
    config = ViewConfig(224, 16, permute=True)
    view = resample(photo[None], torch.tensor([[0, 0, *photo.shape[1:]]]), torch.tensor([False]), (224, 224))
    draws = draw_patches(config, keys_of(1))
    expected = loop_over_patches(view, config, draws)
    torch.testing.assert_close(augment_patches(view, config, draws), expected, rtol=0, atol=2e-5)


def test_draws_have_their_probabilities_and_ranges() -> None:
    draws = draw_patches(replace(FULL, jitter=(0.4, 0.3, 1.5, 0.1)), keys_of(1000))
    assert draws.jittered.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert draws.gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert draws.order.unique().numel() == 24 and draws.offset.unique().tolist() == [0, 1]
    low, high = draws.factors.flatten(0, 1).aminmax(dim=0)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.7, 0.0, -0.1]), rtol=0, atol=0.01)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.3, 2.5, 0.1]), rtol=0, atol=0.01)
    assert torch.equal(draws.slot.sort(1).values, torch.arange(6).expand(1000, -1))


def unshuffled(view: Tensor, layout: PatchLayout, patch: int) -> Tensor:
    """Move each patch of ``(B, 3, h, w)`` to its position in the layout."""
    result = torch.empty_like(view)
    for b in range(len(view)):
        for slot in range(layout.row.shape[1]):
            y, x = (slot // layout.grid[1]) * patch, (slot % layout.grid[1]) * patch
            row, col = int(layout.row[b, slot]) * patch, int(layout.col[b, slot]) * patch
            result[b, :, row : row + patch, col : col + patch] = view[b, :, y : y + patch, x : x + patch]
    return result


@pytest.mark.parametrize("config", [PLAIN, replace(FULL, permute=False)], ids=["plain", "augmented"])
def test_the_layout_inverts_the_permutation(config: ViewConfig) -> None:
    images, sizes = batch_of(4)
    straight, whole = Views(config).train(images, sizes, keys_of(4))
    moved, layout = Views(replace(config, permute=True)).train(images, sizes, keys_of(4))
    assert not torch.equal(moved, straight)
    assert torch.equal(unshuffled(moved, layout, 8), straight)
    assert torch.equal(unshuffled(straight, whole, 8), straight)
    assert layout.valid.all() and layout.grid == config.grid


@pytest.mark.parametrize("train", [True, False])
def test_padding_is_ignored(train: bool) -> None:
    images, _ = batch_of(3, 40, 50)
    sizes = torch.tensor([[20, 50], [40, 13], [40, 50]])
    inside = (torch.arange(40)[:, None] < sizes[:, 0, None, None]) & (torch.arange(50) < sizes[:, 1, None, None])
    views = Views(FULL)

    def make(batch: Tensor) -> Tensor:
        return (views.train if train else views.evaluate)(batch, sizes, torch.arange(3))[0]

    assert torch.equal(make(images), make(images * inside[:, None]))


def test_a_training_view_depends_on_the_key_only() -> None:
    images, sizes = batch_of(3)
    before = torch.get_rng_state()
    first, second, other = (Views(FULL).train(images, sizes, keys_of(3, seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_do_not_depend_on_the_batch() -> None:
    images, sizes = torch.randint(0, 256, (6, 3, 40, 48), dtype=torch.uint8), torch.tensor([[40, 48]] * 5 + [[31, 20]])
    config = replace(FULL, size=48, mega=MegaPatches(3, unit=4), noise_prob=0.5)
    keys = keys_of(6)
    whole, layout = Views(config).train(images, sizes, keys)
    parts = [Views(config).train(images[a:b], sizes[a:b], keys[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(torch.cat([pixels for pixels, _ in parts]), whole, rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([part.row for _, part in parts]), layout.row)
    assert torch.equal(torch.cat([part.col for _, part in parts]), layout.col)


def test_views_do_not_depend_on_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = batch_of(5)
    whole, _ = Views(FULL).train(images, sizes, keys_of(5))
    monkeypatch.setattr(module, "CPU_PASS_PIXELS", 2 * 16 * 24)
    split, _ = Views(FULL).train(images, sizes, keys_of(5))
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


def test_normalisation_is_last_and_colours_stay_in_range() -> None:
    images, sizes = batch_of(6)
    colors, _ = Views(FULL).train(images, sizes, keys_of(6))
    assert colors.min() >= -1e-6 and colors.max() <= 1 + 1e-6
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    normal, _ = Views(replace(FULL, mean=mean, std=std)).train(images, sizes, keys_of(6))
    torch.testing.assert_close(normal, F.normalize(colors, list(mean), list(std)))


def test_autocast_does_not_change_views() -> None:
    images, sizes = batch_of(2)
    exact, _ = Views(FULL).train(images, sizes, keys_of(2))
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = Views(FULL).train(images, sizes, keys_of(2))
    assert cast.dtype == torch.float32 and torch.equal(cast, exact)


def test_evaluation_uses_the_largest_centred_crop() -> None:
    images, sizes = batch_of(1, 30, 40)
    square, layout = Views(PLAIN).evaluate(images, sizes, torch.arange(1))
    crop = F.resized_crop(images[0] / 255, 0, 5, 30, 30, [24, 24], antialias=True)
    torch.testing.assert_close(square[0], crop, rtol=0, atol=1e-6)
    assert layout.row.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    tall, _ = Views(replace(PLAIN, size=(48, 16))).evaluate(images, sizes, torch.arange(1))
    crop = F.resized_crop(images[0] / 255, 0, 15, 30, 10, [48, 16], antialias=True)
    torch.testing.assert_close(tall[0], crop, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 30}, "multiple of 8"),
        ({"size": (32, 20)}, "32x20"),
        ({"patch_crop": 0.5}, "patch_crop"),
        ({"mega": MegaPatches(5)}, "choose 1 to 4"),
        ({"mega": MegaPatches(0)}, "choose 1 to 4"),
        ({"mega": MegaPatches(2, unit=5)}, "multiples of 5"),
        ({"size": (32, 16), "mega": MegaPatches(2, shared_cuts=True)}, "square"),
    ],
)
def test_invalid_settings_are_rejected(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViewConfig(**({"size": 32, "patch_size": 8} | arguments))  # type: ignore[arg-type]
