"""The pure rules of sampling: schedules, triggers, selection."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sampler.config import SamplerSettings
from sampler.schedules import Schedule, draw_schedule
from sampler.selection import relative_distances, select
from sampler.streams import Purpose, derive_seed, open_stream
from sampler.triggers import Reading, Spread, Verdict, is_elevated, is_wanted, judge, severity
from shards.settings import SettingsError, parse_settings

SCHEDULE = Schedule(
    max_time_fs=10_000,
    temperature_start_K=300,
    temperature_end_K=1300,
    temperature_amplitude_K=500,
    temperature_period_fs=4_000,
    density_end_factor=0.9,
    density_amplitude_factor=0.2,
    density_period_fs=5_000,
)


def test_schedule_follows_the_published_law():
    # Half a period into a pulse sin^2 is 1, a quarter into it 1/2, after each whole period 0.
    times = [0, 1_000, 2_000, 4_000, 10_000]
    assert [SCHEDULE.temperature_K(t) for t in times] == pytest.approx([300, 650, 1000, 700, 1800])
    times = [0, 1_250, 2_500, 5_000, 10_000]
    assert [SCHEDULE.density_factor(t) for t in times] == pytest.approx([1, 1.0875, 1.175, 0.95, 0.9])


def test_every_schedule_parameter_is_drawn_from_its_range():
    settings = SamplerSettings(temperature_start_K=(100, 200), density_period_ps=(3, 4))
    drawn = [draw_schedule(settings, seed) for seed in range(200)]
    starts = [schedule.temperature_start_K for schedule in drawn]
    assert 100 <= min(starts) < 105
    assert 195 < max(starts) <= 200
    assert all(3_000 <= schedule.density_period_fs <= 4_000 for schedule in drawn)
    assert draw_schedule(settings, 5) == drawn[5] != drawn[6]


def test_streams_of_walkers_and_purposes_are_independent():
    seeds = [derive_seed(1, walker) for walker in range(1000)] + [derive_seed(2, walker) for walker in range(1000)]
    assert len(set(seeds)) == 2000
    assert max(seeds) < 2**63
    numbers = np.stack([open_stream(seed, purpose).normal(size=1000) for seed in seeds[:2] for purpose in Purpose])
    # Correlations of 1000 independent pairs have a standard deviation of 0.032.
    assert np.abs(np.corrcoef(numbers) - np.eye(len(numbers))).max() < 0.15


SETTINGS = SamplerSettings(
    force_mean_threshold_eV_A=0.1, force_max_factor=3, energy_threshold_meV=20, min_time_ps=0.1, max_time_ps=5
)
CALM = Reading(Spread(0.0, 0.05, 0.2), shortest_A=2.5, temperature_K=900, largest_force_eV_A=3.0)


@pytest.mark.parametrize(
    ("change", "time_fs", "verdict"),
    [
        ({}, 1000, ""),
        ({"spread": Spread(0, 0.11, 0.2)}, 1000, "force_mean"),
        ({"spread": Spread(0, 0.05, 0.31)}, 1000, "force_max"),
        ({"spread": Spread(0.021, 0.05, 0.2)}, 1000, "energy"),
        ({"spread": Spread(0, 0.11, 0.2)}, 99, ""),
        ({"spread": Spread(0, 0.11, 0.2)}, 100, "force_mean"),
        ({"spread": Spread(0, math.nan, 0.2)}, 1000, "force_mean"),
        ({}, 5000, "timeout"),
        ({"spread": Spread(0, 0.11, 0.2)}, 5000, "force_mean"),
        ({"shortest_A": 1.1}, 0, "too_close"),
        ({"shortest_A": 1.1, "spread": Spread(0, 9.0, 9.0)}, 1000, "too_close"),
        ({"temperature_K": 20_001.0}, 0, "runaway"),
        ({"temperature_K": math.nan}, 0, "runaway"),
        ({"largest_force_eV_A": 101.0}, 0, "runaway"),
        ({"largest_force_eV_A": math.nan}, 0, "runaway"),
    ],
)
def test_walkers_are_judged_by_the_published_rules_and_the_guards(change, time_fs, verdict):
    assert judge(replace(CALM, **change), time_fs, SETTINGS) == verdict


def test_energy_threshold_zero_switches_that_trigger_off():
    settings = SETTINGS.model_copy(update={"energy_threshold_meV": 0.0})
    assert judge(replace(CALM, spread=Spread(99.0, 0.05, 0.2)), 1000, settings) == Verdict.RUNNING


def test_frame_before_a_blow_up_is_worth_a_label_only_when_its_spread_was_elevated():
    assert is_elevated(Spread(0, 0.06, 0), SETTINGS)
    assert not is_elevated(Spread(0, 0.04, 0), SETTINGS)


def test_candidates_are_judged_again_by_the_rule_that_kept_them():
    between = Spread(0, 0.06, 0)
    assert not is_wanted(between, "force_mean", SETTINGS)
    assert is_wanted(between, "runaway", SETTINGS)
    assert not is_wanted(between, "timeout", SETTINGS)
    for policy in ("most_uncertain", "last"):
        assert is_wanted(between, "timeout", SETTINGS.model_copy(update={"on_timeout": policy}))


def test_crystal_without_force_spread_is_as_severe_as_its_energy_spread():
    settings = SETTINGS.model_copy(update={"force_mean_threshold_eV_A": 0.1, "energy_threshold_meV": 5.0})
    assert severity(0.015, 0.0, settings) == pytest.approx(3)
    assert severity(0.015, 0.4, settings) == pytest.approx(4)


def test_severity_is_of_the_forces_alone_where_energies_trigger_nothing():
    settings = SETTINGS.model_copy(update={"force_mean_threshold_eV_A": 0.1, "energy_threshold_meV": 0.0})
    assert severity(99.0, 0.05, settings) == pytest.approx(0.5)


def test_minimum_time_beyond_maximum_time_is_refused():
    with pytest.raises(SettingsError, match=r"min_time_ps = 30.0 must be smaller than max_time_ps = 20.0"):
        parse_settings(SamplerSettings, {"min_time_ps": 30.0}, "sampler")


def test_of_near_duplicates_the_most_uncertain_stays():
    prints = np.array([[1.0, 0.0], [1.001, 0.0], [0.0, 1.0], [0.0, 1.001]])
    assert select(prints, np.array([1.0, 2.0, 4.0, 3.0]), distance=0.01) == [2, 1]


def test_near_duplicates_of_known_frames_are_removed():
    prints = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    scores = np.array([3.0, 2.0, 1.0])
    assert select(prints, scores, distance=0.01, known=np.array([[0.0, 1.001]])) == [0, 2]


def test_limited_selection_takes_the_farthest_point_each_time():
    # On a line far from the origin relative distances order like plain ones. From 0, the most uncertain, the
    # farthest is 10, then the middle of the largest gap.
    points = np.array([0.0, 1.0, 4.0, 6.5, 9.0, 10.0])
    prints = np.stack([points, np.full(6, 1000.0)], axis=1)
    scores = np.array([9.0, 1, 1, 1, 1, 1])
    assert select(prints, scores, distance=0.0, count=4) == [0, 5, 2, 3]


def test_selection_of_nothing_is_nothing():
    assert select(np.zeros((0, 4)), np.zeros(0), distance=0.1, known=np.zeros((0, 4))) == []


def test_relative_distance_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    expected = [[2 * math.dist(x, y) / (math.hypot(*x) + math.hypot(*y)) for y in b] for x in a]
    assert relative_distances(a, b) == pytest.approx(np.array(expected))
    assert relative_distances(np.zeros((1, 2)), np.zeros((1, 2))) == 0
