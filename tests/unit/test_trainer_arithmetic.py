"""The pure parts of the trainer, each held against something independent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from potential.kernels import Inputs
from shards.ranks import MPI_FOLDER
from trainer.batches import Windows
from trainer.checkpoint import read_checkpoint, write_checkpoint
from trainer.dataset import fit_self_energies
from trainer.folds import TEST, TRAIN, VALID, assign_blocks, member_roles
from trainer.launch import DEFAULT_LAUNCHER, rank_environment
from trainer.loss import COLUMNS, References, Weights, compare, energy_pulls, errors_of, pulls, summarise
from trainer.memory import node_memory_GB
from trainer.networks import Networks
from trainer.optimiser import Adam, Plateau
from trainer.prefetch import Prefetcher


def _keys(n: int) -> np.ndarray:
    """Frame ids as bytes, (n, 16)."""
    return np.frombuffer(b"".join(hashlib.sha256(str(i).encode()).digest()[:16] for i in range(n)), "u1").reshape(n, 16)


# folds


def test_folds_of_a_member_are_disjoint_and_cover_all_frames_in_the_published_proportions():
    roles = member_roles(assign_blocks(_keys(16_000)), 8)
    for role, share in ((TRAIN, 13 / 16), (VALID, 2 / 16), (TEST, 1 / 16)):
        # Binomial: three standard deviations of 16,000 draws are 0.009 at most.
        assert np.allclose((roles == role).mean(axis=1), share, atol=0.01)
    assert (np.isin(roles, (TRAIN, VALID, TEST))).all()


def test_eight_members_validate_each_frame_exactly_once():
    roles = member_roles(assign_blocks(_keys(500)), 8)
    assert ((roles == VALID).sum(axis=0) == 1).all()


@pytest.mark.parametrize("n", [8, 9, 12, 15, 16, 17, 20, 30, 60])
def test_every_member_has_training_and_validation_frames_in_tiny_sets(n):
    for start in range(20):
        roles = member_roles(assign_blocks(_keys(n + start)[start:]), 8)
        assert (roles == VALID).any(axis=1).all()
        assert (roles == TRAIN).any(axis=1).all()
        if n >= 16:
            assert (roles == TEST).any(axis=1).all()


def test_blocks_stay_when_the_data_set_grows_and_do_not_depend_on_order():
    keys = _keys(400)
    small, large = assign_blocks(keys[:200]), assign_blocks(keys)
    assert (small == large[:200]).all()
    order = np.random.default_rng(0).permutation(200)
    assert (assign_blocks(keys[order]) == small[order]).all()


def test_a_small_set_moves_only_as_many_frames_as_it_has_empty_blocks():
    keys = _keys(40)
    home = [hashlib.sha256(key.tobytes().hex().encode()).digest()[0] % 16 for key in keys]
    moved = (assign_blocks(keys) != np.array(home)).sum()
    assert moved <= 16 - len(set(home)) + 1


def test_fewer_frames_than_validation_sets_are_refused():
    with pytest.raises(ValueError, match="7 labeled frames: cross-validation needs at least 8"):
        assign_blocks(_keys(7))


# batches


def test_an_epoch_visits_every_structure_once_whatever_the_number_of_ranks():
    windows = Windows(8 + np.arange(103) % 5, batch=16, least_steps=4)
    steps = windows.epoch(seed=1, epoch=3)
    assert sorted(np.concatenate(steps)) == list(range(103))
    for n_ranks in (1, 2, 3, 7, 40):
        owned = [set(windows.owned(rank, n_ranks)) for rank in range(n_ranks)]
        assert sorted(i for part in owned for i in part) == list(range(103))
        shares = np.array([[len(part & set(step)) for part in owned] for step in steps])
        assert shares.max() - shares.min() <= 2


def test_epochs_are_reproducible_and_differ():
    windows = Windows(np.full(64, 8), batch=16, least_steps=4)
    first, again, other = windows.epoch(1, 0), windows.epoch(1, 0), windows.epoch(1, 1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_small_set_is_cut_into_smaller_batches():
    assert Windows(np.full(20, 8), batch=128, least_steps=8).n_steps == 8
    assert Windows(np.full(5, 8), batch=128, least_steps=8).n_steps == 5
    assert Windows(np.full(1000, 8), batch=128, least_steps=8).n_steps == 8


# prefetching


def test_what_is_prefetched_comes_in_order_and_never_too_far_ahead():
    made = []

    def make(part):
        made.append(int(part[0]))
        return int(part[0])

    parts = [np.array([i]) for i in range(20)]
    prefetcher = Prefetcher(make, depth=3)
    prefetcher.expect(parts[10:])
    for i, one in enumerate(prefetcher.each(parts[:10])):
        assert one == i
        assert len(made) <= i + 4
    assert list(prefetcher.each(parts[10:])) == list(range(10, 20))
    assert made == list(range(20))  # each once, those expected too


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for():
    def make(part):
        if part[0] == 2:
            raise ValueError("altered")
        return int(part[0])

    coming = Prefetcher(make, depth=4).each([np.array([i]) for i in range(5)])
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(ValueError, match="altered"):
        next(coming)


def test_a_control_group_may_allow_less_than_the_node_has(tmp_path, monkeypatch):
    whole = node_memory_GB()
    assert 0.1 < whole < 1e5
    group = tmp_path / Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":")[2].lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    (tmp_path / "memory.max").write_text("50000000\n")
    (group / "memory.max").write_text("max\n" if group != tmp_path else "50000000\n")
    monkeypatch.setattr("trainer.memory.GROUPS", tmp_path)
    assert node_memory_GB() == 0.05


# optimiser


def test_stacked_adam_equals_torch_adam_of_each_member():
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    rates = torch.tensor([1e-2, 3e-3, 0.0], dtype=torch.float64)
    singles = [row.clone().requires_grad_() for row in stacked]
    others = [torch.optim.Adam([single], lr=float(rate)) for single, rate in zip(singles, rates, strict=True)]
    adam = Adam.like(stacked)
    for _ in range(50):
        gradient = torch.randn(3, 50, generator=generator, dtype=torch.float64)
        adam.update(stacked, gradient, rates)
        for single, row, other in zip(singles, gradient, others, strict=True):
            single.grad = row
            other.step()
    # Fifty updates, each rounded differently by a few times 1e-16.
    assert torch.allclose(stacked, torch.stack([single.detach() for single in singles]), rtol=0, atol=1e-14)


def test_factors_are_learning_rates_of_single_parameters_and_zero_is_bitwise_rest():
    torch.manual_seed(0)
    start = torch.randn(2, 6)
    start[0, 0] = -0.0
    factors = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    stacked, adam = start.clone(), Adam.like(start)
    parts = [start[:, 2:4].clone().requires_grad_(), start[:, 4:].clone().requires_grad_()]
    reference = torch.optim.Adam([{"params": [parts[0]], "lr": 5e-3}, {"params": [parts[1]], "lr": 1e-2}])
    for _ in range(20):
        gradient = torch.randn(2, 6)
        adam.update(stacked, gradient, torch.full((2,), 1e-2, dtype=torch.float64), factors)
        parts[0].grad, parts[1].grad = gradient[:, 2:4].clone(), gradient[:, 4:].clone()
        reference.step()
    assert stacked[:, :2].numpy().tobytes() == start[:, :2].numpy().tobytes()
    torch.testing.assert_close(stacked[:, 2:], torch.cat(parts, 1).detach())


def test_folds_of_a_higher_level_are_those_of_the_lower_one():
    keys = _keys(4000)
    assert (assign_blocks(keys[::20]) == assign_blocks(keys)[::20]).all()


def test_plateau_halves_the_rate_of_the_member_that_waits_and_stops_it_below_the_least():
    plateau = Plateau.start(2, rate=1.0, factor=0.5, patience=3, least=0.3)
    for epoch in range(20):
        improved, _ = plateau.observe(epoch, [1.0, 1.0 / (epoch + 1)])
        assert improved == [epoch == 0, True]
    assert plateau.rates == [0.0, 1.0]
    assert plateau.best_epoch == [0, 19]
    assert not plateau.finished


def test_plateau_drops_after_patience_epochs_exactly():
    plateau = Plateau.start(1, rate=1.0, factor=0.5, patience=3, least=0.1)
    rates = []
    for epoch in range(8):
        plateau.observe(epoch, [2.0])
        rates.append(plateau.rates[0])
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]


# networks


def _per_member_energies(networks, flat, aev, species):
    """Atomic energies (M, N), one member and one atom at a time; slope of CELU from its formula."""
    rows = []
    for k in range(len(flat)):
        row = []
        for x, s in zip(aev[k], species.tolist(), strict=True):
            layers = networks.layers(flat)[s]
            for weight, bias in layers[:-1]:
                z = weight[k] @ x + bias[k]
                x = torch.where(z > 0, z, 0.1 * (torch.exp(z.clamp(max=0) / 0.1) - 1))
            row.append(layers[-1][0][k, 0] @ x + layers[-1][1][k, 0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("n_elements", [1, 2])
def test_network_gradients_equal_those_of_autograd(n_elements):
    torch.manual_seed(0)
    networks = Networks([[(6, 7), (5, 6), (1, 5)], [(4, 7), (3, 4), (1, 3)]][:n_elements])
    flat = torch.randn(3, networks.n_parameters, dtype=torch.float64, requires_grad=True)
    aev, species = torch.rand(11, 7, dtype=torch.float64), torch.arange(11) % n_elements
    stacked = aev.expand(3, 11, 7).clone().requires_grad_()
    c, v = torch.randn(3, 11, dtype=torch.float64), torch.randn(3, 11, 7, dtype=torch.float64)
    energies = _per_member_energies(networks, flat, stacked, species)
    (g,) = torch.autograd.grad(energies.sum(), stacked, create_graph=True)
    (expected,) = torch.autograd.grad((c * energies).sum() + (v * g).sum(), flat)
    with torch.no_grad():
        found = torch.zeros_like(flat)
        atoms_of_element = [torch.nonzero(species == element).squeeze(1) for element in range(n_elements)]
        own_energies, own_g, tape = networks.forward(flat, Inputs(aev, atoms_of_element))
        networks.gradient(flat, tape, c, v, found)
    assert torch.allclose(own_energies, energies, rtol=0, atol=1e-12)
    assert torch.allclose(own_g, g, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


# loss


def _truth(n_atoms, **changes):
    generator = torch.Generator().manual_seed(1)
    frame_of_atom = torch.repeat_interleave(torch.arange(len(n_atoms)), torch.tensor(n_atoms))
    values = {
        "energy": torch.randn(len(n_atoms), generator=generator, dtype=torch.float64),
        "forces": torch.randn(sum(n_atoms), 3, generator=generator, dtype=torch.float64),
        "virial": torch.randn(len(n_atoms), 6, generator=generator, dtype=torch.float64),
        "volume": torch.full((len(n_atoms),), 50.0, dtype=torch.float64),
        "n_atoms": torch.tensor(n_atoms),
        "frame_of_atom": frame_of_atom,
    }
    return References(**(values | changes))


def test_derivatives_of_the_loss_equal_those_of_autograd():
    torch.manual_seed(2)
    truth = _truth([2, 3])
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2), (4, 5, 3), (4, 2, 6))]
    weights, scale = Weights(1.3, 0.7, 0.2, force_cap=0.5), torch.rand(4, 2, dtype=torch.float64)
    loss = compare([(inputs[0], errors_of(*inputs[1:], truth, weights), truth)], weights)[..., COLUMNS.index("loss")]
    expected = torch.autograd.grad((scale * loss).sum(), inputs)
    found = (energy_pulls(inputs[0], truth, weights, scale), *pulls(*inputs[1:], truth, weights, scale))
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own, other, rtol=1e-12, atol=1e-14)


def test_a_missing_label_neither_counts_nor_pulls():
    nothing = torch.full((5, 3), torch.nan, dtype=torch.float64)
    truth = _truth([2, 3], forces=nothing, virial=torch.full((2, 6), torch.nan, dtype=torch.float64))
    truth.energy[1] = torch.nan
    weights, wrong = Weights(1.0, 1.0, 1.0, force_cap=1.0), (torch.ones(1, 5, 3).double(), torch.ones(1, 2, 6).double())
    energy, scale = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    errors = compare([(energy, errors_of(*wrong, truth, weights), truth)], weights)
    assert not any(pull.any() for pull in pulls(*wrong, truth, weights, scale))
    assert energy_pulls(energy, truth, weights, scale).ne(0).tolist() == [[True, False]]
    assert errors[0, :, COLUMNS.index("loss")].tolist() == pytest.approx([float(truth.energy[0]) ** 2 / 2, 0.0])
    assert errors[0, :, COLUMNS.index("n_energy")].tolist() == [1, 0]
    table = summarise(errors.sum(1))
    assert table["force_eV_per_A"] == [None]
    assert table["stress_GPa"] == [None]


def test_summaries_are_root_mean_squares_per_atom_and_per_component():
    truth = _truth([2, 3])
    energy, *zero = torch.zeros(1, 2).double(), torch.zeros(1, 5, 3).double(), torch.zeros(1, 2, 6).double()
    weights = Weights(1, 1, 1, 1.0)
    table = summarise(compare([(energy, errors_of(*zero, truth, weights), truth)], weights).sum(1))
    per_atom = (truth.energy / truth.n_atoms).numpy()
    assert table["energy_meV_per_atom"][0] == pytest.approx(1000 * np.sqrt((per_atom**2).mean()))
    assert table["force_eV_per_A"][0] == pytest.approx(np.sqrt((truth.forces.numpy() ** 2).mean()))
    assert table["stress_GPa"][0] == pytest.approx(160.2176634 * np.sqrt(((truth.virial.numpy() / 50) ** 2).mean()))


# self energies, checkpoints, environment


def test_self_energies_are_found_exactly_where_energies_are_sums_of_them():
    counts = np.random.default_rng(0).integers(0, 9, size=(30, 3)) + 1
    assert np.allclose(fit_self_energies(counts, counts @ [-1.0, 2.5, -70.0]), [-1.0, 2.5, -70.0])


def test_self_energies_of_a_single_composition_share_its_energy():
    counts = np.array([[2, 2], [4, 4]])
    assert np.allclose(counts @ fit_self_energies(counts, np.array([-8.0, -16.0])), [-8.0, -16.0])


def test_a_checkpoint_comes_back_bit_by_bit_and_only_for_its_job(tmp_path):
    path, tensors = (
        tmp_path / "checkpoint.safetensors",
        {"a": torch.rand(3, 4), "b": torch.rand(2, dtype=torch.float64)},
    )
    write_checkpoint(path, tensors, {"job": "x", "rate": 0.1 + 0.2, "best": [float("inf")]})
    found, state = read_checkpoint(path, "x")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert state == {"job": "x", "rate": 0.1 + 0.2, "best": [float("inf")]}
    assert read_checkpoint(path, "y") is None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(path, "x")


def test_an_outer_launcher_leaves_no_trace_in_the_environment_of_the_ranks():
    outer = {"PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "PMI_FD": "3", "SLURM_JOB_ID": "7", "HOME": "/root"}
    local = rank_environment(outer, 2, DEFAULT_LAUNCHER, "/tmp/x")
    assert local["HOME"] == "/root"
    assert not {name for name in outer if name != "HOME"} & set(local)
    assert local["TMPDIR"] == "/tmp/x"
    several_nodes = rank_environment(outer, 2, ("srun", "-n", "{ranks}"), "/tmp/x")
    assert several_nodes["SLURM_JOB_ID"] == "7"
    assert several_nodes[MPI_FOLDER] == "/tmp/x"
