"""What exactly do the kernels compute? Plain PyTorch; the others are held to it.

AEVs and their products with J and J^T: atoms are taken in blocks, their neighbours padded to the longest list of the
block and sorted by species, so that all work is dense: bounded memory, no index per triple. Within a pair of species
the angular part of an atom is F1^T F2, a product of two matrices over its triples,

    F1[t, a] = exp(-EtaA (x_t - ShfA_a)^2),  x = (r_ij + r_ik) / 2
    F2[t, z] = ((1 + cos(theta_t - ShfZ_z)) / 2)^Zeta
    f[t]     = 2 fc(r_ij) fc(r_ik)

and the products with J and J^T are products of the same matrices and their derivatives. Derivatives are analytic and
features are computed again rather than stored.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from potential.aev import ANGLE_SCALE, AEVParameters
from potential.kernels import blocks
from potential.kernels.bins import find_pairs
from potential.kernels.layers import backward_layers, forward_layers, keep, respond
from potential.kernels.motion import drift, kick, normals
from potential.structures import Structures

__all__ = [
    "Stack",
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
    "pair_differences",
    "pair_sums",
    "pair_tangents",
    "pair_vectors",
    "pair_virials",
    "respond",
    "shortest_distances",
    "spread",
]

RADIAL_PREFACTOR = 0.25
# Powers of 2: torch's exp2 is 3 times faster than its exp on some CPUs, and nowhere slower.
LOG2_E = 1 / math.log(2)
# 2^-58 = 3e-18 is below the rounding of a double beside 1. Without the floor, far Gaussians and their products
# are denormal numbers, on which the CPU is some 50 times slower.
LOWEST_EXPONENT = -58.0
SHORTEST_A = 1e-6  # atoms on the same spot: finite, instead of not a number
TRIPLES_PER_BLOCK = 60_000  # features stay near the processor, operations take longer than their calls
PAIRS_PER_BLOCK = 12_000
ATOMS_PER_BLOCK = 128  # of the networks, for the same reason

Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Stack:
    """Networks of all members for one element. Per layer weights (M, out, in) and biases (M, out); one output, eV."""

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]


def aev_forward(vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> torch.Tensor:
    """(N, L). vec: (E, 3), A, sorted by centre; row: (N + 1,); species_other: (E,). Pairs beyond a cutoff add 0."""
    padded = _Padded.of(vec)
    return _aev((block.describe(p, bend=False) for block in _blocks(padded, row, species_other, p)), vec, row, p)


def aev_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, cotangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, E, 3): d<cotangent_m, aev>/dvec. cotangent: (M, N, L)."""
    padded = _Padded.of(vec)
    return _pull_back((block.describe(p) for block in _blocks(padded, row, species_other, p)), padded, p, cotangent)


