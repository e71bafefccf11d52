"""How does a pool get blocks of nodes from Slurm, and what happens when it gets none? What Parsl calls a provider."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from parsl.executors.status_handling import BlockProviderExecutor
from parsl.jobs.errors import TooManyJobFailuresError
from parsl.jobs.states import JobState, JobStatus
from parsl.providers.base import ExecutionProvider

from campaign.allocation import Allocation
from campaign.scheduler import Block, Pause, SchedulerError, block_name, blocks_of, cancel, submit
from campaign.site import Slurm
from shards.ranks import NODES

__all__ = ["LEASH", "Blocks", "JobBlocks", "StepBlocks", "handle_fruitless_blocks"]

LEASH = (sys.executable, str(Path(__file__).with_name("leash.py")))
STEP = ("--ntasks-per-node=1", "--no-kill", "--kill-on-bad-exit=0", "--overlap", "--cpu-bind=none")

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


class Blocks(ExecutionProvider):
    """The blocks of one pool: each runs a script with the command of its workers on some nodes.

    While a block is refused, or blocks end before any of their workers has called, `max_blocks` is 0, so that Parsl
    asks for none: one pause after the other, each longer.
    """

    label = "slurm"
    init_blocks = min_blocks = 0
    cores_per_node = mem_per_node = None
    script_dir = ""  # set by Parsl

    def __init__(self, pool: str, slurm: Slurm, run_dir: Path, prologue: str) -> None:
        """prologue: shell lines before the workers start."""
        self.nodes_per_block = slurm.nodes_per_block
        # Parsl takes every node of a block to have workers.
        self.parallelism = 1 if slurm.workers == "node" else slurm.nodes_per_block
        self._pool = pool
        self._slurm = slurm
        self._run_dir = run_dir
        self._prologue = prologue
        self._statuses: dict[str, JobStatus] = {}
        self._outputs: dict[str, Path] = {}
        self._refusal = Pause(slurm.poll_s)
        self._fruitless = Pause(slurm.poll_s)
        self._silence = ""  # why the states are not known
        self._is_held = False

    @property
    def status_polling_interval(self) -> int:
        return self._slurm.poll_s

    @property
    def max_blocks(self) -> int:  # type: ignore[override]
        asks = self._refusal.is_over and self._fruitless.is_over and not self._is_held
        return self._slurm.max_blocks if asks else 0

    def hold(self) -> None:
        """Ask for no more blocks."""
        self._is_held = True

    def submit(self, command: str, tasks_per_node: int, job_name: str = "") -> str:
        """Raises SchedulerError: refused, now or in the pause before. OSError: the script cannot be written."""
        if not self._refusal.is_over:
            raise SchedulerError(self._refusal.reason)
        script = Path(self.script_dir) / f"{self._pool}-{len(self._statuses) + 1}.sh"
        output = script.with_suffix(".out")
        try:
            job = self._begin(command, script, output)
        except (SchedulerError, OSError) as error:
            self._refusal.begin(str(error))
            raise
        self._refusal.end()
        self._outputs[job] = output
        self._statuses[job] = JobStatus(JobState.PENDING)
        return job

    def status(self, job_ids: Sequence[object]) -> list[JobStatus]:
        active, silence = [job for job, status in self._statuses.items() if not status.terminal], ""
        if active:
            try:
                self._statuses |= self._look(active)
            except SchedulerError as error:
                silence = str(error)
        self._silence = silence
        return [self._statuses[str(job)] for job in job_ids]

    def cancel(self, job_ids: Sequence[object]) -> list[bool]:
        jobs = [str(job) for job in job_ids]
        try:
            if jobs:
                self._end(jobs)
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

    def _ended(self, job: str, state: JobState, words: str) -> JobStatus:
        return JobStatus(state, f"{words}{_last_line(self._outputs[job])}")

    @abstractmethod
    def _begin(self, command: str, script: Path, output: Path) -> str:
        """Start a block; returns its number. Raises SchedulerError."""

    @abstractmethod
    def _look(self, active: Sequence[str]) -> dict[str, JobStatus]:
        """States of blocks that had not ended. Raises SchedulerError."""

    @abstractmethod
    def _end(self, jobs: Sequence[str]) -> None:
        """Raises SchedulerError."""


class JobBlocks(Blocks):
    """Blocks that are jobs of their own.

    Not Parsl's own provider, which submits anew every second what was refused, takes every job that has ended for
    completed, and waits for ever for one that squeue does not know any more.
    """

    def __init__(self, pool: str, slurm: Slurm, run_dir: Path, prologue: str, clear: Callable[[], None]) -> None:
        """clear: ends the blocks of a former driver, once."""
        super().__init__(pool, slurm, run_dir, prologue)
        self._clear = clear

    def _begin(self, command: str, script: Path, output: Path) -> str:
        self._clear()
        script.write_text("\n".join(["#!/bin/bash", self._prologue, *_start(command, self._slurm), ""]))
        return submit(script, [*self._options(), f"--output={output}"])

    def _options(self) -> list[str]:
        slurm = self._slurm
        wanted = {
            "job-name": block_name(self._run_dir, self._pool),
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

    def _look(self, active: Sequence[str]) -> dict[str, JobStatus]:
        blocks = {block.job: block for block in blocks_of(self._run_dir) if block.pool == self._pool}
        # Those of a submission whose answer did not come in time.
        if strangers := [job for job, block in blocks.items() if not block.has_ended and job not in self._statuses]:
            cancel(strangers)
        return {job: self._status_of(job, blocks.get(job)) for job in active}

    def _status_of(self, job: str, block: Block | None) -> JobStatus:
        if block is None:  # so long ago that Slurm has forgotten it
            return JobStatus(JobState.COMPLETED, f"job {job} is not known to squeue any more")
        if block.has_ended:
            return self._ended(job, STATES.get(block.state, JobState.FAILED), f"job {job} ended as {block.state}")
        state = STATES.get(block.state, JobState.RUNNING)
        return JobStatus(state, f"job {job} is {block.state}" + (f" ({block.reason})" if block.reason else ""))

    def _end(self, jobs: Sequence[str]) -> None:
        cancel(jobs)


class StepBlocks(Blocks):
    """Blocks that are steps of the job in which the driver runs, each on its part of the job's nodes."""

    def __init__(
        self,
        pool: str,
        slurm: Slurm,
        run_dir: Path,
        prologue: str,
        allocation: Allocation,
        share: Sequence[Sequence[str]],
        last_start: float,
    ) -> None:
        """share: the nodes of each block. last_start: seconds since the epoch, after which none is begun."""
        super().__init__(pool, slurm, run_dir, prologue)
        self._allocation = allocation
        self._share = share
        self._last_start = last_start
        self._steps: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}  # number -> place in the share, srun

    @property
    def max_blocks(self) -> int:  # type: ignore[override]
        return super().max_blocks if time.time() < self._last_start else 0

    def _begin(self, command: str, script: Path, output: Path) -> str:
        taken = {place for place, step in self._steps.values() if step.poll() is None}
        place = next((place for place in range(len(self._share)) if place not in taken), None)
        if place is None:
            raise SchedulerError("the step before has not left its nodes yet")
        living = self._allocation.living()
        nodes = [node for node in self._share[place] if node in living]
        if not nodes:
            raise SchedulerError(
                f"{', '.join(self._share[place])}: lost, and this job has no other nodes for {self._pool}"
            )
        own = f'export {NODES}="{" ".join(nodes)}"' if self._slurm.workers == "block" else ""
        script.write_text("\n".join(["#!/bin/bash", self._prologue, own, command, ""]))
        with output.open("ab") as log:
            words = [*LEASH, *self._words(nodes), "bash", str(script)]
            step = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        number = str(len(self._steps) + 1)
        self._steps[number] = place, step
        return number

    def _words(self, nodes: Sequence[str]) -> list[str]:
        used = nodes if self._slurm.workers == "node" else nodes[:1]
        words = ["srun", f"--job-name={block_name(self._run_dir, self._pool)}", *STEP]
        words += [f"--nodes={len(used)}", f"--ntasks={len(used)}", f"--nodelist={','.join(used)}"]
        return [*words, f"--cpus-per-task={self._slurm.cores_per_node}"] if self._slurm.cores_per_node else words

    def _look(self, active: Sequence[str]) -> dict[str, JobStatus]:
        codes = {job: self._steps[job][1].poll() for job in active}
        return {
            job: JobStatus(JobState.RUNNING) if code is None else self._verdict(job, code)
            for job, code in codes.items()
        }

    def _verdict(self, job: str, code: int) -> JobStatus:
        state = JobState.FAILED if code else JobState.COMPLETED
        nodes = ", ".join(self._share[self._steps[job][0]])
        return self._ended(job, state, f"the step on {nodes} ended with {code}")

    def _end(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            self._steps[job][1].terminate()  # srun passes it on


def handle_fruitless_blocks(executor: BlockProviderExecutor, statuses: Mapping[str, JobStatus]) -> None:
    """Let Parsl give up on a pool, and fail all its tasks, when several blocks in a row ran in vain.

    Its own handlers count refused submissions, too, and give up at the third.
    """
    provider = executor.provider
    assert isinstance(provider, Blocks)
    fruitless = _fruitless(executor, statuses)
    provider.note_fruitless(fruitless[0].message or "" if fruitless else "")
    if len(fruitless) >= FRUITLESS_BLOCKS:
        words = f"no worker of {len(fruitless)} blocks in a row has called; the last one: {fruitless[0].message}"
        executor.set_bad_state_and_fail_all(TooManyJobFailuresError(words))


def _fruitless(executor: BlockProviderExecutor, statuses: Mapping[str, JobStatus]) -> list[JobStatus]:
    """The newest blocks that ended before any of their workers had called; none once one of a later block has."""
    if all(status.state is not JobState.MISSING for status in statuses.values()):
        return []
    called: list[str] = executor.connected_blocks()  # type: ignore[attr-defined]  # HighThroughputExecutor's
    submitted = sorted((block for block in statuses if block in executor.blocks_to_job_id), key=int, reverse=True)
    in_vain = takewhile(lambda block: block not in called, submitted)
    return [statuses[block] for block in in_vain if statuses[block].state is JobState.MISSING]


def _start(command: str, slurm: Slurm) -> list[str]:
    """What starts the workers of a job: on its first node only, or on every one."""
    if slurm.workers == "block":
        return [f"export {NODES}=\"$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | tr '\\n' ' ')\"", command]
    # Tasks may start steps of their own beside the workers'.
    words = ["srun", *STEP]
    if slurm.cores_per_node:
        words.append(f"--cpus-per-task={slurm.cores_per_node}")
    return [f"{' '.join(words)} bash -c {shlex.quote(command)}"]


def _last_line(output: Path) -> str:
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it never started
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:300]} (log: {output})"
