"""Walkers stay on their device, and wait for it as seldom as they say."""

import pytest
import torch
from pretended_device import pretended_device

pytest.importorskip("triton")
from ase.build import bulk

from potential.aev import AEVParameters
from potential.committee import Committee
from potential.config import PotentialSettings
from potential.kernels import gpu
from potential.neighbours import Neighbours, SkinList
from sampler import dynamics
from sampler.batch import Walker, start_batch
from sampler.config import SamplerSettings
from sampler.recorded import RecordedSteps
from sampler.schedules import draw_schedule
from shards.frame import Frame

N_PAIRS = 500


class Looks:
    """Count the looks at the device that a step is allowed that is not recorded: at the list, and at the forces."""

    def __init__(self) -> None:
        self.at_list, self.at_forces = 0, 0

    def update(self, skin_list, structures):
        self.at_list += 1
        return neighbours(structures)

    def kick(self, atoms, push, max_force_eV_A):
        self.at_forces += 1
        atoms.velocities.addcmul_(atoms.forces, atoms.inverse_mass, value=push)
        return True


def neighbours(structures):
    pair = structures.species.new_empty(N_PAIRS)
    row = structures.species.new_empty(len(structures.positions) + 1)
    return Neighbours(pair, pair, pair.new_empty(N_PAIRS, 3, dtype=torch.int32), row)


@pytest.fixture
def walking(monkeypatch):
    """On a device that is not there: its name, walkers, and what moves them."""
    monkeypatch.setattr("potential.kernels.FORCED", "gpu")
    monkeypatch.setattr(gpu, "_launch", lambda program, grid, *arguments, **constants: None)
    settings = SamplerSettings(settle_steps=2, check_every=10)
    crystal = bulk("Al", cubic=True) * 2
    frame = Frame(crystal.numbers, crystal.positions, crystal.cell.array, crystal.pbc)
    walkers = [Walker(seed, frame, draw_schedule(settings, seed)) for seed in range(3)]
    with pretended_device() as device:
        with torch.device(device):
            committee = Committee(["Al"], AEVParameters.from_settings(PotentialSettings(), 1), [(96, 64)], n_members=8)
        committee.self_energies = torch.zeros(1, dtype=torch.float64, device=device)
        batch = start_batch(walkers, ["Al"], device)
        atoms = torch.empty(len(batch.positions), dtype=torch.int64, device=device)
        vars(batch.structures)["atoms_by_species"] = (atoms,)
        yield device, batch, dynamics.Dynamics(committee, settings)


def test_between_checks_walkers_wait_for_the_device_twice_in_a_step_and_stay_on_it(walking, monkeypatch):
    device, batch, moving = walking
    looks, figures = Looks(), []
    monkeypatch.setattr(SkinList, "update", lambda skin_list, structures: looks.update(skin_list, structures))
    monkeypatch.setattr(dynamics, "kick", looks.kick)
    # What a check reads back, all at once.
    monkeypatch.setattr(moving, "_read", lambda *arguments: figures.append(arguments))
    moving.prepare(batch)
    looks.at_list = 0
    moving.advance(batch)
    n_steps = moving.settings.check_every
    assert batch.positions.device.type == batch.forces.device.type == device
    assert (looks.at_list, looks.at_forces, len(figures)) == (n_steps, n_steps, 2)


def test_a_recorded_step_never_waits_for_its_device(walking, monkeypatch):
    device, batch, moving = walking
    monkeypatch.setattr(SkinList, "neighbours", neighbours(batch.structures))
    limit = moving.settings.max_force_eV_A
    recorded = RecordedSteps(batch, moving._pairs, moving._drift, moving._mean_forces, 1.0, limit)
    recorded._seen = recorded._seen.to(device)  # a copy to the host, which a look has to wait for
    recorded._step()
    assert recorded._listed.other.shape > (N_PAIRS,)
    assert batch.positions.device.type == batch.forces.device.type == device
