"""How do PyTorch tensors on the CPU reach the C++ kernels, and are those there at all?

The shared library has a plain C interface (entry.cpp) and is built beside this file at installation.
SMELT_SIMD=plain|avx2|avx512 forces an instruction set, for tests; otherwise the best one of the processor is used.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from potential.aev import AEVParameters
from potential.kernels.bins import FLAT_CELL, NOT_FINITE
from potential.structures import Structures

__all__ = [
    "aev_forward",
    "aev_jvp",
    "aev_vjp",
    "available",
    "find_pairs",
    "networks",
    "pair_differences",
    "pair_sums",
    "pair_vectors",
]

LIBRARY = Path(__file__).with_name(f"_aev{sysconfig.get_config_var('EXT_SUFFIX')}")
LEVELS = ("plain", "avx2", "avx512")
FORWARD, VJP, JVP = range(3)
NO_MEMORY, FLAT = 1, 2  # Status of neighbours.cpp


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


class _Networks(ctypes.Structure):
    """NetworksJob of networks.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_members", "n_layers", "n_rows", "n_atoms")),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("weights", "biases")),
        ("celu_alpha", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("atoms", "aev", "energies", "gradient")),
        ("mean", ctypes.c_int64),
    )


def available() -> bool:
    """Whether the C++ kernels were built and can be loaded."""
    try:
        _library()
    except (OSError, AttributeError):  # not built, or built from older sources
        return False
    return True


