"""Which cells advance together? A ragged batch of walkers of mixed sizes that come and go. No physics.

Per-atom tensors of all walkers lie one after the other; row `i` of per-cell tensors belongs to `walkers[i]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from ase.data import atomic_masses
from numpy.typing import NDArray
from torch import Tensor

from potential.structures import Structures
from sampler.config import SamplerSettings
from sampler.schedules import Schedule
from sampler.streams import Purpose, derive_key
from sampler.triggers import Reading, Spread
from shards.frame import Frame

__all__ = ["Batch", "Snapshot", "Walker", "join", "start_batch"]


@dataclass(frozen=True)
class Snapshot:
    """A geometry a walker went through, and what the committee made of it."""

    positions: NDArray[np.float64]  # (n_atoms, 3), A
    cell: NDArray[np.float64]  # (3, 3), A
    spread: Spread
    time_fs: float


@dataclass
class Walker:
    """One run: where it starts, its schedule, and what its checks found so far."""

    seed: int
    start: Frame
    schedule: Schedule
    n_steps: int = 0
    density_factor: float = 1.0
    blown: bool = False  # stopped between checks by the force guard; waits for the next check
    reading: Reading = field(init=False)  # of the last check, and where it was
    current: Snapshot = field(init=False)
    last_good: Snapshot | None = None
    most_uncertain: Snapshot | None = None

    def time_fs(self, settings: SamplerSettings) -> float:
        return self.n_steps * settings.timestep_fs


@dataclass
class Batch:
    """positions, velocities, forces: (n_atoms, 3), A, A/fs, eV/A. inverse_mass: (n_atoms, 1), 1/amu.

    noise_scale: (n_atoms, 1), A/fs: standard deviation of the random kicks. cell: (n_walkers, 3, 3), A.
    All in float64, changed in place while the batch advances.
    """

    walkers: list[Walker]
    elements: tuple[str, ...]
    species: Tensor  # (n_atoms,), index into elements
    positions: Tensor
    velocities: Tensor
    forces: Tensor
    inverse_mass: Tensor
    noise_scale: Tensor
    cell: Tensor

    def __post_init__(self) -> None:
        device = self.cell.device
        counts = [walker.start.n_atoms for walker in self.walkers]
        stops = np.cumsum(counts, dtype=np.int64)
        self.rows = [slice(int(stop - count), int(stop)) for stop, count in zip(stops, counts, strict=True)]
        n_atoms = torch.tensor(counts, dtype=torch.int64)
        keys = [derive_key(walker.seed, Purpose.DYNAMICS) for walker in self.walkers]
        self.noise_key = torch.tensor(keys, dtype=torch.int64, device=device)
        pbc = np.array([walker.start.pbc for walker in self.walkers]).reshape(-1, 3)
        # As the model sees the batch; it shares the memory of positions and cell.
        self.structures = Structures(
            species=self.species,
            positions=self.positions,
            cell=self.cell,
            pbc=torch.tensor(pbc, device=device),
            frame_of_atom=torch.repeat_interleave(n_atoms, output_size=sum(counts)).to(device),
            n_atoms=n_atoms.to(device),
        )
        self.frame_of_atom, self.first_atom = self.structures.frame_of_atom, self.structures.first_atom

    def steps(self) -> Tensor:
        """(n_walkers,): steps taken by each walker until its last check."""
        return torch.tensor([walker.n_steps for walker in self.walkers], device=self.cell.device)

    def over_atoms(self, values: Tensor, reduce: str) -> Tensor:
        """Reduce (n_atoms,) to (n_walkers,): reduce is "mean" or "amax"."""
        out = torch.zeros(len(self.walkers), dtype=values.dtype, device=values.device)
        return out.scatter_reduce(0, self.frame_of_atom, values, reduce, include_self=False)

    def keep(self, chosen: Sequence[int]) -> Batch:
        """The batch of the chosen walkers alone."""
        parts = [torch.arange(self.rows[i].start, self.rows[i].stop) for i in chosen]
        rows = torch.cat([torch.arange(0), *parts]).to(self.cell.device)
        return Batch(
            walkers=[self.walkers[i] for i in chosen],
            elements=self.elements,
            cell=self.cell[list(chosen)],
            **{name: getattr(self, name)[rows] for name in PER_ATOM},
        )


PER_ATOM = ("species", "positions", "velocities", "forces", "inverse_mass", "noise_scale")


def start_batch(walkers: Sequence[Walker], elements: Sequence[str], device: str) -> Batch:
    """A batch at rest at the walkers' starts; its forces are not known yet.

    Raises:
        UnknownElementError: a start holds an element that is not among `elements`.
    """
    frames = [walker.start for walker in walkers]
    structures = Structures.from_frames(frames, elements, torch.float64, device)
    numbers = np.concatenate([frame.numbers for frame in frames])
    return Batch(
        walkers=list(walkers),
        elements=tuple(elements),
        species=structures.species,
        positions=structures.positions,
        velocities=torch.zeros_like(structures.positions),
        forces=torch.zeros_like(structures.positions),
        inverse_mass=torch.tensor(1 / atomic_masses[numbers], device=device)[:, None],
        noise_scale=torch.zeros_like(structures.positions[:, :1]),
        cell=structures.cell,
    )


def join(first: Batch, second: Batch) -> Batch:
    return Batch(
        walkers=first.walkers + second.walkers,
        elements=first.elements,
        cell=torch.cat([first.cell, second.cell]),
        **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in PER_ATOM},
    )
