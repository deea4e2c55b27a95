"""Layouts and targets: symmetries of the targets and closed forms of the class frequencies."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from relvit_d2.pretext.layout import PatchLayout
from relvit_d2.pretext.targets import (
    RELATIONS,
    PairFunction,
    all_pairs,
    pair_angle,
    pair_bearing,
    pair_deviation,
    pair_distance,
    pair_relation,
    positions,
    relation_frequencies,
)

GRIDS = [(1, 1), (1, 5), (2, 2), (3, 3), (4, 7), (7, 4), (8, 8)]


def brute_class(grid: tuple[int, int], i: int, j: int) -> str:
    """Return the name of the position of cell i relative to cell j."""
    (row_i, col_i), (row_j, col_j) = divmod(i, grid[1]), divmod(j, grid[1])
    horizontal = "L" if col_i < col_j else "R" if col_i > col_j else "C"
    vertical = "U" if row_i < row_j else "D" if row_i > row_j else "C"
    return horizontal + vertical


def shuffled(layout: PatchLayout, seed: int = 0) -> tuple[PatchLayout, torch.Tensor]:
    noise = torch.rand(layout.row.shape, generator=torch.Generator().manual_seed(seed))
    order = noise.argsort(1)
    return layout.selected(order), order


@pytest.mark.parametrize("grid", GRIDS)
def test_classes_have_the_names_of_their_directions(grid: tuple[int, int]) -> None:
    classes = all_pairs(pair_relation, PatchLayout.full(1, grid))[0]
    cells = grid[0] * grid[1]
    assert [[RELATIONS[c] for c in row] for row in classes] == [
        [brute_class(grid, i, j) for j in range(cells)] for i in range(cells)
    ]


def test_first_row_of_the_authors_example() -> None:
    row = all_pairs(pair_relation, PatchLayout.full(1, (3, 3)))[0, 0]
    assert " ".join(RELATIONS[c] for c in row) == "CC LC LC CU LU LU CU LU LU"


@pytest.mark.parametrize("grid", GRIDS)
def test_swapping_a_pair_mirrors_its_class(grid: tuple[int, int]) -> None:
    layout, _ = shuffled(PatchLayout.full(3, grid))
    classes = all_pairs(pair_relation, layout)
    assert torch.equal(classes.mT, 8 - classes)


@pytest.mark.parametrize("grid", GRIDS)
def test_mirroring_the_image_mirrors_left_and_right(grid: tuple[int, int]) -> None:
    layout = PatchLayout.full(2, grid)
    mirrored = replace(layout, col=grid[1] - 1 - layout.col)
    left_right = torch.tensor([RELATIONS.index(n.translate(str.maketrans("LR", "RL"))) for n in RELATIONS])
    assert torch.equal(all_pairs(pair_relation, mirrored), left_right[all_pairs(pair_relation, layout)])


@pytest.mark.parametrize("grid", GRIDS)
def test_shuffling_patches_and_targets_commutes(grid: tuple[int, int]) -> None:
    layout = PatchLayout.full(4, grid)
    layout.valid[1, 0] = False
    moved, order = shuffled(layout)
    classes, image = all_pairs(pair_relation, layout), torch.arange(4)
    assert torch.equal(
        all_pairs(pair_relation, moved), classes[image[:, None, None], order[:, :, None], order[:, None, :]]
    )
    assert torch.equal(positions(moved), order)
    assert torch.equal(moved.valid, layout.valid.gather(1, order))


@pytest.mark.parametrize("grid", GRIDS)
def test_frequencies_are_those_of_counting(grid: tuple[int, int]) -> None:
    cells = grid[0] * grid[1]
    counts = Counter(brute_class(grid, i, j) for i in range(cells) for j in range(cells))
    expected = [counts[name] / cells**2 for name in RELATIONS]
    assert relation_frequencies(grid) == pytest.approx(expected, abs=1e-12)


def test_majority_and_entropy_of_the_papers_grids() -> None:
    """Values computed independently of this code."""
    table = {5: (0.16, 2.10984), 7: (0.183673, 2.008485), 8: (0.191406, 1.966548), 14: (0.215561, 1.801911)}
    for side, expected in table.items():
        frequencies = relation_frequencies((side, side))
        entropy = -sum(p * math.log(p) for p in frequencies)
        assert (max(frequencies), entropy) == pytest.approx(expected, abs=1e-6)


def authors_matrices(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distance and angle of a square grid by the authors' formulas, in float64 and without their epsilon."""
    cell = np.stack(np.divmod(np.arange(n * n), n), 1).astype(float)
    distance = np.linalg.norm(cell[:, None] - cell[None], axis=2)
    outside = cell + n / 2
    length = np.linalg.norm(outside, axis=1)
    cosine = outside @ outside.T / (length[:, None] * length)
    angle = np.arccos(np.clip(cosine, -1, 1))
    np.fill_diagonal(angle, 0)
    return tuple(2 * matrix / matrix.max() - 1 for matrix in (distance, angle))


