from collections import Counter
from pathlib import Path

import pytest
from ase import Atoms

from shards.reader import open_shard

pytest.importorskip("rdkit")

from benchmarks import molecule_frames
from benchmarks.molecule_list import grown
from sampler.molecules import parse_molecule

LISTED = Path(__file__).parents[2] / "configs" / "chno-molecules.smi"


def test_molecules_of_one_and_two_heavy_atoms_are_those_one_can_name():
    named = ["C", "N", "O", "C#C", "C#N", "C=C", "C=N", "C=O", "CC", "CN", "CO", "N#N", "N=N", "N=O", "NN", "NO", "OO"]
    assert grown(2) == named


def test_committed_list_begins_with_all_of_three_heavy_atoms_and_holds_no_formal_charge():
    listed, small = LISTED.read_text().split(), grown(3)
    assert listed[: len(small)] == small
    assert len(set(listed)) == len(listed)
    assert not any("+" in smiles or "-" in smiles for smiles in listed)


def test_every_molecule_has_its_frames_and_further_ones_share_no_formula_with_the_test_set(tmp_path, monkeypatch):
    (tmp_path / "further.smi").write_text("CCC\nCCO\nCOC\nCCN\n")
    (tmp_path / "some.toml").write_text(
        '[campaign]\nname = "some"\nelements = ["H", "C", "N", "O"]\n'
        '[builder.molecules]\nsmiles = ["C", "CC", "CO", "CN"]\nn_heavy = [1, 2]\ntest_fraction = 0.3\n'
    )
    trained = _built(monkeypatch, tmp_path, "--rounds", "2")
    tested = _built(monkeypatch, tmp_path, "--test")
    assert sorted(Counter(trained).values()) == [2] * (4 - len(tested))
    assert not set(tested) & set(trained)
    monkeypatch.setattr(molecule_frames, "read_library", _with_ethanol_set_aside)
    assert sorted(set(_built(monkeypatch, tmp_path, "--further", str(tmp_path / "further.smi")))) == ["C2H7N", "C3H8"]


def _with_ethanol_set_aside(elements, settings):
    return (parse_molecule("CCO"),) if settings.part == "test" else ()


def _built(monkeypatch, tmp_path, *options):
    """Formulas of the frames."""
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "some.toml"), str(tmp_path / "frames.h5"), *options])
    assert molecule_frames.main() == 0
    shard = open_shard(tmp_path / "frames.h5")
    return [Atoms(numbers=shard.frame(row).numbers).get_chemical_formula() for row in range(len(shard))]
