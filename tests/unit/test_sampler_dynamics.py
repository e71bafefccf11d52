"""The dynamics sample what statistical mechanics says, and no walker feels which others share its batch."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from sampler_models import SoftSpheres, Trap, atoms_at_sites, constant_conditions, fcc_frame, from_sites, walker

from potential.neighbours import find_neighbours, shortest_distances
from sampler import dynamics as sampler_dynamics
from sampler.batch import Walker, join, start_batch
from sampler.dynamics import Dynamics, committee_spreads
from sampler.schedules import Schedule
from shards.frame import Frame
from shards.schema import AMU_eV_fs2_A2, BOLTZMANN_eV_K

MASS_H, MASS_AL = 1.008, 26.9815385


def start(model, settings, *frames):
    dynamics = Dynamics(model, settings)
    batch = start_batch([walker(seed, frame, settings) for seed, frame in enumerate(frames)], model.elements, "cpu")
    dynamics.prepare(batch)
    for each in batch.walkers:
        each.last_good = each.current
    return dynamics, batch


def total_energy(model, batch):
    kinetic = AMU_eV_fs2_A2 / 2 * (batch.velocities.square() / batch.inverse_mass).sum()
    return float(kinetic + model.evaluate(batch.structures).energy_members[0].sum())


def test_each_walker_has_the_maxwell_boltzmann_distribution_of_its_temperature():
    settings = constant_conditions(friction_per_ps=100.0, check_every=50)
    frames = [atoms_at_sites(200), atoms_at_sites(300)]
    walkers = [
        walker(seed, frame, constant_conditions(temperature_K))
        for seed, frame, temperature_K in zip((1, 2), frames, (300.0, 1200.0), strict=True)
    ]
    model = Trap()
    dynamics, batch = Dynamics(model, settings), start_batch(walkers, model.elements, "cpu")
    dynamics.prepare(batch)
    squares = [[], []]
    for _ in range(25):
        dynamics.advance(batch)
        for i, rows in enumerate(batch.rows):
            squares[i].append(batch.velocities[rows].numpy().ravel() ** 2)
    for sampled, temperature_K in zip(squares, (300.0, 1200.0), strict=True):
        v2 = np.concatenate(sampled)
        expected = BOLTZMANN_eV_K * temperature_K / (MASS_AL * AMU_eV_fs2_A2)
        # At least 15,000 components, decorrelated by 5 friction times: 1.2 % standard deviation.
        assert v2.mean() == pytest.approx(expected, rel=0.04)
        assert (v2**2).mean() / v2.mean() ** 2 == pytest.approx(3.0, rel=0.08)


def test_positions_in_a_harmonic_trap_are_exactly_canonical_even_at_a_large_time_step():
    # omega dt = 1.1 here. BAOAB has no error in <x^2> = kT/k at any step; other splittings are off by tens of percent.
    settings = constant_conditions(500.0, friction_per_ps=100.0, timestep_fs=5.0, check_every=10)
    dynamics, batch = start(Trap(stiffness=5.0), settings, atoms_at_sites(400, number=1))
    squares = []
    for check in range(50):
        dynamics.advance(batch)
        if check >= 5:
            squares.append(float(from_sites(batch.positions).square().mean()))
    # 54,000 components, decorrelated by 5 friction times: 0.6 % standard deviation.
    assert np.mean(squares) == pytest.approx(BOLTZMANN_eV_K * 500.0 / 5.0, rel=0.025)


def test_without_friction_energy_is_conserved_while_neighbours_change():
    settings = constant_conditions(2000.0, friction_per_ps=0.0, check_every=100, skin_A=0.5)
    model = SoftSpheres()
    dynamics, batch = start(model, settings, fcc_frame(2), fcc_frame(3, 3.9))
    before = total_energy(model, batch)
    kinetic = float(AMU_eV_fs2_A2 / 2 * (batch.velocities.square() / batch.inverse_mass).sum())
    for _ in range(5):
        dynamics.advance(batch)
    assert dynamics.n_neighbour_searches > 5
    assert abs(total_energy(model, batch) - before) < 2e-3 * kinetic


def test_without_friction_a_free_oscillator_has_its_closed_form_period():
    settings = constant_conditions(300.0, friction_per_ps=0.0, timestep_fs=0.5, check_every=200)
    dynamics, batch = start(Trap(stiffness=5.0), settings, atoms_at_sites(1))
    velocity = batch.velocities.clone()
    dynamics.advance(batch)
    omega = np.sqrt(5.0 / (MASS_AL * AMU_eV_fs2_A2))
    expected = velocity * np.sin(omega * 100.0) / omega
    # Velocity Verlet is late by (omega dt)^2 / 24 of the phase: 1e-4 after 4 rad.
    assert batch.positions.numpy() == pytest.approx(expected.numpy(), abs=3e-4 * float(expected.abs().max()))


def _after_checks(monkeypatch, recorded, model, settings, frames, n_checks):
    monkeypatch.setattr(sampler_dynamics, "worth_recording", lambda batch: recorded)
    dynamics, batch = start(model, settings, *frames)
    for _ in range(n_checks):
        dynamics.advance(batch)
    return dynamics, batch


def test_recorded_steps_are_those_that_are_launched_one_by_one(monkeypatch):
    """With cells that change at checks, and lists that are found again in between, at times of more pairs."""
    settings = constant_conditions(
        2000.0, check_every=40, skin_A=0.5, density_end_factor=(1.2, 1.2), max_time_ps=0.2, timestep_fs=2.0
    )
    frames = fcc_frame(2), fcc_frame(1, 3.9), fcc_frame(2, 4.2)
    plain, expected = _after_checks(monkeypatch, False, SoftSpheres(), settings, frames, 4)
    dynamics, batch = _after_checks(monkeypatch, True, SoftSpheres(), settings, frames, 4)
    assert plain._recorded is None
    assert dynamics._recorded.batch is batch
    assert dynamics.n_neighbour_searches == plain.n_neighbour_searches > 5
    for name in ("positions", "velocities", "forces", "cell"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name), rtol=0, atol=1e-9)


def test_a_walker_that_blows_up_in_recorded_steps_is_stopped_in_its_step(monkeypatch):
    settings = constant_conditions(3000.0, friction_per_ps=100.0, check_every=30)
    frames = [atoms_at_sites(n) for n in (3, 1, 5)]
    _, expected = _after_checks(monkeypatch, False, Trap(breaks_at_A=0.6), settings, frames, 3)
    _, batch = _after_checks(monkeypatch, True, Trap(breaks_at_A=0.6), settings, frames, 3)
    blown = [each.blown for each in expected.walkers]
    assert {True, False} == set(blown)
    assert [each.blown for each in batch.walkers] == blown
    for name in ("positions", "velocities", "forces"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name), rtol=0, atol=1e-9)


def test_cells_and_positions_follow_the_density_schedule():
    schedule = Schedule(1000.0, 10.0, 10.0, 0.0, 1000.0, 0.8, 0.3, 400.0)
    settings = constant_conditions(10.0, check_every=50, max_time_ps=1.0)
    frame = fcc_frame(2)
    model = SoftSpheres()
    batch = start_batch([Walker(1, frame, schedule), Walker(2, atoms_at_sites(3), schedule)], model.elements, "cpu")
    dynamics = Dynamics(model, settings)
    dynamics.prepare(batch)
    for check in range(1, 6):
        dynamics.advance(batch)
        time_fs = 50.0 * check
        factor = 1 - 0.2 * time_fs / 1000 + 0.3 * np.sin(np.pi * time_fs / 400) ** 2
        assert frame.volume_A3 / float(torch.det(batch.cell[0])) == pytest.approx(factor, rel=1e-12)
        fractional = batch.positions[batch.rows[0]] @ torch.inverse(batch.cell[0])
        moved = fractional - torch.tensor(frame.positions @ np.linalg.inv(frame.cell))
        assert float(moved.abs().max()) < 0.05, "atoms must move with their cell"
    assert torch.equal(batch.cell[1], torch.zeros(3, 3, dtype=torch.float64)), "a free cluster has no density"


def test_a_walker_does_not_feel_its_batch_mates():
    settings = constant_conditions(600.0, check_every=30)
    frames = [atoms_at_sites(5), atoms_at_sites(9, number=1), atoms_at_sites(7)]
    together, batch = start(Trap(), settings, *frames)
    together.advance(batch)
    batch = batch.keep([1, 2])
    newcomers = start_batch([walker(9, atoms_at_sites(4), settings)], ("H", "Al"), "cpu")
    together.prepare(newcomers)
    batch = join(batch, newcomers)
    together.advance(batch)

    alone = Dynamics(Trap(), settings)
    single = start_batch([walker(1, frames[1], settings)], ("H", "Al"), "cpu")
    alone.prepare(single)
    alone.advance(single)
    alone.advance(single)
    assert torch.equal(single.positions, batch.positions[batch.rows[0]])
    assert torch.equal(single.velocities, batch.velocities[batch.rows[0]])


def test_settling_takes_the_edge_off_close_contacts_in_capped_steps():
    rng = np.random.default_rng(1)
    frame = Frame(np.full(30, 13), rng.uniform(0, 9, (30, 3)), np.eye(3) * 9.0, np.ones(3, dtype=bool))
    model = SoftSpheres(strength=100.0)
    hot = start(model, constant_conditions(), frame)[1].walkers[0]
    settled = start(model, constant_conditions(settle_steps=10, settle_step_A=0.05), frame)[1].walkers[0]
    assert settled.reading.largest_force_eV_A < 0.5 * hot.reading.largest_force_eV_A
    assert np.linalg.norm(settled.current.positions - frame.positions, axis=1).max() <= 10 * 0.05 + 1e-9


def test_shortest_distance_is_found_across_boundaries_and_between_images_of_one_atom():
    boundary = Frame([13, 13], [[0.2, 5, 5], [9.9, 5, 5]], np.eye(3) * 10, np.ones(3, dtype=bool))
    itself = Frame([13], [[0, 0, 0]], np.diag([2.5, 9.0, 9.0]), np.ones(3, dtype=bool))
    free = Frame([13, 13], [[0.2, 5, 5], [9.9, 5, 5]], np.eye(3) * 10, np.zeros(3, dtype=bool))
    atoms = bulk("Al", cubic=True) * (2, 1, 1)
    atoms.rattle(0.3, seed=2)
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0.3, 0], [0, 1, 0.2], [0, 0, 0.9]]), scale_atoms=True)
    sheared = Frame(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    frames = [boundary, itself, free, sheared]
    structures = start_batch([walker(1, f, constant_conditions()) for f in frames], ("Al",), "cpu").structures
    expected = [0.3, 2.5, np.inf, neighbor_list("d", Atoms(atoms), 4.0).min()]
    assert shortest_distances(structures, find_neighbours(structures, 4.0)).numpy() == pytest.approx(expected)


def test_spreads_are_standard_deviations_over_members():
    settings = constant_conditions()
    frames = [atoms_at_sites(3), atoms_at_sites(5)]
    batch = start_batch([walker(1, f, settings) for f in frames], ("H", "Al"), "cpu")
    batch.positions.copy_(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)))
    structures = batch.structures
    evaluation = Trap(disagreement=0.7).evaluate(structures, forces="members")
    _, mean, largest = committee_spreads(evaluation, structures)
    parts = [0.7 * from_sites(batch.positions[rows]).abs() for rows in batch.rows]
    assert mean.tolist() == pytest.approx([float(part.mean()) for part in parts])
    assert largest.tolist() == pytest.approx([float(part.max()) for part in parts])
