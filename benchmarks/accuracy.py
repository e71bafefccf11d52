"""How close is a campaign's newest committee to its teacher, on cells that no campaign ever saw?

    python benchmarks/accuracy.py RUN [--force-limit 0.05]

RUN is the run directory of a campaign whose labels came from ASE's EMT. Committee and EMT are compared on cells made
here, from seeds that campaigns do not use:

- disordered: random cells by the campaign's own builder settings;
- melted: 32-atom crystals (random occupation for alloys) molten at 1500-3000 K by the teacher's own dynamics, at
  0.9 to 1.1 times the volume of the mixed pure metals;
- fcc, for a single element: lattice constant and bulk modulus from equations of state by both.

Prints one table; exit code 1 when a line misses its bar.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.data import atomic_numbers, reference_states
from ase.eos import EquationOfState
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from rich.console import Console
from rich.table import Table

from campaign.config import CampaignConfig, load_campaign
from sampler.builder import random_frame
from shards.atoms import to_atoms
from smelt import load_committee

TEST_SEED = 1_987_654_321  # campaigns derive theirs from hashes; these are neighbours of none
N_DISORDERED, N_MELTED = 40, 24
LATTICE_LIMIT, BULK_LIMIT = 0.002, 0.05  # relative


def disordered_cells(config: CampaignConfig) -> list[Atoms]:
    elements = config.campaign.elements
    return [to_atoms(random_frame(elements, config.builder, TEST_SEED + k)) for k in range(N_DISORDERED)]


def melted_cells(elements: Sequence[str]) -> list[Atoms]:
    return [_melt(elements, np.random.default_rng([TEST_SEED, k])) for k in range(N_MELTED)]


def _melt(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    fractions = rng.dirichlet(np.ones(len(elements)))
    symbols = rng.choice(list(elements), size=32, p=fractions)
    lattice_A = np.cbrt(np.mean([reference_states[atomic_numbers[symbol]]["a"] ** 3 for symbol in symbols]))
    atoms = bulk("Al", "fcc", a=lattice_A * np.cbrt(rng.uniform(0.9, 1.1)), cubic=True) * (2, 2, 2)
    atoms.set_chemical_symbols(symbols)
    atoms.calc = EMT()
    temperature_K = rng.uniform(1500, 3000)
    thermalize_momenta(atoms, temperature_K=2 * temperature_K, rng=rng)
    Langevin(atoms, 2 * units.fs, temperature_K=temperature_K, friction=0.02 / units.fs, fixcm=False, rng=rng).run(500)
    return atoms


def errors(cells: Sequence[Atoms], teacher: Calculator, pupil: Calculator) -> tuple[float, float, float]:
    """Force RMSE (eV/A), energy RMSE (eV/atom) of `pupil`, and the teacher's rms force (eV/A)."""
    force_error, energy_error, force = [], [], []
    for atoms in cells:
        expected, found = _answers(atoms, teacher), _answers(atoms, pupil)
        force.append(expected[1])
        force_error.append(found[1] - expected[1])
        energy_error.append((found[0] - expected[0]) / len(atoms))
    return _rms(np.concatenate(force_error)), _rms(np.array(energy_error)), _rms(np.concatenate(force))


def _answers(atoms: Atoms, calculator: Calculator) -> tuple[float, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces()


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def fcc_properties(element: str, make: Callable[[], Calculator]) -> tuple[float, float]:
    """Lattice constant (A) and bulk modulus (GPa), static, from a Birch-Murnaghan fit over +-4 % of the volume."""
    guess_A = reference_states[atomic_numbers[element]]["a"]
    for _ in range(2):  # the second fit is centred on the first one's minimum
        crystals = [bulk(element, "fcc", a=guess_A * np.cbrt(x)) for x in np.linspace(0.96, 1.04, 9)]
        energies = [_answers(atoms, make())[0] for atoms in crystals]
        volume, _, modulus = EquationOfState([a.get_volume() for a in crystals], energies, eos="birchmurnaghan").fit()
        guess_A = float(np.cbrt(4 * volume))
    return guess_A, float(modulus / units.GPa)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a finished campaign with EMT labels")
    parser.add_argument("--force-limit", type=float, default=0.05, help="largest force RMSE that passes, eV/A")
    arguments = parser.parse_args()
    config = load_campaign(arguments.run / "config.toml")
    model = max(arguments.run.glob("models/gen-*/model.safetensors"))
    committee = load_committee(model)
    elements = config.campaign.elements

    table = Table("test", "EMT", "committee", "error", "bar", "met", title=str(model))
    verdicts = []

    def add(test: str, expected: str, found: str, error: float, limit: float, unit: str) -> None:
        verdicts.append(error <= limit)
        met = "yes" if verdicts[-1] else "NO"
        table.add_row(test, expected, found, f"{error:.4g}{unit}", f"{limit:g}{unit}", met)

    for name, cells in (("disordered", disordered_cells(config)), ("melted", melted_cells(elements))):
        force, energy, scale = errors(cells, EMT(), committee.calculator())
        add(
            f"force RMSE, {len(cells)} {name} cells",
            f"rms {scale:.3f} eV/A",
            f"energy RMSE {1000 * energy:.2f} meV/atom",
            force,
            arguments.force_limit,
            " eV/A",
        )
    if len(elements) == 1:
        expected, found = fcc_properties(elements[0], EMT), fcc_properties(elements[0], committee.calculator)
        quantities = (("fcc lattice constant", "A", LATTICE_LIMIT), ("bulk modulus", "GPa", BULK_LIMIT))
        for (name, unit, limit), e, f in zip(quantities, expected, found, strict=True):
            add(name, f"{e:.4f} {unit}", f"{f:.4f} {unit}", 100 * abs(f / e - 1), 100 * limit, " %")
    Console().print(table)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
