"""How does data come in from other formats, and go out to them? File to file, all or nothing.

| name | format |
| --- | --- |
| *.h5, *.hdf5 | a shard; as a source also the HDF5 layout of the public ANI data sets |
| *.ani.h5 | that layout, as a destination |
| *.jsonl | a manifest, as a source: all of its shards, one after the other |
| *.xyz, *.extxyz | extended XYZ, every digit kept |
| *.db | ASE database |
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
from numpy.typing import NDArray

from shards.ani import read_ani, write_ani
from shards.atoms import USUAL, ConversionError, Fields, from_atoms, label_from_atoms, level_from_atoms, to_atoms
from shards.frame import Frame
from shards.label import Label, Level
from shards.manifest import Manifest
from shards.outcome import Receipt
from shards.reader import Shard, open_shard
from shards.schema import FORMAT, PARTIAL_SUFFIX
from shards.writer import MixedLevelsError, sync, write_frames, write_labels

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "Conversion",
    "ConversionError",
    "Fields",
    "convert",
    "from_atoms",
    "label_from_atoms",
    "level_from_atoms",
    "to_atoms",
]

_FORMATS = ".h5 (shard), .ani.h5, .xyz, .extxyz, .db"


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote. receipts: of shards only."""

    paths: tuple[Path, ...]
    n_frames: int
    n_skipped: int
    receipts: tuple[Receipt, ...] = ()


@dataclass(frozen=True)
class _Row:
    """One frame on its way; `where` names its file and place for messages."""

    where: str
    frame: Frame
    label: Label | None
    level: Level | None


def convert(
    source: Path,
    dest: Path,
    fields: Fields = USUAL,
    *,
    level: Level | None = None,
    frames_only: bool = False,
    skip_unlabeled: bool = False,
    frames_per_shard: int = 100_000,
) -> Conversion:
    """Convert a file; nothing appears at `dest` unless all of `source` could be read.

    Either every frame has a label or none has, unless `frames_only` (labels are not looked at) or `skip_unlabeled`
    (frames without an energy are left behind, and counted). More frames than `frames_per_shard` become dest-0000.h5,
    dest-0001.h5 and so on.

    fields: names and units in the source. level: level of theory of a source that does not say it; None: one with
    the engine `external` and the name of the energy.

    Raises:
        ConversionError: a source that cannot be read, a frame that makes no sense, a `dest` that is there already.
        ShardError, ManifestError: a shard or a manifest that cannot be read; MixedLevelsError for labels of different
            levels of theory.
    """
    source, dest = Path(source), Path(dest)
    write = _writer(dest, frames_per_shard)
    _refuse_existing(dest)
    external = level or Level("external", "", {"energy": fields.energy})
    count = _Count()
    rows = _agreeing(_read(source, fields, external, frames_only), fields, frames_only, skip_unlabeled, count)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f"{dest.name}.", suffix=PARTIAL_SUFFIX) as folder:
        receipts = write(Path(folder) / dest.name, rows)
        if count.frames == 0:
            raise ConversionError(f"{source}: no frame to convert, {count.skipped} without an energy were left out")
        paths = _publish(Path(folder), dest.parent)
    moved = tuple(replace(receipt, path=str(dest.parent / Path(receipt.path).name)) for receipt in receipts)
    return Conversion(paths, count.frames, count.skipped, moved)


@dataclass
class _Count:
    frames: int = 0
    skipped: int = 0


def _agreeing(
    rows: Iterator[_Row], fields: Fields, frames_only: bool, skip_unlabeled: bool, count: _Count
) -> Iterator[_Row]:
    """Pass on rows that agree on whether they have labels."""
    labeled = bool(fields.energy or skip_unlabeled) and not frames_only
    for i, row in enumerate(rows):
        if row.label is None and skip_unlabeled and labeled:
            count.skipped += 1
            continue
        labeled = labeled or (i == 0 and row.label is not None)
        if labeled != (row.label is not None):
            says = "has no" if labeled else "is the first with an"
            raise ConversionError(
                f"{row.where}: {says} energy {fields.energy}: ask for frames only, or to skip those without a label"
            )
        count.frames += 1
        yield row


def _refuse_existing(dest: Path) -> None:
    if dest.exists():
        raise ConversionError(f"{dest}: is there already: move it away or choose another name")


