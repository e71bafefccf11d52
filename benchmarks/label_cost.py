"""What does a GPAW label of a small disordered Al cell cost, and how wrong is it? `python benchmarks/label_cost.py`.

Four 8-atom cells (two random, two from EMT melts), each setting against the reference of its block; CPU seconds of
one core. The whole table takes about half an hour of CPU time; name blocks (cutoff, kpoints) to run only those.

2026-11-21, GPAW 26.7.0 without BLAS or FFTW of its own, 2 busy cores, cells made as here from other seeds. Errors:
energy as mean +- spread over cells, forces and stress as root mean square.

    setting                                  CPU s   energy meV/atom   forces meV/A   stress meV/A^3
    cutoff (against 500 eV, tight SCF)
      340 eV                                   7.0      0.8 +- 0.1          0.3            0.04
      300 eV                                   6.4      1.3 +- 0.2          0.6            0.04
      250 eV                                   5.5      2.4 +- 0.3          1.0            0.09
      220 eV                                   5.2      3.6 +- 0.4          1.2            0.16
      200 eV                                   4.7      4.7 +- 0.6          1.8            0.21
      250 eV, SCF at the defaults              4.2      2.4 +- 0.3          1.0            0.09
      250 eV, loose SCF                        3.3      2.4 +- 0.3          2.9            0.08
    k-point spacing (against 0.22 / A; three of the cells)
      0.3 / A                                 16       -2.0 +- 5.5         44              4.1
      0.4 / A                                  9.5     -1.9 +- 8.0         54              5.0
      0.5 / A                                  5.6     13.9 +- 15.4       112              5.6
      0.6 / A                                  5.3     15.7 +- 38.8       152             10.5

So the cutoff is soon enough, the SCF may be loose, and the k-points are what a label of a small metal cell costs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.langevin import Langevin
from ase.neighborlist import neighbor_list

from labeler.config import GpawSettings
from labeler.engine import Answer
from labeler.gpaw_engine import GpawEngine
from shards.frame import Frame

LOOSE = {"energy_tolerance_eV": 5e-4, "density_tolerance": 1e-3, "eigenstates_tolerance_eV2": 1e-5}
TIGHT = {"energy_tolerance_eV": 1e-6, "density_tolerance": 1e-6, "eigenstates_tolerance_eV2": 1e-10}
COARSE = {"kpoint_spacing_per_A": 0.85, "smearing_eV": 0.2}
FINE = {"cutoff_eV": 220.0, "kpoint_spacing_per_A": 0.22, "smearing_eV": 0.2} | LOOSE
# The first setting of each block is its reference.
BLOCKS: dict[str, list[dict[str, float]]] = {
    "cutoff": [
        COARSE | TIGHT | {"cutoff_eV": 500.0},
        *(COARSE | TIGHT | {"cutoff_eV": cutoff_eV} for cutoff_eV in (340.0, 300.0, 250.0, 220.0, 200.0)),
        COARSE | LOOSE | {"cutoff_eV": 250.0},
        COARSE | {"cutoff_eV": 250.0},
    ],
    "kpoints": [FINE, *(FINE | {"kpoint_spacing_per_A": spacing_per_A} for spacing_per_A in (0.3, 0.4, 0.5, 0.6))],
}


def main(blocks: list[str]) -> None:
    frames = [random_frame(2.0, 2.2, 1), random_frame(3.1, 2.0, 2), melt(2.4, 1800.0), melt(3.2, 3000.0)]
    for block in blocks or BLOCKS:
        reference: list[Answer] = []
        for setting in BLOCKS[block]:
            start = time.process_time()
            answers = [compute(setting, frame) for frame in frames]
            reference = reference or answers
            seconds = (time.process_time() - start) / len(frames)
            print(setting, f"{seconds:.1f} s per label;", compare(answers, reference), flush=True)


def compute(setting: dict[str, float], frame: Frame) -> Answer:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return GpawEngine(GpawSettings(**setting)).compute(frame, 0)  # type: ignore[arg-type]


def compare(answers: list[Answer], reference: list[Answer]) -> str:
    pairs = list(zip(answers, reference, strict=True))
    energy = np.array([(a.energy - b.energy) / 8 for a, b in pairs]) * 1e3
    forces, stress = (
        np.concatenate([(getattr(a, name) - getattr(b, name)).ravel() for a, b in pairs]) * 1e3
        for name in ("forces", "stress")
    )
    return (
        f"energy {energy.mean():.2f} +- {energy.std():.2f} meV/atom, forces {rms(forces):.1f} (largest"
        f" {np.abs(forces).max():.0f}) meV/A, stress {rms(stress):.2f} meV/A^3"
    )


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def volume_A3(density_g_cm3: float) -> float:
    return 8 * 26.9815 * 1.66053907 / density_g_cm3


def random_frame(density_g_cm3: float, minimum_distance_A: float, seed: int) -> Frame:
    """Eight atoms at random, pushed apart until no pair is too close."""
    rng = np.random.default_rng(seed)
    shape = rng.uniform(0.85, 1.15, 3)
    cell = shape * (volume_A3(density_g_cm3) / shape.prod()) ** (1 / 3)
    atoms = Atoms("Al8", scaled_positions=rng.random((8, 3)), cell=cell, pbc=True)
    while True:
        first, distances, vectors = neighbor_list("idD", atoms, minimum_distance_A)
        if not len(first):
            return frame_of(atoms)
        push = 0.3 * (minimum_distance_A + 0.05 - distances) / distances
        np.add.at(atoms.positions, first, -push[:, None] * vectors)


def melt(density_g_cm3: float, temperature_K: float) -> Frame:
    atoms = bulk("Al", cubic=True) * (2, 1, 1)
    atoms.set_cell(atoms.cell * (volume_A3(density_g_cm3) / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
    atoms.rattle(0.2, seed=int(temperature_K))
    atoms.calc = EMT()
    rng = np.random.default_rng(1)
    Langevin(atoms, 2 * units.fs, temperature_K=temperature_K, friction=0.02 / units.fs, rng=rng).run(800)
    return frame_of(atoms)


def frame_of(atoms: Atoms) -> Frame:
    return Frame(atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc)


if __name__ == "__main__":
    main(sys.argv[1:])
