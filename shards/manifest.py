"""Which shards make up a dataset? An append-only list of receipts; holds no data itself."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

from shards.outcome import Receipt
from shards.reader import AlteredShardError, MissingShardError, Shard, open_shard
from shards.writer import sync

__all__ = ["Manifest", "ManifestError"]


class ManifestError(ValueError):
    """A manifest that cannot be read; the message names the file and the line."""


class Manifest:
    """A dataset: one receipt per line, as JSON, with paths relative to the manifest's folder.

    A line counts once it ends in a newline. What a crash in the middle of an append leaves behind it is passed
    over by readers and cut off by the next append.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def append(self, receipt: Receipt) -> bool:
        """Add a receipt, on disk when this returns; False when its content is already in the list.

        Raises:
            MissingShardError, AlteredShardError: the file is not there, or not of the receipt's size.
            ManifestError: a line that is not a receipt.
        """
        return self.append_all([receipt]) == 1

    def append_all(self, receipts: Sequence[Receipt]) -> int:
        """Add receipts at once, all on disk when this returns; how many of them were not in the list already.

        Raises:
            As `append` does; then none has been added.
        """
        for receipt in receipts:
            _check_size(receipt)
        with self._locked() as file:
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            known = {receipt.digest for receipt in self._parse(whole)}
            added = {receipt.digest: receipt for receipt in receipts if receipt.digest not in known}
            if added:
                os.ftruncate(file.fileno(), len(whole))
                file.write("".join(map(self._line, added.values())).encode())
                file.flush()
                os.fsync(file.fileno())
        if added and not content:
            sync(self.path.parent)
        return len(added)

    def receipts(self) -> tuple[Receipt, ...]:
        """All receipts, with paths that can be opened; none when there is no manifest yet.

        Raises:
            ManifestError: a line that is not a receipt.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        return tuple(
            replace(receipt, path=str(self.path.parent / receipt.path))
            for receipt in self._parse(content[: content.rfind(b"\n") + 1])
        )

    @property
    def n_frames(self) -> int:
        return sum(receipt.n_frames for receipt in self.receipts())

    def shards(self, verify: bool = True) -> Iterator[Shard]:
        """Open the shards one after the other. Without `verify` only their recorded digests are compared.

        Raises:
            ShardError: a shard that cannot be used; AlteredShardError when another one stands in its place.
        """
        for receipt in self.receipts():
            shard = open_shard(Path(receipt.path), verify=verify)
            if shard.digest != receipt.digest:
                raise AlteredShardError(
                    f"{receipt.path}: not the shard that {self.path} lists (digest {shard.digest[:16]}, expected"
                    f" {receipt.digest[:16]}): restore the file, or take its line out of the manifest"
                )
            yield shard

    def _line(self, receipt: Receipt) -> str:
        relative = os.path.relpath(Path(receipt.path).absolute(), self.path.parent.absolute())
        return json.dumps(asdict(replace(receipt, path=Path(relative).as_posix()))) + "\n"

    def _parse(self, content: bytes) -> list[Receipt]:
        receipts = []
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                receipts.append(Receipt(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ManifestError(
                    f"{self.path}:{number}: not a receipt ({error}): restore the line or take it out"
                ) from error
        return receipts

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Open the file for appending, alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file


def _check_size(receipt: Receipt) -> None:
    path = Path(receipt.path)
    if not path.is_file():
        raise MissingShardError(f"{path}: no such file, but there is a receipt for it: make the shard again")
    if path.stat().st_size != receipt.n_bytes:
        raise AlteredShardError(
            f"{path}: {path.stat().st_size} bytes, its receipt says {receipt.n_bytes}: make the shard again"
        )
