"""Keys of images and the numbers hashed from them."""

import itertools

import pytest
import torch
from torch import Tensor

from relvit_d2.data.images.batches import ImageStack, TrainingBatches
from relvit_d2.pretext.resampling import Draw
from relvit_d2.tasks import load_config
from relvit_d2.utils.hashing import hashed_uniform
from relvit_d2.utils.randomness import image_keys


def test_keys_differ_between_images_epochs_seeds_and_purposes() -> None:
    index = torch.arange(100_000)
    keys = image_keys(0, "views", 3, index)
    assert keys.unique().numel() == len(index)
    for other in (image_keys(0, "views", 4, index), image_keys(1, "views", 3, index), image_keys(0, "x", 3, index)):
        assert (other == keys).sum() == 0
    assert torch.equal(image_keys(0, "views", torch.tensor([[3], [4]]), index)[0], keys)
    assert torch.equal(image_keys(2**70, "views", 3, index[:5]), image_keys(2**70, "views", 3, index)[:5])


def test_numbers_are_uniform_and_uncorrelated() -> None:
    keys = image_keys(0, "views", torch.arange(8)[:, None], torch.arange(2000))
    numbers = hashed_uniform(keys[..., None, None], torch.tensor([*Draw])[:, None], torch.arange(3)).flatten(2)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.stack([column.histc(64, 0, 1) for column in numbers.flatten(0, 1).T])
    expected = numbers[..., 0].numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum(1)
    assert (chi_square - 63).abs().max() < 6 * (2 * 63) ** 0.5
    here, image_before, epoch_before = numbers[1:, 1:], numbers[1:, :-1], numbers[:-1, 1:]
    table = torch.cat((here, image_before, epoch_before), 2).flatten(0, 1).T.double()
    correlation = table.corrcoef().fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / table.shape[1] ** 0.5


@pytest.mark.parametrize("high", [1, 2, 3, 7, 24, 97, 5000, 2**20 + 1])
def test_a_product_with_an_integer_is_below_the_integer(high: int) -> None:
    assert (torch.tensor(1 - 2.0**-24) * high).long() == high - 1


def keys_and_labels(parts: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Return keys and labels of ``count`` batches from iteration ``start`` on, concatenated."""
    values = ["SOLVER.IMS_PER_BATCH", "6", "SOLVER.GRAD_ACCUM_STEPS", str(parts), "MODEL.DEVICE", "cpu"]
    cfg = load_config("configs/base/ssl.yaml", values)
    stack = ImageStack(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), "zeros")
    batches = list(itertools.islice(TrainingBatches(cfg, stack, start, labels=torch.arange(10)), count * parts))
    return torch.cat([batch["keys"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def test_keys_of_batches_depend_on_seed_epoch_and_image_only() -> None:
    keys, labels = keys_and_labels(1, 0, 5)
    epochs = torch.arange(30) // 10
    assert torch.equal(keys, image_keys(load_config("configs/base/ssl.yaml", []).SEED, "views", epochs, labels))
    for other in (
        keys_and_labels(3, 0, 5),
        [torch.cat(x) for x in zip(keys_and_labels(2, 0, 2), keys_and_labels(1, 2, 3), strict=True)],
    ):
        assert torch.equal(other[0], keys) and torch.equal(other[1], labels)
