"""How do PyTorch tensors on a GPU reach the Triton programs? In Triton's interpreter those on the CPU do, too.

Everything is launched without waiting for the device; what has no program of its own runs in plain PyTorch there.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from potential.aev import AEVParameters
from potential.kernels import blocks, layers, programs, reference
from potential.kernels.layers import Inputs, Layout
from potential.kernels.motion import Moving
from potential.kernels.powers import DEGREE, fit_power, reach_of
from potential.kernels.reference import (
    Stack,
    find_pairs,
    have_moved,
    keep,
    kick,
    normals,
    respond,
    spread,
)
from potential.structures import Structures

__all__ = [
    "aev_forward",
    "aev_jvp",
    "aev_products",
    "aev_vjp",
    "aev_with_vjp",
    "backward_layers",
    "described_bytes",
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
    "pair_sums",
    "pair_tangents",
    "pair_vectors",
    "pair_virials",
    "respond",
    "shortest_distances",
    "spread",
]

PAIRS_PER_PROGRAM, ATOMS_PER_PROGRAM, VALUES_PER_PROGRAM = 128, 128, 1024
CUTS = 16  # of sums over the atoms of a training step
LAYER_ROWS = 64  # atoms of a program of such a step
WARP = 32  # lanes of a program with a pair or a triple each
MOST_BINS = 64  # of a pair of species, whose derivatives by a pair fit the registers of a program
PRODUCTS = 16  # with a Jacobian, of a program: what a tensor core takes at least
PRODUCT = {"MEMBERS": PRODUCTS, "BLOCK": WARP, "num_warps": 1, "num_stages": 1}


def aev_forward(vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> torch.Tensor:
    """(N, L). vec: (E, 3), A, from each centre to its neighbours; row: (N + 1,); species_other: (E,)."""
    return _sums(_Pairs(vec, row, species_other, p), None)[0]


def aev_with_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The AEVs, and what aev_vjp makes of a cotangent. Lists of near pairs are kept in between."""
    pairs = _Pairs(vec, row, species_other, p)
    return _sums(pairs, None)[0], functools.partial(_pull_back, pairs)


def aev_products(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """As potential.kernels.aev_products: lists of near pairs and the Jacobian are made once for all of them."""
    pairs = _Pairs(vec, row, species_other, p)
    return functools.partial(_pull_back, pairs), lambda tangent: _sums(pairs, tangent.contiguous())


def described_bytes(pairs_per_atom: float, p: AEVParameters, itemsize: int, n_products: int) -> float:
    """What aev_with_vjp keeps for each atom at most: its part of `whole`, `real` and, if it is made, the Jacobian."""
    n_numbers = 6 + 3 * p.n_species * p.n_per_pair * _by_jacobian(n_products, p, itemsize)
    return pairs_per_atom * (3 * 8 + n_numbers * itemsize)


def _by_jacobian(n_products: int, p: AEVParameters, itemsize: int) -> bool:
    """Whether so many products are cheaper by way of the Jacobian: to make it costs as much as two of them."""
    return n_products > 2 and p.n_per_pair <= MOST_BINS and _has_programs(itemsize)


def _has_programs(itemsize: int) -> bool:
    """Whether there are programs that multiply matrices: those of float32, whose rounding was looked at on NVIDIA's."""
    return itemsize == 4 and not torch.version.hip


def aev_jvp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, tangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, N, L): d aev . tangent_m. tangent: (M, E, 3), change of vec."""
    return _sums(_Pairs(vec, row, species_other, p), tangent.contiguous())


def aev_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, cotangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, E, 3): d<cotangent_m, aev>/dvec. cotangent: (M, N, L)."""
    return _pull_back(_Pairs(vec, row, species_other, p), cotangent)


def _pull_back(pairs: _Pairs, cotangent: torch.Tensor) -> torch.Tensor:
    p = pairs.p
    cotangent = cotangent.contiguous()
    out = cotangent.new_empty(len(cotangent), pairs.n_pairs, 3)
    if _by_jacobian(len(cotangent), p, out.itemsize):
        pairs.apply_radial(programs.radial_pull, cotangent, out)
        pairs.apply_angular(programs.angular_pull, cotangent, out)
        return out
    _launch(
        programs.radial_vjp,
        (pairs.n_atoms, len(cotangent)),
        pairs.vec,
        pairs.distance,
        pairs.row,
        pairs.species_other,
        cotangent,
        out,
        pairs.n_pairs,
        **_radial(p),
        BLOCK=WARP,
        num_warps=1,
    )
    _launch(
        programs.angular_vjp,
        (triton.cdiv(pairs.n_pairs, WARP), len(cotangent)),
        pairs.bounds,
        pairs.whole,
        pairs.real,
        cotangent,
        out,
        pairs.n_atoms,
        pairs.n_pairs,
        **_angular(p, out.dtype),
        BLOCK=WARP,
        num_warps=1,
    )
    return out


