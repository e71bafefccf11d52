"""Are the labels that GPAW gives right? The settings of the demo, run through the labeler."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.eos import EquationOfState

from labeler.config import LabelerSettings
from labeler.engine import MissingEngine
from labeler.gpaw_engine import kpoint_mesh
from labeler.stage import label, level
from shards.frame import Frame
from shards.reader import open_shard
from shards.settings import parse_settings, read_toml
from shards.writer import write_frames

pytestmark = pytest.mark.skipif(find_spec("gpaw") is None, reason="GPAW is not installed")

DEMO = read_toml(Path(__file__).parents[2] / "configs" / "aluminum-demo.toml")["labeler"]
EV_PER_A3_IN_GPA = 160.21766  # CODATA 2018: 1 eV = 1.602176634e-19 J
# fcc Al by the same code with 12^3 k-points, 340 eV and 0.1 eV smearing, all of them converged.
LATTICE_CONSTANT_A, BULK_MODULUS_GPA = 4.0455, 78.6


def settings_of(**fields):
    return parse_settings(LabelerSettings, DEMO | fields)


def frame_of(atoms):
    return Frame(atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc)


def send(folder, frames, settings):
    write_frames(folder / "frames.h5", frames)
    return label(folder / "frames.h5", range(len(frames)), settings, ["Al"], folder / "labels", folder / "scratch")


def labels_of(folder, frames, settings):
    outcome = send(folder, frames, settings)
    assert outcome.facts["failures"] == {}
    assert outcome.failure is None
    return [open_shard(folder / "labels" / f"{frame.id}.h5").label(0) for frame in frames]


def fcc(lattice_constant_A=4.05):
    return bulk("Al", "fcc", lattice_constant_A)


def disordered():
    atoms = bulk("Al", "fcc", 4.05, cubic=True)
    atoms.set_cell([[4.25, 0.25, 0.0], [0.0, 4.0, 0.1], [0.1, 0.0, 4.0]], scale_atoms=True)  # 4 k-points a side
    atoms.rattle(0.2, seed=4)
    return atoms


def test_forces_and_stress_are_the_derivatives_of_the_stored_energy(tmp_path):
    step_A, strain, axis = 0.02, 0.01, 0
    middle, frames = disordered(), []
    for sign in (1, -1):
        moved = middle.copy()
        moved.positions[1, axis] += sign * step_A
        strained = middle.copy()
        strained.set_cell(np.array(middle.cell) * (1 + sign * strain), scale_atoms=True)
        frames += [moved, strained]
    # A mesh that changes with the cell makes a step in the energy, of which no derivative knows.
    spacing_per_A = settings_of().gpaw.kpoint_spacing_per_A
    assert len({kpoint_mesh(np.array(each.cell), spacing_per_A) for each in frames}) == 1
    right, wide, left, narrow = labels_of(tmp_path, [frame_of(each) for each in frames], settings_of())
    # The mean of both ends stands for the middle.
    force = (right.forces + left.forces)[1, axis] / 2
    # 0.01 eV/A: what the demo's loose SCF leaves, see benchmarks/label_cost.py; the forces are of order 1.
    assert force == pytest.approx(-(right.energy - left.energy) / (2 * step_A), abs=0.01)
    assert abs(force) > 0.3
    pressure = (wide.energy - narrow.energy) / (2 * strain) / middle.get_volume()
    stress = (
        wide.stress * (1 + strain) ** 2 + narrow.stress * (1 - strain) ** 2
    ) / 2  # of the energy per middle volume
    # 1.5 meV/A^3 (0.24 GPa): the number of plane waves below a finite cutoff grows with the cell (Pulay stress).
    assert np.trace(stress) == pytest.approx(pressure, abs=3 * 1.5e-3)
    # At this smearing the extrapolated energy is another function: its derivative is not the stored force.
    assert right.energy_extrapolated > right.energy


def test_fcc_aluminium_has_the_published_lattice_constant_and_bulk_modulus(tmp_path):
    crystals = [fcc(a) for a in np.linspace(3.95, 4.15, 5)]
    labels = labels_of(tmp_path, [frame_of(crystal) for crystal in crystals], settings_of())
    volumes = [crystal.get_volume() for crystal in crystals]
    volume, _, modulus = EquationOfState(volumes, [label.energy for label in labels], "birchmurnaghan").fit()
    assert (4 * volume) ** (1 / 3) == pytest.approx(LATTICE_CONSTANT_A, rel=0.005)
    assert modulus * EV_PER_A3_IN_GPA == pytest.approx(BULK_MODULUS_GPA, rel=0.05)


def test_two_mpi_ranks_give_the_label_of_one(tmp_path):
    frame = frame_of(fcc())
    (one,) = labels_of(tmp_path / "one", [frame], settings_of())
    (two,) = labels_of(tmp_path / "two", [frame], settings_of(ranks=2))
    assert two.energy == pytest.approx(one.energy, abs=1e-9)
    np.testing.assert_allclose(two.stress, one.stress, atol=1e-9)


def test_second_rung_rescues_a_frame_without_changing_its_number(tmp_path):
    frame = frame_of(fcc())
    ladder = [{"max_steps": 3}, {"mixer": "pulay", "eigensolver": "davidson"}]
    climbing = settings_of(gpaw=DEMO["gpaw"] | {"ladder": ladder})
    (plain,) = labels_of(tmp_path / "plain", [frame], settings_of())
    outcome = send(tmp_path / "climbed", [frame], climbing)
    climbed = open_shard(Path(outcome.receipts[0].path))
    assert outcome.facts["rungs"] == {frame.id: 1}
    assert climbed.level == level(settings_of(), ["Al"])
    assert climbed.label(0).energy == pytest.approx(plain.energy, abs=2e-4)
    assert climbed.label(0).scf_steps > 3


def test_frame_that_does_not_converge_ends_in_its_class_of_failure(tmp_path):
    frame = frame_of(fcc())
    outcome = send(tmp_path, [frame], settings_of(gpaw=DEMO["gpaw"] | {"ladder": [{"max_steps": 2}, {"max_steps": 3}]}))
    failure = outcome.facts["failures"][frame.id]
    assert failure["kind"] == "scf"
    assert "not self-consistent after 3 steps on rung 1" in failure["message"]
    assert "iter:   3" in Path(failure["log"]).read_text()
    assert outcome.receipts == ()
    assert not list(tmp_path.glob("labels/*"))


def test_missing_paw_data_is_said_before_anything_starts():
    with pytest.raises(MissingEngine, match=r"no PAW data Fm.PBE.gz in .*GPAW_SETUP_PATH"):
        level(settings_of(), ["Al", "Fm"])


def test_worker_under_an_mpi_launcher_can_label(tmp_path, monkeypatch):
    monkeypatch.setenv("PMIX_RANK", "0")  # with it GPAW refuses to load
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    labels_of(tmp_path, [frame_of(fcc())], settings_of())
