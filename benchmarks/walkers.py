"""What does a step of molecular dynamics cost beside the model, for 64 walkers of 108 atoms?

Run: python -m benchmarks.walkers. The model costs nothing and pulls nowhere, the walkers are a crystal at 300 K that
starts from rest at every turn. Steps hold the integrator, thermostat, noise, the guard and the check of the skin list,
and their share of a check every 50 steps (spreads, shortest distances, schedules, judging). The peer is ASE's Langevin
dynamics, one cell at a time, with a calculator that costs nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin
from torch import Tensor

from benchmarks.cases import crystal
from benchmarks.harness import Row, compare, interleave, publish, settle
from potential.committee import Evaluation
from potential.neighbours import Neighbours
from potential.structures import Structures
from sampler.batch import Batch, Walker, start_batch
from sampler.config import SamplerSettings
from sampler.dynamics import Dynamics
from sampler.schedules import draw_schedule

N_WALKERS, N_ATOMS = 64, 108
SETTINGS = SamplerSettings(
    temperature_start_K=(300.0, 300.0),
    temperature_end_K=(300.0, 300.0),
    temperature_amplitude_K=(0.0, 0.0),
    density_end_factor=(1.0, 1.0),
    density_amplitude_factor=(0.0, 0.0),
    max_time_ps=1e5,
    settle_steps=0,
    slots=N_WALKERS,
)


class NoForces:
    """A model of eight members that agree on nothing happening."""

    elements = ("Al",)
    cutoff_A = 7.0
    dtype = torch.float32

    def __init__(self) -> None:
        self._forces = torch.zeros(8, N_WALKERS * N_ATOMS, 3)
        self._energies = torch.zeros(8, N_WALKERS, dtype=torch.float64)

    def evaluate(
        self,
        structures: Structures,
        neighbours: Neighbours | None = None,
        *,
        forces: Literal["none", "mean", "members"] = "mean",
        stress: bool = False,
    ) -> Evaluation:
        members = self._forces if forces == "members" else None
        return Evaluation(structures.n_atoms, self._energies, self._forces[0], members)


class Resting(Calculator):
    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        self.results = {"energy": 0.0, "forces": np.zeros((N_ATOMS, 3))}


class Walking:
    def __init__(self) -> None:
        self.dynamics = Dynamics(NoForces(), SETTINGS)
        frames = [crystal(3, seed) for seed in range(N_WALKERS)]
        walkers = [Walker(seed, frame, draw_schedule(SETTINGS, seed)) for seed, frame in enumerate(frames)]
        self.batch: Batch = start_batch(walkers, ("Al",), "cpu")
        self.dynamics.prepare(self.batch)
        self._home: Tensor = self.batch.positions.clone()

    def check_to_check(self) -> None:
        """50 steps from rest at home: nobody gets so far that the list has to be found again."""
        self.batch.positions.copy_(self._home)
        self.batch.velocities.zero_()
        self.dynamics.advance(self.batch)


def ase_steps() -> None:
    frame = crystal(3)
    atoms = Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=True)
    atoms.calc = Resting()
    Langevin(atoms, 1 * units.fs, temperature_K=300, friction=0.002 / units.fs, fixcm=False).run(SETTINGS.check_every)


def main() -> None:
    settle()
    walking = Walking()
    walking.check_to_check()
    found = walking.dynamics.n_neighbour_searches
    times = interleave({"peer": ase_steps, "ours": walking.check_to_check})
    assert walking.dynamics.n_neighbour_searches == found, "the list was found again: this is not what is measured"
    n_steps = SETTINGS.check_every
    scale = 1e6 / (n_steps * N_WALKERS)
    per_step = sorted(scale * t for t in times["ours"].rounds)
    ratio, _ = compare(times["peer"], times["ours"])
    value = scale * times["ours"].median
    row = Row(
        work=f"MD step beside the model, {N_WALKERS} walkers of {N_ATOMS} atoms, per walker",
        value=value,
        unit="us",
        at_least=10.0,
        aim=3.0,
        ours=f"{value:.2f} us",
        peer=f"ASE {1e6 * times['peer'].median / n_steps:.0f} us ({ratio * N_WALKERS:.0f} x)",
        quartiles=(per_step[2], per_step[6]),
        less=True,
    )
    publish([row])


if __name__ == "__main__":
    main()
