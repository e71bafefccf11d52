"""Closed-form models that evaluate like a committee, for tests of the dynamics."""

from __future__ import annotations

import numpy as np
import torch

from potential.committee import Evaluation
from potential.neighbours import find_neighbours, pair_vectors
from sampler.batch import Walker
from sampler.config import SamplerSettings
from sampler.schedules import draw_schedule
from shards.frame import Frame

# Two members at +-1 standard deviation from the mean.
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)


SITE_SPACING_A = 10.0


class Trap:
    """Every atom alone in a harmonic well at its site; x away from it, the members differ by `disagreement` |x|."""

    elements = ("H", "Al")
    cutoff_A = 1.0
    dtype = torch.float64

    def __init__(self, stiffness=5.0, disagreement=0.0, breaks_at_A=np.inf):
        self.stiffness, self.disagreement, self.breaks_at_A = stiffness, disagreement, breaks_at_A
        self.batch_sizes = []  # of the steps between checks

    def evaluate(self, structures, neighbours=None, *, forces="mean", stress=False):
        if forces == "mean":
            self.batch_sizes.append(structures.n_frames)
        x = from_sites(structures.positions)
        mean = -self.stiffness * x
        mean = torch.where(x.norm(dim=1, keepdim=True) > self.breaks_at_A, torch.nan, mean)
        energy = torch.zeros(structures.n_frames, dtype=x.dtype).index_add_(
            0, structures.frame_of_atom, self.stiffness / 2 * x.square().sum(1)
        )
        spread = self.disagreement * x.abs()
        return Evaluation(
            n_atoms=structures.n_atoms,
            energy_members=energy.expand(2, -1),
            forces_mean=mean,
            forces_members=mean + SIGNS[:, None, None] * spread if forces == "members" else None,
        )


class SoftSpheres:
    """Pairs repel with the energy strength (1 - r/cutoff)^3, smooth at the cutoff."""

    elements = ("Al",)
    dtype = torch.float64

    def __init__(self, strength=20.0, cutoff_A=4.0):
        self.strength, self.cutoff_A = strength, cutoff_A

    def evaluate(self, structures, neighbours=None, *, forces="mean", stress=False):
        pairs = find_neighbours(structures, self.cutoff_A) if neighbours is None else neighbours
        centre = torch.repeat_interleave(pairs.row.diff())  # a list may have room for more
        vectors = pair_vectors(structures, pairs)[: len(centre)]
        r = vectors.norm(dim=1)
        overlap = (1 - r / self.cutoff_A).clamp(min=0)
        pull = -3 * self.strength / self.cutoff_A * overlap**2 / r
        mean = torch.zeros_like(structures.positions).index_add_(0, centre, pull[:, None] * vectors)
        frames = structures.frame_of_atom[centre]
        energy = torch.zeros(structures.n_frames, dtype=r.dtype)
        energy.index_add_(0, frames, self.strength / 2 * overlap**3)
        return Evaluation(
            n_atoms=structures.n_atoms,
            energy_members=energy.expand(2, -1),
            forces_mean=mean,
            forces_members=mean.expand(2, -1, -1) if forces == "members" else None,
        )


def constant_conditions(temperature_K=300.0, **others):
    """Settings of a walker at one temperature and density, that nothing stops."""
    return SamplerSettings(
        **{
            "temperature_start_K": (temperature_K, temperature_K),
            "temperature_end_K": (temperature_K, temperature_K),
            "temperature_amplitude_K": (0.0, 0.0),
            "density_end_factor": (1.0, 1.0),
            "density_amplitude_factor": (0.0, 0.0),
            "minimum_distance_A": 0.0,
            "settle_steps": 0,
            **others,
        }
    )


def atoms_at_sites(n_atoms, number=13):
    """Atoms at rest in the wells of a Trap, too far apart to be neighbours."""
    return Frame(np.full(n_atoms, number), SITE_SPACING_A * np.stack([np.arange(n_atoms)] * 3, axis=1))


def from_sites(positions):
    """Displacements from the nearest site of a Trap."""
    return positions - SITE_SPACING_A * (positions / SITE_SPACING_A).round()


def fcc_frame(repeats=3, lattice_A=4.05, number=13):
    """A cubic cell of repeats^3 conventional fcc cells."""
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    corners = np.stack(np.meshgrid(*[np.arange(repeats)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    positions = lattice_A * (corners + basis).reshape(-1, 3)
    return Frame(np.full(len(positions), number), positions, np.eye(3) * lattice_A * repeats, np.ones(3, dtype=bool))


def walker(seed, frame, settings):
    return Walker(seed, frame, draw_schedule(settings, seed))
