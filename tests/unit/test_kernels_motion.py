"""Steps of the dynamics, C++ on every instruction set there is here, against plain PyTorch and published numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from potential.kernels import library, native, reference
from potential.kernels.motion import philox
from potential.neighbours import find_neighbours
from potential.structures import Structures
from shards.frame import Frame

COUNTS = [1, 70, 3, 128, 64]  # the C++ kernels take 64 atoms at a time


@dataclass
class Atoms:
    positions: Tensor
    velocities: Tensor
    forces: Tensor
    inverse_mass: Tensor
    noise_scale: Tensor
    frame_of_atom: Tensor
    first_atom: Tensor
    noise_key: Tensor


def atoms(counts: list[int] = COUNTS) -> Atoms:
    random, n = torch.manual_seed(3), sum(counts)
    draws = [torch.randn(n, width, dtype=torch.float64, generator=random) for width in (3, 3, 3, 1, 1)]
    return Atoms(
        *draws[:3],
        draws[3].abs(),
        draws[4].abs(),
        frame_of_atom=torch.repeat_interleave(torch.tensor(counts)),
        first_atom=torch.tensor([0, *np.cumsum(counts)]),
        noise_key=torch.randint(-(2**62), 2**62, (len(counts),), generator=random),
    )


@pytest.fixture(params=["reference", *library.LEVELS])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "reference":
        return reference
    if not native.available() or library.LEVELS.index(request.param) > library.best_level():
        pytest.skip(f"no C++ kernels for {request.param} here")
    monkeypatch.setattr("potential.kernels.library.FORCED", request.param)
    return native


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_numbers_its_authors_publish(counter: str, key: str, words: str) -> None:
    """kat_vectors of Random123, philox4x32 10."""

    def integers(text: str) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([int(word, 16)]) for word in text.split())

    assert philox(integers(counter), integers(key)) == integers(words)


def test_kernels_draw_what_the_reference_draws(kernels: ModuleType) -> None:
    batch, step = atoms(), torch.tensor([0, 1, 7, 2**40 + 3, 2**31])
    # float32 logarithms, sines and roots of the same 24 bits.
    torch.testing.assert_close(
        kernels.normals(batch, step).double(), reference.normals(batch, step), rtol=1e-6, atol=1e-6
    )


def test_numbers_are_normal_and_independent_of_atom_axis_step_and_walker(kernels: ModuleType) -> None:
    batch = atoms([2000] * 4)
    drawn = torch.stack([kernels.normals(batch, torch.full((4,), step)).double() for step in (1, 2)])
    n = drawn.numel()
    assert n == 48_000
    moments = [float((drawn**k).mean()) for k in (1, 2, 3, 4)]
    # Standard deviations of the moments of n normal numbers: sqrt(1, 2, 15, 96) / sqrt(n).
    assert moments == pytest.approx([0, 1, 0, 3], abs=5 * 96**0.5 / n**0.5)
    assert moments[:2] == pytest.approx([0, 1], abs=5 * 2**0.5 / n**0.5)
    tail = torch.erfc(torch.tensor(3 / 2**0.5)).item()
    assert float((drawn.abs() > 3).double().mean()) == pytest.approx(tail, abs=5 * (tail / n) ** 0.5)
    by_axis = drawn.view(2, 4, 2000, 3).permute(0, 1, 3, 2).reshape(24, 2000)
    correlation = torch.corrcoef(by_axis) - torch.eye(24)
    assert float(correlation.abs().max()) < 5 / 2000**0.5
    along = (by_axis[:, 1:] * by_axis[:, :-1]).mean(1)
    assert float(along.abs().max()) < 5 / 2000**0.5


def test_numbers_of_a_frame_do_not_depend_on_its_batch_mates(kernels: ModuleType) -> None:
    batch, step = atoms(), torch.arange(5)
    fourth = slice(74, 202)
    alone = Atoms(
        *(
            getattr(batch, name)[fourth]
            for name in ("positions", "velocities", "forces", "inverse_mass", "noise_scale")
        ),
        frame_of_atom=torch.zeros(128, dtype=torch.int64),
        first_atom=torch.tensor([0, 128]),
        noise_key=batch.noise_key[3:4],
    )
    assert torch.equal(kernels.normals(alone, step[3:4]), kernels.normals(batch, step)[fourth])


@pytest.mark.parametrize("damping", [1.0, 0.9])
def test_a_step_is_that_of_the_reference(kernels: ModuleType, damping: float) -> None:
    ours, truth, step = atoms(), atoms(), torch.arange(5)
    for module, batch in ((kernels, ours), (reference, truth)):
        module.drift(batch, step, 0.03, 0.25, damping)
        assert module.kick(batch, 0.03, 100.0)
    scale = 1e-6 if damping < 1 else 1e-14  # random numbers are float32
    torch.testing.assert_close(ours.positions, truth.positions, rtol=scale, atol=scale)
    torch.testing.assert_close(ours.velocities, truth.velocities, rtol=scale, atol=scale)


def test_without_friction_a_step_is_velocity_verlet_and_can_be_taken_back(kernels: ModuleType) -> None:
    batch, start, step = atoms(), atoms(), torch.zeros(5, dtype=torch.int64)
    kernels.drift(batch, step, 0.5, 0.25, 1.0)
    acceleration = start.forces * start.inverse_mass
    expected = start.positions + 0.5 * start.velocities + 0.5 * 0.5 * acceleration
    torch.testing.assert_close(batch.positions, expected)
    batch.velocities.neg_()
    kernels.drift(batch, step, 0.0, 0.25, 1.0)
    kernels.kick(batch, 0.5, 100.0)
    torch.testing.assert_close(batch.positions, start.positions)
    torch.testing.assert_close(batch.velocities, -start.velocities)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 99.0, -99.0])
@pytest.mark.parametrize("atom", [0, 31, 265])
def test_forces_out_of_bounds_kick_nobody(kernels: ModuleType, value: float, atom: int) -> None:
    batch = atoms()
    before = batch.velocities.clone()
    batch.forces[atom, 1] = value
    assert not kernels.kick(batch, 1.0, 50.0)
    assert torch.equal(batch.velocities, before)
    assert kernels.kick(batch, 1.0, 100.0) == (abs(value) < 100)


def test_arrays_of_another_kind_are_refused() -> None:
    if not native.available():
        pytest.skip("the C++ kernels are not built")
    batch = replace(atoms(), forces=torch.zeros(266, 3))
    with pytest.raises(ValueError, match=r"\(266, 3\) numbers of torch.float32: must be 798 of torch.float64"):
        native.kick(batch, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strained", [False, True])
def test_a_frame_whose_atoms_have_moved_too_far_is_noticed(
    kernels: ModuleType, dtype: torch.dtype, strained: bool
) -> None:
    rng = np.random.default_rng(1)
    frames = [Frame(np.full(n, 13), rng.normal(size=(n, 3)) * 5, np.eye(3) * 9, [True] * 3) for n in (1, 40, 9, 17)]
    built = Structures.from_frames(frames, ["Al"])
    strain = torch.eye(3, dtype=torch.float64) + 0.05 * torch.randn(4, 3, 3, generator=torch.manual_seed(2))
    carried = torch.einsum("ni,nij->nj", built.positions, strain[built.frame_of_atom]) if strained else built.positions
    moved = carried.clone()
    moved[0, 1] += 0.499  # holds
    moved[20, 0] += 0.501  # too far
    moved[49, 2] = float("nan")
    moved[-1] += 0.28  # holds: 0.485
    now = replace(built, positions=moved.to(dtype))
    for sign in (1.0, -1.0):
        found = []
        for frame in range(4):
            slack = torch.full((4,), torch.inf, dtype=torch.float64)
            slack[frame] = sign
            atoms_there = built.frame_of_atom == frame
            only = replace(now, positions=torch.where(atoms_there[:, None], now.positions, carried.to(dtype)))
            found.append(bool(kernels.have_moved(only, built.positions, strain if strained else None, slack)))
        assert found == ([False, True, True, False] if sign > 0 else [True] * 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shortest_distance_of_each_frame(kernels: ModuleType, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(4)
    frames = []
    for pbc in ([True, False, True], [True] * 3, [False] * 3):
        for side, n in ((6.0, 9), (14.0, 40), (2.4, 1)):  # in the last an atom sees its own images only
            cell = side * (np.eye(3) + rng.normal(0, 0.2, (3, 3)))
            frames.append(Frame(np.full(n, 13), rng.uniform(-9, 9, (n, 3)), cell, pbc))
    skewed = np.array([[9.0, 0, 0], [8.6, 1.6, 0], [0, 0, 9.0]])  # the nearest image is not the one that rounding finds
    frames.append(Frame([13, 13], [[0.0, 0, 0], [4.4, 0.75, 0.3]], skewed, [True] * 3))
    frames.append(Frame(np.full(600, 13), rng.uniform(0, 30, (600, 3)), 30 * np.eye(3), [True] * 3))
    structures = Structures.from_frames(frames, ["Al"], dtype)
    pairs = find_neighbours(structures, 5.0)
    expected = []
    for frame in frames:
        turns = [range(-5, 6) if each else [0] for each in frame.pbc] if frame.n_atoms < 600 else [range(-1, 2)] * 3
        shifts = np.array(list(itertools.product(*turns))) @ frame.cell
        least = np.inf
        for position in frame.positions:
            distances = np.linalg.norm(frame.positions[:, None] - position + shifts, axis=2).ravel()
            least = min(least, distances[distances > 1e-9].min(initial=np.inf))
        expected.append(least)
    found = kernels.shortest_distances(structures, pairs.row, pairs.other, pairs.shift)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
