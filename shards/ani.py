"""How does the HDF5 layout of the public ANI data sets map to frames and labels?

One group per formula, at any depth: `species` or `atomic_numbers` (n_atoms,), `coordinates` (n_conformers, n_atoms,
3), energies (n_conformers,), and, where there are any, forces like the coordinates and `cell` (n_conformers, 3, 3).
NaN stands for what was not computed. Energies are in hartree there, lengths in angstrom.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from shards.atoms import ConversionError, Fields
from shards.frame import Frame
from shards.label import Label
from shards.schema import HARTREE_eV

__all__ = ["read_ani", "write_ani"]

_SPECIES = ("species", "atomic_numbers", "numbers")
_ENERGIES = ("energies", "energy")


def read_ani(path: Path, fields: Fields, frames_only: bool = False) -> Iterator[tuple[str, Frame, Label | None]]:
    """Yield every conformer of every group: its name, its frame, its label where the energy is not NaN.

    With `frames_only` no label is looked for.

    Raises:
        ConversionError: a file, group or conformer that does not follow the layout; several energies to choose from.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            groups = list(_groups(file))
            if not groups:
                raise ConversionError(f"{path}: no group with `coordinates` in it: not in the ANI layout")
            for group in groups:
                yield from _read_group(path, group, fields, frames_only)
    except (OSError, RuntimeError, KeyError) as error:
        raise ConversionError(f"{path}: HDF5 cannot read it: {error}; copy the file again") from error


def _groups(parent: h5py.Group) -> Iterator[h5py.Group]:
    if isinstance(parent.get("coordinates"), h5py.Dataset):
        yield parent
    for child in parent.values():
        if isinstance(child, h5py.Group):
            yield from _groups(child)


def _read_group(
    path: Path, group: h5py.Group, fields: Fields, frames_only: bool
) -> Iterator[tuple[str, Frame, Label | None]]:
    where = f"{path}: group {group.name}"
    coordinates = np.asarray(group["coordinates"], dtype=np.float64)
    if coordinates.ndim == 2:
        coordinates = coordinates[None]
    if coordinates.ndim != 3 or coordinates.shape[2] != 3:
        raise ConversionError(f"{where}: coordinates {coordinates.shape}: expected (n_conformers, n_atoms, 3)")
    n_conformers, n_atoms, _ = coordinates.shape
    numbers = _fit(where, "species", _numbers(where, group), (n_conformers, n_atoms))
    frames = _frame_columns(where, group, n_conformers, fields)
    labels = {} if frames_only else _label_columns(where, group, coordinates.shape, fields)
    for i in range(n_conformers):
        name = f"{where}, conformer {i}"
        try:
            frame = Frame(
                numbers[i], coordinates[i] * fields.length_A, **{key: rows[i] for key, rows in frames.items()}
            )
            label = None
            if labels and not np.isnan(labels["energy"][i]):
                label = Label(**{key: rows[i] for key, rows in labels.items()})
        except ValueError as error:
            raise ConversionError(f"{name}: {error}") from error
        yield name, frame, label


def _numbers(where: str, group: h5py.Group) -> NDArray[np.int64]:
    """Atomic numbers from numbers or symbols."""
    from ase.data import atomic_numbers

    name = next((name for name in _SPECIES if name in group), None)
    if name is None:
        raise ConversionError(f"{where}: no species: expected one of {', '.join(_SPECIES)}, has {', '.join(group)}")
    values = np.asarray(group[name])
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    symbols = [value.decode() if isinstance(value, bytes) else str(value) for value in values.reshape(-1)]
    unknown = sorted({symbol for symbol in symbols if symbol not in atomic_numbers})
    if unknown:
        raise ConversionError(f"{where}: {name} holds {', '.join(map(repr, unknown))}: expected element symbols")
    return np.array([atomic_numbers[symbol] for symbol in symbols]).reshape(values.shape)


def _frame_columns(where: str, group: h5py.Group, n: int, fields: Fields) -> dict[str, Any]:
    """Cell and pbc, charge and spin, one row per conformer. A cell without pbc is periodic in three dimensions."""
    columns: dict[str, Any] = {}
    if "cell" in group:
        columns["cell"] = _fit(where, "cell", np.asarray(group["cell"], dtype=float), (n, 3, 3)) * fields.length_A
        columns["pbc"] = np.repeat(columns["cell"].any(axis=(1, 2))[:, None], 3, axis=1)
    if "pbc" in group:
        columns["pbc"] = _fit(where, "pbc", np.asarray(group["pbc"], dtype=bool), (n, 3))
    for name in ("charge", "spin"):
        if name in group:
            columns[name] = _fit(where, name, np.asarray(group[name], dtype=int), (n,)).tolist()
    return columns


