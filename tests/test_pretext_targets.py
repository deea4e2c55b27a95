"""Layouts and targets: the laws of the relation classes and the closed forms of chance."""

import math
from collections import Counter

import pytest
import torch

from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.targets import (
    RELATIONS,
    position_chance,
    positions,
    relation_chance,
    relation_classes,
    relation_frequencies,
)

GRIDS = [(1, 1), (1, 5), (2, 2), (3, 3), (4, 7), (7, 4), (8, 8)]


def brute_class(grid: tuple[int, int], i: int, j: int) -> str:
    """Name where cell i lies as seen from cell j, in words."""
    (row_i, col_i), (row_j, col_j) = divmod(i, grid[1]), divmod(j, grid[1])
    horizontal = "L" if col_i < col_j else "R" if col_i > col_j else "C"
    vertical = "U" if row_i < row_j else "D" if row_i > row_j else "C"
    return horizontal + vertical


def shuffled(layout: PatchLayout, seed: int = 0) -> tuple[PatchLayout, torch.Tensor]:
    noise = torch.rand(layout.row.shape, generator=torch.Generator().manual_seed(seed))
    order = noise.argsort(1)
    return layout.permuted(order), order


@pytest.mark.parametrize("grid", GRIDS)
def test_classes_are_those_told_in_words(grid: tuple[int, int]) -> None:
    classes = relation_classes(PatchLayout.full(1, grid))[0]
    cells = grid[0] * grid[1]
    assert [[RELATIONS[c] for c in row] for row in classes] == [
        [brute_class(grid, i, j) for j in range(cells)] for i in range(cells)
    ]


def test_first_row_of_the_authors_example() -> None:
    row = relation_classes(PatchLayout.full(1, (3, 3)))[0, 0]
    assert " ".join(RELATIONS[c] for c in row) == "CC LC LC CU LU LU CU LU LU"


@pytest.mark.parametrize("grid", GRIDS)
def test_swapping_a_pair_mirrors_its_class(grid: tuple[int, int]) -> None:
    layout, _ = shuffled(PatchLayout.full(3, grid))
    classes = relation_classes(layout)
    assert torch.equal(classes.mT, 8 - classes)


@pytest.mark.parametrize("grid", GRIDS)
def test_mirroring_the_image_mirrors_left_and_right(grid: tuple[int, int]) -> None:
    layout = PatchLayout.full(2, grid)
    mirrored = PatchLayout(grid, layout.row, grid[1] - 1 - layout.col, layout.valid)
    left_right = torch.tensor([RELATIONS.index(n.translate(str.maketrans("LR", "RL"))) for n in RELATIONS])
    assert torch.equal(relation_classes(mirrored), left_right[relation_classes(layout)])


@pytest.mark.parametrize("grid", GRIDS)
def test_shuffling_patches_and_targets_commutes(grid: tuple[int, int]) -> None:
    layout = PatchLayout.full(4, grid)
    layout.valid[1, 0] = False
    moved, order = shuffled(layout)
    classes, image = relation_classes(layout), torch.arange(4)
    assert torch.equal(relation_classes(moved), classes[image[:, None, None], order[:, :, None], order[:, None, :]])
    assert torch.equal(positions(moved), order)
    assert torch.equal(moved.valid, layout.valid.gather(1, order))


@pytest.mark.parametrize("grid", GRIDS)
def test_chance_is_that_of_counting(grid: tuple[int, int]) -> None:
    cells = grid[0] * grid[1]
    counts = Counter(brute_class(grid, i, j) for i in range(cells) for j in range(cells))
    shares = [counts[name] / cells**2 for name in RELATIONS]
    assert relation_frequencies(grid) == pytest.approx(shares, abs=1e-12)
    chance = relation_chance(grid)
    assert chance.accuracy == pytest.approx(max(shares))
    assert chance.entropy == pytest.approx(-sum(s * math.log(s) for s in shares if s), abs=1e-12)
    assert position_chance(grid) == pytest.approx((1 / cells, math.log(cells)))


def test_published_grids_have_the_published_chance() -> None:
    """Majority and entropy of the grids that the papers use, counted outside this code."""
    table = {5: (0.16, 2.10984), 7: (0.183673, 2.008485), 8: (0.191406, 1.966548), 14: (0.215561, 1.801911)}
    for side, expected in table.items():
        assert relation_chance((side, side)) == pytest.approx(expected, abs=1e-6)
