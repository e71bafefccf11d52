"""What do energies and forces of small molecules cost, and a training step, beside TorchANI with the same weights?

Run: python -m benchmarks.molecules. ANI-1x: H, C, N, O, 384 symmetry functions; molecules of 20 atoms without a cell.
Ours finds its neighbours in every call, as TorchANI does; in training both know them beforehand.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import ORGANIC, molecule, organic
from benchmarks.harness import Row, interleave, publish, ratio_row, settle
from benchmarks.machine import Machine
from benchmarks.torchani_peer import deviation, torchani_model
from potential.committee import Committee
from potential.structures import Structures
from shards import Frame, Label, Level, write_labels
from trainer.config import TrainerSettings
from trainer.dataset import load_dataset
from trainer.networks import Networks
from trainer.optimiser import Adam
from trainer.problem import Problem
from trainer.step import Steps

EVALUATION, TRAINING = (5.0, 8.0), (10.0, 20.0)
N_MOLECULES, N_TRAINED, FORCE_WEIGHT, RATE = 256, 64, 0.1, 1e-9
MACS_PER_MOLECULE = 10 * 94_304 + 6 * 82_320 + 4 * 79_072  # weights that H10 C6 N2 O2 touches once


class Both:
    """The same molecules for our committee and TorchANI's."""

    def __init__(self, n_members: int) -> None:
        self.committee = organic(n_members)
        self.peer = torchani_model(self.committee)
        self.frames = [molecule(seed) for seed in range(N_MOLECULES)]
        self._numbers = torch.tensor(np.stack([frame.numbers for frame in self.frames]))
        self._positions = torch.tensor(np.stack([frame.positions for frame in self.frames]), dtype=torch.float32)
        self._structures = Structures.from_frames(self.frames, ORGANIC, torch.float32)

    def ours(self) -> Tensor:
        forces = self.committee.evaluate(self._structures, forces="mean").forces_mean
        assert forces is not None
        return forces

    def theirs(self) -> Tensor:
        x = self._positions.clone().requires_grad_()
        energies = self.peer((self._numbers, x)).energies
        return -torch.autograd.grad(energies.sum(), x)[0].flatten(0, 1)


class Trainings:
    """A step on energies and forces of one network."""

    def __init__(self) -> None:
        both = Both(1)
        rng = np.random.default_rng(0)
        frames = both.frames[:N_TRAINED]
        unknown = np.full((3, 3), np.nan)
        rows = [(frame, Label(rng.normal(), rng.normal(size=(20, 3)), unknown)) for frame in frames]
        self._start_ours(both.committee, rows)
        self._model = both.peer
        self._weights = [p for p in self._model.parameters() if p.requires_grad]
        self._their_adam = torch.optim.Adam(self._weights, RATE)
        self._numbers = torch.tensor(np.stack([frame.numbers for frame in frames]))
        self._positions = torch.tensor(np.stack([frame.positions for frame in frames]), dtype=torch.float32)
        self._energy = torch.tensor([label.energy for _, label in rows], dtype=torch.float32)
        self._forces = torch.tensor(np.stack([label.forces for _, label in rows]), dtype=torch.float32)

    def _start_ours(self, committee: Committee, rows: list[tuple[Frame, Label]]) -> None:
        networks = Networks.of(committee)
        self._parameters = networks.take(committee, torch.float32)
        settings = TrainerSettings(
            batch=N_TRAINED, energy_weight=1.0, force_weight=FORCE_WEIGHT, stress_weight=0.0, force_cap_eV_per_A=1e9
        )
        with tempfile.TemporaryDirectory() as folder:
            receipt = write_labels(Path(folder) / "molecules.h5", Level("random", ""), rows)
            dataset = load_dataset([receipt], ORGANIC, verify=False)
            self._problem = Problem(dataset, np.zeros(4), networks, committee.aev, ORGANIC, 1, settings, 0, 1)
        self._problem.learns = torch.ones_like(self._problem.learns)
        self._steps = Steps(self._problem, self._parameters)
        self._adam = Adam.like(self._parameters)

    def our_gradient(self) -> Tensor:
        return self._steps.gradient(np.arange(N_TRAINED))

    def ours(self) -> None:
        self._adam.update(self._parameters, self.our_gradient(), torch.tensor([RATE], dtype=torch.float64))

    def theirs(self) -> None:
        self._their_adam.zero_grad()
        x = self._positions.clone().requires_grad_()
        energy = self._model((self._numbers, x)).energies
        forces = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
        loss = ((energy - self._energy) ** 2 / 20).mean() + FORCE_WEIGHT * ((forces - self._forces) ** 2).mean()
        loss.backward(inputs=self._weights)
        self._their_adam.step()

    def their_gradient(self) -> Tensor:
        self.theirs()
        return torch.cat([p.grad.flatten() for p in self._weights])


def main() -> None:
    settle()
    machine, rows = Machine.measure(), list[Row]()
    for n_members, bars in ((8, EVALUATION), (1, None)):
        both = Both(n_members)
        times = interleave({"peer": both.theirs, "ours": both.ours})
        floor = N_MOLECULES * machine.seconds(flops=4 * n_members * MACS_PER_MOLECULE)
        work = f"molecules of 20 atoms, energy and forces, {n_members} network{'s' * (n_members > 1)}"
        agreement = deviation(both.ours(), both.theirs(), "eV/A")
        amount = N_MOLECULES, "molecules"
        rows.append(ratio_row(work, times["peer"], times["ours"], amount, bars, floor, agreement))
    trainings = Trainings()
    # Before the first steps, which both would take in different numbers.
    agreement = deviation(trainings.our_gradient()[0], trainings.their_gradient(), "(gradient)")
    times = interleave({"peer": trainings.theirs, "ours": trainings.ours})
    floor = N_TRAINED * machine.seconds(flops=12 * MACS_PER_MOLECULE)
    work, amount = "molecules, training step with forces, 1 network", (N_TRAINED, "molecules")
    rows.append(ratio_row(work, times["peer"], times["ours"], amount, TRAINING, floor, agreement))
    publish(rows)


if __name__ == "__main__":
    main()
