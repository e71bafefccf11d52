"""Walkers are stopped at the right check, leave the right frame, and are replaced at once."""

import numpy as np
import pytest
import torch
from sampler_models import SoftSpheres, Trap, atoms_at_sites, constant_conditions, fcc_frame, from_sites, walker

from sampler.batch import start_batch
from sampler.dynamics import Dynamics
from sampler.engine import Tally, run_walkers
from shards.frame import Frame


def run(model, settings, frames, first_seed=0):
    tally = Tally()
    walkers = (walker(first_seed + seed, frame, settings) for seed, frame in enumerate(frames))
    ended = list(run_walkers(walkers, model, settings, model_digest="m0", tally=tally))
    return {end.seed: end for end in ended}, tally


def readings(model, settings, seed, frame, n_checks):
    """Readings and positions of one walker at its first checks, whatever a judge would say."""
    dynamics, batch = Dynamics(model, settings), start_batch([walker(seed, frame, settings)], model.elements, "cpu")
    dynamics.prepare(batch)
    found = []
    for _ in range(n_checks):
        found.append((batch.walkers[0].reading, batch.walkers[0].current))
        batch.walkers[0].last_good = batch.walkers[0].current
        dynamics.advance(batch)
    return found


def test_trigger_frame_is_the_first_over_the_threshold_at_a_check_after_the_minimum_time():
    settings = constant_conditions(
        800.0,
        check_every=10,
        timestep_fs=2.0,
        min_time_ps=0.3,
        force_mean_threshold_eV_A=0.21,
        force_max_factor=99.0,
        slots=3,
        friction_per_ps=10.0,
    )
    model = Trap(disagreement=2.0)
    ended, _ = run(model, settings, [atoms_at_sites(4)] * 8)
    for seed, end in ended.items():
        found = readings(model, settings, seed, atoms_at_sites(4), int(end.time_fs / 20) + 1)
        over = [i for i, (reading, _) in enumerate(found) if reading.spread.force_mean > 0.21]
        accepted = [i for i in over if i * 20.0 >= 300.0]
        assert end.verdict == "force_mean"
        assert end.time_fs == accepted[0] * 20.0
        reading, snapshot = found[accepted[0]]
        assert np.array_equal(end.frame.positions, snapshot.positions)
        origin = end.frame.origin
        assert (origin.kind, origin.seed, origin.model, origin.trigger) == ("walker", seed, "m0", "force_mean")
        assert origin.time_fs == end.time_fs
        assert origin.force_spread == reading.spread.force_mean > 0.21


def test_slots_stay_full_while_walkers_wait_and_every_walker_ends_once():
    settings = constant_conditions(
        800.0, check_every=5, min_time_ps=0.0, max_time_ps=0.2, force_mean_threshold_eV_A=0.15, slots=4
    )
    model = Trap(disagreement=2.0)
    frames = [atoms_at_sites(3 + seed % 4) for seed in range(15)]
    ended, tally = run(model, settings, frames)
    assert sorted(ended) == list(range(15))
    assert tally.ended.total() == 15
    assert tally.n_frames == sum(end.frame is not None for end in ended.values())
    assert tally.n_steps == sum(end.time_fs for end in ended.values())
    assert tally.n_atom_steps == sum(end.time_fs * (3 + seed % 4) for seed, end in ended.items())
    # Full until nobody waits any more, and from then on nobody comes.
    assert model.batch_sizes[0] == 4
    assert model.batch_sizes == sorted(model.batch_sizes, reverse=True)


def test_results_depend_on_the_seeds_and_not_on_the_number_of_slots():
    settings = constant_conditions(
        800.0, check_every=10, min_time_ps=0.0, max_time_ps=0.3, force_mean_threshold_eV_A=0.2
    )
    model = Trap(disagreement=2.0)
    frames = [atoms_at_sites(3 + seed % 4) for seed in range(10)]
    few, _ = run(model, settings.model_copy(update={"slots": 2}), frames)
    many, _ = run(model, settings.model_copy(update={"slots": 10}), frames)
    others, _ = run(model, settings, frames, first_seed=100)
    outcomes = [{seed: (e.verdict, e.time_fs, e.frame and e.frame.id) for seed, e in r.items()} for r in (few, many)]
    assert outcomes[0] == outcomes[1]
    assert {e.frame.id for e in others.values() if e.frame}.isdisjoint(e.frame.id for e in few.values() if e.frame)


