"""What do the benchmarks work on? Crystals and molecules as frames, and committees of the published shape.

The published ANI-Al committee is read from SMELT_REFERENCE where that is set; otherwise random weights of the same
architecture serve: no time depends on them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from potential.aev import AEVParameters
from potential.committee import Committee
from potential.config import PotentialSettings
from potential.model_file import load_committee
from potential.neurochem import import_neurochem
from shards.frame import Frame

__all__ = ["AL_NEIGHBOURS", "AL_TRIPLES", "ORGANIC", "aluminium", "crystal", "molecule", "organic"]

LATTICE_A, RATTLE_A = 4.05, 0.1
AL_NEIGHBOURS, AL_TRIPLES = 82, 510  # within 7 A, and pairs of those within 5 A, per atom of these crystals
ORGANIC = ("H", "C", "N", "O")


def crystal(n: int, seed: int = 0) -> Frame:
    """Fcc aluminium, 4 n^3 atoms displaced at random by 0.1 A."""
    rng = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    positions = LATTICE_A * (corners + basis).reshape(-1, 3)
    positions += rng.normal(0, RATTLE_A, positions.shape)
    cell = np.eye(3) * n * LATTICE_A
    return Frame(np.full(len(positions), 13), positions % (n * LATTICE_A), cell, np.ones(3, dtype=bool))


def aluminium(n_members: int = 8) -> Committee:
    """ANI-Al: 32 radial functions to 7 A, 8 x 8 angular ones to 5 A, networks 96-96-96-64-1; float32."""
    reference = os.environ.get("SMELT_REFERENCE")
    if not reference or n_members != 8:
        return Committee.from_settings(PotentialSettings(n_members=n_members), ["Al"], seed=1).float()
    with tempfile.TemporaryDirectory() as folder:
        import_neurochem(Path(reference) / "ani-al", Path(folder) / "al.safetensors")
        return load_committee(Path(folder) / "al.safetensors")


def molecule(seed: int, n_atoms: int = 20) -> Frame:
    """Half hydrogen, else C, N and O 3:1:1, at random with bonds of 1.05 to 1.5 A and nothing nearer than 1 A."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.resize([1, 6, 1, 7, 1, 6, 1, 8, 1, 6], n_atoms))
    points = np.zeros((1, 3))
    while len(points) < n_atoms:
        direction = rng.normal(size=3)
        point = points[rng.integers(len(points))] + direction / np.linalg.norm(direction) * rng.uniform(1.05, 1.5)
        if np.linalg.norm(points - point, axis=1).min() > 1.0:
            points = np.vstack([points, point])
    return Frame(numbers, points)


def organic(n_members: int) -> Committee:
    """ANI-1x: 384 symmetry functions of H, C, N, O and its networks; random weights, float32."""
    aev = AEVParameters(
        radial_cutoff_A=5.2,
        angular_cutoff_A=3.5,
        eta_radial=16.0,
        eta_angular=8.0,
        zeta=32.0,
        radial_shifts=tuple(0.9 + 4.3 / 16 * k for k in range(16)),
        angular_shifts=tuple(0.9 + 2.6 / 4 * k for k in range(4)),
        angle_shifts=tuple(np.pi / 16 * (2 * k + 1) for k in range(8)),
        n_species=4,
    )
    hidden = [(160, 128, 96), (144, 112, 96), (128, 112, 96), (128, 112, 96)]
    committee = Committee(ORGANIC, aev, hidden, n_members)
    committee.reset_parameters(seed=2)
    return committee.to(torch.float32)
