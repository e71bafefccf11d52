from itertools import product

import numpy as np
import pytest

from benchmarks.molecule_folds import FIGURES, deal, differences
from benchmarks.molecule_frames import of_each_formula
from sampler.molecules import parse_molecule


def test_every_formula_is_in_one_fold_whatever_the_others_are_called():
    formulas = [f"C{n}H{2 * n + 2}" for n in range(1, 24)]
    folds = deal(formulas, 5)
    assert sorted(formula for fold in folds for formula in fold) == sorted(formulas)
    assert {len(fold) for fold in folds} == {4, 5}
    assert deal(reversed(formulas), 5) == folds


def test_draws_take_formulas_as_a_whole_and_both_committees_together():
    formulas = ["CH4", "CH4", "NH3", "H2O"]
    off = np.array([1.0, -1.0, 4.0, 2.0])
    assert differences(formulas, [off + np.sign(off)], [off], FIGURES["MAE"]) == pytest.approx(1.0)
    drawn = differences(formulas, [off], [np.zeros(4)], FIGURES["MAE"])
    # The only means there can be when methane's two frames come and go together.
    possible = {(2 * a + 4 * b + 2 * c) / (2 * a + b + c) for a, b, c in product(range(4), repeat=3) if a + b + c == 3}
    assert set(np.round(drawn, 9)) == {round(each, 9) for each in possible}


def test_draws_compare_means_over_seeds():
    zeros, ones = np.zeros(2), np.ones(2)
    assert differences(["CH4", "NH3"], [ones, 3 * ones], [zeros], FIGURES["RMSE"]) == pytest.approx(2.0)


def test_one_molecule_of_each_formula_comes_first_in_an_order_of_its_own():
    library = [parse_molecule(smiles) for smiles in ("CCO", "COC", "CC", "CCN", "CNC")]
    chosen = of_each_formula(library, 2)
    assert {molecule.formula for molecule in chosen[:3]} == {"C2H6O", "C2H6", "C2H7N"}
    assert sorted(chosen) == sorted(library)
    assert of_each_formula(library[::-1], 1) == chosen[:3]
