"""Which molecules are there to learn from? SMILES in, a library and single conformers out.

A list of SMILES becomes a library: checked, cut into fragments where asked for, thinned, and split so that a molecule
for testing shares neither its formula nor its ring scaffold with any molecule for training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sampler.config import MoleculeSettings
from shards.settings import SettingsError

__all__ = [
    "EmbeddingError",
    "Molecule",
    "conformer",
    "draw_molecule",
    "fragments",
    "parse_molecule",
    "read_library",
    "relaxed",
    "split",
]

N_EMBEDDINGS = 3
MMFF_STEPS = 500


class EmbeddingError(ValueError):
    """No geometry was found for a molecule."""


@dataclass(frozen=True, order=True)
class Molecule:
    """One connected molecule. smiles: canonical. scaffold: of its rings, by Bemis and Murcko; "" without rings."""

    n_heavy: int
    smiles: str
    formula: str
    scaffold: str
    charge: int
    spin: int  # unpaired electrons, all parallel


def read_library(elements: Sequence[str], settings: MoleculeSettings) -> tuple[Molecule, ...]:
    """The molecules of `settings.part`, smallest first.

    Raises:
        SettingsError: RDKit is not installed, a line is no molecule, one that these settings do not allow, or nothing
            is left.
    """
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        raise SettingsError(f'builder.molecules: {error}; pip install "smelt[molecules]"') from error
    molecules = set()
    for where, smiles in _lines(settings):
        molecule = parse_molecule(smiles, where)
        if fault := _fault(molecule, elements, settings):
            raise SettingsError(f"{where}: {smiles!r}: {fault}")
        molecules.add(molecule)
        if settings.fragments and molecule.n_heavy > settings.n_heavy[1]:
            parts = fragments(molecule, settings.n_heavy[1])
            molecules |= {part for part in parts if not _fault(part, elements, settings)}
    low, high = settings.n_heavy
    fitting = _thinned((molecule for molecule in molecules if low <= molecule.n_heavy <= high), settings.per_size)
    train, test = split(fitting, settings.test_fraction)
    chosen = test if settings.part == "test" else train
    for smiles in settings.reactions:
        _check_reaction(smiles, elements, settings, {molecule.formula for molecule in test})
    if not chosen:
        raise SettingsError(
            f"builder.molecules: no molecule is left to {settings.part} on, of {len(molecules)} given and"
            f" {len(fitting)} of {low} to {high} heavy atoms: give more, or change test_fraction"
        )
    return tuple(chosen)


def parse_molecule(smiles: str, where: str = "smiles") -> Molecule:
    """Raises SettingsError."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise SettingsError(f"{where}: {smiles!r}: not a molecule that RDKit understands")
    return _molecule(mol)


def split(molecules: Iterable[Molecule], test_fraction: float) -> tuple[list[Molecule], list[Molecule]]:
    """Molecules to train and to test on, each sorted.

    Molecules with rings are grouped by scaffold, others by formula; the groups of lowest hash are for testing, so few
    change sides when the list grows. A training molecule whose formula the test side has too is left out of both.
    """
    ordered = sorted(molecules)
    groups = sorted({_group(molecule) for molecule in ordered}, key=_fraction)
    n_test = min(math.ceil(test_fraction * len(groups)), len(groups) - 1)
    set_aside = set(groups[: max(n_test, 0)])
    test = [molecule for molecule in ordered if _group(molecule) in set_aside]
    formulas = {molecule.formula for molecule in test}
    train = [each for each in ordered if _group(each) not in set_aside and each.formula not in formulas]
    return train, test


def fragments(molecule: Molecule, max_heavy: int) -> set[Molecule]:
    """All connected parts of at most so many heavy atoms, their cut bonds capped with hydrogen."""
    from rdkit import Chem, rdBase

    whole = Chem.MolFromSmiles(molecule.smiles)
    Chem.Kekulize(whole, clearAromaticFlags=True)
    found = set()
    with rdBase.BlockLogs():
        for atoms in _connected(whole, max_heavy):
            part = Chem.RWMol(whole)
            for index in sorted(set(range(whole.GetNumAtoms())) - atoms, reverse=True):
                part.RemoveAtom(index)
            for atom in part.GetAtoms():
                atom.SetNoImplicit(False)
                atom.SetNumExplicitHs(0)
            # Reading it again leaves out what RDKit cannot make sense of.
            again = Chem.MolFromSmiles(Chem.MolToSmiles(part))
            if again is not None:
                found.add(_molecule(again))
    return found


def draw_molecule(library: Sequence[Molecule], stream: np.random.Generator) -> Molecule:
    """Every number of heavy atoms is as likely as any other, and so is every molecule of that size."""
    sizes = [list(group) for _, group in groupby(library, key=lambda molecule: molecule.n_heavy)]
    size = sizes[int(stream.integers(len(sizes)))]
    return size[int(stream.integers(len(size)))]


def conformer(molecule: Molecule, stream: np.random.Generator) -> Any:
    """The molecule as RDKit's, hydrogen included, with one random conformer at a minimum of a force field.

    Raises:
        EmbeddingError
    """
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        return relaxed(Chem.AddHs(Chem.MolFromSmiles(molecule.smiles)), molecule.smiles, stream)