def _label_columns(where: str, group: h5py.Group, shape: tuple[int, ...], fields: Fields) -> dict[str, Any]:
    """Energy, forces and stress, one row per conformer; nothing when the group has no energy."""
    key = _energy_key(where, group, fields)
    if not key:
        return {}
    n = shape[0]
    energy = np.asarray(group[key], dtype=np.float64)
    columns: dict[str, Any] = {"energy": _fit(where, key, energy.reshape(-1), (n,)) * fields.energy_eV}
    forces = _optional(where, group, fields.forces_names(key), shape, required=bool(fields.forces))
    stress = _optional(where, group, fields.stress_names(key), (n, 3, 3), required=bool(fields.stress))
    columns["forces"] = forces * fields.force_eV_A
    columns["stress"] = stress * fields.stress_eV_A3
    return columns


def _energy_key(where: str, group: h5py.Group, fields: Fields) -> str:
    """Name of the energies: the one asked for, the usual one, or the only one; empty when there is none."""
    if fields.energy:
        return fields.energy if fields.energy in group else ""
    found = [name for name in _ENERGIES if name in group] or [
        name for name in group if name.lower().endswith(_ENERGIES)
    ]
    if len(found) > 1:
        raise ConversionError(f"{where}: several energies: name one of {', '.join(found)}")
    return found[0] if found else ""


def _optional(
    where: str, group: h5py.Group, names: tuple[str, ...], shape: tuple[int, ...], required: bool
) -> NDArray[np.float64]:
    """The first dataset of these names, or NaN."""
    for name in names:
        if name in group:
            return _fit(where, name, np.asarray(group[name], dtype=np.float64), shape)
    if required:
        raise ConversionError(f"{where}: no {names[0]}: has {', '.join(group)}")
    return np.full(shape, np.nan)


def _fit(where: str, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Repeat for every conformer what was given once; a single conformer may come without its axis."""
    if array.shape not in (shape, shape[1:]):
        raise ConversionError(f"{where}: {name} {array.shape}: expected {shape}")
    return np.broadcast_to(array, shape)


def write_ani(path: Path, rows: Iterable[tuple[Frame, Label | None]]) -> None:
    """Write frames grouped by formula, energies in hartree; provenance has no place in this layout."""
    groups: dict[Any, list[tuple[Frame, Label | None]]] = defaultdict(list)
    for frame, label in rows:
        # The order of the atoms counts: all conformers of a group share one list of species.
        groups[(tuple(frame.numbers.tolist()), bool(frame.cell.any()))].append((frame, label))
    with h5py.File(path, "w") as file:
        for members in groups.values():
            _write_group(file, members)


def _write_group(file: h5py.File, rows: list[tuple[Frame, Label | None]]) -> None:
    from ase.data import chemical_symbols

    first = rows[0][0]
    symbols = [chemical_symbols[number] for number in first.numbers]
    formula = "".join(f"{symbol}{n}" for symbol, n in sorted(Counter(symbols).items()))
    group = file.create_group(f"{formula}-{len(file):05d}")
    group["species"] = np.array(symbols, dtype="S")
    for name in ("charge", "spin"):
        group[name] = [getattr(frame, name) for frame, _ in rows]
    _write_unit(group, "coordinates", [frame.positions for frame, _ in rows], "A")
    if first.cell.any():
        _write_unit(group, "cell", [frame.cell for frame, _ in rows], "A")
        group["pbc"] = [frame.pbc for frame, _ in rows]
    labels = [label for _, label in rows if label is not None]
    if labels:
        _write_unit(group, "energies", np.array([y.energy for y in labels]) / HARTREE_eV, "hartree")
        _write_unit(group, "forces", np.array([y.forces for y in labels]) / HARTREE_eV, "hartree/A")
        _write_unit(group, "stress", np.array([y.stress for y in labels]) / HARTREE_eV, "hartree/A^3")


def _write_unit(group: h5py.Group, name: str, values: Any, unit: str) -> None:
    group[name] = values
    group[name].attrs["unit"] = unit
