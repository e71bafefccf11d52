"""Are the labels that PySCF and tblite give to molecules right, and is what did not converge kept out of the shards?

benchmarks/molecule_labels.py does the same for six molecules at the levels of the papers.
"""

from importlib.util import find_spec

import numpy as np
import pytest
from ase.build import molecule

from labeler.composite_engine import CompositeEngine, composite_energy
from labeler.config import CompositeSettings, LabelerSettings
from labeler.engine import MissingEngine
from labeler.pyscf_engine import PyscfEngine, refuse_molecule
from labeler.stage import label, level
from shards.frame import Frame
from shards.label import Label, Level
from shards.outcome import FailureClass
from shards.reader import open_shard
from shards.schema import BOHR_A, HARTREE_eV
from shards.settings import SettingsError, parse_settings
from shards.writer import write_frames, write_labels

needs_pyscf = pytest.mark.skipif(find_spec("pyscf") is None, reason="PySCF is not installed")
needs_tblite = pytest.mark.skipif(find_spec("tblite") is None, reason="tblite is not installed")

GFN2 = {"engine": "tblite.ase.TBLite", "arguments": {"method": "GFN2-xTB", "verbosity": 0}}
FAST = {"functional": "lda,vwn", "basis": "sto-3g"}


def settings_of(engine, **fields):
    return parse_settings(LabelerSettings, {"engine": engine, **fields})


def frame_of(name, charge=0, spin=0):
    atoms = molecule(name)
    atoms.rattle(0.05, seed=1)
    return Frame(atoms.numbers, atoms.positions, charge=charge, spin=spin)


def diatomic(first, second, distance_A):
    return Frame(np.array([first, second]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance_A]]))


def send(folder, frames, settings):
    write_frames(folder / "frames.h5", frames)
    return label(folder / "frames.h5", range(len(frames)), settings, "HCNOF", folder / "labels", folder / "scratch")


def labels_of(folder, frames, settings):
    outcome = send(folder, frames, settings)
    assert outcome.facts["failures"] == {}
    return [open_shard(folder / "labels" / f"{frame.id}.h5").label(0) for frame in frames]


def assert_slope(stored, before, after, atom, axis, step_A, tolerance):
    slope = (after.energy - before.energy) / (2 * step_A)
    assert stored.forces[atom, axis] == pytest.approx(-slope, abs=tolerance)


def displaced(frame, atom, axis, by_A):
    positions = frame.positions.copy()
    positions[atom, axis] += by_A
    return Frame(frame.numbers, positions, charge=frame.charge, spin=frame.spin)


@needs_pyscf
@pytest.mark.parametrize(("charge", "spin", "fitted"), [(0, 0, False), (1, 1, True)])
def test_dft_forces_are_the_derivatives_of_energies_that_pyscf_gives_too(tmp_path, charge, spin, fitted):
    frame, step_A = frame_of("H2O", charge, spin), 0.01
    moved = [displaced(frame, 1, 1, sign * step_A) for sign in (-1, 1)]
    settings = settings_of("pyscf", pyscf={"density_fitting": fitted})
    stored, before, after = labels_of(tmp_path, [frame, *moved], settings)
    # step^2 / 6 times the third derivative of an OH bond, of some 10^2 eV/A^3.
    assert_slope(stored, before, after, 1, 1, step_A, tolerance=4e-3)
    from pyscf import dft, gto

    rows = list(zip(frame.numbers.tolist(), frame.positions, strict=True))
    mol = gto.M(atom=rows, basis="6-31g*", cart=True, charge=charge, spin=spin, verbose=0)
    field = dft.KS(mol, xc="wb97x")
    field = (field.density_fit() if fitted else field).run(conv_tol=1e-10)
    assert stored.energy == pytest.approx(field.e_tot * HARTREE_eV, abs=1e-6)
    gradient = field.nuc_grad_method().set(grid_response=True).kernel()
    np.testing.assert_allclose(stored.forces, -gradient * HARTREE_eV / BOHR_A, atol=1e-3)
    assert stored.scf_steps > 0
    assert not stored.ingredients


