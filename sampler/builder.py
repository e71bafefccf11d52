"""What does a random, disordered cell look like? Density, composition, shape and a minimum distance; no potential.

The published way puts atoms on random points of a grid, which leaves the grid in the data. Here each atom takes the
first random point with room, or the roomiest one, and then atoms that are too close push each other apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from ase.data import atomic_masses, atomic_numbers
from numpy.typing import NDArray

from sampler.config import BuilderSettings
from sampler.streams import Purpose, open_stream
from shards.frame import Frame, Origin
from shards.schema import AMU_A3_g_cm3
from shards.settings import SettingsError

__all__ = ["CrowdedCellError", "check_builder", "random_frame"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CROWDED = 0.55  # packing fraction that pushing apart reaches reliably; equal spheres jam at random near 0.64
N_TRIALS = 20
N_PUSHES = 500
N_ATTEMPTS = 3
OVERSHOOT = 0.01  # pushed atoms end this far beyond their distance, so that the last contacts open in finite time


class CrowdedCellError(ValueError):
    """Density and minimum distance cannot both be had."""


def check_builder(elements: Sequence[str], settings: BuilderSettings) -> None:
    """Refuse settings that do not fit these elements, or whose densest cells no disordered arrangement can fill.

    Raises:
        SettingsError
    """
    tables: dict[str, Sequence[str]] = {
        "composition": () if settings.composition == "random" else tuple(settings.composition),
        "density_by_element_g_cm3": tuple(settings.density_by_element_g_cm3),
        "minimum_distance_by_element_A": tuple(settings.minimum_distance_by_element_A),
    }
    for name, keys in tables.items():
        if unknown := sorted(set(keys) - set(elements)):
            raise SettingsError(f"builder.{name}: {', '.join(unknown)}: not among the elements {', '.join(elements)}")
    for element in elements:
        packing = float(_packing_fraction(_volumes(settings, (element,), 1.0), _diameters(settings, (element,))))
        if packing > CROWDED:
            raise SettingsError(
                f"builder: {element} at {_density_range(settings, element)[1]:g} g/cm3 with atoms"
                f" {_diameters(settings, (element,))[0]:g} A apart fills {packing:.2f} of space with spheres; must be"
                f" <= {CROWDED}: lower the density or the minimum distance"
            )


def random_frame(elements: Sequence[str], settings: BuilderSettings, seed: int) -> Frame:
    """Build a periodic random cell of these elements; the same seed gives the same cell, bit by bit.

    Raises:
        CrowdedCellError: the atoms do not find room; the message says how crowded the cell is.
    """
    stream = open_stream(seed, Purpose.CELL)
    for _ in range(N_ATTEMPTS):
        n_atoms = int(stream.integers(settings.n_atoms[0], settings.n_atoms[1], endpoint=True))
        symbols = _draw_symbols(elements, settings, n_atoms, stream)
        diameters = _diameters(settings, symbols)
        volumes = _volumes(settings, symbols, float(stream.uniform()))
        cell = _draw_cell(float(volumes.sum()), settings.shape_jitter, stream)
        contact = (diameters[:, None] + diameters[None, :]) / 2
        fractional = _push_apart(_place(cell, contact, stream), cell, contact)
        if fractional is not None:
            numbers = np.array([atomic_numbers[symbol] for symbol in symbols])
            origin = Origin(kind="bootstrap", seed=seed)
            return Frame(numbers, fractional @ cell, cell, np.ones(3, dtype=bool), origin=origin)
    raise CrowdedCellError(
        f"builder: {n_atoms} atoms in {volumes.sum():.0f} A^3 do not keep {diameters.min():g}-{diameters.max():g} A"
        f" apart: as spheres they fill {_packing_fraction(volumes, diameters):.2f} of the cell, and its shortest"
        f" lattice vector is {np.linalg.norm(cell, axis=1).min():.2f} A; lower the density or the minimum distance"
    )


def _draw_symbols(
    elements: Sequence[str], settings: BuilderSettings, n_atoms: int, stream: np.random.Generator
) -> list[str]:
    """Counts of a fixed composition are its fractions rounded down; who gets the atoms left over is drawn."""
    if settings.composition == "random":
        counts = stream.multinomial(n_atoms, stream.dirichlet(np.ones(len(elements))))
    else:
        exact = n_atoms * np.array([settings.composition.get(element, 0.0) for element in elements])
        counts = np.floor(exact + 1e-9).astype(np.int64)
        rest = np.clip(exact - counts, 1e-12, None)
        counts += stream.multinomial(n_atoms - counts.sum(), rest / rest.sum())
    symbols = [element for element, count in zip(elements, counts, strict=True) for _ in range(count)]
    return [symbols[i] for i in stream.permutation(n_atoms)]


def _density_range(settings: BuilderSettings, element: str) -> tuple[float, float]:
    return settings.density_by_element_g_cm3.get(element, settings.density_g_cm3)


def _volumes(settings: BuilderSettings, symbols: Sequence[str], quantile: float) -> Floats:
    """Volume per atom, A^3, when every element has its density at the same `quantile` of its range.

    Without a range per element the density is that of the whole cell, and volumes are shared out by mass.
    """
    low, high = np.array([_density_range(settings, symbol) for symbol in symbols]).T
    masses = atomic_masses[[atomic_numbers[symbol] for symbol in symbols]]
    return np.asarray(masses * AMU_A3_g_cm3 / (low + quantile * (high - low)), dtype=np.float64)


def _diameters(settings: BuilderSettings, symbols: Sequence[str]) -> Floats:
    table = settings.minimum_distance_by_element_A
    return np.array([table.get(symbol, settings.minimum_distance_A) for symbol in symbols])


def _packing_fraction(volumes: Floats, diameters: Floats) -> float:
    return float(np.pi / 6 * (diameters**3).sum() / volumes.sum())


def _draw_cell(volume: float, jitter: float, stream: np.random.Generator) -> Floats:
    shape = np.eye(3) + jitter * stream.uniform(-1, 1, (3, 3))
    cell: Floats = shape * (volume / np.linalg.det(shape)) ** (1 / 3)
    return cell


def _place(cell: Floats, contact: Floats, stream: np.random.Generator) -> Floats:
    """Put atoms one by one on the first of a few random points with room for them, or else the roomiest."""
    fractional = np.zeros((len(contact), 3))
    for atom in range(len(contact)):
        trials = stream.uniform(size=(N_TRIALS, 3))
        separation = trials[:, None] - fractional[None, :atom]
        separation -= np.round(separation)
        distances = np.linalg.norm(separation @ cell, axis=2)
        room = (distances - contact[atom, :atom]).min(axis=1, initial=0.0)
        fractional[atom] = trials[int(np.argmax(room))]
    return fractional


def _push_apart(fractional: Floats, cell: Floats, contact: Floats) -> Floats | None:
    """Move every pair that is too close apart, half the way each, until none is; None when that never happens."""
    to_fractional = np.linalg.inv(cell)
    images = _images(cell, float(contact.max()))
    for _ in range(N_PUSHES):
        first, second, vectors = _close_pairs(fractional, cell, contact, images)
        if len(first) == 0:
            return fractional % 1.0
        if (first == second).any():
            return None
        distances = np.linalg.norm(vectors, axis=1)
        wanted = contact[first, second] * (1 + OVERSHOOT)
        moves = np.zeros_like(fractional)
        # Each pair is listed from both sides, so each side moves its own half.
        np.add.at(moves, first, -0.5 * ((wanted - distances) / np.maximum(distances, 1e-9))[:, None] * vectors)
        fractional = fractional + moves @ to_fractional
    return None


def _images(cell: Floats, reach: float) -> Floats:
    """Lattice shifts, beyond the nearest image of each fractional difference, that can lie within `reach`."""
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    n_images = np.maximum(np.ceil(reach / heights - 0.5), 0).astype(int)
    return np.array(list(product(*(range(-n, n + 1) for n in n_images))), dtype=np.float64)


def _close_pairs(fractional: Floats, cell: Floats, contact: Floats, images: Floats) -> tuple[Ints, Ints, Floats]:
    """All pairs closer than their contact distance, from both sides: first, second (n_pairs,), vectors, A."""
    separation = fractional[None, :] - fractional[:, None]
    nearest = separation - np.round(separation)
    vectors = (nearest[None] + images[:, None, None]) @ cell
    close = np.einsum("sijk,sijk->sij", vectors, vectors) < contact**2
    itself = np.flatnonzero((images == 0).all(axis=1))[0]
    np.fill_diagonal(close[itself], False)
    _, first, second = np.nonzero(close)
    return first, second, vectors[close]
