"""How do structures that stay in memory become the block of a step?

What all of them have of one kind is one tensor, from which a block is gathered: to join hundreds of small tensors would
take the host a tenth of a step on a CPU, and longer than the whole of it on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potential.aev import AEVParameters
from potential.kernels import Inputs, Kept, find_reverse, implementation
from trainer.descriptors import Block, Geometry, KeptBlock, Pairs, Recomputed
from trainer.examples import Example
from trainer.loss import References

__all__ = ["Resident", "Size"]


@dataclass(frozen=True)
class Size:
    """How many atoms and pairs a block has, and how many atoms of each element."""

    n_atoms: int
    n_pairs: int
    n_of_element: tuple[int, ...]


class Resident:
    """Structures with their labels, on one device: all of them with their Jacobians, or all with their pairs. One more,
    of a single atom without any label, fills up blocks.

    parts: numbers of structures, each with as many examples. n_atoms: of all. counts: (n + 1, 2 + n_elements), atoms,
    pairs, and atoms of each element, on the host. on_gpu: whether blocks are made, and used, as a GPU wants it.
    """

    def __init__(
        self, parts: Iterable[tuple[NDArray[np.int64], Sequence[Example]]], n_atoms: int, p: AEVParameters
    ) -> None:
        self._p = p
        self._kinds = np.zeros(n_atoms + 1, dtype=np.int64)
        self._jacobians: list[Kept] = []
        vec, other = list[Tensor](), list[Tensor]()
        numbers, counts, virial, energy, volume, end = list[int](), [], [], [], [], 0
        for structures, examples in parts:
            geometries = [example.geometry for example in examples]
            if not numbers:
                like = geometries[0].aev
                self._aev, self._forces = like.new_zeros(n_atoms + 1, p.length), like.new_zeros(n_atoms + 1, 3)
                self._species, self._count = like.new_zeros(2, n_atoms + 1, dtype=torch.int64)
            begin, end = end, end + sum(len(geometry.aev) for geometry in geometries)
            self._forces[begin:end] = torch.cat([example.forces for example in examples])
            self._put(geometries, slice(begin, end))
            vec.append(torch.cat([geometry.vec for geometry in geometries]))
            other.append(torch.cat([geometry.other for geometry in geometries]))
            self._jacobians += [geometry.jacobian for geometry in geometries if geometry.jacobian is not None]
            counts += [_counts(geometry, p.n_species) for geometry in geometries]
            virial += [example.virial for example in examples]
            energy += [example.energy for example in examples]
            volume += [example.volume or 1.0 for example in examples]
            numbers += structures.tolist()
        self._forces[-1] = torch.nan
        self._place = np.full(max(numbers) + 2, len(numbers))
        self._place[numbers] = np.arange(len(numbers))
        # In the same order, but of as few bytes as will do: then they are sorted in a fraction of the time.
        ranks = np.unique(self._kinds, return_inverse=True)[1]
        self._kinds = ranks.astype(np.min_scalar_type(ranks.max()))
        self.on_gpu = self._aev.device.type != "cpu" or implementation(self._aev) == "gpu"
        self.counts = np.array([*counts, [1, 0, 1, *[0] * (p.n_species - 1)]])
        unknown = self._forces.new_full((6,), torch.nan)
        self._virial = torch.stack([*virial, unknown])
        self._energy, self._volume = unknown.new_tensor([*energy, torch.nan]), unknown.new_tensor([*volume, 1.0])
        self._atoms_of, self._pairs_of = torch.from_numpy(self.counts.T[:2].copy()).to(unknown.device)
        self._first_atom, self._first_pair = (each.cumsum(0) - each for each in (self._atoms_of, self._pairs_of))
        self._vec = _joined(vec)
        del vec  # so that all pairs are there twice of one kind only
        self._other = _joined(other)
        self._reverse = self._find_reverse() if self.on_gpu else None

    def _put(self, geometries: Sequence[Geometry], here: slice) -> None:
        """What there is of each atom."""
        self._aev[here] = torch.cat([geometry.aev for geometry in geometries])
        self._species[here] = torch.cat([geometry.species for geometry in geometries])
        self._kinds[here] = np.concatenate([geometry.kinds for geometry in geometries])
        first = accumulate((len(geometry.species) for geometry in geometries), initial=0)
        centre = torch.cat([geometry.centre + at for geometry, at in zip(geometries, first, strict=False)])
        self._count[here] = torch.bincount(centre, minlength=here.stop - here.start)

    def _find_reverse(self) -> Tensor:
        of_pair = torch.repeat_interleave(self._pairs_of, output_size=len(self._other) - 1)
        before = self._first_atom.index_select(0, of_pair)
        row = torch.nn.functional.pad(self._count.cumsum(0), (1, 0))
        # Atoms and pairs are counted within a structure.
        reverse = find_reverse(self._vec[:-1], row, self._other[:-1] + before)
        return _joined([reverse - self._first_pair.index_select(0, of_pair)])

    def places(self, structures: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the structures of these numbers are among those here; others are taken for the one without labels."""
        places: NDArray[np.int64] = self._place[structures.clip(max=len(self._place) - 1)]
        return places

    def block(self, structures: NDArray[np.int64]) -> tuple[Tensor, Block, References]:
        """Some structures: their numbers, these joined, and their labels. Nothing waits for the device."""
        places = self.places(structures)
        n_atoms, n_pairs, *n_of_element = self.counts[places].sum(0).tolist()
        which = torch.from_numpy(places).to(self._aev.device, non_blocking=True)
        return torch.from_numpy(structures), *self.join(which, Size(n_atoms, n_pairs, tuple(n_of_element)))

    def join(self, which: Tensor, size: Size, *, fill: bool = False) -> tuple[Block, References]:
        """The structures at these places, (B,), on the device, and their labels.

        If `fill`, `size` may be more than that of the structures, by one atom at least; then the last of them is the
        one without labels, and stands for what is missing. Pairs that are missing belong to no atom.
        """
        atoms, frame_of_atom, first_atom, n_atoms = self._gather(
            which, self._first_atom, self._atoms_of, size.n_atoms, len(self._aev), fill
        )
        truth = References(
            energy=self._energy.index_select(0, which),
            forces=self._forces.index_select(0, atoms),
            virial=self._virial.index_select(0, which),
            volume=self._volume.index_select(0, which),
            n_atoms=n_atoms,
            frame_of_atom=frame_of_atom,
        )
        species = self._species.index_select(0, atoms)
        if self.on_gpu:
            seen = Inputs(self._aev.index_select(0, atoms), _by_element(species, size.n_of_element))
        else:
            order = torch.from_numpy(self._kinds[atoms.numpy()].argsort(kind="stable"))
            seen = Inputs(self._aev, order.split(size.n_of_element), atoms)
        if self._jacobians:
            jacobians = [self._jacobians[place] for place in which.tolist()]
            return KeptBlock(seen, n_atoms, frame_of_atom, jacobians), truth
        pairs = self._pairs(which, atoms, first_atom, size, fill)
        return Recomputed(seen, species, n_atoms, frame_of_atom, pairs, self._p), truth

    def _pairs(self, which: Tensor, atoms: Tensor, first_atom: Tensor, size: Size, fill: bool) -> Pairs:
        pairs, of_pair, first_pair, _ = self._gather(
            which, self._first_pair, self._pairs_of, size.n_pairs, len(self._vec), fill
        )
        reverse = self._reverse
        if reverse is not None:
            reverse = reverse.index_select(0, pairs) + first_pair.index_select(0, of_pair)
        return Pairs(
            self._vec.index_select(0, pairs),
            torch.nn.functional.pad(self._count.index_select(0, atoms).cumsum(0), (1, 0)),
            self._other.index_select(0, pairs) + first_atom.index_select(0, of_pair),
            reverse,
        )

    def _gather(
        self, which: Tensor, first: Tensor, counts: Tensor, total: int, n_here: int, fill: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of atoms or pairs of some structures: where they are here, of which of the structures, first and number."""
        counts = counts.index_select(0, which)
        if fill:
            counts = torch.cat([counts[:-1], total - counts[:-1].sum(0, keepdim=True)])
        begin = counts.cumsum(0) - counts
        owner = torch.repeat_interleave(counts, output_size=total)
        move = first.index_select(0, which) - begin
        places = torch.arange(total, device=which.device) + move.index_select(0, owner)
        # What fills up is always the last one here.
        return places.clamp(max=n_here - 1), owner, begin, counts


def _counts(geometry: Geometry, n_elements: int) -> list[int]:
    of_element = torch.bincount(geometry.species, minlength=n_elements).tolist()
    return [len(geometry.species), len(geometry.other), *of_element]


def _by_element(species: Tensor, n_of_element: Sequence[int]) -> list[Tensor]:
    """The atoms of each element, of as many as there are at most; the last atom stands for those that are missing."""
    last = len(species) - 1
    if len(n_of_element) == 1:
        return [torch.arange(last + 1, device=species.device)]
    ordered, order = species.sort(stable=True)
    first = torch.searchsorted(ordered, torch.arange(len(n_of_element), device=species.device))
    elements = []
    for element, n in enumerate(n_of_element):
        place = first[element] + torch.arange(n, device=species.device)
        atoms = order.index_select(0, place.clamp(max=last))
        there = (place <= last) & (species.index_select(0, atoms) == element)
        elements.append(torch.where(there, atoms, last))
    return elements


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """One after the other, and one more row of zeros."""
    return torch.cat([*pieces, pieces[0].new_zeros(1, *pieces[0].shape[1:])])
