"""Which atoms see each other, across which periodic images, in a ragged batch of cells of any shape and size?

Every frame is cut into bins along its own lattice vectors and every atom looks through the bins that a sphere of the
cutoff can touch. An axis that is shorter than the cutoff is simply walked round more than once, so small cells with
many images and large cells take the same path, and all frames of a batch take it together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from potential.structures import Structures

__all__ = ["Neighbours", "SkinList", "find_neighbours", "pair_vectors", "pairs_of_frames"]

BINS_PER_CUTOFF = 2  # finer bins hug the sphere closer but there are more of them to visit
PAIRS_PER_BLOCK = 200_000  # candidate pairs held at a time: bounds memory, and larger blocks leave the cache
TOLERANCE_A = 1e-6  # widens the search, not the list: positions on a bin's border may round to either side


@dataclass(frozen=True)
class Neighbours:
    """Hold all directed pairs, sorted by centre; each pair appears once from either end.

    centre, other: (E,), atoms of the batch. shift: (E, 3), lattice vectors to add to `other`, int64.
    row: (N + 1,), pairs of atom i are row[i] .. row[i + 1].
    """

    centre: torch.Tensor
    other: torch.Tensor
    shift: torch.Tensor
    row: torch.Tensor


def pair_vectors(structures: Structures, neighbours: Neighbours) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image, in the dtype of the positions."""
    positions = structures.positions
    # index_select is several times faster than indexing with a tensor on the CPU.
    vectors = positions.index_select(0, neighbours.other) - positions.index_select(0, neighbours.centre)
    shift = neighbours.shift.to(vectors.dtype)
    # One matrix product per frame: gathering a cell for every pair costs eight times as much.
    ends = pairs_of_frames(structures, neighbours)
    for frame, (low, high) in enumerate(itertools.pairwise(ends)):
        vectors[low:high].addmm_(shift[low:high], structures.cell[frame])
    return vectors


def pairs_of_frames(structures: Structures, neighbours: Neighbours) -> list[int]:
    """B + 1 numbers: the pairs of frame b are those from ends[b] to ends[b + 1]."""
    first_atom = torch.nn.functional.pad(structures.n_atoms.cumsum(0), (1, 0))
    ends: list[int] = neighbours.row[first_atom].tolist()
    return ends


def find_neighbours(structures: Structures, cutoff_A: float) -> Neighbours:
    """Find all pairs whose distance is below `cutoff_A`, in time and memory proportional to their number."""
    bins = _Bins(structures, cutoff_A)
    centre, other, shift = (torch.cat(parts) for parts in zip(*bins.pairs(), strict=True))
    counts = torch.bincount(centre, minlength=len(structures.positions))
    row = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # Each atom's pairs were found together, but the atoms in the order of their bins: move each run to its place.
    found = counts.index_select(0, bins.order).cumsum(0)
    lead = torch.empty_like(found).index_copy_(0, bins.order, found) - row[1:]
    place = torch.arange(len(centre), device=centre.device) - lead.index_select(0, centre)
    centre, other = (torch.empty_like(pairs).index_copy_(0, place, pairs) for pairs in (centre, other))
    return Neighbours(centre, other, torch.empty_like(shift).index_copy_(0, place, shift), row)


def complete_cells(structures: Structures) -> torch.Tensor:
    """(B, 3, 3), A, float64: the cells, with orthonormal vectors along axes that are not periodic."""
    cells = structures.cell.double()
    free = ~structures.pbc
    if not free.any():
        return cells
    # With lattice rows L (zero where free), the complement of their span is spanned by the last singular vectors.
    lattice = cells * structures.pbc[:, :, None]
    _, _, basis = torch.linalg.svd(lattice)
    n_periodic = structures.pbc.sum(1, keepdim=True)
    # k-th free axis takes basis vector n_periodic + k, the first ones spanning the lattice.
    rank = torch.where(free, n_periodic + free.long().cumsum(1) - 1, 0)
    unit = torch.gather(basis, 1, rank[:, :, None].expand(-1, -1, 3))
    return torch.where(free[:, :, None], unit, cells)


