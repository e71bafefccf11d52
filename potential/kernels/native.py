"""How do PyTorch tensors on the CPU reach the C++ kernels?"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from potential.aev import AEVParameters
from potential.kernels import reference
from potential.kernels.bins import FLAT_CELL, NOT_FINITE
from potential.kernels.blocks import Found
from potential.kernels.kept import Blocks
from potential.kernels.kept import cut as keep
from potential.kernels.layers import N_ERRORS, Inputs, Layout
from potential.kernels.library import (
    AevPower,
    AevShape,
    Evaluate,
    Layers,
    LayersShape,
    Motion,
    Networks,
    Response,
    available,
    level,
    library,
)
from potential.kernels.motion import Moving
from potential.kernels.powers import fit_power, reach_of
from potential.kernels.reference import Stack, find_reverse, pair_virials
from potential.structures import Structures

__all__ = [
    "aev_forward",
    "aev_jvp",
    "aev_products",
    "aev_vjp",
    "available",
    "backward_layers",
    "drift",
    "evaluate",
    "find_pairs",
    "find_reverse",
    "forward_layers",
    "have_moved",
    "keep",
    "kick",
    "networks",
    "normals",
    "pair_differences",
    "pair_sums",
    "pair_tangents",
    "pair_vectors",
    "pair_virials",
    "respond",
    "shortest_distances",
    "spread",
]

KNOWN: weakref.WeakKeyDictionary[Stack, Known] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Known:
    """What the kernel has to know of a stack, and what of it was looked at.

    The weights are kept, so that no others can take their place in memory, and so are those that were packed.
    """

    seen: tuple[object, ...]
    job: Networks
    weights: Sequence[torch.Tensor]
    packed: torch.Tensor | None


@dataclass(frozen=True)
class Tape:
    """What the way back through layers needs. Those of element e are atoms[first[e]] .. atoms[first[e + 1]]."""

    atoms: torch.Tensor
    first: NDArray[np.int64]
    numbers: torch.Tensor


FORWARD, VJP, JVP = range(3)
_moved_last: tuple[tuple[torch.Tensor, ...], Motion] = (), Motion()  # looked at, and pointed to
NO_MEMORY, FLAT = 1, 2  # Status of neighbours.cpp


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
    found = library().smelt_find_neighbours(
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
        library().smelt_take_neighbours(found, n_threads, None, None, None, None)
        raise
    library().smelt_take_neighbours(
        found, n_threads, row.data_ptr(), centre.data_ptr(), other.data_ptr(), shift.data_ptr()
    )
    return centre, other, shift, row


def pair_vectors(
    structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image. row: (N + 1,); other: (E,); shift: (E, 3), int32."""
    positions, cell = structures.positions.contiguous(), structures.cell.to(structures.positions.dtype).contiguous()
    frame_of_atom = structures.frame_of_atom.contiguous()
    _check("shift", shift, (other.shape[0], 3))
    out = positions.new_empty(other.shape[0], 3, dtype=dtype)
    library().smelt_pair_vectors(
        _is_double(positions),
        _is_double(out),
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


def shortest_distances(
    structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """(B,), A, float64: shortest listed distance of each frame; infinite where there is none."""
    positions, cell = structures.positions.contiguous(), structures.cell.to(structures.positions.dtype).contiguous()
    first, pbc = structures.first_atom, structures.pbc.contiguous()
    out = positions.new_empty(structures.n_frames, dtype=torch.float64)
    library().smelt_shortest(
        _is_double(positions),
        torch.get_num_threads(),
        structures.n_frames,
        first.data_ptr(),
        pbc.data_ptr(),
        row.data_ptr(),
        other.data_ptr(),
        shift.data_ptr(),
        positions.data_ptr(),
        cell.data_ptr(),
        out.data_ptr(),
    )
    return out


def have_moved(structures: Structures, built: torch.Tensor, strain: torch.Tensor | None, slack_A: torch.Tensor) -> bool:
    """Whether an atom is more than slack_A / 2 of its frame away from where the strained frame carried it."""
    positions, first = structures.positions.contiguous(), structures.first_atom
    _check("built", built, tuple(positions.shape))
    _check("slack_A", slack_A, (structures.n_frames,))
    n_moved = library().smelt_moved(
        _is_double(positions),
        structures.n_frames,
        first.data_ptr(),
        positions.data_ptr(),
        built.data_ptr(),
        None if strain is None else strain.data_ptr(),
        slack_A.data_ptr(),
    )
    return bool(n_moved)


def drift(atoms: Moving, step: torch.Tensor, push: float, half_step_fs: float, damping: float) -> None:
    """Half a kick by the forces, half a step, friction and noise, half a step."""
    library().smelt_drift(level(), ctypes.byref(_motion(atoms, step, push, half_step_fs, damping)))


def kick(atoms: Moving, push: float, max_force_eV_A: float) -> bool:
    """Half a kick by the forces, if no component is above the limit or not a number; else nothing but False."""
    return bool(library().smelt_kick(level(), ctypes.byref(_motion(atoms, None, push)), max_force_eV_A))


def normals(atoms: Moving, step: torch.Tensor) -> torch.Tensor:
    """(N, 3), float32: independent standard normal numbers for each atom and step (B,)."""
    out = atoms.positions.new_empty(atoms.positions.shape, dtype=torch.float32)
    library().smelt_normals(level(), ctypes.byref(_motion(atoms, step)), out.data_ptr())
    return out


def _motion(
    atoms: Moving, step: torch.Tensor | None, push: float = 0.0, half_step_fs: float = 0.0, damping: float = 1.0
) -> Motion:
    global _moved_last  # steps come by the thousand, and of one batch
    per_atom = atoms.positions, atoms.velocities, atoms.forces, atoms.inverse_mass, atoms.noise_scale
    tensors = *per_atom, atoms.frame_of_atom, atoms.first_atom, atoms.noise_key
    known, job = _moved_last
    if len(known) != len(tensors) or not all(map(operator.is_, known, tensors)):
        n_atoms, n_frames = atoms.positions.shape[0], atoms.noise_key.shape[0]
        for tensor, width in zip(per_atom, (3, 3, 3, 1, 1), strict=True):
            _check_plain(tensor, width * n_atoms, torch.float64)
        for tensor, numbers in zip(tensors[5:], (n_atoms, n_frames + 1, n_frames), strict=True):
            _check_plain(tensor, numbers, torch.int64)
        job = Motion(n_atoms, *(tensor.data_ptr() for tensor in tensors))
        _moved_last = tensors, job
    job = Motion.from_buffer_copy(job)
    job.step = None if step is None else step.data_ptr()
    job.push, job.half_step, job.damping = push, half_step_fs, damping
    return job


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
    """As potential.kernels.evaluate, in one call."""
    dtype, n_members = stacks[0].weights[0].dtype, stacks[0].weights[0].shape[0]
    positions, cells = structures.positions.double().contiguous(), structures.cell.double().contiguous()
    n_atoms, n_frames = positions.shape[0], cells.shape[0]
    energy = positions.new_empty(n_members, n_frames)
    forces = positions.new_empty(n_gradients, n_atoms, 3, dtype=dtype)
    stresses = forces.new_empty(n_gradients, n_frames, 3, 3) if stress else None
    spread = (forces.new_empty(n_atoms, 3), forces.new_empty(n_atoms, 3)) if n_gradients > 1 else None
    self_energies = self_energies.double().contiguous()
    _check("row", row, (n_atoms + 1,))
    _check("shift", shift, (other.shape[0], 3))
    instructions = level()
    known = [_known(stack, p.length, dtype, celu_alpha, instructions) for stack in stacks]  # kept until all is done
    job = Evaluate(
        ctypes.pointer(_shape(p)),
        row.data_ptr(),
        other.data_ptr(),
        shift.data_ptr(),
        structures.frame_of_atom.data_ptr(),
        structures.species.data_ptr(),
        positions.data_ptr(),
        cells.data_ptr(),
        n_atoms,
        n_frames,
        n_gradients,
        structures.first_atom.data_ptr(),
        (Networks * len(stacks))(*[each.job for each in known]),
        self_energies.data_ptr(),
        energy.data_ptr(),
        forces.data_ptr(),
        None if stresses is None else stresses.data_ptr(),
        *(each.data_ptr() for each in spread or ()),
    )
    if library().smelt_evaluate(instructions, _is_double(forces), torch.get_num_threads(), ctypes.byref(job)):
        raise MemoryError(f"no memory to evaluate {n_atoms} atoms, {n_members} members")
    return energy, forces, stresses, spread


def spread(members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation over the first axis."""
    members = members.contiguous()
    both = members.new_empty(2, *members.shape[1:])
    size, mean = both[0].numel() * both.itemsize, both.data_ptr()
    library().smelt_spread(
        _is_double(members), members.shape[0], both[0].numel(), members.data_ptr(), mean, mean + size
    )
    return both[0], both[1]


def networks(
    aev: torch.Tensor,
    atoms: torch.Tensor,
    stack: Stack,
    celu_alpha: float,
    energies: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """Write the energies of `atoms` by all members, and dE/dAEV or its mean over members, to the last two arguments.

    aev: (N, L); atoms: (n,), int64, those of one element; energies: (M, N); gradient: (M, N, L), (1, N, L) for the
    mean, or (0, N, L) for none. Rows of other atoms are left as they are.
    """
    n_members, n_atoms, length = stack.weights[0].shape[0], *aev.shape
    n_gradients = gradient.shape[0]
    _check("energies", energies, (n_members, n_atoms))
    _check("gradient", gradient, (n_gradients if n_gradients in (0, 1) else n_members, n_atoms, length))
    if not all(t.is_contiguous() and t.dtype == aev.dtype for t in (aev, energies, gradient)):
        raise ValueError(f"networks: all tensors must be contiguous and {aev.dtype}, as aev is")
    atoms = atoms.long().contiguous()
    instructions = level()
    known = _known(stack, length, aev.dtype, celu_alpha, instructions)  # which keeps what the copy points to
    job = Networks.from_buffer_copy(known.job)
    job.n_rows, job.n_atoms, job.mean = atoms.shape[0], n_atoms, n_gradients == 1
    job.atoms, job.aev, job.energies = atoms.data_ptr(), aev.data_ptr(), energies.data_ptr()
    job.gradient = gradient.data_ptr() if n_gradients else None
    if library().smelt_networks(instructions, _is_double(aev), torch.get_num_threads(), ctypes.byref(job)):
        raise MemoryError(f"no memory for the networks: {atoms.shape[0]} atoms, {n_members} members")


def _known(stack: Stack, length: int, dtype: torch.dtype, celu_alpha: float, instructions: int) -> Known:
    """What the kernel has to know of the networks of one element, without the atoms.

    They are looked at when they are first seen, and again when weights have been written to, as far as PyTorch counts.
    """
    tensors = *stack.weights, *stack.biases
    seen = (
        length,
        dtype,
        celu_alpha,
        instructions,
        *[tensor.data_ptr() for tensor in tensors],
        # Where PyTorch does not count what is written, there is what equals no other.
        *[object() if weight.is_inference() else weight._version for weight in stack.weights],
    )
    known = KNOWN.get(stack)
    if known is None or known.seen != seen:
        job = _describe(stack, length, dtype, celu_alpha)
        weights = [weight.detach() for weight in stack.weights]
        known = KNOWN[stack] = Known(seen, job, weights, _pack(job, _is_double(weights[0]), instructions))
    return known


def _describe(stack: Stack, length: int, dtype: torch.dtype, celu_alpha: float) -> Networks:
    n_members, n_layers = stack.weights[0].shape[0], len(stack.weights)
    widths = (length, *(bias.shape[1] for bias in stack.biases))
    for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        _check(f"weight {layer}", weight, (n_members, widths[layer + 1], widths[layer]))
        _check(f"bias {layer}", bias, (n_members, widths[layer + 1]))
        if not (weight.is_contiguous() and bias.is_contiguous() and weight.dtype == bias.dtype == dtype):
            raise ValueError(f"layer {layer}: weights and biases must be contiguous and {dtype}")
    if widths[-1] != 1:
        raise ValueError(f"networks with {widths[-1]} outputs: one, the energy, is supported")
    return Networks(
        n_members,
        n_layers,
        0,
        0,
        (ctypes.c_int64 * len(widths))(*widths),
        (ctypes.c_void_p * n_layers)(*(weight.data_ptr() for weight in stack.weights)),
        (ctypes.c_void_p * n_layers)(*(bias.data_ptr() for bias in stack.biases)),
        None,
        celu_alpha,
    )


def _pack(job: Networks, is_double: bool, instructions: int) -> torch.Tensor | None:
    """The weights as products want them, known to the job from now on; None where they want them as they are."""
    n_bytes = library().smelt_packed_bytes(instructions, is_double, ctypes.byref(job))
    if not n_bytes:
        return None
    packed = torch.empty(n_bytes, dtype=torch.uint8)
    if library().smelt_pack(instructions, is_double, torch.get_num_threads(), ctypes.byref(job), packed.data_ptr()):
        raise MemoryError(f"no memory to pack the weights of {job.n_members} members")
    job.packed = packed.data_ptr()
    return packed


def forward_layers(
    flat: torch.Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    seen: Inputs,
    former: Tape | None = None,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Tape]:
    """As potential.kernels.forward_layers."""
    energies, g = seen.results(flat.shape[0], room)
    _check("room", g, (*energies.shape, seen.aev.shape[1]))
    if len(seen.elements) != len(layouts):
        raise ValueError(f"atoms of {len(seen.elements)} elements: must be of {len(layouts)}, which have networks")
    atoms = torch.cat(tuple(seen.elements)).long()
    first = np.cumsum([0, *(len(each) for each in seen.elements)])
    job = _layers(flat, layouts, celu_alpha, seen, atoms, first, g)
    job.energies, job.g = energies.data_ptr(), g.data_ptr()
    n_numbers = library().smelt_tape(level(), _is_double(flat), ctypes.byref(job))
    if former is not None and former.numbers.dtype == flat.dtype and len(former.numbers) >= n_numbers:
        numbers = former.numbers
    else:
        numbers = flat.new_empty(n_numbers)
    job.tape = numbers.data_ptr()
    _run_layers(False, flat, job)
    return energies, g, Tape(atoms, first, numbers)


def backward_layers(
    flat: torch.Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    tape: Tape,
    seen: Inputs,
    by_energy: torch.Tensor,
    by_g: torch.Tensor,
    into: torch.Tensor,
    add: bool = True,
) -> None:
    """As potential.kernels.backward_layers; the atoms of the elements are on the tape."""
    by_energy, by_g = by_energy.contiguous(), by_g.contiguous()
    _check("by_energy", by_energy, (flat.shape[0], seen.n_atoms))
    _check("by_g", by_g, (flat.shape[0], seen.n_atoms, seen.aev.shape[1]))
    _check("into", into, tuple(flat.shape))
    job = _layers(flat, layouts, celu_alpha, seen, tape.atoms, tape.first, by_energy, by_g, into)
    job.tape, job.by_energy, job.by_g = tape.numbers.data_ptr(), by_energy.data_ptr(), by_g.data_ptr()
    job.gradient, job.add = into.data_ptr(), add
    _run_layers(True, flat, job)


def _layers(
    flat: torch.Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    seen: Inputs,
    atoms: torch.Tensor,
    first: NDArray[np.int64],
    *others: torch.Tensor,
) -> Layers:
    if not all(tensor.dtype == flat.dtype and tensor.is_contiguous() for tensor in (flat, seen.aev, *others)):
        raise ValueError(
            f"networks in training: all tensors must be contiguous and {flat.dtype}, as the parameters are"
        )
    return Layers(
        flat.shape[0],
        len(layouts),
        seen.n_atoms,
        flat.shape[1],
        _layers_shapes(tuple(layouts)),
        celu_alpha,
        flat.data_ptr(),
        atoms.data_ptr(),
        first.ctypes.data,
        seen.aev.data_ptr(),
        None if seen.rows is None else seen.rows.data_ptr(),
    )


@functools.lru_cache(maxsize=64)
def _layers_shapes(layouts: tuple[Layout, ...]) -> ctypes.Array[LayersShape]:
    def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(values))(*values)

    shapes = (LayersShape(len(each.offsets), integers(each.widths), integers(each.offsets)) for each in layouts)
    return (LayersShape * len(layouts))(*shapes)


def _run_layers(backward: bool, flat: torch.Tensor, job: Layers) -> None:
    if library().smelt_layers(backward, level(), _is_double(flat), torch.get_num_threads(), ctypes.byref(job)):
        raise MemoryError(f"no memory for the networks of {job.n_atoms} atoms, {job.n_members} members")


def respond(
    jacobians: Sequence[Blocks],
    known_forces: torch.Tensor,
    known_virial: torch.Tensor,
    g: torch.Tensor,
    scale: torch.Tensor,
    force_scale: float,
    virial_scale: float,
    force_cap: float,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forces (M, N, 3), virials (M, B, 6), the derivative (M, N, L) of a loss by g, errors, from kept Jacobians."""
    n_members, n_atoms, length = g.shape
    n_structures = len(jacobians)
    first, pointers = _look_at(jacobians, g)
    _check("known_forces", known_forces, (n_atoms, 3))
    _check("known_virial", known_virial, (n_structures, 6))
    _check("scale", scale, (n_members, n_structures))
    v = torch.empty_like(g) if room is None else room
    _check("room", v, tuple(g.shape))
    if not all(
        tensor.is_contiguous() and tensor.dtype == g.dtype for tensor in (g, known_forces, known_virial, scale, v)
    ):
        raise ValueError(f"kept derivatives: all tensors must be contiguous and {g.dtype}, as g is")
    forces, virial = g.new_empty(n_members, n_atoms, 3), g.new_empty(n_members, n_structures, 6)
    errors = g.new_zeros(n_members, n_structures, N_ERRORS, dtype=torch.float64)
    job = Response(
        n_members,
        length,
        n_atoms,
        n_structures,
        first.ctypes.data,
        pointers.ctypes.data,
        known_forces.data_ptr(),
        known_virial.data_ptr(),
        scale.data_ptr(),
        force_scale,
        virial_scale,
        force_cap,
        *(tensor.data_ptr() for tensor in (g, forces, virial, v, errors)),
    )
    if library().smelt_respond(level(), _is_double(g), torch.get_num_threads(), ctypes.byref(job)):
        raise MemoryError(f"no memory for the response of {n_atoms} atoms, {n_members} members")
    return forces, virial, v, errors.to(g.dtype)


def _look_at(jacobians: Sequence[Blocks], g: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first atom of each structure and the number of atoms, (B + 1,), and where the Jacobians are, (B, 3).

    One array of numbers is made in less time than as many objects of ctypes. Raises ValueError where they do not fit g.
    """
    n_atoms, length = g.shape[1:]
    facts = np.array([jacobian.facts for jacobian in jacobians], dtype=np.int64)
    rows, columns, itemsize = facts[:, :3].T
    counts = (rows - 6) // 3
    if (rows != 3 * counts + 6).any() or (columns != counts * length).any() or counts.sum() != n_atoms:
        shapes = ", ".join(str(jacobian.shape) for jacobian in jacobians)
        raise ValueError(f"jacobians are {shapes}: must be (3 n + 6, n x {length}), {n_atoms} atoms in all")
    if (itemsize != g.itemsize).any():
        raise ValueError(f"kept derivatives: all tensors must be contiguous and {g.dtype}, as g is")
    return np.cumsum(np.append(0, counts)), np.ascontiguousarray(facts[:, 3:])


def aev_products(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """As potential.kernels.aev_products; features are computed again for each."""
    pairs = vec, row, species_other
    return lambda cotangent: aev_vjp(*pairs, cotangent, p), lambda tangent: aev_jvp(*pairs, tangent, p)


def pair_sums(
    pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor, reverse: torch.Tensor | None = None
) -> torch.Tensor:
    """As potential.kernels.pair_sums; `reverse` is not needed here."""
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


pair_tangents = functools.partial(reference.pair_tangents, differences=pair_differences)


def _run_pairs(
    summing: bool, argument: torch.Tensor, row: torch.Tensor, other: torch.Tensor, out: torch.Tensor
) -> None:
    argument, row, other = argument.contiguous(), row.long().contiguous(), other.long().contiguous()
    failed = library().smelt_pairs(
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
    failed = library().smelt_aev(
        product,
        level(),
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
    if tuple(tensor.shape) != shape or not tensor.is_cpu:
        raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be {shape} on the CPU")


def _check_plain(tensor: torch.Tensor, numbers: int, dtype: torch.dtype) -> None:
    """What a kernel that is called every few microseconds looks at."""
    if tensor.numel() != numbers or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{tuple(tensor.shape)} numbers of {tensor.dtype}: must be {numbers} of {dtype}, contiguous on the CPU"
        )


def _is_double(tensor: torch.Tensor) -> bool:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{tensor.dtype}: the C++ kernels know float32 and float64")
    return tensor.dtype == torch.float64


@functools.lru_cache(maxsize=64)
def _shape(p: AEVParameters) -> AevShape:
    def doubles(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
        return (ctypes.c_double * len(values))(*values)

    return AevShape(
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
        *_powers(p.zeta),
    )


def _powers(zeta: float) -> tuple[float, ctypes.Array[AevPower]]:
    """The last two of AevShape."""
    reach = reach_of(zeta - 1)
    fitted = [power for power in (fit_power(exponent, reach) for exponent in (zeta, zeta - 1)) if power is not None]
    if len(fitted) < 2:
        return 0.0, (AevPower * 2)()
    powers = (AevPower((ctypes.c_double * len(terms))(*terms), n_squarings) for terms, n_squarings in fitted)
    return reach, (AevPower * 2)(*powers)
