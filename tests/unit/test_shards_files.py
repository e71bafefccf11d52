"""Shards: what is written is read back to the bit, and what is not whole is refused by name."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards_examples import LEVEL, assert_same_frame, assert_same_label, example_rows, frames, labeled

from shards import (
    AlteredShardError,
    Frame,
    HalfWrittenShardError,
    Label,
    Level,
    MissingDatasetError,
    MissingShardError,
    MixedLevelsError,
    NotAShardError,
    Origin,
    ShardError,
    ShardVersionError,
    TruncatedShardError,
    WrongKindError,
    merge_labels,
    open_shard,
    write_frames,
    write_labels,
)
from shards.schema import COLUMNS, columns_of

DATA = Path(__file__).parent / "data"
SAME_FOLDER = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "labels.h5"
    write_labels(path, LEVEL, example_rows(7))
    return path


def alter(path: Path) -> h5py.File:
    path.chmod(0o644)
    return h5py.File(path, "r+", libver=("v110", "v110"))


@SAME_FOLDER
@given(rows=st.lists(labeled(), max_size=5))
def test_labels_come_back_to_the_bit(tmp_path: Path, rows: list[tuple[Frame, Label]]) -> None:
    receipt = write_labels(tmp_path / "a.h5", LEVEL, rows)
    shard = open_shard(tmp_path / "a.h5")
    assert shard.receipt() == receipt
    assert shard.level == LEVEL
    assert shard.ids == [frame.id for frame, _ in rows]
    for (got_frame, got_label), (frame, label) in zip(shard.rows(), rows, strict=True):
        assert_same_frame(got_frame, frame)
        assert_same_label(got_label, label)


@SAME_FOLDER
@given(rows=st.lists(frames(), max_size=5))
def test_frames_come_back_to_the_bit(tmp_path: Path, rows: list[Frame]) -> None:
    receipt = write_frames(tmp_path / "a.h5", rows)
    shard = open_shard(tmp_path / "a.h5")
    assert (receipt.n_frames, receipt.n_atoms) == (len(rows), sum(frame.n_atoms for frame in rows))
    assert shard.level is None
    for got, frame in zip(shard.frames(), rows, strict=True):
        assert_same_frame(got, frame)


def test_the_digest_depends_on_the_content_and_on_nothing_else(tmp_path: Path) -> None:
    rows = example_rows(3)
    digests = [write_labels(tmp_path / f"{i}.h5", LEVEL, rows).digest for i in range(2)]
    other_order = write_labels(tmp_path / "order.h5", LEVEL, rows[::-1]).digest
    other_level = write_labels(tmp_path / "level.h5", Level("emt", "3.30.0", LEVEL.settings), rows).digest
    assert digests[0] == digests[1]
    assert len({digests[0], other_order, other_level}) == 3


def test_any_hdf5_program_can_read_a_shard_and_its_units(shard: Path) -> None:
    rows = example_rows(7)
    with h5py.File(shard) as file:
        for column in columns_of("labels"):
            assert file[column.path].attrs["unit"] == column.unit
            assert file[column.path].chunks is None
        start, stop = file["offset"][2:4]
        np.testing.assert_array_equal(file["position_force"][start:stop, 3:], rows[2][1].forces)
        assert file["position_force"].attrs["unit"] == "A, eV/A"
        assert file["host"][0] == b"node-1"
        assert file.attrs["level"] == LEVEL.to_json()


def test_a_published_shard_is_read_only_and_leaves_nothing_beside_it(shard: Path) -> None:
    assert shard.stat().st_mode & 0o777 == 0o444
    assert os.listdir(shard.parent) == [shard.name]
    with pytest.raises(ValueError, match="read-only"):
        open_shard(shard).positions[0] = 0.0


@pytest.mark.parametrize("n_frames", [50, 4000])  # read whole, and through a memory map
def test_gather_agrees_with_reading_one_by_one(tmp_path: Path, n_frames: int) -> None:
    rows = (example_rows(50) * (n_frames // 50))[:n_frames]
    write_labels(tmp_path / "a.h5", LEVEL, rows)
    shard = open_shard(tmp_path / "a.h5")
    indices = np.random.default_rng(1).integers(0, n_frames, 30)
    batch = shard.gather(indices)
    for k, i in enumerate(indices):
        frame, label = rows[i]
        atoms = slice(batch.offset[k], batch.offset[k + 1])
        np.testing.assert_array_equal(batch.numbers[atoms], frame.numbers)
        np.testing.assert_array_equal(batch.positions[atoms], frame.positions)
        np.testing.assert_array_equal(batch.forces[atoms], label.forces)
        np.testing.assert_array_equal(batch.cell[k], frame.cell)
        np.testing.assert_array_equal(batch.pbc[k], frame.pbc)
        np.testing.assert_array_equal(batch.stress[k], label.stress)
        assert (batch.energy[k], batch.charge[k], batch.spin[k]) == (label.energy, frame.charge, frame.spin)
    assert batch.offset[-1] == len(batch.numbers)


def test_gather_of_nothing_is_empty_and_of_frames_has_no_labels(tmp_path: Path) -> None:
    write_frames(tmp_path / "a.h5", [frame for frame, _ in example_rows(3)])
    shard = open_shard(tmp_path / "a.h5")
    assert shard.gather([]).offset.tolist() == [0]
    assert np.isnan(shard.gather([1, 1]).forces).all()
    with pytest.raises(IndexError, match=r"indices 0\.\.3: must lie in 0\.\.2"):
        shard.gather([0, 3])


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 7, 11])
def test_parts_cover_every_frame_once_and_evenly(shard: Path, n_ranks: int) -> None:
    whole = open_shard(shard)
    parts = [whole.part(rank, n_ranks) for rank in range(n_ranks)]
    assert [i for part in parts for i in part] == list(range(len(whole)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("n_frames", [3, 4000])  # read whole, and through a memory map
def test_columns_are_aligned_for_gathers_without_copies(tmp_path: Path, n_frames: int) -> None:
    rows = (example_rows(50) * 80)[:n_frames]
    write_labels(tmp_path / "a.h5", LEVEL, rows)
    shard = open_shard(tmp_path / "a.h5")
    assert all(array.flags.aligned for array in (shard.positions, shard.energy, shard.offset, shard.cell))


def test_a_shard_cut_anywhere_is_refused(shard: Path, tmp_path: Path) -> None:
    content = shard.read_bytes()
    cut = tmp_path / "cut.h5"
    for n_bytes in [*range(64), *range(64, len(content), 97), len(content) - 1]:
        cut.write_bytes(content[:n_bytes])
        with pytest.raises(TruncatedShardError, match=r"cut\.h5: truncated: its end is missing.*delete it"):
            open_shard(cut, verify=False)


@pytest.mark.parametrize("path", [column.path for column in columns_of("labels")])
def test_a_flipped_byte_in_any_dataset_is_found(shard: Path, path: str) -> None:
    with h5py.File(shard) as file:
        place, size = file[path].id.get_offset(), file[path].id.get_storage_size()
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.seek(place + size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    with pytest.raises(AlteredShardError, match=rf"labels\.h5: dataset {path} (was altered|does not count)"):
        open_shard(shard)


def test_a_flipped_byte_anywhere_is_found_or_harmless(tmp_path: Path) -> None:
    rows = example_rows(2)
    write_labels(tmp_path / "a.h5", LEVEL, rows)
    content = (tmp_path / "a.h5").read_bytes()
    other, found = tmp_path / "b.h5", 0
    places = range(0, len(content), 89)
    for place in places:
        other.write_bytes(content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :])
        try:
            shard = open_shard(other)
        except ShardError:
            found += 1
            continue
        for (got_frame, got_label), (frame, label) in zip(shard.rows(), rows, strict=True):
            assert_same_frame(got_frame, frame)
            assert_same_label(got_label, label)
    assert found > len(places) / 4


@pytest.mark.parametrize("attribute", ["level", "digest"])
def test_an_altered_attribute_is_found(shard: Path, attribute: str) -> None:
    with alter(shard) as file:
        file.attrs[attribute] = str(file.attrs[attribute]).replace("e", "f")
    with pytest.raises(AlteredShardError, match=r"labels\.h5: attributes were altered"):
        open_shard(shard)


def test_an_altered_unit_is_found(shard: Path) -> None:
    with alter(shard) as file:
        file["energy"].attrs["unit"] = "hartree"
    with pytest.raises(AlteredShardError, match="attributes were altered"):
        open_shard(shard)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=r"nowhere\.h5: no such file"):
        open_shard(tmp_path / "nowhere.h5")


def test_a_half_written_file_is_named(shard: Path) -> None:
    temporary = shard.with_name("labels.h5.1234abcd.partial")
    shutil.copy(shard, temporary)
    with pytest.raises(HalfWrittenShardError, match=r"partial: half-written: its writer was killed"):
        open_shard(temporary)
    with alter(shard) as file:
        del file.attrs["digest"]
    with pytest.raises(HalfWrittenShardError, match="its digest is missing, which is written last"):
        open_shard(shard)


@pytest.mark.parametrize("version", [0, 3])
def test_another_version_is_named(shard: Path, version: int) -> None:
    with alter(shard) as file:
        file.attrs["version"] = version
    with pytest.raises(ShardVersionError, match=rf"labels\.h5: shard format version {version}, this program reads 1"):
        open_shard(shard)


def test_files_of_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("1\n\nH 0 0 0\n")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = 1
    for name, what in (("a.xyz", "not a shard, nor HDF5"), ("a.h5", "HDF5, but not a shard"), (".", "a folder")):
        with pytest.raises(NotAShardError, match=what):
            open_shard(tmp_path / name)


@pytest.mark.parametrize("path", [column.path for column in columns_of("labels")])
def test_a_missing_dataset_is_named(shard: Path, path: str) -> None:
    with alter(shard) as file:
        del file[path]
    with pytest.raises(MissingDatasetError, match=rf"labels\.h5: dataset {path} .* is missing"):
        open_shard(shard)


def test_a_dataset_of_another_shape_is_named(shard: Path) -> None:
    with alter(shard) as file:
        del file["energy"]
        file["energy"] = np.zeros(3, dtype=np.float32)
    with pytest.raises(AlteredShardError, match=r"dataset energy is <f4\[3\], the schema says <f8\[7\]"):
        open_shard(shard)


def test_a_repacked_dataset_is_named(shard: Path) -> None:
    with alter(shard) as file:
        attributes, energy = dict(file["energy"].attrs), file["energy"][()]
        del file["energy"]
        file.create_dataset("energy", data=energy, compression="gzip").attrs.update(attributes)
    with pytest.raises(AlteredShardError, match="dataset energy is not contiguous, it was repacked"):
        open_shard(shard)


def test_labels_of_a_shard_of_frames_are_refused(tmp_path: Path) -> None:
    write_frames(tmp_path / "frames.h5", [example_rows(1)[0][0]])
    shard = open_shard(tmp_path / "frames.h5")
    for ask in (lambda: shard.energy, lambda: shard.forces, lambda: shard.label(0), lambda: list(shard.rows())):
        with pytest.raises(WrongKindError, match=r"frames\.h5: a shard of frames has no labels: run the labeler"):
            ask()


def test_errors_survive_pickle(shard: Path) -> None:
    shard.chmod(0o644)
    shard.write_bytes(b"")
    with pytest.raises(TruncatedShardError) as caught:
        open_shard(shard)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is TruncatedShardError
    assert str(copy) == str(caught.value)


def test_values_outside_the_schema_are_named_and_leave_no_file(tmp_path: Path) -> None:
    frame = example_rows(1)[0][0]
    bad = [
        (Origin(seed=-1), "origin/seed: a value does not fit"),
        (Origin(seed=2**64), "origin/seed: a value does not fit"),
        (Origin(model="a\0b"), "origin/model: .* zero byte"),
    ]
    for origin, message in bad:
        with pytest.raises(ValueError, match=message):
            write_frames(
                tmp_path / "a.h5", [Frame(frame.numbers, frame.positions, frame.cell, frame.pbc, origin=origin)]
            )
    assert not list(tmp_path.iterdir())


def test_forces_of_another_frame_are_refused(tmp_path: Path) -> None:
    rows = example_rows(2)
    label = Label(0.0, np.zeros((9, 3)))
    with pytest.raises(ValueError, match=r"row 1: forces \(9, 3\) for positions"):
        write_labels(tmp_path / "a.h5", LEVEL, [rows[0], (rows[1][0], label)])
    assert not list(tmp_path.iterdir())


def test_merging_keeps_the_first_label_of_each_frame(tmp_path: Path) -> None:
    rows = example_rows(6)
    write_labels(tmp_path / "a.h5", LEVEL, rows[:4])
    write_labels(
        tmp_path / "b.h5", LEVEL, [(rows[0][0], rows[5][1])] if rows[0][0].n_atoms == rows[5][0].n_atoms else []
    )
    write_labels(tmp_path / "c.h5", LEVEL, rows[2:])
    receipt = merge_labels(tmp_path / "all.h5", [tmp_path / name for name in ("a.h5", "b.h5", "c.h5")])
    merged = open_shard(tmp_path / "all.h5")
    assert receipt.n_frames == 6
    assert merged.level == LEVEL
    for (got_frame, got_label), (frame, label) in zip(merged.rows(), rows, strict=True):
        assert_same_frame(got_frame, frame)
        assert_same_label(got_label, label)


def test_merging_different_levels_is_refused(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.h5", LEVEL, example_rows(1))
    write_labels(tmp_path / "b.h5", Level("emt", "other"), example_rows(1))
    with pytest.raises(MixedLevelsError, match=r"b\.h5: level of theory .* differs from .* of .*a\.h5"):
        merge_labels(tmp_path / "all.h5", [tmp_path / "a.h5", tmp_path / "b.h5"])
    assert not (tmp_path / "all.h5").exists()


WRITER = """
import sys
from pathlib import Path
from shards import write_labels
from shards_examples import LEVEL, example_rows
rows = example_rows(300)
print("ready", flush=True)
while True:
    write_labels(Path(sys.argv[1]), LEVEL, rows)
