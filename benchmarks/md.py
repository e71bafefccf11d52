"""What do a step of MD and a check of walkers cost, for aluminium, beside TorchANI with the same weights?

Run: python -m benchmarks.md. Both keep their neighbour list. With glibc's default settings TorchANI spends much of its
time on fresh pages for its large temporaries; the rows "memory kept" show both with an allocator that keeps them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import AL_NEIGHBOURS, AL_TRIPLES, aluminium, crystal
from benchmarks.harness import Row, Times, interleave, publish, ratio_row, settle
from benchmarks.machine import Machine
from benchmarks.torchani_peer import deviation, half_list, torchani_model
from potential import kernels
from potential.neighbours import find_neighbours
from potential.structures import Structures

MEAN, MEMBERS = (30.0, 50.0), (100.0, 150.0)
PLAIN_MEAN, PLAIN_MEMBERS = (6.0, 10.0), (8.0, 10.0)
KEPT = "SMELT_BENCH_MEMORY_KEPT"
KEEP_MEMORY = {name: str(1 << 33) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")}


def floor_s(machine: Machine, n_atoms: int, n_cotangents: int) -> float:
    """Least time of one evaluation with forces, from the operations that cannot be left out."""
    networks = 8 * 24_640 * 2 * 2
    angular = (64 + 152 * n_cotangents) * AL_TRIPLES * 2
    exponentials = AL_TRIPLES * 8 * 3 + 32 * AL_NEIGHBOURS
    return n_atoms * machine.seconds(flops=networks + angular, exponentials=exponentials)


def without_compiler(task: Callable[[], Any]) -> Callable[[], Any]:
    """The task on the plain PyTorch kernels."""

    def run() -> Any:
        before, kernels.FORCED = kernels.FORCED, "reference"
        try:
            return task()
        finally:
            kernels.FORCED = before

    return run


class Case:
    """One crystal, our committee and TorchANI's, with their lists."""

    def __init__(self, n: int) -> None:
        self.committee = aluminium()
        self.peer = torchani_model(self.committee)
        self.structures = Structures.from_frames([crystal(n)], ["Al"], torch.float32)
        self.n_atoms = len(self.structures.positions)
        self.name = f"{self.n_atoms} Al"
        self.pairs = find_neighbours(self.structures, self.committee.cutoff_A)
        self._numbers = torch.full((1, self.n_atoms), 13)
        self._list = half_list(self.structures, self.committee.cutoff_A)

    def mean(self) -> Tensor:
        found = self.committee.evaluate(self.structures, self.pairs, forces="mean", stress=True)
        assert found.forces_mean is not None
        return found.forces_mean

    def members(self) -> tuple[Tensor, Tensor]:
        found = self.committee.evaluate(self.structures, self.pairs, forces="members")
        assert found.forces_members is not None
        return found.forces_members, found.force_spread()

    def peer_mean(self) -> Tensor:
        x = self.structures.positions[None].clone().requires_grad_()
        energies = self.peer.compute_from_external_neighbors(self._numbers, x, *self._list).energies
        return -torch.autograd.grad(energies.sum(), x)[0][0]

    def peer_members(self) -> tuple[Tensor, Tensor]:
        x = self.structures.positions[None].clone().requires_grad_()
        cell, pbc = self.structures.cell[0], self.structures.pbc[0]
        forces = self.peer.members_forces((self._numbers, x), cell, pbc).forces[:, 0]
        return forces, forces.std(0, correction=0)


def mean_rows(machine: Machine) -> list[Row]:
    rows = []
    for n in (3, 5, 8):
        case = Case(n)
        tasks = {"peer": case.peer_mean, "ours": case.mean, "plain": without_compiler(case.mean)}
        times = interleave(tasks)
        work, floor = f"8 energies, mean forces, stress, {case.name}", floor_s(machine, case.n_atoms, 1)
        agreement = deviation(case.mean(), case.peer_mean(), "eV/A")
        rows += _pair(case, work, times, MEAN, PLAIN_MEAN, floor, agreement)
    return rows


def member_rows(machine: Machine) -> list[Row]:
    rows = []
    for n in (3, 5):
        case = Case(n)
        tasks = {"peer": case.peer_members, "ours": case.members, "plain": without_compiler(case.members)}
        times = interleave(tasks)
        work, floor = f"forces of 8 members, spread, {case.name}", floor_s(machine, case.n_atoms, 8)
        agreement = deviation(case.members()[0], case.peer_members()[0], "eV/A")
        rows += _pair(case, work, times, MEMBERS, PLAIN_MEMBERS, floor, agreement)
    return rows


def _pair(
    case: Case,
    work: str,
    times: dict[str, Times],
    bars: tuple[float, float],
    plain_bars: tuple[float, float],
    floor: float,
    agreement: str,
) -> list[Row]:
    """The rows with C++ kernels and without."""
    amount = case.n_atoms, "atoms"
    if os.environ.get(KEPT):
        return [ratio_row(f"{work}, memory kept", times["peer"], times["ours"], amount, None, floor)]
    return [
        ratio_row(work, times["peer"], times["ours"], amount, bars, floor, agreement),
        ratio_row(f"{work}, no compiler", times["peer"], times["plain"], amount, plain_bars),
    ]


def main() -> None:
    if sys.argv[1:] == ["--memory-kept"] and KEPT not in os.environ:
        # glibc reads these when a process starts.
        command = [sys.executable, "-m", "benchmarks.md", "--memory-kept"]
        os.execve(sys.executable, command, os.environ | KEEP_MEMORY | {KEPT: "1"})
    settle()
    machine = Machine.measure()
    publish(mean_rows(machine) + member_rows(machine))


if __name__ == "__main__":
    main()
