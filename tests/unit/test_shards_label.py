"""Labels and levels of theory: what makes two of them the same, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.constants

from shards import Label, Level
from shards.schema import (
    BOHR_A,
    AMU_A3_g_cm3,
    AMU_eV_fs2_A2,
    BOLTZMANN_eV_K,
    EV_A3_GPa,
    HARTREE_eV,
    KCAL_MOL_eV,
)


def test_a_level_is_the_same_whatever_the_order_and_spelling_of_its_settings() -> None:
    one = Level("gpaw", "26.7.0", {"mode": {"name": "pw", "ecut": 400}, "kpts": (2, 2, 2)}, {"Al": "ff"})
    two = Level("gpaw", "26.7.0", {"kpts": [2, 2, 2], "mode": {"ecut": 400, "name": "pw"}}, {"Al": "ff"})
    assert one == two
    assert one.digest == two.digest
    assert Level.from_json(one.to_json()) == one
    assert len(one.digest) == 16


@pytest.mark.parametrize(
    "other",
    [
        Level("emt", "1", {"x": 1}, {"Al": "a"}),
        Level("gpaw", "2", {"x": 1}, {"Al": "a"}),
        Level("gpaw", "1", {"x": 2}, {"Al": "a"}),
        Level("gpaw", "1", {"x": 1}, {"Al": "b"}),
    ],
)
def test_whatever_changes_the_number_changes_the_digest(other: Level) -> None:
    assert other.digest != Level("gpaw", "1", {"x": 1}, {"Al": "a"}).digest


@pytest.mark.parametrize("value", [float("nan"), object(), {1: b"x"}])
def test_settings_that_are_not_json_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"level\.settings = .*must be JSON values"):
        Level("gpaw", "1", {"x": value})


def test_the_settings_of_a_level_cannot_be_changed_from_outside() -> None:
    settings = {"kpts": [2, 2, 2]}
    level = Level("gpaw", "1", settings)
    settings["kpts"][0] = 4
    assert level.settings == {"kpts": [2, 2, 2]}


def test_labels_that_make_no_sense_are_refused() -> None:
    forces = np.zeros((2, 3))
    for arguments, message in (
        ((np.nan, forces), "energy = nan: must be finite"),
        ((0.0, np.zeros(3)), r"forces \(3,\) and stress \(3, 3\): expected"),
        ((0.0, forces, np.zeros(6)), r"stress \(6,\): expected"),
        ((0.0, np.array([[0.0, 0, 0], [np.nan, 0, 0]])), "forces must be finite, or all NaN"),
        ((0.0, forces, np.full((3, 3), np.inf)), "stress must be finite, or all NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            Label(*arguments)


def test_what_was_not_computed_is_nan() -> None:
    label = Label(1.0, np.full((2, 3), np.nan))
    assert not label.has_forces
    assert not label.has_stress
    assert np.isnan(label.energy_extrapolated)


def test_constants_agree_with_scipy() -> None:
    """scipy holds a CODATA edition of its own; two editions differ in the ninth digit."""
    of = scipy.constants.physical_constants
    kg, joule = of["atomic mass constant"][0], scipy.constants.e
    expected = {
        HARTREE_eV: of["Hartree energy in eV"][0],
        BOHR_A: of["Bohr radius"][0] * 1e10,
        BOLTZMANN_eV_K: of["Boltzmann constant in eV/K"][0],
        KCAL_MOL_eV: scipy.constants.calorie * 1e3 / scipy.constants.N_A / joule,
        AMU_eV_fs2_A2: kg * (1e-10 / 1e-15) ** 2 / joule,
        AMU_A3_g_cm3: kg * 1e3 / 1e-24,
        EV_A3_GPa: joule / 1e-30 / 1e9,
    }
    for ours, theirs in expected.items():
        assert ours == pytest.approx(theirs, rel=1e-8)
