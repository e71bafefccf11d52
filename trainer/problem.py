"""What does one rank hold? Its share of the structures with their descriptors and labels, and who learns from which."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potential.aev import AEVParameters
from shards.frame import Frame
from shards.label import Label
from trainer.batches import Windows
from trainer.config import TrainerSettings
from trainer.dataset import Dataset
from trainer.descriptors import Block, Geometry, describe, jacobian_bytes, join, with_jacobian
from trainer.folds import TRAIN, assign_blocks, member_roles
from trainer.loss import References
from trainer.networks import Networks

__all__ = ["Example", "Problem", "make_example", "references"]

log = logging.getLogger(__name__)
# The kernels cut atoms into blocks of their own; longer joints only save calls, and cost memory.
ATOMS_PER_BLOCK = 512


@dataclass(frozen=True)
class Example:
    """One structure with its label: energy less self energies, eV; virial = volume * stress, eV; NaN where unknown."""

    geometry: Geometry
    energy: float
    target: Tensor  # (3n + 6,): forces, eV/A, then the virial, xx yy zz yz xz xy
    volume: float  # A^3


def make_example(frame: Frame, label: Label, geometry: Geometry, self_energy: float) -> Example:
    dtype = geometry.aev.dtype
    virial = frame.volume_A3 * label.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    if not frame.pbc.all():
        virial = np.full(6, np.nan)  # the cell has no volume that the stress could refer to
    return Example(
        geometry,
        label.energy - self_energy,
        torch.tensor(np.concatenate([label.forces.ravel(), virial]), dtype=dtype),
        frame.volume_A3,
    )


def references(examples: Sequence[Example], block: Block) -> References:
    dtype = block.aev.dtype
    return References(
        energy=torch.tensor([example.energy for example in examples], dtype=dtype),
        forces=torch.cat([example.target[:-6] for example in examples]).view(-1, 3),
        virial=torch.stack([example.target[-6:] for example in examples]),
        volume=torch.tensor([example.volume or 1.0 for example in examples], dtype=dtype),
        n_atoms=block.n_atoms,
        frame_of_atom=block.frame_of_atom,
        targets=[example.target for example in examples],
    )


class Problem:
    """The structures of `dataset`, those of `rank` described and in memory.

    roles: (n_members, n), TRAIN, VALID or TEST. learns: the same, 1 where TRAIN, else 0. windows: which structures
    make up a step.
    """

    def __init__(
        self,
        dataset: Dataset,
        self_energies: NDArray[np.float64],
        networks: Networks,
        p: AEVParameters,
        elements: Sequence[str],
        n_members: int,
        settings: TrainerSettings,
        rank: int,
        n_ranks: int,
    ) -> None:
        self.dataset = dataset
        self.networks = networks
        self.settings = settings
        self.windows = Windows(dataset.n_atoms.tolist(), dataset.ids, settings.batch, settings.steps_per_epoch)
        self.roles = torch.from_numpy(member_roles(assign_blocks(dataset.ids), n_members))
        self.learns = (self.roles == TRAIN).to(getattr(torch, settings.dtype))
        self._p = p
        self._rank_of = np.zeros(len(dataset), dtype=np.int64)
        for other in range(n_ranks):
            self._rank_of[self.windows.owned(other, n_ranks)] = other
        self._rank = rank
        self._examples = self._describe(self_energies, elements)

    def mine(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the structures that this rank works on."""
        kept: NDArray[np.int64] = indices[self._rank_of[indices] == self._rank]
        return kept

    def blocks(self, indices: NDArray[np.int64]) -> Iterator[tuple[Tensor, Block, References]]:
        """Join structures of this rank into blocks that fit a core's cache; yield each with its indices."""
        atoms = np.cumsum(self.dataset.n_atoms[indices]) - 1
        for block in np.unique(atoms // ATOMS_PER_BLOCK):
            part = indices[atoms // ATOMS_PER_BLOCK == block]
            examples = [self._examples[int(i)] for i in part]
            joined = join([example.geometry for example in examples], self._p)
            yield torch.from_numpy(part), joined, references(examples, joined)

    def _describe(self, self_energies: NDArray[np.float64], elements: Sequence[str]) -> dict[int, Example]:
        dtype, allowed_GB = getattr(torch, self.settings.dtype), self.settings.jacobian_memory_GB
        start = time.perf_counter()
        size_GB = jacobian_bytes(self.dataset.n_atoms.tolist(), self._p.length, dtype) / 1e9
        keep = size_GB <= allowed_GB
        log.info(
            "%d structures, %d atoms; descriptor derivatives %s: keeping them takes %.3f GB, allowed are %.3f GB",
            len(self.dataset), self.dataset.n_atoms.sum(), "kept" if keep else "recomputed", size_GB, allowed_GB,
        )  # fmt: skip
        examples = {}
        for index in np.flatnonzero(self._rank_of == self._rank):
            frame, label = self.dataset.row(int(index))
            geometry = describe(frame, elements, self._p, dtype)
            geometry = with_jacobian(geometry, self._p) if keep else geometry
            self_energy = float(self.dataset.counts[index] @ self_energies)
            examples[int(index)] = make_example(frame, label, geometry, self_energy)
        log.info("described %d structures in %.1f s", len(examples), time.perf_counter() - start)
        return examples
