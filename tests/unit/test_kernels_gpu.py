"""The Triton kernels against plain PyTorch: in Triton's interpreter, or on a GPU (see conftest.py)."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretended_device import like, pretended_device
from sampler_models import constant_conditions, fcc_frame, walker
from test_kernels_evaluate import AEV, CELU_ALPHA, N_MEMBERS, SELF_ENERGIES, stacks
from test_kernels_motion import atoms as moving_atoms
from test_kernels_native import ALUMINIUM, environments, gap, numeric
from test_kernels_training import pass_through_layers

pytest.importorskip("triton")
from potential import kernels
from potential.aev import AEVParameters
from potential.committee import Committee
from potential.config import PotentialSettings
from potential.kernels import Stack, blocks, gpu, programs, reference
from potential.neighbours import find_neighbours, pair_vectors
from potential.structures import Structures
from sampler import dynamics
from sampler.batch import start_batch
from shards.frame import Frame

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
# float32 resolves a distance of 4 A to 2e-7 A, which the narrowest Gaussian magnifies by about 10.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
ELEMENTS = ("H", "Al", "Cu")


def on_device(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [tensor.to(DEVICE, dtype if tensor.is_floating_point() else None) for tensor in tensors]


@pytest.mark.parametrize(
    ("p", "n_neighbours", "dtype"),
    [
        (ALUMINIUM, [11, 0, 1, 7], torch.float32),
        (replace(AEV, n_species=2), [11, 0, 1, 7], torch.float64),
        (AEV, [11, 0, 1, 7], torch.float32),
        (replace(AEV, n_species=4), [8, 0, 1], torch.float64),
    ],
    ids=["ANI-Al", "2 elements", "3 elements", "4 elements"],
)
def test_aev_and_its_products_are_those_of_the_reference(p, n_neighbours, dtype):
    vec, row, species = environments(n_neighbours, p)
    random = torch.manual_seed(1)
    # Of three, float32 goes by way of the Jacobian.
    cotangent = torch.randn(3, len(row) - 1, p.length, dtype=torch.float64, generator=random)
    tangent = torch.randn(3, len(vec), 3, dtype=torch.float64, generator=random)
    pairs = vec, row, species
    for name, argument in (("aev_forward", None), ("aev_vjp", cotangent), ("aev_jvp", tangent)):
        arguments = pairs if argument is None else (*pairs, argument)
        ours = getattr(gpu, name)(*on_device(arguments, dtype), p)
        assert ours.dtype == dtype
        assert gap(ours.cpu(), numeric(getattr(reference, name)(*arguments, p))) < TOLERANCE[dtype], name


def test_more_neighbours_than_a_program_takes_at_a_time_are_all_counted(monkeypatch):
    for name in ("PAIRS_PER_PROGRAM", "WARP"):
        monkeypatch.setattr(gpu, name, 8)
    p = replace(AEV, n_species=2)
    vec, row, species = environments([35], p)
    cotangent = torch.randn(1, 1, p.length, dtype=torch.float64, generator=torch.manual_seed(1))
    ours = gpu.aev_forward(*on_device((vec, row, species), torch.float64), p)
    assert gap(ours.cpu(), numeric(reference.aev_forward(vec, row, species, p))) < 1e-13
    pulled = gpu.aev_vjp(*on_device((vec, row, species, cotangent), torch.float64), p)
    assert gap(pulled.cpu(), numeric(reference.aev_vjp(vec, row, species, cotangent, p))) < 1e-13


def test_pairs_beyond_the_cutoffs_and_coincident_ones_add_nothing_and_nothing_infinite():
    vec = torch.tensor([[2.0, 0, 0], [-2.0, 0, 0], [2.5, 0, 0], [0, 0, 0], [4.2, 0, 0], [0, 9, 0]], dtype=torch.float64)
    row, species = torch.tensor([0, 6]), torch.tensor([0, 0, 1, 2, 1, 0])
    pairs = on_device((vec, row, species), torch.float64)
    pulled = gpu.aev_vjp(*pairs, torch.ones(1, 1, AEV.length, dtype=torch.float64, device=DEVICE), AEV)
    assert pulled.isfinite().all()
    assert not pulled[:, 4:].any()
    tangent = torch.ones(1, 6, 3, dtype=torch.float64, device=DEVICE)
    tangent[:, 4:] = torch.inf
    assert gpu.aev_jvp(*pairs, tangent, AEV).isfinite().all()


def test_empty_inputs_give_empty_or_zero_outputs():
    vec, species = torch.empty(0, 3, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    two = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    ones = torch.ones(3, 2, AEV.length, device=DEVICE)
    assert gpu.aev_forward(vec, two[:1], species, AEV).shape == (0, AEV.length)
    assert not gpu.aev_forward(vec, two, species, AEV).any()
    assert gpu.aev_vjp(vec, two, species, ones, AEV).shape == (3, 0, 3)
    assert not gpu.aev_jvp(vec, two, species, torch.ones(3, 0, 3, device=DEVICE), AEV).any()
    assert not gpu.pair_sums(torch.ones(3, 0, 3, device=DEVICE), two, species).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_over_pairs_and_their_transposes_are_those_of_the_reference(dtype):
    structures = Structures.from_frames(frames()[2:], ELEMENTS)
    pairs = find_neighbours(structures, 4.0)
    random, n_atoms, frame = torch.manual_seed(4), len(structures.positions), structures.frame_of_atom
    vec = pair_vectors(structures, pairs)
    values = torch.randn(2, len(vec), 3, dtype=torch.float64, generator=random)
    atom, strain = (torch.randn(2, n, k, dtype=torch.float64, generator=random) for n, k in ((n_atoms, 3), (2, 6)))
    reverse = gpu.find_reverse(*on_device((vec, pairs.row, pairs.other), dtype))
    assert torch.equal(reverse.cpu(), reference.find_reverse(vec, pairs.row, pairs.other))
    calls = {
        "pair_sums": (values, pairs.row, pairs.other),
        "pair_virials": (values, vec, pairs.row, frame),
        "pair_tangents": (atom, strain, vec, pairs.row, pairs.other, frame),
    }
    for name, arguments in calls.items():
        more = (structures.n_frames,) if name == "pair_virials" else ()
        truth = getattr(reference, name)(*arguments, *more)
        there = on_device(arguments, dtype)
        for last in (more, (reverse,)) if name == "pair_sums" else (more,):
            assert gap(getattr(gpu, name)(*there, *last).cpu(), numeric(truth)) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_energies_and_the_gradient_of_a_loss_are_those_of_the_reference(dtype, monkeypatch):
    monkeypatch.setattr(gpu, "CUTS", 4)  # less to fill up with
    there = pass_through_layers(gpu, dtype, DEVICE)
    for ours, truth in zip(there, pass_through_layers(reference, torch.float64), strict=True):
        assert gap(ours.cpu(), numeric(truth)) < TOLERANCE[dtype]


@pytest.mark.parametrize("widths", [(11, 7, 1), (150, 72, 100, 30, 1), (384, 160, 128, 96, 1)])
def test_networks_of_any_width_are_those_of_the_reference(widths):
    random, n_members = torch.manual_seed(5), 2
    shapes = [(n_members, n_out, n_in) for n_in, n_out in itertools.pairwise(widths)]
    weights = [torch.randn(shape, dtype=torch.float64, generator=random) / shape[2] ** 0.5 for shape in shapes]
    biases = [torch.randn(shape[:2], dtype=torch.float64, generator=random) for shape in shapes]
    aev, atoms = torch.randn(20, widths[0], dtype=torch.float64, generator=random), torch.randperm(20)[:9]
    for n_gradients in (n_members, 1, 0):
        answers = []
        for module, dtype, device in ((gpu, torch.float32, DEVICE), (reference, torch.float64, "cpu")):
            energies = torch.full((n_members, 20), 7.0, dtype=dtype, device=device)
            gradient = torch.full((n_gradients, 20, widths[0]), 7.0, dtype=dtype, device=device)
            stack = Stack(*([each.to(device, dtype) for each in side] for side in (weights, biases)))
            module.networks(aev.to(device, dtype), atoms.to(device), stack, CELU_ALPHA, energies, gradient)
            answers.append((energies.cpu(), gradient.cpu()))
        for ours, truth in zip(*answers, strict=True):
            assert not truth.numel() or gap(ours, numeric(truth)) < TOLERANCE[torch.float32]


def frames() -> list[Frame]:
    """A small cell that sees many images of itself, a molecule, a lone atom and a crystal of three elements."""
    rng = np.random.default_rng(0)
    made = [Frame([1], np.zeros((1, 3))), Frame([1, 29, 13], [[0, 0, 0], [0, 0, 1.5], [1.2, 0.1, 0.2]])]
    for n, pbc in ((2, [True] * 3), (7, [True, False, True])):
        side = (14.0 * n) ** (1 / 3)
        cell = side * (np.eye(3) + rng.uniform(-0.2, 0.2, (3, 3)))
        made.append(Frame(rng.choice([1, 13, 29], n), rng.uniform(0, side, (n, 3)) * 1.3 - 2, cell, pbc))
    return made


def evaluate(
    module: Any, device: str, dtype: torch.dtype, n_gradients: int = N_MEMBERS, stress: bool = True, n=4
) -> Any:
    structures = Structures.from_frames(frames()[:n], ELEMENTS, device=device)
    pairs = find_neighbours(structures, AEV.radial_cutoff_A + 0.3)
    networks = [Stack(*([t.to(device) for t in side] for side in (s.weights, s.biases))) for s in stacks(dtype)]
    where = structures, pairs.row, pairs.other, pairs.shift
    *found, spread = module.evaluate(*where, AEV, networks, SELF_ENERGIES, CELU_ALPHA, n_gradients, stress)
    return *found, *(spread or ())


@pytest.mark.parametrize(("n_gradients", "dtype"), [(N_MEMBERS, torch.float64), (1, torch.float32), (0, torch.float32)])
def test_energies_forces_and_stress_are_those_of_the_reference(n_gradients, dtype):
    ours = evaluate(gpu, DEVICE, dtype, n_gradients, stress=n_gradients > 0)
    truth = evaluate(reference, "cpu", torch.float64, n_gradients, stress=n_gradients > 0)
    for mine, theirs in itertools.takewhile(lambda pair: pair[0] is not None, zip(ours, truth, strict=True)):
        assert mine.shape == theirs.shape
        assert torch.equal(mine.cpu().isnan(), theirs.isnan())
        if mine.numel():
            assert gap(mine.cpu().nan_to_num(), numeric(theirs.nan_to_num())) < TOLERANCE[dtype]


@pytest.mark.parametrize("module", [gpu, reference])
def test_blocks_of_few_atoms_give_the_same_as_one(module, monkeypatch):
    device = DEVICE if module is gpu else "cpu"
    whole = evaluate(module, device, torch.float64, 1, n=3)
    allowed = blocks.BLOCK_BYTES_CPU if device == "cpu" else blocks.BLOCK_BYTES
    monkeypatch.setattr(blocks, "_bytes_per_atom", lambda *_: allowed // 5)
    for one, other in zip(evaluate(module, device, torch.float64, 1, n=3), whole, strict=True):
        assert gap(one.cpu().nan_to_num(), numeric(other.cpu().nan_to_num())) < 1e-13


def test_the_gpu_s_kernels_are_chosen_when_asked_for(monkeypatch):
    monkeypatch.setattr("potential.kernels.FORCED", "gpu")
    assert kernels.implementation(torch.empty(0, device=DEVICE)) == "gpu"
    monkeypatch.setattr("potential.kernels.FORCED", "cuda")
    with pytest.raises(ValueError, match="must be reference, native or gpu"):
        kernels.implementation(torch.empty(0))


def test_without_triton_plain_pytorch_takes_over_with_one_warning(monkeypatch, recwarn):
    monkeypatch.setattr("potential.kernels.FORCED", "gpu")
    monkeypatch.delattr(kernels, "gpu")
    monkeypatch.setitem(sys.modules, "potential.kernels.gpu", None)
    kernels._gpu.cache_clear()
    try:
        assert [kernels.implementation(torch.empty(0)) for _ in range(2)] == ["reference", "reference"]
    finally:
        kernels._gpu.cache_clear()
    (warning,) = recwarn
    assert "plain PyTorch runs on the GPU, several times slower" in str(warning.message)


def test_the_programs_compile_for_an_h200(pytestconfig):
    script = Path(__file__).with_name("compile_programs.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Kept from run to run: what Triton finds there it has compiled from the same source.
    environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(programs.__all__)


@pytest.mark.skipif(DEVICE == "cuda", reason="beside a pretended device a real one has no pinned memory")
def test_an_evaluation_stays_on_its_device_and_never_waits_for_it(monkeypatch):
    structures = Structures.from_frames(frames(), ELEMENTS)
    by_species = structures.atoms_by_species  # found once for a batch, by waiting
    pairs = find_neighbours(structures, AEV.radial_cutoff_A)
    monkeypatch.setattr(gpu, "_launch", lambda program, grid, *arguments, **constants: None)
    with pretended_device() as device:
        there = Structures(**{field.name: like(getattr(structures, field.name)) for field in fields(Structures)})
        vars(there)["atoms_by_species"] = tuple(like(atoms) for atoms in by_species)
        networks = [Stack([like(w) for w in s.weights], [like(b) for b in s.biases]) for s in stacks(torch.float32)]
        where = there, like(pairs.row), like(pairs.other), like(pairs.shift)
        for n_gradients in (N_MEMBERS, 1, 0):
            energies, forces, _, _ = gpu.evaluate(
                *where, AEV, networks, like(SELF_ENERGIES), CELU_ALPHA, n_gradients, False
            )
            assert energies.device.type == forces.device.type == device


def test_what_is_not_a_number_is_not_hidden_by_an_activation():
    values = torch.tensor([[1.0, -0.3, torch.nan]], dtype=torch.float64, device=DEVICE)
    for ours, truth in zip(gpu.celu(values.clone(), 0.1), reference.celu(values.cpu(), 0.1), strict=True):
        torch.testing.assert_close(ours.cpu(), truth, equal_nan=True)


@pytest.mark.parametrize("damping", [1.0, 0.9])
def test_a_drift_is_that_of_the_reference(damping):
    batch, step = moving_atoms(), torch.tensor([0, 1, 7, 2**40 + 3, 2**31])
    there = replace(batch, **{name: value.to(DEVICE, copy=True) for name, value in vars(batch).items()})
    gpu.drift(there, step.to(DEVICE), 0.03, 0.25, damping)
    reference.drift(batch, step, 0.03, 0.25, damping)
    for name in ("positions", "velocities"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(batch, name), rtol=1e-13, atol=1e-13)


def test_walkers_take_recorded_steps(monkeypatch):
    """On a GPU a graph is repeated; the list has room for more pairs. The first step is not recorded anywhere."""
    moved = []
    settings = constant_conditions(2000.0, check_every=4 if DEVICE == "cpu" else 50, skin_A=0.5)
    shape = PotentialSettings(radial_cutoff_A=4, angular_cutoff_A=3, n_radial=3, n_angular=2, n_angular_radial=2)
    committee = Committee(["Al"], AEVParameters.from_settings(shape, 1), [(8, 4)], n_members=2)
    committee.reset_parameters(seed=0)
    for device, programs_of, record in ((DEVICE, "gpu", True), ("cpu", "reference", False)):
        monkeypatch.setattr("potential.kernels.FORCED", programs_of)
        monkeypatch.setattr(dynamics, "worth_recording", lambda batch, record=record: record)
        moving = dynamics.Dynamics(copy.deepcopy(committee).to(device), settings)
        batch = start_batch([walker(0, fcc_frame(1), settings)], ["Al"], device)
        moving.prepare(batch)
        moving.advance(batch)
        moved.append(torch.cat([batch.positions, 10 * batch.velocities]).cpu())
    assert gap(moved[0], numeric(moved[1])) < 1e-5
