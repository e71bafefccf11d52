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
from potential.kernels import Kept, aev_forward, aev_jvp, aev_vjp, keep, pair_differences, pair_sums, respond
from potential.neighbours import find_neighbours, pair_vectors
from potential.structures import Structures
from trainer.loss import References, Weights, pulls

__all__ = ["Block", "Geometry", "describe", "jacobian_numbers", "join", "with_jacobian"]


@dataclass(frozen=True)
class Geometry:
    """One structure as the trainer sees it, on the device of the training but for its species.

    species: (n,), on the CPU. aev: (n, L). Pairs sorted by centre: vec (E, 3), A; centre and other (E,). jacobian:
    (3n + 6, n * L), rows -dAEV/dx then dAEV/dstrain (xx yy zz yz xz xy), when it is kept; then there are no pairs.
    """

    species: Tensor
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
    all_centres, all_others = neighbours.centre.to(device), neighbours.other.to(device)
    geometries = []
    for (a, b), (e, f) in zip(pairwise(first.tolist()), pairwise(neighbours.row[first].tolist()), strict=True):
        centre, other = all_centres[e:f] - a, all_others[e:f] - a
        geometries.append(Geometry(species[a:b], aev[a:b], vec[e:f], centre, other))
    return geometries


def with_jacobian(geometry: Geometry, p: AEVParameters) -> Geometry:
    """Compute the rows of the Jacobian as products with unit vectors."""
    n = len(geometry.species)
    units = torch.eye(3 * n + 6, dtype=geometry.aev.dtype, device=geometry.aev.device)
    forces, virial = units[:, : 3 * n].reshape(-1, n, 3), units[:, None, 3 * n :]
    rows = _Recomputed([geometry], p).lift(forces, virial.contiguous())
    return Geometry(
        geometry.species,
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
    """Some structures joined: B of them with N atoms in all. Species (N,) are on the CPU."""

    def __init__(self, geometries: Sequence[Geometry]) -> None:
        counts = torch.tensor([len(geometry.species) for geometry in geometries])
        self.species = torch.cat([geometry.species for geometry in geometries])
        self.aev = torch.cat([geometry.aev for geometry in geometries])
        self.frame_of_atom = torch.repeat_interleave(counts, output_size=len(self.species)).to(self.aev.device)
        self.n_atoms = counts.to(self.aev.device)

    @abstractmethod
    def project(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return forces (M, N, 3), eV/A, and virial = volume * stress (M, B, 6), eV, for g (M, N, L)."""

    @abstractmethod
    def respond(self, g: Tensor, truth: References, weights: Weights, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return forces and virial, and the derivative by g, (M, N, L), of the sum of scale (M, B) times the loss."""


def join(geometries: Sequence[Geometry], p: AEVParameters) -> Block:
    """Join structures that all keep their Jacobian, or none does."""
    kept = [geometry.jacobian for geometry in geometries if geometry.jacobian is not None]
    return _Kept(geometries, kept) if kept else _Recomputed(geometries, p)


class _Kept(Block):
    """In one pass over the Jacobians, which are too large to stay in a cache."""

    def __init__(self, geometries: Sequence[Geometry], jacobians: Sequence[Kept]) -> None:
        super().__init__(geometries)
        self._jacobians = jacobians

    def project(self, g: Tensor) -> tuple[Tensor, Tensor]:
        nothing = [g.new_full((jacobian.shape[0],), torch.nan) for jacobian in self._jacobians]
        scale = g.new_zeros(len(g), len(nothing))
        return respond(self._jacobians, nothing, g.contiguous(), scale, 0.0, 0.0, 0.0)[:2]

    def respond(self, g: Tensor, truth: References, weights: Weights, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        strengths = 2 / 3 * weights.force, weights.stress / 3, weights.force_cap
        return respond(self._jacobians, truth.targets, g, scale, *strengths)


class _Recomputed(Block):
    def __init__(self, geometries: Sequence[Geometry], p: AEVParameters) -> None:
        super().__init__(geometries)
        first = list(accumulate((len(geometry.species) for geometry in geometries[:-1]), initial=0))
        self._p = p
        self._vec = torch.cat([geometry.vec for geometry in geometries])
        self._centre = torch.cat([geometry.centre + at for geometry, at in zip(geometries, first, strict=True)])
        self._other = torch.cat([geometry.other + at for geometry, at in zip(geometries, first, strict=True)])
        self._species_other = self.species.to(self.aev.device)[self._other]
        per_atom = torch.zeros_like(self.frame_of_atom).index_add_(0, self._centre, torch.ones_like(self._centre))
        self._row = torch.nn.functional.pad(per_atom.cumsum(0), (1, 0))

    def project(self, g: Tensor) -> tuple[Tensor, Tensor]:
        pull = aev_vjp(self._vec, self._row, self._species_other, g.contiguous(), self._p)  # dE/dvec
        forces = pair_sums(pull, self._row, self._other)
        x, y, z = self._vec.unbind(1)
        px, py, pz = pull.unbind(2)
        parts = [px * x, py * y, pz * z, (py * z + pz * y) / 2, (px * z + pz * x) / 2, (px * y + py * x) / 2]
        virial = g.new_zeros(len(g), len(self.n_atoms), 6)
        virial.index_add_(1, self.frame_of_atom[self._centre], torch.stack(parts, dim=2))
        return forces, virial

    def respond(self, g: Tensor, truth: References, weights: Weights, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        forces, virial = self.project(g)
        return forces, virial, self.lift(*pulls(forces, virial, truth, weights, scale))

    def lift(self, forces: Tensor, virial: Tensor) -> Tensor:
        """Apply the transpose of `project`: (M, N, 3) and (M, B, 6) to (M, N, L)."""
        tangent = pair_differences(forces.contiguous(), self._row, self._other)
        xx, yy, zz, yz, xz, xy = virial[:, self.frame_of_atom[self._centre]].unbind(2)
        x, y, z = self._vec.unbind(1)
        stretch = [
            xx * x + (xy * y + xz * z) / 2,
            yy * y + (xy * x + yz * z) / 2,
            zz * z + (xz * x + yz * y) / 2,
        ]
        tangent += torch.stack(stretch, dim=2)
        return aev_jvp(self._vec, self._row, self._species_other, tangent, self._p)
