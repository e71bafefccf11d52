"""Which Slurm jobs work for a run directory, and how are they ended? Knows job names only, not what runs in them.

A killed driver leaves blocks behind on other hosts, where `lease.reap` does not reach. They would end when they miss
it; its successor does not wait for that, because until then they may go on labeling.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path

__all__ = ["SchedulerError", "blocks_of", "cancel_blocks", "job_prefix"]

COMMAND_S = 60.0
# Beyond Slurm's KillWait, 30 s unless a site says otherwise.
CANCEL_S = 120.0


class SchedulerError(RuntimeError):
    """The scheduler does not answer, or does not do what it was asked to."""


def job_prefix(run_dir: Path) -> str:
    """What the names of all blocks of a run directory begin with."""
    return f"smelt-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]}-"


def blocks_of(run_dir: Path) -> list[str]:
    """Numbers of the jobs that are pending, running or just ending.

    Raises:
        SchedulerError: squeue fails.
    """
    rows = [line.split() for line in _output("squeue", "--me", "--noheader", "--format=%i %j").splitlines()]
    return [row[0] for row in rows if row[-1].startswith(job_prefix(run_dir))]


def cancel_blocks(run_dir: Path) -> None:
    """Cancel all blocks of a run directory, and wait until none of their processes is left.

    Raises:
        SchedulerError: squeue or scancel fails, or a job does not end.
    """
    deadline = time.monotonic() + CANCEL_S
    while blocks := blocks_of(run_dir):
        if time.monotonic() > deadline:
            raise SchedulerError(f"{run_dir}: jobs of a former driver do not end: scancel {' '.join(blocks)}")
        _output("scancel", *blocks)
        time.sleep(0.5)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"{command[0]}: {error}: is this a host from which jobs can be submitted?") from error
    if done.returncode:
        raise SchedulerError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
