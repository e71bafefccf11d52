"""Energies, forces and stress of batches in one pass, on every instruction set there is here, against plain PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from ase.build import bulk

from potential.aev import AEVParameters
from potential.kernels import Stack, library, native, reference
from potential.neighbours import find_neighbours
from potential.structures import Structures
from shards.frame import Frame

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")

ELEMENTS = ("H", "Al", "Cu")
N_MEMBERS, CELU_ALPHA = 3, 0.1
AEV = AEVParameters(
    radial_cutoff_A=4.2,
    angular_cutoff_A=3.5,
    eta_radial=6.0,
    eta_angular=4.0,
    zeta=9.3,
    radial_shifts=(0.9, 1.5, 2.2, 2.9, 3.5),
    angular_shifts=(1.1, 1.9, 2.6),
    angle_shifts=(0.3, 0.9, 1.6, 2.1, 2.8),
    n_species=3,
)
SELF_ENERGIES = torch.tensor([-1.0, 2.0, -300.0], dtype=torch.float64)
HIDDEN = ((20, 7), (33,), (16, 16, 5))
# Distances of 4 A, resolved to 2e-7 A in float32, which the narrowest Gaussian magnifies by 10.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(params=library.LEVELS)
def simd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.LEVELS.index(request.param) > library.best_level():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr("potential.kernels.library.FORCED", request.param)


def stacks(dtype: torch.dtype) -> list[Stack]:
    random, made = torch.manual_seed(0), []
    for hidden in HIDDEN:
        pairs = list(itertools.pairwise((AEV.length, *hidden, 1)))
        weights = [torch.randn(N_MEMBERS, o, i, generator=random, dtype=torch.float64) / i**0.5 for i, o in pairs]
        biases = [torch.randn(N_MEMBERS, o, generator=random, dtype=torch.float64) for _, o in pairs]
        made.append(Stack([w.to(dtype) for w in weights], [b.to(dtype) for b in biases]))
    return made


def frames() -> list[Frame]:
    """Small and large, periodic or not, one of them in several units of work; a lone atom and a dimer."""
    rng = np.random.default_rng(0)
    numbers = np.array([1, 13, 29])
    made = [Frame([13], np.zeros((1, 3))), Frame([1, 29], [[0, 0, 0], [0, 0, 1.5]])]
    for n, pbc in ((2, [True] * 3), (7, [True, False, True]), (40, [False] * 3), (90, [True] * 3)):
        side = (12.0 * n) ** (1 / 3)
        cell = side * (np.eye(3) + rng.uniform(-0.2, 0.2, (3, 3)))
        made.append(Frame(rng.choice(numbers, n), rng.uniform(0, side, (n, 3)) * 1.3 - 2, cell, pbc))
    crystal = bulk("Al", cubic=True) * (5, 4, 4)
    crystal.rattle(0.2, seed=1)
    made.append(Frame(rng.choice(numbers, len(crystal)), crystal.positions, crystal.cell.array, crystal.pbc))
    return made


def evaluate(kernels, structures, dtype=torch.float64, n_gradients=N_MEMBERS, stress=True, skin_A=0.3):
    pairs = find_neighbours(structures, AEV.radial_cutoff_A + skin_A)
    *found, spread = kernels.evaluate(
        structures,
        pairs.row,
        pairs.other,
        pairs.shift,
        AEV,
        stacks(dtype),
        SELF_ENERGIES,
        CELU_ALPHA,
        n_gradients,
        stress,
    )
    return *found, *(spread or ())


@cache
def of_the_reference(n_gradients: int) -> tuple[torch.Tensor, ...]:
    return evaluate(reference, Structures.from_frames(frames(), ELEMENTS), n_gradients=n_gradients)


def gap(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest deviation, relative to the largest number; what is not a number must be so in both."""
    assert torch.equal(ours.isnan(), truth.isnan())
    ours, truth = ours.double().nan_to_num(), truth.double().nan_to_num()
    return float((ours - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_gradients", [N_MEMBERS, 1])
def test_energies_forces_and_stress_are_those_of_the_reference(n_gradients, dtype, simd):
    structures = Structures.from_frames(frames(), ELEMENTS)
    ours = evaluate(native, structures, dtype, n_gradients)
    truth = of_the_reference(n_gradients)
    assert [x.dtype for x in ours] == [torch.float64, *[dtype] * (4 if n_gradients > 1 else 2)]
    assert [x.shape for x in ours] == [x.shape for x in truth]
    for mine, theirs in zip(ours, truth, strict=True):
        assert gap(mine, theirs) < TOLERANCE[dtype]


def test_energies_alone_are_the_same_and_nothing_else_is_made(simd):
    structures = Structures.from_frames(frames(), ELEMENTS)
    energies, forces, stress = evaluate(native, structures, n_gradients=0, stress=False)
    assert torch.equal(energies, evaluate(native, structures)[0])
    assert forces.shape == (0, len(structures.positions), 3)
    assert stress is None


@pytest.mark.parametrize("module", [native, reference])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spread_is_mean_and_deviation_over_members(module, dtype):
    members = torch.randn(8, 301, 3, dtype=dtype, generator=torch.manual_seed(4)) + 50
    mean, deviation = module.spread(members.transpose(1, 2))  # in any order in memory
    torch.testing.assert_close(mean, members.double().mean(0).T.to(dtype))
    torch.testing.assert_close(deviation, members.double().std(0, correction=0).T.to(dtype), rtol=1e-5, atol=1e-5)


def test_stress_of_a_frame_without_volume_is_not_a_number():
    stress = evaluate(native, Structures.from_frames(frames(), ELEMENTS))[2]
    assert stress.isnan().flatten(2).all(2)[0].tolist() == [True, True, False, False, False, False, False]
    assert torch.equal(stress.nan_to_num(), stress.transpose(2, 3).nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_bit_depends_on_batch_mates_or_the_number_of_threads(dtype, simd):
    together = evaluate(native, Structures.from_frames(frames(), ELEMENTS), dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = evaluate(native, Structures.from_frames(frames(), ELEMENTS), dtype)
        torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)
    for x, y in zip(together, threaded, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    first = 0
    for number, frame in enumerate(frames()):
        energies, forces, stress, *spread = evaluate(native, Structures.from_frames([frame], ELEMENTS), dtype)
        assert torch.equal(energies[:, 0], together[0][:, number])
        assert torch.equal(forces, together[1][:, first : first + frame.n_atoms])
        assert torch.equal(stress[:, 0].nan_to_num(), together[2][:, number].nan_to_num())
        for alone, of_all in zip(spread, together[3:], strict=True):
            assert torch.equal(alone, of_all[first : first + frame.n_atoms])
        first += frame.n_atoms


def test_pairs_beyond_the_cutoff_change_nothing_but_rounding(simd):
    structures = Structures.from_frames(frames(), ELEMENTS)
    short, long = (evaluate(native, structures, skin_A=skin_A) for skin_A in (0.0, 1.5))
    for x, y in zip(short, long, strict=True):
        assert gap(x, y) < 1e-13


def test_positions_in_float32_far_from_the_origin_keep_their_differences(simd):
    # Differences are taken in float64: a frame a million A away, on points that float32 holds, has the same forces.
    rng = np.random.default_rng(2)
    positions = np.round(rng.uniform(0, 6, (20, 3)) * 8) / 8
    numbers = rng.choice([1, 13, 29], 20)
    near, far = (Structures.from_frames([Frame(numbers, positions + shift)], ELEMENTS) for shift in (0, 2.0**20))
    ours = evaluate(native, far.to(dtype=torch.float32), torch.float32, stress=False)[1]
    assert gap(ours, evaluate(native, near, torch.float32, stress=False)[1]) < 1e-6


def test_mismatched_lists_and_layers_are_refused():
    structures = Structures.from_frames(frames(), ELEMENTS)
    pairs = find_neighbours(structures, AEV.radial_cutoff_A)
    more = AEV, stacks(torch.float64), SELF_ENERGIES, CELU_ALPHA, 1, False
    with pytest.raises(ValueError, match=r"row is \(\d+,\) on cpu: must be"):
        native.evaluate(structures, pairs.row[:-1], pairs.other, pairs.shift, *more)
    wider = replace(AEV, radial_shifts=(*AEV.radial_shifts, 4.0))
    with pytest.raises(ValueError, match=r"weight 0 is \(3, 20, 105\) on cpu: must be \(3, 20, 108\)"):
        native.evaluate(structures, pairs.row, pairs.other, pairs.shift, wider, *more[1:])


def test_networks_in_a_precision_that_the_kernels_do_not_know_are_refused():
    structures = Structures.from_frames(frames(), ELEMENTS)
    with pytest.raises(TypeError, match="the C\\+\\+ kernels know float32 and float64"):
        evaluate(native, structures, torch.float16)
