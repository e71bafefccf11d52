# mypy: ignore-errors
"""What does each program on the GPU do? Triton; gpu.py launches them.

Symbols are those of potential/aev.py. Features are computed again rather than stored. What belongs to an atom, or
to a pair, is summed by one program; loops over bins are unrolled, and the numbers of a triple stay in registers.

Pairs (E) are sorted by centre; those within the angular cutoff are listed once more, by centre and species, in slots:
whole (3, E), int64: number of the pair, its centre, species of its neighbour
real (6, E): direction (3), length, fc and its derivative
bounds (N S + 1), int64: slots of atom i with neighbours of species s are bounds[i S + s] .. bounds[i S + s + 1]
"""

import math

import triton
import triton.language as tl

from potential.aev import ANGLE_SCALE
from potential.kernels.reference import RADIAL_PREFACTOR, SHORTEST_A

__all__ = [
    "angular_sums",
    "angular_vjp",
    "celu",
    "list_near",
    "pair_sums",
    "pair_vectors",
    "radial_sums",
    "radial_vjp",
]

LOG2_E = tl.constexpr(1 / math.log(2))
PI = tl.constexpr(math.pi)
PREFACTOR = tl.constexpr(RADIAL_PREFACTOR)
SHORTEST = tl.constexpr(SHORTEST_A)
SCALE = tl.constexpr(ANGLE_SCALE)


