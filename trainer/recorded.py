"""How does a GPU do a step without a word from its host for every launch?

The step is recorded once, as a CUDA graph, for a block that is filled up to the size of the largest: then only the
numbers of its structures change. On other devices the same is done launch by launch, for tests.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.descriptors import Block
from trainer.loss import References
from trainer.resident import Resident, Size

__all__ = ["Recorded", "Step"]

# From a block, its labels, and who learns from each of its structures, at which share: (M, B), (M,).
Step = Callable[[Block, References, Tensor, Tensor], None]


class Recorded:
    """A step over structures of one rank.

    learns: (M, n), which member learns from which structure. n_structures: of a step, at most. size: of its blocks.
    step: leaves what it makes of a block, and of nothing else, always in the same tensors.
    """

    def __init__(
        self, resident: Resident, learns: Tensor, n_structures: int, size: Size, step: Step, dtype: torch.dtype
    ) -> None:
        self._resident, self._size, self._step, self._dtype = resident, size, step, dtype
        self._missing = learns.shape[1]
        self._learns = torch.nn.functional.pad(learns, (0, 1))
        places = resident.places(np.arange(self._missing))
        places = np.append(places, len(resident.counts) - 1)
        self._place = torch.from_numpy(places).to(learns.device)
        # The last one stands for what is missing.
        self._all = torch.full((n_structures,), self._missing, device=learns.device)
        self._own = torch.full((n_structures + 1,), self._missing, device=learns.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def holds(self, structures: NDArray[np.int64], own: NDArray[np.int64]) -> bool:
        """Whether there is room for these: for those of any step of an epoch."""
        missing = len(self._own) - len(own)
        counts = self._resident.counts[self._resident.places(own)].sum(0)
        limit = (self._size.n_atoms - missing, self._size.n_pairs, *self._size.n_of_element)
        counts[2] += missing  # each has one atom of the first element
        return len(structures) <= len(self._all) and len(own) < len(self._own) and bool((counts <= limit).all())

    def run(self, structures: NDArray[np.int64], own: NDArray[np.int64]) -> None:
        """Do the step over `structures`, of which this rank has `own`."""
        for slots, numbers in ((self._all, structures), (self._own, own)):
            filled = np.full(len(slots), self._missing)
            filled[: len(numbers)] = numbers
            slots.copy_(torch.from_numpy(filled), non_blocking=True)
        if self._own.device.type != "cuda":
            self._do()
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _do(self) -> None:
        share = 1 / self._learns.index_select(1, self._all).sum(1).clamp(min=1).to(self._dtype)
        learns = self._learns.index_select(1, self._own)
        block, truth = self._resident.join(self._place.index_select(0, self._own), self._size, fill=True)
        self._step(block, truth, learns, share)

    def _record(self) -> torch.cuda.CUDAGraph:
        """Once beforehand, so that programs are compiled and libraries loaded."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._do()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._do()
        return graph
