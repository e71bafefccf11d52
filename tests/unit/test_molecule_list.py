from pathlib import Path

import pytest

pytest.importorskip("rdkit")

from benchmarks.molecule_list import grown

LISTED = Path(__file__).parents[2] / "configs" / "chno-molecules.smi"


def test_molecules_of_one_and_two_heavy_atoms_are_those_one_can_name():
    named = ["C", "N", "O", "C#C", "C#N", "C=C", "C=N", "C=O", "CC", "CN", "CO", "N#N", "N=N", "N=O", "NN", "NO", "OO"]
    assert grown(2) == named


def test_committed_list_begins_with_all_of_three_heavy_atoms_and_holds_no_formal_charge():
    listed, small = LISTED.read_text().split(), grown(3)
    assert listed[: len(small)] == small
    assert len(set(listed)) == len(listed)
    assert not any("+" in smiles or "-" in smiles for smiles in listed)
