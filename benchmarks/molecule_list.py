"""Which molecules of H, C, N and O can there be with so few heavy atoms? Prints one SMILES a line, smallest first.

    python benchmarks/molecule_list.py 4 > configs/chno-molecules.smi

Molecules are grown bond by bond: an atom added by a single, double or triple bond, or a ring closed, wherever valences
allow; then what does not last, or has no closed shell, is left out by the patterns below. No atom has a
formal charge, so that carbon monoxide, isonitriles, diazo and nitro groups are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import combinations

from rdkit import Chem, rdBase

ELEMENTS = ("C", "N", "O")
ORDERS = (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
NOT_LASTING = (
    "[+]",
    "[#7,#8]~[#7,#8]~[#7,#8]",  # chains of three hetero atoms
    "[r3,r4;#7,#8]~[r3,r4;#7,#8]",  # two of them side by side in a small ring
    "[#8]=[#8]",  # its ground state is a triplet
    "[#7,#8]C([#7,#8])([#7,#8])[#7,#8]",
    "[R]#[R]",
    "[R]=[R]=[R]",
    "[R2]",  # one ring at most
    "[#7r3,#8r3]1~*=*1",  # antiaromatic: oxirene, 1H-azirine
    "[r4]=[r4][r4]=[r4]",  # cyclobutadiene
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n_heavy", type=int, help="most atoms that are not hydrogen")
    for smiles in grown(parser.parse_args().n_heavy):
        print(smiles)
    return 0


def grown(n_heavy: int) -> list[str]:
    """Canonical SMILES of all molecules of up to `n_heavy` atoms that are not hydrogen, sorted within each size."""
    patterns = [Chem.MolFromSmarts(pattern) for pattern in NOT_LASTING]
    size, found = set(ELEMENTS), []
    with rdBase.BlockLogs():
        for _ in range(n_heavy):
            size = _closed(size)
            found += sorted(smiles for smiles in size if _lasts(Chem.MolFromSmiles(smiles), patterns))
            size = {bigger for smiles in size for bigger in _with_one_more(smiles)}
    return found


def _lasts(mol: Chem.Mol, patterns: list[Chem.Mol]) -> bool:
    return not any(mol.HasSubstructMatch(pattern) for pattern in patterns)


def _with_one_more(smiles: str) -> Iterator[str]:
    mol = _editable(smiles)
    for atom in range(mol.GetNumAtoms()):
        for element in ELEMENTS:
            for order in ORDERS:
                bigger = Chem.RWMol(mol)
                bigger.AddBond(atom, bigger.AddAtom(Chem.Atom(element)), order)
                yield from _sound(bigger)


def _closed(size: set[str]) -> set[str]:
    """With all that come of them by closing one ring."""
    closed = set(size)
    for smiles in size:
        mol = _editable(smiles)
        for first, second in combinations(range(mol.GetNumAtoms()), 2):
            if mol.GetBondBetweenAtoms(first, second) is None and mol.GetRingInfo().NumRings() == 0:
                for order in ORDERS[:2]:
                    ring = Chem.RWMol(mol)
                    ring.AddBond(first, second, order)
                    closed.update(_sound(ring))
    return closed


def _editable(smiles: str) -> Chem.RWMol:
    mol = Chem.RWMol(Chem.MolFromSmiles(smiles))
    Chem.Kekulize(mol, clearAromaticFlags=True)
    return mol


def _sound(mol: Chem.RWMol) -> list[str]:
    """The canonical SMILES, or nothing when a valence is exceeded."""
    for atom in mol.GetAtoms():
        atom.SetNoImplicit(False)
        atom.SetNumExplicitHs(0)
    if Chem.SanitizeMol(mol, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
        return []
    return [Chem.MolToSmiles(mol)]


if __name__ == "__main__":
    sys.exit(main())
