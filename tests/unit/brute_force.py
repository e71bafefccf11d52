"""The published formula, written once more for the tests: numpy, float64, loops over images, no code of the product.

Committees are described by what is published of them: constants and matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HARTREE_EV = 27.211386245988


@dataclass
class Formula:
    """networks[member][element] is a list of (weight (out, in), bias (out,)); the last layer gives eV."""

    numbers: list[int]  # atomic numbers, in the order of the species
    radial_cutoff: float
    angular_cutoff: float
    eta_radial: float
    eta_angular: float
    zeta: float
    radial_shifts: np.ndarray
    angular_shifts: np.ndarray
    angle_shifts: np.ndarray
    networks: list
    self_energies: list[float]

    def energies(self, numbers, positions, cell, pbc) -> np.ndarray:
        """(n_members,), eV."""
        total = np.zeros(len(self.networks))
        for i in range(len(numbers)):
            species = self.numbers.index(numbers[i])
            aev = self.aev(i, numbers, positions, cell, pbc)
            total += [_network(member[species], aev) for member in self.networks]
            total += self.self_energies[species]
        return total

    def aev(self, i, numbers, positions, cell, pbc) -> np.ndarray:
        vectors, species = self._neighbours(i, numbers, positions, cell, pbc)
        n = len(self.numbers)
        radial = np.zeros((n, len(self.radial_shifts)))
        angular = dict.fromkeys(itertools.combinations_with_replacement(range(n), 2), 0.0)
        for v, s in zip(vectors, species, strict=True):
            r = math.sqrt(v @ v)
            if r < self.radial_cutoff:
                radial[s] += (
                    0.25 * np.exp(-self.eta_radial * (r - self.radial_shifts) ** 2) * _fc(r, self.radial_cutoff)
                )
        close = [(v, s) for v, s in zip(vectors, species, strict=True) if math.sqrt(v @ v) < self.angular_cutoff]
        for (v, s), (w, t) in itertools.combinations(close, 2):
            angular[min(s, t), max(s, t)] += self._triple(v, w)
        width = len(self.angular_shifts) * len(self.angle_shifts)
        parts = [np.ravel(block) if np.ndim(block) else np.zeros(width) for block in angular.values()]
        return np.concatenate([radial.ravel(), *parts])

    def _triple(self, v, w) -> np.ndarray:
        rv, rw = math.sqrt(v @ v), math.sqrt(w @ w)
        theta = math.acos(0.95 * (v @ w) / (rv * rw))
        first = np.exp(-self.eta_angular * ((rv + rw) / 2 - self.angular_shifts) ** 2)
        second = 2 * ((1 + np.cos(theta - self.angle_shifts)) / 2) ** self.zeta
        return np.outer(first, second) * _fc(rv, self.angular_cutoff) * _fc(rw, self.angular_cutoff)

    def _neighbours(self, i, numbers, positions, cell, pbc):
        reach = max(self.radial_cutoff, self.angular_cutoff)
        periodic = [k for k in range(3) if pbc[k]]
        span = np.ptp(positions, axis=0).max()
        ranges = [range(1)] * 3
        if periodic:
            lattice = cell[periodic]
            # Heights of the parallelepiped spanned by the periodic vectors, inside their span.
            heights = 1 / np.linalg.norm(np.linalg.pinv(lattice), axis=0)
            for k, height in zip(periodic, heights, strict=True):
                n = math.ceil((reach + 2 * span) / height) + 1
                ranges[k] = range(-n, n + 1)
        images = np.array(list(itertools.product(*ranges)), dtype=float)
        found = positions[None] + (images @ np.where(np.array(pbc)[:, None], cell, 0))[:, None] - positions[i]
        distance = np.linalg.norm(found, axis=2)
        image, atom = np.nonzero((distance < reach) & (distance > 1e-9))
        return found[image, atom], [self.numbers.index(numbers[j]) for j in atom]


def _fc(r: float, cutoff: float) -> float:
    return 0.5 * math.cos(math.pi * r / cutoff) + 0.5 if r < cutoff else 0.0


def _network(layers, x: np.ndarray) -> float:
    for number, (weight, bias) in enumerate(layers):
        x = weight @ x + bias
        if number < len(layers) - 1:
            x = np.where(x > 0, x, 0.1 * (np.exp(np.minimum(x, 0) / 0.1) - 1))
    return float(x[0])


STEP = 1e-5  # CELU and the cutoff function have kinks in their second derivative: large steps would straddle them


def differentiate(energies: Callable[[float], np.ndarray]) -> np.ndarray:
    """d energies(x) / dx at x = 0, by central differences."""
    return (energies(STEP) - energies(-STEP)) / (2 * STEP)


def forces(formula: Formula, numbers, positions, cell, pbc) -> np.ndarray:
    """(n_members, n_atoms, 3), eV/A."""
    out = np.zeros((len(formula.networks), *positions.shape))
    for i, k in np.ndindex(positions.shape):
        unit = np.zeros_like(positions)
        unit[i, k] = 1
        out[:, i, k] = -differentiate(lambda x, unit=unit: formula.energies(numbers, positions + x * unit, cell, pbc))
    return out


def virial(formula: Formula, numbers, positions, cell, pbc) -> np.ndarray:
    """(n_members, 3, 3), eV: dE/dstrain, symmetric."""
    out = np.zeros((len(formula.networks), 3, 3))
    for a, b in itertools.combinations_with_replacement(range(3), 2):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5
        strain[b, a] += 0.5

        def strained(x, strain=strain):
            deform = np.eye(3) + x * strain
            return formula.energies(numbers, positions @ deform, cell @ deform, pbc)

        out[:, a, b] = out[:, b, a] = differentiate(strained)
    return out


def published_aluminium(folder: Path) -> Formula:
    """The ANI-Al committee straight from its binary files; constants as printed in the publication's parameter file."""
    shapes = [(96, 96), (96, 96), (64, 96), (1, 64)]
    networks = []
    for member in range(8):
        stem = folder / "model-Al-75" / f"train{member}" / "networks" / "ANN-Al.nnf-l"
        layers = [
            (
                np.fromfile(f"{stem}{k + 1}.wparam", "<f4").astype(float).reshape(shape),
                np.fromfile(f"{stem}{k + 1}.bparam", "<f4").astype(float),
            )
            for k, shape in enumerate(shapes)
        ]
        layers[-1] = (layers[-1][0] * HARTREE_EV, layers[-1][1] * HARTREE_EV)
        networks.append([layers])
    return Formula(
        numbers=[13],
        radial_cutoff=7.0,
        angular_cutoff=5.0,
        eta_radial=43.9,
        eta_angular=6.5,
        zeta=69.4,
        radial_shifts=1.25 + 0.1796875 * np.arange(32),
        angular_shifts=1.25 + 0.46875 * np.arange(8),
        # As rounded in the parameter file.
        angle_shifts=np.array(
            [0.19634954, 0.58904862, 0.98174770, 1.3744468, 1.7671459, 2.1598449, 2.5525440, 2.9452431]
        ),
        networks=networks,
        self_energies=[-2.7058640291888105 * HARTREE_EV],
    )


