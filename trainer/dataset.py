"""What is there to learn from? Reads labels through their shards and says which of them are fit to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from shards.frame import Frame
from shards.label import Label, Level
from shards.outcome import Receipt
from shards.reader import Shard, open_shard

__all__ = ["Dataset", "DatasetError", "fit_self_energies", "is_outlier", "load_dataset"]


class DatasetError(ValueError):
    """Labels that a committee cannot be trained on."""


@dataclass(frozen=True)
class Dataset:
    """Labeled frames of one level of theory, each frame once.

    ids: n frame ids. n_atoms: (n,). counts: (n, n_elements), atoms of each element. energy: (n,), eV. max_force: (n,),
    largest force component, eV/A, NaN where there are no forces. borrowed: forces of another level for some of the
    frames that have none, by frame id, (n_atoms, 3), eV/A.
    """

    level: Level
    ids: tuple[str, ...]
    n_atoms: NDArray[np.int64]
    counts: NDArray[np.int64]
    energy: NDArray[np.float64]
    max_force: NDArray[np.float64]
    _places: tuple[tuple[Shard, int], ...]
    borrowed: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, index: int) -> tuple[Frame, Label]:
        shard, row = self._places[index]
        label, forces = shard.label(row), self.borrowed.get(self.ids[index])
        return shard.frame(row), label if forces is None else replace(label, forces=forces)

    def subset(self, indices: NDArray[np.int64]) -> Dataset:
        return Dataset(
            self.level,
            tuple(self.ids[i] for i in indices),
            self.n_atoms[indices],
            self.counts[indices],
            self.energy[indices],
            self.max_force[indices],
            tuple(self._places[i] for i in indices),
            self.borrowed,
        )


def load_dataset(receipts: Sequence[Receipt], elements: Sequence[str], verify: bool) -> Dataset:
    """Open the shards; of a frame that was labeled twice the first label counts.

    Raises:
        DatasetError: no labels, more than one level of theory, elements the committee does not have.
        ShardError: a shard that cannot be used.
    """
    shards = [_open(receipt, verify) for receipt in receipts]
    level = _one_level(shards)
    places: dict[str, tuple[Shard, int]] = {}
    for shard in shards:
        for row, id in enumerate(shard.ids):
            places.setdefault(id, (shard, row))
    if not places:
        raise DatasetError("no labeled frames to train on: label some first")
    rows = [_summary(shard, row, elements) for shard, row in places.values()]
    n_atoms, counts, energy, max_force = (np.array(column) for column in zip(*rows, strict=True))
    return Dataset(level, tuple(places), n_atoms, counts, energy, max_force, tuple(places.values()))


def _open(receipt: Receipt, verify: bool) -> Shard:
    """Raises DatasetError when the file is not the one the receipt was made for."""
    shard = open_shard(Path(receipt.path), verify=verify)
    if shard.digest != receipt.digest:
        raise DatasetError(f"{receipt.path}: not the shard that was asked for: its digest is {shard.digest[:16]}")
    return shard


def fit_self_energies(counts: NDArray[np.int64], energy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the energy per atom of each element, (n_elements,), eV, by least squares.

    Where compositions do not tell elements apart (one compound only), the smallest of the solutions is taken. A cell
    counts by 1 / n_atoms, as in the loss.
    """
    scale = 1 / np.sqrt(counts.sum(axis=1))
    solution: NDArray[np.float64] = np.linalg.lstsq(counts * scale[:, None], energy * scale, rcond=1e-10)[0]
    return solution


def is_outlier(dataset: Dataset, sigma: float, max_force_eV_per_A: float) -> NDArray[np.bool_]:
    """Return which frames, (n,), have an energy too far off the self energies or too large a force."""
    off = dataset.energy - dataset.counts @ fit_self_energies(dataset.counts, dataset.energy)
    off = off / np.sqrt(dataset.n_atoms)
    far = np.abs(off - off.mean()) > sigma * off.std() + 1e-9
    hard: NDArray[np.bool_] = far | (dataset.max_force > max_force_eV_per_A)
    return hard


def _one_level(shards: Sequence[Shard]) -> Level:
    levels: dict[str, tuple[Level, Shard]] = {}
    for shard in shards:
        levels.setdefault(shard.labels_level.digest, (shard.labels_level, shard))
    if len(levels) > 1:
        named = "; ".join(f"{d} ({v.engine} {v.version}, {s.path})" for d, (v, s) in levels.items())
        raise DatasetError(f"labels of {len(levels)} levels of theory cannot be mixed in one training: {named}")
    if not levels:
        raise DatasetError("no labeled frames to train on: the manifest lists no shard")
    return next(iter(levels.values()))[0]


def _summary(shard: Shard, row: int, elements: Sequence[str]) -> tuple[int, list[int], float, float]:
    atoms = slice(int(shard.offset[row]), int(shard.offset[row + 1]))
    numbers = shard.numbers[atoms]
    counts = [int((numbers == atomic_numbers[symbol]).sum()) for symbol in elements]
    if sum(counts) != len(numbers):
        unknown = sorted({chemical_symbols[number] for number in numbers} - set(elements))
        raise DatasetError(
            f"{shard.path}: frame {shard.ids[row]} holds {', '.join(unknown)};"
            f" the committee is for {', '.join(elements)}"
        )
    return len(numbers), counts, float(shard.energy[row]), float(np.abs(shard.forces[atoms]).max())
