"""What does a stage hand back? One value for every stage, small enough to travel as a message.

Frames and labels never travel in it: they are in files, and the outcome carries their receipts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["Clock", "Failure", "FailureClass", "Outcome", "Receipt", "Timing"]


class FailureClass(StrEnum):
    """Why a task failed. The campaign has one policy for each."""

    CRASH = "crash"
    WALLTIME = "walltime"
    MEMORY = "memory"
    SCF = "scf"  # self-consistency (or another iterative solver) did not converge
    GEOMETRY = "geometry"  # a frame no quantum code should be asked about
    BAD_LABEL = "bad_label"  # a result that is not finite or outside its bounds
    NODE_LOST = "node_lost"
    MISSING = "missing"  # a code or its data is not installed: every task would fail alike


@dataclass(frozen=True)
class Failure:
    kind: FailureClass
    message: str
    log: str = ""  # path of the log to read


@dataclass(frozen=True)
class Receipt:
    """Stand for one published shard: enough to find it, check it, and refuse another in its place."""

    path: str
    kind: str  # frames | labels
    n_frames: int
    n_atoms: int
    n_bytes: int
    digest: str  # sha256 of the shard's content
    level: str = ""  # digest of the level of theory, for labels


@dataclass(frozen=True)
class Timing:
    host: str
    start: float  # seconds since the epoch
    end: float
    phases: dict[str, float] = field(default_factory=dict)  # seconds per phase


@dataclass(frozen=True)
class Outcome:
    """What a stage hands back: receipts of what it published, or its failure; how long it took; its figures."""

    stage: str
    timing: Timing
    receipts: tuple[Receipt, ...] = ()
    failure: Failure | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # JSON values only

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Outcome:
        failure = table.get("failure")
        return cls(
            stage=table["stage"],
            timing=Timing(**table["timing"]),
            receipts=tuple(Receipt(**row) for row in table["receipts"]),
            failure=None
            if failure is None
            else Failure(FailureClass(failure["kind"]), failure["message"], failure["log"]),
            facts=table["facts"],
        )


class Clock:
    """Measure a stage from the moment it is made: `with clock.phase("scf"): ...`, then `clock.timing()`."""

    def __init__(self) -> None:
        self._start = time.time()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def timing(self) -> Timing:
        return Timing(socket.gethostname(), self._start, time.time(), dict(self._phases))
