"""Conversion: what a format can hold comes back to the bit, and a broken source leaves nothing behind."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import h5py
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards_examples import LEVEL, assert_same_frame, assert_same_label, example_rows, frames, labeled

from shards import Frame, Label, Level, Manifest, MixedLevelsError, TruncatedShardError, open_shard, write_labels
from shards.convert import (
    ConversionError,
    Fields,
    convert,
    from_atoms,
    label_from_atoms,
    level_from_atoms,
    to_atoms,
)
from shards.schema import BOHR_A, HARTREE_eV, KCAL_MOL_eV

SAME_FOLDER = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def only_sources_in(folder: Path, *names: str) -> bool:
    return sorted(os.listdir(folder)) == sorted(names)


# Atoms


@given(frames())
def test_a_frame_comes_back_from_atoms(frame: Frame) -> None:
    assert_same_frame(from_atoms(to_atoms(frame)), frame)


@given(labeled())
def test_a_label_and_its_level_come_back_from_atoms(row: tuple[Frame, Label]) -> None:
    atoms = to_atoms(*row, LEVEL)
    label = label_from_atoms(atoms)
    assert label is not None
    assert_same_label(label, row[1])
    assert level_from_atoms(atoms) == LEVEL


def test_results_of_an_ase_calculator_are_read_in_ase_signs() -> None:
    atoms = bulk("Al", cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    assert label_from_atoms(atoms) is None  # nothing was calculated yet
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    label = label_from_atoms(atoms)
    assert label is not None
    np.testing.assert_array_equal(label.forces, forces)
    np.testing.assert_array_equal(label.stress, stress)
    strain, h = np.eye(3), 1e-5
    energies = []
    for step in (h, -h):
        strained = atoms.copy()
        strain[0, 0] = 1 + step
        strained.set_cell(atoms.cell @ strain, scale_atoms=True)
        strained.calc = EMT()
        energies.append(strained.get_potential_energy())
    assert label.stress[0, 0] == pytest.approx((energies[0] - energies[1]) / (2 * h) / atoms.get_volume(), rel=1e-5)


def test_the_free_energy_is_the_label_and_the_energy_is_the_extrapolated_one() -> None:
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=-14.0, free_energy=-14.25)
    label = label_from_atoms(atoms)
    assert label is not None
    assert (label.energy, label.energy_extrapolated) == (-14.25, -14.0)
    back = to_atoms(from_atoms(atoms), label)
    assert (back.get_potential_energy(), back.get_potential_energy(force_consistent=True)) == (-14.0, -14.25)


def test_results_do_not_outlive_a_move_of_the_atoms() -> None:
    frame, label = example_rows(1)[0]
    atoms = to_atoms(frame, label)
    atoms.positions[0, 0] += 0.1
    assert label_from_atoms(atoms) is None


def test_provenance_does_not_outlive_a_new_calculation() -> None:
    """Otherwise the new numbers would pass for the old level of theory."""
    frame, label = example_rows(1)[0]
    atoms = to_atoms(frame, label, LEVEL)
    atoms.calc = SinglePointCalculator(atoms, energy=label.energy + 1e-9)
    again = label_from_atoms(atoms)
    assert again is not None
    assert (again.host, again.scf_steps) == ("", 0)
    assert level_from_atoms(atoms) is None
    assert from_atoms(atoms).origin.model == "0123abcd"
    atoms.positions[0, 0] += 0.1
    assert from_atoms(atoms).origin.model == ""


def test_charge_and_unpaired_electrons_travel_in_info() -> None:
    atoms = molecule("O2")
    atoms.info.update(charge=-1, spin=1.0)
    assert (from_atoms(atoms).charge, from_atoms(atoms).spin) == (-1, 1)
    atoms.info["charge"] = 0.5
    with pytest.raises(ValueError, match=r"info\['charge'\] = 0\.5: must be a whole number"):
        from_atoms(atoms)


# Files


@SAME_FOLDER
@given(rows=st.lists(labeled(), min_size=1, max_size=4), suffix=st.sampled_from([".xyz", ".extxyz", ".db", ".h5"]))
def test_labels_come_back_through_files_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Frame, Label]], suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("a")
    write_labels(folder / "a.h5", LEVEL, rows)
    there = convert(folder / "a.h5", folder / f"there{suffix}")
    back = convert(folder / f"there{suffix}", folder / "back.h5")
    assert there.n_frames == back.n_frames == len(rows)
    shard = open_shard(folder / "back.h5")
    assert (shard.receipt(),) == back.receipts
    assert shard.level == LEVEL
    for (got_frame, got_label), (frame, label) in zip(shard.rows(), rows, strict=True):
        assert_same_frame(got_frame, frame)
        assert_same_label(got_label, label)


@SAME_FOLDER
@given(rows=st.lists(labeled(), min_size=1, max_size=4))
def test_labels_come_back_through_the_ani_layout(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Frame, Label]]
) -> None:
    folder = tmp_path_factory.mktemp("a")
    write_labels(folder / "a.h5", LEVEL, rows)
    convert(folder / "a.h5", folder / "there.ani.h5")
    convert(folder / "there.ani.h5", folder / "back.h5")
    shard = open_shard(folder / "back.h5")
    assert sorted(shard.ids) == sorted(frame.id for frame, _ in rows)
    expected: dict[str, list[Label]] = {}
    for frame, label in rows:
        expected.setdefault(frame.id, []).append(label)
    for frame, label in shard.rows():
        other = expected[frame.id].pop(0)
        # Through hartree and back costs the last digit, and more of numbers that underflow.
        np.testing.assert_allclose(label.energy, other.energy, rtol=1e-15, atol=1e-300)
        np.testing.assert_allclose(label.forces, other.forces, rtol=1e-15, atol=1e-300)
        np.testing.assert_allclose(label.stress, other.stress, rtol=1e-15, atol=1e-300)


def test_all_pairs_of_formats_agree(tmp_path: Path) -> None:
    frames_of_shard = [frame for frame, _ in example_rows(5)]
    write_labels(tmp_path / "a.h5", LEVEL, example_rows(5))
    names = ("x.h5", "x.xyz", "x.db", "x.ani.h5")
    for name in names:
        convert(tmp_path / "a.h5", tmp_path / name, frames_only=True)
    for one, two in product(names, names):
        convert(tmp_path / one, tmp_path / f"{one}-{two}")
        convert(tmp_path / f"{one}-{two}", tmp_path / f"{one}-{two}.back.h5")
        shard = open_shard(tmp_path / f"{one}-{two}.back.h5")
        assert shard.kind == "frames"
        assert sorted(shard.ids) == sorted(frame.id for frame in frames_of_shard)


def test_ase_reads_the_extended_xyz_that_is_written(tmp_path: Path) -> None:
    rows = example_rows(3)
    write_labels(tmp_path / "a.h5", LEVEL, rows)
    convert(tmp_path / "a.h5", tmp_path / "a.xyz")
    for atoms, (frame, label) in zip(ase.io.read(tmp_path / "a.xyz", ":"), rows, strict=True):
        np.testing.assert_array_equal(atoms.positions, frame.positions)
        np.testing.assert_array_equal(atoms.cell, frame.cell)
        np.testing.assert_array_equal(atoms.get_forces(), label.forces)
        np.testing.assert_array_equal(atoms.get_stress(voigt=False), label.stress)
        assert atoms.get_potential_energy(force_consistent=True) == label.energy


def test_files_written_by_ase_are_read(tmp_path: Path) -> None:
    images = []
    for i in range(12):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=i)
        atoms.calc = EMT()
        atoms.get_stress()
        images.append(atoms)
    ase.io.write(tmp_path / "a.xyz", images)
    with ase.db.connect(tmp_path / "a.db") as database:
        for atoms in images:
            database.write(atoms, source="test")
    for name, tolerance in (("a.xyz", 1e-7), ("a.db", 0.0)):  # ASE writes eight decimals of positions and forces
        convert(tmp_path / name, tmp_path / f"{name}.h5")
        shard = open_shard(tmp_path / f"{name}.h5")
        for (frame, label), atoms in zip(shard.rows(), images, strict=True):
            np.testing.assert_allclose(frame.positions, atoms.positions, atol=tolerance)
            np.testing.assert_allclose(label.forces, atoms.get_forces(), atol=tolerance)
            np.testing.assert_array_equal(label.stress, atoms.get_stress(voigt=False))
            assert label.energy == atoms.get_potential_energy()


def test_an_energy_under_another_name_is_never_lost_in_silence(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    atoms.info["REF_energy"] = -1.0
    atoms.arrays["REF_forces"] = np.arange(9.0).reshape(3, 3)
    atoms.calc = None
    ase.io.write(tmp_path / "a.xyz", atoms, columns=["symbols", "positions", "REF_forces"])
    with pytest.raises(ConversionError, match=r"a\.xyz: frame 0: no energy under the usual names: .*REF_energy"):
        convert(tmp_path / "a.xyz", tmp_path / "a.h5")
    assert only_sources_in(tmp_path, "a.xyz")
    convert(tmp_path / "a.xyz", tmp_path / "a.h5", Fields(energy="REF_energy", energy_unit="hartree"))
    label = open_shard(tmp_path / "a.h5").label(0)
    assert label.energy == -HARTREE_eV
    np.testing.assert_array_equal(label.forces, np.arange(9.0).reshape(3, 3) * HARTREE_eV)
    with pytest.raises(ConversionError, match=r"frame 0: has no energy DFT_energy"):
        convert(tmp_path / "a.xyz", tmp_path / "b.h5", Fields(energy="DFT_energy"))
    with pytest.raises(ConversionError, match=r"frame 0: no DFT_forces: has .*REF_forces"):
        convert(tmp_path / "a.xyz", tmp_path / "b.h5", Fields(energy="REF_energy", forces="DFT_forces"))


def test_frames_with_and_without_labels_are_never_mixed_in_silence(tmp_path: Path) -> None:
    with_label, without = to_atoms(*example_rows(1)[0]), to_atoms(example_rows(2)[1][0])
    for name, images in (("a.xyz", [with_label, without]), ("b.xyz", [without, with_label])):
        ase.io.write(tmp_path / name, images)
        with pytest.raises(ConversionError, match=r"frame 1: (has no|is the first with an) energy"):
            convert(tmp_path / name, tmp_path / "out.h5")
        assert only_sources_in(tmp_path, name)
        skipped = convert(tmp_path / name, tmp_path / "labels.h5", skip_unlabeled=True)
        assert (skipped.n_frames, skipped.n_skipped) == (1, 1)
        assert convert(tmp_path / name, tmp_path / "frames.h5", frames_only=True).n_frames == 2
        assert (open_shard(tmp_path / "labels.h5").kind, open_shard(tmp_path / "frames.h5").kind) == (
            "labels",
            "frames",
        )
        for made in (name, "labels.h5", "frames.h5"):
            (tmp_path / made).unlink()


@pytest.mark.parametrize("n_bytes_missing", [1, 30, 100, 250])
def test_a_broken_extended_xyz_leaves_nothing_behind(tmp_path: Path, n_bytes_missing: int) -> None:
    write_labels(tmp_path / "a.h5", LEVEL, example_rows(3))
    convert(tmp_path / "a.h5", tmp_path / "a.xyz")
    content = (tmp_path / "a.xyz").read_text()
    (tmp_path / "a.xyz").write_text(content.rstrip()[: -n_bytes_missing - 20])
    with pytest.raises(ConversionError, match=r"a\.xyz: frame 2: "):
        convert(tmp_path / "a.xyz", tmp_path / "b.h5", frames_per_shard=1)
    assert only_sources_in(tmp_path, "a.h5", "a.xyz")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Al ", "Xx ", "frame 0: ASE cannot read it"),
        ("\n3\n", "\nthree\n", "expected the number of atoms, found 'three'"),
        ('energy="', 'energy="x', "frame 0: "),
        ('pbc="T T T"', 'pbc="T T"', "frame 0: "),
    ],
)
def test_a_frame_that_makes_no_sense_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    frame = Frame(np.array([13, 13, 13]), np.arange(9.0).reshape(3, 3), np.eye(3) * 9, True)
    label = Label(1.0, np.zeros((3, 3)))
    write_labels(tmp_path / "a.h5", LEVEL, [(frame, label), (frame, label)])
    convert(tmp_path / "a.h5", tmp_path / "a.xyz")
    text = (tmp_path / "a.xyz").read_text()
    assert old in text
    (tmp_path / "a.xyz").write_text(text.replace(old, new))
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "a.xyz", tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()


def test_an_empty_line_between_frames_hides_none_of_them(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.h5", LEVEL, example_rows(2))
    convert(tmp_path / "a.h5", tmp_path / "a.xyz")
    text = (tmp_path / "a.xyz").read_text()
    (tmp_path / "b.xyz").write_text(text + "\n\n" + text)
    assert convert(tmp_path / "b.xyz", tmp_path / "b.h5").n_frames == 4


def test_sources_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.h5", LEVEL, example_rows(2))
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[:-9])
    (tmp_path / "text.h5").write_text("no HDF5")
    (tmp_path / "text.db").write_text("no database " * 100)
    (tmp_path / "empty.xyz").write_text("")
    (tmp_path / "a.cif").write_text("")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    before = sorted(os.listdir(tmp_path))
    for name, message in (
        ("nowhere.xyz", r"nowhere\.xyz: no such file"),
        ("cut.h5", r"cut\.h5: .*truncated"),
        ("text.h5", r"text\.h5: HDF5 cannot read it"),
        ("text.db", r"text\.db: not an ASE database"),
        ("empty.xyz", r"empty\.xyz: no frame to convert"),
        ("a.cif", r"a\.cif: unknown format '\.cif': must be one of \.h5"),
        ("other.h5", r"other\.h5: no group with `coordinates`"),
    ):
        with pytest.raises((ConversionError, TruncatedShardError), match=message):
            convert(tmp_path / name, tmp_path / "out.h5")
    with pytest.raises(ConversionError, match=r"out\.cif: unknown format"):
        convert(tmp_path / "a.h5", tmp_path / "out.cif")
    with pytest.raises(ConversionError, match=r"a\.h5: is there already"):
        convert(tmp_path / "a.h5", tmp_path / "a.h5")
    assert sorted(os.listdir(tmp_path)) == before


def test_many_frames_become_several_shards(tmp_path: Path) -> None:
    rows = example_rows(7)
    write_labels(tmp_path / "a.h5", LEVEL, rows)
    conversion = convert(tmp_path / "a.h5", tmp_path / "part.h5", frames_per_shard=3)
    assert [path.name for path in conversion.paths] == ["part-0000.h5", "part-0001.h5", "part-0002.h5"]
    assert [receipt.n_frames for receipt in conversion.receipts] == [3, 3, 1]
    with pytest.raises(ConversionError, match=r"part-0000\.h5: is there already"):
        convert(tmp_path / "a.h5", tmp_path / "part.h5", frames_per_shard=5)
    shards = [open_shard(Path(receipt.path)) for receipt in conversion.receipts]
    assert [frame_id for shard in shards for frame_id in shard.ids] == [frame.id for frame, _ in rows]


def test_the_shards_of_a_manifest_become_one(tmp_path: Path) -> None:
    rows = example_rows(5)
    manifest = Manifest(tmp_path / "manifest.jsonl")
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        manifest.append(write_labels(tmp_path / f"{name}.h5", LEVEL, part))
    conversion = convert(manifest.path, tmp_path / "all.h5")
    shard = open_shard(conversion.paths[0])
    assert shard.ids == [frame.id for frame, _ in rows]
    assert_same_label(shard.label(4), rows[4][1])
    with pytest.raises(ConversionError, match=r"none\.jsonl: no such file"):
        convert(tmp_path / "none.jsonl", tmp_path / "other.h5")


def test_levels_of_theory_are_never_mixed(tmp_path: Path) -> None:
    rows = example_rows(2)
    with ase.db.connect(tmp_path / "a.db") as database:
        for (frame, label), level in zip(rows, (LEVEL, Level("gpaw", "26.7.0")), strict=True):
            atoms = to_atoms(frame, label, level)
            database.write(atoms, data=atoms.info)
    with pytest.raises(MixedLevelsError, match=r"a\.db: row 2: its level of theory differs from that of .*row 1"):
        convert(tmp_path / "a.db", tmp_path / "a.h5")
    assert only_sources_in(tmp_path, "a.db")


# Public HDF5 data sets


def ani_file(path: Path, groups: dict[str, dict[str, Any]]) -> Path:
    with h5py.File(path, "w") as file:
        for group, datasets in groups.items():
            for name, values in datasets.items():
                file[f"{group}/{name}"] = values
    return path


def water(n: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "atomic_numbers": np.array([8, 1, 1], dtype=np.uint8),
        "coordinates": rng.normal(size=(n, 3, 3)).astype(np.float32),
        "wb97x_dz.energy": rng.normal(size=n) - 76,
        "wb97x_dz.forces": rng.normal(size=(n, 3, 3)).astype(np.float32),
        "ccsd(t)_cbs.energy": np.where(np.arange(n) % 2, np.nan, -76.5),
    }


def test_the_ani_1x_release_is_read_by_the_name_of_its_energy(tmp_path: Path) -> None:
    groups = {"H2O": water(5), "H2O2/deep": water(3, seed=1)}
    source = ani_file(tmp_path / "ani1x.h5", groups)
    with pytest.raises(ConversionError, match=r"several energies: name one of ccsd\(t\)_cbs\.energy, wb97x_dz\.energy"):
        convert(source, tmp_path / "x.h5")
    conversion = convert(source, tmp_path / "x.h5", Fields(energy="wb97x_dz.energy"))
    assert (conversion.n_frames, conversion.n_skipped) == (8, 0)
    shard = open_shard(tmp_path / "x.h5")
    assert shard.level == Level("external", "", {"energy": "wb97x_dz.energy"})
    every = [groups[name] for name in ("H2O", "H2O2/deep")]
    np.testing.assert_array_equal(shard.energy, np.concatenate([g["wb97x_dz.energy"] for g in every]) * HARTREE_eV)
    forces = np.concatenate([g["wb97x_dz.forces"] for g in every]).astype(float)
    np.testing.assert_array_equal(shard.forces.reshape(8, 3, 3), forces * HARTREE_eV)
    assert np.isnan(shard.stress).all()


def test_of_the_ani_1ccx_release_only_what_was_computed_is_taken(tmp_path: Path) -> None:
    source = ani_file(tmp_path / "ani1x.h5", {"H2O": water(5)})
    fields = Fields(energy="ccsd(t)_cbs.energy")
    with pytest.raises(
        ConversionError, match=r"ani1x\.h5: group /H2O, conformer 1: has no energy ccsd\(t\)_cbs\.energy"
    ):
        convert(source, tmp_path / "cc.h5", fields)
    level = Level("orca", "4", {"method": "CCSD(T)/CBS"})
    conversion = convert(source, tmp_path / "cc.h5", fields, level=level, skip_unlabeled=True)
    assert (conversion.n_frames, conversion.n_skipped) == (3, 2)
    shard = open_shard(tmp_path / "cc.h5")
    assert shard.level == level
    assert np.isnan(shard.forces).all()  # those of the other level of theory are not its forces


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_stored_forces_is_an_option(tmp_path: Path, sign: int) -> None:
    atoms = bulk("Al", cubic=True)
    atoms.rattle(0.1, seed=3)
    atoms.calc = EMT()
    group = {
        "species": np.array(["Al"] * 4, dtype=h5py.string_dtype()),
        "coordinates": atoms.positions[None],
        "cell": np.array(atoms.cell)[None],
        "energy": [atoms.get_potential_energy() / HARTREE_eV],
        "force": sign * atoms.get_forces()[None] / HARTREE_eV,
        "Jnames": [b"job-1"],
    }
    convert(ani_file(tmp_path / "al.h5", {"data-1": group}), tmp_path / "out.h5", Fields(force_sign=sign))
    frame, label = next(open_shard(tmp_path / "out.h5").rows())
    assert frame.pbc.all()
    np.testing.assert_allclose(label.forces, atoms.get_forces(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("symbols", [np.array([b"O", b"H", b"H"]), np.array([[8, 1, 1]] * 2), [8, 1, 1]])
@pytest.mark.parametrize("names", [("energies", "forces"), ("energy", "force")])
def test_every_spelling_of_the_layout_is_read(tmp_path: Path, symbols: Any, names: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    group = {
        "species": symbols,
        "coordinates": rng.normal(size=(2, 3, 3)),
        names[0]: rng.normal(size=(2, 1)),
        names[1]: rng.normal(size=(2, 3, 3)),
        "cell": np.eye(3) * 9,
        "pbc": np.array([True, False, True]),
    }
    convert(ani_file(tmp_path / "a.h5", {"g": group}), tmp_path / "out.h5", Fields(energy_unit="kcal/mol"))
    shard = open_shard(tmp_path / "out.h5")
    np.testing.assert_array_equal(shard.numbers, [8, 1, 1, 8, 1, 1])
    np.testing.assert_array_equal(shard.pbc, [[True, False, True]] * 2)
    np.testing.assert_array_equal(shard.energy, group[names[0]][:, 0] * KCAL_MOL_eV)
    np.testing.assert_array_equal(shard.forces.reshape(2, 3, 3), group[names[1]] * KCAL_MOL_eV)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"species": None}, "no species: expected one of species, atomic_numbers, numbers"),
        ({"species": np.array([b"Qq", b"H", b"H"])}, "species holds 'Qq': expected element symbols"),
        ({"species": [8, 1]}, r"species \(2,\): expected \(2, 3\)"),
        ({"coordinates": np.zeros((2, 3, 2))}, r"coordinates \(2, 3, 2\): expected \(n_conformers, n_atoms, 3\)"),
        ({"coordinates": np.full((2, 3, 3), np.nan)}, "conformer 0: frame: positions and cell must be finite"),
        ({"energies": np.zeros(3)}, r"energies \(3,\): expected \(2,\)"),
        ({"forces": np.zeros((2, 9))}, r"forces \(2, 9\): expected \(2, 3, 3\)"),
        (
            {"forces": np.array([np.zeros((3, 3)), np.diag([0, 0, np.nan])])},
            "conformer 1: label: forces must be finite",
        ),
    ],
)
def test_a_group_that_does_not_follow_the_layout_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {
        "species": [8, 1, 1],
        "coordinates": np.ones((2, 3, 3)),
        "energies": np.zeros(2),
        "forces": np.zeros((2, 3, 3)),
    }
    bad = {name: values for name, values in (good | change).items() if values is not None}
    source = ani_file(tmp_path / "a.h5", {"good": good, "z/bad": bad})
    with pytest.raises(ConversionError, match=rf"a\.h5: group /z/bad.*{message}"):
        convert(source, tmp_path / "out.h5")
    assert only_sources_in(tmp_path, "a.h5")


def test_units_are_checked_and_applied(tmp_path: Path) -> None:
    for arguments, message in (
        ({"energy_unit": "Ry"}, "energy_unit = 'Ry': must be one of eV, hartree, kcal/mol"),
        ({"length_unit": "nm"}, "length_unit = 'nm': must be one of A, bohr"),
        ({"force_unit": "hartree"}, "force_unit, energy = ''"),
        ({"force_sign": 0}, "force_sign = 0: must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Fields(**arguments)
    group = {
        "species": [1],
        "coordinates": np.ones((1, 1, 3)),
        "energies": [1.0],
        "forces": np.ones((1, 1, 3)),
        "stress": np.eye(3)[None],
        "cell": np.eye(3),
    }
    source = ani_file(tmp_path / "a.h5", {"g": group})
    convert(source, tmp_path / "bohr.h5", Fields(length_unit="bohr"))
    frame, label = next(open_shard(tmp_path / "bohr.h5").rows())
    np.testing.assert_array_equal(frame.positions, np.full((1, 3), BOHR_A))
    np.testing.assert_array_equal(frame.cell, np.eye(3) * BOHR_A)
    np.testing.assert_allclose(label.forces, np.full((1, 3), HARTREE_eV / BOHR_A), rtol=1e-15)
    np.testing.assert_allclose(label.stress, np.eye(3) * HARTREE_eV / BOHR_A**3, rtol=1e-15)
    convert(source, tmp_path / "mixed.h5", Fields(energy_unit="eV", force_unit="hartree/bohr"))
    frame, label = next(open_shard(tmp_path / "mixed.h5").rows())
    np.testing.assert_array_equal(frame.cell, np.eye(3))
    assert label.energy == 1.0
    np.testing.assert_allclose(label.forces, np.full((1, 3), HARTREE_eV / BOHR_A), rtol=1e-15)
