"""What is a frame, and when are two frames the same? Knows no file format and no model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Frame", "Origin"]

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Origin:
    """Where a frame came from. None of it enters the frame's identity."""

    kind: str = "external"  # bootstrap | walker | external
    seed: int = 0  # of the builder or the walker that made it
    model: str = ""  # digest of the committee that drove the walker
    trigger: str = ""  # force_mean | force_max | energy | timeout
    time_fs: float = 0.0  # simulated time at which the walker stopped
    energy_spread: float = float("nan")  # std over members of the total energy / sqrt(n_atoms), eV
    force_spread: float = float("nan")  # std over members of the force components, mean over the frame, eV/A


@dataclass(frozen=True, eq=False)
class Frame:
    """Hold one configuration of atoms. Two frames are equal when their ids are.

    numbers: (n_atoms,), atomic numbers. positions: (n_atoms, 3), A. cell: (3, 3), rows are the lattice
    vectors, A, zero where there is none. pbc: (3,). charge: total charge, e. spin: unpaired electrons (2S).

    Raises:
        ValueError: arrays whose shapes do not fit, numbers outside 1..118, values that are not finite, a
            periodic axis without a lattice vector.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3)))
    pbc: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(3, dtype=bool))
    charge: int = 0
    spin: int = 0
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        numbers = _frozen(self.numbers, np.int64)
        positions = _frozen(self.positions, np.float64)
        cell = _frozen(self.cell, np.float64)
        pbc = _frozen(np.broadcast_to(np.asarray(self.pbc), (3,)), np.bool_)
        if numbers.ndim != 1 or len(numbers) == 0 or positions.shape != (len(numbers), 3) or cell.shape != (3, 3):
            raise ValueError(
                f"frame: shapes do not fit: numbers {numbers.shape}, positions {positions.shape}, cell {cell.shape};"
                " expected (n,), (n, 3), (3, 3) with n >= 1"
            )
        if numbers.min() < 1 or numbers.max() > 118:
            raise ValueError(f"frame: atomic numbers {numbers.min()}..{numbers.max()}: must lie in 1..118")
        if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
            raise ValueError("frame: positions and cell must be finite")
        if pbc.any():
            lattice = cell[pbc]
            if np.linalg.matrix_rank(lattice) < len(lattice):
                raise ValueError(
                    f"frame: pbc {pbc.tolist()} needs independent lattice vectors, got cell {cell.tolist()}"
                )
        for name, value in (
            ("numbers", numbers),
            ("positions", positions),
            ("cell", cell),
            ("pbc", pbc),
        ):
            object.__setattr__(self, name, value)

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def id(self) -> str:
        """32 hexadecimal digits over species, positions, cell, pbc, charge and spin, bit by bit."""
        digest = hashlib.sha256(np.array([self.n_atoms, self.charge, self.spin], dtype="<i8").tobytes())
        digest.update(self.numbers.astype("<i8").tobytes())
        # Adding 0.0 turns -0.0 into 0.0, which compares equal and must hash equal.
        digest.update((self.positions + 0.0).astype("<f8").tobytes())
        digest.update((self.cell + 0.0).astype("<f8").tobytes())
        digest.update(self.pbc.astype("u1").tobytes())
        return digest.hexdigest()[:32]

    @property
    def volume_A3(self) -> float:
        """Volume of the cell, A^3; zero when it does not span space."""
        return float(abs(np.linalg.det(self.cell)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


def _frozen(values: ArrayLike, dtype: type[Scalar]) -> NDArray[Scalar]:
    """Copy into a read-only array: a frame never changes after its id was taken."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