@needs_pyscf
def test_composite_is_made_of_single_points_that_pyscf_gives_too(tmp_path):
    from pyscf import cc, gto, mp, scf
    from pyscf.mp import dfmp2_native

    frame = diatomic(8, 1, 0.98)
    frame = Frame(frame.numbers, frame.positions, charge=-1)
    settings = settings_of("composite", composite={"delta_basis": "cc-pvdz"})
    (stored,) = labels_of(tmp_path, [frame], settings)
    rows = list(zip(frame.numbers.tolist(), frame.positions, strict=True))
    expected = {}
    for short, basis in (("tz", "cc-pvtz"), ("qz", "cc-pvqz")):
        field = scf.RHF(gto.M(atom=rows, basis=basis, charge=-1, verbose=0))
        field = field.density_fit(auxbasis=f"{basis}-jkfit").run(conv_tol=1e-11)
        fitted = dfmp2_native.DFMP2(field, frozen=1, auxbasis=f"{basis}-ri").run()
        expected |= {f"hf_{short}": field.e_tot, f"mp2_{short}": fitted.e_corr}
    field = scf.RHF(gto.M(atom=rows, basis="cc-pvdz", charge=-1, verbose=0)).run(conv_tol=1e-11)
    coupled = cc.rccsd.RCCSD(field, frozen=1).run(conv_tol=1e-10)
    expected |= {"hf_delta": field.e_tot, "mp2_delta": mp.MP2(field, frozen=1).run().e_corr}
    expected |= {"ccsd_delta": coupled.e_corr, "triples_delta": coupled.ccsd_t()}
    # Orbitals converged to 1e-9 Ha leave correlation energies open by about their square root in eV.
    assert dict(stored.ingredients) == pytest.approx(
        {name: value * HARTREE_eV for name, value in expected.items()}, abs=5e-5
    )
    assert not stored.has_forces
    assert stored.energy == composite_energy(stored.ingredients, settings.composite)


def test_composite_is_the_published_formula():
    names = ("hf_tz", "hf_qz", "mp2_tz", "mp2_qz", "hf_delta", "mp2_delta", "ccsd_delta", "triples_delta")
    parts = dict(zip(names, (-76.0, -76.02, -0.3, -0.33, -75.9, -0.2, -0.21, -0.01), strict=True))
    a3, a4 = np.exp(-5.46 * np.sqrt(3)), np.exp(-5.46 * np.sqrt(4))
    hf = (a4 * parts["hf_tz"] - a3 * parts["hf_qz"]) / (a4 - a3)
    mp2 = (4**2.51 * parts["mp2_qz"] - 3**2.51 * parts["mp2_tz"]) / (4**2.51 - 3**2.51)
    assert composite_energy(parts, CompositeSettings()) == pytest.approx(hf + mp2 - 0.02, abs=1e-12)


@needs_pyscf
def test_scf_that_does_not_converge_is_a_failure_and_no_label(tmp_path):
    # No gradient of orbitals falls below the square root of this.
    settings = settings_of("pyscf", pyscf=FAST | {"scf_tolerance_Ha": 1e-300})
    outcome = send(tmp_path, [diatomic(1, 9, 0.9)], settings)
    (failure,) = outcome.facts["failures"].values()
    assert failure["kind"] == FailureClass.SCF
    assert "SCF not converged in 50 steps on rung 2" in failure["message"]
    assert outcome.receipts == ()
    assert not (tmp_path / "labels").exists()


@needs_pyscf
def test_ccsd_that_does_not_converge_is_a_failure_and_no_label(tmp_path):
    # A triple bond at three times its length, which one closed-shell determinant cannot describe.
    settings = settings_of("composite", composite={"delta_basis": "cc-pvdz"})
    outcome = send(tmp_path, [diatomic(7, 7, 3.0)], settings)
    (failure,) = outcome.facts["failures"].values()
    assert failure["kind"] == FailureClass.SCF
    assert "CCSD not converged in 100 steps on rung 2" in failure["message"]
    assert outcome.receipts == ()


@needs_pyscf
def test_every_rung_gives_the_same_number():
    engine = PyscfEngine(settings_of("pyscf", pyscf=FAST).pyscf, 0.0)
    answers = [engine.compute(frame_of("H2O"), rung) for rung in range(engine.n_rungs)]
    for answer in answers[1:]:
        assert answer.energy == pytest.approx(answers[0].energy, abs=1e-6)
        np.testing.assert_allclose(answer.forces, answers[0].forces, atol=1e-3)


@needs_pyscf
def test_time_limit_ends_a_coupled_cluster_label(tmp_path):
    settings = settings_of("composite", time_limit_min=0.02)
    (failure,) = send(tmp_path, [frame_of("CH3OH")], settings).facts["failures"].values()
    assert failure["kind"] == FailureClass.WALLTIME


