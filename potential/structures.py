"""How does a batch of frames lie in memory as tensors? Ragged: atoms of all frames joined, one row per frame beside."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase.data import atomic_numbers
from numpy.typing import NDArray

from shards.frame import Frame
from shards.reader import Batch

__all__ = ["Structures", "UnknownElementError", "complete_cells"]


class UnknownElementError(ValueError):
    """A frame holds an element that the committee has no network for."""


@dataclass(frozen=True)
class Structures:
    """Hold B frames with N atoms in all. Atoms of one frame are contiguous, frames in order.

    species: (N,), index into the committee's elements. positions: (N, 3), A, need not lie inside the cell.
    cell: (B, 3, 3), A. pbc: (B, 3). frame_of_atom: (N,). n_atoms: (B,).
    """

    species: torch.Tensor
    positions: torch.Tensor
    cell: torch.Tensor
    pbc: torch.Tensor
    frame_of_atom: torch.Tensor
    n_atoms: torch.Tensor

    @classmethod
    def from_frames(
        cls,
        frames: Sequence[Frame],
        elements: Sequence[str],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Structures:
        """Raises UnknownElementError when a frame holds an element that is not among `elements`."""
        n_atoms = torch.tensor([frame.n_atoms for frame in frames], dtype=torch.int64)
        numbers = np.concatenate([frame.numbers for frame in frames])
        return cls(
            species=torch.from_numpy(_species(numbers, elements)).to(device),
            positions=torch.from_numpy(np.concatenate([f.positions for f in frames])).to(device, dtype),
            cell=torch.from_numpy(np.stack([frame.cell for frame in frames])).to(device, dtype),
            pbc=torch.from_numpy(np.stack([frame.pbc for frame in frames])).to(device),
            frame_of_atom=torch.repeat_interleave(n_atoms, output_size=len(numbers)).to(device),
            n_atoms=n_atoms.to(device),
        )

    @classmethod
    def from_batch(cls, batch: Batch, elements: Sequence[str]) -> Structures:
        """In float64, on the CPU. Raises UnknownElementError as `from_frames` does."""
        n_atoms = torch.from_numpy(np.diff(batch.offset))
        return cls(
            species=torch.from_numpy(_species(batch.numbers, elements)),
            positions=torch.from_numpy(batch.positions),
            cell=torch.from_numpy(batch.cell),
            pbc=torch.from_numpy(batch.pbc),
            frame_of_atom=torch.repeat_interleave(n_atoms),
            n_atoms=n_atoms,
        )

    @property
    def n_frames(self) -> int:
        return len(self.n_atoms)

    @functools.cached_property
    def first_atom(self) -> torch.Tensor:
        """(B + 1,): atoms of frame b are first_atom[b] .. first_atom[b + 1]."""
        return torch.nn.functional.pad(self.n_atoms.cumsum(0), (1, 0))

    @functools.cached_property
    def atoms_by_species(self) -> tuple[torch.Tensor, ...]:
        """For each species up to the last that is there, (n,): its atoms in order."""
        counts: list[int] = torch.bincount(self.species).tolist()
        pieces: tuple[torch.Tensor, ...] = self.species.argsort(stable=True).split(counts)
        return pieces

    @property
    def volume(self) -> torch.Tensor:
        """(B,), A^3; zero where the cell does not span space."""
        volume: torch.Tensor = torch.linalg.det(self.cell).abs()
        return volume

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Structures:
        return replace(
            self,
            species=self.species.to(device=device),
            positions=self.positions.to(dtype=dtype, device=device),
            cell=self.cell.to(dtype=dtype, device=device),
            pbc=self.pbc.to(device=device),
            frame_of_atom=self.frame_of_atom.to(device=device),
            n_atoms=self.n_atoms.to(device=device),
        )


def complete_cells(structures: Structures) -> torch.Tensor:
    """(B, 3, 3), A, float64: the cells, with orthonormal vectors along axes that are not periodic."""
    cells = structures.cell.double()
    free = ~structures.pbc
    if not free.any():
        return cells
    # With lattice rows L (zero where free), the complement of their span is spanned by the last singular vectors.
    lattice = cells * structures.pbc[:, :, None]
    _, _, basis = torch.linalg.svd(lattice)
    n_periodic = structures.pbc.sum(1, keepdim=True)
    # k-th free axis takes basis vector n_periodic + k, the first ones spanning the lattice.
    rank = torch.where(free, n_periodic + free.long().cumsum(1) - 1, 0)
    unit = torch.gather(basis, 1, rank[:, :, None].expand(-1, -1, 3))
    return torch.where(free[:, :, None], unit, cells)


def _species(numbers: NDArray[np.int64] | NDArray[np.uint8], elements: Sequence[str]) -> np.ndarray:
    table = np.full(max(atomic_numbers.values()) + 1, -1, dtype=np.int64)
    table[[atomic_numbers[symbol] for symbol in elements]] = np.arange(len(elements))
    species = table[numbers]
    if (species < 0).any():
        symbols = {number: symbol for symbol, number in atomic_numbers.items()}
        missing = ", ".join(symbols[int(number)] for number in np.unique(numbers[species < 0]))
        raise UnknownElementError(f"no network for {missing}: this committee knows {', '.join(elements)}")
    return species
