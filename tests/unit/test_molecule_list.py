from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from potential.committee import Committee
from potential.config import PotentialSettings
from potential.model_file import save_committee
from shards.frame import Frame
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


def test_frames_can_be_those_on_which_all_models_together_differ_most(tmp_path):
    rng = np.random.default_rng(0)
    frames = [Frame([8, 1, 1], rng.normal(size=(3, 3)) + np.eye(3) * 2) for _ in range(12)]
    settings = PotentialSettings(n_radial=4, n_angular=2, n_angular_radial=2, hidden=(4,), n_members=2)
    committees = [Committee.from_settings(settings, ["H", "O"], seed) for seed in (1, 2)]
    models = [tmp_path / f"{each}.safetensors" for each in range(2)]
    for committee, model in zip(committees, models, strict=True):
        save_committee(committee, model, {})
    atoms = [Atoms(frame.numbers, frame.positions) for frame in frames]
    members = [[each.calculator().get_property("energy_members", a) for a in atoms] for each in committees]
    spread = np.concatenate(members, axis=1).std(axis=1, ddof=1)
    np.testing.assert_allclose(molecule_frames.uncertainty(frames, models), spread / np.sqrt(3), rtol=1e-3)
    chosen = molecule_frames._most_uncertain(frames, models, seed=0)
    assert {frame.id for frame in chosen} == {frames[index].id for index in np.argsort(spread)[-3:]}


def _with_ethanol_set_aside(elements, settings):
    return (parse_molecule("CCO"),) if settings.part == "test" else ()


def _built(monkeypatch, tmp_path, *options):
    """Formulas of the frames."""
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "some.toml"), str(tmp_path / "frames.h5"), *options])
    assert molecule_frames.main() == 0
    shard = open_shard(tmp_path / "frames.h5")
    return [Atoms(numbers=shard.frame(row).numbers).get_chemical_formula() for row in range(len(shard))]
