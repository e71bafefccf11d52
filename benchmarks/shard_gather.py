"""How many structures per second does one core gather from a shard, at random and in order?

Compared with the same columns read through h5py one structure at a time, which is what a loader without a memory map
does. Run: OMP_NUM_THREADS=1 python benchmarks/shard_gather.py [n_frames]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from shards import Frame, Label, Level, open_shard, write_labels

REPEATS = 5


def rows(n_frames: int) -> list[tuple[Frame, Label]]:
    """Cells of 54 to 162 atoms (mean 108), numbers at random."""
    rng = np.random.default_rng(0)
    made = []
    for n in rng.integers(54, 163, n_frames):
        frame = Frame(np.full(n, 13), rng.normal(size=(n, 3)), np.eye(3) * 12, np.ones(3, dtype=bool))
        made.append((frame, Label(0.0, rng.normal(size=(n, 3)), np.eye(3))))
    return made


def report(name: str, n_frames: int, task: Callable[[], None]) -> None:
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        task()
        rates.append(n_frames / (time.perf_counter() - start) / 1e3)
    print(f"{name:40s} {statistics.median(rates):9.1f} ({min(rates):.1f} to {max(rates):.1f}) thousand/s")


def main() -> None:
    n_frames = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    data = rows(n_frames)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.h5"
        report("write", n_frames, lambda: write_labels(path, Level("none", ""), data) and None)
        report("open, every checksum verified", n_frames, lambda: open_shard(path) and None)
        shard = open_shard(path, verify=False)
        order = np.random.default_rng(1).permutation(n_frames)
        for batch in (1, 64, 256, 1024):
            parts = np.array_split(order, max(1, n_frames // batch))
            report(
                f"gather, random, batches of {batch}", n_frames, lambda p=parts: [shard.gather(i) for i in p] and None
            )
        few = order[:1000]
        report(
            "frame and label objects, random",
            len(few),
            lambda: [(shard.frame(i), shard.label(i)) for i in few] and None,
        )
        with h5py.File(path) as file:
            names = ("position_force", "number"), ("energy", "cell", "stress")

            def slices() -> None:
                for i in few:
                    start, stop = file["offset"][i : i + 2]
                    _ = [file[name][start:stop] for name in names[0]], [file[name][i] for name in names[1]]

            report("h5py slices, random", len(few), slices)


if __name__ == "__main__":
    main()
