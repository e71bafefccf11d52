"""How is PySCF asked for a molecule's density-functional energy and forces? All electrons, Gaussian orbitals, no cell.

PySCF raises nothing when it does not converge; here every iteration that gave up is a NotConverged.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from labeler.config import PyscfSettings
from labeler.engine import Answer, MissingEngine, NotConverged
from shards.frame import Frame
from shards.label import Level
from shards.schema import BOHR_A, HARTREE_eV
from shards.settings import SettingsError

__all__ = ["SCF_RUNGS", "PyscfEngine", "find_pyscf", "molecule_of", "refuse_molecule", "self_consistent"]

# Ways to reach the same converged number: DIIS; DIIS with the virtual orbitals pushed up; second-order steps.
SCF_RUNGS = 3


class PyscfEngine:
    """Energy and forces of one functional in one basis; unrestricted where the frame has unpaired electrons."""

    n_rungs = SCF_RUNGS

    def __init__(self, settings: PyscfSettings, memory_GB: float) -> None:
        self._settings = settings
        self._memory_GB = memory_GB

    def level(self, elements: Sequence[str]) -> Level:
        version = find_pyscf("pyscf", [self._settings.basis], elements)
        from pyscf.dft import libxc

        try:
            libxc.parse_xc(self._settings.functional)
        except (KeyError, ValueError) as error:
            raise SettingsError(f"labeler.pyscf.functional = {self._settings.functional!r}: {error}") from error
        facts = {"grid_response": True, "reference": "restricted without unpaired electrons, else unrestricted"}
        return Level("pyscf", version, self._settings.model_dump(mode="json") | facts | {"libxc": libxc.__version__})

    def refuse(self, frame: Frame) -> str:
        return refuse_molecule(frame)

    def compute(self, frame: Frame, rung: int) -> Answer:
        from pyscf import dft

        level = self._settings
        mol = molecule_of(frame, level.basis, level.cartesian, self._memory_GB)
        field = dft.UKS(mol) if frame.spin else dft.RKS(mol)
        field.xc, field.grids.level = level.functional, level.grid_level
        if level.density_fitting:
            field = field.density_fit()
        field = self_consistent(field, level.scf_tolerance_Ha, rung)
        gradient = field.nuc_grad_method()
        # The grid moves with the atoms: without this term forces are not the derivative of the energy (1e-5 Ha/bohr).
        gradient.grid_response = True
        forces = -np.array(gradient.kernel()) * (HARTREE_eV / BOHR_A)
        return Answer(float(field.e_tot) * HARTREE_eV, forces, None, scf_steps=int(getattr(field, "cycles", 0)))


def find_pyscf(engine: str, bases: Sequence[str], elements: Sequence[str]) -> str:
    """The installed version of PySCF, after looking that it has these basis sets for these elements.

    Raises:
        MissingEngine
    """
    if importlib.util.find_spec("pyscf") is None:
        raise MissingEngine(f'labeler.engine = "{engine}": PySCF is not installed; pip install "smelt[molecules]"')
    from pyscf.gto import basis as library

    for name in bases:
        for element in elements:
            try:
                library.load(name, element)
            except Exception as error:  # its own class, KeyError or RuntimeError, by the kind of name
                raise MissingEngine(
                    f'labeler.engine = "{engine}": PySCF has no basis {name!r} for {element}; correct the name, or'
                    " leave the element out"
                ) from error
    return metadata.version("pyscf")


def refuse_molecule(frame: Frame) -> str:
    """Why no molecular code can treat the frame; empty when it can."""
    if frame.pbc.any():
        return f"pbc {frame.pbc.tolist()}: molecules have no periodic axis"
    n_electrons = int(frame.numbers.sum()) - frame.charge
    if n_electrons < 1 or not 0 <= frame.spin <= n_electrons or (n_electrons - frame.spin) % 2:
        return f"{n_electrons} electrons (charge {frame.charge}) cannot leave {frame.spin} unpaired"
    return ""


def molecule_of(frame: Frame, basis: str, cartesian: bool, memory_GB: float) -> Any:  # PySCF has no types
    """The frame as PySCF's molecule, which keeps its scratch files in the current folder.

    memory_GB: of the whole process; 0: PySCF's own default.
    """
    from pyscf import gto, lib

    # A killed process removes nothing: what it leaves must lie in its own folder.
    lib.param.TMPDIR = os.getcwd()
    positions_bohr = frame.positions / BOHR_A
    mol = gto.Mole(
        atom=[(int(number), tuple(row)) for number, row in zip(frame.numbers, positions_bohr, strict=True)],
        unit="Bohr",
        basis=basis,
        cart=cartesian,
        charge=frame.charge,
        spin=frame.spin,
        verbose=3,
    )
    if memory_GB:
        # Half: the limit is one of address space, of which the libraries alone take more than a GB.
        mol.max_memory = 500 * memory_GB
    return mol.build()


def self_consistent(field: Any, tolerance_Ha: float, rung: int) -> Any:
    """Iterate a mean field to self-consistency in the way of this rung.

    Raises:
        NotConverged
    """
    field.conv_tol, field.max_cycle = tolerance_Ha, 200 if rung == 1 else 50
    if rung == 1:
        field.level_shift = 0.3
    if rung == 2:
        field = field.newton()
    field.kernel()
    if not field.converged:
        raise NotConverged(f"SCF not converged in {field.max_cycle} steps on rung {rung}")
    return field
