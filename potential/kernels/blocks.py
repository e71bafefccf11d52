"""How much of a batch is evaluated at a time? Blocks of atoms, so that memory is bounded however many atoms there are.

The pairs of a block are one piece of the list. What is larger than the list and its vectors is held for one block only:
AEVs, the layers of all members, gradients by AEVs and by pair vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from potential.aev import AEVParameters
from potential.structures import Structures

if TYPE_CHECKING:
    from potential.kernels.reference import Stack

__all__ = ["Found", "evaluate"]

Spread = tuple[torch.Tensor, torch.Tensor]
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Spread | None]

BLOCK_BYTES = 2**32  # enough to keep a GPU busy, little beside its memory
BLOCK_BYTES_CPU = 2**25  # about a cache


@torch.no_grad()
def evaluate(
    kernels: ModuleType,
    structures: Structures,
    row: torch.Tensor,
    other: torch.Tensor,
    shift: torch.Tensor,
    p: AEVParameters,
    stacks: Sequence[Stack],
    self_energies: torch.Tensor,
    celu_alpha: float,
    n_gradients: int,
    stress: bool,
) -> Found:
    """As potential.kernels.evaluate, block by block, with the AEVs, networks and pair sums of `kernels`."""
    n_members, dtype = len(stacks[0].weights[0]), stacks[0].weights[0].dtype
    vec = kernels.pair_vectors(structures, row, other, shift, dtype)
    species_other = structures.species.index_select(0, other)
    energies = vec.new_zeros(n_members, structures.n_frames, dtype=torch.float64)
    forces = vec.new_zeros(n_gradients, len(structures.positions), 3)
    virial = vec.new_zeros(n_gradients, structures.n_frames, 6, dtype=torch.float64)
    self_energies = self_energies.to(vec.device, non_blocking=True)
    n_bytes = _bytes_per_atom(row, other, stacks, n_gradients)
    if n_gradients:
        n_bytes += kernels.described_bytes(len(other) / max(1, len(row) - 1), p, dtype.itemsize, n_gradients)
    for (low, high), (first, last) in _blocks(row, len(other), n_bytes):
        pairs = slice(first, last)
        environments = vec[pairs], row[low : high + 1] - first, species_other[pairs]
        if n_gradients:
            aev, aev_vjp = kernels.aev_with_vjp(*environments, p)
        else:
            aev = kernels.aev_forward(*environments, p)
        atomic, gradient = aev.new_empty(n_members, len(aev)), aev.new_empty(n_gradients, *aev.shape)
        for stack, atoms in zip(stacks, structures.atoms_by_species, strict=False):
            inside = atoms if high - low == len(row) - 1 else atoms[(atoms >= low) & (atoms < high)] - low
            kernels.networks(aev, inside, stack, celu_alpha, atomic, gradient)
        atomic = atomic.double() + self_energies.index_select(0, structures.species[low:high])
        energies.index_add_(1, structures.frame_of_atom[low:high], atomic)
        if n_gradients:
            pull = aev_vjp(gradient)
            forces += kernels.pair_sums(pull, row.clamp(first, last) - first, other[pairs])
            if stress:
                of_block = environments[0], environments[1], structures.frame_of_atom[low:high]
                virial += kernels.pair_virials(pull, *of_block, structures.n_frames)
    spread = kernels.spread(forces) if n_gradients > 1 else None
    if not (n_gradients and stress):
        return energies, forces, None, spread
    volume = structures.volume.double()
    symmetric = virial[..., [[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
    by_volume = symmetric / torch.where(volume > 0, volume, torch.nan)[:, None, None]
    return energies, forces, by_volume.to(dtype), spread


def _bytes_per_atom(row: torch.Tensor, other: torch.Tensor, stacks: Sequence[Stack], n_gradients: int) -> float:
    """Roughly, of what is held for one block only."""
    widest = max(sum(bias.numel() for bias in stack.biases) for stack in stacks)
    itemsize, length = stacks[0].weights[0].itemsize, stacks[0].weights[0].shape[2]
    pairs_per_atom = len(other) / max(1, len(row) - 1)
    return itemsize * (3 * widest + 2 * n_gradients * length) + pairs_per_atom * (60 + 40 * n_gradients)


def _blocks(row: torch.Tensor, n_pairs: int, bytes_per_atom: float) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last atom, and first and last pair, of each block; waits for the device if there is more than one."""
    n_atoms = len(row) - 1
    allowed = BLOCK_BYTES_CPU if row.device.type == "cpu" else BLOCK_BYTES
    size = max(1, int(allowed / max(1.0, bytes_per_atom)))
    # What is being recorded waits for nothing, and goes through all atoms at once: its caller sees that they are few.
    if n_atoms <= size or (row.is_cuda and torch.cuda.is_current_stream_capturing()):
        return [((0, n_atoms), (0, n_pairs))]
    atoms = [*range(0, n_atoms, size), n_atoms]
    pairs = row[torch.tensor(atoms, device=row.device)].tolist()
    return list(zip(itertools.pairwise(atoms), itertools.pairwise(pairs), strict=True))
