"""How unsure is a committee of frames, and what do they look like to it? Frames in, arrays out; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from potential.committee import Committee
from potential.kernels import aev_forward
from potential.neighbours import find_neighbours, pair_vectors
from potential.structures import Structures
from sampler.dynamics import committee_spreads
from sampler.triggers import Spread
from shards.frame import Frame

__all__ = ["fingerprints", "measure_spreads", "predict_energies"]

ATOMS_PER_BATCH = 4096


def measure_spreads(committee: Committee, frames: Sequence[Frame]) -> list[Spread]:
    """The spread of the committee on each frame."""
    spreads: list[Spread] = []
    for structures in _batches(committee, frames):
        evaluation = committee.evaluate(structures, forces="members")
        figures = torch.stack(committee_spreads(evaluation, structures), dim=1)
        spreads += [Spread(*row) for row in figures.tolist()]
    return spreads


def predict_energies(committee: Committee, frames: Sequence[Frame]) -> NDArray[np.float64]:
    """The committee's mean energy of each frame, (n_frames,), eV."""
    parts = [committee.evaluate(structures, forces="none").energy for structures in _batches(committee, frames)]
    energies: NDArray[np.float64] = torch.cat(parts).double().cpu().numpy()
    return energies


def fingerprints(committee: Committee, frames: Sequence[Frame]) -> NDArray[np.float64]:
    """Mean and standard deviation of the AEV over the atoms of each element: (n_frames, 2 n_elements L).

    Does not change when atoms are reordered or the frame is moved, turned or repeated.
    """
    n_elements = len(committee.elements)
    rows = [torch.zeros(0, 2 * n_elements * committee.aev.length, dtype=torch.float64)]
    for structures in _batches(committee, frames):
        aev = _aev(committee, structures).to(torch.float64)
        group = structures.frame_of_atom * n_elements + structures.species
        n_groups = structures.n_frames * n_elements
        count = torch.bincount(group, minlength=n_groups).clamp(min=1)[:, None]
        mean = aev.new_zeros(n_groups, aev.shape[1]).index_add_(0, group, aev) / count
        deviation = (aev - mean[group]).square()
        std = (aev.new_zeros(n_groups, aev.shape[1]).index_add_(0, group, deviation) / count).sqrt()
        rows.append(torch.cat([mean, std], dim=1).reshape(structures.n_frames, -1).cpu())
    return torch.cat(rows).numpy()


def _aev(committee: Committee, structures: Structures) -> torch.Tensor:
    neighbours = find_neighbours(structures, committee.cutoff_A)
    vectors = pair_vectors(structures, neighbours)
    return aev_forward(vectors, neighbours.row, structures.species[neighbours.other], committee.aev)


def _batches(committee: Committee, frames: Sequence[Frame]) -> Iterator[Structures]:
    """Frames in the committee's precision and on its device, about ATOMS_PER_BATCH atoms at a time."""
    start = 0
    while start < len(frames):
        stop, n_atoms = start + 1, frames[start].n_atoms
        while stop < len(frames) and n_atoms + frames[stop].n_atoms <= ATOMS_PER_BATCH:
            n_atoms += frames[stop].n_atoms
            stop += 1
        yield Structures.from_frames(frames[start:stop], committee.elements, committee.dtype, committee.device)
        start = stop
