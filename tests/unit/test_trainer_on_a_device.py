"""A training step stays on its device and never waits for it; ranks of a node share its GPUs."""

import copy
import unittest.mock
from dataclasses import replace

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
from trainer.fit import step_gradient
from trainer.networks import Networks
from trainer.optimiser import Adam
from trainer.problem import Problem
from trainer.rank import choose_device

N_MEMBERS = 2


@pytest.fixture(scope="module", params=[4.0, 0.0], ids=["kept", "recomputed"])
def problem(request, tmp_path_factory) -> Problem:
    """Cells of two elements; no size is there once only: pretended tensors of one number are taken for real ones."""
    rng = np.random.default_rng(0)
    cells = [
        Frame(rng.permutation(np.resize([13, 29], n)), rng.uniform(0, 6, (n, 3)), 6 * np.eye(3), np.ones(3, dtype=bool))
        for n in (3, 5, 3, 5, 2, 2, 2, 2)
    ]
    rows = [(frame, Label(0.0, rng.normal(size=(frame.n_atoms, 3)), np.zeros((3, 3)))) for frame in cells]
    receipt = write_labels(tmp_path_factory.mktemp("labels") / "cells.h5", Level("random", ""), rows)
    p = AEVParameters.from_settings(PotentialSettings(radial_cutoff_A=4, angular_cutoff_A=3, n_radial=4), 2)
    networks = Networks.of(Committee(["Al", "Cu"], p, [(8, 4), (8, 4)], N_MEMBERS))
    dataset = load_dataset([receipt], ["Al", "Cu"], verify=False)
    settings = TrainerSettings(jacobian_memory_GB=request.param)
    with unittest.mock.patch.dict("os.environ", SMELT_KERNELS="reference"):  # what is kept is as on a GPU
        return Problem(dataset, np.zeros(2), networks, p, ["Al", "Cu"], N_MEMBERS, settings, 0, 1)


def moved(example):
    """The example on the pretended device, but for its species."""
    geometry = example.geometry
    there = {name: like(value) for name, value in vars(geometry).items() if name != "species" and value is not None}
    species = torch.zeros(len(geometry.species), dtype=torch.int64)
    return replace(example, geometry=replace(geometry, **there, species=species), target=like(example.target))


def test_a_step_stays_on_its_device_and_never_waits_for_it(problem, monkeypatch):
    monkeypatch.setenv("SMELT_KERNELS", "gpu")
    monkeypatch.setattr(gpu, "_launch", lambda program, grid, *arguments, **constants: None)
    monkeypatch.setattr(torch, "nonzero", lambda mask: torch.arange(len(mask))[:, None])  # of species, on the CPU
    with pretended_device() as device:
        there = copy.copy(problem)
        there.device = torch.device(device)
        there.learns = like(problem.learns)
        there._kept = {index: moved(example) for index, example in problem._kept.items()}
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
