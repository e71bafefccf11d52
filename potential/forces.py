"""How do gradients by the AEV become forces and virials, in a way that training can differentiate?

The energy depends on positions through the pair vectors, and these are never trained. So forces are linear in
g = dE/dAEV, F = -J^T g, and the derivative of a loss by g needs one product with J: no second derivative of the AEV.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from potential.aev import AEVParameters
from potential.kernels import aev_jvp, aev_vjp
from potential.neighbours import Neighbours, pairs_of_frames
from potential.structures import Structures

__all__ = ["atomic_forces", "pair_forces", "virials"]


def pair_forces(
    gradient: torch.Tensor, vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, E, 3), eV/A: dE_m/dvec, the force of each pair on its centre.

    gradient: (M, N, L), dE_m/dAEV, eV. Differentiable by `gradient` alone.
    """
    forces: torch.Tensor = _PairForces.apply(gradient, vec, row, species_other, p)  # type: ignore[no-untyped-call]
    return forces


def atomic_forces(pair: torch.Tensor, neighbours: Neighbours) -> torch.Tensor:
    """(M, N, 3), eV/A, from pair forces (M, E, 3): what a pair gives its centre it takes from the other end."""
    n_members, n_atoms = len(pair), len(neighbours.row) - 1
    flat = pair.transpose(0, 1).reshape(len(neighbours.centre), n_members * 3)
    forces = flat.new_zeros(n_atoms, n_members * 3)
    forces = forces.index_add(0, neighbours.centre, flat).index_add(0, neighbours.other, flat, alpha=-1)
    return forces.view(n_atoms, n_members, 3).transpose(0, 1)


def virials(pair: torch.Tensor, vec: torch.Tensor, structures: Structures, neighbours: Neighbours) -> torch.Tensor:
    """(M, B, 3, 3), eV, symmetric: dE/dstrain = sum over pairs of vec (x) dE/dvec, from pair forces (M, E, 3)."""
    ends = pairs_of_frames(structures, neighbours)
    virial = torch.stack(
        [torch.matmul(vec[low:high].T, pair[:, low:high]) for low, high in itertools.pairwise(ends)],
        dim=1,
    )
    return (virial + virial.transpose(2, 3)) / 2


class _PairForces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: torch.Tensor,
        vec: torch.Tensor,
        row: torch.Tensor,
        species_other: torch.Tensor,
        p: AEVParameters,
    ) -> torch.Tensor:
        ctx.save_for_backward(vec, row, species_other)
        ctx.p = p
        return aev_vjp(vec, row, species_other, gradient, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *residual: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        vec, row, species_other = ctx.saved_tensors
        return aev_jvp(vec, row, species_other, residual[0].contiguous(), ctx.p), None, None, None, None
