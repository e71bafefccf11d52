"""How do the members' weights move, each at its own pace? Pure arithmetic on stacked arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Adam", "Plateau"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class Adam:
    """Adam (arXiv:1412.6980) on parameters (n_members, n_parameters) with one learning rate per member."""

    first: Tensor
    second: Tensor
    step: int = 0

    @classmethod
    def like(cls, parameters: Tensor) -> Adam:
        return cls(torch.zeros_like(parameters), torch.zeros_like(parameters))

    def update(self, parameters: Tensor, gradient: Tensor, rates: Tensor, factors: Tensor | None = None) -> None:
        """Move `parameters` in place; rates: (n_members,), a member of rate 0 stays where it is.

        factors: (n_parameters,), multiply the rates; a parameter of factor 0 stays as it is, bit by bit.
        """
        self.step += 1
        if factors is None and parameters.device.type == "cpu":
            self._update_in_one_pass(parameters, gradient, rates)
            return
        self.first.lerp_(gradient, 1 - BETA1)
        self.second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        size = rates / (1 - BETA1**self.step)
        moves = self.second.sqrt().div_((1 - BETA2**self.step) ** 0.5).add_(EPSILON)
        torch.div(self.first, moves, out=moves).mul_(size.to(parameters.dtype)[:, None])
        if factors is None:
            parameters.sub_(moves)
        else:
            moved = parameters - moves.mul_(factors.to(parameters.dtype))
            parameters.copy_(torch.where(factors > 0, moved, parameters))

    def _update_in_one_pass(self, parameters: Tensor, gradient: Tensor, rates: Tensor) -> None:
        """A CPU waits for memory here: nine passes take it nearly three times as long."""
        step = torch.tensor(float(self.step))
        rows = zip(parameters, gradient, self.first, self.second, rates.tolist(), strict=True)
        for member, slope, first, second, rate in rows:
            torch._fused_adam_(
                [member], [slope], [first], [second], [], [step], lr=rate, beta1=BETA1, beta2=BETA2,
                weight_decay=0.0, eps=EPSILON, amsgrad=False, maximize=False,
            )  # fmt: skip


@dataclass
class Plateau:
    """Learning rate, best validation loss and patience of each member.

    A member's rate is multiplied by `factor` after `patience` epochs without a lower loss; below `least` it is 0 and
    the member is finished.
    """

    factor: float
    patience: int
    least: float
    rates: list[float]
    best: list[float]
    best_epoch: list[int]
    waited: list[int]

    @classmethod
    def start(cls, n_members: int, rate: float, factor: float, patience: int, least: float) -> Plateau:
        return cls(
            factor,
            patience,
            least,
            rates=[rate] * n_members,
            best=[float("inf")] * n_members,
            best_epoch=[-1] * n_members,
            waited=[0] * n_members,
        )

    @property
    def finished(self) -> bool:
        return not any(self.rates)

    def observe(self, epoch: int, losses: list[float]) -> tuple[list[bool], list[bool]]:
        """Take in one epoch's validation losses; return which members are at their best, and whose rate dropped."""
        improved, dropped = [], []
        for k, loss in enumerate(losses):
            better = self.rates[k] > 0 and loss < self.best[k]
            self.waited[k] = 0 if better else self.waited[k] + 1
            drop = self.rates[k] > 0 and self.waited[k] >= self.patience
            if better:
                self.best[k], self.best_epoch[k] = loss, epoch
            if drop:
                rate = self.rates[k] * self.factor
                self.rates[k], self.waited[k] = (rate if rate >= self.least else 0.0), 0
            improved.append(better)
            dropped.append(drop)
        return improved, dropped

    def state(self) -> dict[str, Any]:
        """Return what changes, as JSON values."""
        return {"rates": self.rates, "best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        self.rates, self.best = list(state["rates"]), list(state["best"])
        self.best_epoch, self.waited = list(state["best_epoch"]), list(state["waited"])
