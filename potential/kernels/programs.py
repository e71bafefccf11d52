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
from potential.kernels import motion
from potential.kernels.reference import RADIAL_PREFACTOR, SHORTEST_A

__all__ = [
    "angular_jacobian",
    "angular_pull",
    "angular_push",
    "angular_sums",
    "angular_vjp",
    "celu",
    "drift",
    "find_reverse",
    "layers_down",
    "layers_up",
    "list_near",
    "measure",
    "networks",
    "pair_sums",
    "pair_tangents",
    "pair_vectors",
    "pair_virials",
    "radial_pull",
    "radial_push",
    "radial_sums",
    "radial_vjp",
]

# Counts, and what may be a piece of a longer list: a program serves whether or not they are multiples of 16.
ANY_MULTIPLE = (
    *("n_atoms", "n_frames", "n_listed", "n_members", "n_pairs", "n_rows", "n_values"),
    *("frame_of_atom", "other", "row", "species_other", "vec"),
)
_program = triton.jit(do_not_specialize=ANY_MULTIPLE)

LOG2_E = tl.constexpr(1 / math.log(2))
PI = tl.constexpr(math.pi)
PREFACTOR = tl.constexpr(RADIAL_PREFACTOR)
SHORTEST = tl.constexpr(SHORTEST_A)
SCALE = tl.constexpr(ANGLE_SCALE)
LOW = tl.constexpr(motion.LOW)
MULTIPLIERS, INCREMENTS = tl.constexpr(motion.MULTIPLIERS), tl.constexpr(motion.INCREMENTS)


@triton.jit
def _normals(first, second, third, key):
    """Three standard normal numbers of a counter of 32-bit words, the fourth 0, and a key, all int64; see motion.py."""
    a, b, c, d = first, second, third, first * 0
    low, high = key & LOW, (key >> 32) & LOW
    for _ in tl.static_range(10):
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((q >> 32) & LOW) ^ b ^ low, q & LOW, ((p >> 32) & LOW) ^ d ^ high, p & LOW
        low, high = (low + INCREMENTS[0]) & LOW, (high + INCREMENTS[1]) & LOW
    radius, angle = _polar(a, b)
    other_radius, other_angle = _polar(c, d)
    return radius * tl.cos(angle), radius * tl.sin(angle), other_radius * tl.cos(other_angle)


@triton.jit
def _polar(one, other):
    """Radius and angle of a pair of normal numbers, from two words."""
    fraction = (one >> 8).to(tl.float64) / 2**24
    radius = tl.sqrt(tl.maximum(-2 * tl.log(fraction + 2**-24), 0.0))
    return radius, (2 * ((other >> 8).to(tl.float64) / 2**24) - 1) * PI


