"""Does it pay to spread the members of a committee over ranks, instead of the structures of a batch?

Run: python -m benchmarks.members. Two Horovod ranks, committees of 8. Stacked: each rank takes half of the batch for
all members, and gradients are added up. Spread: each rank takes the whole batch for half of the members, and nothing is
added up. Time is that on the clock, of the slower rank, first quartile of the steps, so the machine has to be quiet.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import ORGANIC, aluminium, crystal, molecule, organic
from benchmarks.harness import settle
from potential.committee import Committee
from shards import Frame, Label, Level, write_labels
from trainer.config import TrainerSettings
from trainer.dataset import Dataset, load_dataset
from trainer.fit import step_gradient
from trainer.launch import DEFAULT_LAUNCHER, rank_environment
from trainer.networks import Networks
from trainer.optimiser import Adam
from trainer.problem import Problem
from trainer.world import World, join_world

N_RANKS, N_MEMBERS, N_STEPS = 2, 8, 12


def main() -> None:
    if len(sys.argv) > 1:
        rank()
        return
    launcher = [word.format(ranks=N_RANKS) for word in DEFAULT_LAUNCHER]
    with tempfile.TemporaryDirectory(prefix="smelt-", dir="/tmp") as scratch:
        environment = rank_environment(os.environ, N_RANKS, DEFAULT_LAUNCHER, scratch) | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, sys.executable, "-m", "benchmarks.members", "rank"], check=True, env=environment)


def rank() -> None:
    settle()
    world = join_world(N_RANKS)
    metal = [crystal(2, seed) for seed in range(32)]
    molecules = [molecule(seed) for seed in range(64)]
    for name, frames, make, elements in (
        ("32 cells of 32 Al atoms", metal, aluminium, ("Al",)),
        ("64 molecules of 20 atoms", molecules, organic, ORGANIC),
    ):
        dataset = labeled(frames, elements)
        for way, allowed_GB, jacobian_GB in (("kept", 9.0, 9.0), ("recomputed", 9.0, 0.0), ("streamed", 0.0, 0.0)):
            report(f"{name}, {way}", dataset, make, elements, allowed_GB, jacobian_GB, world)


def labeled(frames: list[Frame], elements: tuple[str, ...]) -> Dataset:
    rng = np.random.default_rng(0)
    rows = [(frame, Label(rng.normal(), rng.normal(size=frame.positions.shape))) for frame in frames]
    with tempfile.TemporaryDirectory() as folder:
        receipt = write_labels(Path(folder) / "labels.h5", Level("random", ""), rows)
        return load_dataset([receipt], elements, verify=False)


def report(
    name: str,
    dataset: Dataset,
    make: Callable[[int], Committee],
    elements: tuple[str, ...],
    allowed_GB: float,
    jacobian_GB: float,
    world: World,
) -> None:
    settings = TrainerSettings(batch=len(dataset), steps_per_epoch=1, jacobian_memory_GB=jacobian_GB)
    committees = {"stacked": (make(N_MEMBERS), world.rank, N_RANKS), "spread": (make(N_MEMBERS // N_RANKS), 0, 1)}
    seconds: dict[str, list[float]] = {"stacked": [], "all-reduce": [], "spread": []}
    trainings = {}
    for way, (committee, of, n_ranks) in committees.items():
        networks, zeros = Networks.of(committee), np.zeros(len(elements))
        problem = Problem(
            dataset, zeros, networks, committee.aev, elements, committee.n_members, settings, of, n_ranks, allowed_GB
        )
        parameters = networks.take(committee, torch.float32)
        trainings[way] = problem, parameters, Adam.like(parameters)
    for _ in range(N_STEPS):
        for way, (problem, parameters, adam) in trainings.items():
            world.add_up(torch.zeros(1), "begin")
            start = time.perf_counter()
            gradient, _ = step_gradient(problem, parameters, np.arange(len(dataset)))
            if way == "stacked":
                world.add_up(gradient, "gradient")
            adam.update(parameters, gradient, torch.full((len(parameters),), 1e-9))
            seconds[way].append(time.perf_counter() - start)
        world.add_up(torch.zeros(1), "begin")
        start = time.perf_counter()
        world.add_up(gradient.new_zeros(trainings["stacked"][1].shape), "alone")
        seconds["all-reduce"].append(time.perf_counter() - start)
    times = torch.zeros(N_RANKS, len(seconds), dtype=torch.float64)
    times[world.rank] = torch.tensor([statistics.quantiles(each[2:], n=4)[0] for each in seconds.values()])
    world.add_up(times, "times")
    if world.rank == 0:
        stacked, alone, spread = (1e3 * times.max(0).values).tolist()
        print(
            f"{name}: stacked {stacked:.1f} ms, of which {alone:.2f} ms to add up"
            f" {4e-6 * trainings['stacked'][1].numel():.1f} MB; spread {spread:.1f} ms ({spread / stacked:.2f} x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
