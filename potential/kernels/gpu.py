"""How do PyTorch tensors on a GPU reach the Triton programs? In Triton's interpreter those on the CPU do, too.

Everything is launched without waiting for the device; what has no program of its own runs in plain PyTorch there.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from potential.aev import AEVParameters
from potential.kernels import blocks, programs, reference
from potential.kernels.reference import (
    backward_layers,
    drift,
    find_pairs,
    forward_layers,
    have_moved,
    keep,
    kick,
    normals,
    pair_differences,
    respond,
)
from potential.structures import Structures

__all__ = [
    "aev_forward",
    "aev_jvp",
    "aev_vjp",
    "aev_with_vjp",
    "backward_layers",
    "described_bytes",
    "drift",
    "evaluate",
    "find_pairs",
    "forward_layers",
    "have_moved",
    "keep",
    "kick",
    "networks",
    "normals",
    "pair_differences",
    "pair_sums",
    "pair_vectors",
    "respond",
    "shortest_distances",
]

PAIRS_PER_PROGRAM, VALUES_PER_PROGRAM = 128, 1024
WARP = 32  # lanes of a program with a pair or a triple each


def aev_forward(vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> torch.Tensor:
    """(N, L). vec: (E, 3), A, from each centre to its neighbours; row: (N + 1,); species_other: (E,)."""
    return _sums(_Pairs(vec, row, species_other, p), None)[0]


def aev_with_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The AEVs, and what aev_vjp makes of a cotangent. Lists of near pairs are kept in between."""
    pairs = _Pairs(vec, row, species_other, p)
    return _sums(pairs, None)[0], functools.partial(_pull_back, pairs)


def described_bytes(pairs_per_atom: float, p: AEVParameters, itemsize: int) -> float:
    """What aev_with_vjp keeps for each atom: its part of `whole` and `real`."""
    return pairs_per_atom * (3 * 8 + 6 * itemsize)


def aev_jvp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, tangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, N, L): d aev . tangent_m. tangent: (M, E, 3), change of vec."""
    return _sums(_Pairs(vec, row, species_other, p), tangent.contiguous())


def aev_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, cotangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, E, 3): d<cotangent_m, aev>/dvec. cotangent: (M, N, L)."""
    return _pull_back(_Pairs(vec, row, species_other, p), cotangent)


def _pull_back(pairs: _Pairs, cotangent: torch.Tensor) -> torch.Tensor:
    p = pairs.p
    cotangent = cotangent.contiguous()
    out = cotangent.new_empty(len(cotangent), pairs.n_pairs, 3)
    _launch(
        programs.radial_vjp,
        (triton.cdiv(pairs.n_pairs, PAIRS_PER_PROGRAM), len(cotangent)),
        pairs.vec,
        pairs.distance,
        pairs.centre(),
        pairs.species_other,
        cotangent,
        out,
        pairs.n_atoms,
        pairs.n_pairs,
        **_radial(p),
        BLOCK=PAIRS_PER_PROGRAM,
    )
    _launch(
        programs.angular_vjp,
        (triton.cdiv(pairs.n_pairs, WARP), len(cotangent)),
        pairs.bounds,
        pairs.whole,
        pairs.real,
        cotangent,
        out,
        pairs.n_atoms,
        pairs.n_pairs,
        **_angular(p, out.dtype),
        BLOCK=WARP,
        num_warps=1,
    )
    return out


