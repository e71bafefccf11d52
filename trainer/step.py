"""What is the gradient of the loss in a step? Block after block, or recorded once and repeated where a GPU does it."""

from __future__ import annotations

import torch
from numpy import int64
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import TrainerSettings
from trainer.descriptors import Block
from trainer.loss import COLUMNS, References, Weights, compare
from trainer.networks import Networks, Tape
from trainer.problem import Problem
from trainer.recorded import Recorded
from trainer.room import Room

__all__ = ["Steps", "step_gradient", "weights_of"]


class Steps:
    """Steps on some parameters, which are moved in place in between."""

    def __init__(self, problem: Problem, parameters: Tensor) -> None:
        self._problem = problem
        self._sums = _Sums(problem.networks, weights_of(problem.settings), parameters)
        self._recorded: Recorded | None = problem.record(self._sums.set_to)

    def gradient(self, structures: NDArray[int64]) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the gradient (M, P), and of the sums (M, 8), of a step over `structures`.

        The loss of a member is the mean over those of all ranks' structures that it trains on. The next call writes
        over what is returned.
        """
        problem, sums = self._problem, self._sums
        own = problem.mine(structures)
        if self._recorded is not None and self._recorded.holds(structures, own):
            self._recorded.run(structures, own)
            return sums.gradient, sums.errors
        sums.clear()
        share = problem.share(structures)
        for part, block, truth in problem.blocks(own):
            sums.add(block, truth, problem.learns[:, part], share)
        return sums.gradient, sums.errors


def step_gradient(problem: Problem, parameters: Tensor, structures: NDArray[int64]) -> tuple[Tensor, Tensor]:
    """Of a single step, what Steps.gradient returns."""
    return Steps(problem, parameters).gradient(structures)


def weights_of(settings: TrainerSettings) -> Weights:
    return Weights(settings.energy_weight, settings.force_weight, settings.stress_weight, settings.force_cap_eV_per_A)


class _Sums:
    """gradient: (M, P). errors: (M, 8), COLUMNS. Of the blocks that were added."""

    def __init__(self, networks: Networks, weights: Weights, parameters: Tensor) -> None:
        self._networks, self._weights, self._parameters = networks, weights, parameters
        self.gradient = torch.zeros_like(parameters)
        self.errors = parameters.new_zeros(len(parameters), len(COLUMNS), dtype=torch.float64)
        self._tape: Tape | None = None
        self._room_of_g, self._room_of_v = Room(), Room()

    def clear(self) -> None:
        self.gradient.zero_()
        self.errors.zero_()

    def set_to(self, block: Block, truth: References, learns: Tensor, share: Tensor) -> None:
        self.clear()
        self.add(block, truth, learns, share)

    def add(self, block: Block, truth: References, learns: Tensor, share: Tensor) -> None:
        """learns: (M, B), which member learns from which structure. share: (M,), of one structure in the loss."""
        room = self._room_of_g.take((len(self._parameters), *block.aev.shape), block.aev)
        energies, g, tape = self._networks.forward(self._parameters, block.aev, block.elements, self._tape, room)
        energy = energies.new_zeros(learns.shape).index_add_(1, block.frame_of_atom, energies)
        scale = learns * share[:, None]
        of_forces, v = block.respond(g, truth, self._weights, scale, self._room_of_v.take(g.shape, g))
        errors = compare(energy, of_forces, truth, self._weights)
        self.errors += (errors.sums * learns[:, :, None]).sum(1, dtype=torch.float64)
        by_energy = (errors.by_energy * scale)[:, block.frame_of_atom]
        self._networks.gradient(self._parameters, tape, by_energy, v, self.gradient)
        self._tape = None if g.is_cuda else tape  # CUDA's allocator keeps memory, and a recording its own
