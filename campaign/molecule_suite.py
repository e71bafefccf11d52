"""What should a potential of molecules get right? Probes: frames, and how their energies become a property.

Every property but the frequencies is linear in energies, so a probe is a list of frames and a matrix. The same frames
go to the committee and to the quantum code; nothing is relaxed in between, so both answer the same question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import atomic_masses, chemical_symbols
from numpy.typing import NDArray

from sampler.config import MoleculeSettings
from sampler.geometries import inner_space, molecule_frame, rotatable_bonds
from sampler.molecules import EmbeddingError, Molecule, conformer, parse_molecule
from shards.frame import Frame
from shards.schema import AMU_eV_fs2_A2

__all__ = ["TESTS", "Probe", "frequencies_cm", "frequency_frames", "molecule_probes"]

Floats = NDArray[np.float64]

TESTS = ("conformers", "torsion", "stretch", "dimer", "reaction", "frequencies")
N_CONFORMERS, SAME_CONFORMER_A = 4, 0.1
TORSION_DEGREES = tuple(range(0, 360, 30))
STRETCH_FACTORS = (0.85, 0.9, 0.95, 1.0, 1.1, 1.2, 1.35, 1.5)
DIMER_CONTACTS = (0.65, 0.7, 0.75, 0.8, 0.9, 1.1, 1.5)
HESSIAN_STEP_A = 0.01
# What every molecule of C, N and O is hydrogenated to; the coefficients follow from its formula.
PRODUCTS = {"C": ("C", 4), "N": ("N", 3), "O": ("O", 2)}
LIGHT_cm_fs = 2.99792458e-5  # speed of light, exact


@dataclass(frozen=True)
class Probe:
    """One property of one molecule. values = weights @ energies: (n_values,), eV, over `at`.

    frames: n. weights: (n_values, n), none for "frequencies", which come from forces. at: (n_values,), angle in
    degrees, factor of a length, or index. published: (n_values,), eV, in place of labels.
    """

    test: str
    molecule: str
    frames: tuple[Frame, ...]
    weights: Floats
    at: tuple[float, ...]
    published: Floats | None = None


def molecule_probes(molecules: Sequence[Molecule], seed: int) -> Iterator[Probe]:
    """All probes of these molecules; the same seed gives the same frames."""
    for molecule in molecules:
        stream = np.random.default_rng([seed, int.from_bytes(molecule.smiles.encode()[:7], "big")])
        try:
            mol = conformer(molecule, stream)
            probes = [
                _conformers(molecule, stream),
                _torsion(molecule, mol),
                _stretch(molecule, mol),
                _dimer(molecule, seed),
                _reaction(molecule, mol, stream),
                _frequencies(molecule, mol),
            ]
        except EmbeddingError:
            continue
        yield from (probe for probe in probes if probe is not None)


def frequency_frames(frame: Frame) -> list[Frame]:
    """The displaced frames whose forces make up the Hessian: + and - of every coordinate, in turn."""
    moves = [sign * HESSIAN_STEP_A * axis for axis in np.eye(3 * frame.n_atoms) for sign in (1, -1)]
    return [
        Frame(frame.numbers, frame.positions + move.reshape(-1, 3), charge=frame.charge, spin=frame.spin)
        for move in moves
    ]


def frequencies_cm(moved: Sequence[Frame], forces: Sequence[Floats]) -> Floats:
    """Harmonic wavenumbers, (n_modes,), 1/cm, ascending, imaginary ones as negative, of the inner motions only.

    moved: what `frequency_frames` gave. forces: (n_atoms, 3), eV/A, of each.
    """
    frame = moved[0]
    flat = np.array([each.ravel() for each in forces])
    hessian = (flat[1::2] - flat[::2]) / (2 * HESSIAN_STEP_A)
    masses = np.repeat(atomic_masses[frame.numbers], 3)
    weighted = (hessian + hessian.T) / 2 / np.sqrt(masses[:, None] * masses)
    inner = inner_space((moved[0].positions + moved[1].positions) / 2, masses)
    squares = np.linalg.eigvalsh(inner.T @ weighted @ inner) / AMU_eV_fs2_A2
    return np.asarray(np.sign(squares) * np.sqrt(np.abs(squares)) / (2 * np.pi * LIGHT_cm_fs))


def _conformers(molecule: Molecule, stream: np.random.Generator) -> Probe | None:
    """Energies of conformers above the first."""
    frames: list[Frame] = []
    for _ in range(4 * N_CONFORMERS):
        frame = _frame(molecule, conformer(molecule, stream))
        if all(np.abs(_shape(frame) - _shape(other)).max() > SAME_CONFORMER_A for other in frames):
            frames.append(frame)
    frames = frames[:N_CONFORMERS]
    if len(frames) < 2:
        return None
    at = tuple(range(1, len(frames)))
    return Probe("conformers", molecule.smiles, tuple(frames), _relative(len(frames), 0), at)


def _torsion(molecule: Molecule, mol: Any) -> Probe | None:
    """Energies along a rigid turn of the first rotatable bond, above their mean."""
    from rdkit.Chem import Mol, rdMolTransforms

    bonds = rotatable_bonds(mol)
    if not bonds:
        return None
    frames = []
    for angle in TORSION_DEGREES:
        turned = Mol(mol)
        rdMolTransforms.SetDihedralDeg(turned.GetConformer(), *bonds[0], float(angle))
        frames.append(_frame(molecule, turned))
    weights = np.eye(len(frames)) - 1 / len(frames)
    return Probe("torsion", molecule.smiles, tuple(frames), weights, TORSION_DEGREES)


def _stretch(molecule: Molecule, mol: Any) -> Probe | None:
    """Energies along a rigid stretch of the first bond outside rings, above the unstretched one."""
    from rdkit.Chem import Mol, rdMolTransforms

    bonds = [bond for bond in mol.GetBonds() if not bond.IsInRing()]
    if not bonds:
        return None
    first, second = bonds[0].GetBeginAtomIdx(), bonds[0].GetEndAtomIdx()
    length = rdMolTransforms.GetBondLength(mol.GetConformer(), first, second)
    frames = []
    for factor in STRETCH_FACTORS:
        stretched = Mol(mol)
        rdMolTransforms.SetBondLength(stretched.GetConformer(), first, second, factor * length)
        frames.append(_frame(molecule, stretched))
    return _against_one("stretch", molecule, frames, STRETCH_FACTORS)


def _dimer(molecule: Molecule, seed: int) -> Probe:
    """Interaction energies of two equal molecules in one orientation, at several contacts."""
    pairs = []
    for contact in DIMER_CONTACTS:
        settings = MoleculeSettings(kinds={"dimer": 1.0}, displacement_A=0.0, contact=(contact, contact))
        pairs.append(molecule_frame([molecule], settings, seed))  # the same conformers and directions of the same seed
    half = pairs[0].n_atoms // 2
    alone = [
        Frame(pairs[0].numbers[part], pairs[0].positions[part], charge=molecule.charge, spin=molecule.spin)
        for part in (slice(0, half), slice(half, None))
    ]
    weights = np.hstack([np.eye(len(pairs)), np.full((len(pairs), 2), -1.0)])
    return Probe("dimer", molecule.smiles, (*pairs, *alone), weights, DIMER_CONTACTS)


def _reaction(molecule: Molecule, mol: Any, stream: np.random.Generator) -> Probe | None:
    """Energy of hydrogenation to CH4, NH3 and H2O: molecule + x H2 -> a CH4 + b NH3 + c H2O."""
    frame = _frame(molecule, mol)
    symbols = [chemical_symbols[number] for number in frame.numbers]
    heavy = {symbol: symbols.count(symbol) for symbol in set(symbols) - {"H"}}
    if not heavy or set(heavy) - set(PRODUCTS) or molecule.smiles in PRODUCTS or molecule.charge or molecule.spin:
        return None
    hydrogen = sum(count * PRODUCTS[symbol][1] for symbol, count in heavy.items()) - symbols.count("H")
    sides = {"[H][H]": -hydrogen / 2} | {PRODUCTS[symbol][0]: float(count) for symbol, count in heavy.items()}
    others = [parse_molecule(smiles) for smiles in sides]
    frames = (frame, *(_frame(other, conformer(other, stream)) for other in others))
    return Probe("reaction", molecule.smiles, frames, np.array([[-1.0, *sides.values()]]), (0,))


def _frequencies(molecule: Molecule, mol: Any) -> Probe:
    """The frames at a minimum of the force field; molecules are not relaxed to the level's own."""
    frames = frequency_frames(_frame(molecule, mol))
    n_modes = inner_space(np.array(mol.GetConformer().GetPositions()), np.ones(3 * mol.GetNumAtoms())).shape[1]
    return Probe("frequencies", molecule.smiles, tuple(frames), np.zeros((0, len(frames))), tuple(range(n_modes)))


def _against_one(test: str, molecule: Molecule, frames: list[Frame], at: tuple[float, ...]) -> Probe:
    """Energies above that of the frame at 1."""
    rest = at.index(1.0)
    kept = tuple(value for value in at if value != 1.0)
    return Probe(test, molecule.smiles, tuple(frames), _relative(len(frames), rest), kept)


def _relative(n_frames: int, reference: int) -> Floats:
    """Energies of all other frames above that of one."""
    weights = np.eye(n_frames)
    weights[:, reference] -= 1
    return np.delete(weights, reference, axis=0)


def _shape(frame: Frame) -> Floats:
    """All distances, sorted for each pair of elements: equal for mirror images and for equal atoms exchanged."""
    first, second = np.triu_indices(frame.n_atoms, 1)
    distances = np.linalg.norm(frame.positions[first] - frame.positions[second], axis=1)
    order = np.lexsort((distances, frame.numbers[first] * frame.numbers[second]))
    return np.asarray(distances[order])


def _frame(molecule: Molecule, mol: Any) -> Frame:
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    return Frame(numbers, np.array(mol.GetConformer().GetPositions()), charge=molecule.charge, spin=molecule.spin)
