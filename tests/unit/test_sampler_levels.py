"""Are the frames that are chosen for a higher level those that are uncertain, far between the levels, and cheap?"""

import numpy as np
import pytest

from potential.committee import Committee
from potential.config import PotentialSettings
from potential.model_file import save_committee
from sampler.config import SamplerSettings
from sampler.levels import expected_seconds, gaps, worth
from sampler.stage import choose
from shards import Frame, Label, Level, Manifest, open_shard, write_frames, write_labels


def label(frame, energy=0.0, seconds=1.0):
    return frame, Label(energy, np.zeros((frame.n_atoms, 3)), seconds=seconds)


def chain(n_atoms, spacing_A=2.5, number=13):
    return Frame([number] * n_atoms, np.arange(n_atoms)[:, None] * [spacing_A, 0.3, 0.0])


def test_worth_is_the_expected_square_of_the_change_per_second():
    spreads, gap, seconds = np.array([3.0, 3.0, 6.0]), np.array([4.0, 0.0, 8.0]), np.array([1.0, 1.0, 4.0])
    np.testing.assert_allclose(worth(spreads, gap, seconds) ** 2, [25.0, 9.0, 25.0])


def test_gap_does_not_feel_a_constant_per_element():
    rng = np.random.default_rng(1)
    frames = [Frame([1] * h + [6] * c, 3 * rng.normal(size=(h + c, 3))) for h, c in rng.integers(1, 6, size=(30, 2))]
    lower = rng.normal(size=30)
    shifted = lower + [5.0 * (frame.numbers == 1).sum() - 700.0 * (frame.numbers == 6).sum() for frame in frames]
    rows = [label(frame, energy) for frame, energy in zip(frames, lower, strict=True)]
    np.testing.assert_allclose(gaps(rows, shifted, ["H", "C"]), 0, atol=1e-9)
    shifted[7] += 2.0
    assert gaps(rows, shifted, ["H", "C"]).argmax() == 7


@pytest.mark.parametrize("power", [0.0, 3.0, 7.0])
def test_cost_follows_the_power_of_the_electrons_that_was_measured(power):
    measured = [label(chain(n), seconds=0.1 * (13 * n) ** power) for n in (1, 2, 5)]
    np.testing.assert_allclose(expected_seconds([chain(10)], measured), 0.1 * 130**power)


def test_labels_of_one_size_say_nothing_about_the_power():
    measured = [label(chain(2), seconds=seconds) for seconds in (1.0, 4.0)]
    np.testing.assert_allclose(expected_seconds([chain(2), chain(9)], measured), 2.0)


def test_choice_leaves_out_what_was_chosen_before_and_its_near_duplicates(tmp_path):
    shape = PotentialSettings(n_radial=4, n_angular_radial=2, n_angular=2, hidden=(8,), n_members=3)
    committee = Committee.from_settings(shape, ["Al"], seed=1)
    model = tmp_path / "model.safetensors"
    save_committee(committee, model, {})
    frames = [chain(n, spacing) for n in (2, 3, 4) for spacing in (2.2, 2.5, 2.8, 3.1)]
    twin = chain(4, 2.2 + 1e-7)
    shard = write_labels(tmp_path / "labels.h5", Level("emt", "1"), [label(frame) for frame in [*frames, twin]])
    Manifest(tmp_path / "manifest.jsonl").append(shard)

    def chosen(n_frames, known=(), seed=1):
        arguments = [tmp_path / "manifest.jsonl"], SamplerSettings(), n_frames, seed, tmp_path / "c.h5", known
        facts = choose(model, *arguments).facts
        assert facts["triggers"] == {"chosen": facts["n_frames"]}
        assert facts["timeouts"] == n_frames - facts["n_frames"]
        return set(open_shard(tmp_path / "c.h5").frames())

    everything = chosen(100)
    assert len(everything) == len(frames)
    assert len({frames[8].id, twin.id} & {frame.id for frame in everything}) == 1
    assert {frame.origin.model for frame in everything} == {committee.digest}
    # A quarter of 13 is 3.
    best = chosen(3)
    assert len(best) == 3
    assert best == chosen(3, seed=2)
    assert len({next(iter(chosen(1, seed=seed))) for seed in range(20)} & best) == 3
    write_frames(tmp_path / "known.h5", list(best))
    second = chosen(3, [tmp_path / "known.h5"])
    assert len(second) == 3
    assert not second & best
