"""Do five million labeled conformers stream through two Horovod ranks in bounded memory, with one copy on the node?

Run: python -m benchmarks.stream FOLDER [--conformers N] [--steps N]. FOLDER takes 1 kB per conformer and is left there.
Conformers are random molecules of 10 to 18 atoms of H, C, N, O, displaced, with the energy and forces of springs. Both
ranks read their share of one epoch, all of it, in shuffled batches. Then they train a committee of four of the ANI-1x
networks on its first steps, keeping nothing of a structure. Memory is what the system says of each rank: its own, then
with the files it has mapped, which both ranks share: the proportional size counts pages that two have mapped by half.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import ORGANIC, molecule, organic
from shards import Frame, Label, Level, Manifest, Receipt, write_labels
from shards.ranks import mpi_folder
from trainer.config import TrainerSettings
from trainer.dataset import Dataset, fit_self_energies, load_dataset
from trainer.launch import DEFAULT_LAUNCHER, rank_environment
from trainer.networks import Networks
from trainer.optimiser import Adam
from trainer.problem import Problem
from trainer.step import step_gradient
from trainer.world import World, join_world

PER_SHARD, N_MOLECULES, N_RANKS, N_MEMBERS, BATCH = 100_000, 400, 2, 4, 1280
SPRING_eV_A2, DISPLACEMENT_A = 20.0, 0.05
SELF_ENERGY_eV = {1: -13.6, 6: -1030.0, 7: -1485.0, 8: -2042.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conformers", type=int, default=5_000_000)
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    manifest = Manifest(given.folder / "manifest.jsonl")
    if given.rank:
        stream(manifest, given.steps)
        return
    if manifest.n_frames < given.conformers:
        write(manifest, given.conformers)
    launcher = [word.format(ranks=N_RANKS) for word in DEFAULT_LAUNCHER]
    with mpi_folder() as scratch:
        environment = rank_environment(os.environ, N_RANKS, DEFAULT_LAUNCHER, scratch)
        command = [*launcher, sys.executable, "-m", "benchmarks.stream", *sys.argv[1:], "--rank"]
        subprocess.run(command, check=True, env=environment)


def write(manifest: Manifest, n_conformers: int) -> None:
    start = time.perf_counter()
    with ProcessPoolExecutor(N_RANKS) as pool:
        for receipt in pool.map(write_shard, *zip(*_missing(manifest, n_conformers), strict=True)):
            manifest.append(receipt)
    n_bytes = sum(receipt.n_bytes for receipt in manifest.receipts())
    print(
        f"wrote {n_conformers:,} conformers, {n_bytes / 1e9:.2f} GB, in {time.perf_counter() - start:.0f} s", flush=True
    )


def _missing(manifest: Manifest, n_conformers: int) -> Iterator[tuple[Path, int]]:
    """Names and sizes of the shards that an interrupted run did not come to."""
    written = {Path(receipt.path).name for receipt in manifest.receipts()}
    for i, start in enumerate(range(0, n_conformers, PER_SHARD)):
        if (path := manifest.path.parent / f"{i:04d}.h5").name not in written:
            yield path, min(PER_SHARD, n_conformers - start)


def write_shard(path: Path, n: int) -> Receipt:
    seed = int(path.stem)
    rng = np.random.default_rng(seed)
    rows = []
    for kind in rng.integers(N_MOLECULES, size=n).tolist():
        rest = rest_of(kind)
        off = rng.normal(0, DISPLACEMENT_A, rest.positions.shape)
        energy = SPRING_eV_A2 / 2 * np.square(off).sum() + sum(SELF_ENERGY_eV[number] for number in rest.numbers)
        rows.append((Frame(rest.numbers, rest.positions + off), Label(energy, -SPRING_eV_A2 * off)))
    return write_labels(path, Level("springs", ""), rows)


@functools.cache
def rest_of(kind: int) -> Frame:
    return molecule(kind, 10 + kind % 9)


def stream(manifest: Manifest, n_steps: int) -> None:
    """Be one of the ranks."""
    world, committee = join_world(N_RANKS), organic(N_MEMBERS)
    log = Log(world)
    dataset = load_dataset(manifest.receipts(), ORGANIC, verify=False)
    log.say(f"opened {len(dataset):,} structures, {int(dataset.n_atoms.sum()):,} atoms")
    networks = Networks.of(committee)
    settings = TrainerSettings(batch=BATCH, ranks=N_RANKS, memory_share=0.0)
    self_energies = fit_self_energies(dataset.counts, dataset.energy)
    problem = Problem(
        dataset, self_energies, networks, committee.aev, ORGANIC, N_MEMBERS, settings, world.rank, N_RANKS, allowed_GB=0
    )
    log.say(f"folds and batches made; on this rank: {problem.plan.reason}")
    read(problem, dataset, log)
    train(problem, networks.take(committee, torch.float32), world, n_steps, log)


def read(problem: Problem, dataset: Dataset, log: Log) -> None:
    """Copy every structure of this rank out of its shard, in the order of the first epoch."""
    steps = problem.windows.epoch(seed=0, epoch=0)
    log.restart()
    checksum = n_done = 0
    for i, structures in enumerate(steps, start=1):
        batch = dataset.gather(problem.mine(structures))
        checksum += int(batch.numbers.sum())
        n_done += len(batch.energy)
        if i % -(-len(steps) // 8) == 0 or i == len(steps):
            log.say(f"read {n_done:,} structures", n_done)
    log.world.add_up(total := torch.tensor([float(n_done), float(checksum)], dtype=torch.float64), "read")
    expected = float((dataset.counts @ np.array([1, 6, 7, 8])).sum())
    assert total.tolist() == [len(dataset), expected], "not every structure was read once"


def train(problem: Problem, parameters: torch.Tensor, world: World, n_steps: int, log: Log) -> None:
    """Make the first steps of the first epoch."""
    adam, rates = Adam.like(parameters), torch.full((len(parameters),), 1e-4, dtype=torch.float64)
    log.restart()
    n_done = 0
    for i, structures in zip(range(1, n_steps + 1), problem.epoch(seed=0, epoch=0), strict=False):
        gradient, _ = step_gradient(problem, parameters, structures)
        world.add_up(gradient, "gradient")
        adam.update(parameters, gradient, rates)
        n_done += len(problem.mine(structures))
        if i % -(-n_steps // 5) == 0 or i == n_steps:
            log.say(f"trained on {n_done:,} structures, energies and forces", n_done)


class Log:
    """Lines about what a rank has done, how fast, and the memory it takes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def say(self, what: str, n_structures: int = 0) -> None:
        seconds = time.perf_counter() - self._start
        rate = f", {n_structures / seconds:,.0f} structures/s" if n_structures else ""
        size = memory_GB()
        print(
            f"rank {self.world.rank}: {what} in {seconds:.1f} s{rate}; GB: own {size['Anonymous']:.2f}, with files"
            f" {size['Rss']:.2f}, proportional {size['Pss']:.2f}",
            flush=True,
        )


def memory_GB() -> dict[str, float]:
    """What the system counts as memory of this process: Rss, Pss, Anonymous and more."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in lines}


if __name__ == "__main__":
    main()
