"""Does it pay to spread the members of a committee over ranks, instead of the structures of a batch?

Run: python -m benchmarks.members. Stacked: each of two ranks takes half of the batch for all eight members, and the
gradients are added up. Spread: each rank takes the whole batch for four members, and nothing is added up. What a rank
computes is measured in one process, in CPU time; adding up between two Horovod ranks, on the clock, best of many.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import ORGANIC, aluminium, crystal, molecule, organic
from benchmarks.harness import interleave, settle
from potential.committee import Committee
from shards import Frame, Label, Level, write_labels
from shards.ranks import mpi_folder
from trainer.config import TrainerSettings
from trainer.dataset import Dataset, load_dataset
from trainer.launch import DEFAULT_LAUNCHER, rank_environment
from trainer.networks import Networks
from trainer.problem import Problem
from trainer.step import step_gradient
from trainer.world import join_world

N_RANKS, N_MEMBERS, N_MESSAGES = 2, 8, 200
# Gigabytes that may be kept in all, and of derivatives alone.
WAYS = {"derivatives kept": (9.0, 9.0), "derivatives recomputed": (9.0, 0.0), "streamed": (0.0, 0.0)}


def main() -> None:
    if len(sys.argv) > 1:
        add_up([int(size) for size in sys.argv[1:]])
        return
    settle()
    metal = labeled([crystal(2, seed) for seed in range(32)], ("Al",))
    molecules = labeled([molecule(seed) for seed in range(64)], ORGANIC)
    for way in WAYS:
        compare(f"32 cells of 32 Al atoms, {way}", metal, aluminium, ("Al",), way)
        compare(f"64 molecules of 20 atoms, {way}", molecules, organic, ORGANIC, way)
    sizes = [N_MEMBERS * Networks.of(make(1)).n_parameters for make in (aluminium, organic)]
    launcher = [word.format(ranks=N_RANKS) for word in DEFAULT_LAUNCHER]
    with mpi_folder() as scratch:
        environment = rank_environment(os.environ, N_RANKS, DEFAULT_LAUNCHER, scratch)
        command = [*launcher, sys.executable, "-m", "benchmarks.members", *map(str, sizes)]
        subprocess.run(command, check=True, env=environment)


def labeled(frames: list[Frame], elements: tuple[str, ...]) -> Dataset:
    rng = np.random.default_rng(0)
    rows = [(frame, Label(rng.normal(), rng.normal(size=frame.positions.shape))) for frame in frames]
    with tempfile.TemporaryDirectory() as folder:
        receipt = write_labels(Path(folder) / "labels.h5", Level("random", ""), rows)
        return load_dataset([receipt], elements, verify=False)


def compare(name: str, dataset: Dataset, make: Callable[[int], Committee], elements: tuple[str, ...], way: str) -> None:
    def step(n_members: int, n_ranks: int) -> Callable[[], object]:
        committee, (allowed_GB, jacobian_GB) = make(n_members), WAYS[way]
        networks, zeros = Networks.of(committee), np.zeros(len(elements))
        settings = TrainerSettings(batch=len(dataset), steps_per_epoch=1, jacobian_memory_GB=jacobian_GB)
        problem = Problem(
            dataset, zeros, networks, committee.aev, elements, n_members, settings, 0, n_ranks, allowed_GB=allowed_GB
        )
        parameters = networks.take(committee, torch.float32)
        return lambda: step_gradient(problem, parameters, np.arange(len(dataset)))

    times = interleave({"stacked": step(N_MEMBERS, N_RANKS), "spread": step(N_MEMBERS // N_RANKS, 1)})
    stacked, spread = (1e3 * times[each].median for each in ("stacked", "spread"))
    print(f"{name}: stacked {stacked:.1f} ms, spread {spread:.1f} ms ({spread / stacked:.2f} x)", flush=True)


def add_up(sizes: list[int]) -> None:
    """Be one of the ranks."""
    world = join_world(N_RANKS)
    for size in sizes:
        gradient, seconds = torch.zeros(size), []
        for _ in range(N_MESSAGES):
            start = time.perf_counter()
            world.add_up(gradient, f"gradient of {size}")
            seconds.append(time.perf_counter() - start)
        if world.rank == 0:
            print(f"adding up {4e-6 * size:.2f} MB: {1e3 * min(seconds):.2f} ms", flush=True)


if __name__ == "__main__":
    main()
