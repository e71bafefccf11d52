"""How is a campaign's history kept, so that a crash at any moment costs at most the event being written?

An append-only file of JSON lines. A line counts once it ends in a newline. Knows no meaning of any event: see state.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from campaign.state import EVENTS, Replay, State, replay

__all__ = ["Ledger", "LedgerError", "higher_run", "levels_of", "read_events", "read_run", "read_state"]

LEDGER = "ledger.jsonl"


class LedgerError(ValueError):
    """A ledger that cannot be read; the message names the file and the line."""


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """All events that were written whole; none when there is no ledger. Safe while a driver writes.

    Raises:
        LedgerError: a line that is not an event, or out of sequence.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a crash, or still being written
            yield _parse(path, number, line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        event = orjson.loads(line)
        if event["event"] not in EVENTS or event["seq"] != number:
            raise ValueError(f"event {event['event']!r}, seq {event['seq']}, expected seq {number}")
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path}:{number}: not an event of this version ({error}): restore the line") from error
    assert isinstance(event, dict)
    return event


def higher_run(run_dir: Path) -> Path:
    """Where a campaign goes on at its higher level of theory."""
    return run_dir / "higher"


def levels_of(run_dir: Path) -> list[Path]:
    """The run directories of a campaign: its own, and that of its higher level once it has begun."""
    higher = higher_run(run_dir)
    return [run_dir, higher] if (higher / LEDGER).is_file() else [run_dir]


def read_run(run_dir: Path) -> Iterator[dict[str, Any]]:
    """All events of a run directory.

    Raises:
        LedgerError: no ledger there, or one that cannot be read.
    """
    path = run_dir / LEDGER
    if not path.is_file():
        raise LedgerError(f"{run_dir}: not a run directory: there is no {LEDGER} in it")
    return read_events(path)


def read_state(run_dir: Path) -> State:
    """What the ledger of a run directory adds up to; for everyone but the driver.

    Raises:
        LedgerError: no ledger there, or one that cannot be read.
    """
    return replay(read_run(run_dir))


class Ledger:
    """The journal of one run directory, open for appending, with the history so far taken in by `replay`.

    The caller holds the lease of the run directory. Opening cuts off what a crash left of a torn line.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = run_dir / LEDGER
        self.replay = Replay()
        self._clock = clock
        for event in read_events(self.path):
            self.replay.apply(event)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()

    def append(self, event: str, **fields: Any) -> None:
        """Write one event, on disk when this returns, and take it in."""
        self.append_all([(event, fields)])

    def append_all(self, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Write several events with one write and one sync."""
        lines = []
        for offset, (event, fields) in enumerate(events, start=1):
            assert set(fields) == set(EVENTS[event]), f"{event}: fields {sorted(fields)}, expected {EVENTS[event]}"
            row = {"seq": self.replay.seq + offset, "time": round(self._clock(), 3), "event": event, **fields}
            lines.append(orjson.dumps(row))
        if not lines:
            return
        self._write(b"\n".join(lines) + b"\n")
        for line in lines:
            # What is read back, not what was passed in: replaying the file gives the same state.
            self.replay.apply(orjson.loads(line))

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, content: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            while content:
                content = content[os.write(self._file, content) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)  # disk full: whoever goes on after this must not continue a torn line
            raise

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        end = size
        while end > 0:
            start = max(0, end - 65536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)
            os.fsync(self._file)
