"""What training asks of the kernels, on every instruction set there is here, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from potential.kernels import Inputs, Layout, library, native, reference

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")

# Odd widths, more and fewer than there are lanes or than a tile sums over; several blocks of atoms, one not full.
LENGTH, N_ATOMS, N_MEMBERS, CELU_ALPHA = 101, 200, 5, 0.1
LAYOUTS = (Layout((LENGTH, 20, 7, 1), (0, 2040, 2187)), Layout((LENGTH, 70, 1), (2195, 9335)))
N_PARAMETERS = 9406
HOLEY = torch.arange(N_ATOMS) % 5 > 0
# Sums of a few hundred products, relative to the largest number.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


@pytest.fixture(params=library.LEVELS)
def simd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.LEVELS.index(request.param) > library.best_level():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr("potential.kernels.library.FORCED", request.param)


def gap(ours: Tensor, truth: Tensor) -> float:
    """Largest deviation, relative to the largest number."""
    return float((ours.double() - truth.double()).abs().max() / truth.double().abs().max())


def pass_through_layers(kernels, dtype, device="cpu", holes=slice(0)) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, g, and the gradient of a loss, of atoms of two elements; most have zeros in their AEVs."""
    random = torch.manual_seed(0)
    flat = (torch.randn(N_MEMBERS, N_PARAMETERS, generator=random, dtype=torch.float64) / 4).to(dtype)
    aev = torch.rand(N_ATOMS, LENGTH, generator=random, dtype=torch.float64).to(dtype)
    element = torch.randint(len(LAYOUTS), (N_ATOMS,), generator=random)
    by_energy = torch.randn(N_MEMBERS, N_ATOMS, generator=random, dtype=torch.float64).to(dtype)
    by_g = torch.randn(N_MEMBERS, N_ATOMS, LENGTH, generator=random, dtype=torch.float64).to(dtype)
    aev[HOLEY, holes], by_g[:, HOLEY, holes] = 0, 0
    flat, aev, by_energy, by_g = (each.to(device) for each in (flat, aev, by_energy, by_g))
    order = HOLEY.int().argsort(stable=True)
    elements = [order[element[order] == number].to(device) for number in range(len(LAYOUTS))]
    # AEVs of these atoms among others.
    rows = torch.randperm(2 * N_ATOMS, generator=random)[:N_ATOMS].to(device)
    seen = Inputs(aev.new_full((2 * N_ATOMS, LENGTH), torch.nan).index_copy_(0, rows, aev), elements, rows)
    energies, g, tape = kernels.forward_layers(flat, LAYOUTS, CELU_ALPHA, seen)
    gradient = torch.full_like(flat, torch.nan)
    for add in (False, True):
        kernels.backward_layers(flat, LAYOUTS, CELU_ALPHA, tape, seen, by_energy, by_g, gradient, add)
    return energies, g, gradient / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("holes", [slice(0, 16), slice(16, 32), slice(32, None), slice(16, None)])
def test_parts_of_aevs_that_are_zero_change_nothing(holes, dtype, simd):
    energies, g, gradient = pass_through_layers(native, dtype, holes=holes)
    truth, slopes, downhill = pass_through_layers(reference, torch.float64, holes=holes)
    assert gap(energies, truth) < TOLERANCE[dtype]
    assert gap(gradient, downhill) < TOLERANCE[dtype]
    # Where nothing moves an AEV, its derivative may be left out.
    left_out = (g == 0) & (slopes != 0)
    g[:, HOLEY, holes], slopes[:, HOLEY, holes] = 0, 0
    assert gap(g, slopes) < TOLERANCE[dtype]
    assert left_out.any()


def test_memory_of_a_former_pass_is_used_again_and_leaves_no_trace(simd):
    random, few = torch.manual_seed(0), torch.arange(70)
    flat, aev = torch.rand(N_MEMBERS, N_PARAMETERS, generator=random), torch.rand(N_ATOMS, LENGTH, generator=random)
    by_energy, by_g = torch.rand(N_MEMBERS, N_ATOMS), torch.rand(N_MEMBERS, N_ATOMS, LENGTH)

    def through(atoms: Tensor, former: native.Tape | None) -> tuple[native.Tape, Tensor]:
        seen, room = Inputs(aev, atoms.split([50, len(atoms) - 50])), torch.empty_like(by_g)
        gradient = torch.zeros_like(flat)
        _, g, tape = native.forward_layers(flat, LAYOUTS, CELU_ALPHA, seen, former, room)
        assert g is room
        native.backward_layers(flat, LAYOUTS, CELU_ALPHA, tape, seen, by_energy, by_g, gradient)
        return tape, gradient

    former, _ = through(torch.arange(N_ATOMS), None)
    again, gradient = through(few, former)
    assert again.numbers.data_ptr() == former.numbers.data_ptr()
    assert torch.equal(gradient, through(few, None)[1])
    assert through(torch.arange(N_ATOMS), again)[0].numbers.numel() == former.numbers.numel()


