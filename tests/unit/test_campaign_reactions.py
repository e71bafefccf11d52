"""Are reactions of a user's file measured as they are written, and are barriers those of the path's saddle?"""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import write
from ase.optimize import BFGS

from campaign.config import parse_campaign
from campaign.reaction_suite import barrier_probes, file_barriers, reaction_probes
from campaign.validation import validate_molecules
from potential.committee import Committee
from potential.model_file import save_committee
from shards.schema import KCAL_MOL_eV
from shards.settings import SettingsError

pytestmark = pytest.mark.skipif(find_spec("tblite") is None, reason="tblite is not installed")

FILE = """
[[reaction]]
name = "published"
coefficients = { "CH4.xyz" = -1, "H2O.xyz" = -1, "CH3OH.xyz" = 1, "H2.xyz" = 1 }
energy_kcal_mol = 30.0

[[reaction]]
name = "labeled"
coefficients = { "CH4.xyz" = -1, "H2O.xyz" = -1, "CH3OH.xyz" = 1, "H2.xyz" = 1 }

[[barrier]]
name = "umbrella"
ends = ["up.xyz", "down.xyz"]
"""
CONFIG = {
    "campaign": {"name": "x", "elements": ["H", "C", "N", "O"]},
    "potential": {"radial_cutoff_A": 4.0, "angular_cutoff_A": 3.0, "n_radial": 4, "n_angular_radial": 2,
                  "n_angular": 2, "hidden": [8], "n_members": 2},
    "labeler": {"engine": "tblite.ase.TBLite", "arguments": {"method": "GFN2-xTB", "verbosity": 0}},
}  # fmt: skip


def gfn2():
    from tblite.ase import TBLite

    return TBLite(method="GFN2-xTB", verbosity=0)


@pytest.fixture
def listed(tmp_path):
    for name in ("CH4", "H2O", "CH3OH", "H2"):
        write(tmp_path / f"{name}.xyz", molecule(name))
    up = molecule("NH3")
    down = up.copy()
    down.positions[:, 2] *= -1
    write(tmp_path / "up.xyz", up)
    write(tmp_path / "down.xyz", down)
    (tmp_path / "r.toml").write_text(FILE)
    return tmp_path / "r.toml"


def test_barrier_of_ammonia_is_the_energy_of_its_planar_form(listed):
    ((name, ends),) = file_barriers(listed)
    path, barrier = barrier_probes(name, ends, gfn2())
    assert (path.test, barrier.test, barrier.molecule) == ("path", "barrier", "umbrella")
    energies = []
    for frame in barrier.frames:
        atoms = Atoms(frame.numbers, frame.positions, calculator=gfn2())
        energies.append(atoms.get_potential_energy())
    minimum, planar = molecule("NH3"), molecule("NH3")
    planar.positions[:, 2] = 0  # by symmetry nothing drives it out of the plane
    for atoms in (minimum, planar):
        atoms.calc = gfn2()
        BFGS(atoms, logfile=None).run(0.01, 100)
    expected = planar.get_potential_energy() - minimum.get_potential_energy()
    assert expected > 0.1
    # Forces are followed down to 0.05 eV/A.
    assert barrier.weights @ energies == pytest.approx(expected, abs=5e-3)
    assert path.weights @ energies == pytest.approx(np.subtract(energies[1:], energies[0]))
    assert path.weights[-1] @ energies == pytest.approx(0, abs=5e-3)


def test_published_energies_need_no_labels_and_others_are_labeled(listed, tmp_path):
    config = parse_campaign(CONFIG)
    committee = Committee.from_settings(config.potential, config.campaign.elements, seed=1)
    save_committee(committee, tmp_path / "model.safetensors", {})
    listed.write_text(FILE.partition("[[barrier]]")[0])  # GFN2 may not converge on the path of an untrained committee
    outcome = validate_molecules(config, tmp_path / "model.safetensors", tmp_path / "out", 1, 0, listed)
    assert outcome.facts["failures"] == {}
    values = json.loads((tmp_path / "out" / "validation.json").read_text())["values"]
    published, labeled = (row for row in values if row["test"] == "listed reaction")
    molecules = [molecule(name) for name in ("CH4", "H2O", "CH3OH", "H2")]

    def reaction(calculator):
        for atoms in molecules:
            atoms.calc = calculator
        return np.dot([-1, -1, 1, 1], [atoms.get_potential_energy() for atoms in molecules]) / KCAL_MOL_eV

    assert published["reference"] == [30.0]
    assert labeled["reference"] == pytest.approx([reaction(gfn2())], abs=1e-3)  # coordinates have passed a file
    assert published["predicted"] == labeled["predicted"]
    assert labeled["predicted"] == pytest.approx([reaction(committee.calculator())], abs=1e-3)
    errors = [abs(row["predicted"][0] - row["reference"][0]) for row in (published, labeled)]
    assert outcome.facts["tests"]["listed reaction"]["mae"] == pytest.approx(np.mean(errors))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FILE.replace('"H2.xyz" = 1', '"H2.xyz" = 2'), r"published: the coefficients do not balance \(H \+2\)"),
        (FILE.replace('"H2.xyz"', '"D2.xyz"'), r"D2\.xyz: no such file"),
        (FILE.replace("down.xyz", "CH4.xyz"), "umbrella: both ends must have the same atoms in the same order"),
        (FILE.replace("energy_kcal_mol", "energy"), r"r\.toml\.reaction\.0\.energy = 30\.0: unknown key"),
    ],
)
def test_impossible_lists_are_named(listed, text, words):
    listed.write_text(text)
    with pytest.raises(SettingsError, match=words):
        _ = [*reaction_probes(listed), *file_barriers(listed)]
