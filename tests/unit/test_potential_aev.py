"""The parameter rule, the layout, and the two linear products of the AEV."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potential import kernels
from potential.aev import AEVParameters
from potential.config import PotentialSettings
from potential.neighbours import find_neighbours, pair_vectors
from potential.structures import Structures
from shards.frame import Frame
from shards.settings import SettingsError, parse_settings

SMALL = PotentialSettings(
    radial_cutoff_A=4.5, angular_cutoff_A=3.6, first_shift_A=1.0, n_radial=6, n_angular_radial=3, n_angular=4
)


@pytest.fixture(params=["reference", "native"])
def forced_kernels(request, monkeypatch):
    if request.param == "native" and not kernels.native_available():
        pytest.skip("C++ kernels are not built")
    monkeypatch.setattr("potential.kernels.FORCED", request.param)


def test_rule_gives_the_published_exponents_of_ani_al():
    p = AEVParameters.from_settings(PotentialSettings(), 1)
    assert (p.eta_radial, p.eta_angular, p.zeta, p.length) == (43.9, 6.5, 69.4, 96)
    assert p.radial_shifts[-1] == 6.8203125
    assert p.angular_shifts[-1] == 4.53125
    np.testing.assert_allclose(p.angle_shifts, [(2 * k + 1) * math.pi / 16 for k in range(8)], rtol=1e-14)


def test_rule_gives_the_published_exponents_of_ani_1xnr():
    settings = PotentialSettings(radial_cutoff_A=5.2, angular_cutoff_A=3.5, first_shift_A=0.5, n_angular=4)
    p = AEVParameters.from_settings(settings, 4)
    assert (p.eta_radial, p.eta_angular, p.zeta, p.length) == (65.7, 10.1, 14.1, 448)


def test_lengths_of_other_published_descriptors():
    x1 = PotentialSettings(n_radial=16, n_angular_radial=4, n_angular=8)
    assert AEVParameters.from_settings(x1, 4).length == 384
    assert AEVParameters.from_settings(x1, 7).length == 1008


def test_angular_cutoff_beyond_the_radial_is_refused():
    with pytest.raises(SettingsError, match="angular_cutoff_A = 6"):
        parse_settings(PotentialSettings, {"angular_cutoff_A": 6.0, "radial_cutoff_A": 5.0}, "potential")


def test_one_pair_and_one_triple_stand_where_the_layout_says():
    p = AEVParameters.from_settings(SMALL, 3)
    vec = torch.tensor([[0, 0, p.radial_shifts[2]], [0, p.radial_shifts[2], 0]], dtype=torch.float64)
    row, species = torch.tensor([0, 2]), torch.tensor([2, 1])
    aev = kernels.aev_forward(vec, row, species, p)[0]
    radial = aev[: p.n_radial].view(3, -1)
    assert radial.argmax(1).tolist() == [0, 2, 2]
    assert (radial[0] == 0).all()
    fc = 0.5 * math.cos(math.pi * p.radial_shifts[2] / 4.5) + 0.5
    assert radial[1, 2].item() == pytest.approx(0.25 * fc, abs=1e-12)
    angular = aev[p.n_radial :].view(6, -1)
    assert p.species_pairs == ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
    assert angular.abs().sum(1).nonzero().squeeze(1).tolist() == [4]  # species 1 and 2, in either order
    # The angle is 90 degrees, between the two middle ones of four bins; shifts of the length are major.
    by_bin = angular[4].view(3, 4)
    assert by_bin[:, 1].numpy() == pytest.approx(by_bin[:, 2].numpy(), rel=1e-9)
    assert (by_bin[:, 1] > by_bin[:, 0]).all()


def example(n_species: int, dtype: torch.dtype = torch.float64):
    rng = np.random.default_rng(n_species)
    # One atom has nobody near: rows without pairs must be taken.
    positions = np.vstack([rng.uniform(0, 5, (9, 3)), [[30.0, 30.0, 30.0]]])
    frames = [
        Frame(np.ones(10), positions),
        Frame(np.ones(3), rng.uniform(0, 4, (3, 3)), np.eye(3) * 4.1 + 0.3, [True, True, False]),
    ]
    structures = Structures.from_frames(frames, ["H"])
    neighbours = find_neighbours(structures, 5.0)  # beyond the cutoff of 4.5
    vec = pair_vectors(structures, neighbours).to(dtype)
    species = torch.from_numpy(rng.integers(0, n_species, 13))[neighbours.other]
    return vec, neighbours.row, species, AEVParameters.from_settings(SMALL, n_species)


@pytest.mark.parametrize("n_species", [1, 2, 4])
@pytest.mark.usefixtures("forced_kernels")
def test_products_are_adjoint_and_the_tangent_product_is_the_finite_difference(n_species):
    vec, row, species, p = example(n_species)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(3, len(row) - 1, p.length, generator=generator, dtype=torch.float64)
    tangent = torch.randn(3, len(vec), 3, generator=generator, dtype=torch.float64)
    forward = kernels.aev_jvp(vec, row, species, tangent, p)
    backward = kernels.aev_vjp(vec, row, species, cotangent, p)
    assert torch.allclose((cotangent * forward).sum((1, 2)), (backward * tangent).sum((1, 2)), rtol=1e-11)
    step = 1e-6
    for member in range(3):
        ahead, behind = (kernels.aev_forward(vec + sign * step * tangent[member], row, species, p) for sign in (1, -1))
        assert torch.allclose(forward[member], (ahead - behind) / (2 * step), atol=1e-7)


@pytest.mark.usefixtures("forced_kernels")
def test_pairs_beyond_the_cutoffs_change_nothing():
    vec, row, species, p = example(2)
    near = vec.norm(dim=1) < p.radial_cutoff_A
    assert not near.all()
    fewer = torch.nn.functional.pad(near.long().cumsum(0), (1, 0))[row]
    assert torch.equal(
        kernels.aev_forward(vec, row, species, p), kernels.aev_forward(vec[near], fewer, species[near], p)
    )
    ones = torch.ones(1, len(row) - 1, p.length, dtype=torch.float64)
    assert (kernels.aev_vjp(vec, row, species, ones, p)[:, ~near] == 0).all()


@pytest.mark.usefixtures("forced_kernels")
def test_atoms_on_the_same_spot_give_finite_numbers():
    p = AEVParameters.from_settings(SMALL, 1)
    vec = torch.tensor([[0.0, 0, 0], [0, 0, 2.0], [0, 0, 0], [0, 0, 2.0]], dtype=torch.float64)
    arguments = vec, torch.tensor([0, 2, 4]), torch.zeros(4, dtype=torch.int64)
    ones = torch.ones(1, 2, p.length, dtype=torch.float64)
    assert kernels.aev_forward(*arguments, p).isfinite().all()
    assert kernels.aev_vjp(*arguments, ones, p).isfinite().all()


@pytest.mark.usefixtures("forced_kernels")
def test_no_pairs_give_a_zero_descriptor():
    p = AEVParameters.from_settings(SMALL, 1)
    nothing = torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert kernels.aev_forward(*nothing, p).tolist() == [[0.0] * p.length] * 2
    assert kernels.aev_vjp(*nothing, torch.ones(2, 2, p.length), p).shape == (2, 0, 3)
    assert kernels.aev_jvp(*nothing, torch.zeros(2, 0, 3), p).shape == (2, 2, p.length)


@pytest.mark.usefixtures("forced_kernels")
def test_float32_agrees_with_float64():
    """Zeta and eta amplify the 6e-8 of rounding in cosines and distances about a hundredfold."""
    exact, rough = example(2), example(2, torch.float32)
    assert (kernels.aev_forward(*rough) - kernels.aev_forward(*exact)).abs().max() < 2e-5


@pytest.mark.usefixtures("forced_kernels")
def test_blocks_do_not_change_the_answer(monkeypatch):
    monkeypatch.setattr("potential.kernels.FORCED", "reference")
    vec, row, species, p = example(2)
    whole = kernels.aev_forward(vec, row, species, p)
    monkeypatch.setattr("potential.kernels.reference.PAIRS_PER_BLOCK", 1)
    assert torch.allclose(kernels.aev_forward(vec, row, species, p), whole, rtol=0, atol=1e-14)


def test_unknown_kernels_are_refused(monkeypatch):
    monkeypatch.setattr("potential.kernels.FORCED", "fastest")
    with pytest.raises(ValueError, match="SMELT_KERNELS = 'fastest': must be reference, native or gpu"):
        kernels.implementation(torch.zeros(1))