def kept_derivatives(kernels, dtype) -> tuple[Tensor, ...]:
    """Forces, virials, v and errors of structures of 1, 7, 12 and 7 atoms; labels are missing, errors large."""
    random, counts = torch.manual_seed(1), (1, 7, 12, 7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    jacobians = [draw(3 * n + 6, n * LENGTH) for n in counts]
    jacobians[2][6:21, 5:70] = 0  # as where an atom moves nothing of another's AEV
    jacobians = [kernels.keep(jacobian) for jacobian in jacobians]
    forces, virial = draw(sum(counts), 3), draw(len(counts), 6)
    forces[0], virial[1] = torch.nan, torch.nan
    scale = draw(N_MEMBERS, len(counts)).abs()
    scale[2, 1] = 0  # a member that does not learn from this structure
    return kernels.respond(jacobians, forces, virial, draw(N_MEMBERS, sum(counts), LENGTH), scale, 0.7, 0.3, 4.0)


ARITHMETIC = pytest.mark.parametrize("arithmetic", [pass_through_layers, kept_derivatives])
Arithmetic = Callable[..., tuple[Tensor, ...]]


@ARITHMETIC
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_are_those_of_the_reference(arithmetic: Arithmetic, dtype, simd):
    truth = arithmetic(reference, torch.float64)
    for ours, exact in zip(arithmetic(native, dtype), truth, strict=True):
        assert ours.dtype == dtype
        assert gap(ours, exact) < TOLERANCE[dtype]


@ARITHMETIC
def test_no_bit_depends_on_the_number_of_threads(arithmetic: Arithmetic, simd):
    alone, before = arithmetic(native, torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = arithmetic(native, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


def test_the_derivative_is_that_of_the_loss():
    random = torch.manual_seed(2)
    jacobian, target = (
        torch.randn(18, 4 * LENGTH, generator=random).double(),
        torch.randn(18, generator=random).double(),
    )
    g = torch.randn(2, 4, LENGTH, generator=random).double().requires_grad_()
    scale, cap = torch.tensor([[1.5], [0.5]]).double(), 3.0
    off = g.flatten(1) @ jacobian.T - target
    known = target[:12].view(4, 3), target[None, 12:]
    size = off[:, :12].abs()
    huber = torch.where(size < cap, size**2 / 2, cap * (size - cap / 2)).sum(1, keepdim=True)
    loss = scale / 4 * (0.7 * huber + 0.3 / 2 * off[:, 12:].square().sum(1, keepdim=True))
    (expected,) = torch.autograd.grad(loss.sum(), g)
    for kernels in (reference, native):
        assert (
            gap(kernels.respond([kernels.keep(jacobian)], *known, g.detach(), scale, 0.7, 0.3, cap)[2], expected)
            < 1e-14
        )


@pytest.mark.parametrize("kernels", [native, reference])
def test_an_element_without_atoms_changes_nothing(kernels):
    flat, aev, none = torch.ones(N_MEMBERS, N_PARAMETERS), torch.rand(3, LENGTH), torch.empty(0, dtype=torch.int64)
    seen, gradient = Inputs(aev, [torch.arange(3), none]), torch.full_like(flat, 7.0)
    energies, g, tape = kernels.forward_layers(flat, LAYOUTS, CELU_ALPHA, seen)
    kernels.backward_layers(flat, LAYOUTS, CELU_ALPHA, tape, seen, energies, g, gradient)
    alone = kernels.forward_layers(flat, LAYOUTS[:1], CELU_ALPHA, Inputs(aev, seen.elements[:1]))
    assert torch.equal(energies, alone[0])
    of_second = LAYOUTS[1].offsets[0]
    assert (gradient[:, :of_second] != 7).any()
    assert (gradient[:, of_second:] == 7).all()


@pytest.mark.parametrize("kernels", [native, reference])
def test_saturated_networks_meet_no_denormal_numbers(kernels):
    layout = Layout((3, 4, 4, 1), (0, 16, 36))
    flat, aev, atoms = torch.full((1, 41), -50.0), torch.ones(2, 3), torch.arange(2)
    energies, g, tape = kernels.forward_layers(flat, [layout], CELU_ALPHA, Inputs(aev, [atoms]))
    # The native tape has blocks of 64 atoms in the lanes; nothing is written to those that have no atom.
    kept = (
        tape.numbers.view(-1, 64)[:, :2]
        if kernels is native
        else torch.cat([slope.flatten() for slope in tape[0].slopes])
    )
    tiny = torch.finfo(torch.float32).tiny
    assert torch.isfinite(energies).all()
    assert ((kept == 0) | (kept.abs() >= tiny)).all()
    assert g.abs().max() < 1e-6


def test_what_does_not_fit_is_refused():
    flat, aev, elements = torch.ones(2, N_PARAMETERS), torch.ones(3, LENGTH), [torch.arange(2), torch.arange(2, 3)]
    with pytest.raises(ValueError, match=rf"room is \(2, 4, {LENGTH}\) on cpu: must be \(2, 3, {LENGTH}\)"):
        native.forward_layers(flat, LAYOUTS, CELU_ALPHA, Inputs(aev, elements), room=torch.empty(2, 4, LENGTH))
    with pytest.raises(ValueError, match=r"contiguous and torch.float32, as the parameters are"):
        native.forward_layers(flat, LAYOUTS, CELU_ALPHA, Inputs(aev.double(), elements))
    with pytest.raises(ValueError, match=r"atoms of 1 elements: must be of 2, which have networks"):
        native.forward_layers(flat, LAYOUTS, CELU_ALPHA, Inputs(aev, elements[:1]))
    short = torch.ones(9, LENGTH - 1), torch.ones(1, 3), torch.ones(1, 6), torch.ones(2, 1, LENGTH), torch.ones(2, 1)
    with pytest.raises(
        ValueError, match=rf"jacobians are \(9, {LENGTH - 1}\): must be \(3 n \+ 6, n x {LENGTH}\), 1 atoms"
    ):
        native.respond([native.keep(short[0])], *short[1:], 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=rf"jacobians are \(12, {LENGTH}\): must be"):
        native.respond([native.keep(torch.ones(12, LENGTH))], *short[1:], 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"must be contiguous and torch\.float32, as g is"):
        native.respond([native.keep(torch.ones(9, LENGTH).double())], *short[1:], 1.0, 1.0, 1.0)
