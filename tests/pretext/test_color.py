"""Batched colour operations, compared with torchvision's on each patch."""

from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.functional as F
from torch import Tensor

from benchmarks.plain import ADJUST
from relvit_d2.pretext.color import BRIGHTNESS, CONTRAST, SATURATION, add_noise_, blend_, grayscale_, hue_


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def color_patches() -> Tensor:
    """Return random colours ``(3, L, P)``, including white, black, gray and pure colours."""
    pixels = torch.rand(3, 16, 40, generator=seeded())
    pixels[:, 0], pixels[:, 1], pixels[1:, 2], pixels[:, 3] = 0, 1, 0, 0.5
    pixels[2, 4] = pixels[1, 4]
    pixels[1, 5] = pixels[0, 5]
    return pixels


def one_by_one(pixels: Tensor, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Apply a torchvision function to each patch of ``(3, L, P)`` with separate arguments."""
    columns = [function(pixels[:, :, n, None], *(a[n].item() for a in arguments)) for n in range(pixels.shape[2])]
    return torch.cat(columns, 2)


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
def test_blends_equal_torchvision(operation: int) -> None:
    pixels, factor = color_patches(), torch.rand(40, generator=seeded(1)) * 2
    expected = one_by_one(pixels, ADJUST[operation], factor)
    torch.testing.assert_close(blend_(pixels, torch.full((40,), operation), factor), expected)


def test_hue_equals_torchvision() -> None:
    pixels, turn = color_patches(), torch.rand(40, generator=seeded(1)) - 0.5
    turn[:5] = torch.tensor([0, 0.5, -0.5, 1 / 3, -1 / 6])
    expected = one_by_one(pixels, F.adjust_hue, turn)
    torch.testing.assert_close(hue_(pixels, turn), expected, rtol=0, atol=1e-5)


def test_grayscale_equals_torchvision_for_chosen_patches() -> None:
    pixels, chosen = color_patches(), torch.arange(40) % 3 == 0
    expected = torch.where(chosen, F.rgb_to_grayscale(pixels, 3), pixels)
    result = grayscale_(pixels.clone(), chosen)
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[:, :, ~chosen], pixels[:, :, ~chosen])


def test_noise_is_normal_and_for_chosen_patches_only() -> None:
    pixels, chosen = torch.full((3, 64, 400), 0.5), torch.arange(400) % 4 == 0
    noisy = add_noise_(pixels.clone(), chosen.nonzero()[:, 0], torch.arange(400) * 7919, 0.1)
    assert torch.equal(noisy[..., ~chosen], pixels[..., ~chosen])
    noise = (noisy[..., chosen] - 0.5).flatten() / 0.1
    assert noise.mean().item() == pytest.approx(0, abs=4 / len(noise) ** 0.5)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert (noise.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.01)
    channels = noise.view(3, -1)
    assert channels.corrcoef().triu(1).abs().max() < 4 / channels.shape[1] ** 0.5
    clamped = add_noise_(pixels.clone(), chosen.nonzero()[:, 0], torch.arange(400), 10.0)
    assert clamped.min() == 0 and clamped.max() == 1
