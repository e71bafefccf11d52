"""How does a shard come into being? All at once: written beside, synced, renamed, and never changed after."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from shards.frame import Frame
from shards.label import Label, Level
from shards.outcome import Receipt
from shards.reader import ShardError, open_shard
from shards.schema import (
    FORMAT,
    FRAMES,
    INGREDIENT,
    LABELS,
    PARTIAL_SUFFIX,
    VERSION,
    Column,
    columns_of,
    content_digest,
    data_digest,
)

__all__ = ["MixedLevelsError", "merge_labels", "sync", "write_frames", "write_labels"]


class MixedLevelsError(ShardError):
    """Labels of different levels of theory in one shard."""


def write_frames(path: Path, frames: Sequence[Frame]) -> Receipt:
    """Publish a shard of frames at `path`; a shard that is there already is replaced as a whole.

    Raises:
        ValueError: a value that the schema cannot hold.
    """
    columns = _frame_columns(frames)
    columns["position"] = _concatenate([frame.positions for frame in frames], 3)
    return _publish(Path(path), FRAMES, "", columns)


def write_labels(path: Path, level: Level, rows: Sequence[tuple[Frame, Label]]) -> Receipt:
    """Publish a shard of labeled frames, all of one level of theory, at `path`.

    Raises:
        ValueError: forces that do not fit their frame, labels with different ingredients, or a value that the schema
            cannot hold.
    """
    ingredients = sorted(rows[0][1].ingredients) if rows else []
    for row, (frame, label) in enumerate(rows):
        if label.forces.shape != frame.positions.shape:
            raise ValueError(f"row {row}: forces {label.forces.shape} for positions {frame.positions.shape}")
        if sorted(label.ingredients) != ingredients:
            raise ValueError(f"row {row}: ingredients {sorted(label.ingredients)}, row 0 has {ingredients}")
    columns = _frame_columns([frame for frame, _ in rows])
    columns |= _label_columns([label for _, label in rows])
    columns |= {f"{INGREDIENT}/{name}": [label.ingredients[name] for _, label in rows] for name in ingredients}
    columns["position_force"] = _concatenate([np.hstack([f.positions, y.forces]) for f, y in rows], 6)
    return _publish(Path(path), LABELS, level.to_json(), columns, ingredients)


def merge_labels(path: Path, shards: Sequence[Path]) -> Receipt:
    """Publish one shard with the labels of many; of a frame that occurs again only the first label is kept.

    Raises:
        ShardError: a shard that cannot be used. MixedLevelsError: shards of different levels of theory.
        ValueError: no shard given.
    """
    if not shards:
        raise ValueError(f"{path}: nothing to merge: name at least one shard of labels")
    rows: dict[str, tuple[Frame, Label]] = {}
    level: Level | None = None
    for source in shards:
        shard = open_shard(source)
        level = level or shard.labels_level
        if shard.labels_level != level:
            raise MixedLevelsError(
                f"{source}: level of theory {shard.labels_level.digest} differs from {level.digest} of {shards[0]}:"
                " merge each level into a shard of its own"
            )
        for frame_id, row in zip(shard.ids, shard.rows(), strict=True):
            rows.setdefault(frame_id, row)
    assert level is not None
    return write_labels(path, level, list(rows.values()))


def _frame_columns(frames: Sequence[Frame]) -> dict[str, Any]:
    """Columns of both kinds of shard, by path; only the positions are missing."""
    origins = [frame.origin for frame in frames]
    columns: dict[str, Any] = {
        "offset": np.cumsum([0, *(frame.n_atoms for frame in frames)]),
        "id": np.frombuffer(bytes.fromhex("".join(frame.id for frame in frames)), np.uint8).reshape(-1, 16),
        "number": np.concatenate([frame.numbers for frame in frames]) if frames else [],
        "cell": [frame.cell for frame in frames],
        "pbc": [frame.pbc for frame in frames],
        "charge": [frame.charge for frame in frames],
        "spin": [frame.spin for frame in frames],
    }
    for name in ("kind", "seed", "model", "trigger", "time_fs", "energy_spread", "force_spread"):
        columns[f"origin/{name}"] = [getattr(origin, name) for origin in origins]
    return columns


def _label_columns(labels: Sequence[Label]) -> dict[str, Any]:
    names = ("energy", "stress", "energy_extrapolated", "seconds", "host", "scf_steps")
    return {name: [getattr(label, name) for label in labels] for name in names}


def _concatenate(arrays: Sequence[NDArray[np.float64]], width: int) -> NDArray[np.float64]:
    return np.concatenate(arrays) if arrays else np.empty((0, width))


def _publish(path: Path, kind: str, level: str, values: dict[str, Any], ingredients: Sequence[str] = ()) -> Receipt:
    """Bring `values` into the form of the schema, write them, and put the file in its place."""
    n_frames, n_atoms = len(values["offset"]) - 1, int(values["offset"][-1])
    columns = {
        column: _encode(column, values[column.path]).reshape(column.dimensions(n_frames, n_atoms))
        for column in columns_of(kind, ingredients)
    }
    version = VERSION if ingredients else 1
    with _published(path) as partial:
        digest = _write(partial, kind, version, level, n_frames, n_atoms, columns)
    return Receipt(
        path=str(path),
        kind=kind,
        n_frames=n_frames,
        n_atoms=n_atoms,
        n_bytes=path.stat().st_size,
        digest=digest,
        level=Level.from_json(level).digest if level else "",
    )


def _encode(column: Column, values: Any) -> NDArray[Any]:
    """Raises ValueError when the column cannot hold a value."""
    try:
        if column.dtype == "S":
            text = [str(value).encode() for value in values]
            if any(b"\0" in value for value in text):
                raise ValueError("text must not contain a zero byte")
            return np.array(text, dtype=f"S{max([1, *map(len, text)])}")
        return np.array(values, dtype=column.dtype)
    except (OverflowError, ValueError, TypeError) as error:
        raise ValueError(f"{column.path}: a value does not fit {column.dtype} ({column.meaning}): {error}") from error


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """Give a name to write under; on success sync that file and move it to `path`, otherwise remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        yield partial
        sync(partial)
        partial.chmod(0o444)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    path: Path,
    kind: str,
    version: int,
    level: str,
    n_frames: int,
    n_atoms: int,
    columns: dict[Column, NDArray[Any]],
) -> str:
    """Write the HDF5 file and return its digest, which is written last: a file without it is not finished."""
    datasets: dict[str, tuple[str, str, str]] = {}
    # From v110 on HDF5 keeps checksums over its own metadata. No lock: nobody else knows this name yet. Aligned,
    # because numpy copies the whole of a column that is not before it gathers a single row from it.
    options = {"libver": ("v110", "v110"), "locking": False, "alignment_threshold": 1, "alignment_interval": 64}
    with h5py.File(path, "w", **options) as file:
        file.attrs["format"] = FORMAT
        file.attrs["version"] = version
        file.attrs["kind"] = kind
        file.attrs["n_frames"] = n_frames
        file.attrs["n_atoms"] = n_atoms
        if level:
            file.attrs["level"] = level
            file.attrs["level_digest"] = Level.from_json(level).digest
        for column, checksum in _write_columns(file, columns).items():
            array = columns[column]
            datasets[column.path] = (f"{array.dtype.str}{list(array.shape)}", column.unit, checksum)
        digest = content_digest(kind, version, level, datasets)
        file.flush()
        file.attrs["digest"] = digest
    return digest


def _write_columns(file: h5py.File, columns: dict[Column, NDArray[Any]]) -> dict[Column, str]:
    """Checksums. By HDF5's own calls: h5py's comfort costs more than all else about a shard of one label."""
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    form = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    form.set_obj_track_times(False)
    text = h5py.string_dtype()
    text_type, scalar = h5py.h5t.py_create(text, logical=True), h5py.h5s.create(h5py.h5s.SCALAR)
    checksums = {}
    for column, array in columns.items():
        kind, space = h5py.h5t.py_create(array.dtype, logical=True), h5py.h5s.create_simple(array.shape)
        dataset = h5py.h5d.create(file.id, column.path.encode(), kind, space, dcpl=form, lcpl=links)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, array)
        checksums[column] = data_digest(array)
        for name, value in (("unit", column.unit), ("meaning", column.meaning), ("sha256", checksums[column])):
            h5py.h5a.create(dataset, name.encode(), text_type, scalar).write(np.array(value, dtype=text))
    return checksums
