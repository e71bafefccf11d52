"""Which implementation of neighbours, AEVs, networks and pair sums runs? The fastest for these tensors; callers never
know.

`reference` (plain PyTorch) defines the answer; `native` (C++) is used for tensors on the CPU when it was built, `gpu`
(Triton) for those on a GPU. The environment variable SMELT_KERNELS=reference|native|gpu forces one of them, for tests.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from potential.aev import AEVParameters
from potential.kernels import reference
from potential.kernels.blocks import Found
from potential.kernels.kept import Blocks
from potential.kernels.layers import Inputs, Layout, difference, tally
from potential.kernels.motion import Moving
from potential.kernels.reference import Stack
from potential.structures import Structures

__all__ = [
    "Inputs",
    "Kept",
    "Layout",
    "Moving",
    "Stack",
    "aev_forward",
    "aev_jvp",
    "aev_products",
    "aev_vjp",
    "backward_layers",
    "difference",
    "drift",
    "evaluate",
    "find_pairs",
    "find_reverse",
    "forward_layers",
    "have_moved",
    "implementation",
    "keep",
    "kick",
    "native_available",
    "normals",
    "pair_sums",
    "pair_tangents",
    "pair_vectors",
    "pair_virials",
    "respond",
    "shortest_distances",
    "spread",
    "tally",
]

Kept = torch.Tensor | Blocks  # a Jacobian
FORCED = os.environ.get("SMELT_KERNELS", "")


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


def pair_vectors(
    structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(E, 3), A, in `dtype`: from the centre to its neighbour's image, of the pairs of a list."""
    vectors: torch.Tensor = _kernels(structures.positions).pair_vectors(structures, row, other, shift, dtype)
    return vectors


