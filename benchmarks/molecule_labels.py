"""Are labels of molecules what PySCF itself says? Six molecules at the levels of ANI-1x and ANI-1ccx.

python benchmarks/molecule_labels.py [--delta-basis cc-pvdz] [molecule ...]

For each molecule: forces at wB97X/6-31G* against central differences of the labeler's own energies and against PySCF
called directly; the composite's ingredients against PySCF called directly, by other classes where there are any. Ends
with 1 when a figure is out of bounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from pyscf import cc, dft, gto, mp, scf
from pyscf.data import elements
from pyscf.mp import dfmp2_native

from labeler.config import CompositeSettings, LabelerSettings
from labeler.stage import label
from shards import Frame, Label, open_shard, write_frames
from shards.schema import BOHR_A, HARTREE_eV

SIX = ("H2O", "CH4", "NH3", "CH3OH", "H2CO", "C2H4")
STEP_A = 0.005
# Central differences of this step leave step^2 / 6 times the third derivative, of some 100 eV/A^3.
WORST_FORCE_eV_A, WORST_ENERGY_eV = 2e-3, 1e-4


def distorted(name: str) -> Atoms:
    """Off its minimum, so that forces are large."""
    atoms = molecule(name)
    atoms.rattle(0.05, seed=1)
    return atoms


def labels_of(frames: list[Frame], settings: LabelerSettings, folder: Path) -> list[Label]:
    write_frames(folder / "frames.h5", frames)
    outcome = label(
        folder / "frames.h5", range(len(frames)), settings, "HCNO", folder / settings.engine, folder / "scratch"
    )
    assert not outcome.failure, outcome.failure
    assert not outcome.facts["failures"], outcome.facts["failures"]
    return [open_shard(folder / settings.engine / f"{frame.id}.h5").label(0) for frame in frames]


def check_forces(atoms: Atoms, folder: Path) -> tuple[float, float, Label]:
    """Worst component against central differences of the labels' energies, and against PySCF itself, eV/A."""
    moved = []
    for atom in range(len(atoms)):
        for axis in range(3):
            for sign in (1, -1):
                positions = atoms.positions.copy()
                positions[atom, axis] += sign * STEP_A
                moved.append(Frame(atoms.numbers, positions))
    settings = LabelerSettings(engine="pyscf")
    first, *rest = labels_of([Frame(atoms.numbers, atoms.positions), *moved], settings, folder)
    energies = np.array([each.energy for each in rest]).reshape(-1, 3, 2)
    numerical = (energies[:, :, 1] - energies[:, :, 0]) / (2 * STEP_A)
    field = dft.RKS(of(atoms, "6-31g*", cart=True)).set(xc="wb97x", conv_tol=1e-10).run()
    gradient = field.nuc_grad_method().set(grid_response=True).kernel()
    direct = -gradient * HARTREE_eV / BOHR_A
    assert abs(first.energy - field.e_tot * HARTREE_eV) < WORST_ENERGY_eV
    return float(np.abs(first.forces - numerical).max()), float(np.abs(first.forces - direct).max()), first


def check_composite(atoms: Atoms, delta_basis: str, folder: Path) -> tuple[float, Label]:
    """Worst ingredient against PySCF itself, eV."""
    composite = CompositeSettings(delta_basis=delta_basis)
    (found,) = labels_of(
        [Frame(atoms.numbers, atoms.positions)], LabelerSettings(engine="composite", composite=composite), folder
    )
    expected = {}
    for short, basis in (("tz", "cc-pvtz"), ("qz", "cc-pvqz")):
        mol = of(atoms, basis)
        field = scf.RHF(mol).density_fit(auxbasis=f"{basis}-jkfit").run(conv_tol=1e-10)
        fitted = dfmp2_native.DFMP2(field, frozen=elements.chemcore(mol), auxbasis=f"{basis}-ri").run()
        expected |= {f"hf_{short}": field.e_tot, f"mp2_{short}": fitted.e_corr}
    mol = of(atoms, delta_basis)
    field = scf.RHF(mol).run(conv_tol=1e-10)
    core = elements.chemcore(mol)
    coupled = cc.rccsd.RCCSD(field, frozen=core).run(conv_tol=1e-9)
    expected |= {
        "hf_delta": field.e_tot,
        "mp2_delta": mp.MP2(field, frozen=core).run().e_corr,
        "ccsd_delta": coupled.e_corr,
        "triples_delta": coupled.ccsd_t(),
    }
    assert set(expected) == set(found.ingredients)
    return max(abs(found.ingredients[name] - value * HARTREE_eV) for name, value in expected.items()), found


def of(atoms: Atoms, basis: str, cart: bool = False) -> gto.Mole:
    rows = list(zip(atoms.get_chemical_symbols(), atoms.positions, strict=True))
    return gto.M(atom=rows, basis=basis, cart=cart, verbose=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("molecules", nargs="*", default=SIX)
    parser.add_argument("--delta-basis", default="cc-pvtz")
    options = parser.parse_args()
    print("molecule   wB97X energy (Ha)   s   forces off: differences, PySCF (eV/A)   CCSD(T)*/CBS (Ha)   s   off (eV)")
    sound = True
    for name in options.molecules:
        atoms = distorted(name)
        with tempfile.TemporaryDirectory() as folder:
            by_steps, by_pyscf, cheap = check_forces(atoms, Path(folder))
            off, dear = check_composite(atoms, options.delta_basis, Path(folder))
        print(
            f"{name:8} {cheap.energy / HARTREE_eV:17.6f} {cheap.seconds:7.1f} {by_steps:12.1e} {by_pyscf:12.1e}"
            f" {dear.energy / HARTREE_eV:24.6f} {dear.seconds:7.1f} {off:10.1e}",
            flush=True,
        )
        sound = sound and max(by_steps, by_pyscf) < WORST_FORCE_eV_A and off < WORST_ENERGY_eV
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
