"""Do two Horovod ranks train twice as many structures in the same time?

Run: python -m benchmarks.ranks. Weak scaling of the trainer's own step, committee of 8, 32 cells of 32 atoms per rank
and step. Time is that on the clock, so the machine has to be quiet; the share of CPU time that a rank spends on its
step, not on its partner, is named beside it.
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

PER_RANK, N_STEPS, N_ROUNDS = 32, 40, 9


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
    """Be one of the ranks; the first one prints seconds per step, on the clock and of the CPU."""
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
    steps, seconds = Steps(problem, parameters), []
    for number in range(N_STEPS):
        (structures,) = problem.windows.epoch(0, number)
        wall, cpu = time.perf_counter(), time.process_time()
        gradient = steps.gradient(structures)
        world.add_up(gradient, "gradient")
        adam.update(parameters, gradient, rates)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    if world.rank == 0:
        print(json.dumps(seconds[3:]))


def run(n_ranks: int) -> tuple[float, float]:
    """First quartiles of seconds per step: on the clock, of the CPU."""
    launcher = [word.format(ranks=n_ranks) for word in DEFAULT_LAUNCHER] if n_ranks > 1 else []
    with mpi_folder() as scratch:
        environment = rank_environment(os.environ, n_ranks, DEFAULT_LAUNCHER, scratch) | {"OMP_NUM_THREADS": "1"}
        command = [*launcher, sys.executable, "-m", "benchmarks.ranks", "--rank-of", str(n_ranks)]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    wall, cpu = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    return statistics.quantiles(wall, n=4)[0], statistics.quantiles(cpu, n=4)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank-of", type=int, default=0)
    n_ranks = parser.parse_args().rank_of
    if n_ranks:
        rank(n_ranks)
        return
    rounds = [(run(1), run(2)) for _ in range(N_ROUNDS)]
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