def pair_vectors(
    structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image. row: (N + 1,); other: (E,); shift: (E, 3), int32."""
    positions = structures.positions.contiguous()
    out = positions.new_empty(len(other), 3, dtype=dtype)
    _launch(
        programs.pair_vectors,
        (len(positions),),
        row.contiguous(),
        other.contiguous(),
        shift.contiguous(),
        structures.frame_of_atom,
        positions,
        structures.cell.to(positions.dtype).contiguous(),
        out,
        BLOCK=WARP,
        num_warps=1,
    )
    return out


def drift(atoms: Moving, step: torch.Tensor, push: float, half_step_fs: float, damping: float) -> None:
    """As potential.kernels.drift."""
    n_atoms = len(atoms.positions)
    _launch(
        programs.drift,
        (triton.cdiv(n_atoms, ATOMS_PER_PROGRAM),),
        atoms.positions,
        atoms.velocities,
        atoms.forces,
        atoms.inverse_mass,
        atoms.noise_scale,
        atoms.frame_of_atom,
        atoms.first_atom,
        atoms.noise_key,
        step,
        n_atoms,
        PUSH=push,
        HALF_STEP=half_step_fs,
        DAMPING=damping,
        BLOCK=ATOMS_PER_PROGRAM,
    )


def pair_sums(
    pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor, reverse: torch.Tensor | None = None
) -> torch.Tensor:
    """As potential.kernels.pair_sums. Without `reverse` the last bits depend on the order of additions."""
    out = pair.new_zeros(len(pair), len(row) - 1, 3)
    _launch(
        programs.pair_sums,
        (out.shape[1], len(pair)),
        pair.contiguous(),
        row.contiguous(),
        other.contiguous(),
        reverse,
        out,
        len(other),
        BLOCK=WARP,
        num_warps=1,
    )
    return out


def find_reverse(vec: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """As potential.kernels.find_reverse."""
    out = torch.empty_like(other)
    centre = torch.repeat_interleave(row.diff(), output_size=len(other))
    grid = (triton.cdiv(len(other), PAIRS_PER_PROGRAM),)
    _launch(programs.find_reverse, grid, vec, row, other, centre, out, len(other), BLOCK=PAIRS_PER_PROGRAM)
    return out


def pair_virials(
    pair: torch.Tensor, vec: torch.Tensor, row: torch.Tensor, frame_of_atom: torch.Tensor, n_frames: int
) -> torch.Tensor:
    """As potential.kernels.pair_virials."""
    out = pair.new_zeros(len(pair), n_frames, 6, dtype=torch.float64)
    _launch(
        programs.pair_virials,
        (len(row) - 1, len(pair)),
        pair.contiguous(),
        vec.contiguous(),
        row.contiguous(),
        frame_of_atom.contiguous(),
        out,
        n_frames,
        len(vec),
        BLOCK=WARP,
        num_warps=1,
    )
    return out


def pair_tangents(
    atom: torch.Tensor,
    strain: torch.Tensor,
    vec: torch.Tensor,
    row: torch.Tensor,
    other: torch.Tensor,
    frame_of_atom: torch.Tensor,
) -> torch.Tensor:
    """As potential.kernels.pair_tangents."""
    out = atom.new_empty(len(atom), len(vec), 3)
    _launch(
        programs.pair_tangents,
        (len(row) - 1, len(atom)),
        atom.contiguous(),
        strain.contiguous(),
        vec.contiguous(),
        row.contiguous(),
        other.contiguous(),
        frame_of_atom.contiguous(),
        out,
        strain.shape[1],
        len(vec),
        BLOCK=WARP,
        num_warps=1,
    )
    return out


def celu(value: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """CELU and its slope, in one pass over the values, which are overwritten."""
    value = value.contiguous()
    slope = torch.empty_like(value)
    n_programs = triton.cdiv(value.numel(), VALUES_PER_PROGRAM)
    _launch(programs.celu, (n_programs,), value, slope, value.numel(), ALPHA=alpha, BLOCK=VALUES_PER_PROGRAM)
    return value, slope


def networks(
    aev: torch.Tensor,
    atoms: torch.Tensor,
    stack: Stack,
    celu_alpha: float,
    energies: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """As reference.networks; of float32 in one program, whose matrix products are as good as those of float32."""
    if not _has_programs(aev.itemsize):
        reference.networks(aev, atoms, stack, celu_alpha, energies, gradient, activate=celu)
        return
    layers = [part.flatten(1) for pair in zip(stack.weights, stack.biases, strict=True) for part in pair]
    widths = (aev.shape[1], *(bias.shape[1] for bias in stack.biases))
    sizes = [out * (width + 1) for width, out in itertools.pairwise(widths)]
    layout = Layout(widths, tuple(itertools.accumulate(sizes[:-1], initial=0)))
    each = gradient if len(gradient) in (0, len(energies)) else gradient.new_empty(len(energies), *aev.shape)
    _run_networks(torch.cat(layers, 1), layout, celu_alpha, aev, atoms, energies, each)
    if each is gradient:
        return
    if len(atoms) == len(aev):
        torch.mean(each, 0, out=gradient[0])
    else:
        gradient[0].index_copy_(0, atoms, each.index_select(1, atoms).mean(0))


def forward_layers(
    flat: torch.Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    seen: Inputs,
    former: object = None,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, object]:
    """As potential.kernels.forward_layers; nothing is kept for the way back, where float32 is computed again."""
    if not _has_programs(flat.itemsize):
        return layers.forward_layers(flat, layouts, celu_alpha, seen, None, room)
    aev = _in_order(seen)
    energies, g = seen.results(len(flat), room)
    for layout, atoms in zip(layouts, seen.elements, strict=True):
        _run_networks(flat, layout, celu_alpha, aev, atoms, energies, g)
    return energies, g, None


def _in_order(seen: Inputs) -> torch.Tensor:
    return seen.aev if seen.rows is None else seen.aev.index_select(0, seen.rows)


def _run_networks(
    flat: torch.Tensor,
    layout: Layout,
    celu_alpha: float,
    aev: torch.Tensor,
    atoms: torch.Tensor,
    energies: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    rows = _rows_per_program(layout)
    _launch(
        programs.networks,
        (triton.cdiv(len(atoms), rows), len(flat)),
        aev,
        atoms,
        flat,
        energies,
        gradient,
        len(atoms),
        len(aev),
        flat.shape[1],
        GRADIENT=len(gradient) > 0,
        **_layers(layout, celu_alpha, rows),
    )


def _rows_per_program(layout: Layout) -> int:
    return 128 if max(layout.widths) <= 128 else 64


def _layers(layout: Layout, celu_alpha: float, rows: int) -> dict[str, Any]:
    return {
        "WIDTHS": layout.widths,
        "PIECES": tuple(_pieces(width) for width in layout.widths),
        "OFFSETS": layout.offsets,
        "ALPHA": celu_alpha,
        "ROWS": rows,
        # Eight would read beyond their shared memory in a product of 64 rows and 16 columns (Triton 3.6, H100).
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 1,  # the weights of all layers, read ahead, would not fit in shared memory
    }


def backward_layers(
    flat: torch.Tensor,
    layouts: Sequence[Layout],
    celu_alpha: float,
    tape: Sequence[layers.Tape] | None,
    seen: Inputs,
    by_energy: torch.Tensor,
    by_g: torch.Tensor,
    into: torch.Tensor,
    add: bool = True,
) -> None:
    """As potential.kernels.backward_layers."""
    if tape is not None:
        layers.backward_layers(flat, layouts, celu_alpha, tape, seen, by_energy, by_g, into, add)
        return
    if not add:
        into.zero_()
    aev = _in_order(seen)
    for layout, atoms in zip(layouts, seen.elements, strict=True):
        _add_gradient(flat, layout, celu_alpha, aev, atoms, by_energy, by_g, into)


def _add_gradient(
    flat: torch.Tensor,
    layout: Layout,
    celu_alpha: float,
    aev: torch.Tensor,
    atoms: torch.Tensor,
    by_energy: torch.Tensor,
    by_g: torch.Tensor,
    into: torch.Tensor,
) -> None:
    """Of the networks of one element."""
    n_members, widths = len(flat), layout.widths
    # Sums over atoms are cut: products of few tall matrices would leave most of a GPU idle.
    unit = math.lcm(8 * CUTS, LAYER_ROWS)
    n_rows = triton.cdiv(len(atoms), unit) * unit
    size = 2 * n_rows * n_members
    lower, upper = flat.new_empty(size * sum(widths[:-1])), flat.new_empty(size * sum(widths[1:-1]))
    grid = triton.cdiv(n_rows, LAYER_ROWS), n_members
    counts = len(atoms), len(aev), n_rows, flat.shape[1]
    constants = _layers(layout, celu_alpha, LAYER_ROWS) | {"N_MEMBERS": n_members}
    _launch(programs.layers_up, grid, aev, atoms, flat, by_energy, by_g, lower, into, *counts, **constants)
    _launch(programs.layers_down, grid, atoms, flat, by_energy, lower, upper, into, *counts, **constants)
    below = lower.split([size * width for width in widths[:-1]])
    above = upper.split([size * width for width in reversed(widths[1:-1])])
    slots = layout.layers(into)[:-1]
    for (weight, _), left, right in zip(slots, reversed(above), below, strict=False):
        left, right = (part.view(n_members * CUTS, 2 * n_rows // CUTS, -1) for part in (left, right))
        weight += torch.bmm(left.mT, right).view(n_members, CUTS, *weight.shape[1:]).sum(1)


def _pieces(width: int) -> tuple[int, ...]:
    """Widths of 64, 32 or 16 columns, as programs want them, that together hold so many."""
    n = -(-width // 16)
    return (64,) * (n // 4) + (32,) * (n % 4 // 2) + (16,) * (n % 2)


shortest_distances = functools.partial(reference.shortest_distances, vectors=pair_vectors)
evaluate = functools.partial(blocks.evaluate, sys.modules[__name__])


def _sums(pairs: _Pairs, tangent: torch.Tensor | None) -> torch.Tensor:
    """(1, N, L), the AEVs, or (M, N, L), what J makes of tangents (M, E, 3)."""
    p = pairs.p
    out = pairs.vec.new_empty(1 if tangent is None else len(tangent), pairs.n_atoms, p.length)
    if tangent is not None and _by_jacobian(len(tangent), p, out.itemsize):
        pairs.apply_radial(programs.radial_push, tangent, out)
        pairs.apply_angular(programs.angular_push, tangent, out)
        return out
    _launch(
        programs.radial_sums,
        (pairs.n_atoms, len(out)),
        pairs.vec,
        pairs.distance,
        pairs.row,
        pairs.species_other,
        tangent,
        out,
        pairs.n_pairs,
        **_radial(p),
        SPECIES=p.n_species,
        SPECIES_WIDTH=triton.next_power_of_2(p.n_species),
        SHIFTS_WIDTH=triton.next_power_of_2(len(p.radial_shifts)),
        PUSH=tangent is not None,
        BLOCK=WARP,
        num_warps=1,
    )
    _launch(
        programs.angular_sums,
        (pairs.n_atoms, p.n_species**2, len(out)),
        pairs.bounds,
        pairs.whole,
        pairs.real,
        tangent,
        out,
        pairs.n_pairs,
        **_angular(p, out.dtype),
        PUSH=tangent is not None,
        BLOCK=WARP,
        num_warps=1,
    )
    return out


class _Pairs:
    """Pairs sorted by centre, and once more those within the angular cutoff, as the programs read them.

    There is room for all pairs in bounds, whole and real (see programs.py), so that those within need not be counted.
    """

    def __init__(self, vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> None:
        self.p, self.n_atoms, self.n_pairs = p, len(row) - 1, len(vec)
        self.vec, self.distance = vec.contiguous(), vec.new_empty(len(vec))
        self.row, self.species_other = row.long().contiguous(), species_other.long().contiguous()
        self.bounds = self.row.new_empty(self.n_atoms * p.n_species + 1)
        self.whole = self.row.new_empty(3, self.n_pairs)
        self.real = self.vec.new_empty(6, self.n_pairs)
        n_near = self.row.new_empty(self.n_atoms)
        within = {"CUTOFF": p.angular_cutoff_A, "BLOCK": PAIRS_PER_PROGRAM, "num_warps": 1}
        _launch(programs.measure, (self.n_atoms,), self.vec, self.row, self.distance, n_near, **within)
        _launch(
            programs.list_near,
            (self.n_atoms,),
            self.vec,
            self.distance,
            self.row,
            torch.nn.functional.pad(n_near.cumsum(0), (1, 0)),
            self.species_other,
            self.bounds,
            self.whole,
            self.real,
            self.n_pairs,
            SPECIES=p.n_species,
            **within,
        )

    @functools.cached_property
    def jacobian(self) -> torch.Tensor:
        """Of the angular part, see programs.angular_jacobian; made once for all products."""
        p = self.p
        out = self.vec.new_empty(3, p.n_species, p.n_per_pair, self.n_pairs)
        _launch(
            programs.angular_jacobian,
            (triton.cdiv(self.n_pairs, WARP), p.n_species),
            self.bounds,
            self.whole,
            self.real,
            out,
            self.n_atoms,
            self.n_pairs,
            **_angular(p, out.dtype),
            BLOCK=WARP,
            num_warps=1,
        )
        return out

    def apply_radial(self, program: Any, given: torch.Tensor, out: torch.Tensor) -> None:
        """Run radial_pull or radial_push for all that is given, (M, ...)."""
        where = self.vec, self.distance, self.row, self.species_other
        self._apply(program, where, given, out, len(self.p.radial_shifts), **_radial(self.p))

    def apply_angular(self, program: Any, given: torch.Tensor, out: torch.Tensor) -> None:
        """Run angular_pull or angular_push for all that is given, (M, ...)."""
        p, where = self.p, (self.bounds, self.whole, self.jacobian)
        bins = {"N_RADIAL": p.n_radial, "LENGTH": p.length, "N_BINS": p.n_per_pair}
        self._apply(program, where, given, out, p.n_per_pair, **bins)

    def _apply(
        self,
        program: Any,
        where: tuple[torch.Tensor, ...],
        given: torch.Tensor,
        out: torch.Tensor,
        width: int,
        **constants: Any,
    ) -> None:
        """A program per atom and PRODUCTS of what is given; width: its features, of one species or pair of them."""
        _launch(
            program,
            (self.n_atoms, triton.cdiv(len(given), PRODUCTS)),
            *where,
            given,
            out,
            len(given),
            self.n_pairs,
            SPECIES=self.p.n_species,
            WIDTH=max(16, triton.next_power_of_2(width)),
            **constants,
            **PRODUCT,
        )


def _launch(program: Any, grid: tuple[int, ...], *tensors: Any, **constants: Any) -> None:
    """Start the programs of a grid, if there are any, on the GPU of the first tensor."""
    if math.prod(grid):
        with torch.cuda.device_of(tensors[0]):
            program[grid](*tensors, **constants)


def _radial(p: AEVParameters) -> dict[str, Any]:
    return {"CUTOFF": p.radial_cutoff_A, "ETA": p.eta_radial, "SHIFTS": p.radial_shifts, "LENGTH": p.length}


@functools.cache
def _power(exponent: float) -> tuple[float, tuple[float, ...], int] | None:
    """x^exponent as powers.fit_power has 2 x^exponent: reach, terms of the polynomial, number of squarings."""
    reach = reach_of(exponent)
    best = fit_power(exponent, reach)
    if best is None:
        return None
    # As few terms as will do with as many squarings.
    fits = (fit_power(exponent, reach, degree) for degree in range(2, DEGREE))
    terms, n_squarings = next((fit for fit in fits if fit is not None and fit[1] == best[1]), best)
    return reach, tuple((terms / 2 ** (0.5**n_squarings)).tolist()), n_squarings


def _angular(p: AEVParameters, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "ETA": p.eta_angular,
        "ZETA": p.zeta,
        "POWER": _power(p.zeta - 1) if dtype == torch.float32 else None,
        "SHIFTS": p.angular_shifts,
        "COSINES": tuple(math.cos(angle) for angle in p.angle_shifts),
        "SINES": tuple(math.sin(angle) for angle in p.angle_shifts),
        "SPECIES": p.n_species,
        "N_RADIAL": p.n_radial,
        "LENGTH": p.length,
        "EPS": torch.finfo(dtype).eps,
    }
