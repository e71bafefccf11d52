"""Which implementation of neighbours, AEVs, networks and pair sums runs? The fastest for these tensors; callers never
know.

`reference` (plain PyTorch) defines the answer; `native` (C++) is used for tensors on the CPU when it was built. The
environment variable SMELT_KERNELS=reference|native forces one of them, for tests.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch

from potential.aev import AEVParameters
from potential.kernels import reference
from potential.structures import Structures

__all__ = [
    "aev_forward",
    "aev_jvp",
    "aev_vjp",
    "find_pairs",
    "implementation",
    "native_available",
    "networks",
    "pair_differences",
    "pair_sums",
    "pair_vectors",
]


def find_pairs(
    structures: Structures, cutoff_A: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre (E,), other (E,), shift (E, 3), int32, and row (N + 1,) of all directed pairs closer than the cutoff.

    Sorted by centre; pairs of atom i are row[i] .. row[i + 1]. shift: lattice vectors to add to `other`.

    Raises:
        ValueError: periodic axes of a cell that span no volume, or positions that are not finite.
    """
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    pairs = _kernels(structures.positions).find_pairs(structures, cutoff_A)
    return pairs


def pair_vectors(structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image, in the dtype of the positions, of the pairs of a list."""
    vectors: torch.Tensor = _kernels(structures.positions).pair_vectors(structures, row, other, shift)
    return vectors


def aev_forward(vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> torch.Tensor:
    """AEVs of all atoms, (N, L).

    vec: (E, 3), A, from each centre to its neighbours, sorted by centre. row: (N + 1,), pairs of atom i are
    row[i] .. row[i + 1]. species_other: (E,), species of the neighbours. Pairs beyond a cutoff add exactly 0.
    """
    aev: torch.Tensor = _kernels(vec).aev_forward(vec, row, species_other, p)
    return aev


def aev_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, cotangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """J^T: derivative of <cotangent_m, aev> by vec, (M, E, 3). cotangent: (M, N, L)."""
    product: torch.Tensor = _kernels(vec).aev_vjp(vec, row, species_other, cotangent, p)
    return product


def aev_jvp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, tangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """J: change of the AEVs when vec changes by tangent_m, (M, N, L). tangent: (M, E, 3)."""
    product: torch.Tensor = _kernels(vec).aev_jvp(vec, row, species_other, tangent, p)
    return product


def networks(
    aev: torch.Tensor,
    atoms: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    celu_alpha: float,
    energies: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """Write the energies of `atoms` by all members to `energies`, and dE/dAEV of each or of their mean to `gradient`.

    aev: (N, L); atoms: (n,), those of one element; weights, biases: per layer (M, out, in) and (M, out), the last with
    one output; energies: (M, N); gradient: (M, N, L), (1, N, L) for the mean, or (0, N, L) for none. Rows of other
    atoms are left as they are.
    """
    _kernels(aev).networks(aev, atoms, weights, biases, celu_alpha, energies, gradient)


def pair_sums(pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, N, 3): of each atom, the sum over its own pairs less that over the pairs in which it is the other.

    pair: (M, E, 3); row: (N + 1,); other: (E,). Of dE/dvec, the derivatives of the energy by the pair vectors, these
    are the forces on the atoms.
    """
    sums: torch.Tensor = _kernels(pair).pair_sums(pair, row, other)
    return sums


def pair_differences(atom: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, E, 3): of each pair, its centre's value less the other's: pair_sums transposed. atom: (M, N, 3)."""
    differences: torch.Tensor = _kernels(atom).pair_differences(atom, row, other)
    return differences


def implementation(vec: torch.Tensor) -> str:
    """Name of the module that would work on tensors like this one."""
    return _kernels(vec).__name__.rpartition(".")[2]


def _kernels(vec: torch.Tensor) -> ModuleType:
    forced = os.environ.get("SMELT_KERNELS", "")
    if forced not in ("", "reference", "native"):
        raise ValueError(f"SMELT_KERNELS = {forced!r}: must be reference or native")
    if forced == "reference" or vec.device.type != "cpu":
        return reference
    native = _native()
    if native is not None:
        return native
    if forced == "native":
        raise RuntimeError("SMELT_KERNELS = native: the C++ kernels are not built; reinstall smelt with a compiler")
    return reference


def native_available() -> bool:
    """Whether the C++ kernels were built."""
    return _find_native()[0] is not None


@functools.cache
def _native() -> ModuleType | None:
    """The C++ kernels, or None after one warning."""
    module, reason = _find_native()
    if module is None:
        message = f"no C++ kernels ({reason}): the plain PyTorch ones are used, several times slower"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return module


@functools.cache
def _find_native() -> tuple[ModuleType | None, str]:
    try:
        from potential.kernels import native
    except ImportError as error:
        return None, str(error)
    return (native, "") if native.available() else (None, "not built at installation")
