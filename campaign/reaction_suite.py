"""Which reactions shall a committee get right? Those of a user's file, by energy, and by the barrier of a path.

The file is TOML; geometries are files that ASE reads, such as .xyz, seen from its folder:

    [[reaction]]
    name = "hydrogenation of formaldehyde"
    coefficients = { "ch2o.xyz" = -1, "h2.xyz" = -1, "ch3oh.xyz" = 1 }
    energy_kcal_mol = -22.1           # published; without it the labeler's level is asked

    [[barrier]]
    name = "HCN to HNC"
    ends = ["hcn.xyz", "hnc.xyz"]     # the same atoms in the same order
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from ase import Atoms
from ase.build import minimize_rotation_and_translation
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols
from ase.io import read
from ase.mep.neb import NEB
from ase.optimize import BFGS, FIRE
from numpy.typing import NDArray
from pydantic import Field

from campaign.molecule_suite import Probe
from shards.atoms import from_atoms
from shards.frame import Frame
from shards.schema import KCAL_MOL_eV
from shards.settings import Settings, SettingsError, parse_settings, read_toml

__all__ = ["TESTS", "barrier_probes", "file_barriers", "reaction_probes"]

TESTS = ("listed reaction", "path", "barrier")

Floats = NDArray[np.float64]

N_IMAGES = 9
RELAX_STEPS, PATH_STEPS = 200, 300
LARGEST_FORCE_eV_A = 0.05


class Reaction(Settings):
    name: str
    coefficients: Annotated[dict[str, float], Field(min_length=2)]
    energy_kcal_mol: float | None = None


class Barrier(Settings):
    name: str
    ends: tuple[str, str]


class ReactionFile(Settings):
    reaction: tuple[Reaction, ...] = ()
    barrier: tuple[Barrier, ...] = ()


def reaction_probes(path: Path) -> Iterator[Probe]:
    """The reactions of a file.

    Raises:
        SettingsError: a file that cannot be used, or a reaction whose sides differ in atoms or charge.
    """
    for reaction in _parse(path).reaction:
        frames = [_frame(path.parent / name) for name in reaction.coefficients]
        weights = np.array([list(reaction.coefficients.values())])
        _check_balance(f"{path}: {reaction.name}", frames, weights[0])
        energy = reaction.energy_kcal_mol
        published = None if energy is None else np.array([energy * KCAL_MOL_eV])
        yield Probe("listed reaction", reaction.name, tuple(frames), weights, (0,), published)


def file_barriers(path: Path) -> Iterator[tuple[str, tuple[Atoms, Atoms]]]:
    """Name and ends of each path of a file.

    Raises:
        SettingsError: a file that cannot be used, or ends of other atoms or another order.
    """
    for barrier in _parse(path).barrier:
        first, last = (_atoms(path.parent / name) for name in barrier.ends)
        if first.numbers.tolist() != last.numbers.tolist():
            raise SettingsError(f"{path}: {barrier.name}: both ends must have the same atoms in the same order")
        yield barrier.name, (first, last)


def barrier_probes(name: str, ends: tuple[Atoms, Atoms], calculator: Calculator) -> list[Probe]:
    """Energies along the path that the calculator finds between the ends, relaxed by it, and that of its highest point,
    above the first; none when it finds no path. The reference is asked about the calculator's path."""
    frames, energies = _path(ends, calculator)
    if not np.isfinite(energies).all():
        return []
    above_first = np.eye(N_IMAGES)[1:] - np.eye(N_IMAGES)[0]
    top = int(np.argmax(energies[1:-1]))
    return [
        Probe("path", name, frames, above_first, tuple(range(1, N_IMAGES))),
        Probe("barrier", name, frames, above_first[top : top + 1], (top + 1,)),
    ]


def _path(ends: tuple[Atoms, Atoms], calculator: Calculator) -> tuple[tuple[Frame, ...], Floats]:
    """A nudged elastic band with a climbing image: its frames, and their energies, (N_IMAGES,), eV."""
    first, last = (atoms.copy() for atoms in ends)
    for atoms in (first, last):
        atoms.calc = calculator
        BFGS(atoms, logfile=None).run(LARGEST_FORCE_eV_A, RELAX_STEPS)
    minimize_rotation_and_translation(first, last)
    images = [first, *(first.copy() for _ in range(N_IMAGES - 2)), last]
    for image in images:
        image.calc = calculator
    band = NEB(images, climb=True, method="improvedtangent", allow_shared_calculator=True)
    band.interpolate("idpp")
    FIRE(band, logfile=None).run(LARGEST_FORCE_eV_A, PATH_STEPS)
    return tuple(from_atoms(image) for image in images), np.array([image.get_potential_energy() for image in images])


def _parse(path: Path) -> ReactionFile:
    return parse_settings(ReactionFile, read_toml(path), str(path))


def _atoms(path: Path) -> Atoms:
    try:
        atoms = read(path)
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    assert isinstance(atoms, Atoms)
    return atoms


def _frame(path: Path) -> Frame:
    return from_atoms(_atoms(path))


def _check_balance(where: str, frames: Sequence[Frame], coefficients: Floats) -> None:
    excess: Counter[str] = Counter()
    for frame, coefficient in zip(frames, coefficients.tolist(), strict=True):
        for number in frame.numbers:
            excess[chemical_symbols[number]] += coefficient
        excess["charge"] += coefficient * frame.charge
    if wrong := [f"{symbol} {number:+g}" for symbol, number in excess.items() if abs(number) > 1e-9]:
        raise SettingsError(f"{where}: the coefficients do not balance ({', '.join(wrong)})")