def pair_vectors(
    structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image. row: (N + 1,); other: (E,); shift: (E, 3), int32."""
    positions = structures.positions.contiguous()
    out = positions.new_empty(len(other), 3, dtype=dtype)
    _launch(
        programs.pair_vectors,
        (len(positions),),
        row.contiguous(),
        other.contiguous(),
        shift.contiguous(),
        structures.frame_of_atom,
        positions,
        structures.cell.to(positions.dtype).contiguous(),
        out,
        BLOCK=PAIRS_PER_PROGRAM,
    )
    return out


def pair_sums(pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, N, 3): of each atom, the sum over its own pairs less that over the pairs in which it is the other.

    pair: (M, E, 3); row: (N + 1,); other: (E,). The last bits depend on the order of additions, which is not fixed.
    """
    out = pair.new_zeros(len(pair), len(row) - 1, 3)
    _launch(
        programs.pair_sums,
        (out.shape[1], len(pair)),
        pair.contiguous(),
        row.contiguous(),
        other.contiguous(),
        out,
        len(other),
        BLOCK=PAIRS_PER_PROGRAM,
    )
    return out


def celu(value: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """CELU and its slope, in one pass over the values, which are overwritten."""
    value = value.contiguous()
    slope = torch.empty_like(value)
    n_programs = triton.cdiv(value.numel(), VALUES_PER_PROGRAM)
    _launch(programs.celu, (n_programs,), value, slope, value.numel(), ALPHA=alpha, BLOCK=VALUES_PER_PROGRAM)
    return value, slope


networks = functools.partial(reference.networks, activate=celu)
shortest_distances = functools.partial(reference.shortest_distances, vectors=pair_vectors)
evaluate = functools.partial(blocks.evaluate, sys.modules[__name__])


def _sums(pairs: _Pairs, tangent: torch.Tensor | None) -> torch.Tensor:
    """(1, N, L), the AEVs, or (M, N, L), what J makes of tangents (M, E, 3)."""
    p = pairs.p
    out = pairs.vec.new_empty(1 if tangent is None else len(tangent), pairs.n_atoms, p.length)
    _launch(
        programs.radial_sums,
        (pairs.n_atoms, len(out)),
        pairs.vec,
        pairs.distance,
        pairs.row,
        pairs.species_other,
        tangent,
        out,
        pairs.n_pairs,
        **_radial(p),
        SPECIES=p.n_species,
        SPECIES_WIDTH=triton.next_power_of_2(p.n_species),
        SHIFTS_WIDTH=triton.next_power_of_2(len(p.radial_shifts)),
        PUSH=tangent is not None,
        BLOCK=WARP,
        num_warps=1,
    )
    _launch(
        programs.angular_sums,
        (pairs.n_atoms, p.n_species**2, len(out)),
        pairs.bounds,
        pairs.whole,
        pairs.real,
        tangent,
        out,
        pairs.n_pairs,
        **_angular(p, out.dtype),
        PUSH=tangent is not None,
        BLOCK=WARP,
        num_warps=1,
    )
    return out


class _Pairs:
    """Pairs sorted by centre, and once more those within the angular cutoff, as the programs read them.

    There is room for all pairs in bounds, whole and real (see programs.py), so that those within need not be counted.
    """

    def __init__(self, vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> None:
        self.p, self.n_atoms, self.n_pairs = p, len(row) - 1, len(vec)
        self.vec, self.distance = vec.contiguous(), vec.norm(dim=1)
        self.row, self.species_other = row.long().contiguous(), species_other.long().contiguous()
        self.bounds = self.row.new_empty(self.n_atoms * p.n_species + 1)
        self.whole = self.row.new_empty(3, self.n_pairs)
        self.real = self.vec.new_empty(6, self.n_pairs)
        near = self.distance < p.angular_cutoff_A
        _launch(
            programs.list_near,
            (self.n_atoms,),
            self.vec,
            self.distance,
            near,
            self.row,
            torch.nn.functional.pad(near.cumsum(0), (1, 0)).index_select(0, self.row),
            self.species_other,
            self.bounds,
            self.whole,
            self.real,
            self.n_pairs,
            CUTOFF=p.angular_cutoff_A,
            SPECIES=p.n_species,
            BLOCK=PAIRS_PER_PROGRAM,
            num_warps=1,
        )

    def centre(self) -> torch.Tensor:
        return torch.repeat_interleave(self.row.diff(), output_size=self.n_pairs)


def _launch(program: Any, grid: tuple[int, ...], *tensors: Any, **constants: Any) -> None:
    """Start the programs of a grid, if there are any, on the GPU of the first tensor."""
    if math.prod(grid):
        with torch.cuda.device_of(tensors[0]):
            program[grid](*tensors, **constants)


def _radial(p: AEVParameters) -> dict[str, Any]:
    return {"CUTOFF": p.radial_cutoff_A, "ETA": p.eta_radial, "SHIFTS": p.radial_shifts, "LENGTH": p.length}


def _angular(p: AEVParameters, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "ETA": p.eta_angular,
        "ZETA": p.zeta,
        "SHIFTS": p.angular_shifts,
        "COSINES": tuple(math.cos(angle) for angle in p.angle_shifts),
        "SINES": tuple(math.sin(angle) for angle in p.angle_shifts),
        "SPECIES": p.n_species,
        "N_RADIAL": p.n_radial,
        "LENGTH": p.length,
        "EPS": torch.finfo(dtype).eps,
    }
