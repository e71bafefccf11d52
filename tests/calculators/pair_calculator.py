"""The quickest calculator to start: EMT's own imports take longer than all that most tests have to do."""

import itertools

import numpy as np
from ase.calculators.calculator import Calculator, all_changes


class PairRepulsion(Calculator):
    """Every pair of atoms, in this cell or the next ones, adds 8 eV exp(-(r / 1.2 A)^2)."""

    implemented_properties = ("energy", "free_energy", "forces", "stress")

    def calculate(self, atoms, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        near = np.array(list(itertools.product((-1, 0, 1), repeat=3))) * atoms.pbc @ atoms.cell.array
        vec = atoms.positions[:, None, None] - atoms.positions[:, None] - near
        squares = np.square(vec).sum(-1)
        energies = np.where(squares > 0, 8.0 * np.exp(-squares / 1.2**2), 0.0)
        pushes = (2 / 1.2**2) * energies[..., None] * vec
        energy = energies.sum() / 2
        self.results = {"energy": energy, "free_energy": energy, "forces": pushes.sum((1, 2))}
        if atoms.pbc.all():
            virial = -np.einsum("ijnk,ijnl->kl", pushes, vec) / 2 / atoms.get_volume()
            self.results["stress"] = virial.flat[[0, 4, 8, 5, 2, 1]]
