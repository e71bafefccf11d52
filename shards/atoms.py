"""How do frames and labels travel through ASE? As Atoms whose calculator remembers the results.

What ASE has no place for (charge, unpaired electrons, provenance, level of theory) stands in `atoms.info`.
Constraints, velocities, tags and initial moments are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shards.frame import Frame, Origin
from shards.label import Label, Level
from shards.schema import BOHR_A, HARTREE_eV, KCAL_MOL_eV

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["USUAL", "ConversionError", "Fields", "from_atoms", "label_from_atoms", "level_from_atoms", "to_atoms"]

_ENERGY_UNITS = {"eV": 1.0, "hartree": HARTREE_eV, "kcal/mol": KCAL_MOL_eV}
_LENGTH_UNITS = {"A": 1.0, "bohr": BOHR_A}
_OURS = "smelt"  # key of atoms.info under which provenance stands
_VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))  # rows and columns of xx yy zz yz xz xy
_FACTS = ("energy_extrapolated", "seconds", "host", "scf_steps")  # of a label, and unknown to ASE


class ConversionError(ValueError):
    """A source that cannot be converted; the message names the file, the frame in it, and what to do."""


@dataclass(frozen=True)
class Fields:
    """How a source names and measures its labels.

    energy, forces, stress: name of the dataset, column or key. Empty: the usual names, for forces and stress those
    that belong to the energy (`REF_energy`: `REF_forces`), never those of another level of theory.
    energy_unit: eV | hartree | kcal/mol; empty: hartree in the ANI layout, otherwise eV.
    length_unit: A | bohr, of coordinates and cells. force_unit: energy/length, for example hartree/bohr; empty: made
    of the two. The unit of stress is always energy_unit / length_unit^3, tension positive.
    force_sign: -1 where the source keeps the gradient +dE/dx under the name of force, as one published aluminium
    data set does; check it on two neighbouring frames.

    Raises:
        ValueError: an unknown unit or sign.
    """

    energy: str = ""
    forces: str = ""
    stress: str = ""
    energy_unit: str = ""
    length_unit: str = "A"
    force_unit: str = ""
    force_sign: int = 1

    def __post_init__(self) -> None:
        if self.force_sign not in (1, -1):
            raise ValueError(f"force_sign = {self.force_sign}: must be 1 (force) or -1 (gradient)")
        energy_unit, _, length_unit = self._force_unit.rpartition("/")
        for name, value, known in (
            ("energy_unit", self._energy_unit, _ENERGY_UNITS),
            ("length_unit", self.length_unit, _LENGTH_UNITS),
            ("force_unit, energy", energy_unit, _ENERGY_UNITS),
            ("force_unit, length", length_unit, _LENGTH_UNITS),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(known)}")

    @property
    def _energy_unit(self) -> str:
        return self.energy_unit or "eV"

    @property
    def _force_unit(self) -> str:
        return self.force_unit or f"{self._energy_unit}/{self.length_unit}"

    @property
    def length_A(self) -> float:
        """Factor that brings lengths of the source to A."""
        return _LENGTH_UNITS[self.length_unit]

    @property
    def energy_eV(self) -> float:
        """Factor that brings energies of the source to eV."""
        return _ENERGY_UNITS[self._energy_unit]

    @property
    def force_eV_A(self) -> float:
        """Factor, sign included, that brings forces of the source to eV/A."""
        energy_unit, _, length_unit = self._force_unit.rpartition("/")
        return self.force_sign * _ENERGY_UNITS[energy_unit] / _LENGTH_UNITS[length_unit]

    @property
    def stress_eV_A3(self) -> float:
        """Factor that brings stresses of the source to eV/A^3."""
        return self.energy_eV / self.length_A**3

    def forces_names(self, energy: str) -> tuple[str, ...]:
        """Where the forces that belong to the energy of this name may stand."""
        return (self.forces,) if self.forces else (f"{_stem(energy)}forces", f"{_stem(energy)}force")

    def stress_names(self, energy: str) -> tuple[str, ...]:
        """Where the stress that belongs to the energy of this name may stand."""
        return (self.stress,) if self.stress else (f"{_stem(energy)}stress",)


USUAL: Final = Fields()  # names and units as ASE has them


def _stem(energy: str) -> str:
    """`wb97x_dz.energy` -> `wb97x_dz.`"""
    for ending in ("free_energy", "energies", "energy"):
        if energy.endswith(ending):
            return energy.removesuffix(ending)
    return ""


def to_atoms(frame: Frame, label: Label | None = None, level: Level | None = None) -> Atoms:
    """Make Atoms of a frame; with a label they carry a calculator that remembers it.

    Its `free_energy` is the label's energy; its `energy` is the one at zero smearing where there is one, as is
    ASE's custom. A piece that was not computed is left out.
    """
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    ours: dict[str, Any] = {"frame": frame.id, "origin": _without_nan(asdict(frame.origin))}
    info = {"charge": frame.charge, "spin": frame.spin, _OURS: ours}
    atoms = Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc, info=info)
    if label is None:
        return atoms
    extrapolated = label.energy_extrapolated
    results: dict[str, Any] = {"energy": label.energy if np.isnan(extrapolated) else extrapolated}
    results["free_energy"] = label.energy
    if label.has_forces:
        results["forces"] = label.forces
    if label.has_stress:
        results["stress"] = label.stress[_VOIGT]
    atoms.calc = SinglePointCalculator(atoms, **results)
    ours["energy"] = label.energy
    ours["label"] = _without_nan({name: getattr(label, name) for name in _FACTS})
    if level is not None:
        ours["level"] = asdict(level)
    return atoms


def from_atoms(atoms: Atoms) -> Frame:
    """Make a frame of Atoms; charge and unpaired electrons are read from info["charge"] and info["spin"].

    An origin that `to_atoms` left there is taken over unless the atoms were changed since.

    Raises:
        ValueError: Atoms that are no frame (empty, not finite, a charge that is not whole).
    """
    frame = Frame(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=np.asarray(atoms.cell),
        pbc=atoms.pbc,
        charge=_whole(atoms, "charge"),
        spin=_whole(atoms, "spin"),
    )
    ours = _ours(atoms)
    if ours.get("frame") != frame.id:
        return frame
    known = {field.name for field in fields(Origin)}
    return replace(frame, origin=Origin(**{name: value for name, value in ours["origin"].items() if name in known}))


def label_from_atoms(atoms: Atoms, fields: Fields = USUAL) -> Label | None:
    """Read the label that Atoms carry, without any calculation; None when there is no energy.

    Results of the calculator are looked for first, then `atoms.info` and `atoms.arrays`. A free energy goes before
    an energy, because forces are its gradient.

    Raises:
        ValueError: results whose shapes do not fit, or that are not finite.
    """
    energy = _find(atoms, (fields.energy,) if fields.energy else ("free_energy", "energy"))
    if energy is None:
        return None
    key = fields.energy or "energy"
    forces = _find(atoms, fields.forces_names(key), required=bool(fields.forces))
    stress = _find(atoms, fields.stress_names(key), required=bool(fields.stress))
    ours = _ours(atoms)
    facts = ours["label"] if ours.get("energy") == energy else {}
    facts = {name: value for name, value in facts.items() if name in _FACTS}
    extrapolated = None if fields.energy or facts else _find(atoms, ("energy",))
    if extrapolated is not None and extrapolated != energy:
        facts["energy_extrapolated"] = float(extrapolated) * fields.energy_eV
    return Label(
        energy=float(energy) * fields.energy_eV,
        forces=np.full((len(atoms), 3), np.nan) if forces is None else np.asarray(forces, float) * fields.force_eV_A,
        stress=np.full((3, 3), np.nan) if stress is None else _full_stress(stress) * fields.stress_eV_A3,
        **facts,
    )


def level_from_atoms(atoms: Atoms) -> Level | None:
    """Read the level of theory that `to_atoms` left in the Atoms, unless they were calculated anew since."""
    ours = _ours(atoms)
    energy = _find(atoms, ("free_energy", "energy"))
    return Level(**ours["level"]) if "level" in ours and ours.get("energy") == energy else None


def _ours(atoms: Atoms) -> Mapping[str, Any]:
    """What `to_atoms` left; with the frame and the energy that it belongs to."""
    table = atoms.info.get(_OURS)
    return table if isinstance(table, Mapping) else {}


def _without_nan(table: dict[str, Any]) -> dict[str, Any]:
    """Leave out NaN, which JSON cannot say and every such field has as its default."""
    return {name: value for name, value in table.items() if value == value}


def _whole(atoms: Atoms, name: str) -> int:
    value = atoms.info.get(name, 0)
    if int(value) != value:
        raise ValueError(f"info[{name!r}] = {value!r}: must be a whole number")
    return int(value)


def _find(atoms: Atoms, names: tuple[str, ...], required: bool = False) -> Any:
    """The first of `names` that the calculator, info or arrays know, or None."""
    for name in names:
        for value in (_calculated(atoms, name), atoms.info.get(name), atoms.arrays.get(name)):
            if value is not None:
                return value
    if required:
        raise ValueError(f"no {names[0]}: has {', '.join([*atoms.info, *atoms.arrays])}")
    return None


def _calculated(atoms: Atoms, name: str) -> Any:
    from ase.calculators.calculator import PropertyNotImplementedError, all_properties

    if atoms.calc is None or name not in all_properties:
        return None
    try:
        return atoms.calc.get_property(name, atoms, allow_calculation=False)
    except PropertyNotImplementedError:
        return None


def _full_stress(stress: Any) -> NDArray[np.float64]:
    """(6,) in Voigt order, (9,) or (3, 3) to (3, 3)."""
    array = np.asarray(stress, dtype=np.float64)
    if array.shape == (6,):
        return array[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]
    if array.size == 9:
        return array.reshape(3, 3)
    raise ValueError(f"stress {array.shape}: expected (6,), (9,) or (3, 3)")
