"""Random crops, compared with torchvision's."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from relvit_d2.pretext.resampling import random_boxes
from relvit_d2.utils.randomness import image_keys


def keys_of(count: int) -> Tensor:
    return image_keys(0, "views", torch.arange(count))


def test_boxes_are_inside_the_image_and_the_ranges() -> None:
    sizes = torch.tensor([[300, 400], [400, 300], [64, 64]]).repeat_interleave(300, 0)
    boxes = random_boxes(sizes, (0.2, 0.5), (0.5, 2.0), keys_of(len(sizes)))
    corner, crop = boxes[:, :2], boxes[:, 2:]
    assert (corner >= 0).all() and (corner + crop <= sizes).all()
    area, ratio = crop.prod(1) / sizes.prod(1), crop[:, 1] / crop[:, 0]
    assert 0.19 < area.min() < 0.22 and 0.46 < area.max() < 0.51
    assert 0.48 < ratio.min() < 0.55 and 1.8 < ratio.max() < 2.06
    # All positions are drawn, including the last row and column.
    small = random_boxes(torch.tensor([[4, 4]]).repeat(200, 1), (0.5, 0.6), (1, 1.01), keys_of(200))
    assert small[:, 2:].unique().tolist() == [3] and small[:, :2].unique().tolist() == [0, 1]


def test_boxes_have_torchvisions_distribution() -> None:
    sizes = torch.tensor([[90, 160]]).repeat(3000, 1)
    ours = random_boxes(sizes, (0.08, 1.0), (3 / 4, 4 / 3), keys_of(len(sizes))).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, 90, 160)
        params = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in sizes]
    theirs = torch.tensor(params).double()
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.06, atol=0)


@pytest.mark.parametrize("size", [(20, 400), (400, 20), (50, 50), (51, 60)])
def test_boxes_that_never_fit_equal_torchvisions_fallback(size: tuple[int, int]) -> None:
    """A crop of 1.5 times the area never fits."""
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), [1.5, 1.5], [3 / 4, 4 / 3])
    boxes = random_boxes(torch.tensor([size]), (1.5, 1.5), (3 / 4, 4 / 3), keys_of(1))
    assert boxes.tolist() == [list(expected)]