class _Bins:
    """Atoms of every frame sorted into bins along the frame's (completed) lattice vectors."""

    def __init__(self, structures: Structures, cutoff_A: float) -> None:
        self.cutoff_A = cutoff_A
        self.pbc = structures.pbc
        frame = structures.frame_of_atom
        positions = structures.positions.double()
        self.cells = complete_cells(structures)
        inverse = torch.linalg.inv(self.cells)
        fractional = torch.einsum("ni,nij->nj", positions, inverse[frame])
        origin, extent = _span(structures, fractional)
        fractional = (fractional - origin[frame]) / extent[frame]
        # Distance between opposite faces of the box that the bins divide.
        height = extent / torch.linalg.norm(inverse, dim=1)
        self._divide(height, structures.n_atoms)
        self.wrap = fractional.floor().long() * structures.pbc[frame]
        inside = ((fractional - self.wrap) * self.n_bins[frame]).floor().long()
        inside = torch.minimum(inside.clamp(min=0), self.n_bins[frame] - 1)
        self._fill(self._key(frame, inside))
        wrapped = positions - torch.einsum("ni,nij->nj", self.wrap.double(), self.cells[frame])
        self.sorted_positions = wrapped.index_select(0, self.order).T.contiguous()

    def _divide(self, height: torch.Tensor, n_atoms: torch.Tensor) -> None:
        """Choose the number of bins along each axis, and how many of them a sphere reaches on either side."""
        most = 4 * n_atoms.double().pow(1 / 3).ceil()[:, None]  # empty bins would cost more than they save
        self.n_bins = torch.minimum((height * BINS_PER_CUTOFF / self.cutoff_A).floor(), most).clamp(min=1).long()
        reach = ((self.cutoff_A + TOLERANCE_A) * self.n_bins / height).ceil().long()
        # A free axis has an end: no atom lies further than all its bins away.
        self.reach = torch.where(self.pbc, reach, torch.minimum(reach, self.n_bins - 1))
        self.first_bin = torch.nn.functional.pad(self.n_bins.prod(1).cumsum(0), (1, 0))

    def _fill(self, key: torch.Tensor) -> None:
        self.order = key.argsort(stable=True)
        self.count = torch.bincount(key, minlength=int(self.first_bin[-1]))
        self.start = self.count.cumsum(0) - self.count

    def _key(self, frame: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        n = self.n_bins[frame]
        return self.first_bin[frame] + (place[:, 0] * n[:, 1] + place[:, 1]) * n[:, 2] + place[:, 2]

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Centre, other and shift of all pairs, block after block; all pairs of an atom together, in bin order."""
        occupied = self.count.nonzero().squeeze(1)
        frame = torch.searchsorted(self.first_bin, occupied, right=True) - 1
        n_offsets = (2 * self.reach + 1).prod(1)
        mean_per_bin = max(1.0, len(self.order) / len(self.count))
        cost = (self.count[occupied] * n_offsets[frame] * mean_per_bin).cumsum(0)
        n_blocks = math.ceil(float(cost[-1]) / PAIRS_PER_BLOCK)
        ends = torch.arange(1, n_blocks, device=cost.device, dtype=cost.dtype) * (cost[-1] / n_blocks)
        edges = [0, *torch.searchsorted(cost, ends).tolist(), len(occupied)]
        for low, high in itertools.pairwise(edges):
            if high > low:
                yield self._pairs_of(occupied[low:high], frame[low:high])

    def _pairs_of(self, bins: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        owner, target, turn = self._links(bins, frame)
        move = torch.einsum("li,lij->jl", turn.double(), self.cells[frame[owner]])
        n_links = torch.bincount(owner, minlength=len(bins))
        n_inside = self.count[bins]
        # Atoms here are counted in bin order; each visits all links of its bin, and there all atoms of the other bin.
        low = int(self.start[bins[0]])
        bin_of_atom = torch.repeat_interleave(n_inside)
        visitor, rank = _ragged(n_links.index_select(0, bin_of_atom))
        first_link = (n_links.cumsum(0) - n_links).index_select(0, bin_of_atom)
        link = first_link.index_select(0, visitor) + rank
        base = [
            along.index_select(0, link).sub_(position[low:].index_select(0, visitor))
            for along, position in zip(move, self.sorted_positions, strict=True)
        ]
        visit, rank = _ragged(self.count[target].index_select(0, link))
        other = self.start[target].index_select(0, link).index_select(0, visit) + rank
        squared = torch.zeros_like(other, dtype=torch.float64)
        # One axis at a time: index_select of single numbers is 4 times faster than of rows or of columns of three.
        for position, from_centre in zip(self.sorted_positions, base, strict=True):
            apart = position.index_select(0, other).add_(from_centre.index_select(0, visit))
            squared.addcmul_(apart, apart)
        kept = (squared < self.cutoff_A**2).nonzero().squeeze(1)
        visit = visit.index_select(0, kept)
        centre = self.order.index_select(0, visitor.index_select(0, visit) + low)
        other = self.order.index_select(0, other.index_select(0, kept))
        shift = turn.index_select(0, link.index_select(0, visit))
        shift += self.wrap.index_select(0, centre) - self.wrap.index_select(0, other)
        # An atom finds itself; it may also find its images, and rarely another atom on the same spot.
        itself = ((centre == other) & (shift == 0).all(1)).nonzero().squeeze(1)
        real = torch.ones_like(centre, dtype=torch.bool).index_fill_(0, itself, False)
        return centre[real], other[real], shift[real]

    def _links(self, bins: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Occupied bins within reach of each bin: rank of the bin, the other bin, turns round the cell to get there."""
        n_bins, reach = self.n_bins[frame], self.reach[frame]
        key = bins - self.first_bin[frame]
        plane = torch.div(key, n_bins[:, 2], rounding_mode="floor")
        column = torch.div(plane, n_bins[:, 1], rounding_mode="floor")
        lowest = torch.stack([column, plane % n_bins[:, 1], key % n_bins[:, 2]], 1) - reach
        owner, rank = _ragged((2 * reach + 1).prod(1))
        n_bins, width, frame = n_bins[owner], (2 * reach + 1)[owner], frame[owner]
        plane = torch.div(rank, width[:, 2], rounding_mode="floor")
        column = torch.div(plane, width[:, 1], rounding_mode="floor")
        place = torch.stack([column, plane % width[:, 1], rank % width[:, 2]], 1).add_(lowest[owner])
        turn = torch.div(place, n_bins, rounding_mode="floor")
        target = self._key(frame, place - turn * n_bins)
        inside = ((turn == 0) | self.pbc[frame]).all(1)
        kept = (inside & (self.count[torch.where(inside, target, 0)] > 0)).nonzero().squeeze(1)
        return owner[kept], target[kept], turn[kept]


def _ragged(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of these lengths, joined: which row each entry is in, and which of the row it is."""
    owner = torch.repeat_interleave(counts)
    start = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - start.index_select(0, owner)


def _span(structures: Structures, fractional: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower corner and size of the box that holds each frame, (B, 3), fractional: the cell where it is periodic."""
    index = structures.frame_of_atom[:, None].expand(-1, 3)
    zeros = fractional.new_zeros(structures.n_frames, 3)
    lowest = zeros.scatter_reduce(0, index, fractional, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, fractional, "amax", include_self=False)
    extent = (highest - lowest).clamp(min=TOLERANCE_A)
    return torch.where(structures.pbc, zeros, lowest), torch.where(structures.pbc, torch.ones_like(zeros), extent)


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
        self._built: tuple[Structures, torch.Tensor, Neighbours] | None = None

    def update(self, structures: Structures) -> Neighbours:
        """Pairs that hold for `structures`: those kept if they still do, else new ones for the whole batch."""
        if self._built is None or not self._holds(structures):
            found = find_neighbours(structures, self.cutoff_A + self.skin_A)
            # Callers move atoms in place: the positions the list was built for must be a copy.
            built = replace(structures, positions=structures.positions.clone(), cell=structures.cell.clone())
            self._built = built, torch.linalg.inv(complete_cells(built)), found
            self.n_builds += 1
        return self._built[2]

    def _holds(self, structures: Structures) -> bool:
        assert self._built is not None
        built, inverse, _ = self._built
        if not (torch.equal(built.n_atoms, structures.n_atoms) and torch.equal(built.pbc, structures.pbc)):
            return False
        frame = structures.frame_of_atom
        if torch.equal(built.cell, structures.cell):
            moved = structures.positions - built.positions
            slack = torch.full_like(structures.cell[:, 0, 0], self.skin_A)
        else:
            strain = inverse @ complete_cells(structures)
            carried = torch.einsum("ni,nij->nj", built.positions.double(), strain[frame])
            moved = structures.positions.double() - carried
            slack = (self.cutoff_A + self.skin_A) * torch.linalg.matrix_norm(strain, -2) - self.cutoff_A
        return bool((2 * moved.norm(dim=1) <= slack.index_select(0, frame)).all())
