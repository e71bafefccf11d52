"""What does a list of neighbours cost, beside vesin? And is it the same list?

Run: python -m benchmarks.neighbours. Both give all directed pairs within 7 A with indices and cell shifts.
"""

from __future__ import annotations

import numpy as np
import torch
from vesin import NeighborList

from benchmarks.cases import crystal, molecule
from benchmarks.harness import Row, interleave, publish, ratio_row, settle
from benchmarks.machine import Machine
from potential.neighbours import Neighbours, find_neighbours
from potential.structures import Structures
from shards.frame import Frame

CUTOFF_A, BARS = 7.0, (1.0, 1.5)
BYTES_PER_PAIR = 2 * 8 + 3 * 4


def vesin(frames: list[Frame]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    search = NeighborList(cutoff=CUTOFF_A, full_list=True)
    return [
        search.compute(points=f.positions, box=f.cell, periodic=bool(f.pbc.all()), quantities="ijS") for f in frames
    ]


def agreement(frames: list[Frame], ours: Neighbours) -> str:
    """Compare the sets of (i, j, shift)."""
    theirs, first = [], 0
    for frame, (i, j, shift) in zip(frames, vesin(frames), strict=True):
        theirs.append(np.column_stack([i.astype(np.int64) + first, j.astype(np.int64) + first, shift]))
        first += frame.n_atoms
    mine = np.column_stack([ours.centre.numpy(), ours.other.numpy(), ours.shift.numpy()])
    same = np.array_equal(_sorted(mine), _sorted(np.concatenate(theirs)))
    return f"all {len(mine):,} pairs" if same else "DIFFERENT PAIRS"


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


def main() -> None:
    settle()
    machine, rows = Machine.measure(), list[Row]()
    cases: list[tuple[str, list[Frame], tuple[float, float] | None]] = [
        (f"neighbours, {4 * n**3:,} Al, periodic", [crystal(n)], BARS) for n in (5, 10, 20)
    ]
    cases.append(("neighbours, 64 x 108 Al, periodic", [crystal(3, seed) for seed in range(64)], None))
    cases.append(("neighbours, 512 x 4 Al, periodic", [crystal(1, seed) for seed in range(512)], None))
    cases.append(("neighbours, 256 molecules of 20 atoms", [molecule(seed) for seed in range(256)], None))
    for work, frames, bars in cases:
        structures = Structures.from_frames(frames, ["H", "C", "N", "O", "Al"], torch.float64)
        found = find_neighbours(structures, CUTOFF_A)

        def theirs(frames: list[Frame] = frames) -> object:
            return vesin(frames)

        def ours(structures: Structures = structures) -> object:
            return find_neighbours(structures, CUTOFF_A)

        times = interleave({"peer": theirs, "ours": ours})
        floor = machine.seconds(n_bytes=BYTES_PER_PAIR * len(found.other))
        amount = len(structures.positions), "atoms"
        rows.append(ratio_row(work, times["peer"], times["ours"], amount, bars, floor, agreement(frames, found)))
    publish(rows)


if __name__ == "__main__":
    main()