def aev_with_vjp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The AEVs, and what aev_vjp makes of a cotangent. Features are kept in between."""
    padded = _Padded.of(vec)
    described = [block.describe(p) for block in _blocks(padded, row, species_other, p)]
    return _aev(described, vec, row, p), functools.partial(_pull_back, described, padded, p)


def described_bytes(pairs_per_atom: float, p: AEVParameters, itemsize: int, n_products: int) -> float:
    """Roughly what aev_with_vjp keeps for each atom: its pairs and triples with their features."""
    near = pairs_per_atom * min(1.0, p.angular_cutoff_A / p.radial_cutoff_A) ** 3
    per_triple = len(p.angular_shifts) + 2 * len(p.angle_shifts) + 8
    return itemsize * (near**2 / 2 * per_triple + pairs_per_atom * len(p.radial_shifts))


def _aev(described: Iterable[_Described], vec: torch.Tensor, row: torch.Tensor, p: AEVParameters) -> torch.Tensor:
    aev = vec.new_zeros(len(row) - 1, p.length)
    for block in described:
        out = vec.new_zeros(len(block.atoms), p.length)
        for columns, shell, gaussians in block.shells:
            out[:, columns] = shell.sums(gaussians)
        for columns, wedge, (first, second, _) in block.wedges:
            out[:, columns] = torch.bmm((first * wedge.weight).transpose(0, 1), second.permute(1, 2, 0)).flatten(1)
        aev.index_copy_(0, block.atoms, out)
    return aev


def _pull_back(
    described: Iterable[_Described], padded: _Padded, p: AEVParameters, cotangent: torch.Tensor
) -> torch.Tensor:
    n_members = len(cotangent)
    # One row more than there are pairs takes what padding writes.
    stretch = padded.unit.new_zeros(n_members, len(padded.unit))
    turn = padded.unit.new_zeros(n_members, *padded.unit.shape)
    for block in described:
        weights = cotangent.index_select(1, block.atoms)
        for columns, shell, gaussians in block.shells:
            stretch.index_add_(
                1, shell.index.flatten(), shell.pull_back(gaussians, weights[:, :, columns], p).flatten(1)
            )
        for columns, wedge, features in block.wedges:
            for member in range(n_members):
                weight = weights[member, :, columns].unflatten(1, (len(p.angular_shifts), len(p.angle_shifts)))
                wedge.pull_back(features, weight, stretch[member], turn[member])
    # Gradient by vectors from those by lengths and by directions.
    along = (turn * padded.unit).sum(2, keepdim=True)
    gradient = turn.addcmul_(along, padded.unit, value=-1).div_(padded.distance[:, None])
    return gradient.addcmul_(stretch[:, :, None], padded.unit)[:, :-1]


def aev_jvp(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, tangent: torch.Tensor, p: AEVParameters
) -> torch.Tensor:
    """(M, N, L): d aev . tangent_m. tangent: (M, E, 3), change of vec."""
    n_members = len(tangent)
    out = vec.new_zeros(n_members, len(row) - 1, p.length)
    padded = _Padded.of(vec)
    distance, unit = padded.distance[:-1], padded.unit[:-1]
    stretch = (tangent * unit).sum(2)
    turn = (tangent - stretch[:, :, None] * unit) / distance[:, None]
    stretch = torch.nn.functional.pad(stretch, (0, 1))
    turn = torch.nn.functional.pad(turn, (0, 0, 0, 1))
    for block in _blocks(padded, row, species_other, p):
        block_out = vec.new_zeros(n_members, len(block.atoms), p.length)
        described = block.describe(p)
        for columns, shell, gaussians in described.shells:
            block_out[:, :, columns] = shell.push_forward(gaussians, stretch[:, shell.index], p)
        for columns, wedge, features in described.wedges:
            for member in range(n_members):
                change = wedge.push_forward(features, stretch[member], turn[member])
                block_out[member, :, columns] = change.flatten(1)
        out.index_copy_(1, block.atoms, block_out)
    return out


def aev_products(
    vec: torch.Tensor, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """As potential.kernels.aev_products; features are computed again for each."""
    pairs = vec, row, species_other
    return lambda cotangent: aev_vjp(*pairs, cotangent, p), lambda tangent: aev_jvp(*pairs, tangent, p)


def celu(value: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """CELU and its slope."""
    slope = value.clamp(min=LOWEST_EXPONENT * alpha / LOG2_E, max=0).mul_(LOG2_E / alpha).exp2_()
    return value.relu().add_(slope, alpha=alpha).sub_(alpha), slope


def networks(
    aev: torch.Tensor,
    atoms: torch.Tensor,
    stack: Stack,
    celu_alpha: float,
    energies: torch.Tensor,
    gradient: torch.Tensor,
    activate: Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]] = celu,
) -> None:
    """Write the energies of `atoms` by all members to `energies`, and dE/dAEV of each or of their mean to `gradient`.

    aev: (N, L); atoms: (n,), those of one element; energies: (M, N); gradient: (M, N, L), (1, N, L) for the mean, or
    (0, N, L) for none. Rows of other atoms are left as they are. activate: what `celu` does.
    """
    n_gradients, first, weights, biases = len(gradient), stack.weights[0], stack.weights, stack.biases
    for block in atoms.split(ATOMS_PER_BLOCK if atoms.device.type == "cpu" else max(1, len(atoms))):
        # All members read the same input, so their first layer is one matrix product.
        value = torch.nn.functional.linear(aev.index_select(0, block), first.flatten(0, 1), biases[0].flatten())
        value, slope = activate(value.unflatten(1, first.shape[:2]).transpose(0, 1), celu_alpha)
        slopes = [slope]
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            value, slope = activate(torch.baddbmm(bias[:, None], value, weight.transpose(1, 2)), celu_alpha)
            slopes.append(slope)
        last = torch.baddbmm(biases[-1][:, None], value, weights[-1].transpose(1, 2))
        energies.index_copy_(1, block, last.squeeze(2))
        if n_gradients:
            pull = slopes[-1] * weights[-1]
            for layer in range(len(slopes) - 1, 0, -1):
                pull = torch.bmm(pull, weights[layer]).mul_(slopes[layer - 1])
            if n_gradients == len(first):
                gradient.index_copy_(1, block, torch.bmm(pull, first))
            else:
                mean = torch.mm(pull.transpose(0, 1).flatten(1), first.flatten(0, 1)).div_(len(first))
                gradient.index_copy_(1, block, mean[None])


def pair_vectors(
    structures: Structures, row: torch.Tensor, other: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(E, 3), A: from the centre to its neighbour's image. row: (N + 1,); other: (E,); shift: (E, 3), int32."""
    positions = structures.positions
    centre = torch.repeat_interleave(row.diff(), output_size=len(other))
    # index_select is several times faster than indexing with a tensor on the CPU.
    vectors = positions.index_select(0, other) - positions.index_select(0, centre)
    turns, cell = shift.to(vectors.dtype), structures.cell.to(vectors.dtype)
    # One matrix product per frame: gathering a cell for every pair costs eight times as much.
    ends = row[structures.first_atom].tolist()
    for frame, (low, high) in enumerate(itertools.pairwise(ends)):
        vectors[low:high].addmm_(turns[low:high], cell[frame])
    return vectors.to(dtype)


