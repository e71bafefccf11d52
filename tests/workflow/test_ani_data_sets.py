"""Do files in the layouts of the public ANI data sets become a committee with known errors, by commands alone?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT

from campaign import cli
from shards import open_shard
from shards.schema import HARTREE_eV

CONFIG = """
[campaign]
name = "ani"
elements = ["H", "C", "N", "O"]
[potential]
radial_cutoff_A = 4.0
angular_cutoff_A = 3.0
n_radial = 8
n_angular_radial = 2
n_angular = 2
hidden = [16, 8]
n_members = 2
[trainer]
ranks = 1
max_epochs = 60
learning_rate = 0.01
max_force_eV_per_A = 1000
energy_outlier_sigma = 20
"""
N_CONFORMERS = 16


def conformers(name: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Atomic numbers, and of each conformer coordinates, A, energy, hartree, and forces, hartree/A, by EMT."""
    rng = np.random.default_rng(seed)
    atoms, rows = molecule(name), []
    for _ in range(N_CONFORMERS):
        moved = atoms.copy()
        moved.positions += rng.normal(0, 0.05, moved.positions.shape)
        moved.calc = EMT()
        rows.append((moved.positions, moved.get_potential_energy() / HARTREE_eV, moved.get_forces() / HARTREE_eV))
    return atoms.numbers, *map(np.array, zip(*rows, strict=True))


def ani_1x(path: Path) -> Path:
    """One group per formula; the third conformer of each was not computed, and of the fifth there are no forces."""
    with h5py.File(path, "w") as file:
        for seed, name in enumerate(("CH4", "H2O", "NH3", "CH3OH")):
            numbers, coordinates, energy, forces = conformers(name, seed)
            energy[2], forces[[2, 4]] = np.nan, np.nan
            group = file.create_group(name)
            group["atomic_numbers"] = numbers.astype(np.uint8)
            group["coordinates"] = coordinates.astype(np.float32)
            group["wb97x_dz.energy"], group["wb97x_dz.forces"] = energy, forces.astype(np.float32)
            group["ccsd(t)_cbs.energy"] = np.full(N_CONFORMERS, np.nan)
    return path


def ani_1(path: Path) -> Path:
    """The older layout: symbols, energies, no forces, groups in groups."""
    with h5py.File(path, "w") as file:
        for seed, name in enumerate(("CH4", "H2O", "NH3", "CH3OH")):
            _, coordinates, energy, _ = conformers(name, seed)
            group = file.create_group(f"gdb11_s0{seed}/gdb11_s0{seed}-0")
            group["species"] = np.array(molecule(name).get_chemical_symbols(), dtype="S")
            group["coordinates"], group["energies"] = coordinates.astype(np.float32), energy
    return path


@pytest.fixture
def smelt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "ani.toml").write_text(CONFIG)

    def run(*arguments: object) -> str:
        code = cli._run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def train_and_compare(smelt, folder: Path) -> dict[str, Any]:
    smelt("train", folder / "ani.toml", folder / "labels.h5", folder / "model")
    return json.loads(smelt("evaluate", folder / "model/model.safetensors", folder / "labels.h5"))["facts"]


def test_a_file_of_the_ani_1x_layout_is_converted_trained_on_and_compared_with(smelt, tmp_path):
    source = ani_1x(tmp_path / "ani1x.h5")
    said = smelt("convert", source, tmp_path / "labels.h5", "--energy", "wb97x_dz.energy", "--skip-unlabeled")
    assert said.startswith("60 frames to")
    assert said.rstrip().endswith("4 without an energy left out")
    shard = open_shard(tmp_path / "labels.h5")
    assert not shard.cell.any()
    assert sum(not label.has_forces for _, label in shard.rows()) == 4
    facts = train_and_compare(smelt, tmp_path)
    assert facts["n_frames"] == 60
    within = [shard.energy[start : start + 15].std() for start in range(0, 60, 15)]
    assert facts["energy_mae_eV_per_atom"] * 5 < np.mean(within)  # of molecules of 3 to 6 atoms
    assert facts["force_rmse_eV_per_A"] < 0.7 * np.sqrt(np.nanmean(shard.forces**2))
    assert "stress_rmse_eV_per_A3" not in facts


def test_a_file_of_the_older_layout_is_trained_on_by_its_energies_alone(smelt, tmp_path):
    smelt("convert", ani_1(tmp_path / "ani1.h5"), tmp_path / "labels.h5")
    facts = train_and_compare(smelt, tmp_path)
    assert facts["n_frames"] == 64
    assert np.isfinite(facts["energy_rmse_eV_per_atom"])
    assert "force_rmse_eV_per_A" not in facts
