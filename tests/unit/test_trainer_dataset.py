"""Labels as the trainer finds them in their shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards import Frame, Label, Level, Receipt, open_shard, write_labels
from trainer.dataset import DatasetError, load_dataset

ELEMENTS = ("H", "C", "O")


def _rows(n: int, seed: int) -> list[tuple[Frame, Label]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        numbers = rng.choice([1, 6, 8], size=2 + i % 5)
        frame = Frame(numbers, rng.normal(size=(len(numbers), 3)), np.eye(3) * 9, np.full(3, i % 2 == 0))
        forces = rng.normal(size=(len(numbers), 3)) if i % 3 else np.full((len(numbers), 3), np.nan)
        rows.append((frame, Label(rng.normal(), forces, np.eye(3) * i)))
    return rows


def _write(folder: Path, *shards: list[tuple[Frame, Label]]) -> list[Receipt]:
    return [write_labels(folder / f"{i}.h5", Level("test", ""), rows) for i, rows in enumerate(shards)]


def test_a_dataset_is_sorted_by_id_and_of_two_labels_the_first_counts(tmp_path):
    rows, more = _rows(20, seed=0), _rows(10, seed=1)
    again = [(frame, Label(99.0, label.forces)) for frame, label in rows[5:10]]
    dataset = load_dataset(_write(tmp_path, rows, again + more, []), ELEMENTS, verify=True)
    expected = sorted(rows + more, key=lambda row: row[0].id)
    assert [dataset.id(i) for i in range(len(dataset))] == [frame.id for frame, _ in expected]
    assert dataset.energy.tolist() == [label.energy for _, label in expected]
    assert dataset.n_atoms.tolist() == [frame.n_atoms for frame, _ in expected]
    assert dataset.counts.tolist() == [[(frame.numbers == n).sum() for n in (1, 6, 8)] for frame, _ in expected]
    np.testing.assert_array_equal(dataset.max_force, [np.abs(label.forces).max() for _, label in expected])


def test_a_batch_holds_what_is_in_the_shards_in_the_order_that_was_asked_for(tmp_path):
    dataset = load_dataset(_write(tmp_path, _rows(8, seed=0), _rows(8, seed=1)), ELEMENTS, verify=True)
    rows = {frame.id: (frame, label) for i in (0, 1) for frame, label in open_shard(tmp_path / f"{i}.h5").rows()}
    indices = np.random.default_rng(2).permutation(16)[:11]
    batch = dataset.subset(np.arange(16)).gather(indices)
    for i, index in enumerate(indices):
        frame, label = rows[dataset.id(index)]
        atoms = slice(batch.offset[i], batch.offset[i + 1])
        for found, expected in (
            (batch.numbers[atoms], frame.numbers),
            (batch.positions[atoms], frame.positions),
            (batch.cell[i], frame.cell),
            (batch.pbc[i], frame.pbc),
            (batch.forces[atoms], label.forces),
            (batch.energy[i], label.energy),
            (batch.stress[i], label.stress),
        ):
            np.testing.assert_array_equal(found, expected)


def test_a_shard_that_is_not_read_ahead_says_the_same(tmp_path):
    rng = np.random.default_rng(0)
    large = Frame(np.full(30_000, 6), rng.normal(size=(30_000, 3)))
    dataset = load_dataset(_write(tmp_path, [(large, Label(0.0, large.positions))]), ELEMENTS, verify=True)
    assert dataset.files_GB == (tmp_path / "0.h5").stat().st_size / 1e9 > 1e-3  # large enough to be mapped
    dataset.read_no_more_than_asked()
    np.testing.assert_array_equal(dataset.gather(np.array([0])).positions, large.positions)


def test_shards_without_a_label_are_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match="no labeled frames to train on"):
        load_dataset(_write(tmp_path, [], []), ELEMENTS, verify=True)
    with pytest.raises(DatasetError, match="no labeled frames to train on"):
        load_dataset([], ELEMENTS, verify=True)


def test_a_foreign_element_is_refused_by_name(tmp_path):
    receipts = _write(tmp_path, [(Frame(np.array([1, 9]), np.eye(3)[:2]), Label(0.0, np.zeros((2, 3))))])
    with pytest.raises(DatasetError, match=r"0\.h5: frame \w+ holds F; the committee is for H, C, O"):
        load_dataset(receipts, ELEMENTS, verify=True)
