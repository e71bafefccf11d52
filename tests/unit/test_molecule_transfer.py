import numpy as np
import pytest

from benchmarks.molecule_transfer import Labels, _refuse_known, _summary, constants, formula_of
from shards import Frame

ELEMENTS = ("H", "C", "N", "O")


def test_a_formula_to_be_tested_on_is_refused_at_every_level():
    water, methane = _labels([8, 1, 1]), _labels([6, 1, 1, 1, 1])
    _refuse_known({"xtb": methane, "cc": methane}, water)
    with pytest.raises(SystemExit, match="xtb: holds H2O, which are to be tested on"):
        _refuse_known({"xtb": water, "cc": methane}, water)
    _refuse_known({"dft-all": _labels([1, 8, 1])}, water)  # another frame
    with pytest.raises(SystemExit, match=rf"dft-all: holds {next(iter(water.frames))}, which are to be tested on"):
        _refuse_known({"dft-all": water}, water)


def test_a_shift_by_composition_alone_is_taken_off_whole():
    formulas = [[8, 1, 1], [6, 1, 1, 1, 1], [7, 1, 1, 1], [6, 8, 1, 1]]
    per_atom = {1: -0.3, 6: 1.2, 7: 0.4, 8: -2.0}
    low = _labels(*formulas)
    high = Labels(low.frames, {id: sum(per_atom[n] for n in frame.numbers) for id, frame in low.frames.items()})
    unknown = _frame([6, 6, 8, 1, 1, 1, 1])
    assert constants(low, high, [unknown], ELEMENTS) == pytest.approx([2 * 1.2 - 2.0 - 4 * 0.3])
    assert formula_of(unknown) == "C2H4O"


def test_differences_within_a_formula_know_no_constant():
    off = np.array([5.0, 7.0, -3.0])
    figures = _summary(off, ["CH4", "CH4", "H2O"])
    assert figures == pytest.approx([np.sqrt(83 / 3), 5.0, 5.0, 1.0, 1.0, 1.0])  # RMSE, MAE, median; within a formula


def _labels(*numbers):
    frames = [_frame(each) for each in numbers]
    return Labels({frame.id: frame for frame in frames}, {frame.id: 0.0 for frame in frames})


def _frame(numbers):
    positions = np.arange(3.0 * len(numbers)).reshape(-1, 3)
    return Frame(np.array(numbers), positions, np.zeros((3, 3)), np.zeros(3, dtype=bool))
