"""How does a batch of walkers move from one check to the next? BAOAB Langevin dynamics, no loop over walkers in a step.

Between checks the mean force of the committee drives the atoms and the thermostats stay as they are. At a check the
cells are scaled to their densities and the forces of all members are computed: their spread is the reading.

BAOAB: B. Leimkuhler, C. Matthews, doi:10.1093/amrx/abs010. With zero friction it is velocity Verlet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from potential.committee import Evaluation
from potential.kernels import drift, kick, normals
from potential.neighbours import Neighbours, SkinList, shortest_distances
from potential.structures import Structures
from sampler.batch import Batch, Snapshot
from sampler.config import SamplerSettings
from sampler.recorded import Halt, RecordedSteps, worth_recording
from sampler.triggers import Reading, Spread
from shards.schema import AMU_eV_fs2_A2, BOLTZMANN_eV_K

__all__ = ["Dynamics", "ForceModel"]

SETTLE_RATE_A2_eV = 0.01  # descent moves an atom by this much per force: stable up to a stiffness of 100 eV/A^2


class ForceModel(Protocol):
    """A committee, or anything else that evaluates structures like one."""

    @property
    def elements(self) -> Sequence[str]: ...

    @property
    def cutoff_A(self) -> float: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def evaluate(
        self,
        structures: Structures,
        neighbours: Neighbours | None = None,
        *,
        forces: Literal["none", "mean", "members"] = "mean",
        stress: bool = False,
    ) -> Evaluation: ...


class Dynamics:
    """Move batches on one model, which is given numbers in its own precision; positions are kept in float64."""

    def __init__(self, model: ForceModel, settings: SamplerSettings) -> None:
        self.model = model
        self.settings = settings
        self._push = settings.timestep_fs / 2 / AMU_eV_fs2_A2
        self._damping = math.exp(-settings.friction_per_ps * settings.timestep_fs / 1000)
        self._pairs = SkinList(model.cutoff_A, settings.skin_A)
        self._recorded: RecordedSteps | None = None

    @property
    def n_neighbour_searches(self) -> int:
        return self._pairs.n_builds

    def prepare(self, batch: Batch) -> None:
        """Settle walkers that just start, draw their velocities, and take their first reading."""
        pairs = SkinList(self.model.cutoff_A, self.settings.skin_A)
        for _ in range(self.settings.settle_steps):
            self._evaluate(batch, pairs)
            moves = SETTLE_RATE_A2_eV * batch.forces.nan_to_num()
            lengths = moves.norm(dim=1, keepdim=True)
            batch.positions += moves * (self.settings.settle_step_A / lengths).clamp(max=1).nan_to_num()
        directions = normals(batch, batch.steps())
        batch.velocities = directions * (self._thermal_energies(batch) * batch.inverse_mass).sqrt()
        self._read(batch, self._evaluate(batch, pairs, "members"), pairs)

    def advance(self, batch: Batch) -> None:
        """Take the steps to the next check, and the readings there."""
        variance = 1 - self._damping**2
        batch.noise_scale.copy_((variance * self._thermal_energies(batch) * batch.inverse_mass).sqrt())
        steps = batch.steps()
        self._take_steps(batch, steps, self.settings.check_every - 1)
        self._drift(batch, steps.add_(1))
        self._follow_densities(batch)
        evaluation = self._evaluate(batch, self._pairs, "members")
        self._kick(batch)
        self._read(batch, evaluation, self._pairs)

    def _take_steps(self, batch: Batch, steps: Tensor, n: int) -> None:
        while n > 0:
            if recorded := self._recording(batch):
                taken, halt = recorded.run(steps, n)
                n -= taken
                if halt is None:
                    continue
                if halt is Halt.OUTDATED:
                    self._evaluate(batch, self._pairs)
            else:
                self._drift(batch, steps.add_(1))
                self._evaluate(batch, self._pairs)
            self._kick(batch)
            n -= 1

    def _recording(self, batch: Batch) -> RecordedSteps | None:
        """Where steps are worth it, their recording, with the list of now; not before the list is of this batch."""
        if not worth_recording(batch) or not self._pairs.is_of(batch.structures):
            return None
        recorded = self._recorded
        if recorded is None or recorded.batch is not batch or not recorded.follow(self._pairs):
            limit = self.settings.max_force_eV_A
            recorded = RecordedSteps(batch, self._pairs, self._drift, self._mean_forces, self._push, limit, recorded)
            recorded.follow(self._pairs)
            self._recorded = recorded
        return recorded

    def _drift(self, batch: Batch, steps: Tensor) -> None:
        """From the forces at the old positions to the new positions: B, A, O, A."""
        drift(batch, steps, self._push, self.settings.timestep_fs / 2, self._damping)

    def _kick(self, batch: Batch) -> None:
        """The last B of a step, once the forces at the new positions have passed the guard."""
        if not kick(batch, self._push, self.settings.max_force_eV_A):
            self._freeze_blown(batch)
            kick(batch, self._push, math.inf)

    def _evaluate(self, batch: Batch, pairs: SkinList, forces: Literal["mean", "members"] = "mean") -> Evaluation:
        neighbours = pairs.update(batch.structures)
        evaluation = self.model.evaluate(batch.structures, neighbours, forces=forces)
        assert evaluation.forces_mean is not None
        batch.forces.copy_(evaluation.forces_mean)
        return evaluation

    def _mean_forces(self, batch: Batch, neighbours: Neighbours) -> Tensor:
        forces = self.model.evaluate(batch.structures, neighbours).forces_mean
        assert forces is not None
        return forces

    def _thermal_energies(self, batch: Batch) -> Tensor:
        """(n_atoms, 1), amu (A/fs)^2: kT of each atom's thermostat at the last check."""
        temperatures_K = [walker.schedule.temperature_K(walker.time_fs(self.settings)) for walker in batch.walkers]
        per_walker = torch.tensor(temperatures_K, dtype=torch.float64, device=batch.cell.device)
        return per_walker.mul_(BOLTZMANN_eV_K / AMU_eV_fs2_A2)[batch.frame_of_atom, None]

    def _follow_densities(self, batch: Batch) -> None:
        """Count the steps since the last check, and scale cells and positions to the densities of now."""
        stretches = []
        for walker in batch.walkers:
            walker.n_steps += self.settings.check_every
            old = walker.density_factor
            if walker.start.pbc.all():
                walker.density_factor = walker.schedule.density_factor(walker.time_fs(self.settings))
            stretches.append((old / walker.density_factor) ** (1 / 3))
        stretch = torch.tensor(stretches, dtype=torch.float64, device=batch.cell.device)
        batch.cell *= stretch[:, None, None]
        batch.positions *= stretch[batch.frame_of_atom, None]

    def _freeze_blown(self, batch: Batch) -> None:
        """Put walkers whose forces are out of bounds back to their last good geometry and stop them there."""
        largest = batch.over_atoms(batch.forces.abs().amax(1).nan_to_num(torch.inf), "amax")
        for index in (largest > self.settings.max_force_eV_A).nonzero().flatten().tolist():
            walker, rows = batch.walkers[index], batch.rows[index]
            assert walker.last_good is not None
            walker.blown = True
            batch.positions[rows] = torch.from_numpy(walker.last_good.positions).to(batch.cell.device)
            batch.cell[index] = torch.from_numpy(walker.last_good.cell).to(batch.cell.device)
            for moving in (batch.velocities, batch.forces, batch.inverse_mass, batch.noise_scale):
                moving[rows] = 0.0

    def _read(self, batch: Batch, evaluation: Evaluation, pairs: SkinList) -> None:
        """Give every walker the reading of this check and the geometry it belongs to."""
        figures = torch.stack(
            [
                *committee_spreads(evaluation, batch.structures),
                shortest_distances(batch.structures, pairs.update(batch.structures)),
                _temperatures(batch),
                batch.over_atoms(batch.forces.abs().amax(1), "amax"),
            ],
            dim=1,
        ).tolist()
        positions, cells = batch.positions.cpu().numpy(), batch.cell.cpu().numpy()
        for index, (walker, row) in enumerate(zip(batch.walkers, figures, strict=True)):
            spread = Spread(*row[:3])
            walker.reading = Reading(spread, *row[3:])
            walker.current = Snapshot(
                positions[batch.rows[index]].copy(), cells[index].copy(), spread, walker.time_fs(self.settings)
            )


def committee_spreads(evaluation: Evaluation, structures: Structures) -> tuple[Tensor, Tensor, Tensor]:
    """Energy spread (B,), eV, and the mean and largest force spread (B,), eV/A, of an evaluation with member forces."""
    components = evaluation.force_spread().to(torch.float64)
    index = structures.frame_of_atom
    zeros = components.new_zeros(structures.n_frames)
    mean = zeros.scatter_reduce(0, index, components.mean(1), "mean", include_self=False)
    largest = zeros.scatter_reduce(0, index, components.amax(1), "amax", include_self=False)
    return evaluation.energy_spread().to(torch.float64), mean, largest


def _temperatures(batch: Batch) -> Tensor:
    """Kinetic temperature of each walker, (n_walkers,), K; NaN for blown ones, which have no masses left."""
    doubled = (batch.velocities.square() / batch.inverse_mass).sum(1) * AMU_eV_fs2_A2
    return batch.over_atoms(doubled, "mean") / (3 * BOLTZMANN_eV_K)