def test_atoms_too_close_across_the_boundary_end_the_walker_without_a_frame():
    # The plain distance is 9.4 A, the one that counts 0.6 A.
    frame = Frame([13, 13], [[0.3, 5, 5], [9.7, 5, 5]], np.eye(3) * 10, np.ones(3, dtype=bool))
    ended, tally = run(SoftSpheres(), constant_conditions(minimum_distance_A=1.2, elevated_fraction=0.0), [frame])
    assert (ended[0].verdict, ended[0].frame) == ("too_close", None)
    assert tally.ended == {"too_close": 1}


@pytest.mark.parametrize(("elevated_fraction", "kept"), [(0.05, True), (100.0, False)])
def test_run_that_blows_up_leaves_its_last_good_frame_if_the_committee_had_doubts_there(elevated_fraction, kept):
    settings = constant_conditions(
        2000.0,
        check_every=7,
        min_time_ps=0.0,
        force_mean_threshold_eV_A=10.0,
        elevated_fraction=elevated_fraction,
        friction_per_ps=20.0,
        slots=5,
    )
    model = Trap(disagreement=10.0, breaks_at_A=0.4)  # not a number beyond 0.4 A
    ended, tally = run(model, settings, [atoms_at_sites(4)] * 10)
    assert tally.ended == {"runaway": 10}
    for seed, end in ended.items():
        assert (end.frame is not None) == kept
        if kept:
            last_good = readings(model, settings, seed, atoms_at_sites(4), int(end.time_fs / 7))[-1][1]
            assert np.array_equal(end.frame.positions, last_good.positions)
            assert np.linalg.norm(from_sites(end.frame.positions), axis=1).max() < 0.4
            assert end.frame.origin.trigger == "runaway"


def test_blown_walker_leaves_its_batch_mates_untouched():
    settings = constant_conditions(1500.0, check_every=20, max_time_ps=0.2, friction_per_ps=20.0, min_time_ps=0.0)
    settings = settings.model_copy(update={"on_timeout": "most_uncertain", "force_mean_threshold_eV_A": 99.0})
    frames = [atoms_at_sites(6)] * 8
    breaking, tally = run(Trap(disagreement=1.0, breaks_at_A=0.52), settings, frames)
    sound, _ = run(Trap(disagreement=1.0), settings, frames)
    assert tally.ended["runaway"] > 0
    survivors = [seed for seed, end in breaking.items() if end.verdict == "timeout"]
    assert survivors
    assert all(breaking[seed].frame.id == sound[seed].frame.id for seed in survivors)


def test_walker_hotter_than_allowed_runs_away():
    settings = constant_conditions(3000.0, max_temperature_K=1000.0, min_time_ps=0.0)
    ended, _ = run(Trap(), settings, [atoms_at_sites(50)])
    assert (ended[0].verdict, ended[0].time_fs) == ("runaway", 0.0)


@pytest.mark.parametrize("policy", ["none", "most_uncertain", "last"])
def test_time_out_leaves_nothing_or_the_most_uncertain_or_last_frame_of_the_run(policy):
    settings = constant_conditions(800.0, check_every=10, max_time_ps=0.2, force_mean_threshold_eV_A=99.0)
    settings = settings.model_copy(update={"on_timeout": policy})
    model = Trap(disagreement=1.0)
    ended, _ = run(model, settings, [atoms_at_sites(4)])
    assert (ended[0].verdict, ended[0].time_fs) == ("timeout", 200.0)
    if policy == "none":
        assert ended[0].frame is None
    else:
        found = readings(model, settings, 0, atoms_at_sites(4), 21)
        left = found[-1] if policy == "last" else max(found, key=lambda pair: pair[0].spread.force_mean)
        best = left[1]
        assert np.array_equal(ended[0].frame.positions, best.positions)
        assert ended[0].frame.origin.time_fs == best.time_fs


def test_frames_of_periodic_walkers_lie_inside_their_cells():
    settings = constant_conditions(3000.0, check_every=50, max_time_ps=0.1, density_end_factor=(1.2, 1.2))
    settings = settings.model_copy(update={"on_timeout": "most_uncertain"})
    ended, _ = run(SoftSpheres(), settings, [fcc_frame(2)])
    frame = ended[0].frame
    fractional = frame.positions @ np.linalg.inv(frame.cell)
    assert fractional.min() >= -1e-12
    assert fractional.max() <= 1 + 1e-12
    torch.testing.assert_close(fcc_frame(2).volume_A3 / frame.volume_A3, 1 + 0.2 * frame.origin.time_fs / 100.0)