@pytest.mark.parametrize("n", [2, 6, 7, 14])
def test_distance_and_angle_are_the_authors(n: int) -> None:
    layout = PatchLayout.full(1, (n, n))
    distance, angle = authors_matrices(n)
    assert all_pairs(pair_distance, layout)[0].numpy() == pytest.approx(distance, abs=1e-6)
    assert all_pairs(pair_angle, layout)[0].numpy() == pytest.approx(angle, abs=1e-6)


def test_distance_has_the_published_moments() -> None:
    """Mean -0.149 and variance 0.165 over the pairs of a 7 x 7 grid, computed independently of this code."""
    distance = all_pairs(pair_distance, PatchLayout.full(1, (7, 7)))
    assert distance.mean().item() == pytest.approx(-0.149, abs=5e-4)
    assert distance.var(correction=0).item() == pytest.approx(0.165, abs=5e-4)
    assert pair_deviation(pair_distance, (7, 7)) == pytest.approx(distance.std(correction=0).item(), abs=1e-6)


def same_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare with a tolerance: vector and scalar instructions round the arc tangent differently."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 2), (4, 7), (7, 4), (1, 5)])
@pytest.mark.parametrize("function", [pair_distance, pair_angle, pair_bearing])
def test_pair_targets_span_their_range_and_commute_with_permutations(
    function: PairFunction, grid: tuple[int, int]
) -> None:
    layout = PatchLayout.full(2, grid)
    values = all_pairs(function, layout)
    assert values.min() >= -1 and values.max().item() == pytest.approx(1, abs=1e-6)
    moved, order = shuffled(layout)
    image = torch.arange(2)
    again = values[image[:, None, None], order[:, :, None], order[:, None, :]]
    same_values(all_pairs(function, moved), again)


@pytest.mark.parametrize("grid", [(2, 2), (4, 7), (7, 4)])
def test_symmetries_of_distance_angle_and_bearing(grid: tuple[int, int]) -> None:
    layout = PatchLayout.full(1, grid)
    distance, angle, bearing = (all_pairs(f, layout)[0] for f in (pair_distance, pair_angle, pair_bearing))
    same_values(distance, distance.mT)
    same_values(angle, angle.mT)
    assert (distance.diagonal() == -1).all() and (angle.diagonal() == -1).all()
    # The direction of the swapped pair differs by half a turn, 1.
    turned = (bearing - bearing.mT).abs()[~torch.eye(len(bearing), dtype=torch.bool)]
    torch.testing.assert_close(turned, torch.ones_like(turned))
    mirrored = replace(layout, col=grid[1] - 1 - layout.col)
    back = all_pairs(pair_bearing, mirrored)[0]
    mirror = 1 - bearing - 2 * (bearing < 0)  # of an angle at the vertical, back in -1..1
    same = ~torch.eye(len(back), dtype=torch.bool)
    torch.testing.assert_close(torch.cos(back * torch.pi)[same], torch.cos(mirror * torch.pi)[same], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.sin(back * torch.pi)[same], torch.sin(mirror * torch.pi)[same], rtol=0, atol=1e-6)


def test_bearings_from_the_centre() -> None:
    bearing = all_pairs(pair_bearing, PatchLayout.full(1, (3, 3)))[0, :, 4]  # relative to the centre
    assert bearing.tolist() == pytest.approx([-0.75, -0.5, -0.25, 1, 0, 0, 0.75, 0.5, 0.25])


def test_a_padded_image_has_the_targets_of_the_unpadded_image() -> None:
    grid, inner = (5, 6), (3, 4)
    padded, alone = PatchLayout.padded(grid, torch.tensor([inner])), PatchLayout.full(1, inner)
    kept = padded.valid[0]
    assert padded.extent.tolist() == [list(inner)]
    for function in (pair_relation, pair_distance, pair_angle, pair_bearing):
        same_values(all_pairs(function, padded)[0][kept][:, kept], all_pairs(function, alone)[0])
    assert torch.equal(positions(padded, inner)[0][kept], positions(alone)[0])


@pytest.mark.parametrize("grid", [(7, 7), (14, 21), (3, 5), (64, 40), (1, 1)])
def test_any_grid_maps_onto_a_fixed_grid(grid: tuple[int, int]) -> None:
    """A token belongs to the cell of its upper left corner; with enough tokens every cell has one."""
    cells = positions(PatchLayout.full(1, grid), (7, 7))[0].view(grid)
    expected = [
        [int(r * 7 / grid[0] + 1e-9) * 7 + int(c * 7 / grid[1] + 1e-9) for c in range(grid[1])] for r in range(grid[0])
    ]
    assert cells.tolist() == expected
    if min(grid) >= 7:
        assert cells.unique().numel() == 49