def relaxed(graph: Any, name: str, stream: np.random.Generator) -> Any:
    """A copy of RDKit's molecule, which has its hydrogen, with one random conformer at a minimum of a force field.

    Raises:
        EmbeddingError
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    mol = Chem.Mol(graph)
    with rdBase.BlockLogs():
        parameters = rdDistGeom.ETKDGv3()
        for attempt in range(N_EMBEDDINGS):
            parameters.randomSeed = int(stream.integers(2**31 - 1))
            parameters.useRandomCoords = attempt > 0
            if rdDistGeom.EmbedMolecule(mol, parameters) == 0:
                break
        else:
            raise EmbeddingError(f"{name}: no conformer found in {N_EMBEDDINGS} attempts")
        if mol.GetNumAtoms() > 1 and rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
            rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=MMFF_STEPS)
        elif mol.GetNumAtoms() > 1 and rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
            rdForceFieldHelpers.UFFOptimizeMolecule(mol, maxIters=MMFF_STEPS)
    return mol


def _lines(settings: MoleculeSettings) -> Iterator[tuple[str, str]]:
    """Where each SMILES stands, and the SMILES."""
    yield from (("builder.molecules.smiles", smiles) for smiles in settings.smiles)
    if not settings.file:
        return
    path = Path(settings.file)
    if not path.is_file():
        raise SettingsError(f"builder.molecules.file = {settings.file!r}: no such file")
    if path.suffix == ".sdf":
        from rdkit import Chem, rdBase

        with rdBase.BlockLogs():
            for number, mol in enumerate(Chem.SDMolSupplier(str(path)), start=1):
                # What cannot be read is empty here and refused as no molecule.
                yield f"{path}, entry {number}", Chem.MolToSmiles(mol) if mol is not None else "unreadable"
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.partition("#")[0].split() if line.startswith("#") else line.split()
        if words:
            yield f"{path}:{number}", words[0]


def _molecule(mol: Any) -> Molecule:
    from rdkit import Chem
    from rdkit.Chem import rdMolDescriptors
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return Molecule(
        n_heavy=mol.GetNumHeavyAtoms(),
        smiles=Chem.MolToSmiles(mol),
        formula=rdMolDescriptors.CalcMolFormula(mol),
        scaffold=MurckoScaffold.MurckoScaffoldSmiles(mol=mol),
        charge=Chem.GetFormalCharge(mol),
        spin=sum(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()),
    )


def _fault(molecule: Molecule, elements: Sequence[str], settings: MoleculeSettings) -> str:
    """Why these settings do not allow the molecule; empty when they do."""
    from rdkit import Chem

    atoms = Chem.AddHs(Chem.MolFromSmiles(molecule.smiles)).GetAtoms()
    if foreign := sorted({atom.GetSymbol() for atom in atoms} - set(elements)):
        return f"holds {', '.join(foreign)}: not among the elements {', '.join(elements)}"
    if "." in molecule.smiles:
        return "several molecules: give each a SMILES of its own"
    if (molecule.charge or molecule.spin) and not settings.ions_and_radicals:
        return (
            f"charge {molecule.charge}, {molecule.spin} unpaired electrons: the potential sees neither; allow both with"
            " builder.molecules.ions_and_radicals"
        )
    return ""


def _check_reaction(smiles: str, elements: Sequence[str], settings: MoleculeSettings, set_aside: set[str]) -> None:
    """Raises SettingsError for a reaction that these settings do not allow."""
    from sampler.reactions import parse_reaction

    molecule = parse_reaction(smiles).molecule
    fault = _fault(molecule, elements, settings)
    if not fault and molecule.formula in set_aside:
        fault = f"formula {molecule.formula} is set aside for tests: leave it out, or change test_fraction"
    if fault:
        raise SettingsError(f"builder.molecules.reactions: {smiles!r}: {fault}")


def _connected(mol: Any, max_atoms: int) -> set[frozenset[int]]:
    """All connected sets of at most so many atoms."""
    neighbours = {atom.GetIdx(): {other.GetIdx() for other in atom.GetNeighbors()} for atom in mol.GetAtoms()}
    newest = {frozenset([index]) for index in neighbours}
    found = set(newest)
    for _ in range(max_atoms - 1):
        newest = {atoms | {other} for atoms in newest for index in atoms for other in neighbours[index] - atoms}
        found |= newest
    return found


def _thinned(molecules: Iterable[Molecule], per_size: int) -> list[Molecule]:
    """Of each number of heavy atoms as many as asked for, chosen by a hash of each."""
    ordered = sorted(molecules, key=lambda molecule: (molecule.n_heavy, _fraction(molecule.smiles)))
    if not per_size:
        return ordered
    return [
        molecule for _, group in groupby(ordered, key=lambda each: each.n_heavy) for molecule in list(group)[:per_size]
    ]


def _group(molecule: Molecule) -> str:
    return molecule.scaffold or molecule.formula


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2.0**56