@_program
def drift(
    positions,
    velocities,
    forces,
    inverse_mass,
    noise_scale,
    frame_of_atom,
    first_atom,
    noise_key,
    step,
    n_atoms,
    PUSH: tl.constexpr,
    HALF_STEP: tl.constexpr,
    DAMPING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move atoms by B, A, O, A of BAOAB, as motion.drift does."""
    atom = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = atom < n_atoms
    frame = tl.load(frame_of_atom + atom, mask=there, other=0)
    mass = tl.load(inverse_mass + atom, mask=there, other=0.0)
    scale = tl.load(noise_scale + atom, mask=there, other=0.0)
    number = tl.load(step + frame)
    draws = _normals(atom - tl.load(first_atom + frame), number & LOW, (number >> 32) & LOW, tl.load(noise_key + frame))
    for axis in tl.static_range(3):
        place = 3 * atom + axis
        velocity = tl.load(velocities + place, mask=there, other=0.0)
        velocity += tl.load(forces + place, mask=there, other=0.0) * mass * PUSH
        position = tl.load(positions + place, mask=there, other=0.0) + velocity * HALF_STEP
        if DAMPING != 1:
            velocity = velocity * DAMPING + draws[axis] * scale
        tl.store(velocities + place, velocity, mask=there)
        tl.store(positions + place, position + velocity * HALF_STEP, mask=there)


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
def _steep(cosine, sine, across, along, ZETA: tl.constexpr, POWER: tl.constexpr, EPS: tl.constexpr):
    """x = (1 + cos(theta - ShfZ)) / 2 and x^(ZETA - 1); across, along: cosine and sine of ShfZ. POWER: see gpu.py."""
    if POWER is None:
        half = tl.maximum(cosine * (0.5 * across) + (sine * (0.5 * along) + 0.5), EPS)  # not the log of 0
        power = tl.exp2(tl.log2(half) * (ZETA - 1))
    else:
        REACH: tl.constexpr = POWER[0]
        TERMS: tl.constexpr = POWER[1]
        SQUARINGS: tl.constexpr = POWER[2]
        place = tl.maximum(cosine * (across / REACH) + (sine * (along / REACH) + (1 - 1 / REACH)), -1.0)
        power = place * TERMS[len(TERMS) - 1] + TERMS[len(TERMS) - 2]
        for term in tl.static_range(len(TERMS) - 3, -1, -1):
            power = power * place + TERMS[term]
        for _ in tl.static_range(SQUARINGS):
            power *= power
        half = place * (0.5 * REACH) + (1 - 0.5 * REACH)
    return half, power


@triton.jit
def _bends(
    cosine,
    ZETA: tl.constexpr,
    POWER: tl.constexpr,
    COSINES: tl.constexpr,
    SINES: tl.constexpr,
    EPS: tl.constexpr,
):
    """Tuples of F2 for every ShfZ, and of its derivative by the cosine of the unscaled angle. cosine: of the scaled."""
    squared = 1 - cosine * cosine
    inverse = tl.rsqrt(squared)
    sine, cotangent = squared * inverse, cosine * inverse
    values, slopes = (), ()
    for angle in tl.static_range(len(COSINES)):
        half, steep = _steep(cosine, sine, COSINES[angle], SINES[angle], ZETA, POWER, EPS)
        slope = steep * (cotangent * (-0.5 * SCALE * ZETA * SINES[angle]) + 0.5 * SCALE * ZETA * COSINES[angle])
        values, slopes = values + (steep * half,), slopes + (slope,)  # noqa: RUF005
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


@_program
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


@_program
def pair_sums(pair_values, row, other, reverse, out, n_pairs, BLOCK: tl.constexpr):
    """Add the values of one atom's pairs to it and take off those of the pairs in which it is the other.

    reverse: number of the pair that is the same one seen from its other atom. Without it (None) values are taken from
    the others, and the order of additions is not fixed.
    """
    atom, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    high = tl.load(row + atom + 1)
    sums = out + 3 * item * tl.num_programs(0)
    none = tl.zeros((BLOCK,), out.dtype.element_ty)
    total_x, total_y, total_z = none, none, none
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        x, y, z = _vector(pair_values + 3 * (item * n_pairs + pair), 1, pair < high)
        if reverse is None:
            # Nothing is added for the many pairs beyond the cutoff that a skin list holds.
            partner = sums + 3 * tl.load(other + pair, mask=pair < high, other=0)
            tl.atomic_add(partner, -x, mask=x != 0, sem="relaxed")
            tl.atomic_add(partner + 1, -y, mask=y != 0, sem="relaxed")
            tl.atomic_add(partner + 2, -z, mask=z != 0, sem="relaxed")
        else:
            back = item * n_pairs + tl.load(reverse + pair, mask=pair < high, other=0)
            back_x, back_y, back_z = _vector(pair_values + 3 * back, 1, pair < high)
            x, y, z = x - back_x, y - back_y, z - back_z
        total_x, total_y, total_z = total_x + x, total_y + y, total_z + z
    mine = sums + 3 * atom
    if reverse is None:
        tl.atomic_add(mine, tl.sum(total_x, 0), sem="relaxed")
        tl.atomic_add(mine + 1, tl.sum(total_y, 0), sem="relaxed")
        tl.atomic_add(mine + 2, tl.sum(total_z, 0), sem="relaxed")
    else:
        tl.store(mine, tl.sum(total_x, 0))
        tl.store(mine + 1, tl.sum(total_y, 0))
        tl.store(mine + 2, tl.sum(total_z, 0))


@_program
def find_reverse(vec, row, other, centre, out, n_pairs, BLOCK: tl.constexpr):
    """Write the number of the pair that is nearest to each seen from its other atom, of a block of pairs."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n_pairs
    x, y, z = _vector(vec + 3 * pair, 1, inside)
    atom, partner = tl.load(centre + pair, mask=inside, other=0), tl.load(other + pair, mask=inside, other=0)
    low = tl.load(row + partner, mask=inside, other=0)
    high = tl.load(row + partner + 1, mask=inside, other=0)
    least, found = tl.zeros_like(x) + float("inf"), low
    for step in range(0, tl.max(high - low, 0).to(tl.int32)):
        back = low + step
        fits = (back < high) & (tl.load(other + back, mask=back < high, other=-1) == atom)
        back_x, back_y, back_z = _vector(vec + 3 * back, 1, fits)
        off_x, off_y, off_z = back_x + x, back_y + y, back_z + z
        squared = tl.where(fits, _dot(off_x, off_y, off_z, off_x, off_y, off_z), float("inf"))
        found = tl.where(squared < least, back, found)
        least = tl.minimum(least, squared)
    tl.store(out + pair, found, mask=inside)


@_program
def pair_virials(pair_values, vec, row, frame_of_atom, out, n_frames, n_pairs, BLOCK: tl.constexpr):
    """Add up vector times value over the pairs of one atom; of its frame, xx yy zz yz xz xy, in float64."""
    atom, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    high = tl.load(row + atom + 1)
    none = tl.zeros((BLOCK,), pair_values.dtype.element_ty)
    xx, yy, zz, yz, xz, xy = none, none, none, none, none, none
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        px, py, pz = _vector(pair_values + 3 * (item * n_pairs + pair), 1, pair < high)
        x, y, z = _vector(vec + 3 * pair, 1, pair < high)
        xx, yy, zz = xx + x * px, yy + y * py, zz + z * pz
        yz += 0.5 * (y * pz + z * py)
        xz += 0.5 * (x * pz + z * px)
        xy += 0.5 * (x * py + y * px)
    place = out + 6 * (item * n_frames + tl.load(frame_of_atom + atom))
    tl.atomic_add(place, tl.sum(xx, 0).to(tl.float64), sem="relaxed")
    tl.atomic_add(place + 1, tl.sum(yy, 0).to(tl.float64), sem="relaxed")
    tl.atomic_add(place + 2, tl.sum(zz, 0).to(tl.float64), sem="relaxed")
    tl.atomic_add(place + 3, tl.sum(yz, 0).to(tl.float64), sem="relaxed")
    tl.atomic_add(place + 4, tl.sum(xz, 0).to(tl.float64), sem="relaxed")
    tl.atomic_add(place + 5, tl.sum(xy, 0).to(tl.float64), sem="relaxed")


@_program
def pair_tangents(atom_values, strain, vec, row, other, frame_of_atom, out, n_frames, n_pairs, BLOCK: tl.constexpr):
    """Write for the pairs of one atom: its value less the other's, and what the strain makes of the vector."""
    atom, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    high = tl.load(row + atom + 1)
    values = atom_values + 3 * item * tl.num_programs(0)
    mine_x, mine_y, mine_z = tl.load(values + 3 * atom), tl.load(values + 3 * atom + 1), tl.load(values + 3 * atom + 2)
    six = strain + 6 * (item * n_frames + tl.load(frame_of_atom + atom))
    xx, yy, zz = tl.load(six), tl.load(six + 1), tl.load(six + 2)
    yz, xz, xy = 0.5 * tl.load(six + 3), 0.5 * tl.load(six + 4), 0.5 * tl.load(six + 5)
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        x, y, z = _vector(vec + 3 * pair, 1, pair < high)
        theirs = values + 3 * tl.load(other + pair, mask=pair < high, other=0)
        their_x, their_y, their_z = _vector(theirs, 1, pair < high)
        place = out + 3 * (item * n_pairs + pair)
        tl.store(place, mine_x - their_x + xx * x + xy * y + xz * z, mask=pair < high)
        tl.store(place + 1, mine_y - their_y + xy * x + yy * y + yz * z, mask=pair < high)
        tl.store(place + 2, mine_z - their_z + xz * x + yz * y + zz * z, mask=pair < high)


@triton.jit
def _celu(x, ALPHA: tl.constexpr):
    """CELU and its slope."""
    slope = tl.exp2(tl.where(x > 0, 0.0, x) * (LOG2_E / ALPHA))  # not a number where x is none
    return tl.where(x > 0, x, (slope - 1) * ALPHA), slope


@_program
def celu(value, slope, n_values, ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    """Replace values by their CELU, and write its slope."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bent, steep = _celu(tl.load(value + place, mask=place < n_values, other=0.0), ALPHA)
    tl.store(slope + place, steep, mask=place < n_values)
    tl.store(value + place, bent, mask=place < n_values)


@triton.jit
def _columns(PIECES: tl.constexpr, layer: tl.constexpr, piece: tl.constexpr):
    """Numbers of the columns of a piece of a layer."""
    first = 0
    for before in tl.static_range(piece):
        first += PIECES[layer][before]
    return first + tl.arange(0, PIECES[layer][piece])


@triton.jit
def _cut(value):
    """What of float32 a tensor core reads, 10 bits of the mantissa, and the rest."""
    high = (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, value - high


@triton.jit
def _product(left, right, total):
    """left @ right + total as good as in float32: the product of the two rests is below its rounding."""
    left, left_rest = _cut(left)
    right, right_rest = _cut(right)
    total = tl.dot(left_rest, right, total, input_precision="tf32")
    total = tl.dot(left, right_rest, total, input_precision="tf32")
    return tl.dot(left, right, total, input_precision="tf32")


@triton.jit
def _forward(inputs, weight, bias, layer: tl.constexpr, WIDTHS: tl.constexpr, PIECES: tl.constexpr):
    """What a linear layer makes of its inputs, both in pieces. weight: (out, in); bias: (out,), or None."""
    N_IN: tl.constexpr = WIDTHS[layer]
    N_OUT: tl.constexpr = WIDTHS[layer + 1]
    outputs = ()
    for o in tl.static_range(len(PIECES[layer + 1])):
        column = _columns(PIECES, layer + 1, o)
        total = None
        for i in tl.static_range(len(PIECES[layer])):
            row = _columns(PIECES, layer, i)
            inside = (row < N_IN)[:, None] & (column < N_OUT)[None, :]
            tile = tl.load(weight + column[None, :] * N_IN + row[:, None], mask=inside, other=0.0)
            total = _product(inputs[i], tile, total)
        if bias is not None:
            total += tl.load(bias + column, mask=column < N_OUT, other=0.0)[None, :]
        outputs = outputs + (total,)  # noqa: RUF005
    return outputs


@triton.jit
def _backward(pulls, weight, layer: tl.constexpr, WIDTHS: tl.constexpr, PIECES: tl.constexpr):
    """Of what _forward does, the transpose: derivatives by inputs from those by outputs."""
    N_IN: tl.constexpr = WIDTHS[layer]
    N_OUT: tl.constexpr = WIDTHS[layer + 1]
    outputs = ()
    for i in tl.static_range(len(PIECES[layer])):
        row = _columns(PIECES, layer, i)
        total = None
        for o in tl.static_range(len(PIECES[layer + 1])):
            column = _columns(PIECES, layer + 1, o)
            inside = (column < N_OUT)[:, None] & (row < N_IN)[None, :]
            tile = tl.load(weight + column[:, None] * N_IN + row[None, :], mask=inside, other=0.0)
            total = _product(pulls[o], tile, total)
        outputs = outputs + (total,)  # noqa: RUF005
    return outputs


@triton.jit
def _activate(values, ALPHA: tl.constexpr):
    """CELU of all pieces, and its slopes."""
    bent, slopes = (), ()
    for piece in tl.static_range(len(values)):
        value, slope = _celu(values[piece], ALPHA)
        bent, slopes = bent + (value,), slopes + (slope,)  # noqa: RUF005
    return bent, slopes


@triton.jit
def _times(left, right):
    products = ()
    for piece in tl.static_range(len(left)):
        products = products + (left[piece] * right[piece],)  # noqa: RUF005
    return products


@triton.jit
def _read(values, row, mask, layer: tl.constexpr, WIDTHS: tl.constexpr, PIECES: tl.constexpr):
    """Some rows of a matrix, in pieces."""
    pieces = ()
    for piece in tl.static_range(len(PIECES[layer])):
        column = _columns(PIECES, layer, piece)
        inside = mask[:, None] & (column < WIDTHS[layer])[None, :]
        pieces = pieces + (tl.load(values + row[:, None] + column[None, :], mask=inside, other=0.0),)  # noqa: RUF005
    return pieces


@triton.jit
def _write(pieces, values, row, mask, layer: tl.constexpr, WIDTHS: tl.constexpr, PIECES: tl.constexpr):
    for piece in tl.static_range(len(PIECES[layer])):
        column = _columns(PIECES, layer, piece)
        inside = mask[:, None] & (column < WIDTHS[layer])[None, :]
        tl.store(values + row[:, None] + column[None, :], pieces[piece], mask=inside)


@triton.jit
def _add_sums(pieces, values, layer: tl.constexpr, WIDTHS: tl.constexpr, PIECES: tl.constexpr):
    """Add the sum over all rows to a vector; the order of additions is not fixed."""
    for piece in tl.static_range(len(PIECES[layer])):
        column = _columns(PIECES, layer, piece)
        tl.atomic_add(values + column, tl.sum(pieces[piece], 0), mask=column < WIDTHS[layer], sem="relaxed")


@_program
def networks(
    aev,
    atoms,
    flat,
    energies,
    gradient,
    n_listed,
    n_atoms,
    n_parameters,
    GRADIENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    PIECES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the energies of some atoms by one member, and where GRADIENT their derivatives by the AEVs.

    flat: (M, n_parameters). WIDTHS: of the AEV, the hidden layers, and 1; PIECES: those that each is cut into; OFFSETS:
    of each weight in flat, its bias follows.
    """
    N_HIDDEN: tl.constexpr = len(WIDTHS) - 2
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    listed = place < n_listed
    atom = tl.load(atoms + place, mask=listed, other=0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * n_atoms
    mine = flat + tl.program_id(1) * n_parameters
    values, slopes = _read(aev, atom * WIDTHS[0], listed, 0, WIDTHS, PIECES), ()
    for layer in tl.static_range(N_HIDDEN):
        weight = mine + OFFSETS[layer]
        values = _forward(values, weight, weight + WIDTHS[layer] * WIDTHS[layer + 1], layer, WIDTHS, PIECES)
        values, slope = _activate(values, ALPHA)
        slopes = slopes + (slope,)  # noqa: RUF005
    last = mine + OFFSETS[N_HIDDEN]
    pulls = _read(last, tl.zeros_like(atom), atom >= 0, N_HIDDEN, WIDTHS, PIECES)
    energy = tl.load(last + WIDTHS[N_HIDDEN]) + tl.zeros((ROWS,), aev.dtype.element_ty)
    for piece in tl.static_range(len(PIECES[N_HIDDEN])):
        energy += tl.sum(values[piece] * pulls[piece], 1)
    tl.store(energies + first + atom, energy, mask=listed)
    if GRADIENT:
        for layer in tl.static_range(N_HIDDEN - 1, -1, -1):
            pulls = _backward(_times(pulls, slopes[layer]), mine + OFFSETS[layer], layer, WIDTHS, PIECES)
        _write(pulls, gradient, (first + atom) * WIDTHS[0], listed, 0, WIDTHS, PIECES)


@triton.jit
def _add_scaled(pieces, factors, others):
    """Every row times its factor, and what is added to it."""
    sums = ()
    for piece in tl.static_range(len(pieces)):
        sums = sums + (pieces[piece] * factors[:, None] + others[piece],)  # noqa: RUF005
    return sums


@_program
def layers_up(
    aev,
    atoms,
    flat,
    by_energy,
    by_g,
    lower,
    into,
    n_listed,
    n_atoms,
    n_rows,
    n_parameters,
    N_MEMBERS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PIECES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write what comes into every layer of one member, and how that changes along by_g, (M, N, L); see layers.py.

    lower: matrices (N_MEMBERS, 2 n_rows, width) of one layer after the other; n_rows are values, n_rows changes. What
    the loss's derivative by the last layer is comes into `into`.
    """
    N_HIDDEN: tl.constexpr = len(WIDTHS) - 2
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    listed, every = place < n_listed, place >= 0
    atom = tl.load(atoms + place, mask=listed, other=0).to(tl.int64)
    member = tl.program_id(1)
    first = member.to(tl.int64) * n_atoms
    row = place.to(tl.int64) + 2 * member * n_rows
    size = (2 * N_MEMBERS * n_rows).to(tl.int64)
    mine, target = flat + member * n_parameters, into + member * n_parameters
    values = _read(aev, atom * WIDTHS[0], listed, 0, WIDTHS, PIECES)
    changes = _read(by_g, (first + atom) * WIDTHS[0], listed, 0, WIDTHS, PIECES)
    for layer in tl.static_range(N_HIDDEN):
        weight = mine + OFFSETS[layer]
        _write(values, lower, row * WIDTHS[layer], every, layer, WIDTHS, PIECES)
        _write(changes, lower, (row + n_rows) * WIDTHS[layer], every, layer, WIDTHS, PIECES)
        values = _forward(values, weight, weight + WIDTHS[layer] * WIDTHS[layer + 1], layer, WIDTHS, PIECES)
        values, slopes = _activate(values, ALPHA)
        changes = _times(_forward(changes, weight, None, layer, WIDTHS, PIECES), slopes)
        lower += size * WIDTHS[layer]
    _write(values, lower, row * WIDTHS[N_HIDDEN], every, N_HIDDEN, WIDTHS, PIECES)
    _write(changes, lower, (row + n_rows) * WIDTHS[N_HIDDEN], every, N_HIDDEN, WIDTHS, PIECES)
    push = tl.load(by_energy + first + atom, mask=listed, other=0.0)
    last = target + OFFSETS[N_HIDDEN]
    _add_sums(_add_scaled(values, push, changes), last, N_HIDDEN, WIDTHS, PIECES)
    tl.atomic_add(last + WIDTHS[N_HIDDEN], tl.sum(push, 0), sem="relaxed")


@triton.jit
def _bend(pulls, backs, values, changes, ALPHA: tl.constexpr):
    """Derivatives by z of the energy and of the loss, from those by the layer's output and from layers_up.

    CELU' is 1 + value / alpha where z < 0, and CELU'' is CELU' / alpha there; else 1, and 0.
    """
    steep, bent = (), ()
    for piece in tl.static_range(len(pulls)):
        falling = values[piece] < 0
        slope = tl.where(falling, 1 + values[piece] / ALPHA, 1.0)
        change = tl.where(falling, changes[piece] * pulls[piece] / ALPHA, 0.0)
        steep, bent = steep + (pulls[piece] * slope,), bent + (backs[piece] * slope + change,)  # noqa: RUF005
    return steep, bent


@_program
def layers_down(
    atoms,
    flat,
    by_energy,
    lower,
    upper,
    into,
    n_listed,
    n_atoms,
    n_rows,
    n_parameters,
    N_MEMBERS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PIECES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ALPHA: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the derivatives by z of the loss, then of the energies, of every hidden layer of one member: `upper`.

    It is as `lower`, which layers_up wrote, and begins with the last of those layers. A product of an upper matrix,
    transposed, with the lower one of its layer is the derivative by a weight; those by biases are added to `into`.
    """
    N_HIDDEN: tl.constexpr = len(WIDTHS) - 2
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    listed, every = place < n_listed, place >= 0
    atom = tl.load(atoms + place, mask=listed, other=0).to(tl.int64)
    member = tl.program_id(1)
    row = place.to(tl.int64) + 2 * member * n_rows
    size = (2 * N_MEMBERS * n_rows).to(tl.int64)
    mine, target = flat + member * n_parameters, into + member * n_parameters
    push = tl.load(by_energy + member.to(tl.int64) * n_atoms + atom, mask=listed, other=0.0)
    pulls = _read(mine + OFFSETS[N_HIDDEN], tl.zeros_like(atom), every, N_HIDDEN, WIDTHS, PIECES)
    backs = _scaled(pulls, push)
    for layer in tl.static_range(N_HIDDEN):
        lower += size * WIDTHS[layer]
    for layer in tl.static_range(N_HIDDEN - 1, -1, -1):
        weight = mine + OFFSETS[layer]
        values = _read(lower, row * WIDTHS[layer + 1], every, layer + 1, WIDTHS, PIECES)
        changes = _read(lower, (row + n_rows) * WIDTHS[layer + 1], every, layer + 1, WIDTHS, PIECES)
        pulls, backs = _bend(pulls, backs, values, changes, ALPHA)
        _write(backs, upper, row * WIDTHS[layer + 1], every, layer + 1, WIDTHS, PIECES)
        _write(pulls, upper, (row + n_rows) * WIDTHS[layer + 1], every, layer + 1, WIDTHS, PIECES)
        _add_sums(backs, target + OFFSETS[layer] + WIDTHS[layer] * WIDTHS[layer + 1], layer + 1, WIDTHS, PIECES)
        if layer > 0:
            pulls = _backward(pulls, weight, layer, WIDTHS, PIECES)
            backs = _backward(backs, weight, layer, WIDTHS, PIECES)
        lower -= size * WIDTHS[layer]
        upper += size * WIDTHS[layer + 1]


@triton.jit
def _scaled(pieces, factors):
    """Every row times its factor."""
    products = ()
    for piece in tl.static_range(len(pieces)):
        products = products + (pieces[piece] * factors[:, None],)  # noqa: RUF005
    return products


@_program
def measure(vec, row, distance, n_near, CUTOFF: tl.constexpr, BLOCK: tl.constexpr):
    """Write the distances of one atom's pairs, and how many of them are shorter than CUTOFF."""
    atom = tl.program_id(0).to(tl.int64)
    high = tl.load(row + atom + 1)
    near = tl.zeros((BLOCK,), tl.int64)
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        x, y, z = _vector(vec + 3 * pair, 1, pair < high)
        if vec.dtype.element_ty == tl.float32:
            length = tl.sqrt_rn(_dot(x, y, z, x, y, z))
        else:
            length = tl.sqrt(_dot(x, y, z, x, y, z))
        tl.store(distance + pair, length, mask=pair < high)
        near += ((length < CUTOFF) & (pair < high)).to(tl.int64)
    tl.store(n_near + atom, tl.sum(near, 0))


@_program
def list_near(
    vec,
    distance,
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
    """Fill the slots of one atom. near_row: (N + 1,), first slot of each atom."""
    atom = tl.program_id(0).to(tl.int64)
    low, high = tl.load(row + atom), tl.load(row + atom + 1)
    first = tl.load(near_row + atom)
    for species in range(SPECIES):
        tl.store(bounds + atom * SPECIES + species, first)
        for start in range(low, high, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            listed = tl.load(distance + pair, mask=pair < high, other=CUTOFF) < CUTOFF
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


@_program
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


@_program
def radial_vjp(
    vec,
    distance,
    row,
    species_other,
    cotangent,
    out,
    n_pairs,
    CUTOFF: tl.constexpr,
    ETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the radial part of J^T of one atom and one cotangent: 0 beyond the cutoff."""
    atom, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    high = tl.load(row + atom + 1)
    mine = cotangent + (item * tl.num_programs(0) + atom) * LENGTH
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < high
        length = tl.maximum(tl.load(distance + pair, mask=inside, other=CUTOFF), SHORTEST)
        fc, dfc = _cutoff(length, CUTOFF)
        near = length < CUTOFF
        weights = mine + tl.load(species_other + pair, mask=near, other=0) * len(SHIFTS)
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
def _slope_tile(distance, species_other, pair, high, species, CUTOFF: tl.constexpr, ETA: tl.constexpr, shifts):
    """(shifts, pairs): derivatives of the features by length, zero for neighbours of other species or too far away."""
    length = tl.maximum(tl.load(distance + pair, mask=pair < high, other=CUTOFF), SHORTEST)
    mine = (length < CUTOFF) & (tl.load(species_other + pair, mask=pair < high, other=-1) == species)
    fc, dfc = _cutoff(length, CUTOFF)
    _feature, slope = _radial_features(length[None, :], fc[None, :], dfc[None, :], shifts[:, None], ETA)
    return tl.where(mine[None, :], slope / length[None, :], 0.0)


@_program
def radial_pull(
    vec,
    distance,
    row,
    species_other,
    cotangent,
    out,
    n_members,
    n_pairs,
    CUTOFF: tl.constexpr,
    ETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    LENGTH: tl.constexpr,
    SPECIES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the radial part of J^T of one atom and some cotangents. WIDTH: shifts, filled up to a power of 2."""
    atom, n_atoms = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    member = (tl.program_id(1) * MEMBERS + tl.arange(0, MEMBERS)).to(tl.int64)
    number = tl.arange(0, WIDTH)
    shifts = _constants(SHIFTS, WIDTH, out.dtype.element_ty)
    there = (member < n_members)[:, None]
    rows = cotangent + (member[:, None] * n_atoms + atom) * LENGTH + number[None, :]
    high = tl.load(row + atom + 1)
    for start in range(tl.load(row + atom), high, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        slope = tl.zeros((MEMBERS, BLOCK), out.dtype.element_ty)
        for species in range(SPECIES):
            weighed = there & (number < len(SHIFTS))[None, :]
            weights = tl.load(rows + species * len(SHIFTS), mask=weighed, other=0.0)
            slopes = _slope_tile(distance, species_other, pair, high, species, CUTOFF, ETA, shifts)
            slope = _product(weights, slopes, slope)
        x, y, z = _vector(vec + 3 * pair, 1, pair < high)
        place, inside = out + 3 * (member[:, None] * n_pairs + pair[None, :]), there & (pair < high)[None, :]
        tl.store(place, slope * x[None, :], mask=inside)
        tl.store(place + 1, slope * y[None, :], mask=inside)
        tl.store(place + 2, slope * z[None, :], mask=inside)


@_program
def radial_push(
    vec,
    distance,
    row,
    species_other,
    tangent,
    out,
    n_members,
    n_pairs,
    CUTOFF: tl.constexpr,
    ETA: tl.constexpr,
    SHIFTS: tl.constexpr,
    LENGTH: tl.constexpr,
    SPECIES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the radial part of what J makes of some tangents, of one atom."""
    atom, n_atoms = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    member = (tl.program_id(1) * MEMBERS + tl.arange(0, MEMBERS)).to(tl.int64)
    number = tl.arange(0, WIDTH)
    shifts = _constants(SHIFTS, WIDTH, out.dtype.element_ty)
    there = (member < n_members)[:, None]
    high = tl.load(row + atom + 1)
    for species in range(SPECIES):
        total = tl.zeros((MEMBERS, WIDTH), out.dtype.element_ty)
        for start in range(tl.load(row + atom), high, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            x, y, z = _vector(vec + 3 * pair, 1, pair < high)
            place = tangent + 3 * (member[:, None] * n_pairs + pair[None, :])
            push_x, push_y, push_z = _vector(place, 1, there & (pair < high)[None, :])
            slopes = _slope_tile(distance, species_other, pair, high, species, CUTOFF, ETA, shifts)
            # What lies beyond the cutoff may be anything.
            stretch = _dot(x[None, :], y[None, :], z[None, :], push_x, push_y, push_z)
            near = tl.load(distance + pair, mask=pair < high, other=CUTOFF) < CUTOFF
            total = _product(tl.where(near[None, :], stretch, 0.0), tl.trans(slopes), total)
        place = out + (member[:, None] * n_atoms + atom) * LENGTH + species * len(SHIFTS) + number[None, :]
        tl.store(place, total, mask=there & (number < len(SHIFTS))[None, :])


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


@_program
def angular_sums(
    bounds,
    whole,
    real,
    tangent,
    out,
    n_pairs,
    ETA: tl.constexpr,
    ZETA: tl.constexpr,
    POWER: tl.constexpr,
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
            bends, slopes = _bends(cosine * SCALE, ZETA, POWER, COSINES, SINES, EPS)
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
def _sum_bins(weights, mean, bends, slopes, ETA: tl.constexpr, SHIFTS: tl.constexpr, N_ANGLES: tl.constexpr):
    """Weighted sums over bins: of features without cutoffs, of their slopes by mean / -2 ETA, and by cosine."""
    none = tl.zeros_like(mean)
    features, by_mean, by_cosine = none, none, none
    for shift in tl.static_range(len(SHIFTS)):
        total, bent = none, none
        for angle in tl.static_range(N_ANGLES):
            total += weights[shift * N_ANGLES + angle] * bends[angle]
            bent += weights[shift * N_ANGLES + angle] * slopes[angle]
        gaussian = _gaussian(mean, SHIFTS[shift], ETA)
        total *= gaussian
        features += total
        by_mean += total * (mean - SHIFTS[shift])
        by_cosine += gaussian * bent
    return features, by_mean, by_cosine


@_program
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
    POWER: tl.constexpr,
    SHIFTS: tl.constexpr,
    COSINES: tl.constexpr,
    SINES: tl.constexpr,
    SPECIES: tl.constexpr,
    N_RADIAL: tl.constexpr,
    LENGTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the angular part of J^T of a block of slots and one cotangent, every triple seen from both of its pairs.

    The weights of all bins stay in registers while the neighbours of one species are gone through.
    """
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
        none = tl.zeros_like(length)
        stretch, turn_x, turn_y, turn_z = none, none, none, none
        for other in range(SPECIES):
            species_pair = _species_pair(tl.minimum(species, other), tl.maximum(species, other), SPECIES)
            weight = cotangent + (item * n_atoms + atom) * LENGTH + N_RADIAL
            weight += species_pair * (len(SHIFTS) * len(COSINES))
            weights = ()
            for number in tl.static_range(len(SHIFTS) * len(COSINES)):
                weights = weights + (tl.load(weight + number, mask=listed, other=0.0),)  # noqa: RUF005
            low = tl.load(bounds + atom * SPECIES + other, mask=listed, other=0)
            high = tl.load(bounds + atom * SPECIES + other + 1, mask=listed, other=0)
            for step in range(0, tl.max(high - low, 0).to(tl.int32)):
                k = low + step
                counted = (k < high) & (k != slot)
                kx, ky, kz, k_length, k_fc, _k_dfc = _slot(real, n_pairs, k, counted)
                mean = 0.5 * (length + k_length)
                bends, slopes = _bends(_dot(x, y, z, kx, ky, kz) * SCALE, ZETA, POWER, COSINES, SINES, EPS)
                by_fc, by_mean, by_cosine = _sum_bins(weights, mean, bends, slopes, ETA, SHIFTS, len(COSINES))
                stretch += k_fc * (dfc * by_fc - ETA * fc * by_mean)
                by_cosine *= fc * k_fc
                turn_x += by_cosine * kx
                turn_y += by_cosine * ky
                turn_z += by_cosine * kz
        along, half = _dot(turn_x, turn_y, turn_z, x, y, z), 0.5 * tl.maximum(length, SHORTEST)  # 0 where not listed
        place = out + 3 * (item * n_pairs + pair)
        before_x, before_y, before_z = _vector(place, 1, listed)
        tl.store(place, before_x + 2 * stretch * x + (turn_x - along * x) / half, mask=listed)
        tl.store(place + 1, before_y + 2 * stretch * y + (turn_y - along * y) / half, mask=listed)
        tl.store(place + 2, before_z + 2 * stretch * z + (turn_z - along * z) / half, mask=listed)


@_program
def angular_jacobian(
    bounds,
    whole,
    real,
    out,
    n_atoms,
    n_pairs,
    ETA: tl.constexpr,
    ZETA: tl.constexpr,
    POWER: tl.constexpr,
    SHIFTS: tl.constexpr,
    COSINES: tl.constexpr,
    SINES: tl.constexpr,
    SPECIES: tl.constexpr,
    N_RADIAL: tl.constexpr,
    LENGTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write how the angular part changes with the vectors of a block of slots, for partners of one species.

    out: (3, SPECIES, bins, n_pairs), by component of the vector, species of the partner, bin and slot.
    """
    other = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    n_slots = tl.load(bounds + n_atoms * SPECIES)
    N_BINS: tl.constexpr = len(SHIFTS) * len(COSINES)
    if first < n_slots:
        slot = first + tl.arange(0, BLOCK)
        listed = slot < n_slots
        atom = tl.load(whole + n_pairs + slot, mask=listed, other=0)
        x, y, z, length, fc, dfc = _slot(real, n_pairs, slot, listed)
        inverse = 1 / tl.maximum(length, SHORTEST)
        low = tl.load(bounds + atom * SPECIES + other, mask=listed, other=0)
        high = tl.load(bounds + atom * SPECIES + other + 1, mask=listed, other=0)
        sums = ()
        for _number in tl.static_range(3 * N_BINS):
            sums = sums + (tl.zeros_like(length),)  # noqa: RUF005
        for step in range(0, tl.max(high - low, 0).to(tl.int32)):
            k = low + step
            counted = (k < high) & (k != slot)
            kx, ky, kz, k_length, k_fc, _k_dfc = _slot(real, n_pairs, k, counted)
            mean, cosine = 0.5 * (length + k_length), _dot(x, y, z, kx, ky, kz)
            bends, slopes = _bends(cosine * SCALE, ZETA, POWER, COSINES, SINES, EPS)
            turn_x, turn_y, turn_z = kx - cosine * x, ky - cosine * y, kz - cosine * z
            added = ()
            for shift in tl.static_range(len(SHIFTS)):
                gaussian = 2 * k_fc * _gaussian(mean, SHIFTS[shift], ETA)
                along = gaussian * (dfc - ETA * fc * (mean - SHIFTS[shift]))
                across = gaussian * fc * inverse
                for angle in tl.static_range(len(COSINES)):
                    stretch, turn = along * bends[angle], across * slopes[angle]
                    added = added + (  # noqa: RUF005
                        sums[3 * (shift * len(COSINES) + angle)] + stretch * x + turn * turn_x,
                        sums[3 * (shift * len(COSINES) + angle) + 1] + stretch * y + turn * turn_y,
                        sums[3 * (shift * len(COSINES) + angle) + 2] + stretch * z + turn * turn_z,
                    )
            sums = added
        for number in tl.static_range(N_BINS):
            for axis in tl.static_range(3):
                place = out + ((axis * SPECIES + other) * N_BINS + number).to(tl.int64) * n_pairs
                tl.store(place + slot, sums[3 * number + axis], mask=listed)


@triton.jit
def _tile(
    jacobian, axis, other, slot, listed, n_pairs, SPECIES: tl.constexpr, N_BINS: tl.constexpr, WIDTH: tl.constexpr
):
    """(WIDTH, slots): one component of what angular_jacobian wrote, for partners of one species."""
    number = tl.arange(0, WIDTH)
    place = ((axis * SPECIES + other) * N_BINS + number).to(tl.int64)[:, None] * n_pairs + slot[None, :]
    return tl.load(jacobian + place, mask=(number < N_BINS)[:, None] & listed[None, :], other=0.0)


@_program
def angular_pull(
    bounds,
    whole,
    jacobian,
    cotangent,
    out,
    n_members,
    n_pairs,
    SPECIES: tl.constexpr,
    N_RADIAL: tl.constexpr,
    LENGTH: tl.constexpr,
    N_BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the angular part of J^T of one atom and some cotangents, from the Jacobian of angular_jacobian.

    WIDTH: N_BINS, filled up to a power of 2; MEMBERS: cotangents of a program.
    """
    atom, n_atoms = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    member = tl.program_id(1) * MEMBERS + tl.arange(0, MEMBERS)
    number = tl.arange(0, WIDTH)
    weighed = (member < n_members)[:, None] & (number < N_BINS)[None, :]
    rows = cotangent + (member.to(tl.int64)[:, None] * n_atoms + atom) * LENGTH + N_RADIAL + number[None, :]
    for species in range(SPECIES):
        high = tl.load(bounds + atom * SPECIES + species + 1)
        for start in range(tl.load(bounds + atom * SPECIES + species), high, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            listed = slot < high
            x = tl.zeros((MEMBERS, BLOCK), out.dtype.element_ty)
            y, z = x, x
            for other in range(SPECIES):
                pair = _species_pair(min(species, other), max(species, other), SPECIES)
                weights = tl.load(rows + pair * N_BINS, mask=weighed, other=0.0)
                tile = _tile(jacobian, 0, other, slot, listed, n_pairs, SPECIES, N_BINS, WIDTH)
                x = _product(weights, tile, x)
                tile = _tile(jacobian, 1, other, slot, listed, n_pairs, SPECIES, N_BINS, WIDTH)
                y = _product(weights, tile, y)
                tile = _tile(jacobian, 2, other, slot, listed, n_pairs, SPECIES, N_BINS, WIDTH)
                z = _product(weights, tile, z)
            place = member.to(tl.int64)[:, None] * n_pairs + tl.load(whole + slot, mask=listed, other=0)[None, :]
            inside = (member < n_members)[:, None] & listed[None, :]
            before_x, before_y, before_z = _vector(out + 3 * place, 1, inside)
            tl.store(out + 3 * place, before_x + x, mask=inside)
            tl.store(out + 3 * place + 1, before_y + y, mask=inside)
            tl.store(out + 3 * place + 2, before_z + z, mask=inside)


@_program
def angular_push(
    bounds,
    whole,
    jacobian,
    tangent,
    out,
    n_members,
    n_pairs,
    SPECIES: tl.constexpr,
    N_RADIAL: tl.constexpr,
    LENGTH: tl.constexpr,
    N_BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the angular part of what J makes of some tangents, of one atom, from the Jacobian of angular_jacobian."""
    atom, n_atoms = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    member = tl.program_id(1) * MEMBERS + tl.arange(0, MEMBERS)
    number = tl.arange(0, WIDTH)
    for left in range(SPECIES):
        for right in range(left, SPECIES):
            total = tl.zeros((MEMBERS, WIDTH), out.dtype.element_ty)
            # Pairs with an atom of one species, whose partners are of the other, and the other way round.
            for turn in range(1 if left == right else 2):
                mine, other = left + turn * (right - left), right - turn * (right - left)
                high = tl.load(bounds + atom * SPECIES + mine + 1)
                for start in range(tl.load(bounds + atom * SPECIES + mine), high, BLOCK):
                    slot = start + tl.arange(0, BLOCK)
                    listed = slot < high
                    pair = tl.load(whole + slot, mask=listed, other=0)
                    place = tangent + 3 * (member.to(tl.int64)[:, None] * n_pairs + pair[None, :])
                    x, y, z = _vector(place, 1, (member < n_members)[:, None] & listed[None, :])
                    tile = _tile(jacobian, 0, other, slot, listed, n_pairs, SPECIES, N_BINS, WIDTH)
                    total = _product(x, tl.trans(tile), total)
                    tile = _tile(jacobian, 1, other, slot, listed, n_pairs, SPECIES, N_BINS, WIDTH)
                    total = _product(y, tl.trans(tile), total)
                    tile = _tile(jacobian, 2, other, slot, listed, n_pairs, SPECIES, N_BINS, WIDTH)
                    total = _product(z, tl.trans(tile), total)
            place = (member.to(tl.int64)[:, None] * n_atoms + atom) * LENGTH + N_RADIAL
            place += _species_pair(left, right, SPECIES) * N_BINS + number[None, :]
            tl.store(out + place, total, mask=(member < n_members)[:, None] & (number < N_BINS)[None, :])
