"""How does a pool get blocks of nodes from Slurm, and what happens when it gets none? What Parsl calls a provider."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from parsl.executors.status_handling import BlockProviderExecutor
from parsl.jobs.errors import TooManyJobFailuresError
from parsl.jobs.states import JobState, JobStatus
from parsl.providers.base import ExecutionProvider

from campaign.scheduler import Block, Pause, SchedulerError, blocks_of, cancel, job_name, submit
from campaign.site import Slurm

__all__ = ["SlurmBlocks", "handle_fruitless_blocks"]

FRUITLESS_BLOCKS = 5  # in a row, after which their environment is taken to be broken
STATES = {
    "PENDING": JobState.PENDING,
    "CONFIGURING": JobState.PENDING,
    # Somebody wanted it to end: not a failure, also if no worker has called before.
    "CANCELLED": JobState.SCALED_IN,
    "PREEMPTED": JobState.SCALED_IN,
    "COMPLETED": JobState.COMPLETED,
    "TIMEOUT": JobState.TIMEOUT,
    "DEADLINE": JobState.TIMEOUT,
}


class SlurmBlocks(ExecutionProvider):
    """The blocks of one pool: jobs that run a script with the command of the workers.

    While Slurm refuses, or blocks end before any of their workers has called, `max_blocks` is 0, so that Parsl asks
    for none: one pause after the other, each longer.

    Not Parsl's own provider, which submits anew every second what was refused, takes every job that has ended for
    completed, and waits for ever for one that squeue does not know any more.
    """

    label = "slurm"
    init_blocks = min_blocks = 0
    cores_per_node = mem_per_node = None
    script_dir = ""  # set by Parsl

    def __init__(self, pool: str, slurm: Slurm, run_dir: Path, prologue: str, clear: Callable[[], None]) -> None:
        """prologue: shell lines before the workers start. clear: ends the blocks of a former driver, once."""
        self.nodes_per_block = slurm.nodes_per_block
        # Parsl takes every node of a block to have workers.
        self.parallelism = 1 if slurm.workers == "node" else slurm.nodes_per_block
        self._pool = pool
        self._slurm = slurm
        self._run_dir = run_dir
        self._prologue = prologue
        self._clear = clear
        self._statuses: dict[str, JobStatus] = {}
        self._outputs: dict[str, Path] = {}
        self._refusal = Pause(slurm.poll_s)
        self._fruitless = Pause(slurm.poll_s)
        self._silence = ""  # why the states are not known

    @property
    def status_polling_interval(self) -> int:
        return self._slurm.poll_s

    @property
    def max_blocks(self) -> int:  # type: ignore[override]
        return self._slurm.max_blocks if self._refusal.is_over and self._fruitless.is_over else 0

    def submit(self, command: str, tasks_per_node: int, job_name: str = "") -> str:
        """Raises SchedulerError: refused, now or in the pause before. OSError: the script cannot be written."""
        if not self._refusal.is_over:
            raise SchedulerError(self._refusal.reason)
        script = Path(self.script_dir) / f"{self._pool}-{len(self._statuses) + 1}.sh"
        output = script.with_suffix(".out")
        try:
            self._clear()
            script.write_text(f"#!/bin/bash\n{self._prologue}\n{_start(command, self._slurm)}\n")
            job = submit(script, [*self._options(), f"--output={output}"])
        except (SchedulerError, OSError) as error:
            self._refusal.begin(str(error))
            raise
        self._refusal.end()
        self._outputs[job] = output
        self._statuses[job] = JobStatus(JobState.PENDING)
        return job

    def _options(self) -> list[str]:
        slurm = self._slurm
        wanted = {
            "job-name": job_name(self._run_dir, self._pool),
            "nodes": slurm.nodes_per_block,
            "ntasks-per-node": 1,
            "time": slurm.walltime_min,
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "cpus-per-task": slurm.cores_per_node,
            "gpus-per-node": slurm.gpus_per_node,
        }
        options = [f"--{name}={value}" for name, value in wanted.items() if value]
        options.append("--no-requeue")  # the driver replaces a lost block
        if slurm.exclusive:
            options.append("--exclusive")
        if slurm.workers == "node":
            options.append("--no-kill")  # a block that loses a node goes on with the others
        return [*options, *slurm.scheduler_options]

    def status(self, job_ids: Sequence[object]) -> list[JobStatus]:
        active = [job for job, status in self._statuses.items() if not status.terminal]
        if active:
            try:
                blocks = {block.job: block for block in blocks_of(self._run_dir) if block.pool == self._pool}
                # Those of a submission whose answer did not come in time.
                if strangers := [j for j, block in blocks.items() if not block.has_ended and j not in self._statuses]:
                    cancel(strangers)
                self._silence = ""
                self._statuses |= {job: self._status_of(job, blocks.get(job)) for job in active}
            except SchedulerError as error:
                self._silence = str(error)
        return [self._statuses[str(job)] for job in job_ids]

    def _status_of(self, job: str, block: Block | None) -> JobStatus:
        if block is None:  # so long ago that Slurm has forgotten it
            return JobStatus(JobState.COMPLETED, f"job {job} is not known to squeue any more")
        if block.has_ended:
            words = f"job {job} ended as {block.state}{_last_line(self._outputs[job])}"
            return JobStatus(STATES.get(block.state, JobState.FAILED), words)
        state = STATES.get(block.state, JobState.RUNNING)
        return JobStatus(state, f"job {job} is {block.state}" + (f" ({block.reason})" if block.reason else ""))

    def cancel(self, job_ids: Sequence[object]) -> list[bool]:
        jobs = [str(job) for job in job_ids]
        try:
            if jobs:
                cancel(jobs)
        except SchedulerError as error:
            self._silence = str(error)
            return [False for _ in jobs]
        self._statuses |= {job: JobStatus(JobState.SCALED_IN) for job in jobs}
        return [True for _ in jobs]

    def waits(self) -> str:
        """Why tasks of this pool wait for nodes; empty when they do not."""
        if reason := self._silence or self._refusal.reason or self._fruitless.reason:
            return reason
        active = [status for status in self._statuses.values() if not status.terminal]
        pending = [status.message or "" for status in active if status.state is JobState.PENDING]
        return pending[0] if pending and len(pending) == len(active) else ""

    def note_fruitless(self, message: str) -> None:
        """A block has ended before any of its workers has called; an empty message: one has called."""
        if not message:
            self._fruitless.end()
        elif message not in self._fruitless.reason:
            self._fruitless.begin(f"no worker has called: {message}")


def handle_fruitless_blocks(executor: BlockProviderExecutor, statuses: Mapping[str, JobStatus]) -> None:
    """Let Parsl give up on a pool, and fail all its tasks, when several blocks in a row ran in vain.

    Its own handlers count refused submissions, too, and give up at the third.
    """
    provider = executor.provider
    assert isinstance(provider, SlurmBlocks)
    submitted = sorted((block for block in statuses if block in executor.blocks_to_job_id), key=int)
    ended = [statuses[block] for block in submitted if statuses[block].terminal]
    counted = [status for status in ended if status.state is not JobState.SCALED_IN]
    fruitless = list(takewhile(lambda status: status.state is JobState.MISSING, reversed(counted)))
    provider.note_fruitless(fruitless[0].message or "" if fruitless else "")
    if len(fruitless) >= FRUITLESS_BLOCKS:
        words = f"no worker of {len(fruitless)} blocks in a row has called; the last one: {fruitless[0].message}"
        executor.set_bad_state_and_fail_all(TooManyJobFailuresError(words))


def _start(command: str, slurm: Slurm) -> str:
    """What starts the workers of a block: on its first node only, or on every one."""
    if slurm.workers == "block":
        return command
    # Tasks may start steps of their own beside the workers'.
    words = ["srun", "--ntasks-per-node=1", "--no-kill", "--kill-on-bad-exit=0", "--overlap", "--cpu-bind=none"]
    if slurm.cores_per_node:
        words.append(f"--cpus-per-task={slurm.cores_per_node}")
    return f"{' '.join(words)} bash -c {shlex.quote(command)}"


def _last_line(output: Path) -> str:
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it never started
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:300]} (log: {output})"