def _publish(folder: Path, dest: Path) -> tuple[Path, ...]:
    """Move what was written to its place."""
    paths = {path: dest / path.name for path in sorted(folder.iterdir())}
    for path, place in paths.items():
        _refuse_existing(place)
        sync(path)
    for path, place in paths.items():
        os.replace(path, place)
    sync(dest)
    return tuple(paths.values())


def _read(source: Path, fields: Fields, external: Level, frames_only: bool) -> Iterator[_Row]:
    """Choose the reader.

    Raises:
        ConversionError: no such file, or a name that says no known format.
    """
    if not source.is_file():
        raise ConversionError(f"{source}: no such file")
    if source.suffix in (".xyz", ".extxyz"):
        return _read_atoms(_xyz_frames(source), fields, external, frames_only)
    if source.suffix == ".db":
        return _read_atoms(_db_rows(source), fields, external, frames_only)
    if source.suffix == ".jsonl":
        return _read_shards(Manifest(source).shards(), frames_only)
    if source.suffix not in (".h5", ".hdf5"):
        raise ConversionError(
            f"{source}: unknown format {source.suffix!r}: must be one of {_FORMATS}, .jsonl (manifest)"
        )
    if _is_shard(source):
        return _read_shards([open_shard(source)], frames_only)
    return _read_ani(source, fields, external, frames_only)