"""


def test_a_writer_killed_at_any_moment_publishes_whole_shards_or_none(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    digest = write_labels(tmp_path / "whole.h5", LEVEL, example_rows(300)).digest
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for delay_s in (0.0, 0.011, 0.037, 0.08):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent,
            env=environment,
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
        if path.exists():
            assert open_shard(path).digest == digest
        for left in tmp_path.glob("*.partial"):
            with pytest.raises(ShardError, match="half-written"):
                open_shard(left)
            left.unlink()


def old_rows() -> list[tuple[Frame, Label]]:
    """What tests/unit/data/shard-v1.h5 was written from."""
    first = Frame(
        numbers=np.array([13, 29]),
        positions=np.array([[0.0, 0.1, -0.2], [1.5, 1 / 3, 2.25]]),
        cell=np.array([[4.0, 0.0, 0.0], [0.5, 4.5, 0.0], [0.0, 0.25, 5.0]]),
        pbc=np.array([True, True, False]),
        charge=-1,
        spin=2,
        origin=Origin("walker", 2**64 - 1, "0123abcd", "force_max", 12.5, 0.01, 0.2),
    )
    second = Frame(numbers=np.array([8, 1, 1]), positions=np.arange(9.0).reshape(3, 3) / 7)
    stress = np.array([[1.0, 0.5, 0.25], [0.5, 2.0, 0.125], [0.25, 0.125, 3.0]]) / 160
    return [
        (first, Label(-7.5, np.array([[0.1, -0.2, 0.3], [-0.1, 0.2, -0.3]]), stress, -7.625, 61.5, "node-1", 17)),
        (second, Label(-2000.0625, np.full((3, 3), np.nan))),
    ]


def test_version_1_is_read_for_ever() -> None:
    """The file was written by the first release; it must never be made anew."""
    shard = open_shard(DATA / "shard-v1.h5")
    assert shard.digest == "3d5347db954825ec57b53d3a9535a65d1211eac5ad79a9be53d77267d490d6c9"
    assert shard.level == LEVEL
    for (got_frame, got_label), (frame, label) in zip(shard.rows(), old_rows(), strict=True):
        assert_same_frame(got_frame, frame)
        assert_same_label(got_label, label)


def test_the_schema_names_a_unit_and_a_meaning_for_every_number() -> None:
    assert all(column.meaning and (column.unit or column.dtype == "S") for column in COLUMNS)
    assert len({column.path for column in COLUMNS}) == len(COLUMNS)
