"""Do two Horovod ranks train twice as many structures in the same time?

Run: python -m benchmarks.ranks. Weak scaling of the trainer's own step, committee of 8, 32 cells of 32 atoms per rank
and step. Time is that on the clock, so the machine has to be quiet. One rank without Horovod, on each of two
processors, and two ranks take turns of a few steps; those whose turn it is not are stopped. Ranks wait for each other,
so the slower processor is what two are compared with: on a machine of one's own both are the same. The share of CPU
time that a rank spends on its step, not on its partner, is named beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from ase.build import bulk

from benchmarks.cases import aluminium
from benchmarks.harness import Row, publish, settle
from shards import Frame, Label, Level, write_labels
from shards.ranks import mpi_folder
from trainer.config import TrainerSettings
from trainer.dataset import load_dataset
from trainer.launch import DEFAULT_LAUNCHER, rank_environment
from trainer.networks import Networks
from trainer.optimiser import Adam
from trainer.problem import Problem
from trainer.step import Steps
from trainer.world import join_world

PER_RANK, N_STEPS, N_ROUNDS = 32, 10, 21


def cells(n: int) -> list[tuple[Frame, Label]]:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n):
        atoms = bulk("Al", cubic=True) * (2, 2, 2)
        atoms.rattle(0.1, seed=seed)
        frame = Frame(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
        rows.append((frame, Label(rng.normal(), rng.normal(size=(32, 3)), np.eye(3))))
    return rows


def rank(n_ranks: int) -> None:
    """Be one of the ranks; the first one takes steps for each line it reads, and prints what they took."""
    settle()
    world = join_world(n_ranks)
    committee = aluminium()
    networks = Networks.of(committee)
    settings = TrainerSettings(batch=PER_RANK * n_ranks, steps_per_epoch=1, ranks=n_ranks)
    with tempfile.TemporaryDirectory() as folder:
        receipt = write_labels(Path(folder) / "cells.h5", Level("random", ""), cells(PER_RANK * n_ranks))
        dataset = load_dataset([receipt], ["Al"], verify=False)
        problem = Problem(dataset, np.zeros(1), networks, committee.aev, ["Al"], 8, settings, world.rank, world.n_ranks)
    parameters = networks.take(committee, torch.float32)
    adam, rates = Adam.like(parameters), torch.full((8,), 1e-9, dtype=torch.float64)
    steps, number = Steps(problem, parameters), 0
    for _ in range(1 + N_ROUNDS * 2 // n_ranks):
        if world.rank == 0:
            sys.stdin.readline()  # the other rank waits in its first step
        seconds = []
        for _ in range(N_STEPS):
            (structures,) = problem.windows.epoch(0, number)
            wall, cpu = time.perf_counter(), time.process_time()
            gradient = steps.gradient(structures)
            world.add_up(gradient, "gradient")
            adam.update(parameters, gradient, rates)
            seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
            number += 1
        if world.rank == 0:
            wall, cpu = (statistics.quantiles(each, n=4)[0] for each in zip(*seconds[1:], strict=True))
            print(json.dumps([wall, cpu]), flush=True)


class Ranks:
    """Processes that take some steps when it is their turn, and are stopped otherwise."""

    def __init__(self, n_ranks: int, scratch: str) -> None:
        launcher = [word.format(ranks=n_ranks) for word in DEFAULT_LAUNCHER] if n_ranks > 1 else []
        environment = rank_environment(os.environ, n_ranks, DEFAULT_LAUNCHER, scratch) | {"OMP_NUM_THREADS": "1"}
        command = [*launcher, sys.executable, "-m", "benchmarks.ranks", "--rank-of", str(n_ranks)]
        self._first = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._take_steps()
        family = [psutil.Process(self._first.pid), *psutil.Process(self._first.pid).children(recursive=True)]
        self._ranks = [process for process in family if process.cmdline()[0] == sys.executable]
        assert len(self._ranks) == n_ranks
        self._stop()

    def turn(self, processor: int | None = None) -> tuple[float, float]:
        """First quartiles of seconds per step: on the clock, of the CPU. processor: on which, of a single rank."""
        for process in self._ranks:
            if processor is not None:
                process.cpu_affinity([processor])
            process.resume()
        wall, cpu = self._take_steps()
        self._stop()
        return wall, cpu

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for process in self._ranks:
            process.resume()
        if self._first.stdin is not None:
            self._first.stdin.close()
        if error:
            self._first.terminate()
        if self._first.wait(60) and not error:
            raise RuntimeError(f"a rank ended with {self._first.returncode}")

    def _take_steps(self) -> tuple[float, float]:
        assert self._first.stdin is not None
        assert self._first.stdout is not None
        self._first.stdin.write("\n")
        wall, cpu = json.loads(self._first.stdout.readline())
        return wall, cpu

    def _stop(self) -> None:
        for process in self._ranks:
            process.suspend()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank-of", type=int, default=0)
    n_ranks = parser.parse_args().rank_of
    if n_ranks:
        rank(n_ranks)
        return
    with mpi_folder() as scratch, Ranks(1, scratch) as one_rank, Ranks(2, scratch) as two_ranks:
        processors = sorted(os.sched_getaffinity(0))[:2]
        rounds = [(max(map(one_rank.turn, processors)), two_ranks.turn()) for _ in range(N_ROUNDS)]
    low, share, high = statistics.quantiles((100 * one[0] / two[0] for one, two in rounds), n=4)
    busy = statistics.median(100 * one[1] / two[1] for one, two in rounds)
    publish(
        [
            Row(
                work=f"two Horovod ranks, weak scaling, {PER_RANK} cells of 32 atoms each, committee of 8",
                value=share,
                unit="%",
                at_least=90.0,
                aim=97.0,
                ours=f"{1e3 * statistics.median(two[0] for _, two in rounds):.1f} ms a step",
                peer=f"one rank {1e3 * statistics.median(one[0] for one, _ in rounds):.1f} ms",
                quartiles=(low, high),
                agreement=f"{busy:.0f} % of CPU time",
            )
        ]
    )


if __name__ == "__main__":
    main()
