"""Do the probes of the molecule suite measure what they say, and is a label that fails the loss of one probe only?"""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.vibrations import Vibrations

from campaign.config import parse_campaign
from campaign.molecule_suite import TESTS, frequencies_cm, frequency_frames, molecule_probes
from campaign.validation import validate_molecules
from potential.committee import Committee
from potential.model_file import save_committee
from sampler.molecules import parse_molecule
from shards.frame import Frame
from shards.settings import SettingsError

pytestmark = pytest.mark.skipif(
    find_spec("rdkit") is None or find_spec("tblite") is None, reason="RDKit or tblite is not installed"
)

ELEMENTS = ["H", "C", "N", "O"]
CONFIG = {
    "campaign": {"name": "x", "elements": ELEMENTS},
    "potential": {"radial_cutoff_A": 4.0, "angular_cutoff_A": 3.0, "first_shift_A": 0.8, "n_radial": 4,
                  "n_angular_radial": 2, "n_angular": 2, "hidden": [8], "n_members": 2},
    "builder": {"molecules": {"smiles": ["CO", "C=O", "CCO", "N", "O"], "test_fraction": 0.5}},
    "labeler": {"engine": "tblite.ase.TBLite", "arguments": {"method": "GFN2-xTB", "verbosity": 0}},
}  # fmt: skip


def probes_of(*smiles):
    return list(molecule_probes([parse_molecule(each) for each in smiles], seed=1))


def test_no_probe_feels_a_constant_per_element():
    probes = probes_of("CCO", "NC=O", "OCCO", "C1CC1")
    assert {probe.test for probe in probes} == set(TESTS)
    for probe in probes:
        counts = np.array([np.bincount(frame.numbers, minlength=9) for frame in probe.frames])
        np.testing.assert_allclose(probe.weights @ counts, 0, atol=1e-12)
        assert probe.weights.shape == (0 if probe.test == "frequencies" else len(probe.at), len(probe.frames))


def test_reaction_of_formaldehyde_is_its_hydrogenation():
    (probe,) = [probe for probe in probes_of("C=O") if probe.test == "reaction"]
    symbols = [Atoms(frame.numbers).get_chemical_formula() for frame in probe.frames]
    # CH2O + 2 H2 -> CH4 + H2O
    assert dict(zip(symbols, probe.weights[0], strict=True)) == {"CH2O": -1, "H2": -2, "CH4": 1, "H2O": 1}


def test_pairs_of_a_dimer_probe_are_its_two_molecules_moved_apart():
    (probe,) = [probe for probe in probes_of("CO") if probe.test == "dimer"]
    *pairs, first, second = probe.frames
    for pair in pairs:
        for alone, part in ((first, slice(0, 6)), (second, slice(6, 12))):
            inside = np.linalg.norm(pair.positions[part][:, None] - pair.positions[part], axis=2)
            np.testing.assert_allclose(
                inside, np.linalg.norm(alone.positions[:, None] - alone.positions, axis=2), atol=1e-9
            )


def test_frequencies_are_those_of_ase(tmp_path):
    from tblite.ase import TBLite

    atoms = molecule("H2O")
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    frame = Frame(atoms.numbers, atoms.positions)
    forces = []
    for moved in frequency_frames(frame):
        each = Atoms(moved.numbers, moved.positions)
        each.calc = TBLite(method="GFN2-xTB", verbosity=0)
        forces.append(each.get_forces())
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"))
    vibrations.run()
    expected = np.sort(vibrations.get_frequencies().real)[-3:]
    # ASE leaves rotations in, which the geometry, no minimum of GFN2, mixes in a little.
    np.testing.assert_allclose(frequencies_cm(frequency_frames(frame), forces), expected, rtol=2e-3)


def test_suite_writes_every_value_a_table_and_a_plot(tmp_path):
    config = parse_campaign(CONFIG)
    model = tmp_path / "model.safetensors"
    save_committee(Committee.from_settings(config.potential, ELEMENTS, seed=1), model, {})
    outcome = validate_molecules(config, model, tmp_path / "out", 2, seed=1)
    tests = outcome.facts["tests"]
    assert {"stretch", "dimer", "frequencies"} <= set(tests)
    assert outcome.facts["failures"] == {}
    table = json.loads((tmp_path / "out" / "validation.json").read_text())
    for name, figures in tests.items():
        rows = [row for row in table["values"] if row["test"] == name]
        off = np.concatenate([np.subtract(row["predicted"], row["reference"]) for row in rows])
        assert figures["mae"] == pytest.approx(np.abs(off).mean())
        assert figures["n_values"] == len(off)
    assert (tmp_path / "out" / "validation.png").stat().st_size > 1000
    # GFN2's harmonic wavenumbers of bonds to hydrogen.
    stretches = [max(row["reference"]) for row in table["values"] if row["test"] == "frequencies"]
    assert all(2500 < each < 4200 for each in stretches)
    again = validate_molecules(config, model, tmp_path / "out", 2, seed=1)
    assert again.facts["tests"] == tests
    refused = parse_campaign(CONFIG | {"labeler": CONFIG["labeler"] | {"minimum_distance_A": 0.9}})
    partly = validate_molecules(refused, model, tmp_path / "partly", 2, seed=1)
    assert partly.facts["failures"]
    assert "dimer" in partly.facts["tests"]


def test_campaign_without_molecules_is_refused(tmp_path):
    config = parse_campaign(CONFIG | {"builder": {}})
    with pytest.raises(SettingsError, match="names no molecules"):
        validate_molecules(config, tmp_path / "model", tmp_path, 2, seed=1)
