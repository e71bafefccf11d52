"""How is a molecule moved away from its minimum, or put beside others? Each sampler: molecules in, positions out.

normal_modes: a random displacement along the normal modes of a force field, as at a temperature. torsion: one bond
turned to a random angle. dimer, cluster: molecules of random orientation side by side. box: many of them in a periodic
cell. path: a point between the two sides of a reaction. conformer: nothing of these.
The published samplers (doi:10.1063/1.5023802) pick the most different of ten by their AEVs; here that is left to the
removal of near-duplicates that all frames go through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ase.data import atomic_masses, vdw_radii
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from sampler.config import MoleculeSettings
from sampler.molecules import EmbeddingError, Molecule, conformer, draw_molecule
from sampler.reactions import parse_reaction, path_point
from sampler.streams import Purpose, open_stream
from shards.frame import Frame, Origin
from shards.schema import AMU_A3_g_cm3, BOLTZMANN_eV_K, KCAL_MOL_eV

__all__ = ["inner_space", "molecule_frame", "normal_modes", "rotatable_bonds"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

N_ATTEMPTS = 20
N_PLACES = 2000
HESSIAN_STEP_A = 1e-3
# Softer modes would carry atoms far beyond where a harmonic force field means anything: 0.05 mdyn/A, in eV/A^2.
SOFTEST_eV_A2 = 0.05 * 6.241509


def molecule_frame(library: Sequence[Molecule], settings: MoleculeSettings, seed: int) -> Frame:
    """Draw molecules and what is done to them; the same seed gives the same frame. What fails is drawn anew.

    Raises:
        EmbeddingError: no geometry was found in many attempts.
    """
    stream = open_stream(seed, Purpose.CELL)
    names = sorted(settings.kinds)
    weights = np.array([settings.kinds[name] for name in names])
    make = _MAKERS[names[int(stream.choice(len(names), p=weights / weights.sum()))]]
    fault = ""
    for _ in range(N_ATTEMPTS):
        try:
            molecules, numbers, positions, edge_A = make(library, settings, stream)
        except EmbeddingError as error:
            fault = str(error)
            continue
        if not _crowded(numbers, positions):
            charge, spin = sum(each.charge for each in molecules), sum(each.spin for each in molecules)
            cell, pbc = edge_A * np.eye(3), np.full(3, edge_A > 0)
            return Frame(numbers, positions, cell, pbc, charge, spin, Origin(kind="bootstrap", seed=seed))
    fault = fault or "atoms too close: displace or heat them less"
    raise EmbeddingError(f"builder.molecules: no geometry in {N_ATTEMPTS} attempts; the last: {fault}")


# Molecules, numbers, positions, edge of the cubic cell (0: none).
Made = tuple[list[Molecule], Ints, Floats, float]


def _conformer(library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator) -> Made:
    molecule = draw_molecule(library, stream)
    mol = conformer(molecule, stream)
    return [molecule], _numbers(mol), _shaken(_positions(mol), settings, stream), 0.0


def _normal_modes(library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator) -> Made:
    molecule = draw_molecule(library, stream)
    mol = conformer(molecule, stream)
    stiffness, modes = normal_modes(mol)
    temperature_K = stream.uniform(*settings.temperature_K)
    lengths = np.sqrt(BOLTZMANN_eV_K * temperature_K / stiffness) * stream.standard_normal(len(stiffness))
    return [molecule], _numbers(mol), _positions(mol) + np.tensordot(lengths, modes, axes=1), 0.0


def _torsion(library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator) -> Made:
    from rdkit.Chem import rdMolTransforms

    molecule = draw_molecule(library, stream)
    mol = conformer(molecule, stream)
    bonds = rotatable_bonds(mol)
    if bonds:
        dihedral = bonds[int(stream.integers(len(bonds)))]
        rdMolTransforms.SetDihedralDeg(mol.GetConformer(), *dihedral, float(stream.uniform(-180, 180)))
    return [molecule], _numbers(mol), _shaken(_positions(mol), settings, stream), 0.0


def _dimer(library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator) -> Made:
    return _side_by_side(2, library, settings, stream)


def _cluster(library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator) -> Made:
    low, high = settings.cluster_size
    return _side_by_side(int(stream.integers(low, high, endpoint=True)), library, settings, stream)


def normal_modes(mol: Any) -> tuple[Floats, Floats]:
    """Normal modes of the force field at the molecule's geometry, without rotation and translation.

    Returns force constants (n_modes,), eV/A^2, none below 0.05 mdyn/A, and displacements (n_modes, n_atoms, 3) of
    length 1, orthogonal with masses as weights: the harmonic energy of `a` times one of them is a^2 k / 2.
    """
    field = _force_field(mol)
    start = _positions(mol).ravel()
    hessian = np.array([_slope(field, start, axis) for axis in range(len(start))]) * KCAL_MOL_eV
    masses = np.repeat([atom.GetMass() for atom in mol.GetAtoms()], 3)
    weighted = (hessian + hessian.T) / 2 / np.sqrt(masses[:, None] * masses)
    inner = inner_space(_positions(mol), masses)
    eigenvalues, vectors = np.linalg.eigh(inner.T @ weighted @ inner)
    modes = (inner @ vectors / np.sqrt(masses)[:, None]).T
    lengths = np.linalg.norm(modes, axis=1)
    stiffness: Floats = np.maximum(eigenvalues / lengths**2, SOFTEST_eV_A2)
    return stiffness, (modes / lengths[:, None]).reshape(len(modes), -1, 3)


def inner_space(positions: Floats, masses: Floats) -> Floats:
    """Orthonormal mass-weighted directions that neither shift nor turn the molecule, (3 n_atoms, n_modes).

    positions: (n_atoms, 3), A. masses: (3 n_atoms,), amu.
    """
    centred = positions - np.average(positions, axis=0, weights=masses[::3])
    rigid = [np.tile(axis, len(positions)) for axis in np.eye(3)]
    rigid += [np.cross(axis, centred).ravel() for axis in np.eye(3)]
    left, sizes, _ = np.linalg.svd((np.array(rigid) * np.sqrt(masses)).T)
    rank = int((sizes > 1e-3 * sizes[0]).sum())  # linear molecules have two rotations only
    return np.asarray(left[:, rank:], dtype=np.float64)


def _slope(field: Any, start: Floats, axis: int) -> Floats:
    """One row of the Hessian, kcal/mol/A^2."""
    step = HESSIAN_STEP_A * np.eye(len(start))[axis]
    slope: Floats = (_gradient(field, start + step) - _gradient(field, start - step)) / (2 * HESSIAN_STEP_A)
    return slope


def _gradient(field: Any, at: Floats) -> Floats:
    field.CalcEnergy(at.tolist())  # the gradient goes by the distances of the last energy
    return np.array(field.CalcGrad(at.tolist()))


def _force_field(mol: Any) -> Any:
    from rdkit.Chem import rdForceFieldHelpers as Fields

    if Fields.MMFFHasAllMoleculeParams(mol):
        field = Fields.MMFFGetMoleculeForceField(mol, Fields.MMFFGetMoleculeProperties(mol))
    else:
        field = Fields.UFFGetMoleculeForceField(mol)
    field.Initialize()
    return field


def rotatable_bonds(mol: Any) -> list[tuple[int, int, int, int]]:
    """Four atoms of each single bond outside rings whose both ends go on."""
    from rdkit import Chem

    found = []
    for bond in mol.GetBonds():
        if bond.GetBondType() != Chem.BondType.SINGLE or bond.IsInRing():
            continue
        j, k = bond.GetBeginAtom(), bond.GetEndAtom()
        before = [atom.GetIdx() for atom in j.GetNeighbors() if atom.GetIdx() != k.GetIdx()]
        after = [atom.GetIdx() for atom in k.GetNeighbors() if atom.GetIdx() != j.GetIdx()]
        if before and after:
            found.append((before[0], j.GetIdx(), k.GetIdx(), after[0]))
    return found


def _side_by_side(
    n_molecules: int, library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator
) -> Made:
    """Bring molecules of random orientation, one after the other, from random directions into contact with the rest."""
    molecules, numbers, positions, _ = _conformer(library, settings, stream)
    for _ in range(n_molecules - 1):
        more, other_numbers, other, _ = _conformer(library, settings, stream)
        other = _turned(other, stream)
        direction = stream.standard_normal(3)
        direction /= np.linalg.norm(direction)
        contact = stream.uniform(*settings.contact) * (vdw_radii[numbers][:, None] + vdw_radii[other_numbers])
        other = other + positions.mean(axis=0) + direction * _touching(positions, other, direction, contact)
        molecules, numbers = molecules + more, np.concatenate([numbers, other_numbers])
        positions = np.concatenate([positions, other])
    return molecules, numbers, positions, 0.0


def _box(library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator) -> Made:
    """Put molecules one by one on random places with room for them; the cell that has the density drawn."""
    low, high = settings.box_size
    parts = [_conformer(library, settings, stream) for _ in range(int(stream.integers(low, high, endpoint=True)))]
    mass = sum(float(atomic_masses[numbers].sum()) for _, numbers, _, _ in parts)
    edge_A = (mass * AMU_A3_g_cm3 / stream.uniform(*settings.box_density_g_cm3)) ** (1 / 3)
    numbers, positions = np.zeros(0, dtype=np.int64), np.zeros((0, 3))
    for _, more, shape, _ in parts:
        contact = settings.contact[0] * (vdw_radii[numbers][:, None] + vdw_radii[more])
        for _ in range(N_PLACES):
            placed = _turned(shape, stream) + edge_A * stream.uniform(size=3)
            apart = positions[:, None] - placed
            if (np.linalg.norm(apart - edge_A * np.round(apart / edge_A), axis=2) >= contact).all():
                break
        else:
            raise EmbeddingError(
                f"a box of {len(parts)} molecules and {edge_A:.1f} A has no room for the next one:"
                " lower box_density_g_cm3 or the lower end of contact"
            )
        numbers, positions = np.concatenate([numbers, more]), np.concatenate([positions, placed])
    return [molecule for molecules, _, _, _ in parts for molecule in molecules], numbers, positions, edge_A


def _path(library: Sequence[Molecule], settings: MoleculeSettings, stream: np.random.Generator) -> Made:
    reaction = parse_reaction(settings.reactions[int(stream.integers(len(settings.reactions)))])
    numbers, positions = path_point(reaction, stream)
    return [reaction.molecule], numbers, _shaken(positions, settings, stream), 0.0


_MAKERS: dict[str, Callable[[Sequence[Molecule], MoleculeSettings, np.random.Generator], Made]] = {
    "conformer": _conformer,
    "normal_modes": _normal_modes,
    "torsion": _torsion,
    "dimer": _dimer,
    "cluster": _cluster,
    "box": _box,
    "path": _path,
}


def _turned(positions: Floats, stream: np.random.Generator) -> Floats:
    turned: Floats = (positions - positions.mean(axis=0)) @ Rotation.random(rng=stream).as_matrix().T
    return turned


def _touching(first: Floats, second: Floats, direction: Floats, contact: Floats) -> float:
    """How far along `direction` must `second` go from the centre of `first` for no pair to be closer than `contact`?"""
    apart = (second + first.mean(axis=0))[None] - first[:, None]
    along = apart @ direction
    # |apart + t direction|^2 = contact^2; pairs that pass each other farther off have no root.
    room = contact**2 - (apart**2).sum(axis=2) + along**2
    return float(np.max(-along + np.sqrt(np.maximum(room, 0)), where=room > 0, initial=0.0))


def _crowded(numbers: Ints, positions: Floats) -> bool:
    """Whether a pair is nearer than 0.006 Z Z' + 0.6 A, the limit of the published samplers."""
    distances = np.linalg.norm(positions[:, None] - positions, axis=2)
    np.fill_diagonal(distances, np.inf)
    return bool((distances < 0.006 * numbers[:, None] * numbers + 0.6).any())


def _shaken(positions: Floats, settings: MoleculeSettings, stream: np.random.Generator) -> Floats:
    shaken: Floats = positions + settings.displacement_A * stream.standard_normal(positions.shape)
    return shaken


def _numbers(mol: Any) -> Ints:
    return np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])


def _positions(mol: Any) -> Floats:
    return np.array(mol.GetConformer().GetPositions())
