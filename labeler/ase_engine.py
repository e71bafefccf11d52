"""How does any ASE calculator become an engine? EMT and every calculator that the config gives by dotted name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError, SCFError

from labeler.engine import Answer, MissingEngine, NotConverged
from shards.frame import Frame
from shards.label import Level

__all__ = ["AseEngine", "answer_of", "atoms_of"]


class AseEngine:
    """Run one ASE calculator class, a fresh instance for each frame."""

    n_rungs = 1

    def __init__(self, name: str, dotted: str, arguments: Mapping[str, Any]) -> None:
        self._name = name
        self._dotted = dotted
        self._arguments = dict(arguments)

    def level(self, elements: Sequence[str]) -> Level:
        calculator = self._calculator_class()
        files = {key: Path(value) for key, value in self._arguments.items() if _is_file(value)}
        return Level(
            engine=self._name,
            version=_version_of(calculator),
            settings={key: files[key].name if key in files else value for key, value in self._arguments.items()},
            data={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()},
        )

    def refuse(self, frame: Frame) -> str:
        if frame.charge or frame.spin:
            return f"charge {frame.charge} and spin {frame.spin}: {self._name} is told of neither"
        return ""

    def compute(self, frame: Frame, rung: int) -> Answer:
        calculator = self._calculator_class()(**self._arguments)
        atoms = atoms_of(frame)
        atoms.calc = calculator
        try:
            answer = answer_of(atoms)
        except SCFError as error:
            raise NotConverged(str(error)) from error
        # Where a code goes on without convergence (VASP), this attribute is all that tells.
        if getattr(calculator, "converged", None) is False:
            raise NotConverged(f"{self._name}: its calculator says converged = False")
        return answer

    def _calculator_class(self) -> Any:
        module, _, name = self._dotted.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise MissingEngine(
                f"labeler.engine = {self._dotted!r}: {error}; install the package that holds it, or correct the name"
            ) from error


def atoms_of(frame: Frame) -> Any:  # ASE has no types for what is asked of it
    return Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc)


def answer_of(atoms: Any) -> Answer:
    """Ask the calculator of `atoms` for everything it has."""
    energy, extrapolated = float(atoms.get_potential_energy()), float("nan")
    with contextlib.suppress(PropertyNotImplementedError):  # no smearing: there is only one energy
        # The forces are the gradient of this one; with smearing the plain energy is extrapolated to zero width.
        energy, extrapolated = float(atoms.get_potential_energy(force_consistent=True)), energy
    try:
        forces = np.array(atoms.get_forces())
    except PropertyNotImplementedError:
        forces = None
    return Answer(energy, forces, _stress_of(atoms), extrapolated)


def _stress_of(atoms: Any) -> Any:
    if not atoms.pbc.all():
        return None
    try:
        return np.array(atoms.get_stress(voigt=False))
    except PropertyNotImplementedError:
        return None


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_file()


def _version_of(calculator: Any) -> str:
    """The version of the package that holds it; of a file that belongs to none, the digest of its content."""
    package = calculator.__module__.partition(".")[0]
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"{package} {metadata.version(package)}"
    source = Path(importlib.import_module(calculator.__module__).__file__ or "")
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]
