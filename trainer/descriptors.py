"""How do g = dE/dAEV of a block of structures become forces and stress, and their residuals return to AEVs?

Both are products with the Jacobian of the AEVs by positions and strain. Geometries never change in training, so AEVs
are kept. The Jacobian either is kept too, per structure with all images summed (cells of a few tens of atoms: one small
matrix product for the whole committee), or is recomputed by the kernels from pair vectors. Neither needs a second
derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potential.aev import AEVParameters
from potential.kernels import (
    Inputs,
    Kept,
    aev_forward,
    aev_products,
    keep,
    pair_sums,
    pair_tangents,
    pair_virials,
    respond,
)
from potential.neighbours import find_neighbours, pair_vectors
from potential.structures import Structures
from trainer.loss import References, Weights, errors_of, pulls

PART, MOST_PARTS = 16, 48  # kernels leave out so many numbers of AEVs at a time; so many parts are looked at

__all__ = [
    "Block",
    "Geometry",
    "KeptBlock",
    "Pairs",
    "Recomputed",
    "describe",
    "jacobian_numbers",
    "join",
    "with_jacobian",
]


@dataclass(frozen=True)
class Geometry:
    """One structure as the trainer sees it, on the device of the training but for its species.

    species: (n,), on the CPU. kinds: (n,), by which atoms are sorted that the kernels can treat alike. aev: (n, L).
    Pairs sorted by centre: vec (E, 3), A; centre and other (E,). jacobian: (3n + 6, n * L), rows -dAEV/dx then
    dAEV/dstrain (xx yy zz yz xz xy), when it is kept; then there are no pairs.
    """

    species: Tensor
    kinds: NDArray[np.int64]
    aev: Tensor
    vec: Tensor
    centre: Tensor
    other: Tensor
    jacobian: Kept | None = None

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if value is not None)


def describe(
    structures: Structures, p: AEVParameters, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Geometry]:
    """Find the neighbours in float64 on the CPU, and the AEVs in `dtype` on the device.

    What comes out of one structure is its own alone.
    """
    neighbours = find_neighbours(structures, max(p.radial_cutoff_A, p.angular_cutoff_A))
    vec = pair_vectors(structures, neighbours).to(device, dtype)
    species, first = structures.species, structures.first_atom
    aev = aev_forward(vec, neighbours.row.to(device), species[neighbours.other].to(device), p)
    kinds = _kinds(species, aev)
    all_centres, all_others = neighbours.centre.to(device), neighbours.other.to(device)
    geometries = []
    for (a, b), (e, f) in zip(pairwise(first.tolist()), pairwise(neighbours.row[first].tolist()), strict=True):
        centre, other = all_centres[e:f] - a, all_others[e:f] - a
        geometries.append(Geometry(species[a:b], kinds[a:b], aev[a:b], vec[e:f], centre, other))
    return geometries


def _kinds(species: Tensor, aev: Tensor) -> NDArray[np.int64]:
    """(N,): numbers that grow with the species, and on a CPU are the same where AEVs are zero in the same parts."""
    kinds: NDArray[np.int64] = species.numpy() << MOST_PARTS
    if aev.device.type == "cpu":
        padded = torch.nn.functional.pad(aev, (0, -aev.shape[1] % PART))
        filled = padded.view(len(aev), -1, PART).sum(2).numpy()[:, :MOST_PARTS] > 0  # no function is below zero
        kinds |= filled @ (1 << np.arange(filled.shape[1]))
    return kinds


def with_jacobian(geometry: Geometry, p: AEVParameters, *, virial_known: bool = True) -> Geometry:
    """Compute the rows of the Jacobian as products with unit vectors.

    Without a virial to compare with its rows are zero, and take no room: a quarter of the whole for a molecule.
    """
    n = len(geometry.species)
    units = torch.eye(3 * n + 6, dtype=geometry.aev.dtype, device=geometry.aev.device)
    forces, virial = units[:, : 3 * n].reshape(-1, n, 3), units[:, None, 3 * n :]
    block = join([geometry], p)
    assert isinstance(block, Recomputed)
    rows = block.lift(forces.contiguous(), virial * virial_known)
    return Geometry(
        geometry.species,
        geometry.kinds,
        geometry.aev,
        geometry.vec.new_empty(0, 3),
        geometry.centre.new_empty(0),
        geometry.other.new_empty(0),
        keep(rows.reshape(3 * n + 6, -1)),
    )


def jacobian_numbers(n_atoms: NDArray[np.int32], length: int) -> int:
    """Return how many numbers the Jacobians of structures of so many atoms and AEVs of `length` have, zeros and all."""
    n = n_atoms.astype(np.int64)
    return int(((3 * n + 6) * n).sum()) * length


class Block(ABC):
    """Some structures joined: B of them with N atoms in all.

    seen: their AEVs (.., L), and the atoms of each element. n_atoms: (B,). frame_of_atom: (N,).
    """

    def __init__(self, seen: Inputs, n_atoms: Tensor, frame_of_atom: Tensor) -> None:
        self.seen = seen
        self.n_atoms = n_atoms
        self.frame_of_atom = frame_of_atom

    @abstractmethod
    def project(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return forces (M, N, 3), eV/A, and virial = volume * stress (M, B, 6), eV, for g (M, N, L)."""

    @abstractmethod
    def respond(self, g: Tensor, truth: References, weights: Weights, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return errors of forces and virial, (M, B, 5), and the derivative by g, (M, N, L), of the loss.

        The loss is the sum of scale, (M, B), times that of a structure. The derivative may be written over g.
        """


@dataclass(frozen=True)
class Pairs:
    """The pairs of joined structures, sorted by centre.

    vec: (E, 3), A. row: (N + 1,), pairs of atom i are row[i] .. row[i + 1]. other: (E,). reverse: (E,), where known,
    see potential.kernels.find_reverse.
    """

    vec: Tensor
    row: Tensor
    other: Tensor
    reverse: Tensor | None = None


def join(geometries: Sequence[Geometry], p: AEVParameters) -> Block:
    """Join structures that all keep their Jacobian, or none does."""
    aev = torch.cat([geometry.aev for geometry in geometries])
    kinds = np.concatenate([geometry.kinds for geometry in geometries])
    order = kinds.argsort(kind="stable")
    ends = np.searchsorted(kinds[order], np.arange(p.n_species + 1) << MOST_PARTS).tolist()
    elements = [_placed(torch.from_numpy(order[low:high]), aev.device) for low, high in pairwise(ends)]
    n_atoms = torch.tensor([len(geometry.kinds) for geometry in geometries]).to(aev.device)
    frame_of_atom = torch.repeat_interleave(n_atoms, output_size=len(aev))
    kept = [geometry.jacobian for geometry in geometries if geometry.jacobian is not None]
    seen = Inputs(aev, elements)
    if kept:
        return KeptBlock(seen, n_atoms, frame_of_atom, kept)
    species = _placed(torch.cat([geometry.species for geometry in geometries]), aev.device)
    return Recomputed(seen, species, n_atoms, frame_of_atom, _join_pairs(geometries), p)


def _placed(values: Tensor, device: torch.device) -> Tensor:
    """On the device; from memory that is not pinned a copy would wait for all that a GPU has to do before."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _join_pairs(geometries: Sequence[Geometry]) -> Pairs:
    first = list(accumulate((len(geometry.species) for geometry in geometries), initial=0))
    vec = torch.cat([geometry.vec for geometry in geometries])
    centre, other = (
        torch.cat([getattr(geometry, end) + at for geometry, at in zip(geometries, first, strict=False)])
        for end in ("centre", "other")
    )
    per_atom = centre.new_zeros(first[-1]).index_add_(0, centre, torch.ones_like(centre))
    return Pairs(vec, torch.nn.functional.pad(per_atom.cumsum(0), (1, 0)), other)


class KeptBlock(Block):
    """In one pass over the Jacobians, which are too large to stay in a cache."""

    def __init__(self, seen: Inputs, n_atoms: Tensor, frame_of_atom: Tensor, jacobians: Sequence[Kept]) -> None:
        super().__init__(seen, n_atoms, frame_of_atom)
        self._jacobians = jacobians

    def project(self, g: Tensor) -> tuple[Tensor, Tensor]:
        n_structures = len(self._jacobians)
        no_forces, no_virial = g.new_full((g.shape[1], 3), torch.nan), g.new_full((n_structures, 6), torch.nan)
        scale = g.new_zeros(len(g), n_structures)
        return respond(self._jacobians, no_forces, no_virial, g.contiguous(), scale, 0.0, 0.0, 0.0)[:2]

    def respond(self, g: Tensor, truth: References, weights: Weights, scale: Tensor) -> tuple[Tensor, Tensor]:
        strengths = 2 / 3 * weights.force, weights.stress / 3, weights.force_cap
        _, _, v, errors = respond(self._jacobians, truth.forces, truth.virial, g, scale, *strengths, g)
        return errors, v


class Recomputed(Block):
    """By the kernels. species: (N,), on the device of the others, which are as in Block."""

    def __init__(
        self, seen: Inputs, species: Tensor, n_atoms: Tensor, frame_of_atom: Tensor, pairs: Pairs, p: AEVParameters
    ) -> None:
        super().__init__(seen, n_atoms, frame_of_atom)
        self._pairs = pairs
        self._vjp, self._jvp = aev_products(pairs.vec, pairs.row, species.index_select(0, pairs.other), p)

    def project(self, g: Tensor) -> tuple[Tensor, Tensor]:
        pairs, pull = self._pairs, self._vjp(g.contiguous())  # dE/dvec
        forces = pair_sums(pull, pairs.row, pairs.other, pairs.reverse)
        virial = pair_virials(pull, pairs.vec, pairs.row, self.frame_of_atom, len(self.n_atoms))
        return forces, virial.to(g.dtype)

    def respond(self, g: Tensor, truth: References, weights: Weights, scale: Tensor) -> tuple[Tensor, Tensor]:
        forces, virial = self.project(g)
        v = self.lift(*pulls(forces, virial, truth, weights, scale))
        return errors_of(forces, virial, truth, weights), v

    def lift(self, forces: Tensor, virial: Tensor) -> Tensor:
        """Apply the transpose of `project`: (M, N, 3) and (M, B, 6) to (M, N, L)."""
        pairs = self._pairs
        return self._jvp(pair_tangents(forces, virial, pairs.vec, pairs.row, pairs.other, self.frame_of_atom))
