"""How do PyTorch tensors on the CPU reach the C++ kernels, and are those there at all?

The shared library is plain C (aev.cpp), built beside this file at installation. SMELT_SIMD=plain|avx2|avx512 forces an
instruction set, for tests; otherwise the best one of the processor is used.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sysconfig
from pathlib import Path

import torch

from potential.aev import AEVParameters

__all__ = ["aev_forward", "aev_jvp", "aev_vjp", "available", "pair_differences", "pair_sums"]

LIBRARY = Path(__file__).with_name(f"_aev{sysconfig.get_config_var('EXT_SUFFIX')}")
LEVELS = ("plain", "avx2", "avx512")
FORWARD, VJP, JVP = range(3)


class _Shape(ctypes.Structure):
    """AevShape of aev.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("radial_cutoff", "angular_cutoff", "eta_radial", "eta_angular", "zeta")),
        *((name, ctypes.c_int64) for name in ("n_species", "n_radial", "n_angular_radial", "n_angular")),
        *(
            (name, ctypes.POINTER(ctypes.c_double))
            for name in ("radial_shifts", "angular_shifts", "angle_cos", "angle_sin")
        ),
    )


def available() -> bool:
    """Whether the C++ kernels were built and can be loaded."""
    try:
        _library()
    except OSError:
        return False
    return True


def aev_forward(vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> torch.Tensor:
    """(N, L). vec: (E, 3), A, from each centre to its neighbours; row: (N + 1,); species_other: (E,)."""
    out = vec.new_empty(len(row) - 1, p.length)
    _run(FORWARD, vec, row, species_other, None, out, p)
    return out


def aev_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, cotangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, E, 3): d<cotangent_m, aev>/dvec. cotangent: (M, N, L)."""
    _check("cotangent", cotangent, (len(cotangent), len(row) - 1, p.length))
    out = vec.new_empty(len(cotangent), len(vec), 3)
    _run(VJP, vec, row, species_other, cotangent, out, p)
    return out


def aev_jvp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, tangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, N, L): d aev . tangent_m. tangent: (M, E, 3), change of vec."""
    _check("tangent", tangent, (len(tangent), len(vec), 3))
    out = vec.new_empty(len(tangent), len(row) - 1, p.length)
    _run(JVP, vec, row, species_other, tangent, out, p)
    return out


def pair_sums(pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, N, 3): of each atom, the sum over its own pairs less that over the pairs in which it is the other.

    pair: (M, E, 3); row: (N + 1,); other: (E,). With pair forces, these are the forces on the atoms.
    """
    _check("pair", pair, (len(pair), len(other), 3))
    out = pair.new_empty(len(pair), len(row) - 1, 3)
    _run_pairs(True, pair, row, other, out)
    return out


def pair_differences(atom: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, E, 3): of each pair, its centre's value less the other's: pair_sums transposed. atom: (M, N, 3)."""
    _check("atom", atom, (len(atom), len(row) - 1, 3))
    out = atom.new_empty(len(atom), len(other), 3)
    _run_pairs(False, atom, row, other, out)
    return out


def _run_pairs(
    summing: bool, argument: torch.Tensor, row: torch.Tensor, other: torch.Tensor, out: torch.Tensor
) -> None:
    _check_dtype(argument)
    argument, row, other = argument.contiguous(), row.long().contiguous(), other.long().contiguous()
    failed = _library().smelt_pairs(
        int(summing),
        int(argument.dtype == torch.float64),
        torch.get_num_threads(),
        len(argument),
        len(row) - 1,
        len(other),
        row.data_ptr(),
        other.data_ptr(),
        argument.data_ptr(),
        out.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no threads for the sums over {len(other)} pairs")


def _run(
    product: int,
    vec: torch.Tensor,
    row: torch.Tensor,
    species_other: torch.Tensor,
    argument: torch.Tensor | None,
    out: torch.Tensor,
    p: AEVParameters,
) -> None:
    _check_dtype(vec)
    _check("vec", vec, (len(species_other), 3))
    vec, row, species_other = vec.contiguous(), row.long().contiguous(), species_other.long().contiguous()
    argument = out if argument is None else argument.to(vec.dtype).contiguous()
    failed = _library().smelt_aev(
        product,
        _level(os.environ.get("SMELT_SIMD", "")),
        int(vec.dtype == torch.float64),
        torch.get_num_threads(),
        ctypes.byref(_shape(p)),
        len(argument),
        len(row) - 1,
        len(vec),
        vec.data_ptr(),
        row.data_ptr(),
        species_other.data_ptr(),
        argument.data_ptr(),
        out.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no memory or no threads for the AEV kernel: {len(row) - 1} atoms, {len(vec)} pairs")


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be {shape} on the CPU")


def _check_dtype(tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{tensor.dtype}: the C++ kernels know float32 and float64")


@functools.cache
def _level(forced: str) -> int:
    best: int = _library().smelt_aev_level()
    if not forced:
        return best
    if forced not in LEVELS[: best + 1]:
        raise ValueError(f"SMELT_SIMD = {forced!r}: this processor has {', '.join(LEVELS[: best + 1])}")
    return LEVELS.index(forced)


@functools.lru_cache(maxsize=64)
def _shape(p: AEVParameters) -> _Shape:
    def doubles(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
        return (ctypes.c_double * len(values))(*values)

    return _Shape(
        p.radial_cutoff_A,
        p.angular_cutoff_A,
        p.eta_radial,
        p.eta_angular,
        p.zeta,
        p.n_species,
        len(p.radial_shifts),
        len(p.angular_shifts),
        len(p.angle_shifts),
        doubles(p.radial_shifts),
        doubles(p.angular_shifts),
        doubles(tuple(math.cos(angle) for angle in p.angle_shifts)),
        doubles(tuple(math.sin(angle) for angle in p.angle_shifts)),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    integer, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.smelt_pairs.argtypes = [*[integer] * 3, *[long] * 3, *[pointer] * 4]
    library.smelt_aev.argtypes = [*[integer] * 4, ctypes.POINTER(_Shape), *[long] * 3, *[pointer] * 5]
    return library