def shortest_distances(
    structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """(B,), A, float64: shortest listed distance of each frame; infinite where there is none."""
    shortest: torch.Tensor = _kernels(structures.positions).shortest_distances(structures, row, other, shift)
    return shortest


def spread(members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation over the members, the first axis."""
    found: tuple[torch.Tensor, torch.Tensor] = _kernels(members).spread(members)
    return found


def have_moved(
    structures: Structures, built: torch.Tensor, strain: torch.Tensor | None, slack_A: torch.Tensor
) -> torch.Tensor | bool:
    """Whether an atom is more than slack_A / 2 of its frame away from where the strained frame carried it.

    built: (N, 3), A, earlier positions; strain: (B, 3, 3), what the cells have been multiplied by since then, or None;
    slack_A: (B,); both float64. An atom that is nowhere has moved. A tensor, (), where its device would have to be
    waited for.
    """
    moved: torch.Tensor | bool = _kernels(structures.positions).have_moved(structures, built, strain, slack_A)
    return moved


def drift(atoms: Moving, step: torch.Tensor, push: float, half_step_fs: float, damping: float) -> None:
    """Half a kick by the forces, half a step, friction and noise, half a step: B, A, O, A of BAOAB, in place.

    step: (B,), number of each frame's step. push: velocity per force over mass. damping: factor on velocities; 1 means
    no noise either.
    """
    _kernels(atoms.positions).drift(atoms, step, push, half_step_fs, damping)


def kick(atoms: Moving, push: float, max_force_eV_A: float) -> bool:
    """Half a kick by the forces, if no component is above the limit or not a number; else nothing but False."""
    kicked: bool = _kernels(atoms.positions).kick(atoms, push, max_force_eV_A)
    return kicked


def normals(atoms: Moving, step: torch.Tensor) -> torch.Tensor:
    """(N, 3): standard normal numbers, a function of noise_key and step (B,) of the frame, and atom within it."""
    drawn: torch.Tensor = _kernels(atoms.positions).normals(atoms, step)
    return drawn


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


def aev_products(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """What aev_vjp makes of a cotangent, and what aev_jvp makes of a tangent: for both, cheaper than one by one."""
    products: tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
    products = _kernels(vec).aev_products(vec, row, species_other, p)
    return products


def evaluate(
    structures: Structures,
    row: torch.Tensor,
    other: torch.Tensor,
    shift: torch.Tensor,
    p: AEVParameters,
    stacks: Sequence[Stack],
    self_energies: torch.Tensor,
    celu_alpha: float,
    n_gradients: int,
    stress: bool,
) -> Found:
    """Energies (M, B), eV, float64; forces (G, N, 3), eV/A; stress (G, B, 3, 3), eV/A^3, or None; spread of forces.

    stacks: one per element. self_energies: (n_elements,), eV, float64. n_gradients, G: the number of members, 1 for the
    mean of theirs, or 0. Pairs beyond the cutoffs may be in the list. Forces and stress are in the dtype of the
    networks. Stress is symmetric, and not a number where the cell has no volume. Spread: as `spread` of the forces,
    None for fewer than two gradients.
    """
    found: Found = _kernels(structures.positions).evaluate(
        structures, row, other, shift, p, stacks, self_energies, celu_alpha, n_gradients, stress
    )
    return found


def forward_layers(
    flat: torch.Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    seen: Inputs,
    former: object = None,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Energies (M, N), g = dE/dAEV (M, N, L), and what the way back needs.

    flat: (M, P), parameters of all networks. layouts: where those of each element are. Where parts of the AEVs are zero
    g may be, too: nothing moves them; with atoms in a row whose AEVs are zero in the same places more is left out.
    former: what an earlier call returned as the last and is needed no more; its memory may be used again. room: like
    g, which may be written there.
    """
    results: tuple[torch.Tensor, torch.Tensor, object]
    results = _kernels(flat).forward_layers(flat, layouts, celu_alpha, seen, former, room)
    return results


def backward_layers(
    flat: torch.Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    tape: object,
    seen: Inputs,
    by_energy: torch.Tensor,
    by_g: torch.Tensor,
    into: torch.Tensor,
    add: bool = True,
) -> None:
    """Write to `into`, (M, P), the gradient of sum(by_energy * energies) + sum(by_g * g), or add it to what is there.

    by_energy: (M, N). by_g: (M, N, L). The other arguments are those of forward_layers, and what it returned.
    """
    _kernels(flat).backward_layers(flat, layouts, celu_alpha, tape, seen, by_energy, by_g, into, add)


def keep(jacobian: torch.Tensor) -> Kept:
    """A Jacobian (3n + 6, n L), rows of forces before those of the virial, as `respond` wants it."""
    kept: Kept = _kernels(jacobian).keep(jacobian)
    return kept


def respond(
    jacobians: Sequence[Kept],
    known_forces: torch.Tensor,
    known_virial: torch.Tensor,
    g: torch.Tensor,
    scale: torch.Tensor,
    force_scale: float,
    virial_scale: float,
    force_cap: float,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forces (M, N, 3), virials (M, B, 6), the derivative (M, N, L) of a loss by g, and errors, from kept Jacobians.

    jacobians: of each of B structures of n atoms, see `keep`. known_forces: (N, 3), and known_virial: (B, 6), not a
    number where there is none. scale: (M, B). room: like g, or g itself; the derivative may be written there.

    The loss is the sum over members and structures of scale / n times: force_scale / 2 * square of the errors of
    forces, linear beyond the cap, and virial_scale / 2 * square of those of the virial. Errors, (M, B, 5): how many
    forces are known, the sum of twice that half square, linear beyond the cap, and that of squares; how many numbers of
    the virial are known, and the sum of their squares.
    """
    response: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    response = _kernels(g).respond(
        jacobians, known_forces, known_virial, g, scale, force_scale, virial_scale, force_cap, room
    )
    return response


def pair_sums(
    pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor, reverse: torch.Tensor | None = None
) -> torch.Tensor:
    """(M, N, 3): of each atom, the sum over its own pairs less that over the pairs in which it is the other.

    pair: (M, E, 3); row: (N + 1,); other: (E,). Of dE/dvec, the derivatives of the energy by the pair vectors, these
    are the forces on the atoms. reverse: (E,), what find_reverse found, where it is at hand: GPUs are faster with it.
    """
    sums: torch.Tensor = _kernels(pair).pair_sums(pair, row, other, reverse)
    return sums


def find_reverse(vec: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(E,): number of the pair that is the same one seen from its other atom. All pairs are listed both ways."""
    reverse: torch.Tensor = _kernels(vec).find_reverse(vec, row, other)
    return reverse


def pair_virials(
    pair: torch.Tensor, vec: torch.Tensor, row: torch.Tensor, frame_of_atom: torch.Tensor, n_frames: int
) -> torch.Tensor:
    """(M, B, 6), float64: sum over the pairs of each frame of vec (x) pair, made symmetric: xx yy zz yz xz xy.

    pair: (M, E, 3); vec: (E, 3). Of dE/dvec, these are the derivatives of the energies by strain.
    """
    virials: torch.Tensor = _kernels(pair).pair_virials(pair, vec, row, frame_of_atom, n_frames)
    return virials


def pair_tangents(
    atom: torch.Tensor,
    strain: torch.Tensor,
    vec: torch.Tensor,
    row: torch.Tensor,
    other: torch.Tensor,
    frame_of_atom: torch.Tensor,
) -> torch.Tensor:
    """(M, E, 3): pair_sums and pair_virials transposed. atom: (M, N, 3); strain: (M, B, 6), xx yy zz yz xz xy."""
    tangents: torch.Tensor = _kernels(vec).pair_tangents(atom, strain, vec, row, other, frame_of_atom)
    return tangents


def implementation(vec: torch.Tensor) -> str:
    """Name of the module that would work on tensors like this one."""
    return _kernels(vec).__name__.rpartition(".")[2]


def _kernels(vec: torch.Tensor) -> ModuleType:
    if FORCED not in ("", "reference", "native", "gpu"):
        raise ValueError(f"SMELT_KERNELS = {FORCED!r}: must be reference, native or gpu")
    if FORCED == "gpu" or (FORCED == "" and vec.is_cuda):
        return _gpu() or reference
    if FORCED == "reference" or not vec.is_cpu:
        return reference
    native = _native()
    if native is not None:
        return native
    if FORCED == "native":
        raise RuntimeError("SMELT_KERNELS = native: the C++ kernels are not built; reinstall smelt with a compiler")
    return reference


@functools.cache
def _gpu() -> ModuleType | None:
    """The Triton kernels, or None after one warning."""
    try:
        from potential.kernels import gpu
    except ImportError as error:
        message = f"no Triton ({error}): plain PyTorch runs on the GPU, several times slower"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return None
    return gpu


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
        _keep_memory()
    return module


def _keep_memory() -> None:
    """Spare the plain kernels fresh pages for their large temporaries, which take longer than the operations on them.

    glibc gives blocks above a size back to the system at once, and adapts that size to what has been freed, up to
    32 MB: so here is a block that is freed before anything touches it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@functools.cache
def _find_native() -> tuple[ModuleType | None, str]:
    try:
        from potential.kernels import native
    except ImportError as error:
        return None, str(error)
    return (native, "") if native.available() else (None, "not built at installation")
