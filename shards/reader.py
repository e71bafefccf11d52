"""What does a shard say, and is it whole? Reads through a memory map; never writes."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.frame import Frame, Origin
from shards.label import Label, Level
from shards.outcome import Receipt
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

__all__ = [
    "AlteredShardError",
    "Batch",
    "HalfWrittenShardError",
    "MissingDatasetError",
    "MissingShardError",
    "NotAShardError",
    "Shard",
    "ShardError",
    "ShardVersionError",
    "TruncatedShardError",
    "WrongKindError",
    "gather_labels",
    "open_shard",
    "read_receipt",
]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_BYTES = 48  # what an HDF5 file says about itself before anything else, its length included
# Below this a shard is read whole: a memory map keeps a file descriptor, and a run has thousands of small shards.
_SMALLEST_MAP_BYTES = 1 << 20


class ShardError(ValueError):
    """A shard that cannot be used; the message names the file, what is wrong, and what to do."""


class MissingShardError(ShardError):
    """There is no such file."""


class NotAShardError(ShardError):
    """A file of another format."""


class HalfWrittenShardError(ShardError):
    """What a writer left behind that was killed."""


class TruncatedShardError(ShardError):
    """The end of the file is missing."""


class AlteredShardError(ShardError):
    """The content is not what was written."""


class ShardVersionError(ShardError):
    """A version of the format that this program cannot read."""


class MissingDatasetError(ShardError):
    """A column of the schema is not there."""


class WrongKindError(ShardError):
    """Labels were asked of a shard of frames."""


@dataclass(frozen=True)
class Batch:
    """Some frames of a shard, ragged: atoms of frame i are offset[i]:offset[i + 1].

    offset: (n_frames + 1,). numbers: (n_atoms,). positions: (n_atoms, 3), A. cell: (n_frames, 3, 3), A.
    pbc: (n_frames, 3). charge, spin: (n_frames,). Of a shard of labels also forces: (n_atoms, 3), eV/A;
    energy: (n_frames,), eV; stress: (n_frames, 3, 3), eV/A^3; of a shard of frames these are NaN.
    """

    offset: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    charge: NDArray[np.int64]
    spin: NDArray[np.int64]
    forces: NDArray[np.float64]
    energy: NDArray[np.float64]
    stress: NDArray[np.float64]


class Shard:
    """A published shard: random access to its frames and labels, and its columns as read-only arrays.

    kind: frames | labels. level: level of theory, None for frames. digest: sha256 of the content.
    offset: (n_frames + 1,). numbers: (n_atoms,). positions: (n_atoms, 3), A. cell: (n_frames, 3, 3), A.
    pbc: (n_frames, 3). charge, spin: (n_frames,).
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        level: Level | None,
        digest: str,
        buffer: bytes | mmap.mmap,
        columns: dict[str, NDArray[Any]],
    ) -> None:
        self.path = path
        self.kind = kind
        self.level = level
        self.digest = digest
        self._buffer = buffer
        self._columns = columns
        self._per_atom = columns["position_force" if kind == LABELS else "position"]
        self.offset: NDArray[np.int64] = columns["offset"]
        self.numbers: NDArray[np.uint8] = columns["number"]
        self.positions: NDArray[np.float64] = self._per_atom[:, :3]
        self.cell: NDArray[np.float64] = columns["cell"]
        self.pbc: NDArray[np.bool_] = columns["pbc"].view(np.bool_)
        self.charge: NDArray[np.int64] = columns["charge"]
        self.spin: NDArray[np.int64] = columns["spin"]

    def __len__(self) -> int:
        return len(self.offset) - 1

    def __repr__(self) -> str:
        return f"Shard({str(self.path)!r}, {self.kind}, {self.n_frames} frames, {self.n_atoms} atoms)"

    @property
    def n_frames(self) -> int:
        return len(self)

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def keys(self) -> NDArray[np.uint8]:
        """Frame ids as bytes, (n_frames, 16)."""
        return self._columns["id"]

    @property
    def ids(self) -> list[str]:
        """Frame ids, 32 hexadecimal digits each."""
        text = self.keys.tobytes().hex()
        return [text[i : i + 32] for i in range(0, len(text), 32)]

    @property
    def forces(self) -> NDArray[np.float64]:
        """(n_atoms, 3), eV/A, NaN where not computed. Raises WrongKindError for a shard of frames."""
        return self._label_column("position_force")[:, 3:]

    @property
    def energy(self) -> NDArray[np.float64]:
        """(n_frames,), eV. Raises WrongKindError for a shard of frames."""
        return self._label_column("energy")

    @property
    def stress(self) -> NDArray[np.float64]:
        """(n_frames, 3, 3), eV/A^3, NaN where not computed. Raises WrongKindError for a shard of frames."""
        return self._label_column("stress")

    @property
    def ingredients(self) -> dict[str, NDArray[np.float64]]:
        """What composite energies are put together from, by name: (n_frames,), eV. Empty where there are none."""
        start = f"{INGREDIENT}/"
        return {path.removeprefix(start): column for path, column in self._columns.items() if path.startswith(start)}

    @property
    def labels_level(self) -> Level:
        """The level of theory. Raises WrongKindError for a shard of frames."""
        self._label_column("energy")
        assert self.level is not None
        return self.level

    def receipt(self) -> Receipt:
        """The receipt that the writer handed out."""
        level = self.level.digest if self.level else ""
        return Receipt(str(self.path), self.kind, self.n_frames, self.n_atoms, len(self._buffer), self.digest, level)

    def read_no_more_than_asked(self) -> None:
        """Have the system not read ahead around a frame: for random reads from files that its memory does not hold."""
        if isinstance(self._buffer, mmap.mmap):
            self._buffer.madvise(mmap.MADV_RANDOM)

    def part(self, rank: int, n_ranks: int) -> range:
        """The contiguous slice of frames that belongs to `rank`; sizes differ by one at most."""
        if not 0 <= rank < n_ranks:
            raise ValueError(f"rank {rank} of {n_ranks}: must be in 0..{n_ranks - 1}")
        return range(len(self) * rank // n_ranks, len(self) * (rank + 1) // n_ranks)

    def frame(self, index: int) -> Frame:
        """Raises IndexError."""
        i = range(len(self))[index]
        atoms = slice(self.offset[i], self.offset[i + 1])
        return Frame(
            numbers=self.numbers[atoms].astype(np.int64),
            positions=self.positions[atoms],
            cell=self.cell[i],
            pbc=self.pbc[i],
            charge=int(self.charge[i]),
            spin=int(self.spin[i]),
            origin=self._origin(i),
        )

    def label(self, index: int) -> Label:
        """Raises IndexError, and WrongKindError for a shard of frames."""
        i = range(len(self))[index]
        return Label(
            energy=float(self.energy[i]),
            forces=self.forces[self.offset[i] : self.offset[i + 1]],
            stress=self.stress[i],
            energy_extrapolated=float(self._columns["energy_extrapolated"][i]),
            seconds=float(self._columns["seconds"][i]),
            host=self._columns["host"][i].decode(),
            scf_steps=int(self._columns["scf_steps"][i]),
            ingredients={name: float(column[i]) for name, column in self.ingredients.items()},
        )

    def frames(self) -> Iterator[Frame]:
        return map(self.frame, range(len(self)))

    def rows(self) -> Iterator[tuple[Frame, Label]]:
        """Raises WrongKindError for a shard of frames."""
        return ((self.frame(i), self.label(i)) for i in range(len(self)))

    def gather(self, indices: ArrayLike | Sequence[int]) -> Batch:
        """Copy the frames at `indices` (any order, repeats allowed) into one batch.

        Raises:
            IndexError: an index outside 0..n_frames - 1.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"{self.path}: indices {rows.min()}..{rows.max()}: must lie in 0..{len(self) - 1}")
        n_atoms = self.offset[rows + 1] - self.offset[rows]
        offset = np.concatenate([[0], np.cumsum(n_atoms)])
        atoms = np.repeat(self.offset[rows] - offset[:-1], n_atoms) + np.arange(offset[-1])
        per_atom = self._per_atom.take(atoms, axis=0)
        labeled = self.kind == LABELS
        return Batch(
            offset=offset,
            numbers=self.numbers.take(atoms),
            positions=per_atom[:, :3],
            cell=self.cell[rows],
            pbc=self.pbc[rows],
            charge=self.charge[rows],
            spin=self.spin[rows],
            forces=per_atom[:, 3:] if labeled else np.full_like(per_atom, np.nan),
            energy=self.energy[rows] if labeled else np.full(len(rows), np.nan),
            stress=self.stress[rows] if labeled else np.full((len(rows), 3, 3), np.nan),
        )

    def _label_column(self, path: str) -> NDArray[np.float64]:
        if self.kind != LABELS:
            raise WrongKindError(f"{self.path}: a shard of {self.kind} has no labels: run the labeler on it first")
        return self._columns[path]

    def _origin(self, i: int) -> Origin:
        def text(name: str) -> str:
            return str(self._columns[f"origin/{name}"][i].decode())

        def number(name: str) -> float:
            return float(self._columns[f"origin/{name}"][i])

        return Origin(
            kind=text("kind"),
            seed=int(self._columns["origin/seed"][i]),
            model=text("model"),
            trigger=text("trigger"),
            time_fs=number("time_fs"),
            energy_spread=number("energy_spread"),
            force_spread=number("force_spread"),
        )


def gather_labels(places: Sequence[tuple[Shard, int]]) -> Batch:
    """Copy labeled frames of many shards, each by its shard and its place there, into one batch.

    Raises:
        WrongKindError: a shard of frames.
    """
    atoms = [(shard, slice(shard.offset[i], shard.offset[i + 1])) for shard, i in places]
    per_atom = np.concatenate([shard._label_column("position_force")[part] for shard, part in atoms])
    return Batch(
        offset=np.cumsum([0, *(part.stop - part.start for _, part in atoms)]),
        numbers=np.concatenate([shard.numbers[part] for shard, part in atoms]),
        positions=per_atom[:, :3],
        cell=np.array([shard.cell[i] for shard, i in places]),
        pbc=np.array([shard.pbc[i] for shard, i in places]),
        charge=np.array([shard.charge[i] for shard, i in places]),
        spin=np.array([shard.spin[i] for shard, i in places]),
        forces=per_atom[:, 3:],
        energy=np.array([shard.energy[i] for shard, i in places]),
        stress=np.array([shard.stress[i] for shard, i in places]),
    )


@dataclass(frozen=True)
class _Place:
    """Where one dataset lies in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int | None  # None when it holds nothing
    unit: str
    checksum: str


@dataclass(frozen=True)
class _Header:
    """All that HDF5 is asked for; the rest is read through the map."""

    kind: str
    version: int
    level: str
    digest: str
    n_frames: int
    n_atoms: int
    places: dict[str, _Place]


def open_shard(path: Path, verify: bool = True) -> Shard:
    """Open a shard for reading. With `verify` every byte of data is held against its checksum first.

    Raises:
        ShardError: MissingShardError, NotAShardError, HalfWrittenShardError, TruncatedShardError,
            AlteredShardError, ShardVersionError or MissingDatasetError.
    """
    path = Path(path)
    header = _read_header(path)
    buffer = _map(path)
    columns = {name: _column(path, buffer, name, place) for name, place in header.places.items()}
    _check_offset(path, header, columns["offset"])
    if verify:
        _verify(path, header, columns)
    level = Level.from_json(header.level) if header.level else None
    return Shard(path, header.kind, level, header.digest, buffer, columns)


def read_receipt(path: Path) -> Receipt:
    """Read the receipt that the writer of a shard handed out. Its data are not looked at.

    Raises:
        ShardError: as open_shard, but for missing and altered data.
    """
    path = Path(path)
    with _open_file(path) as file:
        counts = {name: int(file.attrs[name]) for name in ("n_frames", "n_atoms")}
        kind, digest, level = (str(file.attrs.get(name, "")) for name in ("kind", "digest", "level_digest"))
    return Receipt(path=str(path), kind=kind, **counts, n_bytes=path.stat().st_size, digest=digest, level=level)


def _read_header(path: Path) -> _Header:
    with _open_file(path) as file:
        return _parse_header(path, file)


@contextmanager
def _open_file(path: Path) -> Iterator[h5py.File]:
    _check_file(path)
    try:
        # A shard never changes, so it needs no lock; locks fail on some network file systems.
        with h5py.File(path, "r", locking=False) as file:
            _check_version(path, file)
            yield file
    except ShardError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if "truncated file" in str(error):
            raise TruncatedShardError(_truncated(path)) from error
        raise AlteredShardError(f"{path}: HDF5 cannot read it, it was altered: {error}; {_RESTORE}") from error


_RESTORE = "delete it and restore it from a copy, or make it again"


def _truncated(path: Path) -> str:
    return f"{path}: truncated: its end is missing after {path.stat().st_size} bytes; {_RESTORE}"


def _check_file(path: Path) -> None:
    if path.name.endswith(PARTIAL_SUFFIX):
        raise HalfWrittenShardError(f"{path}: half-written: its writer was killed before publishing it; delete it")
    try:
        with path.open("rb") as file:
            start = file.read(len(_SIGNATURE))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingShardError(f"{path}: no such file; check the path, or make the shard again") from None
    except IsADirectoryError:
        raise NotAShardError(f"{path}: a folder, not a shard; name the .h5 file in it") from None
    if start.startswith(_SIGNATURE[: len(start)]) and path.stat().st_size < _SUPERBLOCK_BYTES:
        raise TruncatedShardError(_truncated(path))
    if start != _SIGNATURE:
        raise NotAShardError(f"{path}: not a shard, nor HDF5; bring other formats in with `smelt convert`")


def _check_version(path: Path, file: h5py.File) -> None:
    if file.attrs.get("format") != FORMAT:
        raise NotAShardError(f"{path}: HDF5, but not a shard; bring other formats in with `smelt convert`")
    version = int(file.attrs["version"])
    if not 1 <= version <= VERSION:
        raise ShardVersionError(
            f"{path}: shard format version {version}, this program reads 1 to {VERSION}; use the release that wrote it"
        )
    if "digest" not in file.attrs:
        raise HalfWrittenShardError(f"{path}: half-written: its digest is missing, which is written last; delete it")


def _parse_header(path: Path, file: h5py.File) -> _Header:
    kind = str(file.attrs["kind"])
    if kind not in (FRAMES, LABELS):
        raise AlteredShardError(f"{path}: kind {kind!r}: must be {FRAMES} or {LABELS}; {_RESTORE}")
    n_frames, n_atoms = int(file.attrs["n_frames"]), int(file.attrs["n_atoms"])
    columns = columns_of(kind, file.get(INGREDIENT, ()))
    return _Header(
        kind=kind,
        version=int(file.attrs["version"]),
        level=str(file.attrs["level"]) if kind == LABELS else "",
        digest=str(file.attrs["digest"]),
        n_frames=n_frames,
        n_atoms=n_atoms,
        places={column.path: _place(path, file, column, n_frames, n_atoms) for column in columns},
    )


def _place(path: Path, file: h5py.File, column: Column, n_frames: int, n_atoms: int) -> _Place:
    try:
        # HDF5's own calls: h5py's comfort costs more than all the rest of opening a shard of one label.
        dataset = h5py.h5d.open(file.id, column.path.encode())
    except KeyError:
        raise MissingDatasetError(f"{path}: dataset {column.path} ({column.meaning}) is missing; {_RESTORE}") from None
    expected = column.dimensions(n_frames, n_atoms)
    if dataset.shape != expected or not (dataset.dtype.str == column.dtype or dataset.dtype.kind == column.dtype):
        raise AlteredShardError(
            f"{path}: dataset {column.path} is {dataset.dtype.str}{list(dataset.shape)}, the schema says"
            f" {column.dtype}{list(expected)}; {_RESTORE}"
        )
    offset = dataset.get_offset()
    if offset is None and 0 not in expected:
        raise AlteredShardError(f"{path}: dataset {column.path} is not contiguous, it was repacked; {_RESTORE}")
    unit, checksum = _text(dataset, "unit"), _text(dataset, "sha256")
    return _Place(dataset.dtype, dataset.shape, None if 0 in expected else offset, unit, checksum)


def _text(dataset: Any, name: str) -> str:
    """Raises KeyError, TypeError: it has none, or not of text."""
    attribute = h5py.h5a.open(dataset, name.encode())
    value = np.empty((), attribute.dtype)
    attribute.read(value)
    return bytes(value[()]).decode()


def _map(path: Path) -> bytes | mmap.mmap:
    with path.open("rb") as file:
        if path.stat().st_size < _SMALLEST_MAP_BYTES:
            return file.read()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _column(path: Path, buffer: bytes | mmap.mmap, name: str, place: _Place) -> NDArray[Any]:
    if place.offset is None:
        return np.empty(place.shape, place.dtype)
    n_items = int(np.prod(place.shape))
    if place.offset + n_items * place.dtype.itemsize > len(buffer):
        raise AlteredShardError(f"{path}: dataset {name} lies beyond the end of the file; {_RESTORE}")
    return np.frombuffer(buffer, place.dtype, n_items, place.offset).reshape(place.shape)


def _check_offset(path: Path, header: _Header, offset: NDArray[np.int64]) -> None:
    if offset[0] != 0 or offset[-1] != header.n_atoms or (np.diff(offset) < 1).any():
        raise AlteredShardError(f"{path}: dataset offset does not count {header.n_atoms} atoms; {_RESTORE}")


def _verify(path: Path, header: _Header, columns: dict[str, NDArray[Any]]) -> None:
    for name, place in header.places.items():
        if data_digest(columns[name]) != place.checksum:
            raise AlteredShardError(f"{path}: dataset {name} was altered: its sha256 does not fit; {_RESTORE}")
    datasets = {
        name: (f"{place.dtype.str}{list(place.shape)}", place.unit, place.checksum)
        for name, place in header.places.items()
    }
    if content_digest(header.kind, header.version, header.level, datasets) != header.digest:
        raise AlteredShardError(f"{path}: attributes were altered: the digest of the content does not fit; {_RESTORE}")