def shortest_distances(
    structures: Structures,
    row: torch.Tensor,
    other: torch.Tensor,
    shift: torch.Tensor,
    vectors: Callable[..., torch.Tensor] = pair_vectors,
) -> torch.Tensor:
    """(B,), A, float64: shortest listed distance of each frame; infinite where there is none. vectors: pair_vectors."""
    squared = vectors(structures, row, other, shift, torch.float64).square().sum(1)
    frames = structures.frame_of_atom.index_select(0, torch.repeat_interleave(row.diff(), output_size=len(other)))
    none = squared.new_full((structures.n_frames,), torch.inf)
    return none.scatter_reduce(0, frames, squared, "amin").sqrt()


def have_moved(
    structures: Structures, built: torch.Tensor, strain: torch.Tensor | None, slack_A: torch.Tensor
) -> torch.Tensor:
    """(), bool: whether an atom is more than slack_A / 2 of its frame away from where the strained frame carried it.

    built: (N, 3), A, earlier positions; strain: (B, 3, 3), what the cells have been multiplied by since then, or None;
    slack_A: (B,); both float64. An atom that is nowhere has moved.
    """
    frame = structures.frame_of_atom
    carried = built if strain is None else torch.einsum("ni,nij->nj", built, strain[frame])
    moved: torch.Tensor = 2 * (structures.positions.double() - carried).norm(dim=1)
    return ~(moved <= slack_A.index_select(0, frame)).all()


