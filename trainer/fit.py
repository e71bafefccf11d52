"""How does a committee learn? Epoch by epoch, every member at its own pace, all ranks in step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import read_checkpoint, write_checkpoint
from trainer.config import TrainerSettings
from trainer.folds import TEST, VALID
from trainer.loss import COLUMNS, compare, errors_of, mean_loss, summarise
from trainer.metrics import Monitor
from trainer.optimiser import Adam, Plateau
from trainer.problem import Problem
from trainer.step import Steps, weights_of
from trainer.world import World

__all__ = ["Fitted", "NotFiniteError", "State", "fit", "role_sums"]

log = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """The loss of a member became infinite or NaN."""


@dataclass
class State:
    """All that a training is, between two epochs. Arrays are (n_members, n_parameters)."""

    parameters: Tensor
    best: Tensor
    adam: Adam
    plateau: Plateau
    epoch: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, parameters: Tensor, settings: TrainerSettings) -> State:
        return cls(
            parameters.clone(),
            parameters.clone(),
            Adam.like(parameters),
            Plateau.start(
                len(parameters),
                settings.learning_rate,
                settings.factor,
                settings.patience,
                settings.min_learning_rate,
            ),
        )

    def save(self, path: Path, job: str) -> None:
        tensors = {
            "parameters": self.parameters,
            "best": self.best,
            "first": self.adam.first,
            "second": self.adam.second,
        }
        table = {"job": job, "epoch": self.epoch, "seconds": self.seconds, "step": self.adam.step}
        write_checkpoint(path, tensors, table | {"plateau": self.plateau.state()})

    def restore(self, path: Path, job: str) -> bool:
        """Take the state of an interrupted training; False when there is none of this job."""
        found = read_checkpoint(path, job)
        if found is None:
            return False
        tensors, table = found
        tensors = {name: tensor.to(self.parameters.device) for name, tensor in tensors.items()}
        self.parameters, self.best = tensors["parameters"], tensors["best"]
        self.adam = Adam(tensors["first"], tensors["second"], table["step"])
        self.plateau.restore(table["plateau"])
        self.epoch, self.seconds = table["epoch"], table["seconds"]
        return True


@dataclass(frozen=True)
class Fitted:
    """How a training ended. finished: False when it was stopped from outside and can be resumed."""

    finished: bool
    state: State
    valid: dict[str, list[float | None]]  # errors of each member's best weights on its validation frames
    test: dict[str, list[float | None]]


def fit(
    problem: Problem,
    parameters: Tensor,
    world: World,
    *,
    seed: int,
    folder: Path,
    job: str,
    stop: Callable[[], bool],
    factors: Tensor | None = None,
) -> Fitted:
    """Train until every member is finished, a limit is reached or `stop()` is true on some rank.

    factors: (n_parameters,), on the learning rate; 0 freezes.

    Raises:
        NotFiniteError: on all ranks alike.
    """
    checkpoint, settings = folder / "checkpoint.safetensors", problem.settings
    state = State.start(parameters, settings)
    if state.restore(checkpoint, job):
        log.info("resumed after epoch %d", state.epoch - 1)
    _same_everywhere(state.epoch, world)
    monitor = Monitor(folder, state.epoch, settings.max_epochs) if world.rank == 0 else None
    saved = time.perf_counter()
    began = saved - state.seconds
    steps = Steps(problem, state.parameters)
    going = state.epoch < settings.max_epochs and not state.plateau.finished
    stopped = False
    while going:
        row, stopped = _epoch(problem, steps, state, world, seed, stop, began, factors)
        going = not (stopped or state.plateau.finished or state.epoch >= settings.max_epochs)
        going = going and not 0 < settings.max_minutes * 60 <= state.seconds
        if monitor is not None:
            monitor.record(row)
            if not going or time.perf_counter() - saved >= settings.checkpoint_every_s:
                state.save(checkpoint, job)
                saved = time.perf_counter()
    if monitor is not None:
        monitor.close()
    sums = torch.stack([role_sums(problem, state.best, role) for role in (VALID, TEST)]).cpu()
    world.add_up(sums, "final")
    return Fitted(not stopped, state, summarise(sums[0]), summarise(sums[1]))


def role_sums(problem: Problem, parameters: Tensor, role: int) -> Tensor:
    """Return this rank's part of each member's sums, (M, 8), over the frames in which it has `role`.

    Borrowed forces are no part of the loss here: what is best is decided by the labels' own level.
    """
    weights = weights_of(problem.settings)
    if problem.dataset.borrowed:
        weights = replace(weights, force=0.0)
    sums = parameters.new_zeros(len(parameters), len(COLUMNS), dtype=torch.float64)
    for member, roles in enumerate(problem.roles):
        structures = torch.nonzero(roles == role).squeeze(1).numpy()
        for part, block, truth in problem.blocks(problem.mine(structures), alone=True):
            energies, g, _ = problem.networks.forward(parameters[member, None], block.seen)
            energy = energies.new_zeros(1, len(part)).index_add_(1, block.frame_of_atom, energies)
            errors = errors_of(*block.project(g), truth, weights)
            sums[member] += compare([(energy, errors, truth)], weights).sum((0, 1), dtype=torch.float64)
    return sums


def _epoch(
    problem: Problem,
    steps: Steps,
    state: State,
    world: World,
    seed: int,
    stop: Callable[[], bool],
    began: float,
    factors: Tensor | None,
) -> tuple[dict[str, Any], bool]:
    """Advance `state` by one epoch; return its row of metrics and whether some rank was asked to stop."""
    rates = torch.tensor(state.plateau.rates, dtype=torch.float64, device=state.parameters.device)
    for structures in problem.epoch(seed, state.epoch):
        gradient = steps.gradient(structures)
        world.add_up(gradient, "gradient")
        state.adam.update(state.parameters, gradient, rates, factors)
    train = steps.errors()
    valid = role_sums(problem, state.parameters, VALID)
    # One message for all that ranks decide on: whoever decides from it decides alike.
    signals = torch.tensor(
        [[float(stop()), time.perf_counter() - began if world.rank == 0 else 0.0]], dtype=torch.float64
    )
    message = torch.cat([train.flatten().cpu(), valid.flatten().cpu(), signals.flatten()])
    world.add_up(message, "epoch")
    train, valid = message[: train.numel()].view_as(train), message[train.numel() : -2].view_as(valid)
    row: dict[str, Any] = {"epoch": state.epoch, "rates": list(state.plateau.rates), "seconds": float(message[-1])}
    row |= {"train": summarise(train), "valid": summarise(valid)}
    losses = mean_loss(valid)
    _check_finite(state.epoch, train=mean_loss(train), valid=losses)
    improved, _ = state.plateau.observe(state.epoch, losses)
    state.best[improved] = state.parameters[improved]
    state.epoch, state.seconds = state.epoch + 1, row["seconds"]
    return row, bool(message[-2] > 0)


def _check_finite(epoch: int, **losses: list[float]) -> None:
    for phase, values in losses.items():
        bad = [k for k, loss in enumerate(values) if not math.isfinite(loss)]
        if bad:
            raise NotFiniteError(
                f"epoch {epoch}: the {phase} loss of member {', '.join(map(str, bad))} is not finite:"
                " lower trainer.learning_rate, or look for bad labels"
            )


def _same_everywhere(epoch: int, world: World) -> None:
    """Raises RuntimeError on all ranks when they do not resume from the same epoch (a stale file system)."""
    epochs = torch.zeros(world.n_ranks, dtype=torch.float64)
    epochs[world.rank] = epoch
    world.add_up(epochs, "resume")
    if (epochs != epoch).any():
        raise RuntimeError(f"ranks resume from different epochs: {epochs.tolist()}")
