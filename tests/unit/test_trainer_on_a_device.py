"""A training step stays on its device and never waits for it; ranks of a node share its GPUs."""

import copy

import numpy as np
import pytest
import torch
from pretended_device import like, pretended_device

pytest.importorskip("triton")
from potential.aev import AEVParameters
from potential.committee import Committee
from potential.config import PotentialSettings
from potential.kernels import gpu
from shards import Frame, Label, Level, write_labels
from trainer.config import TrainerSettings
from trainer.dataset import load_dataset
from trainer.examples import join_examples
from trainer.fit import role_sums
from trainer.folds import VALID
from trainer.networks import Networks
from trainer.optimiser import Adam
from trainer.problem import Problem
from trainer.rank import choose_device
from trainer.resident import Resident
from trainer.step import Steps, step_gradient

N_MEMBERS = 3


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Problem:
    """Cells of two elements; no size is there once only: pretended tensors of one number are taken for real ones."""
    rng = np.random.default_rng(0)
    cells = [
        Frame(rng.permutation(np.resize([13, 29], n)), rng.uniform(0, 6, (n, 3)), 6 * np.eye(3), np.ones(3, dtype=bool))
        for n in (3, 5, 3, 5, 2, 2, 2, 2)
    ]
    rows = [(frame, Label(0.0, rng.normal(size=(frame.n_atoms, 3)), rng.normal(size=(3, 3)))) for frame in cells]
    receipt = write_labels(tmp_path_factory.mktemp("labels") / "cells.h5", Level("random", ""), rows)
    p = AEVParameters.from_settings(
        PotentialSettings(radial_cutoff_A=4, angular_cutoff_A=3, n_radial=3, n_angular=2, n_angular_radial=2), 2
    )
    committee = Committee(["Al", "Cu"], p, [(8, 4), (8, 4)], N_MEMBERS)
    committee.reset_parameters(seed=0)
    networks = Networks.of(committee)
    dataset = load_dataset([receipt], ["Al", "Cu"], verify=False)
    settings = TrainerSettings(jacobian_memory_GB=0.0, steps_per_epoch=1)
    shape = networks, p, ["Al", "Cu"], N_MEMBERS, settings
    return Problem(dataset, np.zeros(2), *shape, 0, 1)


@pytest.fixture(scope="module")
def parameters(problem) -> torch.Tensor:
    return torch.randn(N_MEMBERS, problem.networks.n_parameters, generator=torch.manual_seed(0)) / 3


def settled(problem: Problem) -> Problem:
    """The problem as it is on a GPU, with the same structures."""
    there, whole = copy.copy(problem), np.arange(8)
    examples = problem._examples(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potential.kernels.FORCED", "gpu")
        there._resident = Resident([(whole, examples)], int(problem.dataset.n_atoms.sum()), problem._p)
    return there


def test_blocks_that_are_gathered_are_those_that_are_joined(problem):
    part = np.array([5, 0, 3, 4])
    joined = join_examples(problem._examples(part), problem._p)
    for blocks in (settled(problem)._block(part)[1:], problem._block(part)[1:]):
        for ours, theirs in zip(blocks, joined, strict=True):
            for name in ("n_atoms", "frame_of_atom", "energy", "forces", "virial", "volume"):
                if hasattr(theirs, name):
                    assert torch.equal(getattr(ours, name).nan_to_num(-7), getattr(theirs, name).nan_to_num(-7))
        ours, theirs = blocks[0].seen, joined[0].seen
        assert torch.equal(ours.aev if ours.rows is None else ours.aev[ours.rows], theirs.aev)
        in_kinds = ours.rows is not None
        for x, y in zip(ours.elements, theirs.elements, strict=True):
            assert torch.equal(x, y if in_kinds else y.sort().values)
    ours, theirs = settled(problem)._block(part)[1], joined[0]
    for name in ("vec", "row", "other"):
        assert torch.equal(getattr(ours._pairs, name), getattr(theirs._pairs, name))
    assert torch.equal(ours._pairs.vec[ours._pairs.reverse], -ours._pairs.vec)


def test_a_step_with_the_gpu_s_programs_is_that_of_the_cpu(problem, parameters, monkeypatch):
    """Filled up, too: a step of few structures, of which one is another rank's."""
    few, mine = np.array([1, 4, 5, 6]), np.arange(8) != 5
    own = copy.copy(problem)
    own._is_mine = mine
    share = problem.share(few) / problem.share(few[mine[few]])
    gradient, errors = step_gradient(own, parameters, few[mine[few]])
    expected = gradient * share[:, None], errors
    roles = role_sums(own, parameters, VALID)

    monkeypatch.setattr("potential.kernels.FORCED", "gpu")
    there = settled(own)
    steps = Steps(there, parameters)
    for ours, theirs in zip((steps.gradient(few), steps.errors()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    many = np.append(np.arange(8), 0)  # more than are recorded
    expected = 2 * step_gradient(there, parameters, many)[1] + steps.errors()
    for structures in (many, few, many):
        steps.gradient(structures)
    alone = step_gradient(there, parameters, few)[1]
    torch.testing.assert_close(steps.errors(), expected + alone)
    torch.testing.assert_close(role_sums(there, parameters, VALID), roles, rtol=1e-4, atol=1e-4)


def test_more_than_a_recording_has_room_for_is_done_without_it(problem, parameters):
    recorded = Steps(settled(problem), parameters)._recorded
    whole = np.arange(8)
    assert recorded.holds(whole, whole)
    assert not recorded.holds(np.append(whole, 0), whole)
    assert not recorded.holds(whole, np.full(7, np.argmax(problem.dataset.n_atoms)))


def test_a_step_stays_on_its_device_and_never_waits_for_it(problem, monkeypatch):
    monkeypatch.setattr("potential.kernels.FORCED", "gpu")
    monkeypatch.setattr(gpu, "_launch", lambda program, grid, *arguments, **constants: None)
    there = settled(problem)
    with pretended_device() as device:
        there.device, there.learns = torch.device(device), like(problem.learns)
        for name, value in vars(there._resident).items():
            if isinstance(value, torch.Tensor):
                setattr(there._resident, name, like(value))
        parameters = torch.empty(N_MEMBERS, problem.networks.n_parameters, device=device)
        gradient, sums = step_gradient(there, parameters, np.arange(8))
        Adam.like(parameters).update(parameters, gradient, torch.ones(N_MEMBERS, device=device))
        assert gradient.device.type == sums.device.type == device


def test_ranks_of_a_node_share_its_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(choose_device("cuda", rank)) for rank in (0, 3, 4)] == ["cuda:0", "cuda:3", "cuda:0"]
    assert str(choose_device("cuda:1", 3)) == "cuda:1"
    assert str(choose_device("cpu", 3)) == "cpu"


def test_a_gpu_that_is_not_there_is_missed_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer.device = 'cuda': torch .* finds no GPU here: use 'cpu'"):
        choose_device("cuda", 0)
