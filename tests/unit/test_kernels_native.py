"""The C++ kernels against a slow numpy evaluation of the published formula, on every instruction set there is here."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from potential.aev import AEVParameters
from potential.config import PotentialSettings
from potential.kernels import library, native, reference

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")

# Wide bins and odd counts, so that no number is a multiple of a lane count or hides behind a vanishing Gaussian.
SMALL = AEVParameters(
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
WHOLE = replace(SMALL, zeta=32.0)
ALUMINIUM = AEVParameters.from_settings(PotentialSettings(), 1)
# float32 resolves a distance of 4 A to 2e-7 A, which the narrowest Gaussian magnifies by about 10.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


@pytest.fixture(params=library.LEVELS)
def simd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    level: str = request.param
    if library.LEVELS.index(level) > library.best_level():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setattr("potential.kernels.library.FORCED", level)
    return level


def brute_force(vec: np.ndarray, row: list[int], species: np.ndarray, p: AEVParameters) -> np.ndarray:
    """The formula of potential/aev.py with loops, acos and pow."""

    def fc(r: float, cutoff: float) -> float:
        return 0.5 * math.cos(math.pi * r / cutoff) + 0.5 if r < cutoff else 0.0

    pairs = list(itertools.combinations_with_replacement(range(p.n_species), 2))
    shift_a, shift_z = np.array(p.angular_shifts)[:, None], np.array(p.angle_shifts)[None, :]
    out = np.zeros((len(row) - 1, p.length))
    for atom, (first, last) in enumerate(itertools.pairwise(row)):
        radial = out[atom, : p.n_radial].reshape(p.n_species, -1)
        angular = out[atom, p.n_radial :].reshape(len(pairs), *np.broadcast(shift_a, shift_z).shape)
        for j in range(first, last):
            r_j = math.sqrt(vec[j] @ vec[j])
            gauss = 0.25 * np.exp(-p.eta_radial * (r_j - np.array(p.radial_shifts)) ** 2)
            radial[species[j]] += gauss * fc(r_j, p.radial_cutoff_A)
            for k in range(j + 1, last):
                r_k = math.sqrt(vec[k] @ vec[k])
                weight = fc(r_j, p.angular_cutoff_A) * fc(r_k, p.angular_cutoff_A)
                angle = math.acos(0.95 * (vec[j] @ vec[k]) / (r_j * r_k))
                bend = 2 * ((1 + np.cos(angle - shift_z)) / 2) ** p.zeta
                stretch = np.exp(-p.eta_angular * ((r_j + r_k) / 2 - shift_a) ** 2)
                angular[pairs.index(tuple(sorted((species[j], species[k]))))] += weight * bend * stretch
    return out


def environments(counts: list[int], p: AEVParameters, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random neighbours of as many atoms as there are counts, some beyond both cutoffs."""
    rng = np.random.default_rng(seed)
    n = sum(counts)
    direction = rng.normal(size=(n, 3))
    length = rng.uniform(0.8, 1.15 * p.radial_cutoff_A, size=(n, 1))
    vec = direction / np.linalg.norm(direction, axis=1, keepdims=True) * length
    return torch.tensor(vec), torch.tensor([0, *np.cumsum(counts)]), torch.tensor(rng.integers(p.n_species, size=n))


