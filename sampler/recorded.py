"""How does a GPU take the steps between two checks without a word from its host for every launch?

One step is recorded as a CUDA graph, and repeated. Whether it may be taken is decided on the device: when the list of
neighbours does not hold any more, or a force is out of bounds, steps change nothing from there on. The host looks one
step behind, so that the device never waits for it, and finishes the step that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from potential.neighbours import Neighbours, SkinList
from sampler.batch import Batch

__all__ = ["Halt", "RecordedSteps", "worth_recording"]

MOST_ATOMS = 131_072  # of a batch: more keep a GPU busy for longer than their launches take
ROOM = 1.15  # for pairs, in terms of those that there are


def worth_recording(batch: Batch) -> bool:
    return batch.cell.device.type == "cuda" and len(batch.positions) <= MOST_ATOMS


class Halt(Enum):
    """What a step needs the host for: atoms are where the list does not hold, or no forces have acted yet."""

    OUTDATED = 1
    BLOWN = 2


class RecordedSteps:
    """Steps of one batch. On other devices than a GPU the same is done launch by launch, for tests.

    drift: as potential.kernels.drift, from a batch and the numbers of its steps, (B,). forces: the mean forces, (N, 3),
    eV/A, with a list that may have room for more pairs. push: velocity per force over mass. former: a recording that
    is not needed any more, whose memory this one uses.
    """

    def __init__(
        self,
        batch: Batch,
        pairs: SkinList,
        drift: Callable[[Batch, Tensor], None],
        forces: Callable[[Batch, Neighbours], Tensor],
        push: float,
        max_force_eV_A: float,
        former: RecordedSteps | None = None,
    ) -> None:
        self.batch = batch
        self._drift, self._forces, self._push, self._limit = drift, forces, push, max_force_eV_A
        self._pool = former._graph.pool() if former and former._graph else None
        found = pairs.neighbours
        room = int(ROOM * len(found.other)) + 1
        self._listed = Neighbours(
            found.centre.new_zeros(0), found.other.new_zeros(room), found.shift.new_zeros(room, 3), found.row.clone()
        )
        self._carried, self._slack = torch.empty_like(batch.positions), torch.empty_like(batch.positions[:, 0])
        self._steps = torch.zeros_like(batch.noise_key)
        # Steps that were taken; whether the list does not hold, and whether a force is out of bounds.
        self._state = torch.zeros(3, dtype=torch.int64, device=batch.cell.device)
        self._on_gpu = batch.cell.device.type == "cuda"
        self._seen = torch.zeros(3, dtype=torch.int64, pin_memory=self._on_gpu)
        self._graph: torch.cuda.CUDAGraph | None = None

    def follow(self, pairs: SkinList) -> bool:
        """Take the list of `pairs` over, which holds now, until atoms are too far from here; False: it is too long."""
        found, n_pairs = pairs.neighbours, len(pairs.neighbours.other)
        if n_pairs > len(self._listed.other):
            return False
        self._listed.row.copy_(found.row)
        self._listed.other[:n_pairs] = found.other
        self._listed.shift[:n_pairs] = found.shift
        carried, slack = pairs.bounds(self.batch.structures)
        self._carried.copy_(carried)
        self._slack.copy_(slack.index_select(0, self.batch.frame_of_atom))
        return True

    def run(self, steps: Tensor, n: int) -> tuple[int, Halt | None]:
        """Take n steps, or as many as the host is not needed for; steps: (B,), how many were, counted on.

        A step that halts is counted in `steps`, as one whose atoms have moved, and not in what is returned.
        """
        self._steps.copy_(steps)
        self._state.zero_()
        self._seen.zero_()  # what a former run came to
        with torch.cuda.device_of(self.batch.cell):
            self._repeat(n)
        steps.copy_(self._steps)
        taken, *halted = self._seen.tolist()
        return taken, next((halt for halt, now in zip(Halt, halted, strict=True) if now), None)

    def _repeat(self, n: int) -> None:
        if self._graph is None:
            self._step()  # once beforehand, so that programs are compiled and libraries loaded
            n -= 1
            if self._on_gpu:
                self._graph = self._record()
        if self._graph is None:
            while n > 0 and not self._seen[1:].any():
                self._step()
                n -= 1
            return
        ends = torch.cuda.Event(), torch.cuda.Event()
        for number in range(n):
            self._graph.replay()
            ends[number % 2].record()
            ends[(number + 1) % 2].synchronize()  # the end of the step before
            if self._seen[1:].any():
                break
        torch.cuda.current_stream().synchronize()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            graph.capture_begin(self._pool)
            self._step()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(aside)
        return graph

    def _step(self) -> None:
        """Nothing here waits for the device, and nothing depends on what is there but the values themselves."""
        batch, (taken, outdated, blown) = self.batch, self._state
        positions, velocities = batch.positions, batch.velocities
        going = ~self._state[1:].any()
        before = positions.clone(), velocities.clone()
        self._drift(batch, self._steps.add_(going))
        for moving, old in zip((positions, velocities), before, strict=True):
            moving.copy_(torch.where(going, moving, old))
        here = (2 * (positions - self._carried).norm(dim=1) <= self._slack).all()  # not so where an atom is nowhere
        outdated |= going & ~here
        going = going & here
        batch.forces.copy_(torch.where(going, self._forces(batch, self._listed), batch.forces))
        sound = batch.forces.abs().amax() <= self._limit
        blown |= going & ~sound
        going = going & sound
        kicked = velocities + self._push * batch.forces * batch.inverse_mass
        velocities.copy_(torch.where(going, kicked, velocities))
        taken += going
        self._seen.copy_(self._state, non_blocking=True)