def find_pairs(
    structures: Structures, cutoff_A: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre (E,), other (E,), shift (E, 3), int32, and row (N + 1,) of all directed pairs closer than the cutoff.

    Raises ValueError for a cell that spans no volume, or positions that are not finite.
    """
    positions, cells = structures.positions.double().contiguous(), structures.cell.double().contiguous()
    first, pbc = structures.first_atom, structures.pbc.contiguous()
    n_atoms, n_threads = positions.shape[0], torch.get_num_threads()
    row = first.new_empty(n_atoms + 1)
    status, frame = ctypes.c_int(), ctypes.c_int64()
    found = _library().smelt_find_neighbours(
        n_threads,
        structures.n_frames,
        first.data_ptr(),
        positions.data_ptr(),
        cells.data_ptr(),
        pbc.data_ptr(),
        cutoff_A,
        row.data_ptr(),
        ctypes.byref(status),
        ctypes.byref(frame),
    )
    if not found:
        if status.value == NO_MEMORY:
            raise MemoryError(f"no memory for the neighbours of {n_atoms} atoms within {cutoff_A:g} A")
        raise ValueError((FLAT_CELL if status.value == FLAT else NOT_FINITE).format(frame.value))
    try:
        n_pairs = int(row[-1])
        centre, other, shift = (
            row.new_empty(n_pairs),
            row.new_empty(n_pairs),
            row.new_empty(n_pairs, 3, dtype=torch.int32),
        )
    except BaseException:
        _library().smelt_take_neighbours(found, n_threads, None, None, None, None)
        raise
    _library().smelt_take_neighbours(
        found, n_threads, row.data_ptr(), centre.data_ptr(), other.data_ptr(), shift.data_ptr()
    )
    return centre, other, shift, row


def pair_vectors(structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image. row: (N + 1,); other: (E,); shift: (E, 3), int32."""
    positions, cell = structures.positions.contiguous(), structures.cell.to(structures.positions.dtype).contiguous()
    frame_of_atom = structures.frame_of_atom.contiguous()
    _check("shift", shift, (other.shape[0], 3))
    out = positions.new_empty(other.shape[0], 3)
    _library().smelt_pair_vectors(
        _is_double(positions),
        torch.get_num_threads(),
        positions.shape[0],
        row.data_ptr(),
        other.data_ptr(),
        shift.data_ptr(),
        frame_of_atom.data_ptr(),
        positions.data_ptr(),
        cell.data_ptr(),
        out.data_ptr(),
    )
    return out


def aev_forward(vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> torch.Tensor:
    """(N, L). vec: (E, 3), A, from each centre to its neighbours; row: (N + 1,); species_other: (E,)."""
    out = vec.new_empty(row.shape[0] - 1, p.length)
    _run(FORWARD, vec, row, species_other, None, out, p)
    return out


def aev_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, cotangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, E, 3): d<cotangent_m, aev>/dvec. cotangent: (M, N, L)."""
    _check("cotangent", cotangent, (cotangent.shape[0], row.shape[0] - 1, p.length))
    out = vec.new_empty(cotangent.shape[0], vec.shape[0], 3)
    _run(VJP, vec, row, species_other, cotangent, out, p)
    return out


def aev_jvp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, tangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, N, L): d aev . tangent_m. tangent: (M, E, 3), change of vec."""
    _check("tangent", tangent, (tangent.shape[0], vec.shape[0], 3))
    out = vec.new_empty(tangent.shape[0], row.shape[0] - 1, p.length)
    _run(JVP, vec, row, species_other, tangent, out, p)
    return out


def networks(
    aev: torch.Tensor,
    atoms: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    celu_alpha: float,
    energies: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """Write the energies of `atoms` by all members, and dE/dAEV or its mean over members, to the last two arguments.

    aev: (N, L); atoms: (n,), int64, those of one element; weights, biases: per layer (M, out, in) and (M, out), the
    last with one output; energies: (M, N); gradient: (M, N, L), (1, N, L) for the mean, or (0, N, L) for none. Rows of
    other atoms are left as they are.
    """
    n_members, n_atoms, length = weights[0].shape[0], *aev.shape
    widths = (length, *(bias.shape[1] for bias in biases))
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check(f"weight {layer}", weight, (n_members, widths[layer + 1], widths[layer]))
        _check(f"bias {layer}", bias, (n_members, widths[layer + 1]))
    _check("energies", energies, (n_members, n_atoms))
    n_gradients = gradient.shape[0]
    _check("gradient", gradient, (n_gradients if n_gradients in (0, 1) else n_members, n_atoms, length))
    tensors = [aev, energies, gradient, *weights, *biases]
    if widths[-1] != 1 or not all(t.is_contiguous() and t.dtype == aev.dtype for t in tensors):
        raise ValueError(f"networks: one output, and all tensors contiguous and {aev.dtype}, as aev is")
    atoms = atoms.long().contiguous()
    job = _Networks(
        n_members,
        len(weights),
        atoms.shape[0],
        n_atoms,
        (ctypes.c_int64 * len(widths))(*widths),
        (ctypes.c_void_p * len(weights))(*(w.data_ptr() for w in weights)),
        (ctypes.c_void_p * len(biases))(*(b.data_ptr() for b in biases)),
        celu_alpha,
        atoms.data_ptr(),
        aev.data_ptr(),
        energies.data_ptr(),
        gradient.data_ptr() if n_gradients else None,
        n_gradients == 1,
    )
    if _library().smelt_networks(_level(), _is_double(aev), torch.get_num_threads(), ctypes.byref(job)):
        raise MemoryError(f"no memory for the networks: {atoms.shape[0]} atoms, {n_members} members")


def pair_sums(pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, N, 3): of each atom, the sum over its own pairs less that over the pairs in which it is the other.

    pair: (M, E, 3); row: (N + 1,); other: (E,). With pair forces, these are the forces on the atoms.
    """
    _check("pair", pair, (pair.shape[0], other.shape[0], 3))
    out = pair.new_empty(pair.shape[0], row.shape[0] - 1, 3)
    _run_pairs(True, pair, row, other, out)
    return out


def pair_differences(atom: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, E, 3): of each pair, its centre's value less the other's: pair_sums transposed. atom: (M, N, 3)."""
    _check("atom", atom, (atom.shape[0], row.shape[0] - 1, 3))
    out = atom.new_empty(atom.shape[0], other.shape[0], 3)
    _run_pairs(False, atom, row, other, out)
    return out


def _run_pairs(
    summing: bool, argument: torch.Tensor, row: torch.Tensor, other: torch.Tensor, out: torch.Tensor
) -> None:
    argument, row, other = argument.contiguous(), row.long().contiguous(), other.long().contiguous()
    failed = _library().smelt_pairs(
        int(summing),
        _is_double(argument),
        torch.get_num_threads(),
        argument.shape[0],
        row.shape[0] - 1,
        other.shape[0],
        row.data_ptr(),
        other.data_ptr(),
        argument.data_ptr(),
        out.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no memory for the sums over {other.shape[0]} pairs")


def _run(
    product: int,
    vec: torch.Tensor,
    row: torch.Tensor,
    species_other: torch.Tensor,
    argument: torch.Tensor | None,
    out: torch.Tensor,
    p: AEVParameters,
) -> None:
    if int(row[-1]) != vec.shape[0]:
        raise ValueError(f"row ends at {int(row[-1])}: there are {vec.shape[0]} pairs")
    _check("vec", vec, (species_other.shape[0], 3))
    vec, row, species_other = vec.contiguous(), row.long().contiguous(), species_other.long().contiguous()
    n_items = 1 if argument is None else argument.shape[0]
    argument = out if argument is None else argument.to(vec.dtype).contiguous()
    failed = _library().smelt_aev(
        product,
        _level(),
        _is_double(vec),
        torch.get_num_threads(),
        ctypes.byref(_shape(p)),
        n_items,
        row.shape[0] - 1,
        vec.shape[0],
        vec.data_ptr(),
        row.data_ptr(),
        species_other.data_ptr(),
        argument.data_ptr(),
        out.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no memory for the AEV kernel: {row.shape[0] - 1} atoms, {vec.shape[0]} pairs")


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be {shape} on the CPU")


def _is_double(tensor: torch.Tensor) -> bool:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{tensor.dtype}: the C++ kernels know float32 and float64")
    return tensor.dtype == torch.float64


def _level() -> int:
    """The instruction set to use, as a position in LEVELS."""
    best, forced = _best_level(), os.environ.get("SMELT_SIMD", "")
    if not forced:
        return best
    if forced not in LEVELS[: best + 1]:
        raise ValueError(f"SMELT_SIMD = {forced!r}: this processor has {', '.join(LEVELS[: best + 1])}")
    return LEVELS.index(forced)


@functools.cache
def _best_level() -> int:
    level: int = _library().smelt_level()
    return level


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
    library.smelt_find_neighbours.restype = pointer
    library.smelt_find_neighbours.argtypes = [integer, long, *[pointer] * 4, ctypes.c_double, *[pointer] * 3]
    library.smelt_take_neighbours.argtypes = [pointer, integer, *[pointer] * 4]
    library.smelt_pair_vectors.argtypes = [integer, integer, long, *[pointer] * 7]
    library.smelt_pairs.argtypes = [*[integer] * 3, *[long] * 3, *[pointer] * 4]
    library.smelt_networks.argtypes = [*[integer] * 3, ctypes.POINTER(_Networks)]
    library.smelt_aev.argtypes = [*[integer] * 4, ctypes.POINTER(_Shape), *[long] * 3, *[pointer] * 5]
    return library
