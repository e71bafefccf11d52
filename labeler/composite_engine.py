"""What is the CCSD(T)*/CBS energy of a molecule? A composite of single points with PySCF; energies only.

The recipe of J. S. Smith et al., doi:10.1038/s41467-019-10827-4, with canonical CCSD(T) in place of local pair natural
orbitals, so that its last term (tight less normal pair cutoffs) is zero:

    E = HF(CBS) + MP2(CBS) + [CCSD(T) - MP2](delta basis)

Each single point is an ingredient of the label, so that the energy can be put together again, or otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labeler.config import CompositeSettings
from labeler.engine import Answer, NotConverged
from labeler.pyscf_engine import SCF_RUNGS, find_pyscf, molecule_of, refuse_molecule, self_consistent
from shards.frame import Frame
from shards.label import Level
from shards.schema import HARTREE_eV

__all__ = ["CompositeEngine", "composite_energy"]

TRIPLE, QUADRUPLE = ("cc-pvtz", 3), ("cc-pvqz", 4)
HF_FIT, MP2_FIT = "{}-jkfit", "{}-ri"


class CompositeEngine:
    n_rungs = SCF_RUNGS

    def __init__(self, settings: CompositeSettings, memory_GB: float) -> None:
        self._settings = settings
        self._memory_GB = memory_GB

    def level(self, elements: Sequence[str]) -> Level:
        names = [TRIPLE[0], QUADRUPLE[0]]
        fits = [fit.format(name) for fit in (HF_FIT, MP2_FIT) for name in names]
        version = find_pyscf("composite", [*names, *fits, self._settings.delta_basis], elements)
        facts = {
            "extrapolation": [*names, *fits],
            "correlated": "all but chemical core",
            "reference": "restricted without unpaired electrons, else unrestricted",
        }
        return Level("pyscf composite", version, self._settings.model_dump(mode="json") | facts)

    def refuse(self, frame: Frame) -> str:
        return refuse_molecule(frame)

    def compute(self, frame: Frame, rung: int) -> Answer:
        ingredients = self._delta(frame, rung)
        for short, (basis, _) in (("tz", TRIPLE), ("qz", QUADRUPLE)):
            ingredients |= self._fitted(frame, basis, short, rung)
        energy = composite_energy(ingredients, self._settings)
        return Answer(energy, None, None, ingredients=ingredients)

    def _delta(self, frame: Frame, rung: int) -> dict[str, float]:
        """HF, and correlation energies of MP2, CCSD and the triples, without density fitting, eV."""
        from pyscf import cc

        field = self._hartree_fock(frame, self._settings.delta_basis, "", rung)
        coupled = cc.CCSD(field, frozen=_n_core(field.mol))
        coupled.conv_tol, coupled.max_cycle = self._settings.ccsd_tolerance_Ha, 50
        if rung:
            coupled.max_cycle, coupled.diis_space, coupled.iterative_damping = 100, 12, 0.6
        coupled.kernel()
        if not coupled.converged:
            raise NotConverged(f"CCSD not converged in {coupled.max_cycle} steps on rung {rung}")
        parts = {"hf": field.e_tot, "mp2": coupled.emp2, "ccsd": coupled.e_corr, "triples": coupled.ccsd_t()}
        return {f"{name}_delta": float(value) * HARTREE_eV for name, value in parts.items()}

    def _fitted(self, frame: Frame, basis: str, short: str, rung: int) -> dict[str, float]:
        """HF and the correlation energy of MP2 with density fitting, eV."""
        from pyscf import df, mp

        field = self._hartree_fock(frame, basis, HF_FIT.format(basis), rung)
        perturbation = mp.MP2(field, frozen=_n_core(field.mol))
        # Otherwise it would take over the set that is made for Coulomb and exchange.
        perturbation.with_df = df.DF(field.mol, auxbasis=MP2_FIT.format(basis))
        perturbation.kernel()
        return {
            f"hf_{short}": float(field.e_tot) * HARTREE_eV,
            f"mp2_{short}": float(perturbation.e_corr) * HARTREE_eV,
        }

    def _hartree_fock(self, frame: Frame, basis: str, fit: str, rung: int) -> Any:
        from pyscf import scf

        mol = molecule_of(frame, basis, False, self._memory_GB)
        field = scf.UHF(mol) if frame.spin else scf.RHF(mol)
        field = field.density_fit(auxbasis=fit) if fit else field
        converged = self_consistent(field, self._settings.scf_tolerance_Ha, rung)
        return converged.undo_soscf() if hasattr(converged, "undo_soscf") else converged


def composite_energy(ingredients: Mapping[str, float], settings: CompositeSettings) -> float:
    """Put the ingredients of a label together: eV in, eV out.

    HF(X) = HF(CBS) + A exp(-alpha sqrt(X)) and MP2(X) = MP2(CBS) + B X^-beta for X = 3, 4: Eqs. of F. Neese, E. F.
    Valeev, doi:10.1021/ct100396y.
    """
    (_, x), (_, y) = TRIPLE, QUADRUPLE
    hartree_fock = _limit(
        ingredients["hf_tz"],
        ingredients["hf_qz"],
        math.exp(-settings.hf_alpha * math.sqrt(x)),
        math.exp(-settings.hf_alpha * math.sqrt(y)),
    )
    mp2 = _limit(ingredients["mp2_tz"], ingredients["mp2_qz"], x**-settings.mp2_beta, y**-settings.mp2_beta)
    delta = ingredients["ccsd_delta"] + ingredients["triples_delta"] - ingredients["mp2_delta"]
    return hartree_fock + mp2 + delta


def _limit(smaller: float, larger: float, error_smaller: float, error_larger: float) -> float:
    """Where two energies go whose basis set errors are in the ratio of the last two arguments."""
    return (error_smaller * larger - error_larger * smaller) / (error_smaller - error_larger)


def _n_core(mol: Any) -> int:
    from pyscf.data import elements

    return int(elements.chemcore(mol))
