"""Neighbour lists, C++ and PyTorch, against searches by two other codes, and skin lists against fresh ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from vesin import NeighborList

from potential import kernels
from potential.neighbours import SkinList, find_neighbours, pair_vectors
from potential.structures import Structures, UnknownElementError
from shards.frame import Frame


@pytest.fixture(params=["reference", "native"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "native" and not kernels.native_available():
        pytest.skip("the C++ kernels are not built")
    monkeypatch.setattr("potential.kernels.FORCED", request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_frames(rng: np.random.Generator, n_frames: int) -> list[Frame]:
    """Triclinic cells from far below to well above the cutoff, any periodic axes, atoms inside and far outside."""
    frames = []
    for _ in range(n_frames):
        n_atoms = int(rng.integers(1, 30))
        pbc = rng.random(3) < 0.5
        cell = rng.normal(size=(3, 3)) + np.eye(3) * rng.uniform(3, 12)
        positions = rng.uniform(-15, 15, (n_atoms, 3))
        if rng.random() < 0.3:
            cell[~pbc] = 0
        frames.append(Frame(np.full(n_atoms, 13), positions, cell, pbc))
    return frames


def in_order(rows: np.ndarray) -> np.ndarray:
    """Rows of (centre, other, shift) in an order of their own, none twice."""
    rows = rows[np.lexsort(rows.T)]
    assert (np.diff(rows, axis=0) != 0).any(axis=1).all()
    return rows


def pairs_of(structures: Structures, neighbours, frame: int) -> np.ndarray:
    mine = structures.frame_of_atom[neighbours.centre] == frame
    first = int(structures.n_atoms[:frame].sum())
    ends = [neighbours.centre[mine, None] - first, neighbours.other[mine, None] - first]
    return in_order(torch.cat([*ends, neighbours.shift[mine]], 1).numpy())


def pairs_of_ase(frame: Frame, cutoff: float) -> np.ndarray:
    atoms = Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc)
    i, j, shift = neighbor_list("ijS", atoms, cutoff)
    return in_order(np.column_stack([i, j, shift]))


@pytest.mark.parametrize("cutoff", [3.0, 6.5])
def test_batch_of_random_cells_equals_ase(cutoff):
    frames = random_frames(np.random.default_rng(0), 30)
    structures = Structures.from_frames(frames, ["Al"])
    neighbours = find_neighbours(structures, cutoff)
    assert (neighbours.centre.diff() >= 0).all()
    assert torch.equal(neighbours.row.diff(), torch.bincount(neighbours.centre, minlength=len(structures.positions)))
    assert (pair_vectors(structures, neighbours).norm(dim=1) < cutoff).all()
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(pairs_of(structures, neighbours, number), pairs_of_ase(frame, cutoff))


def test_large_cell_in_several_blocks_equals_ase(monkeypatch):
    monkeypatch.setattr("potential.kernels.bins.PAIRS_PER_BLOCK", 2_000)
    atoms = bulk("Al", cubic=True) * (4, 3, 2)
    atoms.rattle(0.3, seed=1)
    frame = Frame(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    structures = Structures.from_frames([frame], ["Al"])
    np.testing.assert_array_equal(pairs_of(structures, find_neighbours(structures, 5.0), 0), pairs_of_ase(frame, 5.0))


@pytest.mark.parametrize("n", [1, 4, 9])
def test_skewed_and_plain_cells_of_one_to_thousands_of_atoms_equal_vesin(n):
    cubic = bulk("Al", cubic=True) * (n, n, n)
    cubic.rattle(0.2, seed=n)
    skewed = cubic.copy()
    # The same crystal described by vectors that are far from orthogonal, atoms left where they are.
    skewed.set_cell(np.array([[1, 0, 0], [2, 1, 0], [-3, 2, 1]]) @ cubic.cell.array)
    frames = [Frame(a.numbers, a.positions, a.cell.array, a.pbc) for a in (cubic, skewed)]
    structures = Structures.from_frames(frames, ["Al"])
    neighbours = find_neighbours(structures, 7.0)
    for number, frame in enumerate(frames):
        i, j, shift = NeighborList(cutoff=7.0, full_list=True).compute(
            points=frame.positions, box=frame.cell, periodic=True, quantities="ijS"
        )
        expected = in_order(np.column_stack([i, j, shift]).astype(int))
        np.testing.assert_array_equal(pairs_of(structures, neighbours, number), expected)


def test_every_pair_is_there_from_both_ends():
    structures = Structures.from_frames(random_frames(np.random.default_rng(5), 20), ["Al"])
    neighbours = find_neighbours(structures, 5.0)
    pairs = torch.cat([neighbours.centre[:, None], neighbours.other[:, None], neighbours.shift], 1).tolist()
    assert {(i, j, *s) for i, j, *s in pairs} == {(j, i, *(-x for x in s)) for i, j, *s in pairs}


def test_list_of_a_frame_depends_on_nothing_else(threads):
    frames = random_frames(np.random.default_rng(6), 12)
    together = Structures.from_frames(frames, ["Al"])
    threads(3)
    joined = find_neighbours(together, 4.5)
    threads(1)
    first = 0
    for frame in frames:
        alone = find_neighbours(Structures.from_frames([frame], ["Al"]), 4.5)
        pairs = slice(int(joined.row[first]), int(joined.row[first + frame.n_atoms]))
        assert torch.equal(joined.other[pairs] - first, alone.other)
        assert torch.equal(joined.shift[pairs], alone.shift)
        first += frame.n_atoms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pair_vectors_are_differences_of_images(dtype, threads):
    threads(2)
    structures = Structures.from_frames(random_frames(np.random.default_rng(7), 9), ["Al"], dtype)
    neighbours = find_neighbours(structures, 5.0)
    positions, cell = structures.positions.double().numpy(), structures.cell.double().numpy()
    turns = np.einsum("ek,ekx->ex", neighbours.shift.numpy(), cell[structures.frame_of_atom[neighbours.centre].numpy()])
    expected = positions[neighbours.other] + turns - positions[neighbours.centre]
    vectors = pair_vectors(structures, neighbours)
    assert vectors.dtype == dtype
    # Positions and shifts are up to 30 A, so float32 rounds to some 1e-6 A.
    assert np.abs(vectors.double().numpy() - expected).max() < (1e-12 if dtype == torch.float64 else 1e-5)


def test_cells_without_volume_and_positions_that_are_not_finite_are_refused_by_number():
    sound = Frame([13], np.zeros((1, 3)), np.eye(3) * 4.0, np.ones(3, dtype=bool))
    structures = Structures.from_frames([sound, sound], ["Al"])
    flat = replace(structures, cell=structures.cell.clone())
    flat.cell[1, 2] = flat.cell[1, 0] + flat.cell[1, 1]
    with pytest.raises(ValueError, match="frame 1 of the batch: its periodic axes span no volume"):
        find_neighbours(flat, 3.0)
    for value in (float("nan"), float("inf"), 1e30):
        lost = replace(structures, positions=structures.positions.clone())
        lost.positions[1, 2] = value
        with pytest.raises(ValueError, match="frame 1 of the batch: positions or cell are not finite"):
            find_neighbours(lost, 3.0)
    lost = replace(structures, cell=structures.cell * torch.tensor([1.0, float("nan")])[:, None, None])
    with pytest.raises(ValueError, match="frame 1 of the batch: positions or cell are not finite"):
        find_neighbours(lost, 3.0)


def test_atoms_on_a_perfect_lattice_and_on_cell_borders_are_all_found():
    frame = Frame([13], [[0.0, 0.0, 0.0]], np.eye(3) * 2.0, [True] * 3)
    structures = Structures.from_frames([frame], ["Al"])
    neighbours = find_neighbours(structures, 4.0 + 1e-9)
    distances = pair_vectors(structures, neighbours).norm(dim=1)
    # Simple cubic shells: 6 at a, 12 at sqrt 2, 8 at sqrt 3, 6 at 2 a.
    assert torch.unique(distances.round(decimals=6), return_counts=True)[1].tolist() == [6, 12, 8, 6]


def test_atoms_on_the_same_spot_are_neighbours_and_not_themselves():
    frame = Frame([13, 13], np.zeros((2, 3)))
    neighbours = find_neighbours(Structures.from_frames([frame], ["Al"]), 3.0)
    assert (neighbours.centre.tolist(), neighbours.other.tolist()) == ([0, 1], [1, 0])


def test_lone_atom_has_no_neighbours():
    neighbours = find_neighbours(Structures.from_frames([Frame([13], np.zeros((1, 3)))], ["Al"]), 3.0)
    assert neighbours.row.tolist() == [0, 0]


def test_unknown_element_is_refused_by_name():
    with pytest.raises(UnknownElementError, match="no network for Au: this committee knows Al, Cu"):
        Structures.from_frames([Frame([13, 79], [[0, 0, 0], [0, 0, 2.5]])], ["Al", "Cu"])


def short_pairs(structures: Structures, neighbours, cutoff: float) -> np.ndarray:
    """Of all frames, atoms counted through."""
    near = pair_vectors(structures, neighbours).norm(dim=1) < cutoff
    return in_order(torch.column_stack([neighbours.centre, neighbours.other, neighbours.shift])[near].numpy())


def test_skin_list_stays_complete_while_atoms_and_cells_move_and_is_kept_most_of_the_time():
    rng = np.random.default_rng(3)
    structures = Structures.from_frames(random_frames(rng, 6), ["Al"])
    skin = SkinList(4.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        kept, fresh = skin.update(structures), find_neighbours(structures, 4.0)
        np.testing.assert_array_equal(short_pairs(structures, kept, 4.0), short_pairs(structures, fresh, 4.0))
        scale = 1 + 0.004 * np.sin(step)
        move = 0.05 * torch.randn(structures.positions.shape, generator=generator, dtype=torch.float64)
        structures = replace(structures, positions=structures.positions * scale + move, cell=structures.cell * scale)
    assert 3 <= skin.n_builds <= 30


def test_skin_list_holds_up_to_half_the_skin_and_no_further():
    structures = Structures.from_frames([Frame([13, 13], [[0, 0, 0], [0, 0, 4.0]])], ["Al"])
    skin = SkinList(3.0, 1.0)
    skin.update(structures)
    structures.positions[0, 0] += 0.499
    skin.update(structures)
    assert skin.n_builds == 1
    structures.positions[0, 0] += 0.002
    skin.update(structures)
    assert skin.n_builds == 2


def test_skin_list_is_rebuilt_for_another_batch():
    skin = SkinList(3.0, 1.0)
    skin.update(Structures.from_frames([Frame([13], [[0, 0, 0]])], ["Al"]))
    pair = Structures.from_frames([Frame([13, 13], [[0, 0, 0], [0, 0, 2.0]])], ["Al"])
    assert len(skin.update(pair).centre) == 2
