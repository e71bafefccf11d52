"""Files in, files out: the three verbs of sampling, on a small committee."""

import json

import numpy as np
import pytest
import torch
from sampler_models import fcc_frame

from potential.committee import Committee
from potential.config import PotentialSettings
from potential.model_file import load_committee, save_committee
from sampler.config import BuilderSettings, SamplerSettings
from sampler.scoring import fingerprints, measure_spreads
from sampler.stage import build, rank, sample
from sampler.triggers import trigger_of
from shards.frame import Frame, Origin
from shards.outcome import Outcome
from shards.reader import open_shard
from shards.settings import SettingsError
from shards.writer import write_frames

ELEMENTS = ("Al", "Ni")
POTENTIAL = PotentialSettings(
    radial_cutoff_A=5.0, angular_cutoff_A=3.5, n_radial=6, n_angular_radial=2, n_angular=2, hidden=(8,), n_members=3
)
BUILDER = BuilderSettings(n_atoms=(6, 10), density_g_cm3=(3.0, 4.0))
SAMPLER = SamplerSettings(
    slots=3, check_every=5, min_time_ps=0.005, max_time_ps=0.02, force_mean_threshold_eV_A=0.05, settle_steps=2
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_committee(Committee.from_settings(POTENTIAL, ELEMENTS, seed=1), path, {})
    return path


@pytest.fixture
def committee(model):
    return load_committee(model, dtype=torch.float64)


def test_build_publishes_the_cells_of_its_seed(tmp_path):
    outcomes = [build(ELEMENTS, BUILDER, 4, seed, tmp_path / f"{k}.h5") for k, seed in enumerate((3, 3, 4))]
    ids = [open_shard(outcome.receipts[0].path).ids for outcome in outcomes]
    assert ids[0] == ids[1]
    assert set(ids[0]).isdisjoint(ids[2])
    assert len(set(ids[0])) == 4
    frames = list(open_shard(tmp_path / "0.h5").frames())
    assert {frame.origin.kind for frame in frames} == {"bootstrap"}
    assert outcomes[0].facts == {"n_frames": 4, "n_atoms": sum(frame.n_atoms for frame in frames)}


def test_build_refuses_cells_that_cannot_be_filled(tmp_path):
    with pytest.raises(SettingsError, match=r"fills 0\.92 of space"):
        build(["Al"], BUILDER.model_copy(update={"minimum_distance_A": 2.7}), 4, 1, tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_sample_publishes_frames_and_figures_that_agree(model, committee, tmp_path):
    progress = tmp_path / "progress.json"
    outcome = sample(model, BUILDER, SAMPLER, 8, 5, tmp_path / "a.h5", progress)
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome
    facts = outcome.facts
    frames = list(open_shard(tmp_path / "a.h5").frames())
    assert facts["walkers"] == 8
    assert facts["triggers"]["force_mean"] > 0
    ended = sum(facts["triggers"].values()) + facts["timeouts"] + facts["exploded"] + facts["too_close"]
    assert ended == 8
    assert facts["n_frames"] == len(frames) > 0
    assert {frame.origin.model for frame in frames} == {committee.digest}
    # The walkers ran in float32, the committee here is in float64.
    for frame, spread in zip(frames, measure_spreads(committee, frames), strict=True):
        assert spread.force_mean == pytest.approx(frame.origin.force_spread, rel=1e-3)
        assert spread.energy == pytest.approx(frame.origin.energy_spread, rel=1e-3)
    shown = json.loads(progress.read_text())
    assert (shown["walkers"], shown["n_walkers"], shown["active"]) == (8, 8, 0)
    assert shown["atom_steps"] == facts["atom_steps"]


def test_sample_depends_on_its_seed_alone(model, tmp_path):
    shards = []
    for name, seed, slots in (("a", 5, 3), ("b", 5, 3), ("c", 6, 3)):
        settings = SAMPLER.model_copy(update={"slots": slots})
        sample(model, BUILDER, settings, 4, seed, tmp_path / f"{name}.h5", None)
        shards.append(open_shard(tmp_path / f"{name}.h5"))
    assert shards[0].ids == shards[1].ids
    assert set(shards[0].ids).isdisjoint(shards[2].ids)


def test_sample_of_a_sure_committee_publishes_an_empty_shard(model, tmp_path):
    sure = SAMPLER.model_copy(update={"force_mean_threshold_eV_A": 1e6})
    outcome = sample(model, BUILDER, sure, 2, 5, tmp_path / "a.h5", None)
    assert outcome.failure is None
    assert len(open_shard(tmp_path / "a.h5")) == 0
    assert outcome.facts["timeouts"] == 2
    assert outcome.facts["mean_time_ps"] == pytest.approx(0.02)


def test_rank_scores_every_candidate_and_orders_the_wanted_ones(model, committee, tmp_path):
    build(ELEMENTS, BUILDER, 3, 1, tmp_path / "a.h5")
    build(ELEMENTS, BUILDER, 3, 2, tmp_path / "b.h5")
    frames = [frame for name in "ab" for frame in open_shard(tmp_path / f"{name}.h5").frames()]
    spreads = {frame.id: spread for frame, spread in zip(frames, measure_spreads(committee, frames), strict=True)}
    threshold = float(np.median([spread.force_mean for spread in spreads.values()]))
    settings = SAMPLER.model_copy(update={"force_mean_threshold_eV_A": threshold, "force_max_factor": 99.0})
    facts = rank(model, [tmp_path / "a.h5", tmp_path / "b.h5"], settings).facts
    assert set(facts["scores"]) == set(spreads)
    for frame, (energy, force_mean, force_max, wanted) in facts["scores"].items():
        spread = spreads[frame]
        assert (energy, force_mean, force_max) == pytest.approx(
            (spread.energy, spread.force_mean, spread.force_max), rel=1e-3
        )
        assert wanted == bool(trigger_of(spread, settings))
    unsure = [frame for frame in spreads if spreads[frame].force_mean > threshold]
    assert facts["order"] == sorted(unsure, key=lambda frame: -spreads[frame].force_mean)


def test_rank_leaves_out_near_duplicates_of_candidates_and_of_known_frames(model, tmp_path):
    rng = np.random.default_rng(1)
    frames = [next(iter_built(tmp_path, seed)) for seed in (1, 2)]
    nudged = [
        Frame(f.numbers, f.positions + rng.normal(0, 1e-4, f.positions.shape), f.cell, f.pbc, origin=Origin("walker"))
        for f in frames
    ]
    write_frames(tmp_path / "candidates.h5", [frames[0], nudged[0], frames[1]])
    write_frames(tmp_path / "known.h5", [nudged[1]])
    settings = SAMPLER.model_copy(update={"force_mean_threshold_eV_A": 1e-6, "duplicate_distance": 0.002})
    order = rank(model, [tmp_path / "candidates.h5"], settings).facts["order"]
    assert len(order) == 2
    assert frames[1].id in order
    order = rank(model, [tmp_path / "candidates.h5"], settings, known=[tmp_path / "known.h5"]).facts["order"]
    assert len(order) == 1
    assert order[0] in (frames[0].id, nudged[0].id)


def iter_built(folder, seed):
    build(ELEMENTS, BUILDER, 1, seed, folder / f"seed{seed}.h5")
    return open_shard(folder / f"seed{seed}.h5").frames()


def test_fingerprints_do_not_see_order_place_orientation_or_repetition(committee):
    base = fcc_frame(2)
    rng = np.random.default_rng(2)
    numbers = rng.permutation(np.repeat([13, 28], base.n_atoms // 2))
    positions = base.positions + rng.normal(0, 0.2, base.positions.shape)
    original = Frame(numbers, positions, base.cell, base.pbc)
    shuffle = rng.permutation(base.n_atoms)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    same = Frame(numbers[shuffle], (positions[shuffle] + 1.3) @ rotation, base.cell @ rotation, base.pbc)
    doubled = Frame(
        np.tile(numbers, 2),
        np.concatenate([positions, positions + base.cell[0]]),
        base.cell * np.array([[2], [1], [1]]),
        base.pbc,
    )
    other = Frame(numbers[::-1], positions, base.cell, base.pbc)
    prints = fingerprints(committee, [original, same, doubled, other])
    assert prints.shape == (4, 2 * 2 * committee.aev.length)
    assert prints[1] == pytest.approx(prints[0], abs=1e-9)
    assert prints[2] == pytest.approx(prints[0], abs=1e-9)
    assert np.abs(prints[3] - prints[0]).max() > 0.01
