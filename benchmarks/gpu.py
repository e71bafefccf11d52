"""What does a GPU do: atom-steps per second of the committee on batched aluminium, mean forces and members' forces?

Run: python -m benchmarks.gpu [--device cuda]. Rates are those on the clock after all work is done. Agreement is that
with the same committee on the CPU. With --device cpu a few walkers run, to try the script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import aluminium, crystal
from benchmarks.harness import Row, Times, interleave, publish
from benchmarks.torchani_peer import deviation
from potential.neighbours import find_neighbours
from potential.structures import Structures

MEAN = (10e6, 25e6)  # atom-steps per second on an H200


def row(work: str, task: Callable[[], Any], n_atoms: int, bars: tuple[float, float] | None, agreement: str) -> Row:
    times: Times = interleave({work: task}, rounds=5, clock=time.perf_counter)[work]
    rate = n_atoms / times.median
    return Row(work, rate, "atom-steps/s", *(bars or (None, None)), f"{rate:,.0f}/s", agreement=agreement)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use: see benchmarks/results/OPEN.md, or try --device cpu")
    n_cells = 1024 if device.startswith("cuda") else 4
    committee, on_cpu = aluminium().to(device), aluminium()
    frames = [crystal(3, seed) for seed in range(n_cells)]
    structures = Structures.from_frames(frames, ["Al"], torch.float64, device)
    pairs = find_neighbours(structures, committee.cutoff_A)
    few = Structures.from_frames(frames[:2], ["Al"], torch.float64)
    expected = on_cpu.evaluate(few, forces="mean").forces_mean
    found = committee.evaluate(few.to(device=device), forces="mean").forces_mean
    assert expected is not None
    assert found is not None
    agreement = deviation(found.cpu(), expected, "eV/A")

    def evaluate(**what: Any) -> Callable[[], None]:
        def task() -> None:
            committee.evaluate(structures, pairs, **what)
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        return task

    size, n_atoms = f"{n_cells} x 108 Al", n_cells * 108
    publish(
        [
            row(f"{device}: mean forces of 8, {size}", evaluate(forces="mean"), n_atoms, MEAN, agreement),
            row(f"{device}: forces of 8 members, {size}", evaluate(forces="members"), n_atoms, None, ""),
        ]
    )


if __name__ == "__main__":
    main()
