"""How do structures that stay on a GPU become the block of a step?

What all of them have of one kind is one tensor, from which a block is gathered there: to join hundreds of small tensors
would take the host longer than the step takes the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potential.aev import AEVParameters
from potential.kernels import find_reverse
from trainer.descriptors import Block, Geometry, Pairs, Recomputed
from trainer.loss import References

__all__ = ["Resident", "Size"]


@dataclass(frozen=True)
class Size:
    """How many atoms and pairs a block has, and how many atoms of each element."""

    n_atoms: int
    n_pairs: int
    n_of_element: tuple[int, ...]


class Resident:
    """Structures with their labels, on one device. One more, of a single atom without any label, fills up blocks.

    structures: (n,), their numbers, in the order of the others. forces: (n, 3) of each, eV/A. virial: (6,) of each, eV.
    energy: eV, less self energies. volume: A^3. counts: (n + 1, 2 + n_elements), atoms, pairs, and atoms of each
    element, on the host.
    """

    def __init__(
        self,
        structures: NDArray[np.int64],
        geometries: Sequence[Geometry],
        forces: Sequence[Tensor],
        virial: Sequence[Tensor],
        energy: Sequence[float],
        volume: Sequence[float],
        p: AEVParameters,
    ) -> None:
        self._p = p
        self._place = {structure: place for place, structure in enumerate(structures.tolist())}
        one_atom = [1, 0, 1, *[0] * (p.n_species - 1)]
        self.counts = np.array([*(_counts(geometry, p.n_species) for geometry in geometries), one_atom])
        unknown, device = forces[0].new_full((9,), torch.nan), forces[0].device
        self._species = _joined([geometry.species.to(device) for geometry in geometries], 0)
        self._aev = _joined([geometry.aev for geometry in geometries], 0)
        self._forces = torch.cat([*forces, unknown[None, :3]])
        self._virial = torch.stack([*virial, unknown[3:]])
        self._energy, self._volume = unknown.new_tensor([*energy, torch.nan]), unknown.new_tensor([*volume, 1.0])
        self._atoms_of, self._pairs_of = torch.from_numpy(self.counts.T[:2].copy()).to(device)
        self._first_atom, self._first_pair = (each.cumsum(0) - each for each in (self._atoms_of, self._pairs_of))
        of_pair = torch.repeat_interleave(self._pairs_of, output_size=int(self.counts[:, 1].sum()))
        before = self._first_atom.index_select(0, of_pair)
        centre = torch.cat([geometry.centre for geometry in geometries]) + before
        self._count = torch.bincount(centre, minlength=len(self._aev))
        vec, other = (torch.cat([getattr(geometry, name) for geometry in geometries]) for name in ("vec", "other"))
        reverse = find_reverse(vec, torch.nn.functional.pad(self._count.cumsum(0), (1, 0)), other + before)
        # Atoms and pairs are counted within a structure.
        reverse -= self._first_pair.index_select(0, of_pair)
        self._vec, self._other, self._reverse = (_joined([each], 0) for each in (vec, other, reverse))

    def places(self, structures: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the structures of these numbers are among those here; others are taken for the one without labels."""
        return np.array([self._place.get(i, len(self._place)) for i in structures.tolist()], dtype=np.int64)

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
        pairs, of_pair, first_pair, _ = self._gather(
            which, self._first_pair, self._pairs_of, size.n_pairs, len(self._vec), fill
        )
        listed = Pairs(
            self._vec.index_select(0, pairs),
            torch.nn.functional.pad(self._count.index_select(0, atoms).cumsum(0), (1, 0)),
            self._other.index_select(0, pairs) + first_atom.index_select(0, of_pair),
            self._reverse.index_select(0, pairs) + first_pair.index_select(0, of_pair),
        )
        species, aev = self._species.index_select(0, atoms), self._aev.index_select(0, atoms)
        elements = _by_element(species, size.n_of_element)
        truth = References(
            energy=self._energy.index_select(0, which),
            forces=self._forces.index_select(0, atoms),
            virial=self._virial.index_select(0, which),
            volume=self._volume.index_select(0, which),
            n_atoms=n_atoms,
            frame_of_atom=frame_of_atom,
        )
        return Recomputed(elements, species, aev, n_atoms, frame_of_atom, listed, self._p), truth

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


def _joined(pieces: Sequence[Tensor], last: float) -> Tensor:
    """One after the other, and one more row."""
    return torch.cat([*pieces, pieces[0].new_full((1, *pieces[0].shape[1:]), last)])
