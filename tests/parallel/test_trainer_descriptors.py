"""Forces, stress and their gradients, kept or recomputed, against the committee's own evaluation and autograd."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from trainer_cases import SMALL, emt_rows, write_manifest

from potential.committee import Committee
from potential.kernels import native
from potential.structures import Structures
from shards import Manifest
from trainer.config import TrainerSettings
from trainer.dataset import Dataset, fit_self_energies, load_dataset
from trainer.descriptors import describe, join, with_jacobian
from trainer.fit import fit, role_sums
from trainer.folds import VALID
from trainer.networks import Networks
from trainer.problem import Problem
from trainer.room import Room
from trainer.step import BLOCKS_COMPARED, Steps, step_gradient
from trainer.world import Solo

ELEMENTS = ("Al", "Cu")


@pytest.fixture(scope="module")
def committee() -> Committee:
    return Committee.from_settings(SMALL, ELEMENTS, seed=3).double()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    manifest = write_manifest(tmp_path_factory.mktemp("labels"), emt_rows(12, elements=ELEMENTS))
    return load_dataset(Manifest(manifest).receipts(), ELEMENTS, verify=True)


def _problem(dataset, committee, rank=0, n_ranks=1, allowed_GB=1.0, **settings) -> Problem:
    return Problem(
        dataset,
        fit_self_energies(dataset.counts, dataset.energy),
        Networks.of(committee),
        committee.aev,
        ELEMENTS,
        committee.n_members,
        TrainerSettings(**({"dtype": "float64", "steps_per_epoch": 2} | settings)),
        rank,
        n_ranks,
        allowed_GB,
    )


@pytest.mark.parametrize("kept", [True, False])
def test_forces_and_stress_of_training_equal_those_of_the_committee(committee, kept):
    frames = [frame for frame, _ in emt_rows(3, seed=5, elements=ELEMENTS)]
    geometries = describe(Structures.from_frames(frames, ELEMENTS), committee.aev, torch.float64)
    block = join(
        [with_jacobian(geometry, committee.aev) if kept else geometry for geometry in geometries], committee.aev
    )
    networks = Networks.of(committee)
    energies, g, _ = networks.forward(networks.take(committee, torch.float64), block.seen)
    forces, virial = block.project(g)
    expected = committee.evaluate(Structures.from_frames(frames, ELEMENTS), forces="members", stress=True)
    stress = virial / torch.tensor([frame.volume_A3 for frame in frames])[:, None]
    assert torch.allclose(energies.sum(1), expected.energy_members.sum(1), atol=1e-10)
    assert torch.allclose(forces, expected.forces_members, atol=1e-10)
    voigt = expected.stress_members[:, :, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    assert torch.allclose(stress, voigt, atol=1e-10)


def test_without_a_virial_to_compare_with_forces_are_the_same_and_less_is_kept(committee):
    frames = [frame for frame, _ in emt_rows(2, seed=5, elements=ELEMENTS)]
    geometries = describe(Structures.from_frames(frames, ELEMENTS), committee.aev, torch.float64)
    whole = [with_jacobian(geometry, committee.aev) for geometry in geometries]
    less = [with_jacobian(geometry, committee.aev, virial_known=False) for geometry in geometries]
    blocks = [join(each, committee.aev) for each in (whole, less)]
    g = torch.randn(2, *blocks[0].seen.aev.shape, dtype=torch.float64)
    (forces, _), (same, nothing) = (block.project(g) for block in blocks)
    assert torch.equal(forces, same)
    assert not nothing.any()
    if native.available():
        assert sum(each.nbytes for each in less) < sum(each.nbytes for each in whole)


def test_lift_is_the_transpose_of_project(committee):
    torch.manual_seed(0)
    frames = [frame for frame, _ in emt_rows(2, seed=6, elements=ELEMENTS)]
    block = join(describe(Structures.from_frames(frames, ELEMENTS), committee.aev, torch.float64), committee.aev)
    g = torch.randn(2, *block.seen.aev.shape, dtype=torch.float64)
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


@pytest.mark.parametrize("jacobian_memory_GB", [1.0, 0.0])
def test_a_step_in_the_memory_of_another_one_gives_the_same_bits(dataset, committee, jacobian_memory_GB):
    parameters = Networks.of(committee).take(committee, torch.float64)
    problem, fresh = (_problem(dataset, committee, jacobian_memory_GB=jacobian_memory_GB) for _ in range(2))
    steps = Steps(problem, parameters)
    for structures in (np.arange(5), np.arange(len(dataset)), np.arange(3, 7), np.arange(5)):
        alone = step_gradient(fresh, parameters, structures)
        assert torch.equal(steps.gradient(structures), alone[0])
        assert torch.equal(steps.errors(), alone[1])
    assert not steps.errors().any()


def test_errors_of_many_steps_are_the_sums_of_those_of_each(dataset, committee):
    parameters, problem = Networks.of(committee).take(committee, torch.float64), _problem(dataset, committee)
    steps, parts = Steps(problem, parameters), [np.arange(5), np.arange(3, len(dataset))] * (BLOCKS_COMPARED - 1)
    for structures in parts:
        steps.gradient(structures)
    alone = [step_gradient(problem, parameters, structures)[1] for structures in parts]
    assert torch.allclose(steps.errors(), sum(alone), rtol=1e-12)


def test_a_room_is_used_again_as_long_as_it_is_large_enough():
    room, like = Room(), torch.zeros(1)
    first = room.take((4, 5), like)
    smaller = room.take((3, 2), like)
    assert (first.shape, smaller.shape) == ((4, 5), (3, 2))
    assert smaller.is_contiguous()
    assert smaller.data_ptr() == first.data_ptr()
    assert room.take((21,), like).numel() == 21
    assert room.take((2,), like.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_streamed_structures_give_the_same_bits_as_resident_ones(committee, tmp_path, dtype):
    rows = emt_rows(40, elements=ELEMENTS)
    for part in (rows[:9], rows[5:25], rows[25:]):  # of some frames there are two labels
        manifest = write_manifest(tmp_path / "labels", part)
    dataset = load_dataset(Manifest(manifest).receipts(), ELEMENTS, verify=True)
    parameters = Networks.of(committee).take(committee, getattr(torch, dtype))
    resident, streamed = (
        _problem(dataset, committee, allowed_GB=allowed_GB, dtype=dtype, jacobian_memory_GB=0.0, steps_per_epoch=5)
        for allowed_GB in (1.0, 0.0)
    )
    assert (resident.plan.descriptors, streamed.plan.descriptors) == (True, False)
    for epoch in range(2):
        for one, other in zip(resident.epoch(7, epoch), streamed.epoch(7, epoch), strict=True):
            assert np.array_equal(one, other)
            both = (step_gradient(problem, parameters, one) for problem in (resident, streamed))
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
        assert torch.equal(*(role_sums(problem, parameters, VALID) for problem in (resident, streamed)))


def test_what_is_kept_follows_from_sizes_and_the_memory_that_is_allowed(dataset, committee):
    everything = _problem(dataset, committee)
    assert (everything.plan.descriptors, everything.plan.derivatives) == (True, True)
    pattern = r"0\.000\d+ GB with descriptors, 0\.00\d+ GB more with derivatives, 1 GB allowed: all kept"
    assert re.fullmatch(pattern, everything.plan.reason)
    less = _problem(dataset, committee, allowed_GB=0.002)
    assert (less.plan.descriptors, less.plan.derivatives) == (True, False)
    assert less.plan.reason.endswith("the latter recomputed")
    nothing = _problem(dataset, committee, allowed_GB=1e-5)
    assert (nothing.plan.descriptors, nothing.plan.derivatives) == (False, False)
    assert nothing.plan.reason.endswith("streamed from the shards")


def test_a_step_takes_one_message_and_so_does_the_end_of_an_epoch(dataset, committee, tmp_path):
    sent = []

    class Listening(Solo):
        def add_up(self, values, name):
            sent.append(name)

    problem = _problem(dataset, committee, steps_per_epoch=5, max_epochs=2)
    parameters = Networks.of(committee).take(committee, torch.float64)
    fit(problem, parameters, Listening(), seed=0, folder=tmp_path, job="", stop=lambda: False)
    assert sent == ["resume", *(["gradient"] * 5 + ["epoch"]) * 2, "final"]


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