@needs_pyscf
def test_memory_limit_ends_a_label_that_needs_more(tmp_path):
    settings = settings_of("composite", memory_limit_GB=0.4)
    (failure,) = send(tmp_path, [frame_of("CH3OH")], settings).facts["failures"].values()
    assert failure["kind"] in (FailureClass.MEMORY, FailureClass.CRASH)
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Frame(np.array([8]), np.zeros((1, 3)), np.eye(3) * 9, np.ones(3, dtype=bool)), "no periodic axis"),
        (Frame(np.array([8, 1]), np.array([[0.0, 0, 0], [0, 0, 1]])), "9 electrons .charge 0. cannot leave 0 unpaired"),
        (Frame(np.array([1]), np.zeros((1, 3)), spin=3), "1 electrons .charge 0. cannot leave 3 unpaired"),
        (Frame(np.array([1]), np.zeros((1, 3)), charge=1), "0 electrons"),
    ],
)
def test_impossible_molecules_are_refused(frame, words):
    import re

    assert re.search(words, refuse_molecule(frame))


@needs_pyscf
def test_every_setting_that_changes_the_number_changes_the_digest():
    def digest(engine, **fields):
        return level(settings_of(engine, **{engine: fields}), ["H", "O"]).digest

    digests = [
        digest("pyscf"),
        digest("pyscf", functional="pbe"),
        digest("pyscf", basis="sto-3g"),
        digest("pyscf", cartesian=False),
        digest("pyscf", density_fitting=True),
        digest("pyscf", grid_level=4),
        digest("pyscf", scf_tolerance_Ha=1e-8),
        digest("composite"),
        digest("composite", delta_basis="cc-pvdz"),
        digest("composite", hf_alpha=6.0),
        digest("composite", mp2_beta=3.0),
        digest("composite", ccsd_tolerance_Ha=1e-6),
    ]
    assert len(set(digests)) == len(digests)
    assert digest("pyscf") == digests[0]
    limits = settings_of("pyscf", time_limit_min=1.0, memory_limit_GB=9.0)
    assert level(limits, ["H", "O"]).digest == digests[0]


@needs_pyscf
def test_unknown_names_are_refused_before_any_label():
    with pytest.raises(SettingsError, match=r"labeler\.pyscf\.functional = 'b9lyp'"):
        level(settings_of("pyscf", pyscf={"functional": "b9lyp"}), ["H"])
    with pytest.raises(MissingEngine, match="no basis '6-42g' for H"):
        level(settings_of("pyscf", pyscf={"basis": "6-42g"}), ["H"])
    with pytest.raises(MissingEngine, match="no basis 'cc-pvtz-jkfit' for He"):
        level(settings_of("composite"), ["He"])


def test_missing_pyscf_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for engine in (PyscfEngine(LabelerSettings().pyscf, 0.0), CompositeEngine(CompositeSettings(), 0.0)):
        with pytest.raises(MissingEngine, match=r'pip install "smelt\[molecules\]"'):
            engine.level(["H"])


def test_ingredients_come_back_and_must_agree(tmp_path):
    frame, theory = frame_of("H2O"), Level("pyscf composite", "1")
    none = np.full((3, 3), np.nan)
    other = displaced(frame, 0, 0, 0.1)
    rows = [(frame, Label(-1.0, none, ingredients={"b": -3.0, "a": 2.0})), (other, Label(-2.0, none))]
    with pytest.raises(ValueError, match=r"row 1: ingredients \[\], row 0 has \['a', 'b'\]"):
        write_labels(tmp_path / "two.h5", theory, rows)
    receipt = write_labels(tmp_path / "one.h5", theory, rows[:1])
    shard = open_shard(tmp_path / "one.h5")
    assert shard.receipt() == receipt
    assert shard.label(0).ingredients == {"a": 2.0, "b": -3.0}
    assert {name: column.tolist() for name, column in shard.ingredients.items()} == {"a": [2.0], "b": [-3.0]}


@needs_tblite
def test_gfn2_labels_are_tblites_own(tmp_path):
    from tblite.ase import TBLite

    frame, step_A = frame_of("CH3OH"), 0.005
    moved = [displaced(frame, 0, 0, sign * step_A) for sign in (-1, 1)]
    stored, before, after = labels_of(tmp_path, [frame, *moved], settings_of(**GFN2))
    atoms = molecule("CH3OH")
    atoms.positions = frame.positions
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    assert stored.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    # tblite names no free energy; there is only the one, and nothing is extrapolated.
    assert np.isnan(stored.energy_extrapolated)
    assert_slope(stored, before, after, 0, 0, step_A, tolerance=2e-3)


@needs_tblite
def test_gfn2_that_does_not_converge_is_a_failure_and_no_label(tmp_path):
    arguments = GFN2["arguments"] | {"max_iterations": 2}
    outcome = send(tmp_path, [frame_of("CH3OH")], settings_of(**GFN2 | {"arguments": arguments}))
    (failure,) = outcome.facts["failures"].values()
    assert failure["kind"] == FailureClass.SCF
    assert outcome.receipts == ()
