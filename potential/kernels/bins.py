"""Which atoms see each other, and across which periodic images? Plain PyTorch; the C++ search is held to it.

Every frame is cut into bins along its own lattice vectors and every atom looks through the bins that a sphere of the
cutoff can touch. An axis that is shorter than the cutoff is simply walked round more than once, so small cells with
many images and large cells take the same path, and all frames of a batch take it together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from potential.structures import Structures, complete_cells

__all__ = ["FLAT_CELL", "NOT_FINITE", "find_pairs"]

FLAT_CELL = "frame {} of the batch: its periodic axes span no volume: give three independent lattice vectors"
NOT_FINITE = "frame {} of the batch: positions or cell are not finite, or atoms are too far away"

BINS_PER_CUTOFF = 2  # finer bins hug the sphere closer but there are more of them to visit
# Candidate pairs held at a time: bounds memory. Larger blocks leave the cache of a CPU, smaller ones do not fill a GPU.
PAIRS_PER_BLOCK, PAIRS_PER_BLOCK_GPU = 200_000, 20_000_000
TOLERANCE_A = 1e-6  # widens the search, not the list: positions on a bin's border may round to either side
FLATTEST = 1e-12  # volume of a cell, beside that of a box with its edges
MOST_TURNS = 1e9  # of an atom round its cell, so that shifts fit 32 bits


def find_pairs(
    structures: Structures, cutoff_A: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre (E,), other (E,), shift (E, 3), int32, and row (N + 1,) of all directed pairs closer than the cutoff.

    Raises ValueError for a cell that spans no volume, or positions that are not finite.
    """
    bins = _Bins(structures, cutoff_A)
    centre, other, shift = (torch.cat(parts) for parts in zip(*bins.pairs(), strict=True))
    counts = torch.bincount(centre, minlength=len(structures.positions))
    row = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # Each atom's pairs were found together, but the atoms in the order of their bins: move each run to its place.
    found = counts.index_select(0, bins.order).cumsum(0)
    lead = torch.empty_like(found).index_copy_(0, bins.order, found) - row[1:]
    place = torch.arange(len(centre), device=centre.device) - lead.index_select(0, centre)
    centre, other = (torch.empty_like(pairs).index_copy_(0, place, pairs) for pairs in (centre, other))
    return centre, other, torch.empty_like(shift).index_copy_(0, place, shift).int(), row


class _Bins:
    """Atoms of every frame sorted into bins along the frame's (completed) lattice vectors."""

    def __init__(self, structures: Structures, cutoff_A: float) -> None:
        self.cutoff_A = cutoff_A
        self.pbc = structures.pbc
        frame = structures.frame_of_atom
        positions = structures.positions.double()
        _check(structures.cell.isfinite().flatten(1).all(1), NOT_FINITE)
        self.cells = complete_cells(structures)
        edges = self.cells.norm(dim=2).prod(1)
        _check(torch.linalg.det(self.cells).abs() > FLATTEST * edges, FLAT_CELL)
        inverse = torch.linalg.inv(self.cells)
        fractional = torch.einsum("ni,nij->nj", positions, inverse[frame])
        _check((fractional.abs() < MOST_TURNS).all(1), NOT_FINITE, frame)
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
        at_a_time = PAIRS_PER_BLOCK if cost.device.type == "cpu" else PAIRS_PER_BLOCK_GPU
        n_blocks = math.ceil(float(cost[-1]) / at_a_time)
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


def _check(sound: torch.Tensor, message: str, frame: torch.Tensor | None = None) -> None:
    """Raise ValueError with the number of the first frame (or of the frame of the first atom) that is not sound."""
    if not sound.all():
        first = int((~sound).nonzero()[0])
        raise ValueError(message.format(first if frame is None else int(frame[first])))


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
