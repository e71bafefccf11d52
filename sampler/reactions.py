"""What lies between the two sides of a reaction? Atom-mapped SMILES in, points of an interpolated path out.

The path is a nudged elastic band on the image-dependent pair potential (doi:10.1063/1.4878664): it needs no model, and
walkers that start from it find the rest.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import minimize_rotation_and_translation
from ase.mep.neb import idpp_interpolate
from numpy.typing import NDArray

from sampler.molecules import Molecule, parse_molecule, relaxed
from shards.settings import SettingsError

__all__ = ["Reaction", "parse_reaction", "path_ends", "path_point"]

Floats = NDArray[np.float64]

N_IMAGES = 9
IDPP_STEPS = 200
BEND_A = 0.1


@dataclass(frozen=True)
class Reaction:
    """An isomerisation: one molecule on each side, every atom of it, hydrogen included, with the same map number."""

    smiles: str
    molecule: Molecule  # the left side
    sides: tuple[Any, Any]  # RDKit's molecules


def parse_reaction(smiles: str) -> Reaction:
    """Raises SettingsError: not two molecules with the same mapped atoms, charge and unpaired electrons."""
    where = "builder.molecules.reactions"
    halves = smiles.split(">>")
    if len(halves) != 2:
        raise SettingsError(f"{where}: {smiles!r}: must be two molecules with >> between them")
    sides = [_mapped(half, smiles) for half in halves]
    atoms = [sorted((atom.GetAtomMapNum(), atom.GetAtomicNum()) for atom in side.GetAtoms()) for side in sides]
    numbers = [number for number, _ in atoms[0]]
    if atoms[0] != atoms[1] or 0 in numbers or len(set(numbers)) < len(numbers):
        raise SettingsError(
            f"{where}: {smiles!r}: every atom, hydrogen included, needs a map number of its own, the same on both sides"
        )
    first, second = (parse_molecule(_unmapped(side), where) for side in sides)
    if (first.charge, first.spin) != (second.charge, second.spin):
        raise SettingsError(f"{where}: {smiles!r}: charge or unpaired electrons differ between the sides")
    return Reaction(smiles, first, (sides[0], sides[1]))


def path_point(reaction: Reaction, stream: np.random.Generator) -> tuple[NDArray[np.int64], Floats]:
    """A random point of the path: numbers (n_atoms,), positions (n_atoms, 3), A.

    Raises:
        EmbeddingError
    """
    first, last = path_ends(reaction, stream)
    minimize_rotation_and_translation(first, last)
    numbers, start, end = first.numbers, first.positions, last.positions
    images = [Atoms(numbers, start) for _ in range(N_IMAGES - 1)] + [Atoms(numbers, end)]
    bend = BEND_A * stream.standard_normal(start.shape)
    for index, image in enumerate(images):
        along = index / (N_IMAGES - 1)
        # Off the straight line, on which atoms of linear molecules would have to pass through each other.
        image.positions = start + (end - start) * along + bend * np.sin(np.pi * along)
    with warnings.catch_warnings():
        # It leaves the choice of method to ASE's default, which ASE warns of.
        warnings.simplefilter("ignore", UserWarning)
        idpp_interpolate(images, traj=None, log=None, steps=IDPP_STEPS)
    at = stream.uniform(0, N_IMAGES - 1)
    before = min(int(at), N_IMAGES - 2)
    fraction = at - before
    return numbers, (1 - fraction) * images[before].positions + fraction * images[before + 1].positions


def path_ends(reaction: Reaction, stream: np.random.Generator) -> tuple[Atoms, Atoms]:
    """Both sides at minima of a force field, their atoms in the same order.

    Raises:
        EmbeddingError
    """
    first, last = (_in_order(relaxed(side, reaction.smiles, stream)) for side in reaction.sides)
    return first, last


def _mapped(half: str, smiles: str) -> Any:
    from rdkit import Chem, rdBase

    parameters = Chem.SmilesParserParams()
    parameters.removeHs = False
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(half, parameters)
    if mol is None or len(Chem.GetMolFrags(mol)) != 1:
        raise SettingsError(f"builder.molecules.reactions: {smiles!r}: {half!r} is not one molecule")
    return Chem.AddHs(mol)


def _unmapped(mol: Any) -> str:
    from rdkit import Chem

    bare = Chem.Mol(mol)
    for atom in bare.GetAtoms():
        atom.SetAtomMapNum(0)
    return str(Chem.MolToSmiles(Chem.RemoveHs(bare)))


def _in_order(mol: Any) -> Atoms:
    """By map number."""
    order = np.argsort([atom.GetAtomMapNum() for atom in mol.GetAtoms()])
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    return Atoms(numbers[order], np.array(mol.GetConformer().GetPositions())[order])
