"""Which pairs of atoms does a batch of cells hold, and for how long does a list of them stay complete?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from potential import kernels
from potential.structures import Structures, complete_cells

__all__ = [
    "Neighbours",
    "SkinList",
    "find_neighbours",
    "pair_vectors",
    "shortest_distances",
]


@dataclass(frozen=True)
class Neighbours:
    """Hold all directed pairs, sorted by centre; each pair appears once from either end.

    centre, other: (E,), atoms of the batch. shift: (E, 3), lattice vectors to add to `other`, int32.
    row: (N + 1,), pairs of atom i are row[i] .. row[i + 1].
    """

    centre: torch.Tensor
    other: torch.Tensor
    shift: torch.Tensor
    row: torch.Tensor


def find_neighbours(structures: Structures, cutoff_A: float) -> Neighbours:
    """Find all pairs whose distance is below `cutoff_A`, in time and memory proportional to their number.

    Raises:
        ValueError: periodic axes of a cell that span no volume, or positions that are not finite.
    """
    return Neighbours(*kernels.find_pairs(structures, cutoff_A))


def pair_vectors(structures: Structures, neighbours: Neighbours, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image, in `dtype`, by default that of the positions."""
    dtype = dtype or structures.positions.dtype
    return kernels.pair_vectors(structures, neighbours.row, neighbours.other, neighbours.shift, dtype)


def shortest_distances(structures: Structures, neighbours: Neighbours) -> torch.Tensor:
    """(B,), A, float64: shortest listed distance in each frame, infinite where there is none."""
    return kernels.shortest_distances(structures, neighbours.row, neighbours.other, neighbours.shift)


@dataclass(frozen=True)
class _Built:
    """Pairs, and what they were found for: structures, the inverse of their cells, the skin of each frame (B,), A."""

    structures: Structures
    inverse: torch.Tensor
    slack_A: torch.Tensor
    pairs: Neighbours


class SkinList:
    """Keep the pairs of a batch, found with a margin, for as long as they are surely complete.

    A pair outside the list was farther than cutoff + skin apart. Let the frame have been strained by F since then and
    its atoms have moved by at most u besides: the pair is now at least (cutoff + skin) s - 2 u apart, s being the
    smallest stretch of F. So the list holds while that exceeds the cutoff: in a cell of constant shape, while no atom
    has moved more than half the skin.
    """

    def __init__(self, cutoff_A: float, skin_A: float) -> None:
        self.cutoff_A = cutoff_A
        self.skin_A = skin_A
        self.n_builds = 0
        self._built: _Built | None = None

    def update(self, structures: Structures) -> Neighbours:
        """Pairs that hold for `structures`: those kept if they still do, else new ones for the whole batch."""
        if self._built is None or not self._holds(structures):
            found = find_neighbours(structures, self.cutoff_A + self.skin_A)
            # Callers move atoms in place: the positions the list was built for must be a copy.
            built = replace(structures, positions=structures.positions.double().clone(), cell=structures.cell.clone())
            inverse = torch.linalg.inv(complete_cells(built))
            self._built = _Built(built, inverse, inverse.new_full((built.n_frames,), self.skin_A), found)
            self.n_builds += 1
        return self._built.pairs

    @property
    def neighbours(self) -> Neighbours:
        """Those of the last update."""
        assert self._built is not None
        return self._built.pairs

    def is_of(self, structures: Structures) -> bool:
        """Whether the last update was for this very batch."""
        return self._built is not None and self._built.structures.n_atoms is structures.n_atoms

    def bounds(self, structures: Structures) -> tuple[torch.Tensor, torch.Tensor]:
        """Where cells have carried the atoms since the pairs were found, (N, 3), A, and slacks of frames, (B,), A.

        The pairs hold while no atom is farther from there than half the slack.
        """
        assert self._built is not None
        strain, slack = self._strain(structures)
        positions = self._built.structures.positions
        carried = torch.einsum("ni,nij->nj", positions, strain.index_select(0, structures.frame_of_atom))
        return carried, slack

    def _strain(self, structures: Structures) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 3) and (B,), A: what cells have been multiplied by since the pairs were found, and what is left."""
        assert self._built is not None
        strain = self._built.inverse @ complete_cells(structures)
        return strain, (self.cutoff_A + self.skin_A) * torch.linalg.matrix_norm(strain, -2) - self.cutoff_A

    def _holds(self, structures: Structures) -> bool:
        assert self._built is not None
        built, slack = self._built.structures, self._built.slack_A
        if not (_same(built.n_atoms, structures.n_atoms) and _same(built.pbc, structures.pbc)):
            return False
        moved = kernels.have_moved(structures, built.positions, None, slack)
        # As a rule nothing has changed: learn it with one look at the device.
        if isinstance(moved, bool):
            changed = moved or not torch.equal(built.cell, structures.cell)
        else:
            changed = bool(moved | (built.cell != structures.cell).any())
        if not changed:
            return True
        if torch.equal(built.cell, structures.cell):
            return False
        strain, slack = self._strain(structures)
        return not kernels.have_moved(structures, built.positions, strain, slack)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)