def _is_shard(path: Path) -> bool:
    """Raises ConversionError when HDF5 cannot open the file; a damaged shard gets its message from `open_shard`."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return bool(file.attrs.get("format") == FORMAT)
    except OSError as error:
        raise ConversionError(f"{path}: HDF5 cannot read it: {error}; copy the file again") from error


def _read_shards(shards: Iterable[Shard], frames_only: bool) -> Iterator[_Row]:
    for shard in shards:
        level = None if frames_only else shard.level
        for i, frame in enumerate(shard.frames()):
            yield _Row(f"{shard.path}: frame {i}", frame, shard.label(i) if level else None, level)


def _read_ani(source: Path, fields: Fields, external: Level, frames_only: bool) -> Iterator[_Row]:
    fields = replace(fields, energy_unit=fields.energy_unit or "hartree")
    for where, frame, label in read_ani(source, fields, frames_only):
        yield _Row(where, frame, label, external if label else None)


def _read_atoms(
    places: Iterator[tuple[str, Atoms]], fields: Fields, external: Level, frames_only: bool
) -> Iterator[_Row]:
    for where, atoms in places:
        try:
            frame = from_atoms(atoms)
            label = None if frames_only else label_from_atoms(atoms, fields)
            level = level_from_atoms(atoms) or external
        except (ValueError, TypeError, KeyError) as error:
            raise ConversionError(f"{where}: {error}") from error
        if fields.length_unit != "A":
            frame = replace(frame, positions=frame.positions * fields.length_A, cell=frame.cell * fields.length_A)
        if label is None and not (fields.energy or frames_only):
            _refuse_unknown_energy(where, atoms)
        yield _Row(where, frame, label, level if label else None)


def _refuse_unknown_energy(where: str, atoms: Atoms) -> None:
    """An energy under another name must not be lost in silence."""
    found = sorted(name for name in atoms.info if "energy" in name.lower())
    if found:
        raise ConversionError(
            f"{where}: no energy under the usual names: name one of {', '.join(found)}, or ask for frames only"
        )


def _xyz_frames(source: Path) -> Iterator[tuple[str, Atoms]]:
    """Cut the file into frames and let ASE read each.

    ASE's reader of whole files stops without a word at an empty line between frames.
    """
    import ase.io

    with source.open(encoding="utf-8", errors="replace") as lines:
        for i, text in enumerate(_xyz_texts(source, lines)):
            where = f"{source}: frame {i}"
            try:
                atoms = ase.io.read(io.StringIO(text), index=0, format="extxyz")
            except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
                raise ConversionError(f"{where}: ASE cannot read it: {error}") from error
            assert not isinstance(atoms, list)
            yield where, atoms


def _xyz_texts(source: Path, lines: Iterator[str]) -> Iterator[str]:
    n_frames = 0
    for header in lines:
        if not header.strip():
            continue
        where = f"{source}: frame {n_frames}"
        if not header.strip().isdecimal():
            raise ConversionError(f"{where}: expected the number of atoms, found {header.strip()[:40]!r}")
        body = list(islice(lines, int(header) + 1))
        if len(body) != int(header) + 1:
            raise ConversionError(f"{where}: the file ends after {max(len(body) - 1, 0)} of {int(header)} atoms")
        n_frames += 1
        yield "".join([header, *body])


def _db_rows(source: Path) -> Iterator[tuple[str, Atoms]]:
    import ase.db

    try:
        with ase.db.connect(source, type="db", use_lock_file=False) as database:
            for row in database.select():
                atoms = row.toatoms()
                atoms.info = {**row.data, **row.key_value_pairs}
                yield f"{source}: row {row.id}", atoms
    except (sqlite3.DatabaseError, OSError, ValueError, KeyError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{source}: not an ASE database, or damaged: {error}") from error


def _writer(dest: Path, frames_per_shard: int) -> Callable[[Path, Iterator[_Row]], tuple[Receipt, ...]]:
    """Choose the writer.

    Raises:
        ConversionError: a name that says no known format.
    """
    if dest.name.endswith(".ani.h5"):
        return _write_ani
    if dest.suffix in (".h5", ".hdf5"):
        return partial(_write_shards, frames_per_shard=frames_per_shard)
    if dest.suffix in (".xyz", ".extxyz"):
        return _write_xyz
    if dest.suffix == ".db":
        return _write_db
    raise ConversionError(f"{dest}: unknown format {dest.suffix!r}: must be one of {_FORMATS}")


def _write_shards(path: Path, rows: Iterator[_Row], frames_per_shard: int) -> tuple[Receipt, ...]:
    receipts: list[Receipt] = []
    while batch := list(islice(rows, frames_per_shard)):
        receipts.append(_write_shard(path.with_name(f"{path.stem}-{len(receipts):04d}{path.suffix}"), batch))
    if len(receipts) != 1:
        return tuple(receipts)
    os.rename(receipts[0].path, path)
    return (replace(receipts[0], path=str(path)),)


def _write_shard(path: Path, rows: list[_Row]) -> Receipt:
    levels = {row.level for row in rows}
    if len(levels) > 1:
        other = next(row for row in rows if row.level != rows[0].level)
        raise MixedLevelsError(
            f"{other.where}: its level of theory differs from that of {rows[0].where}: split the source by level"
        )
    level = levels.pop()
    if level is None:
        return write_frames(path, [row.frame for row in rows])
    return write_labels(path, level, [(row.frame, row.label) for row in rows if row.label is not None])


def _write_ani(path: Path, rows: Iterator[_Row]) -> tuple[Receipt, ...]:
    write_ani(path, ((row.frame, row.label) for row in rows))
    return ()


def _write_db(path: Path, rows: Iterator[_Row]) -> tuple[Receipt, ...]:
    import ase.db

    with ase.db.connect(path, type="db", use_lock_file=False) as database:
        for row in rows:
            atoms = to_atoms(row.frame, row.label, row.level)
            database.write(atoms, data=atoms.info)
    return ()


def _write_xyz(path: Path, rows: Iterator[_Row]) -> tuple[Receipt, ...]:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_xyz_text(row) for row in rows)
    return ()


def _xyz_text(row: _Row) -> str:
    """One frame as extended XYZ. ASE's writer keeps eight decimals; here a number is read back as it was."""
    atoms = to_atoms(row.frame, row.label, row.level)
    results = atoms.calc.results if atoms.calc else {}
    items: dict[str, str] = {"pbc": " ".join("FT"[int(axis)] for axis in row.frame.pbc)}
    if row.frame.cell.any():
        items["Lattice"] = _digits(row.frame.cell)
    columns = [row.frame.positions]
    properties = "species:S:1:pos:R:3"
    if "forces" in results:
        properties += ":forces:R:3"
        columns.append(results["forces"])
    items["Properties"] = properties
    items |= {name: repr(float(results[name])) for name in ("energy", "free_energy") if name in results}
    if row.label is not None and row.label.has_stress:
        items["stress"] = _digits(row.label.stress)
    items |= {"charge": str(row.frame.charge), "spin": str(row.frame.spin)}
    items["smelt"] = ("_JSON " + json.dumps(atoms.info["smelt"])).replace("\\", "\\\\").replace('"', '\\"')
    lines = [f"{symbol} {_digits(values)}" for symbol, values in zip(atoms.symbols, np.hstack(columns), strict=True)]
    comment = " ".join(f'{key}="{value}"' for key, value in items.items())
    return "\n".join([str(len(lines)), comment, *lines, ""])


def _digits(array: NDArray[np.float64]) -> str:
    return " ".join(map(repr, array.reshape(-1).tolist()))
