"""Forces, stress and their gradients, kept or recomputed, against the committee's own evaluation and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import SMALL, emt_rows, write_manifest

from potential.committee import Committee
from potential.structures import Structures
from shards import Manifest
from trainer.config import TrainerSettings
from trainer.dataset import Dataset, fit_self_energies, load_dataset
from trainer.descriptors import describe, join, with_jacobian
from trainer.fit import step_gradient
from trainer.networks import Networks
from trainer.problem import Problem

ELEMENTS = ("Al", "Cu")


@pytest.fixture(scope="module")
def committee() -> Committee:
    return Committee.from_settings(SMALL, ELEMENTS, seed=3).double()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    manifest = write_manifest(tmp_path_factory.mktemp("labels"), emt_rows(12, elements=ELEMENTS))
    return load_dataset(Manifest(manifest).receipts(), ELEMENTS, verify=True)


def _problem(dataset, committee, rank=0, n_ranks=1, **settings) -> Problem:
    return Problem(
        dataset,
        fit_self_energies(dataset.counts, dataset.energy),
        Networks.of(committee),
        committee.aev,
        ELEMENTS,
        committee.n_members,
        TrainerSettings(dtype="float64", steps_per_epoch=2, **settings),
        rank,
        n_ranks,
    )


@pytest.mark.parametrize("kept", [True, False])
def test_forces_and_stress_of_training_equal_those_of_the_committee(committee, kept):
    frames = [frame for frame, _ in emt_rows(3, seed=5, elements=ELEMENTS)]
    geometries = [describe(frame, ELEMENTS, committee.aev, torch.float64) for frame in frames]
    block = join(
        [with_jacobian(geometry, committee.aev) if kept else geometry for geometry in geometries], committee.aev
    )
    networks = Networks.of(committee)
    energies, g, _ = networks.forward(networks.take(committee, torch.float64), block.aev, block.species)
    forces, virial = block.project(g)
    expected = committee.evaluate(Structures.from_frames(frames, ELEMENTS), forces="members", stress=True)
    stress = virial / torch.tensor([frame.volume_A3 for frame in frames])[:, None]
    assert torch.allclose(energies.sum(1), expected.energy_members.sum(1), atol=1e-10)
    assert torch.allclose(forces, expected.forces_members, atol=1e-10)
    voigt = expected.stress_members[:, :, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    assert torch.allclose(stress, voigt, atol=1e-10)


@pytest.mark.parametrize("kept", [True, False])
def test_lift_is_the_transpose_of_project(committee, kept):
    torch.manual_seed(0)
    frames = [frame for frame, _ in emt_rows(2, seed=6, elements=ELEMENTS)]
    geometries = [describe(frame, ELEMENTS, committee.aev, torch.float64) for frame in frames]
    block = join(
        [with_jacobian(geometry, committee.aev) if kept else geometry for geometry in geometries], committee.aev
    )
    g = torch.randn(2, *block.aev.shape, dtype=torch.float64)
    forces, virial = block.project(g)
    a, b = torch.randn_like(forces), torch.randn_like(virial)
    assert float((a * forces).sum() + (b * virial).sum()) == pytest.approx(
        float((block.lift(a, b) * g).sum()), rel=1e-10
    )


def test_gradients_are_the_same_kept_recomputed_and_summed_over_ranks(dataset, committee):
    parameters = Networks.of(committee).take(committee, torch.float64)
    structures = np.arange(len(dataset))
    kept, sums = step_gradient(_problem(dataset, committee), parameters, structures)
    recomputed, _ = step_gradient(_problem(dataset, committee, jacobian_memory_GB=0.0), parameters, structures)
    parts = [step_gradient(_problem(dataset, committee, rank, 3), parameters, structures) for rank in range(3)]
    assert torch.allclose(kept, recomputed, rtol=1e-9, atol=1e-11)
    assert torch.allclose(kept, sum(gradient for gradient, _ in parts), rtol=1e-10, atol=1e-12)
    assert torch.allclose(sums, sum(part for _, part in parts), rtol=1e-10)


def test_the_gradient_equals_the_finite_difference_of_the_loss(dataset, committee):
    problem = _problem(dataset, committee, force_cap_eV_per_A=0.3)
    parameters = Networks.of(committee).take(committee, torch.float64)
    structures = np.arange(len(dataset))
    gradient, _ = step_gradient(problem, parameters, structures)
    direction = torch.randn(parameters.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6

    def loss(shift: float) -> torch.Tensor:
        _, sums = step_gradient(problem, parameters + shift * direction, structures)
        return sums[:, 1] / sums[:, 0]

    # Central differences of a loss of order one: truncation 1e-9, rounding 1e-10, relative to slopes of order ten.
    difference = (loss(step) - loss(-step)) / (2 * step)
    assert torch.allclose((gradient * direction).sum(1), difference, rtol=1e-6)
