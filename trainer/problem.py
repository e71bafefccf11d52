"""What does a rank work on? Its share of the structures, with descriptors and labels, and who learns from which."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potential.aev import AEVParameters
from potential.structures import Structures
from trainer.batches import Windows
from trainer.config import TrainerSettings
from trainer.dataset import Dataset
from trainer.descriptors import Block, describe, jacobian_numbers
from trainer.examples import Example, join_examples, make_examples
from trainer.folds import TRAIN, assign_blocks, member_roles
from trainer.loss import References
from trainer.memory import Plan, make_plan
from trainer.networks import Networks
from trainer.prefetch import Prefetcher
from trainer.recorded import Recorded, Step
from trainer.resident import Resident, Size

__all__ = ["Problem"]

log = logging.getLogger(__name__)
# The kernels cut atoms into blocks of their own. Against 512, molecules step 1.2 times as fast, 108-atom cells 1.08.
ATOMS_PER_BLOCK = 2048
ATOMS_PER_BLOCK_GPU, ATOMS_PER_BLOCK_GPU_ALONE = 32_768, 131_072  # the latter of a single member
BLOCKS_AHEAD = 4
N_SAMPLED, N_DERIVED, MOST_DERIVED = 64, 4, 128  # structures whose sizes are measured; atoms of the last
OBJECTS_BYTES = 2000  # of the Python objects of a structure with its Jacobian, measured


class Problem:
    """The structures of `dataset`, and of those of `rank` as much in memory as `allowed_GB` has room for.

    roles: (n_members, n), TRAIN, VALID or TEST. learns: the same, true where TRAIN, on the device. windows: which
    structures make up a step. plan: what is kept; the same numbers come out whether structures are kept or streamed.
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
        allowed_GB: float = math.inf,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.dataset = dataset
        self.networks = networks
        self.settings = settings
        self.windows = Windows(dataset.n_atoms, settings.batch, settings.steps_per_epoch)
        self.roles = torch.from_numpy(member_roles(assign_blocks(dataset.keys), n_members))
        self.learns = (self.roles == TRAIN).to(device)
        self._p = p
        self._elements = elements
        self._energy = dataset.energy - dataset.counts @ self_energies
        self._is_mine = np.zeros(len(dataset), dtype=bool)
        own = self.windows.owned(rank, n_ranks)
        self._is_mine[own] = True
        self._coming = Prefetcher(self._block, BLOCKS_AHEAD)
        self._resident: Resident | None = None
        self.plan = self._plan(own, allowed_GB)
        if self.plan.descriptors:
            self._keep(own)

    def mine(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the structures that this rank works on."""
        kept: NDArray[np.int64] = indices[self._is_mine[indices]]
        return kept

    def share(self, structures: NDArray[np.int64]) -> Tensor:
        """(M,): one over the number of these structures that each member learns from."""
        dtype = getattr(torch, self.settings.dtype)
        which = torch.from_numpy(structures).to(self.device)
        return self.learns.index_select(1, which).sum(1, dtype=dtype).clamp_(min=1).reciprocal_()

    def record(self, step: Step) -> Recorded | None:
        """The step as a recording, where structures are kept on a GPU and a block holds those of a step."""
        if self._resident is None or not self._resident.on_gpu:
            return None
        counts = self._resident.counts[self._resident.places(np.arange(len(self.dataset)))]
        n_atoms, n_pairs, first, *others = self.windows.most(counts * self._is_mine[:, None]).tolist()
        if n_atoms > ATOMS_PER_BLOCK_GPU:
            return None
        fillers = self.windows.n_windows + 1  # at most, with one atom of the first element each
        size = Size(n_atoms + fillers, n_pairs, (first + fillers, *others))
        dtype = getattr(torch, self.settings.dtype)
        return Recorded(self._resident, self.learns, self.windows.n_windows, size, step, dtype)

    def epoch(self, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
        """Yield the structures of each step, and begin to read those of the next one where they are streamed."""
        steps = self.windows.epoch(seed, epoch)
        for structures, following in zip_longest(steps, steps[1:]):
            if following is not None and not self.plan.descriptors:
                self._coming.expect(self._cut(self.mine(following)))
            yield structures

    def blocks(self, indices: NDArray[np.int64], *, alone: bool = False) -> Iterator[tuple[Tensor, Block, References]]:
        """Join structures of this rank, as many as fit a core's cache or fill a GPU; yield them with their indices.

        A block is good until the next one is asked for. alone: for a single member, whose blocks may be larger.
        """
        parts = self._cut(indices, ATOMS_PER_BLOCK_GPU_ALONE if alone else ATOMS_PER_BLOCK_GPU)
        return map(self._block, parts) if self.plan.descriptors else self._coming.each(parts)

    def _cut(self, indices: NDArray[np.int64], on_gpu: int = ATOMS_PER_BLOCK_GPU) -> list[NDArray[np.int64]]:
        at_a_time = ATOMS_PER_BLOCK if self.device.type == "cpu" else on_gpu
        n_atoms = self.dataset.n_atoms[indices]
        if n_atoms.sum() <= at_a_time:
            return [indices] if len(indices) else []
        block = (np.cumsum(n_atoms) - 1) // at_a_time
        return np.split(indices, np.flatnonzero(np.diff(block)) + 1)

    def _block(self, part: NDArray[np.int64]) -> tuple[Tensor, Block, References]:
        if self._resident is not None:
            return self._resident.block(part)
        return torch.from_numpy(part), *join_examples(self._examples(part), self._p)

    def _examples(self, part: NDArray[np.int64]) -> list[Example]:
        batch = self.dataset.gather(part)
        structures = Structures.from_batch(batch, self._elements)
        geometries = describe(structures, self._p, getattr(torch, self.settings.dtype), self.device)
        return make_examples(batch, self._energy[part], geometries)

    def _plan(self, own: NDArray[np.int64], allowed_GB: float) -> Plan:
        """Measure what some of the structures take, and decide what of all of them is kept."""
        n_atoms, length = self.dataset.n_atoms, self._p.length
        sample = np.unique(np.linspace(0, len(n_atoms) - 1, N_SAMPLED).astype(np.int64))
        examples = [example for part in self._cut(sample) for example in self._examples(part)]
        n_bytes = sum(
            OBJECTS_BYTES + each.forces.nbytes + each.virial.nbytes + each.geometry.nbytes for each in examples
        )
        per_number = self._jacobian_bytes(examples)
        # A GPU makes derivatives anew in less time than it would read them.
        few_enough = jacobian_numbers(n_atoms, length) * per_number / 1e9 <= self.settings.jacobian_memory_GB
        plan = make_plan(
            int(n_atoms[own].sum()) * n_bytes / max(1, int(n_atoms[sample].sum())) / 1e9,
            jacobian_numbers(n_atoms[own], length) * per_number / 1e9,
            allowed_GB,
            few_enough and self.device.type == "cpu",
        )
        log.info("%d structures, %d atoms; on this rank %d: %s", len(n_atoms), n_atoms.sum(), len(own), plan.reason)
        return plan

    def _jacobian_bytes(self, examples: Sequence[Example]) -> float:
        """Measure what one number of a Jacobian takes: less than its own size where zeros are left out."""
        # Of few and small structures, one at a time: a Jacobian grows with the square of the atoms.
        small = [each for each in examples if len(each.geometry.species) <= MOST_DERIVED]
        small = sorted(small, key=lambda each: len(each.geometry.species))[:N_DERIVED]
        if not small:
            return float(getattr(torch, self.settings.dtype).itemsize)
        kept = (each.with_jacobian(self._p).geometry.jacobian for each in small)
        n_atoms = np.array([len(each.geometry.species) for each in small], dtype=np.int32)
        n_numbers = jacobian_numbers(n_atoms, self._p.length)
        return sum(each.nbytes for each in kept if each is not None) / n_numbers

    def _keep(self, own: NDArray[np.int64]) -> None:
        start = time.perf_counter()
        examples = ((part, self._examples(part)) for part in self._cut(own))
        if self.plan.derivatives:
            examples = ((part, [each.with_jacobian(self._p) for each in found]) for part, found in examples)
        if len(own):
            self._resident = Resident(examples, int(self.dataset.n_atoms[own].sum()), self._p)
        log.info("described %d structures in %.1f s", len(own), time.perf_counter() - start)
