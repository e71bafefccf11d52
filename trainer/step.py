"""What is the gradient of the loss in a step? Block after block, or recorded once and repeated where a GPU does it."""

from __future__ import annotations

import torch
from numpy import int64
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import TrainerSettings
from trainer.descriptors import Block
from trainer.loss import COLUMNS, Predicted, References, Weights, compare, energy_pulls
from trainer.networks import Networks, Tape
from trainer.problem import Problem
from trainer.recorded import Recorded
from trainer.room import Room

__all__ = ["Steps", "step_gradient", "weights_of"]

BLOCKS_COMPARED = 32  # at once: to compare the few numbers of one block takes as long


class Steps:
    """Steps on some parameters, which are moved in place in between."""

    def __init__(self, problem: Problem, parameters: Tensor) -> None:
        self._problem = problem
        self._sums = _Sums(problem.networks, weights_of(problem.settings), parameters)
        self._errors = self._sums.recorded.clone()
        self._recorded: Recorded | None = problem.record(self._sums.set_to)

    def gradient(self, structures: NDArray[int64]) -> Tensor:
        """Return this rank's part of the gradient (M, P) of a step over `structures`.

        The loss of a member is the mean over those of all ranks' structures that it trains on. The next call writes
        over what is returned.
        """
        problem, sums = self._problem, self._sums
        own = problem.mine(structures)
        if self._recorded is not None and self._recorded.holds(structures, own):
            if sums.seen:  # no part of a recording, which compares what it saw itself
                self._errors += sums.compare()
            self._recorded.run(structures, own)
            self._errors += sums.recorded
            return sums.gradient
        if not len(own):
            sums.gradient.zero_()
        share = problem.share(structures)
        for number, (part, block, truth) in enumerate(problem.blocks(own)):
            sums.add(block, truth, problem.learns[:, part], share, first=number == 0)
        if len(sums.seen) >= BLOCKS_COMPARED:
            self._errors += sums.compare()
        return sums.gradient

    def errors(self) -> Tensor:
        """Return the sums (M, 8), COLUMNS, of this rank's structures in all steps since they were asked for."""
        errors = self._errors + self._sums.compare()
        self._errors.zero_()
        return errors


def step_gradient(problem: Problem, parameters: Tensor, structures: NDArray[int64]) -> tuple[Tensor, Tensor]:
    """Return the gradient of a single step, and its sums."""
    steps = Steps(problem, parameters)
    return steps.gradient(structures), steps.errors()


def weights_of(settings: TrainerSettings) -> Weights:
    return Weights(settings.energy_weight, settings.force_weight, settings.stress_weight, settings.force_cap_eV_per_A)


class _Sums:
    """gradient: (M, P), of the blocks of a step. seen: what is to be compared, and (M, B), who learns from it.

    recorded: (M, 8), the sums of the errors of what set_to was called with.
    """

    def __init__(self, networks: Networks, weights: Weights, parameters: Tensor) -> None:
        self._networks, self._weights, self._parameters = networks, weights, parameters
        self.gradient = torch.empty_like(parameters)
        self.seen: list[tuple[Predicted, Tensor]] = []
        self.recorded = parameters.new_zeros(len(parameters), len(COLUMNS), dtype=torch.float64)
        self._tape: Tape | None = None
        self._room = Room()

    def set_to(self, block: Block, truth: References, learns: Tensor, share: Tensor) -> None:
        self.add(block, truth, learns, share, first=True)
        self.recorded.copy_(self.compare())

    def add(self, block: Block, truth: References, learns: Tensor, share: Tensor, *, first: bool) -> None:
        """learns: (M, B), which member learns from which structure. share: (M,), of one structure in the loss."""
        seen = block.seen
        room = self._room.take((len(self._parameters), seen.n_atoms, seen.aev.shape[1]), seen.aev)
        energies, g, tape = self._networks.forward(self._parameters, seen, self._tape, room)
        energy = energies.new_zeros(learns.shape).index_add_(1, block.frame_of_atom, energies)
        scale = learns * share[:, None]
        errors, v = block.respond(g, truth, self._weights, scale)
        by_energy = energy_pulls(energy, truth, self._weights, scale)[:, block.frame_of_atom]
        self._networks.gradient(self._parameters, tape, by_energy, v, self.gradient, add=not first)
        self.seen.append(((energy, errors, truth), learns))
        self._tape = None if g.is_cuda else tape  # CUDA's allocator keeps memory, and a recording its own

    def compare(self) -> Tensor:
        """(M, 8), COLUMNS: sums of the errors of what was seen since the last call."""
        if not self.seen:
            return torch.zeros_like(self.recorded)
        predicted, learns = zip(*self.seen, strict=True)
        self.seen.clear()
        return (compare(predicted, self._weights) * torch.cat(learns, 1)[:, :, None]).sum(1, dtype=torch.float64)
