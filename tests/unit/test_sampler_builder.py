"""Random cells keep what their settings promise."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.data import atomic_masses
from ase.neighborlist import neighbor_list

from sampler.builder import CrowdedCellError, check_builder, random_frame
from sampler.config import BuilderSettings
from shards.settings import SettingsError, parse_settings


def atoms_of(frame):
    return Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)


def density_g_cm3(frame):
    return atoms_of(frame).get_masses().sum() * units._amu * 1000 / (frame.volume_A3 * 1e-24)


@pytest.mark.parametrize(
    "settings",
    [
        BuilderSettings(n_atoms=(100, 120), density_g_cm3=(4.0, 4.05)),
        BuilderSettings(n_atoms=(100, 120), density_g_cm3=(4.0, 4.05), minimum_distance_A=2.25),
        BuilderSettings(n_atoms=(3, 6), density_g_cm3=(3.5, 4.0), shape_jitter=0.3),
    ],
    ids=["dense aluminium", "as crowded as is allowed", "cells smaller than the distance's reach"],
)
def test_minimum_distance_holds_between_all_periodic_images(settings):
    check_builder(["Al"], settings)
    for seed in range(5):
        distances = neighbor_list("d", atoms_of(random_frame(["Al"], settings, seed)), 4.0)
        assert distances.min() >= settings.minimum_distance_A - 1e-9


def test_density_and_size_lie_in_their_ranges_and_spread_over_them():
    settings = BuilderSettings(n_atoms=(10, 20), density_g_cm3=(1.8, 4.05))
    frames = [random_frame(["Al"], settings, seed) for seed in range(100)]
    densities = np.array([density_g_cm3(frame) for frame in frames])
    assert 1.8 <= densities.min() < 2.0
    assert 3.85 < densities.max() <= 4.05
    assert {frame.n_atoms for frame in frames} == set(range(10, 21))


def test_same_seed_gives_the_same_frame_and_another_seed_another():
    settings = BuilderSettings(n_atoms=(10, 20))
    first, again, other = (random_frame(["Al"], settings, seed) for seed in (7, 7, 8))
    assert first.id == again.id != other.id
    assert first.origin.kind == "bootstrap"
    assert first.origin.seed == 7


def test_cells_are_cubic_without_jitter_and_triclinic_with_it():
    cubic = random_frame(["Al"], BuilderSettings(n_atoms=(10, 10), shape_jitter=0.0), 1).cell
    assert np.array_equal(cubic, np.eye(3) * cubic[0, 0])
    skewed = random_frame(["Al"], BuilderSettings(n_atoms=(10, 10), shape_jitter=0.1), 1).cell
    assert np.abs(skewed / np.linalg.det(skewed) ** (1 / 3) - np.eye(3)).max() == pytest.approx(0.1, abs=0.08)


def test_fixed_composition_is_met_to_the_atom():
    settings = BuilderSettings(n_atoms=(16, 16), composition={"Al": 0.25, "Ni": 0.75})
    numbers = random_frame(["Al", "Ni"], settings, 3).numbers
    assert (np.sum(numbers == 13), np.sum(numbers == 28)) == (4, 12)


def test_random_composition_reaches_every_count_about_equally_often():
    settings = BuilderSettings(n_atoms=(4, 4), density_g_cm3=(1.0, 1.0))
    counts = [int(np.sum(random_frame(["Al", "Ni"], settings, seed).numbers == 13)) for seed in range(500)]
    # 100 expected in each of five bins; 5 sigma is 45.
    assert np.bincount(counts, minlength=5) == pytest.approx(100, abs=45)


def test_alloy_volume_is_the_sum_of_its_elements_volumes():
    settings = BuilderSettings(
        n_atoms=(12, 12),
        composition={"Al": 0.5, "Ni": 0.5},
        density_by_element_g_cm3={"Al": (2.7, 2.7), "Ni": (8.9, 8.9)},
    )
    frame = random_frame(["Al", "Ni"], settings, 1)
    expected = 6 * (atomic_masses[13] / 2.7 + atomic_masses[28] / 8.9) * units._amu * 1000 / 1e-24
    assert frame.volume_A3 == pytest.approx(expected, rel=1e-6)


def test_minimum_distance_of_unlike_atoms_is_the_mean_of_the_like_ones():
    settings = BuilderSettings(
        n_atoms=(40, 40), density_g_cm3=(1.2, 1.2), minimum_distance_by_element_A={"H": 0.8, "O": 2.0}
    )
    frame = random_frame(["H", "O"], settings, 5)
    first, second, distances = neighbor_list("ijd", atoms_of(frame), 3.0)
    kinds = np.sort(np.stack([frame.numbers[first], frame.numbers[second]]), axis=0).T.tolist()
    shortest = {}
    for kind, distance in zip(map(tuple, kinds), distances, strict=True):
        shortest[kind] = min(distance, shortest.get(kind, 9.0))
    assert shortest[1, 1] >= 0.8
    assert 1.4 <= shortest[1, 8] < 2.0
    assert shortest[8, 8] >= 2.0


def test_density_and_distance_that_exclude_each_other_are_refused_before_building():
    settings = BuilderSettings(density_g_cm3=(1.8, 4.0), minimum_distance_A=2.7)
    with pytest.raises(SettingsError, match=r"Al at 4 g/cm3 with atoms 2.7 A apart fills 0.92 of space"):
        check_builder(["Al"], settings)
    with pytest.raises(CrowdedCellError, match=r"as spheres they fill 0\.92 of the cell"):
        random_frame(["Al"], settings.model_copy(update={"density_g_cm3": (4.0, 4.0), "n_atoms": (20, 20)}), 1)


def test_tables_for_elements_that_are_not_there_are_refused():
    settings = BuilderSettings(minimum_distance_by_element_A={"Cu": 2.0})
    with pytest.raises(SettingsError, match=r"builder.minimum_distance_by_element_A: Cu: not among the elements Al"):
        check_builder(["Al"], settings)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"density_g_cm3": [3, 2]}, r"builder.density_g_cm3 = \[3, 2\]: .*low <= high"),
        ({"composition": {"Al": 0.2}}, r"builder.composition.* fractions must add up to 1"),
        ({"composition": {"Xx": 1.0}}, "not chemical symbols: Xx"),
        ({"densty": 1}, r"builder.densty = 1: unknown key; did you mean density_g_cm3\?"),
    ],
)
def test_wrong_builder_settings_are_named(table, message):
    with pytest.raises(SettingsError, match=message):
        parse_settings(BuilderSettings, table, "builder")
