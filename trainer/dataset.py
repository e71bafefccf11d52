"""What is there to learn from? Reads labels through their shards and says which of them are fit to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from shards.label import Level
from shards.outcome import Receipt
from shards.reader import Batch, Shard, gather_labels, open_shard

__all__ = ["Dataset", "DatasetError", "fit_self_energies", "is_outlier", "load_dataset"]


class DatasetError(ValueError):
    """Labels that a committee cannot be trained on."""


@dataclass(frozen=True)
class Dataset:
    """Labeled frames of one level of theory, each frame once, sorted by id. What is said about each is in memory, the
    frames and their labels stay in their shards.

    keys: (n, 16), the ids as bytes. n_atoms: (n,). counts: (n, n_elements), atoms of each element. energy: (n,), eV.
    max_force: (n,), largest force component, eV/A, NaN where there are no forces. borrowed: forces of another level for
    some of the frames that have none, by index, (n_atoms, 3), eV/A.
    """

    level: Level
    keys: NDArray[np.uint8]
    n_atoms: NDArray[np.int32]
    counts: NDArray[np.int32]
    energy: NDArray[np.float64]
    max_force: NDArray[np.float64]
    _shards: tuple[Shard, ...]
    _shard: NDArray[np.int32]  # (n,), where each frame is: in which of the shards, and in which row of it
    _row: NDArray[np.int32]
    borrowed: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def id(self, index: int) -> str:
        return bytes(self.keys[index]).hex()

    def gather(self, indices: NDArray[np.int64]) -> Batch:
        """Copy frames and labels into one batch, in this order."""
        places = zip(self._shard[indices].tolist(), self._row[indices].tolist(), strict=True)
        batch = gather_labels([(self._shards[shard], row) for shard, row in places])
        for i, index in enumerate(indices.tolist()):
            if index in self.borrowed:
                batch.forces[batch.offset[i] : batch.offset[i + 1]] = self.borrowed[index]
        return batch

    @property
    def files_GB(self) -> float:
        """Size of the shards."""
        return sum(shard.receipt().n_bytes for shard in self._shards) / 1e9

    def read_no_more_than_asked(self) -> None:
        """For shards that are larger than the memory left for the system's cache of them."""
        for shard in self._shards:
            shard.read_no_more_than_asked()

    def subset(self, indices: NDArray[np.int64]) -> Dataset:
        """Only some of the frames; before any forces are borrowed."""
        assert not self.borrowed
        return Dataset(
            self.level,
            self.keys[indices],
            self.n_atoms[indices],
            self.counts[indices],
            self.energy[indices],
            self.max_force[indices],
            self._shards,
            self._shard[indices],
            self._row[indices],
        )


def load_dataset(receipts: Sequence[Receipt], elements: Sequence[str], verify: bool) -> Dataset:
    """Open the shards; of a frame that was labeled twice the first label counts.

    Raises:
        DatasetError: no labels, more than one level of theory, elements the committee does not have.
        ShardError: a shard that cannot be used.
    """
    shards = [_open(receipt, verify) for receipt in receipts]
    level = _one_level(shards)
    everything = Dataset(
        level,
        keys=np.concatenate([shard.keys for shard in shards]),
        n_atoms=np.concatenate([np.diff(shard.offset).astype(np.int32) for shard in shards]),
        counts=np.concatenate([_counts(shard, elements) for shard in shards]),
        energy=np.concatenate([shard.energy for shard in shards]),
        max_force=np.concatenate([_max_force(shard) for shard in shards]),
        _shards=tuple(shards),
        _shard=np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in shards]),
        _row=np.concatenate([np.arange(len(shard), dtype=np.int32) for shard in shards]),
    )
    if not len(everything):
        raise DatasetError("no labeled frames to train on: label some first")
    return everything.subset(_first_of_each(everything.keys))


def _first_of_each(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where each key, (n, 16), stands first, in the order of the keys."""
    high, low = keys.view(">u8").astype(np.uint64).T
    order = np.lexsort((low, high))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    first: NDArray[np.int64] = order[new]
    return first


def _open(receipt: Receipt, verify: bool) -> Shard:
    """Raises DatasetError when the file is not the one the receipt was made for."""
    shard = open_shard(Path(receipt.path), verify=verify)
    if shard.digest != receipt.digest:
        raise DatasetError(f"{receipt.path}: not the shard that was asked for: its digest is {shard.digest[:16]}")
    return shard


def fit_self_energies(counts: NDArray[np.int32], energy: NDArray[np.float64]) -> NDArray[np.float64]:
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


def _counts(shard: Shard, elements: Sequence[str]) -> NDArray[np.int32]:
    """How many atoms of each element each frame holds, (n_frames, n_elements)."""
    first = shard.offset[:-1]
    columns = [np.add.reduceat(shard.numbers == atomic_numbers[symbol], first, dtype=np.int32) for symbol in elements]
    counts = np.stack(columns, axis=1)
    strange = np.flatnonzero(counts.sum(axis=1) != np.diff(shard.offset))
    if len(strange):
        row = int(strange[0])
        numbers = shard.numbers[shard.offset[row] : shard.offset[row + 1]]
        unknown = sorted({chemical_symbols[number] for number in numbers} - set(elements))
        raise DatasetError(
            f"{shard.path}: frame {shard.ids[row]} holds {', '.join(unknown)};"
            f" the committee is for {', '.join(elements)}"
        )
    return counts


def _max_force(shard: Shard) -> NDArray[np.float64]:
    """Largest force component of each frame, (n_frames,), eV/A."""
    largest: NDArray[np.float64] = np.maximum.reduceat(np.abs(shard.forces).max(axis=1), shard.offset[:-1])
    return largest
