"""Which Slurm jobs work for a run directory, how are they submitted, and how are they ended? Knows Slurm's commands and
the names of jobs, not what runs in them.

A killed driver leaves blocks behind on other hosts, where `lease.reap` does not reach. They would end when they miss
it; its successor does not wait for that, because until then they may go on labeling.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Block",
    "Pause",
    "SchedulerError",
    "ask",
    "block_name",
    "blocks_of",
    "cancel",
    "cancel_blocks",
    "steps_of",
    "submit",
]

COMMAND_S = 60.0
# Beyond Slurm's KillWait, 30 s unless a site says otherwise.
CANCEL_S = 120.0
LONGEST_PAUSE_S = 600.0
POOLS = ("sample", "label", "train")
ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
FIELDS = ("%i", "%P", "%T", "%D", "%N", "%r", "%S", "%L", "%j")


class SchedulerError(RuntimeError):
    """The scheduler does not answer, or does not do what it was asked to; the message has its own words."""


@dataclass(frozen=True)
class Block:
    """A job, or a step of one, as squeue says it."""

    job: str
    partition: str
    state: str
    n_nodes: int  # 0: not said
    nodes: str  # such as node[1-4]; empty before it starts
    reason: str  # why it is pending; None of Slurm's is empty here
    start: str  # local time; of a pending one the time it is expected to start, or N/A
    time_left: str
    pool: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class Pause:
    """When may be asked again for what was refused? Each refusal in a row doubles the time to wait, to ten minutes."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self.end()

    def end(self) -> None:
        self.reason = ""
        self._length_s = 0.0
        self._until = 0.0

    def begin(self, reason: str) -> None:
        self.reason = reason
        self._length_s = min(LONGEST_PAUSE_S, max(self._first_s, 2 * self._length_s))
        self._until = time.monotonic() + self._length_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._until


def block_name(run_dir: Path, pool: str) -> str:
    """The name of all blocks of a pool: by it a later driver, and `smelt status`, find them."""
    return f"smelt-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]}-{pool}"


def submit(script: Path, options: Sequence[str]) -> str:
    """Submit a job script; returns its number.

    Raises:
        SchedulerError: it was refused, or there was no answer. Then it may be in the queue all the same.
    """
    return ask("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


def blocks_of(run_dir: Path) -> list[Block]:
    """The jobs of a run directory: pending, running, and those that ended in the last minutes.

    Raises:
        SchedulerError: squeue fails.
    """
    names = {block_name(run_dir, pool): pool for pool in POOLS}
    command = ["squeue", "--me", "--noheader", "--states=all", f"--name={','.join(names)}"]
    rows = [line.split("|") for line in ask(*command, f"--format={'|'.join(FIELDS)}").splitlines()]
    return [
        Block(job, partition, state, int(n), nodes, "" if reason == "None" else reason, start, left, names[name])
        for job, partition, state, n, nodes, reason, start, left, name in rows
    ]


def steps_of(run_dir: Path) -> list[Block]:
    """The same for blocks that are steps of one large job; those that have ended are not among them.

    Raises:
        SchedulerError: squeue fails.
    """
    names = {block_name(run_dir, pool): pool for pool in POOLS}
    command = ["squeue", "--me", "--noheader", "--steps", "--format=%i|%P|%N|%S|%j"]
    rows = [line.split("|") for line in ask(*command).splitlines()]
    return [
        Block(step, partition, "RUNNING", 0, nodes, "", start, "", names[name])
        for step, partition, nodes, start, name in rows
        if name in names
    ]


def cancel(jobs: Iterable[str]) -> None:
    """Raises SchedulerError: scancel fails; not because a job has ended already."""
    ask("scancel", "--quiet", *jobs)


def cancel_blocks(run_dir: Path, find: Callable[[Path], list[Block]] = blocks_of) -> None:
    """Cancel all blocks of a run directory that `find` finds, and wait until none of their processes is left.

    Raises:
        SchedulerError: squeue or scancel fails, or a job does not end.
    """
    deadline = time.monotonic() + CANCEL_S
    while jobs := [block.job for block in find(run_dir) if not block.has_ended]:
        if time.monotonic() > deadline:
            raise SchedulerError(f"{run_dir}: jobs of a former driver do not end: scancel {' '.join(jobs)}")
        cancel(jobs)
        time.sleep(0.5)


def ask(*command: str) -> str:
    """What a command of Slurm's says.

    Raises:
        SchedulerError: it is not here, fails, or does not end.
    """
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise SchedulerError(
            f"{command[0]} is not on PATH: is this a host from which jobs can be submitted?"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]}: no answer within {COMMAND_S:g} s") from error
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {_words(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def _words(stderr: str) -> str:
    """What a command of Slurm's said, in one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(line.partition("error: ")[2] or line for line in lines))


def _environment() -> dict[str, str]:
    """A driver that is a job itself must not pass on its own job's variables to its blocks."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
