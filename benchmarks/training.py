"""What does a training step on energies and forces cost, beside TorchANI with the same weights, cells and loss?

Run: python -m benchmarks.training. Eight cells of 108 Al atoms. TorchANI gets its best way: cells joined to one system
with a list made beforehand, and no gradients of coordinates. A committee is compared with eight trainings of TorchANI.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import AL_NEIGHBOURS, AL_TRIPLES, aluminium, crystal
from benchmarks.harness import Row, interleave, publish, ratio_row, settle
from benchmarks.machine import Machine
from benchmarks.torchani_peer import deviation, half_list, torchani_model
from potential.committee import Committee
from potential.structures import Structures
from shards import Frame, Label, Level, write_labels
from trainer.config import TrainerSettings
from trainer.dataset import load_dataset
from trainer.networks import Networks
from trainer.optimiser import Adam
from trainer.problem import Problem
from trainer.step import Steps

ONE, COMMITTEE = (60.0, 100.0), (200.0, 400.0)
N_CELLS, FORCE_WEIGHT = 8, 0.1
RATE = 1e-9  # the weights stay what they are, so that every round does the same


def floor_s(machine: Machine, n_members: int) -> float:
    """Least time of a step that keeps AEVs: J^T and J products, and six products with every weight."""
    per_member = 24_640 * 6 * 2 + 2 * 152 * AL_TRIPLES * 2
    exponentials = AL_TRIPLES * 8 * 3 + 32 * AL_NEIGHBOURS
    return N_CELLS * 108 * machine.seconds(flops=n_members * per_member, exponentials=exponentials)


class Ours:
    """The trainer's own step on cells with random labels."""

    def __init__(
        self, committee: Committee, rows: list[tuple[Frame, Label]], jacobian_memory_GB: float, device: str = "cpu"
    ) -> None:
        self.networks = Networks.of(committee)
        self.parameters = self.networks.take(committee, torch.float32).to(device)
        self._cells = np.arange(len(rows))
        settings = TrainerSettings(
            batch=len(rows), steps_per_epoch=1, energy_weight=1.0, force_weight=FORCE_WEIGHT, stress_weight=0.0,
            force_cap_eV_per_A=1e9, jacobian_memory_GB=jacobian_memory_GB,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            receipt = write_labels(Path(folder) / "cells.h5", Level("random", ""), rows)
            dataset = load_dataset([receipt], ["Al"], verify=False)
            shape = self.networks, committee.aev, ["Al"], committee.n_members
            self.problem = Problem(dataset, np.zeros(1), *shape, settings, 0, 1, device=device)
        self.problem.learns = torch.ones_like(self.problem.learns)  # no folds: TorchANI has none
        self._steps = Steps(self.problem, self.parameters)
        self._adam = Adam.like(self.parameters)
        self._rates = torch.full((committee.n_members,), RATE, dtype=torch.float64, device=device)

    def gradient(self) -> Tensor:
        return self._steps.gradient(self._cells)

    def step(self) -> None:
        self._adam.update(self.parameters, self.gradient(), self._rates)


class Peer:
    """TorchANI, one network."""

    def __init__(self, committee: Committee, rows: list[tuple[Frame, Label]], member: int) -> None:
        self.model = torchani_model(committee, [member])
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._adam = torch.optim.Adam(self.parameters, RATE)
        structures = Structures.from_frames([frame for frame, _ in rows], ["Al"], torch.float32)
        self._positions = structures.positions[None]
        self._numbers = torch.full((1, len(structures.positions)), 13)
        self._list = half_list(structures, committee.cutoff_A)
        self._energy = torch.tensor([label.energy for _, label in rows], dtype=torch.float32)
        self._forces = torch.tensor(np.concatenate([label.forces for _, label in rows]), dtype=torch.float32)

    def step(self) -> None:
        self._adam.zero_grad()
        x = self._positions.clone().requires_grad_()
        atomic = self.model.compute_from_external_neighbors(self._numbers, x, *self._list, atomic=True).energies
        energy = atomic.view(N_CELLS, 108).sum(1)
        forces = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0][0]
        loss = ((energy - self._energy) ** 2 / 108).mean() + FORCE_WEIGHT * ((forces - self._forces) ** 2).mean()
        loss.backward(inputs=self.parameters)
        self._adam.step()

    def gradient(self) -> Tensor:
        self.step()
        return torch.cat([p.grad.flatten() for p in self.parameters])


def labeled(n_cells: int = N_CELLS) -> list[tuple[Frame, Label]]:
    rng = np.random.default_rng(0)
    unknown = np.full((3, 3), np.nan)
    return [(crystal(3, seed), Label(rng.normal(), rng.normal(size=(108, 3)), unknown)) for seed in range(n_cells)]


def main() -> None:
    settle()
    machine, rows, table = Machine.measure(), labeled(), list[Row]()
    committee = aluminium()
    single = Committee(["Al"], committee.aev, committee.hidden, 1)
    single.load_state_dict({name: value[:1] for name, value in committee.state_dict().items()})
    peers = [Peer(committee, rows, member) for member in range(2)]
    for name, ours, bars in (("one network", single, ONE), ("committee of 8", committee, COMMITTEE)):
        recomputed, kept = Ours(ours, rows, 0.0), Ours(ours, rows, 4.0)
        last = 1 if ours is committee else 0
        # Before the first steps, which both would take in different numbers.
        gradients, theirs = [each.gradient()[last].clone() for each in (recomputed, kept)], peers[last].gradient()
        times = interleave({"peer": peers[0].step, "recomputed": recomputed.step, "kept": kept.step})
        if ours is committee:  # eight trainings of one network each
            times["peer"] = type(times["peer"])(tuple(8 * t for t in times["peer"].rounds))
        for way, gradient in zip(("recomputed", "kept"), gradients, strict=True):
            work = f"training step, energy and forces, {name}, derivatives {way}"
            barred = bars if way == "kept" else None
            agreement = deviation(gradient, theirs, "(gradient)")
            floor, amount = floor_s(machine, ours.n_members), (N_CELLS, "cells")
            table.append(ratio_row(work, times["peer"], times[way], amount, barred, floor, agreement))
    publish(table)


if __name__ == "__main__":
    main()
