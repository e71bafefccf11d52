"""Compile every Triton program for an H200 as it would be launched there, without one: python compile_programs.py.

Prints the name of each. Triton's interpreter takes some things that its compiler refuses. Fails where a program would
be compiled again because there are more atoms or pairs, or a list begins elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from test_kernels_motion import atoms as moving_atoms
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from potential.aev import AEVParameters
from potential.config import PotentialSettings
from potential.kernels import Inputs, Layout, gpu
from potential.structures import Structures
from shards.frame import Frame


class H200:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


compiled: set[str] = set()


def compile_only(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    compiled.add(program.warmup(*arguments, grid=grid, **constants).hash)
    print(program.__name__)


def main() -> None:
    driver.set_active(H200())
    gpu._launch = compile_only
    p = AEVParameters.from_settings(PotentialSettings(n_radial=4, n_angular=2, n_angular_radial=2), 2)
    pair = Structures.from_frames([Frame([1, 13], [[0, 0, 0], [0, 0, 1.5]])], ("H", "Al"))
    row, other, shift = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.zeros(2, 3, dtype=torch.int32)
    frame = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        vec = gpu.pair_vectors(pair, row, other, shift, dtype)
        gpu.aev_forward(vec, row, pair.species, p)
        gpu.aev_vjp(vec, row, pair.species, vec.new_zeros(1, 2, p.length), p)
        gpu.aev_jvp(vec, row, pair.species, vec[None], p)
        for reverse in (None, other):
            gpu.pair_sums(vec[None], row, other, reverse)
        gpu.pair_virials(vec[None], vec, row, frame, 1)
        gpu.pair_tangents(vec[None], vec.new_zeros(1, 1, 6), vec, row, other, frame)
        gpu.find_reverse(vec, row, other)
        gpu.celu(vec, 0.1)
    atoms = moving_atoms([1, 1])
    gpu.drift(atoms, atoms.noise_key, 0.1, 0.1, 0.5)
    vec = vec.float()
    gpu.aev_vjp(vec, row, pair.species, vec.new_zeros(3, 2, p.length), p)
    gpu.aev_jvp(vec, row, pair.species, vec.expand(3, -1, -1), p)
    flat, layout = torch.zeros(2, (p.length + 1) * 16 + 17), Layout((p.length, 16, 1), (0, (p.length + 1) * 16))
    aev = torch.zeros(2, p.length)
    seen = Inputs(aev, [other])
    energies, g, tape = gpu.forward_layers(flat, [layout], 0.1, seen)
    gpu.backward_layers(flat, [layout], 0.1, tape, seen, energies, g, torch.zeros_like(flat))
    known = set(compiled)
    for n in (16, 17):
        many, first = torch.zeros(n + 1, 3), torch.arange(n + 1)
        for start in (0, 1):  # the second begins at no multiple of 16 bytes
            pairs, elements = many[start : n + start], torch.zeros(n + 1, dtype=torch.int64)[start : n + start]
            gpu.aev_forward(pairs, first, elements, p)
            gpu.aev_vjp(pairs, first, elements, pairs.new_zeros(1, n, p.length), p)
            gpu.aev_vjp(pairs, first, elements, pairs.new_zeros(3, n, p.length), p)
        gpu.forward_layers(flat, [layout], 0.1, Inputs(torch.zeros(n, p.length), [torch.arange(n)]))
    assert compiled == known, f"{len(compiled - known)} programs were compiled again for other counts or places"


if __name__ == "__main__":
    main()
