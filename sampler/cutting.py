"""How does a box of molecules become something a molecular code can label? The most uncertain molecule of a periodic
frame is cut out with its nearest neighbours, as the published box sampler does with dimers and clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from potential.committee import Committee
from potential.structures import Structures
from shards.frame import Frame

__all__ = ["cut_clusters", "cut_out"]

Floats = NDArray[np.float64]

BOND_FACTOR = 1.25  # two atoms are bonded within so many sums of covalent radii


def cut_clusters(committee: Committee, frames: Sequence[Frame], n_molecules: int) -> list[Frame]:
    """Cut periodic frames; the others, and those of which nothing with all electrons paired is left, go as they are,
    or not at all."""
    cut: list[Frame | None] = []
    for frame in frames:
        if not frame.pbc.all():
            cut.append(frame)
            continue
        structures = Structures.from_frames([frame], committee.elements, torch.float64, committee.device)
        spread = committee.evaluate(structures, forces="members").force_spread()
        cut.append(cut_out(frame, spread.mean(1).double().cpu().numpy(), n_molecules))
    return [frame for frame in cut if frame is not None]


def cut_out(frame: Frame, uncertainty: Floats, n_molecules: int) -> Frame | None:
    """The molecule of the largest mean `uncertainty`, (n_atoms,), with its nearest neighbours, in vacuum.

    None when what is cut out has an odd number of electrons, or is bonded to its own image.
    """
    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    first, second, vectors = neighbor_list("ijD", atoms, natural_cutoffs(atoms, mult=BOND_FACTOR))
    bonds = coo_array((np.ones(len(first)), (first, second)), shape=(frame.n_atoms,) * 2).tocsr()
    n_found, molecule_of_atom = connected_components(bonds, directed=False)
    centre = int(np.argmax([uncertainty[molecule_of_atom == each].mean() for each in range(n_found)]))
    whole = {}
    for molecule in range(n_found):
        members = np.flatnonzero(molecule_of_atom == molecule)
        positions = _unwrapped(members, frame.positions, first, second, vectors, bonds)
        if positions is None:
            return None
        whole[molecule] = (members, positions)
    around = whole.pop(centre)
    placed = [_nearest_image(around[1], positions, frame.cell) for _, positions in whole.values()]
    order = np.argsort([distance for distance, _ in placed])[: n_molecules - 1]
    members = np.concatenate([around[0], *(list(whole.values())[i][0] for i in order)])
    positions = np.concatenate([around[1], *(placed[i][1] for i in order)])
    numbers = frame.numbers[members]
    if numbers.sum() % 2:
        return None
    return Frame(numbers, positions - positions.mean(axis=0), origin=frame.origin)


def _unwrapped(
    members: NDArray[np.int64],
    positions: Floats,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    vectors: Floats,
    bonds: coo_array,
) -> Floats | None:
    """Positions with every bond at its true length, walking along bonds; None for a chain without end."""
    order, before = breadth_first_order(bonds, members[0], directed=False)
    bond = {(int(i), int(j)): vector for i, j, vector in zip(first, second, vectors, strict=True)}
    placed = {int(members[0]): positions[members[0]]}
    for atom in order[1:]:
        placed[int(atom)] = placed[int(before[atom])] + bond[int(before[atom]), int(atom)]
    inside = np.isin(first, members)
    for i, j, vector in zip(first[inside], second[inside], vectors[inside], strict=True):
        if np.abs(placed[int(j)] - placed[int(i)] - vector).max() > 1e-6:
            return None
    return np.array([placed[int(atom)] for atom in members])


def _nearest_image(around: Floats, positions: Floats, cell: Floats) -> tuple[float, Floats]:
    """Shortest distance to `around` over the images of a molecule, and the positions of that image."""
    centre = around.mean(axis=0) - positions.mean(axis=0)
    middle = np.round(centre @ np.linalg.inv(cell))
    shifts = (middle + np.array(np.meshgrid(*[(-1, 0, 1)] * 3)).reshape(3, -1).T) @ cell
    images = positions + shifts[:, None]
    distances = np.linalg.norm(images[:, :, None] - around, axis=3).min(axis=(1, 2))
    nearest = int(np.argmin(distances))
    return float(distances[nearest]), images[nearest]
