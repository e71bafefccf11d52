"""AEVs as operators: what autograd, torch.compile and torch.export make of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from potential.aev import AEVParameters
from potential.committee import Committee
from potential.operators import aev

AEV = AEVParameters(
    radial_cutoff_A=4.2,
    angular_cutoff_A=3.5,
    eta_radial=1.5,
    eta_angular=1.0,
    zeta=4.0,
    radial_shifts=(0.9, 2.2),
    angular_shifts=(1.1, 1.9),
    angle_shifts=(0.3, 1.6),
    n_species=2,
)


def environments() -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours of three atoms, the second of which has none."""
    random = torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(7, 3, generator=random, dtype=torch.float64))
    vec = direction * torch.linspace(1.0, 3.3, 7, dtype=torch.float64)[:, None]
    return vec.requires_grad_(), torch.tensor([0, 4, 4, 7]), torch.tensor([0, 1, 1, 0, 0, 1, 0])


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_the_derivative_is_that_of_finite_differences(kernels, monkeypatch):
    monkeypatch.setattr("potential.kernels.FORCED", kernels)
    vec, row, species = environments()
    assert torch.autograd.gradcheck(lambda v: aev(v, row, species, AEV), vec, fast_mode=True)


@pytest.mark.parametrize("name", ["aev", "aev_vjp", "aev_jvp"])
def test_operators_pass_the_checks_of_torch(name):
    vec, row, species = environments()
    if name != "aev":
        vec = vec.detach()  # not a number differs from itself
    extra = {"aev": (), "aev_vjp": ((2, 3, AEV.length),), "aev_jvp": ((2, 7, 3),)}[name]
    directions = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in extra]
    arguments = (vec, row, species, *directions, *dataclasses.astuple(AEV))
    torch.library.opcheck(getattr(torch.ops.smelt, name).default, arguments)


class Energy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.committee = Committee(["H", "Al"], AEV, [(5, 4), (3,)], 2).double()
        self.committee.reset_parameters(seed=1)

    def forward(self, vec: Tensor, row: Tensor, species_other: Tensor) -> Tensor:
        return self.committee.atomic_energies(aev(vec, row, species_other, AEV), torch.tensor([0, 1, 1])).sum(1)


def test_a_loss_on_forces_reaches_the_networks():
    energy, (vec, row, species) = Energy(), environments()
    weights = list(energy.parameters())

    def loss() -> Tensor:
        (pull,) = torch.autograd.grad(energy(vec, row, species)[0], vec, create_graph=True)
        return pull.square().sum()

    slopes = torch.autograd.grad(loss(), [*weights, vec], allow_unused=True)
    assert slopes[-1] is not None
    assert slopes[-1].isnan().all()  # second derivatives by the vectors are not made
    step, at = 1e-6, (0, 1, 2)
    with torch.no_grad():
        weights[0][at] += step
    up = loss().item()
    with torch.no_grad():
        weights[0][at] -= 2 * step
    assert slopes[0] is not None
    assert (up - loss().item()) / (2 * step) == pytest.approx(float(slopes[0][at]), rel=1e-6)


def test_compiled_and_exported_energies_are_the_same():
    energy, inputs = Energy(), environments()
    expected = energy(*inputs)
    compiled = torch.compile(energy, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, expected)
    exported = torch.export.export(energy, inputs).module()
    torch.testing.assert_close(exported(*inputs), expected)