def spread(members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As potential.kernels.spread; several times faster than torch.std_mean along the first axis."""
    mean = members.mean(0)
    return mean, (members - mean).square_().mean(0).sqrt_()


def pair_sums(
    pair: torch.Tensor, row: torch.Tensor, other: torch.Tensor, reverse: torch.Tensor | None = None
) -> torch.Tensor:
    """As potential.kernels.pair_sums; `reverse` is not needed here."""
    n_members, n_atoms = len(pair), len(row) - 1
    centre = torch.repeat_interleave(row.diff(), output_size=len(other))
    flat = pair.transpose(0, 1).reshape(len(other), n_members * 3)  # along the first axis index_add is much faster
    # With alpha = -1 index_add takes ten times as long.
    own, others = (flat.new_zeros(n_atoms, n_members * 3).index_add_(0, index, flat) for index in (centre, other))
    return own.sub_(others).view(n_atoms, n_members, 3).transpose(0, 1)


def find_reverse(vec: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """As potential.kernels.find_reverse, of vectors that are exactly opposite."""
    centre = torch.repeat_interleave(row.diff(), output_size=len(other))
    reverse = torch.empty_like(other)
    reverse[_in_order(-vec, other, centre)] = _in_order(vec, centre, other)
    return reverse


def _in_order(vec: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Numbers of pairs, sorted by their first atoms, then by their second ones, then by their vectors."""
    order = torch.arange(len(vec), device=vec.device)
    for key in (*vec.unbind(1), second, first):
        order = order[key[order].argsort(stable=True)]
    return order


def pair_virials(
    pair: torch.Tensor, vec: torch.Tensor, row: torch.Tensor, frame_of_atom: torch.Tensor, n_frames: int
) -> torch.Tensor:
    """As potential.kernels.pair_virials."""
    n_atoms = torch.bincount(frame_of_atom, minlength=n_frames)
    ends = row[torch.nn.functional.pad(n_atoms.cumsum(0), (1, 0))].tolist()
    frames = [torch.matmul(vec[low:high].T, pair[:, low:high]) for low, high in itertools.pairwise(ends)]
    full = torch.stack(frames, dim=1).double()
    full = (full + full.transpose(2, 3)) / 2
    return full[..., [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def pair_differences(atom: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(M, E, 3): of each pair, its centre's value less the other's: pair_sums transposed. atom: (M, N, 3)."""
    centre = torch.repeat_interleave(row.diff(), output_size=len(other))
    return atom.index_select(1, centre) - atom.index_select(1, other)


def pair_tangents(
    atom: torch.Tensor,
    strain: torch.Tensor,
    vec: torch.Tensor,
    row: torch.Tensor,
    other: torch.Tensor,
    frame_of_atom: torch.Tensor,
    differences: Callable[..., torch.Tensor] = pair_differences,
) -> torch.Tensor:
    """As potential.kernels.pair_tangents. differences: what pair_differences does."""
    tangent = differences(atom.contiguous(), row, other)
    frame = torch.repeat_interleave(frame_of_atom, row.diff(), output_size=len(other))
    xx, yy, zz, yz, xz, xy = strain[:, frame].unbind(2)
    x, y, z = vec.unbind(1)
    stretch = [
        xx * x + (xy * y + xz * z) / 2,
        yy * y + (xy * x + yz * z) / 2,
        zz * z + (xz * x + yz * y) / 2,
    ]
    tangent += torch.stack(stretch, dim=2)
    return tangent


evaluate = functools.partial(blocks.evaluate, sys.modules[__name__])


@functools.lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _cutoff(distance: torch.Tensor, cutoff_A: float) -> tuple[torch.Tensor, torch.Tensor]:
    """fc and its derivative."""
    angle = distance * (torch.pi / cutoff_A)
    return angle.cos().mul_(0.5).add_(0.5), angle.sin().mul_(-0.5 * torch.pi / cutoff_A)


@dataclass(frozen=True)
class _Shell:
    """Neighbours of one species of the atoms of a block, padded to the longest list: (n, K) and (n, K, 3).

    Padding has index E, length 1, and zero direction and cutoff function, so that it adds nothing anywhere.
    """

    index: torch.Tensor  # (n, K), into the pairs
    distance: torch.Tensor
    unit: torch.Tensor
    fc: torch.Tensor
    dfc: torch.Tensor

    def gaussians(self, p: AEVParameters) -> torch.Tensor:
        """(n, K, R)."""
        apart = self.distance[:, :, None] - _constants(p.radial_shifts, self.distance.dtype, self.distance.device)
        return apart.square_().mul_(-LOG2_E * p.eta_radial).clamp_(min=LOWEST_EXPONENT).exp2_()

    def sums(self, gaussians: torch.Tensor) -> torch.Tensor:
        """(n, R): the radial part of the AEV."""
        return torch.bmm((RADIAL_PREFACTOR * self.fc)[:, None], gaussians).squeeze(1)

    def pull_back(self, gaussians: torch.Tensor, weight: torch.Tensor, p: AEVParameters) -> torch.Tensor:
        """(M, n, K): gradient of <weight_m, sums> by distance. weight: (M, n, R)."""
        shifted = weight * self._from_middle(p)
        both = torch.bmm(torch.cat([weight, shifted]).transpose(0, 1), gaussians.transpose(1, 2))  # (n, 2 M, K)
        total, shifted = both.transpose(0, 1).chunk(2)
        level, slope = self._slope(p)
        return shifted.mul(slope).addcmul_(total, level)

    def push_forward(self, gaussians: torch.Tensor, stretch: torch.Tensor, p: AEVParameters) -> torch.Tensor:
        """(M, n, R): change of the sums when distances change by stretch, (M, n, K)."""
        level, slope = self._slope(p)
        both = torch.bmm(torch.cat([stretch * level, stretch * slope]).transpose(0, 1), gaussians)  # (n, 2 M, R)
        total, shifted = both.transpose(0, 1).chunk(2)
        return total.addcmul(shifted, self._from_middle(p))

    def _slope(self, p: AEVParameters) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, K) twice: a feature's slope over its Gaussian, for the middle shift, and how it grows with the shift."""
        slope = self.fc * (2 * RADIAL_PREFACTOR * p.eta_radial)
        return (self.dfc * RADIAL_PREFACTOR).addcmul_(slope, self.distance - _middle(p), value=-1), slope

    def _from_middle(self, p: AEVParameters) -> torch.Tensor:
        """(R,): shifts less the middle one, so that less is lost where a distance is taken from a shift."""
        return _constants(p.radial_shifts, self.distance.dtype, self.distance.device) - _middle(p)


def _middle(p: AEVParameters) -> float:
    return (min(p.radial_shifts) + max(p.radial_shifts)) / 2


class _Wedge:
    """All triples of a block's atoms with one neighbour out of each of two shells: (n, T).

    Features have their bins first, (A, n, T) and (Z, n, T): long rows vectorise, rows of 8 do not (5 times slower).
    """

    def __init__(self, left: _Shell, right: _Shell, p: AEVParameters) -> None:
        self.left, self.right, self.p = left, right, p
        self.same = left is right
        self.shape = left.distance.shape[1], right.distance.shape[1]
        self.left_of, self.right_of, self.triple_of = _numbered(self.shape, self.same, left.index.device)
        self.pair = self.left_of * self.shape[1] + self.right_of
        self.weight = self._of_left(left.fc).mul_(2).mul_(self._of_right(right.fc))
        self.mean = self._of_left(left.distance).add_(self._of_right(right.distance)).mul_(0.5)
        self.cosine = self._of_both(torch.bmm(left.unit, right.unit.transpose(1, 2))).mul_(ANGLE_SCALE)

    def _of_left(self, values: torch.Tensor) -> torch.Tensor:
        return values.index_select(1, self.left_of)

    def _of_right(self, values: torch.Tensor) -> torch.Tensor:
        return values.index_select(1, self.right_of)

    def _of_both(self, values: torch.Tensor) -> torch.Tensor:
        """(n, K, K') -> (n, T)."""
        return values.flatten(1).index_select(1, self.pair)

    def features(self, *, bend: bool) -> Features:
        """F1 (A, n, T) without its factor f, F2 (Z, n, T), and with `bend` the power of _bends, else nothing."""
        first = self.mean - self._column(self.p.angular_shifts)
        first.square_().mul_(-LOG2_E * self.p.eta_angular).clamp_(min=LOWEST_EXPONENT).exp2_()
        # (1 + cos(theta - ShfZ)) / 2 by the addition theorem, floored where its power is as good as 0
        shift = self._column(self.p.angle_shifts)
        half = self.cosine * (0.5 * shift.cos())
        lowest = max(torch.finfo(half.dtype).eps, 2 ** (LOWEST_EXPONENT / max(1.0, self.p.zeta - 1)))
        half.addcmul_(self.sine, 0.5 * shift.sin()).add_(0.5).clamp_(min=lowest)
        power = half.log2().mul_(self.p.zeta - 1).exp2_()
        return first, half.mul_(power), power if bend else power[:0]

    @functools.cached_property
    def sine(self) -> torch.Tensor:
        return (1 - self.cosine.square()).sqrt_()

    @functools.cached_property
    def cotangent(self) -> torch.Tensor:
        return self.cosine / self.sine

    def _column(self, values: tuple[float, ...]) -> torch.Tensor:
        return _constants(values, self.mean.dtype, self.mean.device)[:, None, None]

    def pull_back(
        self,
        features: Features,
        weight: torch.Tensor,
        stretch: torch.Tensor,
        turn: torch.Tensor,
    ) -> None:
        """Add the gradient of <weight (n, A, Z), F1^T f F2> to that by length (E + 1,) and direction (E + 1, 3)."""
        first, second, power = (feature.transpose(0, 1) for feature in features)
        by_first = torch.bmm(weight, second).mul_(first)
        twice, by_mean = torch.matmul(_moments(self.p, first.dtype, first.device), by_first).unbind(1)
        by_mean.addcmul_(self.mean, twice, value=-self.p.eta_angular / 2)  # half of that by x
        by_second = torch.bmm(weight.transpose(1, 2), first).mul_(power)
        by_cosine, turned = torch.matmul(_bends(self.p, first.dtype, first.device), by_second).unbind(1)
        by_cosine.addcmul_(turned, self.cotangent)
        # One number more than there are triples, for cells of the table without any.
        values = by_mean.new_empty(3, by_mean.shape[0], by_mean.shape[1] + 1)
        values[:, :, -1] = 0.0
        values[0, :, :-1] = twice
        torch.mul(by_mean, self.weight, out=values[1, :, :-1])
        torch.mul(by_cosine, self.weight, out=values[2, :, :-1])
        triples = self._square(values)
        _reduce(self.left, self.right, triples, stretch, turn)
        if not self.same:
            _reduce(self.right, self.left, triples.transpose(2, 3), stretch, turn)

    def _square(self, values: torch.Tensor) -> torch.Tensor:
        """(k, n, T + 1) -> (k, n, K, K'), symmetric when both shells are one."""
        return values.flatten(0, 1).index_select(1, self.triple_of).view(len(values), -1, *self.shape)

    def push_forward(
        self,
        features: Features,
        stretch: torch.Tensor,
        turn: torch.Tensor,
    ) -> torch.Tensor:
        """(n, A, Z): change of F1^T f F2 when lengths change by stretch (E + 1,) and directions by turn (E + 1, 3)."""
        first, second, power = features
        left, right = self.left, self.right
        left_stretch, right_stretch = stretch[left.index], stretch[right.index]
        by_mean = self._of_left(left_stretch).add_(self._of_right(right_stretch)).mul_(self.weight)
        by_mean *= -self.p.eta_angular
        weight = self._of_left(left.dfc * left_stretch).mul_(self._of_right(right.fc))
        weight.addcmul_(self._of_left(left.fc), self._of_right(right.dfc * right_stretch)).mul_(2)
        weight.addcmul_(self.mean, by_mean)
        cosine = torch.bmm(turn[left.index], right.unit.transpose(1, 2))
        cosine.baddbmm_(left.unit, turn[right.index].transpose(1, 2))
        change = (weight - self._column(self.p.angular_shifts) * by_mean).mul_(first)
        out = torch.bmm(change.transpose(0, 1), second.permute(1, 2, 0))
        bent = first * self._of_both(cosine).mul_(self.weight)
        level, slope = _bends(self.p, first.dtype, first.device)[:, :, None, None]
        bend = (self.cotangent * slope).add_(level).mul_(power)
        return out.baddbmm_(bent.transpose(0, 1), bend.permute(1, 2, 0))


@functools.lru_cache(maxsize=64)
def _moments(p: AEVParameters, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(2, A): twos, and shifts times eta."""
    shifts = _constants(p.angular_shifts, dtype, device)
    return torch.stack([torch.full_like(shifts, 2.0), shifts * p.eta_angular])


@functools.lru_cache(maxsize=64)
def _bends(p: AEVParameters, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(2, Z): the derivative of F2 by the cosine of the unscaled angle is power (first + second cotangent).

    theta = acos(c): d cos(theta - s) / dc = cos s - sin s cos(theta) / sin(theta)
    """
    shifts = _constants(p.angle_shifts, dtype, device)
    return torch.stack([shifts.cos(), -shifts.sin()]).mul_(0.5 * ANGLE_SCALE * p.zeta)


@functools.lru_cache(maxsize=64)
def _numbered(
    shape: tuple[int, int], same: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns (T,) of a table's cells, of `same` only those right of the diagonal, and (K K',) their numbers.

    Cells left of the diagonal have the numbers of those that mirror them. Those without number have T.
    """
    counted = torch.ones(shape, dtype=torch.bool, device=device).triu_(1 if same else -shape[0])
    rows, columns = counted.nonzero().unbind(1)
    numbers = rows.new_full(shape, len(rows))
    numbers[rows, columns] = torch.arange(len(rows), device=device)
    if same:
        numbers = torch.minimum(numbers, numbers.T)
    return rows, columns, numbers.flatten()


def _reduce(shell: _Shell, partner: _Shell, triples: torch.Tensor, stretch: torch.Tensor, turn: torch.Tensor) -> None:
    """Add derivatives by cutoff functions, mean length and cosine of triples, (3, n, K, K'), to those by pairs."""
    by_cutoff, by_mean, by_cosine = triples
    by_length = torch.bmm(by_cutoff, partner.fc[:, :, None]).squeeze(2).mul_(shell.dfc).add_(by_mean.sum(2))
    index = shell.index.flatten()
    stretch.index_add_(0, index, by_length.flatten())
    turn.index_add_(0, index, torch.bmm(by_cosine, partner.unit).flatten(0, 1))


@dataclass(frozen=True)
class _Block:
    """Some atoms with their neighbours within each cutoff, one shell per species."""

    atoms: torch.Tensor
    near: list[_Shell]
    nearest: list[_Shell]

    def describe(self, p: AEVParameters, *, bend: bool = True) -> _Described:
        """Without `bend` for AEVs only."""
        width = len(p.radial_shifts)
        shells = [
            (slice(species * width, (species + 1) * width), shell, shell.gaussians(p))
            for species, shell in enumerate(self.near)
            if shell.index.shape[1] > 0
        ]
        wedges = []
        for number, (a, b) in enumerate(p.species_pairs):
            left, right = self.nearest[a], self.nearest[b]
            if min(left.index.shape[1], right.index.shape[1]) > (1 if a == b else 0):
                start, wedge = p.n_radial + number * p.n_per_pair, _Wedge(left, right, p)
                wedges.append((slice(start, start + p.n_per_pair), wedge, wedge.features(bend=bend)))
        return _Described(self.atoms, shells, wedges)


@dataclass(frozen=True)
class _Described:
    """A block's shells and wedges with their features, each with its columns of the AEV."""

    atoms: torch.Tensor
    shells: list[tuple[slice, _Shell, torch.Tensor]]
    wedges: list[tuple[slice, _Wedge, Features]]


def _blocks(padded: _Padded, row: torch.Tensor, species_other: torch.Tensor, p: AEVParameters) -> Iterator[_Block]:
    """Cut the atoms into blocks of equal size, as many atoms as keep padded pairs and triples within bounds.

    Atoms with lists of like length go together: triples grow with their square, and so would padding.
    """
    n_atoms, distance = len(row) - 1, padded.distance[:-1]
    centre = torch.repeat_interleave(row.diff(), output_size=len(distance))
    atoms = torch.bincount(centre[distance < p.angular_cutoff_A], minlength=n_atoms).argsort()
    rank = atoms.argsort().index_select(0, centre)
    key, pair = (rank * p.n_species + species_other).sort(stable=True)
    distance = distance.index_select(0, pair)
    near, nearest = (
        _Table(key, pair, distance < cutoff_A, n_atoms, p.n_species)
        for cutoff_A in (p.radial_cutoff_A, p.angular_cutoff_A)
    )
    most = max(1, min(PAIRS_PER_BLOCK // near.longest, 2 * TRIPLES_PER_BLOCK // nearest.longest**2))
    n_blocks = math.ceil(n_atoms / most)
    for block in range(n_blocks):
        low, high = n_atoms * block // n_blocks, n_atoms * (block + 1) // n_blocks
        yield _Block(
            atoms[low:high],
            [padded.shell(index, p.radial_cutoff_A) for index in near.indices(low, high)],
            [padded.shell(index, p.angular_cutoff_A) for index in nearest.indices(low, high)],
        )


class _Table:
    """Pairs that are inside, sorted by key: rank of the centre times n_species, plus species of the neighbour."""

    def __init__(
        self, key: torch.Tensor, pair: torch.Tensor, inside: torch.Tensor, n_atoms: int, n_species: int
    ) -> None:
        self.n_species = n_species
        self.empty = len(pair)
        kept = inside.nonzero().squeeze(1)
        self.key, self.pair = key.index_select(0, kept), pair.index_select(0, kept)
        self.count = torch.bincount(self.key, minlength=n_atoms * n_species)
        self.start = torch.nn.functional.pad(self.count.cumsum(0), (1, 0))
        self.longest = max(1, int(self.count.view(-1, n_species).sum(1).amax()) if n_atoms else 1)

    def indices(self, low: int, high: int) -> list[torch.Tensor]:
        """For each species (n, K): pairs of the atoms of rank low .. high, padded with E."""
        row_low, row_high = low * self.n_species, high * self.n_species
        first, last = int(self.start[row_low]), int(self.start[row_high])
        key = self.key[first:last]
        place = torch.arange(first, last, device=key.device) - self.start.index_select(0, key)
        width = int(self.count[row_low:row_high].amax())
        table = key.new_full(((row_high - row_low) * width,), self.empty)
        table.index_copy_(0, (key - row_low).mul_(width).add_(place), self.pair[first:last])
        table = table.view(high - low, self.n_species, width)
        longest = self.count[row_low:row_high].view(-1, self.n_species).amax(0).tolist()
        return [table[:, species, :n] for species, n in enumerate(longest)]


@dataclass(frozen=True)
class _Padded:
    """Lengths (E + 1,) and directions (E + 1, 3) of all pairs, with one more row for padding, and where pairs are."""

    distance: torch.Tensor
    unit: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of(cls, vec: torch.Tensor) -> _Padded:
        length = vec.norm(dim=1).clamp_(min=SHORTEST_A)
        distance = torch.nn.functional.pad(length, (0, 1), value=1.0)
        unit = torch.nn.functional.pad(vec / length[:, None], (0, 0, 0, 1))
        return cls(distance, unit, torch.nn.functional.pad(torch.ones_like(length), (0, 1)))

    def shell(self, index: torch.Tensor, cutoff_A: float) -> _Shell:
        distance, unit, real = (_rows(each, index) for each in (self.distance, self.unit, self.real))
        fc, dfc = _cutoff(distance, cutoff_A)
        return _Shell(index, distance, unit, fc.mul_(real), dfc.mul_(real))


def _rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values[index], several times faster on the CPU."""
    return values.index_select(0, index.flatten()).view(*index.shape, *values.shape[1:])
