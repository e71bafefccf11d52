"""What is in a shard, in which unit and shape? The one table that writer, reader and documentation follow.

Inside the project lengths are in angstrom, energies in eV, times in fs, masses in amu, temperatures in K, charges
in elementary charges. Rows of a cell are the lattice vectors. stress = (1/V) dE/dstrain in eV/A^3, tension
positive, as a symmetric (3, 3) matrix: ASE's sign. A foreign unit is converted where it enters, with the
constants below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BOHR_A",
    "COLUMNS",
    "FORMAT",
    "FRAMES",
    "INGREDIENT",
    "LABELS",
    "PARTIAL_SUFFIX",
    "VERSION",
    "AMU_A3_g_cm3",
    "AMU_eV_fs2_A2",
    "BOLTZMANN_eV_K",
    "Column",
    "EV_A3_GPa",
    "HARTREE_eV",
    "KCAL_MOL_eV",
    "canonical_json",
    "columns_of",
    "content_digest",
    "data_digest",
]

# CODATA 2018, https://physics.nist.gov/cuu/Constants/ (E. Tiesinga et al., doi:10.1103/RevModPhys.93.025010).
HARTREE_eV: Final = 27.211386245988
BOHR_A: Final = 0.529177210903
_ELEMENTARY_CHARGE_C: Final = 1.602176634e-19  # exact
_ATOMIC_MASS_kg: Final = 1.66053906660e-27
BOLTZMANN_eV_K: Final = 1.380649e-23 / _ELEMENTARY_CHARGE_C  # both exact
KCAL_MOL_eV: Final = 4184.0 / (6.02214076e23 * _ELEMENTARY_CHARGE_C)  # thermochemical calorie: 4.184 J
AMU_eV_fs2_A2: Final = _ATOMIC_MASS_kg * 1e10 / _ELEMENTARY_CHARGE_C  # 1 amu (A/fs)^2 in eV
AMU_A3_g_cm3: Final = _ATOMIC_MASS_kg * 1e27  # 1 amu/A^3 in g/cm^3
EV_A3_GPa: Final = _ELEMENTARY_CHARGE_C * 1e21  # 1 eV/A^3 in GPa

FORMAT: Final = "smelt-shard"
# 2: labels with ingredients. Shards without are written as version 1, which every release reads.
VERSION: Final = 2
FRAMES: Final = "frames"
LABELS: Final = "labels"
INGREDIENT: Final = "ingredient"
PARTIAL_SUFFIX: Final = ".partial"

_BOTH = (FRAMES, LABELS)


@dataclass(frozen=True)
class Column:
    """One dataset. In `shape`, n_frames and n_atoms (of the whole shard) stand for themselves."""

    path: str
    dtype: str  # little-endian; "S" is UTF-8 text, as wide as the longest value
    shape: tuple[str | int, ...]
    unit: str
    meaning: str
    kinds: tuple[str, ...] = _BOTH

    def dimensions(self, n_frames: int, n_atoms: int) -> tuple[int, ...]:
        """`shape` in numbers, for a shard of this size."""
        sizes = {"n_frames": n_frames, "n_frames + 1": n_frames + 1, "n_atoms": n_atoms}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


# Positions and forces of labels stand side by side in one dataset: they are read together, and one gather instead
# of two doubles the rate of random batches (benchmarks/batches.py).
COLUMNS: Final = (
    Column("offset", "<i8", ("n_frames + 1",), "1", "atoms of frame i are offset[i]:offset[i + 1]"),
    Column("id", "|u1", ("n_frames", 16), "1", "frame id: 16 bytes of sha256 over its species, positions, cell, pbc"),
    Column("number", "|u1", ("n_atoms",), "1", "atomic number"),
    Column("position", "<f8", ("n_atoms", 3), "A", "cartesian positions", (FRAMES,)),
    Column("position_force", "<f8", ("n_atoms", 6), "A, eV/A", "x y z, then Fx Fy Fz; NaN: not computed", (LABELS,)),
    Column("cell", "<f8", ("n_frames", 3, 3), "A", "lattice vectors as rows, zero where there is none"),
    Column("pbc", "|u1", ("n_frames", 3), "1", "1 where the axis is periodic"),
    Column("charge", "<i8", ("n_frames",), "e", "total charge"),
    Column("spin", "<i8", ("n_frames",), "1", "unpaired electrons, 2S"),
    Column("origin/kind", "S", ("n_frames",), "", "bootstrap, walker or external"),
    Column("origin/seed", "<u8", ("n_frames",), "1", "seed of the builder or walker"),
    Column("origin/model", "S", ("n_frames",), "", "digest of the committee that drove the walker"),
    Column("origin/trigger", "S", ("n_frames",), "", "what stopped the walker"),
    Column("origin/time_fs", "<f8", ("n_frames",), "fs", "simulated time at which the walker stopped"),
    Column("origin/energy_spread", "<f8", ("n_frames",), "eV", "committee std of the energy / sqrt(atoms); NaN: none"),
    Column("origin/force_spread", "<f8", ("n_frames",), "eV/A", "mean committee std of force components; NaN: none"),
    Column("energy", "<f8", ("n_frames",), "eV", "the energy whose negative gradient the forces are", (LABELS,)),
    Column("stress", "<f8", ("n_frames", 3, 3), "eV/A^3", "dE/dstrain / V, tension > 0; NaN: not computed", (LABELS,)),
    Column("energy_extrapolated", "<f8", ("n_frames",), "eV", "energy at zero smearing; NaN: not computed", (LABELS,)),
    Column("seconds", "<f8", ("n_frames",), "s", "wall time of the calculation", (LABELS,)),
    Column("host", "S", ("n_frames",), "", "where it was calculated", (LABELS,)),
    Column("scf_steps", "<i8", ("n_frames",), "1", "self-consistency steps; 0: not applicable", (LABELS,)),
)


def columns_of(kind: str, ingredients: Iterable[str] = ()) -> tuple[Column, ...]:
    """Columns that a shard of this kind has, whose labels have ingredients of these names."""
    named = (
        Column(f"{INGREDIENT}/{name}", "<f8", ("n_frames",), "eV", "what the energy is put together from", (LABELS,))
        for name in ingredients
    )
    return (*(column for column in COLUMNS if kind in column.kinds), *named)


def canonical_json(value: Any) -> str:
    """Spell a JSON value in one way only, so that equal values have equal digests.

    Raises:
        ValueError: NaN or infinity. TypeError: a value that is not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def data_digest(array: NDArray[Any]) -> str:
    """sha256 of the bytes of one dataset, in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data).hexdigest()


def content_digest(kind: str, version: int, level: str, datasets: Mapping[str, tuple[str, str, str]]) -> str:
    """sha256 over all that a shard says; `datasets`: path -> (dtype with shape, unit, data digest)."""
    rows = sorted((path, *row) for path, row in datasets.items())
    return hashlib.sha256(canonical_json([FORMAT, version, kind, level, rows]).encode()).hexdigest()
