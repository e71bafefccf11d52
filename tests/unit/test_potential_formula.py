"""The committee equals an independent evaluation of the published formula, its forces and stress the derivatives."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import brute_force
import numpy as np
import pytest
import torch

from potential.committee import Committee
from potential.config import PotentialSettings
from potential.kernels import native_available
from potential.model_file import load_committee
from potential.neurochem import import_neurochem
from potential.structures import Structures
from shards.frame import Frame

ALL_PBC = list(itertools.product((False, True), repeat=3))
SMALL = PotentialSettings(
    radial_cutoff_A=4.6,
    angular_cutoff_A=3.8,
    first_shift_A=1.0,
    n_radial=8,
    n_angular_radial=3,
    n_angular=4,
    hidden=(10, 7),
    n_members=3,
)
NUMBERS = {"Al": 13, "Cu": 29, "H": 1}


KERNELS = ["reference", "native"] if native_available() else ["reference"]


@pytest.fixture(scope="module")
def aluminium(tmp_path_factory):
    if "SMELT_REFERENCE" not in os.environ:
        pytest.skip("SMELT_REFERENCE is not set")
    source = Path(os.environ["SMELT_REFERENCE"]) / "ani-al"
    path = tmp_path_factory.mktemp("ani-al") / "model.safetensors"
    import_neurochem(source, path)
    return load_committee(path, dtype=torch.float64), brute_force.published_aluminium(source)


def small_committee(elements: list[str]) -> Committee:
    settings = SMALL.model_copy(update={"hidden_by_element": {elements[-1]: (6,)}})
    committee = Committee.from_settings(settings, elements, seed=5).double()
    committee.self_energies = torch.linspace(-3.0, 7.0, len(elements), dtype=torch.float64)
    return committee


@pytest.fixture
def check(monkeypatch):
    """Compare a committee, on every kernel there is, with one evaluation of the formula."""

    def compare(committee, formula, arrays):
        numbers, positions, cell, pbc = arrays
        structures = Structures.from_frames([Frame(numbers, positions, cell, pbc)], committee.elements)
        energies = formula.energies(numbers, positions, cell, pbc)
        forces = brute_force.forces(formula, numbers, positions, cell, pbc)
        volume = abs(np.linalg.det(cell))
        virial = brute_force.virial(formula, numbers, positions, cell, pbc) if volume > 0 else None
        for kernels in KERNELS:
            monkeypatch.setattr("potential.kernels.FORCED", kernels)
            got = committee.evaluate(structures, forces="members", stress=True)
            assert np.abs(got.energy_members[:, 0].numpy() - energies).max() < 1e-6 * len(numbers)
            assert np.abs(got.forces_members.numpy() - forces).max() < 1e-5
            mean = committee.evaluate(structures, forces="mean", stress=True)
            assert np.abs(mean.forces_mean.numpy() - forces.mean(0)).max() < 1e-5
            if virial is None:
                assert got.stress.isnan().all()
            else:
                assert np.abs(got.stress_members[:, 0].numpy() - virial / volume).max() < 1e-6
                assert np.abs(mean.stress[0].numpy() - virial.mean(0) / volume).max() < 1e-6

    return compare


@pytest.mark.parametrize("pbc", ALL_PBC)
@pytest.mark.parametrize("elements", [["Al"], ["Al", "Cu"], ["Al", "Cu", "H"]])
def test_small_committee_equals_the_formula_for_any_periodic_axes(check, elements, pbc):
    rng = np.random.default_rng([len(elements), *pbc])
    committee = small_committee(elements)
    numbers = [NUMBERS[element] for element in elements]
    formula = brute_force.of_committee(committee, numbers)
    for length, n_atoms in ((3.4, 2), (5.5, 4)):  # smaller and larger than the cutoff of 4.6
        check(committee, formula, brute_force.random_frame_arrays(rng, numbers, n_atoms, length, pbc))


@pytest.mark.parametrize(
    ("length", "n_atoms", "pbc"),
    [(3.1, 1, (1, 1, 1)), (4.6, 4, (1, 1, 1)), (4.6, 4, (1, 0, 1)), (8.0, 5, (0, 1, 0)), (8.0, 5, (1, 1, 1))],
)
def test_published_aluminium_committee_equals_the_formula(check, aluminium, length, n_atoms, pbc):
    committee, formula = aluminium
    rng = np.random.default_rng(n_atoms)
    arrays = brute_force.random_frame_arrays(rng, [13], n_atoms, length, np.array(pbc, dtype=bool), closest=2.2)
    check(committee, formula, arrays)


def test_float32_is_close_to_float64():
    """Inputs of the networks carry 6e-8 of rounding each; energies of a few eV follow to 1e-5, forces to 1e-4."""
    rng = np.random.default_rng(1)
    committee = small_committee(["Al", "Cu"])
    arrays = brute_force.random_frame_arrays(rng, [13, 29], 8, 6.0, (True, True, False))
    structures = Structures.from_frames([Frame(*arrays)], committee.elements)
    exact = committee.evaluate(structures, forces="members")
    rough = committee.float().evaluate(structures, forces="members")
    assert rough.energy_members.dtype == torch.float64
    assert rough.forces_members.dtype == torch.float32
    assert (rough.energy_members - exact.energy_members).abs().max() < 1e-5 * 8
    assert (rough.forces_members - exact.forces_members).abs().max() < 1e-4