def numeric(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def gap(ours: torch.Tensor, truth: np.ndarray) -> float:
    """Largest deviation, relative to the largest number."""
    return float(np.abs(numeric(ours) - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", [SMALL, WHOLE, ALUMINIUM], ids=["3 species", "whole Zeta", "ANI-Al"])
def test_aev_agrees_with_the_formula(p: AEVParameters, dtype: torch.dtype, simd: str) -> None:
    vec, row, species = environments([17, 0, 1, 40, 2], p)
    truth = brute_force(vec.numpy(), row.tolist(), species.numpy(), p)
    assert gap(native.aev_forward(vec.to(dtype), row, species, p), truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("zeta", [SMALL.zeta, 0.5, 1.0, 2.0, 5.5, 32.0, 63.0, 69.4, 300.0])
def test_aev_and_vjp_agree_with_the_reference_whatever_zeta_is(zeta: float, dtype: torch.dtype, simd: str) -> None:
    p = replace(SMALL, zeta=zeta)
    vec, row, species = environments([17, 0, 4], p)
    cotangent = torch.randn(2, 3, p.length, dtype=torch.float64, generator=torch.manual_seed(1))
    aev, aev_truth = native.aev_forward(vec.to(dtype), row, species, p), reference.aev_forward(vec, row, species, p)
    assert gap(aev, aev_truth.numpy()) < TOLERANCE[dtype]
    vjp, vjp_truth = (
        native.aev_vjp(vec.to(dtype), row, species, cotangent, p),
        reference.aev_vjp(vec, row, species, cotangent, p),
    )
    assert gap(vjp, vjp_truth.numpy()) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("n_items", [2, 3, 8, 17])
@pytest.mark.parametrize(
    ("n_shells", "n_angles", "eta", "zeta"),
    [(8, 8, 6.5, 69.4), (1, 1, 6.5, 69.4), (7, 3, 90.0, 300.0), (10, 24, 90.0, 300.0), (4, 9, 8.0, 14.1)],
    ids=["ANI-Al", "one of each", "narrow", "narrow and many", "wide"],
)
def test_vjp_of_items_takes_all_shifts_within_reach(
    n_shells: int, n_angles: int, eta: float, zeta: float, n_items: int, simd: str
) -> None:
    shells = tuple(1.0 + 2.4 * i / n_shells for i in range(n_shells))
    angles = tuple((i + 0.5) * math.pi / n_angles for i in range(n_angles))
    p = replace(SMALL, angular_shifts=shells, angle_shifts=angles, eta_angular=eta, zeta=zeta)
    vec, row, species = environments([25, 0, 1, 12], p)
    cotangent = torch.randn(n_items, len(row) - 1, p.length, dtype=torch.float64, generator=torch.manual_seed(1))
    truth = reference.aev_vjp(vec, row, species, cotangent, p).numpy()
    for dtype in (torch.float64, torch.float32):
        assert gap(native.aev_vjp(vec.to(dtype), row, species, cotangent.to(dtype), p), truth) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("n_items", [1, 2, 4, 5, 8, 9])
def test_vjp_agrees_with_finite_differences(n_items: int, simd: str) -> None:
    vec, row, species = environments([9, 1, 0, 6], SMALL)
    cotangent = torch.randn(n_items, len(row) - 1, SMALL.length, dtype=torch.float64, generator=torch.manual_seed(1))
    product = native.aev_vjp(vec, row, species, cotangent, SMALL)
    step = 1e-5
    for edge, axis in itertools.product(range(0, len(vec), 3), range(3)):
        moved = [vec.clone(), vec.clone()]
        moved[0][edge, axis] += step
        moved[1][edge, axis] -= step
        up, down = (torch.from_numpy(brute_force(v.numpy(), row.tolist(), species.numpy(), SMALL)) for v in moved)
        slope = (cotangent * (up - down)).sum((1, 2)) / (2 * step)
        # The third derivative of the narrowest function is about 1e3, times step^2.
        torch.testing.assert_close(product[:, edge, axis], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_items", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jvp_and_vjp_are_adjoint(n_items: int, dtype: torch.dtype, simd: str) -> None:
    vec, row, species = environments([30, 0, 1, 13], SMALL)
    random = torch.manual_seed(2)
    cotangent = torch.randn(n_items, len(row) - 1, SMALL.length, dtype=dtype, generator=random)
    tangent = torch.randn(n_items, len(vec), 3, dtype=dtype, generator=random)
    pulled = numeric(native.aev_vjp(vec.to(dtype), row, species, cotangent, SMALL))
    pushed = numeric(native.aev_jvp(vec.to(dtype), row, species, tangent, SMALL))
    left = np.einsum("mex,mex->m", pulled, numeric(tangent))
    right = np.einsum("mnl,mnl->m", numeric(cotangent), pushed)
    scale = np.linalg.norm(pushed) * np.linalg.norm(numeric(cotangent)) / n_items
    assert np.abs(left - right).max() < TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [{}, {"eta_angular": 90.0, "eta_radial": 300.0}, {"angular_shifts": ALUMINIUM.angular_shifts[::-1]}],
    ids=["ANI-Al", "Gaussians so narrow that most are out of reach", "shifts out of order"],
)
def test_products_agree_with_the_pytorch_reference_for_500_neighbours(
    changes: dict[str, Any], dtype: torch.dtype, simd: str
) -> None:
    p = replace(ALUMINIUM, n_species=2, **changes)
    vec, row, species = environments([500, 3], p)
    random = torch.manual_seed(3)
    cotangent = torch.randn(9, len(row) - 1, p.length, dtype=torch.float64, generator=random)
    tangent = torch.randn(2, len(vec), 3, dtype=torch.float64, generator=random)
    ours, truth = (
        (
            kernels.aev_forward(vec.to(kind), row, species, p),
            kernels.aev_vjp(vec.to(kind), row, species, cotangent.to(kind), p),
            kernels.aev_jvp(vec.to(kind), row, species, tangent.to(kind), p),
        )
        for kernels, kind in ((native, dtype), (reference, torch.float64))
    )
    for mine, theirs in zip(ours, truth, strict=True):
        assert gap(mine, numeric(theirs)) < TOLERANCE[dtype]


def test_edges_beyond_the_cutoffs_change_nothing(simd: str) -> None:
    vec, row, species = environments([24, 11], SMALL)
    length = vec.norm(dim=1)
    near = length < SMALL.radial_cutoff_A
    near_row = torch.cat((torch.zeros(1, dtype=torch.int64), near.long().cumsum(0)))[row]
    cotangent = torch.ones(2, 2, SMALL.length, dtype=torch.float64)
    all_edges = native.aev_vjp(vec, row, species, cotangent, SMALL)
    near_edges = native.aev_vjp(vec[near], near_row, species[near], cotangent, SMALL)
    assert near.sum() < len(vec)
    assert torch.equal(all_edges[:, near], near_edges)
    assert not all_edges[:, ~near].any()
    tangent = torch.ones(1, len(vec), 3, dtype=torch.float64)
    tangent[:, ~near] = 1e300
    pushed = native.aev_jvp(vec, row, species, tangent, SMALL)
    assert torch.equal(pushed, native.aev_jvp(vec[near], near_row, species[near], tangent[:, near], SMALL))
    exact = torch.tensor([[SMALL.radial_cutoff_A, 0.0, 0.0]], dtype=torch.float64)
    assert not native.aev_forward(exact, torch.tensor([0, 1]), species[:1], SMALL).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_collinear_and_coincident_neighbours_are_finite(dtype: torch.dtype, simd: str) -> None:
    vec = torch.tensor([[2.0, 0, 0], [-2.0, 0, 0], [2.5, 0, 0], [2.0, 0, 0], [0, 0, 0]], dtype=dtype)
    row, species = torch.tensor([0, 5]), torch.tensor([0, 0, 1, 1, 2])
    ones = torch.ones(1, 1, SMALL.length, dtype=dtype)
    assert native.aev_forward(vec, row, species, SMALL).isfinite().all()
    assert native.aev_vjp(vec, row, species, ones, SMALL).isfinite().all()
    assert native.aev_jvp(vec, row, species, torch.ones(1, 5, 3, dtype=dtype), SMALL).isfinite().all()
    truth = brute_force(vec[:4].double().numpy(), [0, 4], species[:4].numpy(), SMALL)
    ours = native.aev_forward(vec[:4], torch.tensor([0, 4]), species[:4], SMALL)
    assert gap(ours, truth) < TOLERANCE[dtype]


def test_empty_inputs_give_empty_or_zero_outputs(simd: str) -> None:
    vec, species = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    none, two = torch.tensor([0]), torch.tensor([0, 0, 0])
    assert native.aev_forward(vec, none, species, SMALL).shape == (0, SMALL.length)
    assert not native.aev_forward(vec, two, species, SMALL).any()
    assert native.aev_vjp(vec, two, species, torch.ones(3, 2, SMALL.length), SMALL).shape == (3, 0, 3)
    assert not native.aev_jvp(vec, two, species, torch.ones(3, 0, 3), SMALL).any()
    assert native.aev_vjp(vec, two, species, torch.ones(0, 2, SMALL.length), SMALL).shape == (0, 0, 3)


def test_the_number_of_threads_does_not_change_a_bit(simd: str) -> None:
    vec, row, species = environments([20] * 70, ALUMINIUM)
    cotangent = torch.randn(3, 70, ALUMINIUM.length, dtype=torch.float64)
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            results.append(native.aev_vjp(vec, row, species, cotangent, ALUMINIUM))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("flush", [False, True])
def test_the_floating_point_mode_of_the_process_is_left_as_it_was(flush: bool, simd: str) -> None:
    vec, row, species = environments([20] * 70, ALUMINIUM)
    try:
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormals")
        native.aev_forward(vec, row, species, ALUMINIUM)
        denormal_survives = float(np.float64(1e-300) * np.float64(1e-15)) > 0
    finally:
        torch.set_flush_denormal(False)
    assert denormal_survives != flush


@pytest.mark.parametrize("module", [native, reference])
@pytest.mark.parametrize("widths", [(11, 7, 1), (11, 96, 13, 5, 1), (150, 70, 48, 33, 1)])
@pytest.mark.parametrize("n_rows", [1, 45, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_networks_agree_with_autograd(
    dtype: torch.dtype, n_rows: int, widths: tuple[int, ...], module: ModuleType, simd: str
) -> None:
    random, n_members, length = torch.manual_seed(6), 3, widths[0]
    aev = torch.randn(150, length, dtype=torch.float64, generator=random)
    atoms = torch.randperm(150, generator=random)[:n_rows]
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(n_members, o, i, dtype=torch.float64, generator=random) / i**0.5 for i, o in pairs]
    biases = [torch.randn(n_members, o, dtype=torch.float64, generator=random) for _, o in pairs]
    truth = aev[atoms].expand(n_members, -1, -1).clone().requires_grad_()
    value = truth
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        # Not torch's celu: its derivative is good to 1e-9 only.
        value = torch.where(value > 0, value, 0.1 * torch.expm1(value.clamp(max=0) / 0.1)) if layer else value
        value = torch.baddbmm(bias[:, None], value, weight.transpose(1, 2))
    (slope,) = torch.autograd.grad(value.sum(), truth)

    parameters = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    for n_gradients in (n_members, 1, 0):
        energies = torch.full((n_members, 150), 7.0, dtype=dtype)
        gradient = torch.full((n_gradients, 150, length), 7.0, dtype=dtype)
        module.networks(aev.to(dtype), atoms, reference.Stack(*parameters), 0.1, energies, gradient)
        assert gap(energies[:, atoms], numeric(value.detach().squeeze(2))) < TOLERANCE[dtype]
        assert (energies == 7.0).sum() == n_members * (150 - n_rows)
        if n_gradients:
            expected = slope if n_gradients > 1 else slope.mean(0, keepdim=True)
            assert gap(gradient[:, atoms], numeric(expected)) < TOLERANCE[dtype]
            assert (gradient == 7.0).all(2).sum() == n_gradients * (150 - n_rows)


def run_networks(weights: list[torch.Tensor], aev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies of all members without biases, and the gradient of their mean."""
    energies, gradient = aev.new_zeros(len(weights[0]), len(aev)), aev.new_zeros(1, *aev.shape)
    stack = reference.Stack(weights, [weight.new_zeros(weight.shape[:2]) for weight in weights])
    native.networks(aev, torch.arange(len(aev)), stack, 0.1, energies, gradient)
    return energies, gradient


def test_networks_lose_little_where_numbers_differ_by_orders_of_magnitude(simd: str) -> None:
    random, widths = torch.manual_seed(7), (384, 160, 128, 96, 1)
    weights = [
        torch.randn(1, o, i, generator=random).pow(3) * torch.rand(1, o, 1, generator=random) / i**0.5 / 3
        for i, o in itertools.pairwise(widths)
    ]
    scale = 10 ** -torch.rand(200, 1, generator=random)
    aev = torch.rand(200, widths[0], generator=random).pow(8) * scale
    truth = run_networks([weight.double() for weight in weights], aev.double())
    for ours, exact in zip(run_networks(weights, aev), truth, strict=True):
        assert gap(ours, numeric(exact)) < TOLERANCE[torch.float32]


def test_networks_lose_little_where_inputs_are_of_different_size_and_weights_make_up_for_it(simd: str) -> None:
    random, widths = torch.manual_seed(10), (384, 160, 128, 96, 1)
    weights = [torch.randn(2, o, i, generator=random) / i**0.5 for i, o in itertools.pairwise(widths)]
    sizes = 10 ** (4 * torch.rand(widths[0], generator=random) - 3)
    weights[0] /= sizes
    aev = torch.rand(200, widths[0], generator=random) * sizes
    energies, gradient = run_networks(weights, aev)
    exact_energies, exact_gradient = run_networks([weight.double() for weight in weights], aev.double())
    assert gap(energies, numeric(exact_energies)) < TOLERANCE[torch.float32]
    assert gap(gradient * sizes, numeric(exact_gradient * sizes)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("inference", [False, True])  # where PyTorch does not count what is written
def test_weights_that_were_written_to_are_used_as_they_are(inference: bool, simd: str) -> None:
    with torch.inference_mode(inference):
        random, aev = torch.manual_seed(8), torch.rand(20, 40)
        weights = [torch.randn(2, o, i, generator=random) for i, o in ((40, 32), (32, 1))]
        stack = reference.Stack(weights, [torch.zeros(2, 32), torch.zeros(2, 1)])

        def energies() -> torch.Tensor:
            out = torch.zeros(2, 20)
            native.networks(aev, torch.arange(20), stack, 0.1, out, torch.zeros(0, 20, 40))
            return out

        before = energies()
        weights[0][1] *= 2
        after = energies()
        assert torch.equal(after, run_networks([weight.clone() for weight in weights], aev)[0])
        assert gap(after[0], numeric(before[0])) < TOLERANCE[torch.float32]  # but for a scale that members share
        assert gap(after[1], numeric(before[1])) > 0.1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_harms_no_other_atom(broken: float, simd: str) -> None:
    random, aev = torch.manual_seed(9), torch.rand(70, 64)
    weights = [torch.randn(2, o, i, generator=random) for i, o in ((64, 32), (32, 1))]
    energies, gradient = run_networks(weights, aev)
    aev[3, 17] = broken
    broken_energies, broken_gradient = run_networks(weights, aev)
    others = torch.arange(70) != 3
    assert not broken_energies[:, 3].isfinite().any()
    assert torch.equal(broken_energies[:, others], energies[:, others])
    assert torch.equal(broken_gradient[:, others], gradient[:, others])
    # So do networks that training has driven away.
    weights[0][1, 5] = torch.nan
    assert not run_networks(weights, torch.rand(70, 64))[0][1].isfinite().any()


@pytest.mark.parametrize("module", [native, reference])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pair_sums_and_differences_agree_with_loops(dtype: torch.dtype, n_threads: int, module: ModuleType) -> None:
    rng = np.random.default_rng(5)
    counts = [3, 0, 7, 1]
    row, other = torch.tensor([0, *np.cumsum(counts)]), torch.tensor(rng.integers(len(counts), size=sum(counts)))
    # Small integers: every order of summation gives the same.
    pair = torch.tensor(rng.integers(-9, 9, size=(3, sum(counts), 3)), dtype=dtype)
    expected = torch.zeros(3, len(counts), 3, dtype=dtype)
    centre = [atom for atom, count in enumerate(counts) for _ in range(count)]
    for edge, (i, j) in enumerate(zip(centre, other.tolist(), strict=True)):
        expected[:, i] += pair[:, edge]
        expected[:, j] -= pair[:, edge]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        summed = module.pair_sums(pair, row, other)
        spread = module.pair_differences(expected, row, other)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(summed, expected)
    assert torch.equal(spread, expected[:, centre] - expected[:, other])


@pytest.mark.parametrize(("variable", "value"), [("SMELT_KERNELS", "reference"), ("SMELT_SIMD", "plain")])
def test_kernels_and_instructions_are_chosen_by_the_environment(variable: str, value: str) -> None:
    script = (
        "import torch; from potential import kernels; from potential.kernels import library;"
        "print(kernels.implementation(torch.zeros(1)), library.LEVELS[library.level()])"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=os.environ | {variable: value}, capture_output=True, text=True, check=True)
    assert value in run.stdout.split()


def test_an_instruction_set_this_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potential.kernels.library.FORCED", "mmx")
    vec, row, species = environments([3], SMALL)
    with pytest.raises(ValueError, match=r"SMELT_SIMD = 'mmx': this processor has plain"):
        native.aev_forward(vec, row, species, SMALL)


def test_mismatched_shapes_are_refused_with_both_shapes() -> None:
    vec, row, species = environments([3], SMALL)
    with pytest.raises(ValueError, match=rf"cotangent is \(1, 1, 7\) on cpu: must be \(1, 1, {SMALL.length}\)"):
        native.aev_vjp(vec, row, species, torch.ones(1, 1, 7), SMALL)
    with pytest.raises(ValueError, match="row ends at 3: there are 2 pairs"):
        native.aev_forward(vec[:2], row, species[:2], SMALL)
    with pytest.raises(TypeError, match=r"float16: the C[+][+] kernels know float32 and float64"):
        native.aev_forward(vec.half(), row, species, SMALL)
