"""What any committee must satisfy: symmetries, batching, spreads, and gradients by its parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from scipy.spatial.transform import Rotation

from potential.committee import Committee
from potential.config import PotentialSettings
from potential.structures import Structures
from shards.frame import Frame

ELEMENTS = ["Al", "Cu"]
SETTINGS = PotentialSettings(
    radial_cutoff_A=5.0,
    angular_cutoff_A=4.0,
    first_shift_A=1.2,
    n_radial=8,
    n_angular_radial=4,
    n_angular=4,
    hidden=(12, 8),
    n_members=3,
)


@pytest.fixture
def committee() -> Committee:
    committee = Committee.from_settings(SETTINGS, ELEMENTS, seed=1).double()
    committee.self_energies = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    return committee


@pytest.fixture
def atoms() -> Atoms:
    atoms = bulk("Al", a=4.0, cubic=True) * (1, 1, 2)
    atoms.numbers[::3] = 29
    atoms.set_cell(atoms.cell.array + 0.3 * np.random.default_rng(0).normal(size=(3, 3)), scale_atoms=True)
    atoms.rattle(0.2, seed=3)
    return atoms


def frame_of(atoms: Atoms) -> Frame:
    return Frame(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)


def evaluate(committee, *many: Atoms, forces="members"):
    structures = Structures.from_frames([frame_of(atoms) for atoms in many], committee.elements)
    return committee.evaluate(structures, forces=forces, stress=True)


def assert_same(first, second):
    assert torch.allclose(first, second, rtol=0, atol=1e-9)


def test_batch_equals_one_by_one(committee, atoms):
    others = [atoms, Atoms("Cu2Al", [[0, 0, 0], [0, 0, 2.3], [0, 2.2, 1]]), atoms[:5], Atoms("Al")]
    batch = evaluate(committee, *others)
    first = 0
    for number, one in enumerate(others):
        alone = evaluate(committee, one)
        assert_same(batch.energy_members[:, number], alone.energy_members[:, 0])
        assert_same(batch.forces_members[:, first : first + len(one)], alone.forces_members)
        assert torch.allclose(batch.stress[number], alone.stress[0], rtol=0, atol=1e-12, equal_nan=True)
        first += len(one)


def test_means_and_spreads_are_those_of_the_members(committee, atoms):
    got = evaluate(committee, atoms)
    mean = evaluate(committee, atoms, forces="mean")
    energies, forces = got.energy_members.numpy(), got.forces_members.numpy()
    assert got.energy_spread().numpy() == pytest.approx(energies.std(0) / np.sqrt(len(atoms)))
    np.testing.assert_allclose(got.force_spread().numpy(), forces.std(0), atol=1e-12)
    np.testing.assert_allclose(mean.forces_mean.numpy(), forces.mean(0), atol=1e-10)
    np.testing.assert_allclose(mean.stress.numpy(), got.stress_members.numpy().mean(0), atol=1e-12)
    assert_same(evaluate(committee, atoms, forces="none").energy_members, got.energy_members)
    with pytest.raises(ValueError, match='forces="members"'):
        mean.force_spread()


def test_energies_alone_are_those_beside_forces_with_many_angular_functions():
    committee = Committee.from_settings(PotentialSettings(n_members=2), ["Al"], seed=1)
    crystal = bulk("Al", cubic=True) * (3, 3, 3)
    crystal.rattle(0.1, seed=1)
    structures = Structures.from_frames([frame_of(crystal)], ["Al"], torch.float32)
    alone, beside = (committee.evaluate(structures, forces=forces).energy_members for forces in ("none", "members"))
    assert torch.equal(alone, beside)


def test_order_of_atoms_does_not_matter(committee, atoms):
    order = np.random.default_rng(0).permutation(len(atoms))
    got, shuffled = evaluate(committee, atoms), evaluate(committee, atoms[order])
    assert_same(got.energy_members, shuffled.energy_members)
    assert_same(got.forces_members[:, order], shuffled.forces_members)


def test_translation_and_wrapping_change_nothing(committee, atoms):
    moved = atoms.copy()
    moved.translate([0.7, -13.1, 4.4])
    moved.wrap()
    got, other = evaluate(committee, atoms), evaluate(committee, moved)
    assert_same(got.energy_members, other.energy_members)
    assert_same(got.forces_members, other.forces_members)
    assert_same(got.stress_members, other.stress_members)


def test_rotation_turns_forces_and_stress(committee, atoms):
    rotation = Rotation.random(random_state=0).as_matrix()
    turned = Atoms(atoms.numbers, atoms.positions @ rotation, cell=atoms.cell.array @ rotation, pbc=True)
    got, other = evaluate(committee, atoms), evaluate(committee, turned)
    turn = torch.from_numpy(rotation)
    assert_same(got.energy_members, other.energy_members)
    assert_same(got.forces_members @ turn, other.forces_members)
    assert_same(turn.T @ got.stress_members @ turn, other.stress_members)


def test_supercell_has_the_same_energy_per_atom_forces_and_stress(committee, atoms):
    larger = make_supercell(atoms, [[2, 1, 0], [0, 1, 0], [0, 0, 1]])
    got, other = evaluate(committee, atoms), evaluate(committee, larger)
    assert_same(2 * got.energy_members, other.energy_members)
    assert_same(got.stress_members, other.stress_members)
    assert_same(got.forces_members, other.forces_members[:, : len(atoms)])


def test_isolated_atom_costs_its_self_energy_and_what_the_networks_give_without_neighbours(committee):
    got = evaluate(committee, Atoms("Al"), Atoms("Cu"))
    lonely = committee.atomic_energies(torch.zeros(2, committee.aev.length).double(), torch.tensor([0, 1]))
    assert_same(got.energy_members, lonely + torch.tensor([-2.0, 3.0]))
    assert (got.forces_members == 0).all()


def test_member_depends_on_seed_and_its_number_alone():
    small, large = (
        Committee.from_settings(SETTINGS.model_copy(update={"n_members": n}), ELEMENTS, seed=4) for n in (2, 5)
    )
    for name, value in small.state_dict().items():
        assert torch.equal(value, large.state_dict()[name][:2])
        if "weights" in name:
            assert not torch.equal(value[0], value[1])


def test_self_energies_stay_float64(committee):
    assert committee.float().self_energies.dtype == torch.float64


def test_energy_keeps_its_digits_in_float32_beside_large_self_energies(committee, atoms):
    committee.self_energies = torch.tensor([-73630.0, -45000.0], dtype=torch.float64)
    exact = evaluate(committee, atoms).energy_members
    assert (evaluate(committee.float(), atoms).energy_members - exact).abs().max() < 1e-5 * len(atoms)


def test_networks_for_unknown_elements_are_refused():
    settings = SETTINGS.model_copy(update={"hidden_by_element": {"Au": (4,)}})
    with pytest.raises(ValueError, match=r"hidden_by_element names \['Au'\]: elements are \['Al', 'Cu'\]"):
        Committee.from_settings(settings, ELEMENTS, seed=0)
