"""How does ASE talk to a committee?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from potential.committee import Committee
from potential.neighbours import SkinList
from potential.structures import Structures
from shards.frame import Frame

__all__ = ["CommitteeCalculator"]


class CommitteeCalculator(Calculator):
    """Offer a committee as an ASE calculator.

    Beside energy, free_energy, forces and stress (means over members, ASE's units and signs):
    energy_members (M,) and energy_spread, eV; forces_members (M, n, 3) and force_spread (n, 3), eV/A. Spreads are
    population standard deviations over members, that of the energy divided by the square root of the number of atoms.

    The neighbour list is kept between calls while no atom has moved too far. Stress needs a cell with a volume.
    """

    implemented_properties = [  # noqa: RUF012  # as ASE declares it
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energy_members",
        "forces_members",
        "energy_spread",
        "force_spread",
    ]

    def __init__(self, committee: Committee, *, dtype: str = "float64", skin_A: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if dtype not in ("float32", "float64"):
            raise ValueError(f"calculator dtype = {dtype!r}: must be float32 or float64")
        self.committee = copy.deepcopy(committee).to(getattr(torch, dtype))
        self._pairs = SkinList(committee.cutoff_A, skin_A)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Raises UnknownElementError for an element the committee has no network for."""
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        assert self.atoms is not None
        frame = Frame(self.atoms.numbers, self.atoms.positions, self.atoms.cell.array, self.atoms.pbc)
        structures = Structures.from_frames([frame], self.committee.elements, device=self.committee.device)
        members = not {"forces_members", "force_spread"}.isdisjoint(properties)
        stress = frame.volume_A3 > 0
        evaluation = self.committee.evaluate(
            structures, self._pairs.update(structures), forces="members" if members else "mean", stress=stress
        )
        results: dict[str, Any] = {
            "energy": float(evaluation.energy[0]),
            "free_energy": float(evaluation.energy[0]),
            "forces": _numpy(evaluation.forces_mean),
            "energy_members": _numpy(evaluation.energy_members[:, 0]),
            "energy_spread": float(evaluation.energy_spread()[0]),
        }
        if members:
            results["forces_members"] = _numpy(evaluation.forces_members)
            results["force_spread"] = _numpy(evaluation.force_spread())
        if evaluation.stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(_numpy(evaluation.stress[0]))
        self.results = results


def _numpy(tensor: torch.Tensor | None) -> Any:
    assert tensor is not None
    return tensor.double().cpu().numpy()
