"""Compile every Triton program for an H200 as it would be launched there, without one: python compile_programs.py.

Prints the name of each. Triton's interpreter takes some things that its compiler refuses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from potential.aev import AEVParameters
from potential.config import PotentialSettings
from potential.kernels import gpu
from potential.structures import Structures
from shards.frame import Frame

H200 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def compile_only(program: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    signature = dict.fromkeys(constants, "constexpr")
    for name, argument in zip(program.arg_names, arguments, strict=False):
        if argument is None:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = TYPES[argument.dtype] if isinstance(argument, torch.Tensor) else "i32"
    source = ASTSource(program, {name: signature[name] for name in program.arg_names}, constants)
    triton.compile(source, target=H200, options={"num_warps": num_warps})
    print(program.__name__)


def main() -> None:
    gpu._launch = compile_only
    p = AEVParameters.from_settings(PotentialSettings(n_angular=2, n_angular_radial=2), 2)
    pair = Structures.from_frames([Frame([1, 13], [[0, 0, 0], [0, 0, 1.5]])], ("H", "Al"))
    row, other, shift = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.zeros(2, 3, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        vec = gpu.pair_vectors(pair, row, other, shift, dtype)
        gpu.aev_forward(vec, row, pair.species, p)
        gpu.aev_vjp(vec, row, pair.species, vec.new_zeros(1, 2, p.length), p)
        gpu.aev_jvp(vec, row, pair.species, vec[None], p)
        gpu.pair_sums(vec[None], row, other)
        gpu.celu(vec, 0.1)


if __name__ == "__main__":
    main()
