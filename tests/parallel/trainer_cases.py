"""Labeled frames and small committees that the trainer's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT

from potential.config import PotentialSettings
from shards import Frame, Label, Level, Manifest, Origin, write_labels

SMALL = PotentialSettings(
    radial_cutoff_A=5.0,
    angular_cutoff_A=3.5,
    n_radial=8,
    n_angular_radial=4,
    n_angular=4,
    hidden=(16, 8),
    n_members=4,
)


def emt_rows(n: int, seed: int = 0, elements: Sequence[str] = ("Al",)) -> list[tuple[Frame, Label]]:
    """Rattled, strained fcc cells of 8 to 16 atoms with EMT energies, forces and stress."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        atoms = bulk("Al", "fcc", a=3.95 * rng.uniform(0.97, 1.05), cubic=True)
        atoms = atoms.repeat([(2, 1, 1), (1, 3, 1), (2, 1, 2)][rng.integers(3)])
        atoms.symbols = list(rng.choice(list(elements), size=len(atoms)))
        atoms.rattle(rng.uniform(0.05, 0.25), rng=rng)
        atoms.calc = EMT()
        frame = Frame(
            atoms.numbers, atoms.positions, atoms.cell[:], atoms.pbc, origin=Origin("walker", trigger="energy")
        )
        rows.append((frame, Label(atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False))))
    return rows


def write_manifest(folder: Path, rows: Sequence[tuple[Frame, Label]], level: str = "1") -> Path:
    """Write `rows` as one more shard of the manifest in `folder`."""
    folder.mkdir(exist_ok=True)
    manifest = Manifest(folder / "manifest.jsonl")
    path = folder / f"{len(manifest.receipts())}.h5"
    manifest.append(write_labels(path, Level("emt", level), rows))
    return manifest.path