def of_committee(committee, numbers: list[int]) -> Formula:
    """The same description of a committee of the product."""
    state = {name: value.detach().double().numpy() for name, value in committee.state_dict().items()}
    networks = [
        [
            [
                (state[f"networks.{e}.weights.{k}"][m], state[f"networks.{e}.biases.{k}"][m])
                for k in range(len(hidden) + 1)
            ]
            for e, hidden in enumerate(committee.hidden)
        ]
        for m in range(committee.n_members)
    ]
    p = committee.aev
    return Formula(
        numbers=numbers,
        radial_cutoff=p.radial_cutoff_A,
        angular_cutoff=p.angular_cutoff_A,
        eta_radial=p.eta_radial,
        eta_angular=p.eta_angular,
        zeta=p.zeta,
        radial_shifts=np.array(p.radial_shifts),
        angular_shifts=np.array(p.angular_shifts),
        angle_shifts=np.array(p.angle_shifts),
        networks=networks,
        self_energies=committee.self_energies.tolist(),
    )


def random_frame_arrays(rng, numbers: list[int], n_atoms: int, length: float, pbc, closest: float = 1.9):
    """Numbers, positions, a triclinic cell with edges near `length`, pbc; no two atoms nearer than `closest`.

    Positions lie outside the cell too; axes that are not periodic sometimes have no lattice vector.
    """
    while True:
        cell = length * (np.eye(3) + rng.uniform(-0.3, 0.3, (3, 3)))
        positions = rng.random((n_atoms, 3)) @ cell
        shifts = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ np.where(np.array(pbc)[:, None], cell, 0)
        apart = np.linalg.norm(positions[:, None, None] - positions[None, :, None] - shifts, axis=3)
        if (apart[apart > 1e-9] > closest).all() and np.linalg.det(cell) > 0:
            break
    positions += rng.integers(-2, 3, (n_atoms, 3)) * np.array(pbc) @ cell
    if rng.random() < 0.5:
        cell = np.where(np.array(pbc)[:, None], cell, 0)
    return rng.choice(numbers, n_atoms), positions, cell, np.array(pbc)
