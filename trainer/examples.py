"""What is a structure with its label to the trainer, and how do several become the block of a step?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potential.aev import AEVParameters
from shards.reader import Batch
from trainer.descriptors import Block, Geometry, join, with_jacobian
from trainer.loss import References

__all__ = ["Example", "join_examples", "make_examples"]


@dataclass(frozen=True)
class Example:
    """One structure with its label: energy less self energies, eV; virial = volume * stress, eV; NaN where unknown."""

    geometry: Geometry
    energy: float
    forces: Tensor  # (n, 3), eV/A
    virial: Tensor  # (6,), xx yy zz yz xz xy
    volume: float  # A^3

    def with_jacobian(self, p: AEVParameters) -> Example:
        known = bool(self.virial.isfinite().any())
        return replace(self, geometry=with_jacobian(self.geometry, p, virial_known=known))


def make_examples(batch: Batch, energy: NDArray[np.float64], geometries: Sequence[Geometry]) -> list[Example]:
    """energy: (B,), eV, less the self energies."""
    volume = np.abs(np.linalg.det(batch.cell))
    virial = volume[:, None] * batch.stress[:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    virial[~batch.pbc.all(axis=1)] = np.nan  # the cell has no volume that the stress could refer to
    device, dtype = geometries[0].aev.device, geometries[0].aev.dtype
    forces = torch.from_numpy(batch.forces).to(device, dtype).split(np.diff(batch.offset).tolist())
    virials = torch.from_numpy(virial).to(device, dtype).unbind()
    return [Example(*row) for row in zip(geometries, energy.tolist(), forces, virials, volume.tolist(), strict=True)]


def join_examples(examples: Sequence[Example], p: AEVParameters) -> tuple[Block, References]:
    block = join([example.geometry for example in examples], p)
    truth = References(
        energy=block.seen.aev.new_tensor([example.energy for example in examples]),
        forces=torch.cat([example.forces for example in examples]),
        virial=torch.stack([example.virial for example in examples]),
        volume=block.seen.aev.new_tensor([example.volume or 1.0 for example in examples]),
        n_atoms=block.n_atoms,
        frame_of_atom=block.frame_of_atom,
    )
    return block, truth
