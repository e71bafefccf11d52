"""Who works on a run directory? At most one driver, and nobody else's processes.

The lease is a lock on RUN/lock that the kernel drops when its holder dies, however it dies. What a killed driver
left running (workers, quantum codes) is found by a marker in its environment, or by its working directory, and ended
before the next driver submits anything: otherwise a frame could be labeled twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

__all__ = ["MARKER", "Holder", "Lease", "LeaseError", "holder_of", "is_alive", "reap"]

MARKER = "SMELT_RUN"  # environment variable of every process that works for a driver: its run directory
ACQUIRE_S = 1.0  # a driver that is just ending may hold the lock this long
REAP_S = 20.0


class LeaseError(RuntimeError):
    """The run directory belongs to someone else."""


@dataclass(frozen=True)
class Holder:
    """A driver process; `created` tells it from a later one with the same number."""

    host: str
    pid: int
    created: float  # seconds since the epoch

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())


def is_alive(holder: Holder) -> bool:
    """Does this driver still run? On another host it is taken to."""
    if holder.host != socket.gethostname():
        return True
    try:
        process = psutil.Process(holder.pid)
        return bool(abs(process.create_time() - holder.created) < 0.1 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def holder_of(run_dir: Path) -> Holder | None:
    """The driver at work on a run directory; None when there is none."""
    try:
        holder = Holder(**json.loads((run_dir / "lock").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    here = holder.host == socket.gethostname()
    return holder if (is_alive(holder) if here else _is_locked(run_dir / "lock")) else None


def _is_locked(path: Path) -> bool:
    """Does anybody hold the lock, here or on another host of the shared file system?"""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


class Lease:
    """Hold a run directory for this process: `with Lease(run_dir): ...`.

    Raises:
        LeaseError: another driver has it, or processes of a former one cannot be ended.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.holder = Holder.this_process()

    def __enter__(self) -> Lease:
        self._file = os.open(self.run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            reap(self.run_dir)
        except BaseException:
            os.close(self._file)
            raise
        content = json.dumps(asdict(self.holder)).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, content, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.ftruncate(self._file, 0)
        os.close(self._file)

    def _lock(self) -> None:
        deadline = time.monotonic() + ACQUIRE_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LeaseError(self._refusal()) from None
                time.sleep(0.1)

    def _refusal(self) -> str:
        holder = holder_of(self.run_dir)
        who = f"pid {holder.pid} on {holder.host}" if holder else "unknown process"
        return (
            f"{self.run_dir}: another driver is at work on it ({who}); wait for it, stop it, or use another directory"
        )


def reap(run_dir: Path) -> None:
    """End every process on this host that works for a driver of this run directory, and wait until all are gone.

    Raises:
        LeaseError: some would not end.
    """
    deadline = time.monotonic() + REAP_S
    while orphans := _workers_of(run_dir):
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in orphans)
            raise LeaseError(f"{run_dir}: processes of a former driver do not end (pid {pids}): kill them first")
        kill(orphans)
        psutil.wait_procs(orphans, timeout=0.5)


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _workers_of(run_dir: Path) -> list[psutil.Process]:
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid not in own and process.status() != psutil.STATUS_ZOMBIE and _works_for(process, run_dir):
                found[process.pid] = process
                # A quantum code may run with an environment of its own.
                found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def _works_for(process: psutil.Process, run_dir: Path) -> bool:
    if process.environ().get(MARKER) == str(run_dir.resolve()):
        return True
    return Path(process.cwd()).is_relative_to((run_dir / "scratch").resolve())
