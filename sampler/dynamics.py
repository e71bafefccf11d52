"""How does a batch of walkers move from one check to the next? BAOAB Langevin dynamics, no loop over walkers in a step.

Between checks the mean force of the committee drives the atoms and the thermostats stay as they are. At a check the
cells are scaled to their densities and the forces of all members are computed: their spread is the reading.

BAOAB: B. Leimkuhler, C. Matthews, doi:10.1093/amrx/abs010. With zero friction it is velocity Verlet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from potential.committee import Evaluation
from potential.neighbours import Neighbours, SkinList, pair_vectors
from potential.structures import Structures
from sampler.batch import Batch, Snapshot
from sampler.config import SamplerSettings
from sampler.triggers import Reading, Spread
from shards.schema import AMU_eV_fs2_A2, BOLTZMANN_eV_K

__all__ = ["Dynamics", "ForceModel"]

STEPS_PER_DRAW = 10  # random numbers are drawn for so many steps at a time: few calls, and they stay in the cache
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
        self._damping = math.exp(-settings.friction_per_ps * settings.timestep_fs / 1000)
        self._pairs = SkinList(model.cutoff_A, settings.skin_A)

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
        for walker, rows in zip(batch.walkers, batch.rows, strict=True):
            directions = torch.from_numpy(walker.noise.standard_normal((walker.start.n_atoms, 3)))
            thermal = BOLTZMANN_eV_K * walker.schedule.temperature_K(0.0) / AMU_eV_fs2_A2
            batch.velocities[rows] = directions.to(batch.cell.device) * (thermal * batch.inverse_mass[rows]).sqrt()
        self._read(batch, self._evaluate(batch, pairs, "members"), pairs)

    def advance(self, batch: Batch) -> None:
        """Take the steps to the next check, and the readings there."""
        self._set_thermostats(batch)
        remaining = self.settings.check_every - 1
        while remaining > 0:
            for kicks in self._draw_kicks(batch, min(remaining, STEPS_PER_DRAW)):
                self._drift(batch, kicks)
                self._evaluate(batch, self._pairs)
                self._kick(batch)
            remaining -= STEPS_PER_DRAW
        self._drift(batch, self._draw_kicks(batch, 1)[0])
        self._follow_densities(batch)
        evaluation = self._evaluate(batch, self._pairs, "members")
        self._kick(batch)
        self._read(batch, evaluation, self._pairs)

    def _drift(self, batch: Batch, kicks: Tensor | None) -> None:
        """From the forces at the old positions to the new positions: B, A, O, A."""
        half_step_fs = self.settings.timestep_fs / 2
        batch.velocities.addcmul_(batch.forces, batch.inverse_mass, value=half_step_fs / AMU_eV_fs2_A2)
        batch.positions.add_(batch.velocities, alpha=half_step_fs)
        if kicks is not None:
            batch.velocities.mul_(self._damping).addcmul_(kicks, batch.noise_scale)
        batch.positions.add_(batch.velocities, alpha=half_step_fs)

    def _kick(self, batch: Batch) -> None:
        """The last B of a step, once the forces at the new positions have passed the guard."""
        # Written so that NaN freezes: no walker may carry it into the neighbour search.
        if not float(batch.forces.abs().amax()) <= self.settings.max_force_eV_A:
            self._freeze_blown(batch)
        half_step_fs = self.settings.timestep_fs / 2
        batch.velocities.addcmul_(batch.forces, batch.inverse_mass, value=half_step_fs / AMU_eV_fs2_A2)

    def _evaluate(self, batch: Batch, pairs: SkinList, forces: Literal["mean", "members"] = "mean") -> Evaluation:
        structures = batch.structures(self.model.dtype)
        evaluation = self.model.evaluate(structures, pairs.update(structures), forces=forces)
        assert evaluation.forces_mean is not None
        batch.forces = evaluation.forces_mean.to(torch.float64)
        return evaluation

    def _set_thermostats(self, batch: Batch) -> None:
        variance = 1 - self._damping**2
        for walker, rows in zip(batch.walkers, batch.rows, strict=True):
            temperature_K = walker.schedule.temperature_K(walker.time_fs(self.settings))
            thermal = BOLTZMANN_eV_K * temperature_K / AMU_eV_fs2_A2
            batch.noise_scale[rows] = (variance * thermal * batch.inverse_mass[rows]).sqrt()

    def _draw_kicks(self, batch: Batch, n_steps: int) -> Sequence[Tensor | None]:
        """Standard normal numbers (n_steps, n_atoms, 3), of each walker from its own stream."""
        if self._damping == 1.0:
            return [None] * n_steps
        kicks = np.empty((n_steps, len(batch.positions), 3), dtype=np.float32)
        for walker, rows in zip(batch.walkers, batch.rows, strict=True):
            kicks[:, rows] = walker.noise.standard_normal((n_steps, walker.start.n_atoms, 3), dtype=np.float32)
        return torch.from_numpy(kicks).to(batch.cell.device).unbind()

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
        structures = batch.structures(self.model.dtype)
        figures = torch.stack(
            [
                *committee_spreads(evaluation, structures),
                shortest_distances(structures, pairs.update(structures)),
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


def shortest_distances(structures: Structures, neighbours: Neighbours) -> Tensor:
    """Shortest distance in each frame over all listed pairs, (B,), A, float64; infinite where there is none."""
    squared = pair_vectors(structures, neighbours).square().sum(1)
    frames = structures.frame_of_atom.index_select(0, neighbours.centre)
    none = squared.new_full((structures.n_frames,), torch.inf)
    return none.scatter_reduce(0, frames, squared, "amin").to(torch.float64).sqrt()


def _temperatures(batch: Batch) -> Tensor:
    """Kinetic temperature of each walker, (n_walkers,), K; NaN for blown ones, which have no masses left."""
    doubled = (batch.velocities.square() / batch.inverse_mass).sum(1) * AMU_eV_fs2_A2
    return batch.over_atoms(doubled, "mean") / (3 * BOLTZMANN_eV_K)