@triton.jit
def _constants(values: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """(WIDTH,): the values, then zeros."""
    lane = tl.arange(0, WIDTH)
    out = tl.zeros((WIDTH,), dtype)
    for place in tl.static_range(len(values)):
        out = tl.where(lane == place, tl.full((WIDTH,), values[place], dtype), out)
    return out


@triton.jit
def _gaussian(length, shift, ETA: tl.constexpr):
    return tl.exp2((length - shift) * (length - shift) * (-ETA * LOG2_E))


@triton.jit
def _cutoff(length, CUTOFF: tl.constexpr):
    """fc and its derivative, of lengths below the cutoff."""
    angle = length * (PI / CUTOFF)
    return 0.5 * tl.cos(angle) + 0.5, tl.sin(angle) * (-0.5 * PI / CUTOFF)


@triton.jit
def _bends(cosine, ZETA: tl.constexpr, COSINES: tl.constexpr, SINES: tl.constexpr, EPS: tl.constexpr):
    """Tuples of F2 for every ShfZ, and of its derivative by the cosine of the unscaled angle. cosine: of the scaled."""
    sine = tl.sqrt(1 - cosine * cosine)
    values, slopes = (), ()
    for angle in tl.static_range(len(COSINES)):
        # (1 + cos(theta - ShfZ)) / 2, floored against the log of 0
        half = tl.maximum(0.5 * (cosine * COSINES[angle] + sine * SINES[angle]) + 0.5, EPS)
        value = tl.exp2(tl.log2(half) * ZETA)
        slope = (COSINES[angle] - SINES[angle] * (cosine / sine)) * (0.5 * SCALE * ZETA)
        values, slopes = values + (value,), slopes + (slope * value / half,)  # noqa: RUF005
    return values, slopes


@triton.jit
def _dot(x, y, z, other_x, other_y, other_z):
    return x * other_x + y * other_y + z * other_z


@triton.jit
def _vector(start, step, mask):
    """Three components, `step` apart in memory, zero where masked."""
    return (
        tl.load(start, mask=mask, other=0.0),
        tl.load(start + step, mask=mask, other=0.0),
        tl.load(start + 2 * step, mask=mask, other=0.0),
    )


@triton.jit
def _slot(real, n_pairs, slot, mask):
    """Direction (3), length, fc and its derivative, zero where masked."""
    x, y, z = _vector(real + slot, n_pairs, mask)
    length, fc, dfc = _vector(real + 3 * n_pairs + slot, n_pairs, mask)
    return x, y, z, length, fc, dfc


@triton.jit
def pair_vectors(row, other, shift, frame_of_atom, positions, cell, out, BLOCK: tl.constexpr):
    """Write the vectors of the pairs of one atom: differences in the precision of positions and cell."""
    atom = tl.program_id(0).to(tl.int64)
    high = tl.load(row + atom + 1)
    lattice = cell + 9 * tl.load(frame_of_atom + atom)
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < high
        partner = tl.load(other + pair, mask=inside, other=0)
        a, b, c = _vector(shift + 3 * pair, 1, inside)
        for axis in tl.static_range(3):
            apart = tl.load(positions + 3 * partner + axis) - tl.load(positions + 3 * atom + axis)
            apart += a * tl.load(lattice + axis) + b * tl.load(lattice + 3 + axis) + c * tl.load(lattice + 6 + axis)
            tl.store(out + 3 * pair + axis, apart.to(out.dtype.element_ty), mask=inside)


@triton.jit
def pair_sums(pair_values, row, other, out, n_pairs, BLOCK: tl.constexpr):
    """Add the values of one atom's pairs to it and take them from the others; the order of additions is not fixed."""
    atom, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    high = tl.load(row + atom + 1)
    sums = out + 3 * item * tl.num_programs(0)
    none = tl.zeros((BLOCK,), out.dtype.element_ty)
    total_x, total_y, total_z = none, none, none
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        x, y, z = _vector(pair_values + 3 * (item * n_pairs + pair), 1, pair < high)
        # Nothing is added for the many pairs beyond the cutoff that a skin list holds.
        partner = sums + 3 * tl.load(other + pair, mask=pair < high, other=0)
        tl.atomic_add(partner, -x, mask=x != 0, sem="relaxed")
        tl.atomic_add(partner + 1, -y, mask=y != 0, sem="relaxed")
        tl.atomic_add(partner + 2, -z, mask=z != 0, sem="relaxed")
        total_x, total_y, total_z = total_x + x, total_y + y, total_z + z
    tl.atomic_add(sums + 3 * atom, tl.sum(total_x, 0), sem="relaxed")
    tl.atomic_add(sums + 3 * atom + 1, tl.sum(total_y, 0), sem="relaxed")
    tl.atomic_add(sums + 3 * atom + 2, tl.sum(total_z, 0), sem="relaxed")


@triton.jit
def celu(value, slope, n_values, ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    """Replace values by their CELU, and write its slope."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(value + place, mask=place < n_values, other=0.0)
    steep = tl.exp2(tl.where(x > 0, 0.0, x) * (LOG2_E / ALPHA))  # not a number where x is none
    tl.store(slope + place, steep, mask=place < n_values)
    tl.store(value + place, tl.where(x > 0, x, (steep - 1) * ALPHA), mask=place < n_values)


@triton.jit
def list_near(
    vec,
    distance,
    near,
    row,
    near_row,
    species_other,
    bounds,
    whole,
    real,
    n_pairs,
    CUTOFF: tl.constexpr,
    SPECIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill the slots of one atom. near: (E,), which pairs; near_row: (N + 1,), first slot of each atom."""
    atom = tl.program_id(0).to(tl.int64)
    low, high = tl.load(row + atom), tl.load(row + atom + 1)
    first = tl.load(near_row + atom)
    for species in range(SPECIES):
        tl.store(bounds + atom * SPECIES + species, first)
        for start in range(low, high, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            listed = tl.load(near + pair, mask=pair < high, other=0) != 0
            listed &= tl.load(species_other + pair, mask=pair < high, other=-1) == species
            slot = first + tl.cumsum(listed.to(tl.int64), 0) - 1
            tl.store(whole + slot, pair, mask=listed)
            tl.store(whole + n_pairs + slot, tl.zeros_like(pair) + atom, mask=listed)
            tl.store(whole + 2 * n_pairs + slot, tl.zeros_like(pair) + species, mask=listed)
            length = tl.maximum(tl.load(distance + pair, mask=listed, other=1.0), SHORTEST)
            x, y, z = _vector(vec + 3 * pair, 1, listed)
            fc, dfc = _cutoff(length, CUTOFF)
            tl.store(real + slot, x / length, mask=listed)
            tl.store(real + n_pairs + slot, y / length, mask=listed)
            tl.store(real + 2 * n_pairs + slot, z / length, mask=listed)
            tl.store(real + 3 * n_pairs + slot, length, mask=listed)
            tl.store(real + 4 * n_pairs + slot, fc, mask=listed)
            tl.store(real + 5 * n_pairs + slot, dfc, mask=listed)
            first += tl.sum(listed.to(tl.int64), 0)
    tl.store(bounds + (atom + 1) * SPECIES, first)  # as the next atom does


@triton.jit
def _radial_features(length, fc, dfc, shift, ETA: tl.constexpr):
    """The features and their derivatives by length."""
    gaussian = _gaussian(length, shift, ETA) * PREFACTOR
    return gaussian * fc, gaussian * (dfc - 2 * ETA * (length - shift) * fc)


@triton.jit
def radial_sums(
    vec,
    distance,
    row,
    species_other,
    tangent,
    out,
    n_pairs,
    CUTOFF: tl.constexpr,
    ETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    LENGTH: tl.constexpr,
    SPECIES: tl.constexpr,
    SPECIES_WIDTH: tl.constexpr,
    SHIFTS_WIDTH: tl.constexpr,
    PUSH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the radial part of one atom: its AEV, or where PUSH, of one tangent, what J makes of it.

    Widths: numbers of species and of shifts, filled up to powers of 2.
    """
    dtype = out.dtype.element_ty
    atom, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    high = tl.load(row + atom + 1)
    species, shift = tl.arange(0, SPECIES_WIDTH)[:, None], tl.arange(0, SHIFTS_WIDTH)[None, :]
    shifts = _constants(SHIFTS, SHIFTS_WIDTH, dtype)
    sums = tl.zeros((SPECIES_WIDTH, SHIFTS_WIDTH), dtype)
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        length = tl.maximum(tl.load(distance + pair, mask=pair < high, other=CUTOFF), SHORTEST)
        near = length < CUTOFF
        fc, dfc = _cutoff(length, CUTOFF)
        feature, slope = _radial_features(length[:, None], fc[:, None], dfc[:, None], shifts[None, :], ETA)
        if PUSH:
            x, y, z = _vector(vec + 3 * pair, 1, near)
            push_x, push_y, push_z = _vector(tangent + 3 * (item * n_pairs + pair), 1, near)
            feature = slope * (_dot(x, y, z, push_x, push_y, push_z) / length)[:, None]
        mine = tl.load(species_other + pair, mask=near, other=-1)[None, :] == species
        sums += tl.sum(tl.where(mine[:, :, None], feature[None, :, :], 0.0), 1)
    place = (item * tl.num_programs(0) + atom) * LENGTH + species * len(SHIFTS) + shift
    tl.store(out + place, sums, mask=(species < SPECIES) & (shift < len(SHIFTS)))


@triton.jit
def radial_vjp(
    vec,
    distance,
    centre,
    species_other,
    cotangent,
    out,
    n_atoms,
    n_pairs,
    CUTOFF: tl.constexpr,
    ETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the radial part of J^T of a block of pairs and one cotangent: 0 beyond the cutoff."""
    item = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n_pairs
    length = tl.maximum(tl.load(distance + pair, mask=inside, other=CUTOFF), SHORTEST)
    fc, dfc = _cutoff(length, CUTOFF)
    near = length < CUTOFF
    atom = tl.load(centre + pair, mask=near, other=0)
    weights = cotangent + (item * n_atoms + atom) * LENGTH
    weights += tl.load(species_other + pair, mask=near, other=0) * len(SHIFTS)
    slope = tl.zeros_like(length)
    for r in tl.static_range(len(SHIFTS)):
        _feature, change = _radial_features(length, fc, dfc, SHIFTS[r], ETA)
        slope += tl.load(weights + r, mask=near, other=0.0) * change
    slope /= length
    x, y, z = _vector(vec + 3 * pair, 1, near)
    place = out + 3 * (item * n_pairs + pair)
    tl.store(place, slope * x, mask=inside)
    tl.store(place + 1, slope * y, mask=inside)
    tl.store(place + 2, slope * z, mask=inside)


@triton.jit
def _neighbours(triple, n_right, same):
    """Which two neighbours a triple has: number / n_right and the rest, or j < k in k (k - 1) / 2 + j where `same`."""
    larger = ((1 + tl.sqrt_rn(8 * triple.to(tl.float32) + 1)) * 0.5).to(tl.int32)  # exact below 2^21
    left = tl.where(same, triple - larger * (larger - 1) // 2, triple // n_right)
    return left, tl.where(same, larger, triple % n_right)


@triton.jit
def _species_pair(left, right, SPECIES: tl.constexpr):
    """Which pair of species, left <= right, among those of the angular part."""
    return left * SPECIES - left * (left - 1) // 2 + right - left


@triton.jit
def _add_bins(
    sums,
    mean,
    bends,
    slopes,
    weight,
    by_mean,
    by_cosine,
    ETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    N_ANGLES: tl.constexpr,
    PUSH: tl.constexpr,
):
    """Sums of every bin, with the features of a block of triples added; where PUSH, with their changes.

    by_mean: weights of the features' slopes by mean / -2 ETA; by_cosine: of those by cosine.
    """
    summed = ()
    for shift in tl.static_range(len(SHIFTS)):
        gaussian = _gaussian(mean, SHIFTS[shift], ETA)
        weighted = gaussian * weight
        if PUSH:
            weighted += gaussian * by_mean * (mean - SHIFTS[shift])
        for angle in tl.static_range(N_ANGLES):
            change = weighted * bends[angle]
            if PUSH:
                change += gaussian * by_cosine * slopes[angle]
            summed = summed + (sums[shift * N_ANGLES + angle] + change,)  # noqa: RUF005
    return summed


@triton.jit
def _change(tangent, pair, x, y, z, length, other_x, other_y, other_z, cosine, counted):
    """Change of a pair's length, and of the cosine of its angle with another direction, along a tangent."""
    push_x, push_y, push_z = _vector(tangent + 3 * tl.load(pair, mask=counted, other=0), 1, counted)
    stretch = _dot(x, y, z, push_x, push_y, push_z)
    turn = _dot(push_x, push_y, push_z, other_x, other_y, other_z) - stretch * cosine
    return stretch, turn / tl.maximum(length, SHORTEST)  # 0 where nothing is counted


@triton.jit
def angular_sums(
    bounds,
    whole,
    real,
    tangent,
    out,
    n_pairs,
    ETA: tl.constexpr,
    ZETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    COSINES: tl.constexpr,
    SINES: tl.constexpr,
    SPECIES: tl.constexpr,
    N_RADIAL: tl.constexpr,
    LENGTH: tl.constexpr,
    EPS: tl.constexpr,
    PUSH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the angular part of one atom and pair of species: AEV, or where PUSH, of one tangent, what J makes of it.

    F1^T f F2 over blocks of triples; each of the block has its own sum for every bin.
    """
    atom, item = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    left, right = tl.program_id(1) // SPECIES, tl.program_id(1) % SPECIES
    if left <= right:
        first_left, last_left = tl.load(bounds + atom * SPECIES + left), tl.load(bounds + atom * SPECIES + left + 1)
        first_right, last_right = tl.load(bounds + atom * SPECIES + right), tl.load(bounds + atom * SPECIES + right + 1)
        n_left, n_right = (last_left - first_left).to(tl.int32), (last_right - first_right).to(tl.int32)
        n_triples = tl.where(left == right, n_left * (n_left - 1) // 2, n_left * n_right)
        sums = ()
        for _number in tl.static_range(len(SHIFTS) * len(COSINES)):
            sums = sums + (tl.zeros((BLOCK,), out.dtype.element_ty),)  # noqa: RUF005
        for start in range(0, n_triples, BLOCK):
            triple = start + tl.arange(0, BLOCK)
            counted = triple < n_triples
            j, k = _neighbours(triple, n_right, left == right)
            j, k = first_left + j, first_right + k
            jx, jy, jz, j_length, j_fc, j_dfc = _slot(real, n_pairs, j, counted)
            kx, ky, kz, k_length, k_fc, k_dfc = _slot(real, n_pairs, k, counted)
            mean = 0.5 * (j_length + k_length)
            cosine = _dot(jx, jy, jz, kx, ky, kz)
            bends, slopes = _bends(cosine * SCALE, ZETA, COSINES, SINES, EPS)
            weight, by_mean, by_cosine = 2 * j_fc * k_fc, 0.0, 0.0
            if PUSH:
                pushes = tangent + 3 * item * n_pairs
                j_stretch, j_turn = _change(pushes, whole + j, jx, jy, jz, j_length, kx, ky, kz, cosine, counted)
                k_stretch, k_turn = _change(pushes, whole + k, kx, ky, kz, k_length, jx, jy, jz, cosine, counted)
                by_cosine = (j_turn + k_turn) * weight
                by_mean = (j_stretch + k_stretch) * weight * -ETA
                weight = 2 * (j_dfc * j_stretch * k_fc + j_fc * k_dfc * k_stretch)
            sums = _add_bins(sums, mean, bends, slopes, weight, by_mean, by_cosine, ETA, SHIFTS, len(COSINES), PUSH)
        place = out + (item * tl.num_programs(0) + atom) * LENGTH + N_RADIAL
        place += _species_pair(left, right, SPECIES) * (len(SHIFTS) * len(COSINES))
        for number in tl.static_range(len(SHIFTS) * len(COSINES)):
            tl.store(place + number, tl.sum(sums[number], 0))


@triton.jit
def _sum_bins(weight, mean, bends, slopes, ETA: tl.constexpr, SHIFTS: tl.constexpr, N_ANGLES: tl.constexpr):
    """Weighted sums over bins: of features without cutoffs, of their slopes by mean / -2 ETA, and by cosine."""
    none = tl.zeros_like(mean)
    features, by_mean, by_cosine = none, none, none
    for shift in tl.static_range(len(SHIFTS)):
        total, bent = none, none
        for angle in tl.static_range(N_ANGLES):
            bin_weight = tl.load(weight + shift * N_ANGLES + angle)
            total += bin_weight * bends[angle]
            bent += bin_weight * slopes[angle]
        gaussian = _gaussian(mean, SHIFTS[shift], ETA)
        features += gaussian * total
        by_mean += gaussian * (mean - SHIFTS[shift]) * total
        by_cosine += gaussian * bent
    return features, by_mean, by_cosine


@triton.jit
def angular_vjp(
    bounds,
    whole,
    real,
    cotangent,
    out,
    n_atoms,
    n_pairs,
    ETA: tl.constexpr,
    ZETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    COSINES: tl.constexpr,
    SINES: tl.constexpr,
    SPECIES: tl.constexpr,
    N_RADIAL: tl.constexpr,
    LENGTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the angular part of J^T of a block of slots and one cotangent, every triple seen from both of its pairs."""
    item = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    n_slots = tl.load(bounds + n_atoms * SPECIES)
    if first < n_slots:
        slot = first + tl.arange(0, BLOCK)
        listed = slot < n_slots
        pair = tl.load(whole + slot, mask=listed, other=0)
        atom = tl.load(whole + n_pairs + slot, mask=listed, other=0)
        species = tl.load(whole + 2 * n_pairs + slot, mask=listed, other=0)
        x, y, z, length, fc, dfc = _slot(real, n_pairs, slot, listed)
        low = tl.load(bounds + atom * SPECIES, mask=listed, other=0)
        high = tl.load(bounds + atom * SPECIES + SPECIES, mask=listed, other=0)
        weights = cotangent + (item * n_atoms + atom) * LENGTH + N_RADIAL
        none = tl.zeros_like(length)
        stretch, turn_x, turn_y, turn_z = none, none, none, none
        for step in range(0, tl.max(high - low, 0)):
            k = low + step
            counted = (k < high) & (k != slot)
            other = tl.load(whole + 2 * n_pairs + k, mask=counted, other=0)
            species_pair = _species_pair(tl.minimum(species, other), tl.maximum(species, other), SPECIES)
            weight = weights + species_pair * (len(SHIFTS) * len(COSINES))
            kx, ky, kz, k_length, k_fc, _k_dfc = _slot(real, n_pairs, k, counted)
            mean = 0.5 * (length + k_length)
            bends, slopes = _bends(_dot(x, y, z, kx, ky, kz) * SCALE, ZETA, COSINES, SINES, EPS)
            by_fc, by_mean, by_cosine = _sum_bins(weight, mean, bends, slopes, ETA, SHIFTS, len(COSINES))
            stretch += 2 * k_fc * (dfc * by_fc - ETA * fc * by_mean)
            by_cosine *= 2 * fc * k_fc
            turn_x += by_cosine * kx
            turn_y += by_cosine * ky
            turn_z += by_cosine * kz
        along, length = _dot(turn_x, turn_y, turn_z, x, y, z), tl.maximum(length, SHORTEST)  # 0 where not listed
        place = out + 3 * (item * n_pairs + pair)
        before_x, before_y, before_z = _vector(place, 1, listed)
        tl.store(place, before_x + stretch * x + (turn_x - along * x) / length, mask=listed)
        tl.store(place + 1, before_y + stretch * y + (turn_y - along * y) / length, mask=listed)
        tl.store(place + 2, before_z + stretch * z + (turn_z - along * z) / length, mask=listed)
